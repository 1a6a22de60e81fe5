"""Masks of the point-wise spatial attention network (PSANet, ECCV 2018), as ``mmcv.ops.psa_mask`` calls them.

Every pixel of an H x W map predicts an h x w window of weights centred on itself. The full map has a weight for every
pair of pixels: the window's where the other pixel is within it, else 0. Type 0 (collect) indexes it
[other, pixel], type 1 (distribute) [pixel, other].
"""

import torch
from torch import Tensor

__all__ = ["psamask_backward", "psamask_forward"]

COLLECT = 0


def psamask_forward(
    input: Tensor,
    output: Tensor,
    psa_type: int,
    num_: int,
    h_feature: int,
    w_feature: int,
    h_mask: int,
    w_mask: int,
    half_h_mask: int,
    half_w_mask: int,
) -> None:
    """Spread the windows over the full map.

    Args:
        input: (B, h_mask * w_mask, H, W).
        output: zeros that receive the result, (B, H * W, H, W).
        psa_type: 0 or 1.
        num_: B.
        h_feature: H.
        w_feature: W.
        h_mask: h.
        w_mask: w.
        half_h_mask: rows of the window above its centre.
        half_w_mask: columns of the window left of its centre.
    """
    window, inside = _window(input, h_feature, w_feature, h_mask, w_mask, half_h_mask, half_w_mask)
    weights = input.flatten(2).gather(1, window.expand(num_, -1, -1)) * inside  # [other, pixel]
    output.copy_((weights if psa_type == COLLECT else weights.transpose(1, 2)).view_as(output))


def psamask_backward(
    grad_output: Tensor,
    grad_input: Tensor,
    psa_type: int,
    num_: int,
    h_feature: int,
    w_feature: int,
    h_mask: int,
    w_mask: int,
    half_h_mask: int,
    half_w_mask: int,
) -> None:
    """The gradient of :func:`psamask_forward` with respect to its input, into ``grad_input``."""
    window, inside = _window(grad_output, h_feature, w_feature, h_mask, w_mask, half_h_mask, half_w_mask)
    grad = grad_output.reshape(num_, h_feature * w_feature, h_feature * w_feature)
    grad = grad if psa_type == COLLECT else grad.transpose(1, 2)
    grad_input.zero_().flatten(2).scatter_add_(1, window.expand(num_, -1, -1), grad * inside)


def _window(like: Tensor, height: int, width: int, h: int, w: int, up: int, left: int) -> tuple[Tensor, Tensor]:
    """For [other, pixel]: where the other one is in the pixel's window (0 if outside), and whether it is inside."""
    y, x = (torch.arange(size, device=like.device) for size in (height, width))
    y, x = y.repeat_interleave(width), x.repeat(height)
    row, column = y[:, None] - y + up, x[:, None] - x + left
    inside = (row >= 0) & (row < h) & (column >= 0) & (column < w)
    return torch.where(inside, row * w + column, 0)[None], inside.to(like.dtype)
