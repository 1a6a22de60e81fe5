"""The definition of large kernel attention (VAN, arXiv:2202.09741, eq. 3-4)."""

import torch.nn.functional as F
from torch import Tensor

from zoo.kernels.depthwise_conv.reference import depthwise_conv2d_reference
from zoo.kernels.library import accumulation_dtype


def large_kernel_attention_reference(
    x: Tensor,
    local_weight: Tensor,
    local_bias: Tensor | None,
    dilated_weight: Tensor,
    dilated_bias: Tensor | None,
    mix_weight: Tensor,
    mix_bias: Tensor | None,
    dilation: int = 3,
) -> Tensor:
    """``y = x * mix(dilated(local(x)))``: two depthwise convolutions, a 1x1 convolution, and a gate without activation.

    Args:
        x: (B, H, W, C).
        local_weight: (C, 1, K, K).
        local_bias: (C,).
        dilated_weight: (C, 1, L, L).
        dilated_bias: (C,).
        mix_weight: (C, C), output channels first.
        mix_bias: (C,).
        dilation: of the second convolution.

    Returns:
        (B, H, W, C) in the dtype of x.
    """
    dtype = accumulation_dtype(x.dtype)
    local = depthwise_conv2d_reference(x.to(dtype), local_weight, local_bias)
    dilated = depthwise_conv2d_reference(local, dilated_weight, dilated_bias, dilation=dilation)
    mixed = F.linear(dilated, mix_weight.to(dtype), mix_bias if mix_bias is None else mix_bias.to(dtype))
    return (x.to(dtype) * mixed).to(x.dtype)
