"""2D linear attention as a few matrix products of PyTorch; the backward pass starts from the state that was saved.

The names are those of the formulas in ``reference.py``; a leading d is a gradient.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from zoo.kernels.library import accumulation_dtype
from zoo.kernels.linear_attention.reference import FEATURE_MAPS, angles_of_heads
from zoo.kernels.linear_attention.settings import Settings, pack, unpack


class _Pass:
    """What the forward and the backward pass share, in the accumulation dtype: features, weights, state.

    Args:
        q: as the other two, those of the operator.
        k: likewise.
        v: likewise.
        settings: of the operator.
        saved: what the forward pass saved; None to compute it.
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, settings: Settings, saved: Tensor | None = None) -> None:
        self.settings = settings
        tokens, heads, self.dim = q.shape[1:]
        dtype = accumulation_dtype(q.dtype)
        self.fields = {} if saved is None else unpack(saved, settings, self.dim, v.shape[-1])
        self.raw_q, self.raw_k, self.v = (
            x.transpose(1, 2).to(dtype, memory_format=torch.contiguous_format, copy=False).contiguous()
            for x in (q, k, v)
        )
        feature_map = _exp_or_more if settings.feature_map == "elu+1" else FEATURE_MAPS[settings.feature_map]
        self.q = feature_map(self.raw_q)
        if settings.scale != 1:
            self.q = self.q * settings.scale
        self.by_keys = settings.normalisation == "keys"
        self.by_subtraction = settings.normalisation == "subtraction"
        self.share = 1.0 if self.by_keys else 1 / tokens  # of a token, without weights
        self.weights = None
        if self.by_keys:
            self.k = weighted = (self.raw_k - self.field("key", lambda: self.raw_k.logsumexp(2, keepdim=True))).exp_()
        else:
            self.k = weighted = feature_map(self.raw_k)
        if settings.token_weights:
            self.mean_q = self.field("query", lambda: self.q.mean(2, keepdim=True))
            scores = self.k @ self.mean_q.transpose(2, 3) * self.dim**-0.5
            scores = scores.sub_(self.field("top", lambda: scores.amax(2, keepdim=True))).exp_()
            self.weights = scores.mul_(tokens / self.field("total", lambda: scores.sum(2, keepdim=True)))
            weighted = self.k * self.weights
        self.key = self.field("key", lambda: weighted.mean(2, keepdim=True))
        self.turns = _turns(settings, heads, self.dim, q.device, dtype) if settings.height else None
        self.turned_q, self.turned_k = self.turn(self.q), self.turn(weighted)
        if self.by_subtraction:
            # f(q) S - f(q) . mean(k) mean(v) is f(q) times the covariance of k and v: no large terms that cancel.
            self.mean_v = self.field("value", lambda: self.v.mean(2, keepdim=True))
            self.turned_k, self.v = weighted - self.key, self.v - self.mean_v
        self.state = self.field("state", lambda: self.turned_k.transpose(2, 3) @ self.v * self.share)

    def field(self, name: str, compute: Callable[[], Tensor]) -> Tensor:
        """What was saved under a name; computed, to be saved, if nothing was."""
        if name not in self.fields:
            self.fields[name] = compute()
        return self.fields[name]

    def read(self) -> Tensor:
        """The read-out (B, H, N, E)."""
        out = self.turned_q @ self.state
        if self.by_keys:
            return out
        return out.add_(self.mean_v) if self.by_subtraction else out.div_(self.normaliser())

    def normaliser(self) -> Tensor:
        """What the read-out is divided by, (B, H, N, 1)."""
        return self.q @ self.key.transpose(2, 3) + self.settings.eps

    def save(self) -> Tensor:
        """Everything that the backward pass, of whatever backend, needs."""
        if self.by_keys and self.turns is not None:
            cosines = self.turns.real.repeat_interleave(2, dim=-1)
            self.field("cosine", lambda: (self.k * cosines).transpose(2, 3) @ self.v)
        return pack(self.fields, self.settings)

    def turn(self, x: Tensor, back: bool = False) -> Tensor:
        """The rotation of every token, or its inverse; nothing without rotation."""
        if self.turns is None:
            return x
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * (self.turns.conj_physical() if back else self.turns)).flatten(-2)


def _exp_or_more(x: Tensor) -> Tensor:
    """ELU plus 1 as exp(min(x, 0)) + max(x, 0): on a CPU twice as fast as PyTorch's ELU."""
    return x.clamp(max=0).exp_().add_(x.relu())


def _turns(settings: Settings, heads: int, dim: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The rotations (N, D / 2) or (heads, N, D / 2) as complex numbers."""
    base, across_heads = settings.rotary_base, settings.rotary_across_heads
    angles = angles_of_heads(settings.height, settings.width, heads, dim, base, across_heads, device, dtype)
    return torch.polar(torch.ones_like(angles), angles)


def forward(
    q: Tensor, k: Tensor, v: Tensor, local: Tensor | None, gate: Tensor | None, settings: Settings
) -> tuple[Tensor, Tensor]:
    """The result of ``linear_attention``, and what the backward pass needs."""
    run = _Pass(q, k, v, settings)
    y = run.read().transpose(1, 2)
    if local is not None:
        y = y + local
    if gate is not None:
        y = y * gate
    return y.to(q.dtype, memory_format=torch.contiguous_format).contiguous(), run.save()


def backward(
    grad: Tensor,
    saved: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    local: Tensor | None,
    gate: Tensor | None,
    settings: Settings,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, local and gate; of what is None an empty tensor."""
    run = _Pass(q, k, v, settings, saved)
    d_out = grad.to(run.q.dtype)
    absent = q.new_empty(0)
    d_local = d_gate = absent
    divides = settings.normalisation == "division"
    out = run.read() if divides or gate is not None else absent
    if gate is not None:
        y = out.transpose(1, 2)
        d_gate = (d_out * (y if local is None else y + local)).to(gate.dtype)
        d_out = d_out * gate.to(d_out.dtype)
    if local is not None:
        d_local = d_out.to(local.dtype)
    d_out = d_out.transpose(1, 2)

    d_product = d_out / run.normaliser() if divides else d_out
    d_q = run.turn((d_product @ run.state.transpose(2, 3)).contiguous(), back=True)
    d_state = run.turned_q.transpose(2, 3) @ d_product * run.share
    d_v = run.turned_k @ d_state
    d_k = run.turn((run.v @ d_state.transpose(2, 3)).contiguous(), back=True)  # of the weighted keys
    if divides:
        d_normaliser = -(d_product * out).sum(-1, keepdim=True)
        d_q = d_q + d_normaliser * run.key
        d_k = d_k + d_normaliser.transpose(2, 3) @ run.q * run.share
    if run.by_subtraction:
        d_v = d_v + d_out.mean(2, keepdim=True)
    if run.by_keys:
        d_k = run.k * (d_k - (run.k * d_k).sum(2, keepdim=True))
    if run.weights is not None:
        d_weights = (d_k * run.k).sum(-1, keepdim=True)
        d_scores = run.weights * (d_weights - (run.weights * d_weights).mean(2, keepdim=True)) * run.dim**-0.5
        d_k = d_k * run.weights + d_scores * run.mean_q
        d_q = d_q + d_scores.transpose(2, 3) @ run.k * run.share
    d_q = d_q * settings.scale * _slope(settings.feature_map, run.raw_q)
    if not run.by_keys:
        d_k = d_k * _slope(settings.feature_map, run.raw_k)
    d_q, d_k, d_v = (
        d.transpose(1, 2).to(x.dtype).contiguous() for d, x in zip((d_q, d_k, d_v), (q, k, v), strict=True)
    )
    return d_q, d_k, d_v, d_local.contiguous(), d_gate.contiguous()


def _slope(feature_map: str, x: Tensor) -> Tensor | float:
    """The derivative of a feature map at x."""
    if feature_map == "identity":
        return 1.0
    if feature_map == "relu":
        return (x > 0).to(x.dtype)
    if feature_map == "silu":
        sigmoid = x.sigmoid()
        return sigmoid * (1 + x * (1 - sigmoid))
    return x.exp() if feature_map == "exp" else x.clamp(max=0).exp_()  # elu + 1 is exp below 0
