"""Large kernel attention as two depthwise convolutions, a matrix product and a gate.

The backward pass keeps nothing but the input and computes the stages again.
"""

from collections.abc import Callable
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.kernels.depthwise_conv import torch_backend


def gated_linear(x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor, add: Tensor | None = None) -> Tensor:
    """``linear(x) * gate + add``: (..., C) each, contiguous."""
    y = F.linear(x, weight.to(x.dtype), bias if bias is None else bias.to(x.dtype))
    return y.mul_(gate) if add is None else torch.addcmul(add, y, gate)


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
    mix: Callable[..., Tensor] = gated_linear,
) -> Tensor:
    """As ``large_kernel_attention``."""
    local = depthwise.forward(x, local_weight, local_bias, 1, 1, False)
    dilated = depthwise.forward(local, dilated_weight, dilated_bias, 1, dilation, False)
    return mix(dilated, mix_weight, mix_bias, x)


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
    mix: Callable[..., Tensor] = gated_linear,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the seven tensors; of a bias that is None an empty tensor."""
    local = depthwise.forward(x, local_weight, local_bias, 1, 1, False)
    dilated = depthwise.forward(local, dilated_weight, dilated_bias, 1, dilation, False)
    d_mixed = (grad * x).contiguous()
    d_mix_weight = (d_mixed.flatten(0, 2).T @ dilated.flatten(0, 2)).to(mix_weight.dtype)
    d_mix_bias = x.new_empty(0) if mix_bias is None else d_mixed.sum((0, 1, 2), dtype=mix_bias.dtype)
    d_dilated = d_mixed @ mix_weight.to(x.dtype)
    d_local, d_dilated_weight, d_dilated_bias = depthwise.backward(
        d_dilated, local, dilated_weight, dilated_bias is not None, 1, dilation, False
    )
    d_x, d_local_weight, d_local_bias = depthwise.backward(
        d_local, x, local_weight, local_bias is not None, 1, 1, False
    )
    d_x = mix(dilated, mix_weight, mix_bias, grad, d_x)
    return d_x, d_local_weight, d_local_bias, d_dilated_weight, d_dilated_bias, d_mix_weight, d_mix_bias
