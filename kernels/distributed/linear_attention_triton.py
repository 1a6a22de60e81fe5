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
from zoo.kernels.linear_attention import triton as kernels
from zoo.kernels.linear_attention.settings import pack, unpack


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
    q, k, v, local, gate = map(kernels._unit, (q, k, v, local, gate))
    settings, (batch, N, heads, D), E = split.settings, q.shape, v.shape[-1]
    weights = settings.token_weights
    if N == 0:  # zeros, and -inf in the place of a maximum or of a logarithm
        shapes = settings.saved(D, E).items()
        own = {name: kernels._numbers((batch, heads, *shape), q.device).zero_() for name, shape in shapes}
        if weights:
            own["query"] = split.sum(own["query"]) / split.total
        for name in ("key",) if settings.normalisation == "keys" else ("top",) if weights else ():
            own[name].fill_(-torch.inf)
        return q.new_empty(v.shape), pack(split.combined(own), settings)
    plan = kernels._plan_of(q, v, local, gate, settings)
    table = q if plan.table is None else plan.table
    tokens, grids, splits = plan.tokens, plan.grids, plan.splits
    mean = q
    if weights:
        part = kernels._numbers(plan.mean_parts["mean"], q.device)
        kernels._mean[grids["mean"]](q, part, *kernels._strides(q), *tokens["mean"], settings.scale, **plan.of_mean)
        mean = _mean_over_all(part, D, split)
    part = kernels._numbers(plan.parts["state"], q.device)
    kernels._state[grids["state"]](
        k, v, mean, table, part, *kernels._strides(k, v), *tokens["state"], 1, *plan.map, plan.root, **plan.of_state
    )
    saved, chunk = kernels._numbers(plan.saved, q.device), tokens["state"][2]
    kernels._combine[plan.tiles](part, mean, saved, splits["state"], 1, chunk, N, **plan.of_combine)
    saved = pack(split.combined(unpack(saved, settings, D, E)), settings)
    out, terms = q.new_empty(v.shape), (q if local is None else local, q if gate is None else gate)
    kernels._read[grids["read"]](
        q, *terms, out, table, saved, *kernels._strides(q, *terms), *tokens["read"], *plan.map,
        settings.scale, settings.eps, **plan.of_read,
    )  # fmt: skip
    return out, saved


def backward(
    grad: Tensor, saved: Tensor, q: Tensor, k: Tensor, v: Tensor, local: Tensor | None, gate: Tensor | None,
    split: Split,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of q, k, v, local and gate; of what is None an empty tensor."""
    grad, q, k, v, local, gate = map(kernels._unit, (grad, q, k, v, local, gate))
    settings, (batch, N, heads, D), E = split.settings, q.shape, v.shape[-1]
    grads = d_q, d_k, d_v, d_local, d_gate = tuple(
        q.new_empty(0) if x is None else torch.empty(x.shape, device=x.device, dtype=x.dtype)
        for x in (q, k, v, local, gate)
    )
    weights, subtracts = settings.token_weights, settings.normalisation == "subtraction"
    width = E if subtracts else D
    if N == 0:
        zeros = saved.new_zeros(batch, heads, D + 1, max(D, E))
        _summed(zeros[:, :, :D, :E], zeros[:, :, D, :width], split)
        if weights:
            split.sum(saved.new_zeros(batch, heads, D))
        return grads
    plan = kernels._plan_of(q, v, local, gate, settings)
    table = q if plan.table is None else plan.table
    tokens, grids = plan.tokens, plan.grids
    terms, factors = (q if local is None else local, q if gate is None else gate), (settings.scale, settings.eps)
    part = kernels._numbers(plan.parts["read_backward"], q.device)
    kernels._read_backward[grids["read_backward"]](
        grad, q, *terms, d_q, d_local, d_gate, table, saved, part, *kernels._strides(grad, q, *terms),
        *tokens["read_backward"], *plan.map, *factors, **plan.of_read_backward,
    )  # fmt: skip
    part = part.sum(1).unflatten(0, (batch, heads))  # (B, H, size): the gradient of S (BD, BE), then of its vector
    BD, BE = plan.of_read["BD"], plan.of_read["BE"]
    d_state = part[..., : BD * BE].unflatten(2, (BD, BE))[:, :, :D, :E]
    d_vector = part[..., BD * BE : BD * BE + width]
    share = 1.0 if weights or settings.normalisation == "keys" else N / split.total
    for mine, whole in zip((d_state, d_vector), _summed(d_state, d_vector, split)):
        mine.copy_(whole * share)
    combined = kernels._numbers(plan.combined, q.device)
    kernels._combine_backward[plan.tiles](part, saved, combined, 1, **plan.of_combine_backward)
    mean = kernels._numbers(plan.mean_parts["keys_backward"], q.device) if weights else q
    kernels._keys_backward[grids["keys_backward"]](
        k, v, d_k, d_v, table, saved, combined, mean, *kernels._strides(k, v), *tokens["keys_backward"], *plan.map,
        plan.root, **plan.of_keys_backward,
    )  # fmt: skip
    if weights:
        mean = _mean_over_all(mean, D, split)
        d_out, times = (grad, terms[1]) if local is None else (d_local, q)
        kernels._query_backward[grids["query_backward"]](
            d_out, q, times, d_q, table, saved, mean, *kernels._strides(d_out, q, times),
            *tokens["query_backward"], 1, *plan.map, *factors, **plan.of_query_backward,
        )  # fmt: skip
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
