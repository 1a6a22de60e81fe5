"""The definition of the depthwise convolution, tap by tap."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from zoo.kernels.library import accumulation_dtype

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"none": lambda x: x, "gelu": F.gelu, "silu": F.silu}


def depthwise_conv2d_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int = 1,
    dilation: int = 1,
    residual: bool = False,
    activation: str = "none",
    gate: Tensor | None = None,
) -> Tensor:
    """The convolution, then bias, residual, activation and gate, in this order.

    1. ``y[b, i, j, c] = sum over u, v of weight[c, 0, u, v] * x[b, s i + d (u - r), s j + d (v - r), c]``, where r is
       half the kernel size, rounded down, and x is zero outside the map;
    2. ``y += bias[c]``;
    3. with ``residual`` ``y += x[b, i, j, c]``;
    4. ``y = activation(y)``;
    5. with a gate ``y *= gate[b, i, j, c]``.

    Args:
        x: (B, H, W, C).
        weight: (C, 1, K, K), K odd.
        bias: (C,).
        stride: s.
        dilation: d.
        residual: add the input, for stride 1.
        activation: "none", "gelu" (with the error function) or "silu".
        gate: (B, ceil(H / s), ceil(W / s), C).

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
    y = ACTIVATIONS[activation](y)
    if gate is not None:
        y = y * gate.to(dtype)
    return y.to(x.dtype)
