"""Multi-scale deformable attention (https://arxiv.org/abs/2010.04159), as ``mmcv.ops`` calls it on a GPU.

On the CPU mmcv has a PyTorch version of its own and does not come here.
"""

import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from zoo.openmmlab.ops.precision import at_least_float32

__all__ = ["ms_deform_attn_backward", "ms_deform_attn_forward"]


def ms_deform_attn_forward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int,
) -> Tensor:
    """Weighted sum of bilinear samples of several feature maps.

    Args:
        value: the maps one after the other, (B, pixels of all, heads, dim).
        value_spatial_shapes: height and width of each map, (levels, 2).
        value_level_start_index: not used, it follows from the shapes.
        sampling_locations: (x, y) from 0 to 1, (B, queries, heads, levels, points, 2).
        attention_weights: (B, queries, heads, levels, points).
        im2col_step: not used.

    Returns:
        (B, queries, heads * dim).
    """
    inputs = map(at_least_float32, (value, sampling_locations, attention_weights))
    return _attend(*inputs, value_spatial_shapes.tolist()).to(value.dtype)


def ms_deform_attn_backward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    grad_output: Tensor,
    grad_value: Tensor,
    grad_sampling_loc: Tensor,
    grad_attn_weight: Tensor,
    im2col_step: int,
) -> None:
    """The gradients of :func:`ms_deform_attn_forward`, into the last three tensors."""
    inputs = map(at_least_float32, (value, sampling_locations, attention_weights))
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    with torch.enable_grad():
        output = _attend(*inputs, value_spatial_shapes.tolist())
    gradients = torch.autograd.grad(output, inputs, at_least_float32(grad_output))
    for target, gradient in zip((grad_value, grad_sampling_loc, grad_attn_weight), gradients):
        target.copy_(gradient)


def _attend(value: Tensor, locations: Tensor, weights: Tensor, shapes: list[list[int]]) -> Tensor:
    batch, _, heads, dim = value.shape
    output = value.new_zeros((batch * heads, dim, locations.shape[1]))
    levels = value.split([height * width for height, width in shapes], dim=1)
    for level, (pixels, (height, width)) in enumerate(zip(levels, shapes)):
        maps = pixels.permute(0, 2, 3, 1).reshape(batch * heads, dim, height, width)
        grid = 2 * locations[:, :, :, level].transpose(1, 2).flatten(0, 1) - 1  # (B * heads, queries, points, 2)
        weight = weights[:, :, :, level].transpose(1, 2).flatten(0, 1)[:, None]  # (B * heads, 1, queries, points)
        output = output + (grid_sample(maps, grid, align_corners=False) * weight).sum(-1)
    return output.view(batch, heads * dim, -1).transpose(1, 2).contiguous()
