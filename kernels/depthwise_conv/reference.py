"""The definition of the depthwise convolution, tap by tap."""

import torch.nn.functional as F
from torch import Tensor

from zoo.kernels.library import accumulation_dtype


def depthwise_conv2d_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: int = 1, dilation: int = 1, residual: bool = False
) -> Tensor:
    """``y[b, i, j, c] = bias[c] + sum over u, v of weight[c, 0, u, v] * x[b, s i + d (u - r), s j + d (v - r), c]``.

    r is half the kernel size, rounded down; outside the map x is zero; with ``residual`` x[b, i, j, c] is added.

    Args:
        x: (B, H, W, C).
        weight: (C, 1, K, K), K odd.
        bias: (C,).
        stride: s.
        dilation: d.
        residual: add the input, for stride 1.

    Returns:
        (B, ceil(H / s), ceil(W / s), C) in the dtype of x.
    """
    dtype = accumulation_dtype(x.dtype)
    height, width, size = x.shape[1], x.shape[2], weight.shape[-1]
    radius = dilation * (size // 2)
    padded = F.pad(x.to(dtype), (0, 0, radius, radius, radius, radius))
    taps = weight.to(dtype)
    y = sum(
        taps[:, 0, u, v]
        * padded[:, u * dilation : u * dilation + height : stride, v * dilation : v * dilation + width : stride]
        for u in range(size)
        for v in range(size)
    )
    if bias is not None:
        y = y + bias.to(dtype)
    if residual:
        y = y + x.to(dtype)
    return y.to(x.dtype)
