"""2D linear attention as a few matrix products of PyTorch, with a backward pass that recomputes the state.

The names are those of the formulas in ``reference.py``; a leading d is a gradient.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from zoo.kernels.library import accumulation_dtype
from zoo.kernels.linear_attention.reference import FEATURE_MAPS
from zoo.kernels.rotary import rotary_angles


@dataclass(frozen=True)
class Settings:
    """The arguments of the operator that are no tensors."""

    feature_map: str
    token_weights: bool
    height: int  # 0: no rotation
    width: int
    rotary_base: float
    eps: float
    normalisation: str = "division"
    scale: float = 1.0


class _Pass:
    """What the forward and the backward pass share, in the accumulation dtype: features, weights, state, read-out."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, settings: Settings) -> None:
        self.settings = settings
        self.tokens, self.dim = q.shape[1], q.shape[-1]
        dtype = accumulation_dtype(q.dtype)
        self.raw_q, self.raw_k, self.v = (
            x.transpose(1, 2).to(dtype, memory_format=torch.contiguous_format, copy=False).contiguous()
            for x in (q, k, v)
        )
        feature_map = _exp_or_more if settings.feature_map == "elu+1" else FEATURE_MAPS[settings.feature_map]
        self.q, self.k = feature_map(self.raw_q), feature_map(self.raw_k)
        if settings.scale != 1:
            self.q = self.q * settings.scale
        self.weights = self.mean_q = None
        weighted = self.k
        if settings.token_weights:
            self.mean_q = self.q.mean(2, keepdim=True)
            scores = self.k @ self.mean_q.transpose(2, 3) * self.dim**-0.5
            self.weights = scores.softmax(2).mul_(self.tokens)
            weighted = self.k * self.weights
        self.mean_k = weighted.mean(2, keepdim=True)
        self.turns = _turns(settings, self.dim, q.device, dtype) if settings.height else None
        self.turned_q, self.turned_k = self.turn(self.q), self.turn(weighted)
        self.by_subtraction = settings.normalisation == "subtraction"
        if self.by_subtraction:
            # f(q) S - f(q) . mean(k) mean(v) is f(q) times the covariance of k and v: no large terms that cancel.
            mean_v = self.v.mean(2, keepdim=True)
            self.turned_k, self.v = weighted - self.mean_k, self.v - mean_v
        self.state = self.turned_k.transpose(2, 3) @ self.v / self.tokens
        self.out = self.turned_q @ self.state
        if self.by_subtraction:
            self.out += mean_v
        else:
            self.normaliser = self.q @ self.mean_k.transpose(2, 3) + settings.eps
            self.out /= self.normaliser

    def turn(self, x: Tensor, back: bool = False) -> Tensor:
        """The rotation of every token, or its inverse; nothing without rotation."""
        if self.turns is None:
            return x
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * (self.turns.conj() if back else self.turns)).flatten(-2)


def _exp_or_more(x: Tensor) -> Tensor:
    """ELU plus 1 as exp(min(x, 0)) + max(x, 0): on a CPU twice as fast as PyTorch's ELU."""
    return x.clamp(max=0).exp_().add_(x.relu())


def _turns(settings: Settings, dim: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The rotations (N, D / 2) as complex numbers."""
    angles = rotary_angles(settings.height, settings.width, dim, settings.rotary_base, device, dtype)
    return torch.polar(torch.ones_like(angles), angles)


def forward(q: Tensor, k: Tensor, v: Tensor, local: Tensor | None, gate: Tensor | None, settings: Settings) -> Tensor:
    """As ``linear_attention``."""
    y = _Pass(q, k, v, settings).out.transpose(1, 2)
    if local is not None:
        y = y + local
    if gate is not None:
        y = y * gate
    return y.to(q.dtype, memory_format=torch.contiguous_format).contiguous()


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, local: Tensor | None, gate: Tensor | None, settings: Settings
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, local and gate; of what is None an empty tensor."""
    run = _Pass(q, k, v, settings)
    d_out = grad.to(run.out.dtype)
    absent = q.new_empty(0)
    d_local = d_gate = absent
    if gate is not None:
        out = run.out.transpose(1, 2)
        d_gate = (d_out * (out if local is None else out + local)).to(gate.dtype)
        d_out = d_out * gate
    if local is not None:
        d_local = d_out.to(local.dtype)
    d_out = d_out.transpose(1, 2)

    d_product = d_out if run.by_subtraction else d_out / run.normaliser
    d_q = run.turn((d_product @ run.state.transpose(2, 3)).contiguous(), back=True)
    d_state = run.turned_q.transpose(2, 3) @ d_product / run.tokens
    d_v = run.turned_k @ d_state
    d_k = run.turn((run.v @ d_state.transpose(2, 3)).contiguous(), back=True)  # of the weighted keys
    if run.by_subtraction:
        d_v = d_v + d_out.mean(2, keepdim=True)
    else:
        d_normaliser = -(d_product * run.out).sum(-1, keepdim=True)
        d_q = d_q + d_normaliser * run.mean_k
        d_k = d_k + d_normaliser.transpose(2, 3) @ run.q / run.tokens
    if run.weights is not None:
        d_weights = (d_k * run.k).sum(-1, keepdim=True)
        d_scores = run.weights * (d_weights - (run.weights * d_weights).mean(2, keepdim=True)) * run.dim**-0.5
        d_k = d_k * run.weights + d_scores * run.mean_q
        d_q = d_q + d_scores.transpose(2, 3) @ run.k / run.tokens
    if settings.feature_map in ("elu+1", "exp"):
        run.q = run.q / settings.scale
    d_q = d_q * settings.scale * _slope(settings.feature_map, run.raw_q, run.q)
    d_k = d_k * _slope(settings.feature_map, run.raw_k, run.k)
    d_q, d_k, d_v = (
        d.transpose(1, 2).to(x.dtype).contiguous() for d, x in zip((d_q, d_k, d_v), (q, k, v), strict=True)
    )
    return d_q, d_k, d_v, d_local.contiguous(), d_gate.contiguous()


def _slope(feature_map: str, x: Tensor, mapped: Tensor) -> Tensor | float:
    """The derivative of a feature map at x, where its value is ``mapped``."""
    if feature_map == "identity":
        return 1.0
    if feature_map == "relu":
        return (x > 0).to(x.dtype)
    return mapped if feature_map == "exp" else torch.where(x > 0, 1.0, mapped)  # elu + 1 is exp below 0
