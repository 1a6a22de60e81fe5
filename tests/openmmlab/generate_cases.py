"""Write the cases of data/ anew: ``python tests/openmmlab/generate_cases.py``, with mmcv 2.1.0 and its compiled ops.

Ops that mmcv has compiled for GPUs only are computed here by their definitions, element by element in float64.
"""

import math
from collections.abc import Callable

import numpy as np
import test_ops
import torch
from test_ops import CASES, DATA, OPS, run
from torch import Tensor

import zoo.openmmlab


def boxes(generator: torch.Generator, count: int) -> Tensor:
    corner, size = (torch.rand(count, 2, generator=generator) * scale for scale in (30, 40))
    return torch.cat([corner, corner + size + 1], dim=1)


def scores(generator: torch.Generator, count: int) -> Tensor:
    """All different: the order of equal ones is not defined."""
    return (torch.randperm(count, generator=generator) + 1) / (count + 1)


def rois(generator: torch.Generator) -> Tensor:
    """Also partly outside of a picture of 32 x 40 pixels, and smaller than a pixel of the map."""
    regions = boxes(generator, 6) - 15
    regions[0] = torch.tensor([10.0, 10.0, 10.5, 11.0])
    return torch.cat([torch.tensor([[0.0], [1], [1], [0], [1], [0]]), regions], dim=1)


def convolution(generator: torch.Generator, geometry: dict, *, mask: bool) -> dict[str, Tensor]:
    size = (3, 7) if geometry is test_ops.STRIDED else (6, 7)
    normal = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    points = 9 * geometry["deform_groups"]
    inputs = {"input": normal(2, 4, 6, 7), "offset": normal(2, 2 * points, *size)}
    if mask:
        inputs["mask"] = normal(2, points, *size).sigmoid()
    inputs["weight"] = normal(6, 4 // geometry["groups"], 3, 3) / 3
    return inputs | ({"bias": normal(6)} if mask else {})


def make_inputs(op: str, index: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(100 * list(OPS).index(op) + index)
    normal = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    options = OPS[op][2][index]
    match op:
        case "soft_nms":  # its order of equal scores is defined
            ties = (scores(generator, 60) * 9).ceil() / 10
            return {"boxes": boxes(generator, 60), "scores": ties}
        case "nms":
            return {"boxes": boxes(generator, 60), "scores": scores(generator, 60)}
        case "batched_nms":
            classes = torch.randint(0, 3, (60,), generator=generator)
            return {"boxes": boxes(generator, 60), "scores": scores(generator, 60), "idxs": classes}
        case "nms_match":
            return {"dets": torch.cat([boxes(generator, 60), scores(generator, 60)[:, None]], dim=1)}
        case "bbox_overlaps":
            first = boxes(generator, 8)
            moved = first + 8 * torch.rand(8, 4, generator=generator) - 4
            return {"bboxes1": first, "bboxes2": moved if options["aligned"] else boxes(generator, 5)}
        case "roi_align" | "roi_pool":
            return {"input": normal(2, 3, 8, 10), "rois": rois(generator)}
        case "deform_conv":
            return convolution(generator, options, mask=False)
        case "modulated_deform_conv":
            return convolution(generator, options, mask=True)
        case "sigmoid_focal_loss":  # class 4 is the background
            target = torch.randint(0, 5, (12,), generator=generator)
            return {
                "input": normal(12, 4),
                "target": target.clamp(max=3) if index else target,
                "weight": 1 + torch.rand(4, generator=generator),
            }
        case "softmax_focal_loss":
            target = torch.randint(-1, 4, (12,), generator=generator)
            return {"input": normal(12, 4), "target": target, "weight": 1 + torch.rand(4, generator=generator)}
        case "psa_mask":
            height, width = options["size"]
            return {"input": normal(2, height * width, 4, 5)}
        case "masked_conv":
            mask = torch.rand(1, 6, 7, generator=generator) - 0.5
            mask[:, 4:] = -1  # pixels that a result without padding does not have
            return {"features": normal(1, 3, 6, 7), "mask": mask, "weight": normal(4, 3, 3, 3) / 3, "bias": normal(4)}
        case "carafe":
            return {"features": normal(2, 4, 3, 5), "masks": normal(2, 18, 6, 10)}
        case "deform_attention":
            locations = torch.rand(2, 3, 2, 2, 4, 2, generator=generator) * 1.4 - 0.2
            return {"value": normal(2, 26, 2, 3), "locations": locations, "weights": normal(2, 3, 2, 2, 4)}
    raise ValueError(op)


def roi_pool(input: Tensor, rois: Tensor, size: tuple[int, int], scale: float) -> Tensor:
    output = input.new_zeros(len(rois), input.shape[1], *size)
    for n, (image, x1, y1, x2, y2) in enumerate(rois.tolist()):
        bin_width, bin_height = (
            (end + 1 - start) * scale / count for start, end, count in ((x1, x2, size[1]), (y1, y2, size[0]))
        )
        for row in range(size[0]):
            for column in range(size[1]):
                top, left = math.floor(row * bin_height + y1 * scale), math.floor(column * bin_width + x1 * scale)
                bottom, right = (
                    math.ceil((row + 1) * bin_height + y1 * scale),
                    math.ceil((column + 1) * bin_width + x1 * scale),
                )
                pixels = input[int(image), :, max(top, 0) : max(bottom, 0), max(left, 0) : max(right, 0)].flatten(1)
                if pixels.shape[1]:
                    output[n, :, row, column] = pixels.amax(1)
    return output


def reduce(losses: Tensor, reduction: str) -> Tensor:
    return losses.sum() / (len(losses) if reduction == "mean" else 1)


def sigmoid_focal_loss(
    input: Tensor, target: Tensor, weight: Tensor, gamma: float, alpha: float, reduction: str
) -> Tensor:
    rows = []
    for logits, label in zip(input, target.tolist()):
        for number, logit in enumerate(logits):
            p = 1 / (1 + torch.exp(-logit if number == label else logit))
            factor = (alpha if number == label else 1 - alpha) * weight[min(label, len(weight) - 1)]
            rows.append(-factor * (1 - p) ** gamma * p.log())
    return reduce(torch.stack(rows).view_as(input), reduction)


def softmax_focal_loss(
    input: Tensor, target: Tensor, weight: Tensor, gamma: float, alpha: float, reduction: str
) -> Tensor:
    rows = []
    for logits, label in zip(input, target.tolist()):
        p = logits[label].exp() / logits.exp().sum()
        rows.append(-alpha * weight[label] * (1 - p) ** gamma * p.log() * (label >= 0))
    return reduce(torch.stack(rows), reduction)


def masked_conv(features: Tensor, mask: Tensor, weight: Tensor, bias: Tensor, padding: int | tuple[int, int]) -> Tensor:
    result = torch.nn.functional.conv2d(features, weight, bias, padding=padding)
    return result * (mask > 0)[:, : result.shape[2], : result.shape[3]]


def carafe(features: Tensor, masks: Tensor, kernel: int, groups: int, scale: int) -> Tensor:
    batch, channels, height, width = features.shape
    output = []
    for n in range(batch):
        for c in range(channels):
            for y in range(height * scale):
                for x in range(width * scale):
                    total = features.new_zeros(())
                    for i in range(kernel):
                        for j in range(kernel):
                            row, column = y // scale + i - kernel // 2, x // scale + j - kernel // 2
                            if 0 <= row < height and 0 <= column < width:
                                point = (c // (channels // groups) * kernel + i) * kernel + j
                                total = total + features[n, c, row, column] * masks[n, point, y, x]
                    output.append(total)
    return torch.stack(output).view(batch, channels, height * scale, width * scale)


def deform_attention(value: Tensor, locations: Tensor, weights: Tensor, shapes: list[tuple[int, int]]) -> Tensor:
    batch, queries, heads, _, points, _ = locations.shape
    dim = value.shape[-1]
    output = []
    for b in range(batch):
        for q in range(queries):
            for h in range(heads):
                total = value.new_zeros(dim)
                start = 0
                for level, (height, width) in enumerate(shapes):
                    for point in range(points):
                        x, y = locations[b, q, h, level, point] * value.new_tensor([width, height]) - 0.5
                        for row in (math.floor(y), math.floor(y) + 1):
                            for column in (math.floor(x), math.floor(x) + 1):
                                if 0 <= row < height and 0 <= column < width:
                                    share = (1 - (y - row).abs()) * (1 - (x - column).abs())
                                    pixel = value[b, start + row * width + column, h]
                                    total = total + weights[b, q, h, level, point] * share * pixel
                    start += height * width
                output.append(total)
    return torch.stack(output).view(batch, queries, heads * dim)


DEFINITIONS: dict[str, Callable] = {
    "roi_pool": roi_pool,
    "sigmoid_focal_loss": sigmoid_focal_loss,
    "softmax_focal_loss": softmax_focal_loss,
    "masked_conv": masked_conv,
    "carafe": carafe,
    "deform_attention": deform_attention,
}


def main() -> None:
    """Computes and writes every case."""
    if zoo.openmmlab.OPS_FROM != "compiled":
        raise SystemExit("This needs mmcv with its compiled ops.")
    for op, function in DEFINITIONS.items():
        OPS[op] = (lambda *inputs, f=function, **options: f(*inputs, **options), *OPS[op][1:])
    stored: dict[str, dict[str, np.ndarray]] = {op: {} for op in OPS}
    for op, index in CASES:
        inputs = make_inputs(op, index)
        exact = {k: v.double() if op in DEFINITIONS and v.is_floating_point() else v for k, v in inputs.items()}
        for kind, tensors in (("input", inputs), ("result", run(op, index, exact))):
            for name, tensor in tensors.items():
                array = tensor.numpy()
                stored[op][f"{index}/{kind}/{name}"] = array.astype(np.float32) if array.dtype == np.float64 else array
    for op, arrays in stored.items():
        np.savez_compressed(DATA / f"{op}.npz", **arrays)


if __name__ == "__main__":
    main()
