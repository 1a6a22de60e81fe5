"""Linear attention over split tokens with the Triton kernels of one rank's, between which the ranks meet.

Those kernels divide by the number of their own tokens. What is divided by the number of all tokens comes to them times
the share of their own.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from zoo.kernels.distributed.exchange import gather
from zoo.kernels.distributed.linear_attention import Split
from zoo.kernels.launch import unit_channels
from zoo.kernels.linear_attention.settings import pack, unpack
from zoo.kernels.linear_attention.triton import empty_float32, plan_of, terms_of


def attend(q: Tensor, k: Tensor, v: Tensor, local: Tensor | None, gate: Tensor | None, split: Split) -> Tensor:
    """As ``linear_attention``."""
    return _Attention.apply(q, k, v, local, gate, split)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, local: Tensor | None, gate: Tensor | None, split: Split
    ) -> Tensor:
        out, saved = forward(q, k, v, local, gate, split)
        ctx.split = split
        ctx.save_for_backward(saved, q, k, v, local, gate)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        saved, *tensors = ctx.saved_tensors
        grads = backward(grad, saved, *tensors, ctx.split)
        return *(None if x is None else d for x, d in zip(tensors, grads)), None


def forward(
    q: Tensor, k: Tensor, v: Tensor, local: Tensor | None, gate: Tensor | None, split: Split
) -> tuple[Tensor, Tensor]:
    """The result, and what the backward pass needs of all ranks."""
    q, k, v, local, gate = map(unit_channels, (q, k, v, local, gate))
    settings, (batch, N, heads, D), E = split.settings, q.shape, v.shape[-1]
    weights = settings.token_weights
    if N == 0:  # zeros, and -inf in the place of a maximum or of a logarithm
        shapes = settings.saved(D, E).items()
        own = {name: empty_float32((batch, heads, *shape), q.device).zero_() for name, shape in shapes}
        if weights:
            own["query"] = split.sum(own["query"]) / split.total
        for name in ("key",) if settings.normalisation == "keys" else ("top",) if weights else ():
            own[name].fill_(-torch.inf)
        return q.new_empty(v.shape), pack(split.combined(own), settings)
    plan = plan_of(q, v, local, gate, settings)
    table = q if plan.table is None else plan.table
    terms, where, factors = terms_of(q, local, gate), plan.map, (settings.scale, settings.eps)
    mean = q
    if weights:
        part = empty_float32(plan.mean_parts["mean"], q.device)
        plan.launch("mean", settings.scale)(q, part)
        mean = _mean_over_all(part, D, split)
    part = empty_float32(plan.parts["state"], q.device)
    plan.launch("state", 1, *where, plan.root)(k, v, mean, table, part)
    saved, chunk = empty_float32(plan.saved, q.device), plan.tokens["state"][2]
    plan.launch("combine", plan.splits["state"], 1, chunk, N)(part, mean, saved)
    saved = pack(split.combined(unpack(saved, settings, D, E)), settings)
    out = q.new_empty(v.shape)
    plan.launch("read", *where, *factors)(q, *terms, out, table, saved)
    return out, saved


def backward(
    grad: Tensor, saved: Tensor, q: Tensor, k: Tensor, v: Tensor, local: Tensor | None, gate: Tensor | None,
    split: Split,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of q, k, v, local and gate; of what is None an empty tensor."""
    grad, q, k, v, local, gate = map(unit_channels, (grad, q, k, v, local, gate))
    settings, (batch, N, heads, D), E = split.settings, q.shape, v.shape[-1]
    grads = d_q, d_k, d_v, d_local, _ = tuple(
        q.new_empty(0) if x is None else x.new_empty(x.shape) for x in (q, k, v, local, gate)
    )
    weights, subtracts = settings.token_weights, settings.normalisation == "subtraction"
    width = E if subtracts else D
    if N == 0:
        zeros = saved.new_zeros(batch, heads, D + 1, max(D, E))
        _summed(zeros[:, :, :D, :E], zeros[:, :, D, :width], split)
        if weights:
            split.sum(saved.new_zeros(batch, heads, D))
        return grads
    plan = plan_of(q, v, local, gate, settings)
    table = q if plan.table is None else plan.table
    terms, where, factors = terms_of(q, local, gate), plan.map, (settings.scale, settings.eps)
    part = empty_float32(plan.parts["read_backward"], q.device)
    plan.launch("read_backward", *where, *factors)(grad, q, *terms, d_q, *grads[3:], table, saved, part)
    part = part.sum(1).unflatten(0, (batch, heads))  # (B, H, size): the gradient of S (BD, BE), then of its vector
    BD, BE = (plan.constants["read"][name] for name in ("BD", "BE"))
    d_state = part[..., : BD * BE].unflatten(2, (BD, BE))[:, :, :D, :E]
    d_vector = part[..., BD * BE : BD * BE + width]
    share = 1.0 if weights or settings.normalisation == "keys" else N / split.total
    for mine, whole in zip((d_state, d_vector), _summed(d_state, d_vector, split)):
        mine.copy_(whole * share)
    combined = empty_float32(plan.combined, q.device)
    plan.launch("combine_backward", 1)(part, saved, combined)
    mean = empty_float32(plan.mean_parts["keys_backward"], q.device) if weights else q
    plan.launch("keys_backward", *where, plan.root)(k, v, d_k, d_v, table, saved, combined, mean)
    if weights:
        mean = _mean_over_all(mean, D, split)
        d_out, times = (grad, terms[1]) if local is None else (d_local, q)
        plan.launch("query_backward", 1, *where, *factors)(d_out, q, times, d_q, table, saved, mean)
    return grads


def _mean_over_all(part: Tensor, D: int, split: Split) -> Tensor:
    """Parts (heads, splits, BD) of a sum over tokens as the one part from which the kernels make its mean over all."""
    total = split.sum(part.sum(1)[:, :D])
    share = split.tokens[split.rank] / split.total
    return F.pad(total * share, (0, part.shape[2] - D))


def _summed(d_state: Tensor, d_vector: Tensor, split: Split) -> tuple[Tensor, Tensor]:
    """The gradients of S (B, H, D, E) and of its vector (B, H, W) of all ranks together; one collective."""
    both = gather(torch.cat((d_state.flatten(2), d_vector), 2), split.group)
    D, E = d_state.shape[2:]
    return split.turned(both[..., : D * E].unflatten(3, (D, E))).sum(0), both[..., D * E :].sum(0)
