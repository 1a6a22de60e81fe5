"""CARAFE upsampling (https://arxiv.org/abs/1905.02188), as ``mmcv.ops.carafe`` calls it.

Every output pixel is the sum of a k x k neighbourhood of the input pixel it lies in, with weights of its own.
"""

import torch
from torch import Tensor
from torch.nn.functional import interpolate, unfold

from zoo.openmmlab.ops.precision import at_least_float32

__all__ = ["carafe_backward", "carafe_forward", "carafe_naive_backward", "carafe_naive_forward"]


def carafe_naive_forward(
    features: Tensor, masks: Tensor, output: Tensor, kernel_size: int, group_size: int, scale_factor: int
) -> None:
    """Upsample.

    Args:
        features: (B, C, H, W).
        masks: weights, (B, groups * k * k, sH, sW).
        output: receives the result, (B, C, sH, sW).
        kernel_size: k, odd.
        group_size: groups of channels that share their weights.
        scale_factor: s.
    """
    inputs = map(at_least_float32, (features, masks))
    output.copy_(_reassemble(*inputs, kernel_size, group_size, scale_factor))


def carafe_naive_backward(
    top_grad: Tensor,
    features: Tensor,
    masks: Tensor,
    bottom_grad: Tensor,
    mask_grad: Tensor,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
) -> None:
    """The gradients with respect to features and masks, into ``bottom_grad`` and ``mask_grad``."""
    inputs = [at_least_float32(tensor).detach().requires_grad_() for tensor in (features, masks)]
    with torch.enable_grad():
        output = _reassemble(*inputs, kernel_size, group_size, scale_factor)
    gradients = torch.autograd.grad(output, inputs, at_least_float32(top_grad))
    for target, gradient in zip((bottom_grad, mask_grad), gradients):
        target.copy_(gradient)


def carafe_forward(
    features: Tensor,
    masks: Tensor,
    rfeatures: Tensor,
    routput: Tensor,
    rmasks: Tensor,
    output: Tensor,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
) -> None:
    """As :func:`carafe_naive_forward`; ``rfeatures`` is what the backward is given instead of the features."""
    rfeatures.copy_(features)
    carafe_naive_forward(features, masks, output, kernel_size, group_size, scale_factor)


def carafe_backward(
    top_grad: Tensor,
    rfeatures: Tensor,
    masks: Tensor,
    rtop_grad: Tensor,
    rbottom_grad_hs: Tensor,
    rbottom_grad: Tensor,
    rmask_grad: Tensor,
    bottom_grad: Tensor,
    mask_grad: Tensor,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
) -> None:
    """As :func:`carafe_naive_backward`, with the features that :func:`carafe_forward` kept."""
    carafe_naive_backward(top_grad, rfeatures, masks, bottom_grad, mask_grad, kernel_size, group_size, scale_factor)


def _reassemble(features: Tensor, masks: Tensor, kernel: int, groups: int, scale: int) -> Tensor:
    batch, channels, height, width = features.shape
    patches = unfold(features, kernel, padding=kernel // 2).view(batch, channels * kernel**2, height, width)
    patches = interpolate(patches, scale_factor=scale).view(
        batch, groups, channels // groups, kernel**2, height * scale, width * scale
    )
    weights = masks.view(batch, groups, 1, kernel**2, height * scale, width * scale)
    return (patches * weights).sum(3).flatten(1, 2)
