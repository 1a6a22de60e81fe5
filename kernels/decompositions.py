"""The operators as plain PyTorch operators, for exported graphs that are to run where there is no zoo.

Each takes any batch and any size, without a branch or a loop that depends on them, so that one graph is right for all.
And each writes into no tensor: the PyTorch backends do, which ``run_decompositions`` refuses.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.kernels.depthwise_conv.reference import ACTIVATIONS
from zoo.kernels.library import accumulation_dtype
from zoo.kernels.linear_attention.reference import linear_attention_reference

CHUNK = 16  # tokens that are taken pair by pair, and chunks of one group


def decompositions() -> dict[torch._ops.OpOverload, Callable]:
    """What ``torch.export.ExportedProgram.run_decompositions`` puts in the place of the models' operators."""
    ops = torch.ops.zoo
    return {
        ops.depthwise_conv2d.default: depthwise_conv2d,
        ops.large_kernel_attention.default: large_kernel_attention,
        ops.linear_attention.default: linear_attention,
        ops.bidirectional_gated_linear_attention.default: bidirectional_gated_linear_attention,
    }


def depthwise_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    dilation: int,
    residual: bool,
    activation: str = "none",
    gate: Tensor | None = None,
) -> Tensor:
    """As ``zoo.kernels.depthwise_conv2d``."""
    padding = dilation * (weight.shape[-1] // 2)
    bias = bias if bias is None else bias.to(x.dtype)
    y = F.conv2d(
        x.permute(0, 3, 1, 2), weight.to(x.dtype), bias, stride, padding, dilation, groups=weight.shape[0]
    ).permute(0, 2, 3, 1)
    y = ACTIVATIONS[activation](y + x if residual else y)
    return (y if gate is None else y * gate).contiguous()


def large_kernel_attention(
    x: Tensor,
    local_weight: Tensor,
    local_bias: Tensor | None,
    dilated_weight: Tensor,
    dilated_bias: Tensor | None,
    mix_weight: Tensor,
    mix_bias: Tensor | None,
    dilation: int,
) -> Tensor:
    """As ``zoo.kernels.large_kernel_attention``."""
    local = depthwise_conv2d(x, local_weight, local_bias, 1, 1, False)
    dilated = depthwise_conv2d(local, dilated_weight, dilated_bias, 1, dilation, False)
    return x * F.linear(dilated, mix_weight.to(x.dtype), mix_bias if mix_bias is None else mix_bias.to(x.dtype))


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    local: Tensor | None,
    gate: Tensor | None,
    feature_map: str,
    token_weights: bool,
    height: int,
    width: int,
    rotary_base: float,
    *form: float | str | bool,
) -> tuple[Tensor, Tensor]:
    """As ``zoo.kernels.linear_attention``, with an empty tensor in the place of what a backward pass would need."""
    grid = None if isinstance(height, int) and height == 0 else (height, width)
    y = linear_attention_reference(q, k, v, feature_map, token_weights, grid, rotary_base, local, gate, *form)
    return y.contiguous(), q.new_empty(0)


def bidirectional_gated_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, log_decay_reverse: Tensor, scale: float | None = None
) -> Tensor:
    """As ``zoo.kernels.bidirectional_gated_linear_attention``; decays of -inf are not for this form."""
    dtype = accumulation_dtype(q.dtype)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    pairs = (q, q), (k, k), (v, v), (log_decay, log_decay_reverse)
    both = (torch.stack([x.to(dtype), y.to(dtype).flip(1)]).transpose(2, 3) for x, y in pairs)
    ahead, back = (_gated(*both) * scale).transpose(2, 3).unbind(0)
    return (ahead + back.flip(1)).contiguous().to(q.dtype)


def _gated(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
    """``S_t = diag(exp(log_decay_t)) S_{t-1} + k_t v_t^T, o_t = S_t^T q_t``: (..., N, D or E) to (..., N, E).

    The decay between two tokens is the exponential of a difference of sums, taken within a chunk, between chunks of a
    group, and between groups: a state for each chunk is all that N tokens need, and groups that are all paired are few.
    """
    tokens = q.shape[-2]
    groups = (tokens + CHUNK**2 - 1) // CHUNK**2
    more = groups * CHUNK**2 - tokens  # zeros after the last token change nothing
    q, k, v, g = (F.pad(x, (0, 0, 0, more)).unflatten(-2, (groups, CHUNK, CHUNK)) for x in (q, k, v, log_decay))
    total = g.cumsum(-2)  # of a chunk: (..., groups, chunks, tokens, D)
    causal = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=q.device).tril().unsqueeze(-1)
    decay = torch.where(causal, total.unsqueeze(-2) - total.unsqueeze(-3), -torch.inf).exp()  # (..., query, key, D)
    weights = (q.unsqueeze(-2) * k.unsqueeze(-3) * decay).sum(-1)
    last = total[..., -1, :]
    updates = (k * (last.unsqueeze(-2) - total).exp()).transpose(-1, -2) @ v  # (..., groups, chunks, D, E)
    inside, whole_decay, whole = _before(last, updates)
    outside, _, _ = _before(whole_decay, whole)
    reach = last.cumsum(-2) - last  # decay from the beginning of the group to each chunk
    states = inside + reach.exp().unsqueeze(-1) * outside.unsqueeze(-3)
    out = weights @ v + (q * total.exp()) @ states
    return out.flatten(-4, -2)[..., :tokens, :]


def _before(log_decay: Tensor, updates: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The states before each of M steps, and what all steps together are.

    Args:
        log_decay: (..., M, D).
        updates: (..., M, D, E).

    Returns:
        States (..., M, D, E), the first one empty; decay (..., D) and update (..., D, E) of the whole.
    """
    total = log_decay.cumsum(-2)
    steps = torch.arange(total.shape[-2], device=total.device)
    earlier = (steps[:, None] > steps).unsqueeze(-1)
    # From the end of a step to the beginning of another.
    decay = (total - log_decay).unsqueeze(-2) - total.unsqueeze(-3)
    weights = torch.where(earlier, decay, -torch.inf).exp()  # (..., M, M, D)
    states = torch.einsum("...mjd,...jde->...mde", weights, updates)
    whole = ((total[..., -1:, :] - total).exp().unsqueeze(-1) * updates).sum(-3)
    return states, total[..., -1, :], whole
