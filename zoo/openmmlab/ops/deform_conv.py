"""Deformable convolution, as ``mmcv.ops.deform_conv`` (v1) and ``mmcv.ops.modulated_deform_conv`` (v2) call it.

v1 (https://arxiv.org/abs/1703.06211) moves the sampling points of a convolution by learned offsets; v2
(https://arxiv.org/abs/1811.11168) also weighs them with a mask. Shapes: input (B, C, H, W), weight
(O, C / groups, kernel height, kernel width), offset (B, 2 * deformable groups * kernel points, H', W') with
(vertical, horizontal) pairs in pixels, mask (B, deformable groups * kernel points, H', W'), output (B, O, H', W').
The scratch tensors (``columns``, ``ones``) and ``im2col_step`` are mmcv's and not used.
"""

import torch
import torchvision  # noqa: F401  (registers torch.ops.torchvision)
from torch import Tensor

from zoo.openmmlab.ops.precision import at_least_float32

__all__ = [
    "deform_conv_backward_input",
    "deform_conv_backward_parameters",
    "deform_conv_forward",
    "modulated_deform_conv_backward",
    "modulated_deform_conv_forward",
]


def deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    offset: Tensor,
    output: Tensor,
    columns: Tensor,
    ones: Tensor,
    kW: int,
    kH: int,
    dW: int,
    dH: int,
    padW: int,
    padH: int,
    dilationW: int,
    dilationH: int,
    group: int,
    deformable_group: int,
    im2col_step: int,
) -> None:
    """Deformable convolution v1, into ``output``; ``dW`` and ``dH`` are the strides."""
    geometry = (dH, dW, padH, padW, dilationH, dilationW, group, deformable_group)
    output.copy_(torch.ops.torchvision.deform_conv2d(*_arguments(input, weight, offset, None, None, geometry)))


def deform_conv_backward_input(
    input: Tensor,
    offset: Tensor,
    gradOutput: Tensor,
    gradInput: Tensor,
    gradOffset: Tensor,
    weight: Tensor,
    columns: Tensor,
    kW: int,
    kH: int,
    dW: int,
    dH: int,
    padW: int,
    padH: int,
    dilationW: int,
    dilationH: int,
    group: int,
    deformable_group: int,
    im2col_step: int,
) -> None:
    """Gradients of v1 with respect to input and offset, into ``gradInput`` and ``gradOffset``."""
    geometry = (dH, dW, padH, padW, dilationH, dilationW, group, deformable_group)
    gradients = _gradients(gradOutput, input, weight, offset, None, None, geometry)
    gradInput.copy_(gradients[0])
    gradOffset.copy_(gradients[2])


def deform_conv_backward_parameters(
    input: Tensor,
    offset: Tensor,
    gradOutput: Tensor,
    gradWeight: Tensor,
    columns: Tensor,
    ones: Tensor,
    kW: int,
    kH: int,
    dW: int,
    dH: int,
    padW: int,
    padH: int,
    dilationW: int,
    dilationH: int,
    group: int,
    deformable_group: int,
    scale: float,
    im2col_step: int,
) -> None:
    """The gradient of v1 with respect to the weight, times ``scale``, added to ``gradWeight``."""
    geometry = (dH, dW, padH, padW, dilationH, dilationW, group, deformable_group)
    # It does not depend on the weight, which mmcv does not pass, but on its shape.
    gradients = _gradients(gradOutput, input, gradWeight, offset, None, None, geometry)
    gradWeight.add_(gradients[1].to(gradWeight.dtype), alpha=scale)


def modulated_deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    output: Tensor,
    columns: Tensor,
    kernel_h: int,
    kernel_w: int,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    group: int,
    deformable_group: int,
    with_bias: bool,
) -> None:
    """Deformable convolution v2, into ``output``."""
    geometry = (stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, group, deformable_group)
    offset, mask = _as_read(offset, output), _as_read(mask, output)
    arguments = _arguments(input, weight, offset, mask, bias if with_bias else None, geometry)
    output.copy_(torch.ops.torchvision.deform_conv2d(*arguments))


def modulated_deform_conv_backward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    columns: Tensor,
    grad_input: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    grad_offset: Tensor,
    grad_mask: Tensor,
    grad_output: Tensor,
    kernel_h: int,
    kernel_w: int,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    group: int,
    deformable_group: int,
    with_bias: bool,
) -> None:
    """The gradients of v2, into the five ``grad_`` tensors (``grad_bias`` only with a bias)."""
    geometry = (stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, group, deformable_group)
    offset, mask = _as_read(offset, grad_output), _as_read(mask, grad_output)
    gradients = _gradients(grad_output, input, weight, offset, mask, bias if with_bias else None, geometry)
    grad_input.copy_(gradients[0])
    grad_weight.copy_(gradients[1])
    for whole, read in ((grad_offset, gradients[2]), (grad_mask, gradients[3])):
        whole.flatten(1)[:, : read[0].numel()] = read.flatten(1).to(whole.dtype)
    if with_bias:
        grad_bias.copy_(gradients[4])


def _gradients(grad_output: Tensor, *operands: object) -> tuple[Tensor, ...]:
    """With respect to input, weight, offset, mask and bias."""
    return torch.ops.torchvision._deform_conv2d_backward(at_least_float32(grad_output), *_arguments(*operands))


def _arguments(
    input: Tensor, weight: Tensor, offset: Tensor, mask: Tensor | None, bias: Tensor | None, geometry: tuple[int, ...]
) -> list[object]:
    """What torchvision's op takes; it has no optional tensors."""
    tensors = (
        input,
        weight,
        offset,
        input.new_zeros((len(input), 1)) if mask is None else mask,
        weight.new_zeros(len(weight)) if bias is None else bias,
    )
    return [*map(at_least_float32, tensors), *geometry, mask is not None]


def _as_read(maps: Tensor, output: Tensor) -> Tensor:
    """Offsets or masks (B, C, h, w) as mmcv's kernel reads them: with the strides of the output's height and width.

    DyHead passes maps that are larger than the output, and its published weights were trained on what that gives:
    the first values of every picture, laid out anew.
    """
    height, width = output.shape[2:]
    return maps.flatten(1)[:, : maps.shape[1] * height * width].unflatten(1, (maps.shape[1], height, width))
