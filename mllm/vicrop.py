"""ViCrop: a model shows by its attention where it should look closer, and gets that part as a second picture."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.mllm.families import ACCELERATED, check_family
from zoo.mllm.look import frozen, looking
from zoo.mllm.prompts import Picture, encode, generate, message
from zoo.mllm.views import whole_pixels, whole_view

METHODS = ("rel-att", "grad-att", "pure-grad")
GENERAL = "Write a general description of the image."  # what any question's attention is compared with
RATIOS = (1.0, 1.2, 1.4, 1.6, 1.8, 2.0)  # sides of windows
PIECE = 1024  # pixels, the longest side of what is looked at at once

Box = tuple[int, int, int, int]  # left, top, right, bottom, in pixels


class ViCrop:
    """Answers with a closer look at the part of a picture that matters (ViCrop, arXiv:2502.17422); needs no training.

    The model sees the picture once to tell where to look, and then answers with the picture and the crop before it.
    A picture is looked at on its own, in pieces of at most 1,024 pixels a side; answers are generated in one batch. The
    look needs the attention of the plain model: call ``boxes`` before ``zoo.mllm.accelerate``, and ``generate`` with
    them inside it.

    * ``"rel-att"``: what the last prompt token attends to, relative to when the picture is to be described in general.
    * ``"grad-att"``: the attention of each head times the positive part of the gradient of the answer's first token.
    * ``"pure-grad"``: the size of that token's gradient in the pixels, where the picture has edges. Needs no layer. The
      filter for edges is a reconstruction: 3 x 3 Gaussian, 3 x 3 median, above the median of the picture.

    Args:
        model: one of the families that ``accelerate`` knows.
        processor: of the model, with a chat template.
        method: one of the above.
        layer: whose attention tells; by default 14 of 32 layers as for LLaVA-1.5, and 22 of 28 for Qwen.
        window: side of the smallest crop in pixels of the picture; others are up to twice as large.

    Raises:
        ValueError: the model, the method, the layer or the window is not supported.
    """

    def __init__(
        self, model: nn.Module, processor: Any, method: str = "rel-att", layer: int | None = None, window: int = 336
    ) -> None:
        check_family(model)
        layers = len(model.get_decoder().layers)
        if layer is None:
            layer = layers * 11 // 14 if model.config.model_type.startswith("qwen") else layers * 7 // 16
        if method not in METHODS:
            raise ValueError(f"ViCrop: method is {method!r}, expected one of {', '.join(METHODS)}.")
        if not 0 <= layer < layers:
            raise ValueError(f"ViCrop: layer is {layer}, but the decoder has {layers} layers, counted from 0.")
        if window < 1:
            raise ValueError(f"ViCrop: window is {window}, expected at least 1 pixel.")
        self.model, self.processor, self.method, self.layer, self.window = model, processor, method, layer, window

    def importance(self, picture: Picture, question: str) -> Tensor:
        """How much each part of a picture matters to a question: (rows, columns) float32, not negative.

        Raises:
            ValueError: the model is accelerated.
        """
        if hasattr(self.model.get_decoder(), ACCELERATED):
            raise ValueError("ViCrop needs the attention of the plain model: call remove() of accelerate() first.")
        down, across = math.ceil(picture.height / PIECE), math.ceil(picture.width / PIECE)
        pieces = [[self._importance(part, question) for part in row] for row in _pieces(picture, down, across)]
        shape = pieces[0][0].shape  # pieces may differ by a pixel, and so by a token
        same = [[F.interpolate(piece[None, None], shape)[0, 0] for piece in row] for row in pieces]
        return torch.cat([torch.cat(row, 1) for row in same])

    def boxes(self, pictures: Sequence[Picture], questions: Sequence[str]) -> list[Box]:
        """The part of each picture to look at: left, top, right and bottom in pixels.

        Args:
            pictures: PIL images of mode "RGB".
            questions: one for each.
        """
        _check_pairs(pictures, questions)
        return [
            best_window(self.importance(picture, question), picture.size, self.window)
            for picture, question in zip(pictures, questions)
        ]

    def generate(
        self,
        pictures: Sequence[Picture],
        questions: Sequence[str],
        boxes: Sequence[Box] | None = None,
        **options: Any,
    ) -> list[str]:
        """Answers, greedy unless the options say otherwise.

        Args:
            pictures: PIL images of mode "RGB".
            questions: one for each.
            boxes: of ``boxes()``, which is called without them.
            options: of ``model.generate``, such as ``max_new_tokens``.
        """
        _check_pairs(pictures, questions)
        boxes = self.boxes(pictures, questions) if boxes is None else boxes
        views = [[picture, picture.crop(box)] for picture, box in zip(pictures, boxes, strict=True)]
        talks = [[message("user", question, both)] for question, both in zip(questions, views)]
        return generate(self.model, self.processor, encode(self.model, self.processor, talks), **options)

    def _importance(self, picture: Picture, question: str) -> Tensor:
        asked = self._inputs(picture, question)
        if self.method == "pure-grad":
            return self._pixel_gradient(asked)
        gradient = self.method == "grad-att"
        found = self._attention(asked, gradient)
        return found if gradient else found / self._attention(self._inputs(picture, GENERAL)).clamp_min(1e-12)

    def _inputs(self, picture: Picture, question: str) -> dict[str, Tensor]:
        # Processors that cut the sides off, or add some: squeezed, the picture is all that is seen.
        if self.model.config.model_type in ("llava", "zoo_vlm"):
            picture = picture.resize((max(picture.size),) * 2)
        with torch.inference_mode(False):
            return dict(encode(self.model, self.processor, [[message("user", question, [picture])]]))

    def _attention(self, inputs: dict[str, Tensor], gradient: bool = False) -> Tensor:
        """(rows, columns): attention of the last prompt token to the picture, mean over heads."""
        view = whole_view(self.model.config, inputs)
        with looking(self.model, self.layer, gradient) as look:
            if gradient:
                (slope,) = torch.autograd.grad(self._confidence(inputs), look.output)
                seen = look.attention * look.slope(slope).relu()
            else:
                with torch.no_grad():
                    self.model(**inputs, use_cache=False, logits_to_keep=1)
                seen = look.attention
        return seen.mean(0)[view.places].view(view.rows, view.columns)

    def _pixel_gradient(self, inputs: dict[str, Tensor]) -> Tensor:
        """(rows, columns): the norm of the gradient over colours, on edges, mean over the pixels of a token."""
        config, view = self.model.config, whole_view(self.model.config, inputs)
        with frozen(self.model):
            pixels = inputs["pixel_values"].requires_grad_()
            (slope,) = torch.autograd.grad(self._confidence(inputs), pixels)
        slope = whole_pixels(config, inputs, slope.float())
        edges = _edges(whole_pixels(config, inputs, pixels.detach().float()))
        return F.adaptive_avg_pool2d((slope.norm(dim=0) * edges)[None], (view.rows, view.columns))[0]

    def _confidence(self, inputs: dict[str, Tensor]) -> Tensor:
        """Log-probability of the likeliest first token of the answer."""
        logits = self.model(**inputs, use_cache=False, logits_to_keep=1).logits
        return logits[0, -1].float().log_softmax(-1).amax()


def best_window(importance: Tensor, size: tuple[int, int], window: int = 336) -> Box:
    """The window that stands out most from those beside it.

    Of each size, ``window`` times 1 to 2, the place with the largest sum is taken; of these the one that exceeds the
    mean of its four neighbours most, per token. Ties go to the smaller window, and to the upper left.

    Args:
        importance: (rows, columns) float.
        size: width and height of the picture in pixels.
        window: side in pixels.

    Returns:
        Left, top, right and bottom in pixels; all of a picture that is no larger than the window.
    """
    (rows, columns), (width, height) = importance.shape, size
    best, box = -math.inf, (0, 0, columns, rows)
    for ratio in RATIOS:
        down = min(max(int(window * ratio * rows / height), 1), rows)
        across = min(max(int(window * ratio * columns / width), 1), columns)
        means = F.avg_pool2d(importance[None].double(), (down, across), stride=1)[0]
        top, left = divmod(int(means.argmax()), means.shape[1])
        beside = [
            means[y, x]
            for y, x in ((top - 1, left), (top + 1, left), (top, left - 1), (top, left + 1))
            if 0 <= y < means.shape[0] and 0 <= x < means.shape[1]
        ]
        contrast = float(means[top, left] - torch.stack(beside).mean()) if beside else 0.0
        if contrast > best:
            best, box = contrast, (left, top, left + across, top + down)
    x, y = width / columns, height / rows
    return round(box[0] * x), round(box[1] * y), round(box[2] * x), round(box[3] * y)


def _edges(pixels: Tensor) -> Tensor:
    """Of (3, H, W), where it differs more from its surroundings than half of it does: (H, W) bool."""
    kernel = torch.tensor([1.0, 2.0, 1.0], device=pixels.device)
    kernel = (kernel[:, None] * kernel / 16).expand(3, 1, 3, 3)
    smooth = F.conv2d(F.pad(pixels[None], (1, 1, 1, 1), mode="replicate"), kernel, groups=3)[0]
    sharp = (pixels - smooth).abs().mean(0)
    around = F.pad(sharp[None, None], (1, 1, 1, 1), mode="replicate").unfold(2, 3, 1).unfold(3, 3, 1)
    clean = around.flatten(4).median(-1).values[0, 0]
    return clean > clean.median()


def _pieces(picture: Picture, down: int, across: int) -> list[list[Picture]]:
    """The picture cut into rows of nearly equal pieces."""
    xs = [picture.width * i // across for i in range(across + 1)]
    ys = [picture.height * i // down for i in range(down + 1)]
    return [[picture.crop((left, top, right, bottom)) for left, right in pairwise(xs)] for top, bottom in pairwise(ys)]


def _check_pairs(pictures: Sequence[Picture], questions: Sequence[str]) -> None:
    if isinstance(questions, str) or len(pictures) != len(questions):
        raise ValueError("ViCrop: expected lists of as many questions as pictures.")
