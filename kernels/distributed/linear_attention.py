"""Linear attention over tokens that are split over ranks: each sends its D x E states once.

Sun, Lan, Zhu, Qu, Cheng: LASP-2: Rethinking Sequence Parallelism for Linear Attention and Its Hybrid,
arXiv:2502.07563, for maps and without a causal mask: all ranks gather the states of all ranks and put them together.
The softmaxes over tokens (RALA's token weights, LightNet's keys) are put together in the same collective, from the
maximum and the sum of exponentials of each rank. Token weights depend on the mean query, which takes one collective of
D numbers per head before.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch import distributed as dist

from zoo.kernels.dispatch import select_backend
from zoo.kernels.distributed.exchange import gather
from zoo.kernels.library import accumulation_dtype
from zoo.kernels.linear_attention import op
from zoo.kernels.linear_attention.reference import FEATURE_MAPS, angles_of_heads
from zoo.kernels.linear_attention.settings import Settings, pack, unpack
from zoo.kernels.rotary import rotate


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group: dist.ProcessGroup,
    tokens: Sequence[int],
    feature_map: str = "elu+1",
    token_weights: bool = False,
    grid: tuple[int, int] | None = None,
    rotary_base: float = 10000.0,
    local: Tensor | None = None,
    gate: Tensor | None = None,
    eps: float = 1e-6,
    normalisation: str = "division",
    scale: float = 1.0,
    rotary_across_heads: bool = False,
) -> Tensor:
    """As ``zoo.kernels.linear_attention``, over the tokens of all ranks.

    Args:
        q: the queries of this rank (B, N, H, D).
        k: its keys (B, N, H, D).
        v: its values (B, N, H, E).
        group: the processes.
        tokens: N of each rank, which may be 0.
        feature_map: of queries and keys.
        token_weights: weigh the tokens of the state.
        grid: rows and columns of this rank's strip, for the rotation; N of each rank is then a multiple of the columns.
        rotary_base: of the rotation.
        local: (B, N, H, E), added to the result.
        gate: (B, N, H, E), multiplied with the sum.
        eps: added to the normaliser.
        normalisation: "division", "subtraction" or "keys".
        scale: multiplies the mapped queries.
        rotary_across_heads: as there.

    Returns:
        (B, N, H, E) in the dtype of q.

    Raises:
        ValueError: an argument has another shape, dtype or value, or "subtraction" comes with token weights.
    """
    height, width = (0, 0) if grid is None else grid
    form = (eps, normalisation, scale, rotary_across_heads)
    settings = Settings(feature_map, token_weights, height, width, rotary_base, *form)
    op.check(q, k, v, local, gate, settings)
    if grid is not None and height == 0:
        settings = replace(settings, height=1)  # 0 would say that nothing turns, and ranks' states must be alike
    if normalisation == "subtraction" and token_weights:
        raise ValueError("linear_attention: token_weights of split tokens need normalisation 'division'.")
    split = Split(group, dist.get_rank(group), tuple(tokens), settings)
    if q.shape[1] != tokens[split.rank]:
        raise ValueError(f"linear_attention: q has {q.shape[1]} tokens, expected {tokens[split.rank]} of this rank.")
    with torch.autocast(q.device.type, enabled=False):  # as the operator of one rank
        return select_backend(op.NAME, _backends(q, v, settings), q.device)(q, k, v, local, gate, split)


def _backends(q: Tensor, v: Tensor, settings: Settings) -> dict:
    backends = {"torch": attend}
    if op.has_triton_kernels(q, v, settings):

        def on_triton(*arguments: Tensor | None) -> Tensor:
            from zoo.kernels.distributed.linear_attention_triton import attend

            return attend(*arguments)

        backends["triton"] = on_triton
    return backends


@dataclass(frozen=True)
class Split:
    """How the tokens are split, and what the ranks do together.

    Attributes:
        group: the processes.
        rank: of this process.
        tokens: of each rank.
        settings: of the operator on this rank's strip.
    """

    group: dist.ProcessGroup
    rank: int
    tokens: tuple[int, ...]
    settings: Settings

    @property
    def total(self) -> int:
        """Tokens of all ranks."""
        return sum(self.tokens)

    def sum(self, x: Tensor) -> Tensor:
        """The sum of a tensor over the ranks; one collective."""
        return gather(x, self.group).sum(0)

    def turned(self, states: Tensor, back: bool = False) -> Tensor:
        """The states of all ranks (ranks, B, H, D, E), whose rotations count from a rank's first row, from this one's.

        Rotations by rows add up, so a state turns as its keys do; ``back`` turns it the other way.
        """
        if not self.settings.height:
            return states
        starts = [sum(self.tokens[:rank]) // self.settings.width for rank in range(len(self.tokens))]
        rows = tuple(start - starts[self.rank] for start in starts)
        form = (self.settings.rotary_base, self.settings.rotary_across_heads, states.device, states.dtype)
        cos, sin = _turns(rows, *states.shape[2:4], *form)
        return rotate(states.transpose(3, 4), cos, -sin if back else sin).transpose(3, 4)

    def combined(self, own: dict[str, Tensor]) -> dict[str, Tensor]:
        """What ``Settings.saved`` names, of the tokens of all ranks, from that of this rank's; one collective.

        Without tokens a rank has zeros, and -inf in the place of a maximum or of a logarithm.
        """
        settings, (dim, value_dim) = self.settings, own["state"].shape[2:]
        both = unpack(gather(pack(own, settings), self.group).flatten(0, 1), settings, dim, value_dim)
        of = {name: x.unflatten(0, (len(self.tokens), -1)) for name, x in both.items()}  # (ranks, B, H, rows, columns)
        state, key = self.turned(of["state"]), of["key"]
        share = _shares(self.tokens, key.device, key.dtype)
        if settings.normalisation == "keys":
            log_sum = key.logsumexp(0)
            share = (key - log_sum).exp().transpose(3, 4)  # (ranks, B, H, D, 1)
            if not settings.height:
                return {"state": (share * state).sum(0), "key": log_sum}
            # A turn mixes the part that is times cosines with the other one, which a turn of their difference tells.
            apart = self.turned(2 * of["cosine"] - of["state"], back=True)
            swapped = share.unflatten(3, (-1, 2)).flip(4).flatten(3, 4)  # times sines is the other channel of a pair
            cosine, sine = (share * (state + apart)).sum(0) / 2, (swapped * (state - apart)).sum(0) / 2
            return {"state": cosine + sine, "key": log_sum, "cosine": cosine}
        if settings.normalisation == "subtraction":
            mean_key, mean_value = (share * key).sum(0), (share * of["value"]).sum(0)
            apart = (key - mean_key).transpose(3, 4) * (of["value"] - mean_value)  # covariances of means
            return {"state": (share * (state + apart)).sum(0), "key": mean_key, "value": mean_value}
        if not settings.token_weights:
            return {"state": (share * state).sum(0), "key": (share * key).sum(0)}
        top = of["top"].amax(0)
        share = of["total"] * (of["top"] - top).exp()
        total = share.sum(0)
        share = share / total
        sums = {"state": (share * state).sum(0), "key": (share * key).sum(0)}
        return sums | {"query": own["query"], "top": top, "total": total}


# Both are small, the same in all layers of a stage, and made on the CPU: to copy them each time would wait for the GPU.
@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)  # they may be kept for a backward pass
def _turns(
    rows: tuple[int, ...],
    heads: int,
    dim: int,
    base: float,
    across_heads: bool,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of rotations by so many rows: (ranks, 1, H or 1, 1, D / 2) each."""
    of_a_row = angles_of_heads(2, 1, heads, dim, base, across_heads, torch.device("cpu"), torch.float64)[..., 1, :]
    angles = torch.tensor(rows)[:, None, None, None, None] * of_a_row.unsqueeze(-2)
    return angles.cos().to(device, dtype), angles.sin().to(device, dtype)


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)
def _shares(tokens: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """What of all tokens each rank has, (ranks, 1, 1, 1, 1)."""
    counts = torch.tensor(tokens, dtype=torch.float64)
    return (counts / counts.sum()).to(device, dtype)[:, None, None, None, None]


def attend(q: Tensor, k: Tensor, v: Tensor, local: Tensor | None, gate: Tensor | None, split: Split) -> Tensor:
    """As ``linear_attention``, with PyTorch's operators and autograd."""
    settings, dtype, count = split.settings, accumulation_dtype(q.dtype), max(q.shape[1], 1)
    heads, dim = q.shape[2:]
    q_bhnd, k_bhnd, v_bhne = (x.to(dtype).transpose(1, 2) for x in (q, k, v))
    q_bhnd = FEATURE_MAPS[settings.feature_map](q_bhnd) * settings.scale
    own = {}
    if settings.normalisation == "keys":
        top = _highest(k_bhnd)
        weights = (k_bhnd - top).exp()
        total = weights.sum(2, keepdim=True).clamp_min(1)  # less only without tokens
        k_bhnd, own["key"] = weights / total, top + total.log()
    elif settings.token_weights:
        k_bhnd = FEATURE_MAPS[settings.feature_map](k_bhnd)
        own["query"] = split.sum(q_bhnd.sum(2, keepdim=True)) / split.total
        scores = (k_bhnd * own["query"]).sum(-1, keepdim=True) * dim**-0.5
        own["top"] = _highest(scores)
        weights = (scores - own["top"]).exp()
        own["total"] = weights.sum(2, keepdim=True)
        k_bhnd = k_bhnd * (weights / own["total"].clamp_min(1))
    else:
        k_bhnd = FEATURE_MAPS[settings.feature_map](k_bhnd) / count
    if settings.normalisation != "keys":
        own["key"] = k_bhnd.sum(2, keepdim=True)
    turned_q, turned_k = q_bhnd, k_bhnd
    if settings.height:
        form = (settings.rotary_base, settings.rotary_across_heads, q.device, dtype)
        angles = angles_of_heads(settings.height, settings.width, heads, dim, *form)[..., : q.shape[1], :]
        cos, sin = angles.cos(), angles.sin()
        turned_q, turned_k = (rotate(x, cos, sin) for x in (q_bhnd, k_bhnd))
        if settings.normalisation == "keys":
            own["cosine"] = (k_bhnd * cos.repeat_interleave(2, -1)).transpose(2, 3) @ v_bhne
    if settings.normalisation == "subtraction":
        own["value"] = v_bhne.sum(2, keepdim=True) / count
        turned_k, v_bhne = k_bhnd - own["key"] / count, v_bhne - own["value"]
    own["state"] = turned_k.transpose(2, 3) @ v_bhne
    whole = split.combined(own)
    y = turned_q @ whole["state"]
    if settings.normalisation == "division":
        y = y / (q_bhnd @ whole["key"].transpose(2, 3) + settings.eps)
    elif settings.normalisation == "subtraction":
        y = y + whole["value"]
    y = y.transpose(1, 2)
    if local is not None:
        y = y + local
    if gate is not None:
        y = y * gate
    return y.to(q.dtype).contiguous()


def _highest(x: Tensor) -> Tensor:
    """The maximum over the tokens (B, H, N, C), a constant that the result does not depend on; -inf of none."""
    x = x.detach()
    return x.amax(2, keepdim=True) if x.shape[2] else x.new_full((*x.shape[:2], 1, x.shape[3]), -torch.inf)
