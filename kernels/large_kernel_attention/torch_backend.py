"""Large kernel attention as two depthwise convolutions, a matrix product and a gate.

The backward pass keeps nothing but the input and computes the stages again.
"""

from collections.abc import Callable

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
    local: Callable[..., Tensor] = torch_backend.forward,
    dilated: Callable[..., Tensor] = torch_backend.forward,
    mix: Callable[..., Tensor] = gated_linear,
) -> Tensor:
    """As ``large_kernel_attention``."""
    y = local(x, local_weight, local_bias, 1, 1, False)
    y = dilated(y, dilated_weight, dilated_bias, 1, dilation, False)
    return mix(y, mix_weight, mix_bias, x)


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
    local: Callable[..., Tensor] = torch_backend.forward,
    dilated: Callable[..., Tensor] = torch_backend.forward,
    mix: Callable[..., Tensor] = gated_linear,
    local_backward: Callable[..., tuple[Tensor, ...]] = torch_backend.backward,
    dilated_backward: Callable[..., tuple[Tensor, ...]] = torch_backend.backward,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the seven tensors; of a bias that is None an empty tensor."""
    y_local = local(x, local_weight, local_bias, 1, 1, False)
    y_dilated = dilated(y_local, dilated_weight, dilated_bias, 1, dilation, False)
    d_mixed = (grad * x).contiguous()
    d_mix_weight = (d_mixed.flatten(0, 2).T @ y_dilated.flatten(0, 2)).to(mix_weight.dtype)
    d_mix_bias = x.new_empty(0) if mix_bias is None else d_mixed.sum((0, 1, 2), dtype=mix_bias.dtype)
    d_dilated = d_mixed @ mix_weight.to(x.dtype)
    d_local, d_dilated_weight, d_dilated_bias = dilated_backward(
        d_dilated, y_local, dilated_weight, dilated_bias is not None, 1, dilation, False
    )
    d_x, d_local_weight, d_local_bias = local_backward(d_local, x, local_weight, local_bias is not None, 1, 1, False)
    d_x = mix(y_dilated, mix_weight, mix_bias, grad, d_x)
    return d_x, d_local_weight, d_local_bias, d_dilated_weight, d_dilated_bias, d_mix_weight, d_mix_bias
