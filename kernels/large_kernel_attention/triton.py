"""Large kernel attention with the Triton kernels of the depthwise convolution, and a matrix product with the gate.

``_gated_linear`` multiplies by the gate before it writes: the result of the 1x1 convolution never goes to memory, 10
bytes per number in bfloat16 become 6 (and 12 become 8 in the backward pass, which adds as well). PyTorch's product
serves float32, where it must not round to tf32, and channels that are no multiple of 16, where loads are narrow.

The two depthwise convolutions are two kernels, and the map between them goes through memory. To keep it on chip costs
more than it saves:

- The 7x7 taps of dilation 3 reach 9 tokens to each side, so a tile of 28 x 28 results needs the 5x5 convolution at
  46 x 46: 2.7 times its 25 multiplications, 116 instead of 74 per result (139 for tiles of 20 x 20; 74 only if the
  whole map is one tile). It saves 4 of 8 bytes of traffic. By the data sheet of an H100 (33 T multiplications and 3 TB
  per second) a result takes at least 2.6 ps without it (2.2 of arithmetic, 2.6 of memory), and 3.5 ps with it (3.5 and
  1.3).
- The tile of the map between, 46 x 46 x 32 channels, is 135 KB in bfloat16: one program per multiprocessor, with
  nothing to do while it waits. And its reads are shifted by tokens, which Triton cannot do in shared memory.
- The map between is small against the cache at the sizes of the models: 26 MB for 64 x 56 x 56 x 64, the L2 cache
  holds 50 MB. Much of the traffic saved would not have reached memory.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels.depthwise_conv import triton as depthwise
from zoo.kernels.dispatch import planned_once
from zoo.kernels.large_kernel_attention import torch_backend
from zoo.kernels.launch import Launch, with_unit_channels


@triton.jit(do_not_specialize=["M", "m_gate"])
def _gated_linear(
    x, weight, bias, gate, add, y, M, m_gate, C,
    BIAS: tl.constexpr, ADD: tl.constexpr, WIDEN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """y = (x weight^T + bias) * gate + add: x, add and y (M, C), weight (C, C), output channels first."""
    blocks = tl.cdiv(C, BN)
    m = (tl.program_id(0) // blocks).to(tl.int64) * BM + tl.arange(0, BM)
    n = tl.program_id(0) % blocks * BN + tl.arange(0, BN)
    in_m, in_n = m < M, n < C
    sums = tl.zeros((BM, BN), tl.float32)
    for start in range(0, C, BK):
        k = start + tl.arange(0, BK)
        a = tl.load(x + m[:, None] * C + k[None, :], mask=in_m[:, None] & (k < C)[None, :], other=0.0)
        b = tl.load(weight + n[None, :] * C + k[:, None], mask=in_n[None, :] & (k < C)[:, None], other=0.0)
        if WIDEN:
            a, b = a.to(tl.float32), b.to(tl.float32)
        sums = tl.dot(a, b, sums)
    if BIAS:
        sums += tl.load(bias + n, mask=in_n, other=0.0).to(tl.float32)[None, :]
    valid = in_m[:, None] & in_n[None, :]
    sums *= tl.load(gate + m[:, None] * m_gate + n[None, :], mask=valid, other=0.0).to(tl.float32)
    if ADD:
        sums += tl.load(add + m[:, None] * C + n[None, :], mask=valid, other=0.0).to(tl.float32)
    tl.store(y + m[:, None] * C + n[None, :], sums.to(y.dtype.element_ty), mask=valid)


@with_unit_channels
def plan_gated_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor, add: Tensor | None = None
) -> Callable[..., Tensor]:
    """A function of arguments like these, as ``gated_linear`` of the torch backend; x and add are contiguous."""
    channels = x.shape[-1]
    if x.dtype == torch.float32 or channels % 16:
        return torch_backend.gated_linear
    tokens = x.numel() // channels
    m_gate = gate.reshape(tokens, channels).stride(0)
    width = max(16, min(128, triton.next_power_of_2(channels)))
    constants = {
        "BIAS": bias is not None, "ADD": add is not None,
        "WIDEN": not x.is_cuda,  # Triton's interpreter has no product of bfloat16
        "BM": 128, "BN": width, "BK": min(64, width), "num_warps": 8 if width == 128 else 4, "num_stages": 3,
    }  # fmt: skip
    blocks = triton.cdiv(tokens, 128) * triton.cdiv(channels, width)
    launch = Launch(_gated_linear, (blocks,), (tokens, m_gate, channels), constants, x.device)

    def run(x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor, add: Tensor | None = None) -> Tensor:
        y, gate = torch.empty_like(x), gate.reshape(tokens, channels)
        weight = weight.to(x.dtype).contiguous()
        launch(x, weight, x if bias is None else bias, gate, x if add is None else add, y)
        return y

    return run


def plan_forward(*_: Any) -> Callable[..., Tensor]:
    """The forward pass, of which every stage is planned."""
    return partial(torch_backend.forward, **_stages())


def plan_backward(*_: Any) -> Callable[..., tuple[Tensor, ...]]:
    """The backward pass, of which every stage is planned."""
    backward = {f"{stage}_backward": planned_once(depthwise.plan_backward) for stage in ("local", "dilated")}
    return partial(torch_backend.backward, **_stages(), **backward)


def _stages() -> dict[str, Callable[..., Tensor]]:
    plans = {"local": depthwise.plan_forward, "dilated": depthwise.plan_forward, "mix": plan_gated_linear}
    return {stage: planned_once(plan) for stage, plan in plans.items()}
