"""RoI pooling (https://arxiv.org/abs/1504.08083), as ``mmcv.ops.roi_pool`` calls it on a GPU.

Regions are rows ``(image, x1, y1, x2, y2)`` in pixels of the picture, with the last row and column in them. mmcv does
not round their corners as torchvision does: bins start at any fraction of a pixel and take in every pixel they touch.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from zoo.openmmlab.ops.precision import at_least_float32

__all__ = ["roi_pool_backward", "roi_pool_forward"]


def roi_pool_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """The maximum of every bin.

    Args:
        input: (B, C, H, W).
        rois: (N, 5).
        output: receives the result, (N, C, pooled_height, pooled_width); 0 in bins outside the map.
        argmax: receives where it was, row * W + column, int32, of the same shape; -1 in bins outside the map.
        pooled_height: bins of a region.
        pooled_width: likewise.
        spatial_scale: feature map pixels per picture pixel.
    """
    rois = at_least_float32(rois)
    rows = _bins(rois[:, 2], rois[:, 4], pooled_height, spatial_scale, input.shape[2])
    columns = _bins(rois[:, 1], rois[:, 3], pooled_width, spatial_scale, input.shape[3])
    output.zero_()
    argmax.fill_(-1)
    for index, image in enumerate(rois[:, 0].long().tolist()):
        _pool(input[image], rows[index], columns[index], output[index], argmax[index])


def roi_pool_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax: Tensor,
    grad_input: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """The gradient of :func:`roi_pool_forward` with respect to its input, into ``grad_input``."""
    _, channels, height, width = grad_input.shape
    maps = rois[:, 0].long()[:, None] * channels + torch.arange(channels, device=rois.device)
    pixels = maps[:, :, None, None] * (height * width) + argmax
    inside = argmax >= 0
    gradient = at_least_float32(grad_input).zero_().flatten()
    gradient.index_add_(0, pixels[inside], grad_output[inside].to(gradient.dtype))
    grad_input.copy_(gradient.view_as(grad_input))


def _bins(first: Tensor, last: Tensor, count: int, scale: float, size: int) -> list[list[tuple[int, int]]]:
    """(start, end) of the bins of every region along one side, within a map of a size; none for a negative region."""
    start, end = first * scale, (last + 1) * scale
    steps = torch.arange(count + 1, device=first.device) * ((end - start) / count)[:, None] + start[:, None]
    steps = torch.where((end > start)[:, None], steps, -1)
    starts, ends = (x.clamp(0, size).long().tolist() for x in (steps[:, :-1].floor(), steps[:, 1:].ceil()))
    return [list(zip(*edges)) for edges in zip(starts, ends)]


def _pool(
    features: Tensor,
    rows: Sequence[tuple[int, int]],
    columns: Sequence[tuple[int, int]],
    output: Tensor,
    argmax: Tensor,
) -> None:
    """One region of one picture (C, H, W), first along the rows and then across them."""
    channels, height, width = features.shape
    best = features.new_zeros((channels, height, len(columns)))
    where = torch.full_like(best, -1, dtype=torch.long)
    for bin_, (start, end) in enumerate(columns):
        if start < end:
            best[..., bin_], column = features[..., start:end].max(2)
            where[..., bin_] = column + start
    for bin_, (start, end) in enumerate(rows):
        if start < end:
            output[:, bin_], row = best[:, start:end].max(1)
            column = where[:, start:end].gather(1, row[:, None])[:, 0]
            argmax[:, bin_] = torch.where(column < 0, -1, (row + start) * width + column)
