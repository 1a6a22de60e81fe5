"""Large kernel attention as two depthwise convolutions, on either of their backends, and a matrix product.

The backward pass keeps nothing but the input and computes the stages again.
"""

from types import ModuleType

import torch.nn.functional as F
from torch import Tensor

from zoo.kernels.depthwise_conv import torch_backend

Stages = tuple[Tensor, Tensor, Tensor]


def forward(
    x: Tensor,
    local_weight: Tensor,
    local_bias: Tensor | None,
    dilated_weight: Tensor,
    dilated_bias: Tensor | None,
    mix_weight: Tensor,
    mix_bias: Tensor | None,
    dilation: int,
    depthwise: ModuleType = torch_backend,
) -> Tensor:
    """As ``large_kernel_attention``."""
    stages = _stages(
        x, local_weight, local_bias, dilated_weight, dilated_bias, mix_weight, mix_bias, dilation, depthwise
    )
    return stages[2].mul_(x)


def backward(
    grad: Tensor,
    x: Tensor,
    local_weight: Tensor,
    local_bias: Tensor | None,
    dilated_weight: Tensor,
    dilated_bias: Tensor | None,
    mix_weight: Tensor,
    mix_bias: Tensor | None,
    dilation: int,
    depthwise: ModuleType = torch_backend,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the seven tensors; of a bias that is None an empty tensor."""
    local, dilated, mixed = _stages(
        x, local_weight, local_bias, dilated_weight, dilated_bias, mix_weight, mix_bias, dilation, depthwise
    )
    d_mixed = grad * x
    d_mix_weight = (d_mixed.flatten(0, 2).T @ dilated.flatten(0, 2)).to(mix_weight.dtype)
    d_mix_bias = x.new_empty(0) if mix_bias is None else d_mixed.sum((0, 1, 2), dtype=mix_bias.dtype)
    d_dilated = d_mixed @ mix_weight.to(x.dtype)
    d_local, d_dilated_weight, d_dilated_bias = depthwise.backward(
        d_dilated, local, dilated_weight, dilated_bias is not None, 1, dilation, False
    )
    d_x, d_local_weight, d_local_bias = depthwise.backward(
        d_local, x, local_weight, local_bias is not None, 1, 1, False
    )
    d_x = d_x.addcmul_(grad, mixed)
    return d_x, d_local_weight, d_local_bias, d_dilated_weight, d_dilated_bias, d_mix_weight, d_mix_bias


def _stages(
    x: Tensor,
    local_weight: Tensor,
    local_bias: Tensor | None,
    dilated_weight: Tensor,
    dilated_bias: Tensor | None,
    mix_weight: Tensor,
    mix_bias: Tensor | None,
    dilation: int,
    depthwise: ModuleType = torch_backend,
) -> Stages:
    """What the two depthwise convolutions and the 1x1 convolution put out."""
    local = depthwise.forward(x, local_weight, local_bias, 1, 1, False)
    dilated = depthwise.forward(local, dilated_weight, dilated_bias, 1, dilation, False)
    mix_bias = mix_bias if mix_bias is None else mix_bias.to(x.dtype)
    return local, dilated, F.linear(dilated, mix_weight.to(x.dtype), mix_bias)
