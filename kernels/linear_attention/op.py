"""2D linear attention as one PyTorch operator, ``zoo::linear_attention``."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zoo.kernels.dispatch import planned, select_backend, triton_backend
from zoo.kernels.library import accumulation_dtype, check_float, check_shape, register_op
from zoo.kernels.linear_attention import torch_backend
from zoo.kernels.linear_attention.reference import FEATURE_MAPS, NORMALISATIONS
from zoo.kernels.linear_attention.settings import Settings

NAME = "linear_attention"
MAX_HEAD_DIM = 256
# A state of 256 x 256 numbers takes all registers of a multiprocessor. Programs could share its columns, but then the
# gradients of queries and keys, sums over the columns, would read the state again for every block of tokens.
TRITON_MAX_HEAD_DIM = 128
TRITON_MAX_HEAD_DIM_FLOAT32 = 64  # of the other normalisations: registers spill with more


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
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
    """Normalised, non-causal linear attention over all tokens; the formula is in ``reference.py``.

    The tensors may be strided views of one projection. Any floating-point dtype; sums and states are kept in float32
    or better.

    Args:
        q: queries (B, N, H, D), D at most 256.
        k: keys (B, N, H, D).
        v: values (B, N, H, E), E at most 256.
        feature_map: "elu+1", "relu", "exp", "silu" or "identity", of queries and keys.
        token_weights: weigh the tokens of the state by a softmax of the mean query against the keys (RALA, eq. 5-7).
        grid: rows and columns of the map, rows * columns = N, to rotate queries and keys by their positions in the
            numerator; D must be a multiple of 4. None for no rotation.
        rotary_base: largest wavelength of the rotation over 2 pi, in tokens.
        local: (B, N, H, E), added to the result.
        gate: (B, N, H, E), multiplied with the sum.
        eps: added to the normaliser.
        normalisation: "division" by the sum of the weights; "subtraction" of its excess over one (InLine), which
            takes no grid; or of the "keys", by a softmax of every channel over the tokens (LightNet), which takes no
            token_weights and where the feature map is of the queries alone.
        scale: multiplies the mapped queries; not 0.
        rotary_across_heads: let the frequencies of the rotation fall from head to head (MD-LRPE), from 1 in the first
            to about 1 / rotary_base in the last, instead of within every head.

    Returns:
        (B, N, H, E), contiguous, in the dtype of q.

    Raises:
        ValueError: an argument has another shape, dtype or value.
    """
    height, width = (0, 0) if grid is None else grid
    rotation = (height, width, rotary_base)
    form = (eps, normalisation, scale, rotary_across_heads)
    return torch.ops.zoo.linear_attention(q, k, v, local, gate, feature_map, token_weights, *rotation, *form)[0]


def check(q: Tensor, k: Tensor, v: Tensor, local: Tensor | None, gate: Tensor | None, settings: Settings) -> None:
    """Raise a ValueError for arguments that the operator does not take."""
    check_float(NAME, q=q, k=k, v=v, local=local, gate=gate)
    if q.ndim != 4:
        raise ValueError(f"{NAME}: q has shape {tuple(q.shape)}, expected (B, N, heads, head_dim).")
    check_shape(NAME, "k", k, q.shape, "the shape of q")
    check_shape(NAME, "v", v, (*q.shape[:3], v.shape[-1]), "(B, N, heads, value_dim)")
    check_shape(NAME, "local", local, v.shape, "the shape of v")
    check_shape(NAME, "gate", gate, v.shape, "the shape of v")
    if not 1 <= q.shape[-1] <= MAX_HEAD_DIM or not 1 <= v.shape[-1] <= MAX_HEAD_DIM:
        raise ValueError(
            f"{NAME}: the head dims of q and v are {q.shape[-1]} and {v.shape[-1]}, expected 1 to {MAX_HEAD_DIM}."
        )
    if settings.feature_map not in FEATURE_MAPS:
        raise ValueError(f"{NAME}: feature_map is {settings.feature_map!r}, expected one of {', '.join(FEATURE_MAPS)}.")
    if settings.normalisation not in NORMALISATIONS:
        raise ValueError(
            f"{NAME}: normalisation is {settings.normalisation!r}, expected one of {', '.join(NORMALISATIONS)}."
        )
    if settings.scale == 0:
        raise ValueError(f"{NAME}: scale is 0, expected another number.")
    if settings.normalisation == "keys" and settings.token_weights:
        raise ValueError(f"{NAME}: normalisation 'keys' weighs every channel by itself: leave token_weights out.")
    if settings.height or settings.width:
        if settings.normalisation == "subtraction":
            raise ValueError(f"{NAME}: normalisation 'subtraction' has no rotated form: leave grid out.")
        if settings.height * settings.width != q.shape[1]:
            raise ValueError(f"{NAME}: grid is {settings.height} x {settings.width}, but q has {q.shape[1]} tokens.")
        if q.shape[-1] % 4:
            raise ValueError(f"{NAME}: rotation needs a head dim that is a multiple of 4, got {q.shape[-1]}.")


@planned
def compute(q: Tensor, k: Tensor, v: Tensor, local: Tensor | None, gate: Tensor | None, *rest: Any) -> Callable:
    """The forward pass on the backend for the device of q: the result, and what the backward pass needs."""
    settings = Settings(*rest)
    check(q, k, v, local, gate, settings)
    if v.numel() == 0:
        return lambda *arguments: tuple(x.zero_() for x in _fake(*arguments))
    backend = select_backend(NAME, _backends(q, v, settings, "forward"), q.device)
    return lambda *arguments: backend(*arguments[:5], settings)


@planned
def compute_backward(grad: Tensor, saved: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Callable:
    """The backward pass on the backend for the device of q."""
    if v.numel() == 0:
        return lambda *arguments: tuple(x.zero_() for x in _fake_backward(*arguments))
    settings = Settings(*rest[2:])
    backend = select_backend(NAME, _backends(q, v, settings, "backward"), q.device)
    return lambda *arguments: backend(*arguments[:7], settings)


def _backends(q: Tensor, v: Tensor, settings: Settings, direction: str) -> dict[str, Callable]:
    backends = {"torch": getattr(torch_backend, direction)}
    if has_triton_kernels(q, v, settings):
        backends["triton"] = triton_backend(
            "zoo.kernels.linear_attention.triton", f"plan_{direction}", backends["torch"]
        )
    return backends


def has_triton_kernels(q: Tensor, v: Tensor, settings: Settings) -> bool:
    """Whether there are Triton kernels for such arguments."""
    known = settings.normalisation == "division" or not settings.token_weights
    wide = settings.normalisation == "division" or q.dtype != torch.float32
    fits = max(q.shape[-1], v.shape[-1]) <= (TRITON_MAX_HEAD_DIM if wide else TRITON_MAX_HEAD_DIM_FLOAT32)
    return known and fits and q.dtype != torch.float64


def flops(
    q: Any,
    k: Any,
    v: Any,
    local: Any,
    gate: Any,
    feature_map: str,
    token_weights: bool,
    height: Any,
    width: Any,
    rotary_base: float,
    eps: float,
    normalisation: str = "division",
    *_: Any,
    **__: Any,
) -> int:
    """Two per multiply-accumulate of the state, the read-out, the normaliser (or correction) and the token weights."""
    tokens, dim, value_dim = math.prod(q[:3]), q[3], v[3]
    vectors = 0 if normalisation == "keys" else 2 if token_weights else 1
    return 2 * tokens * (2 * dim * value_dim + vectors * dim)


def _saved_like(q: Tensor, v: Tensor, settings: Settings) -> Tensor:
    shape = (q.shape[0], q.shape[2], settings.saved_size(q.shape[3], v.shape[3]))
    return q.new_empty(shape, dtype=accumulation_dtype(q.dtype))


def _fake(
    q: Tensor, k: Tensor, v: Tensor, local: Tensor | None, gate: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor]:
    settings = Settings(*rest)
    check(q, k, v, local, gate, settings)
    return q.new_empty(v.shape), _saved_like(q, v, settings)


def _fake_backward(
    grad: Tensor, saved: Tensor, q: Tensor, k: Tensor, v: Tensor, local: Tensor | None, gate: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return tuple(q.new_empty(0) if x is None else x.new_empty(x.shape) for x in (q, k, v, local, gate))


def _flops_backward(grad: Any, saved: Any, q: Any, k: Any, v: Any, *rest: Any, **__: Any) -> int:
    """Two products for each of the forward pass's, and its read-out again."""
    return 2 * flops(q, k, v, *rest) + 2 * math.prod(q) * v[3]


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    tensors, ctx.settings = inputs[:5], inputs[5:]
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], *tensors)


def _backward(ctx: Any, grad: Tensor | None, _: None) -> tuple:
    saved, *tensors = ctx.saved_tensors
    if grad is None:  # the result was not used
        return (None,) * (len(tensors) + len(ctx.settings))
    grads = torch.ops.zoo.linear_attention_backward(grad, saved, *tensors, *ctx.settings)
    return *(None if x is None else d for x, d in zip(tensors, grads, strict=True)), *(None for _ in ctx.settings)


_TENSORS = "Tensor q, Tensor k, Tensor v, Tensor? local, Tensor? gate"
_SETTINGS = "str feature_map, bool token_weights, SymInt height, SymInt width, float rotary_base, float eps"
_SETTINGS += ", str normalisation='division', float scale=1.0, bool rotary_across_heads=False"
register_op(f"{NAME}({_TENSORS}, {_SETTINGS}) -> (Tensor, Tensor)", compute, _fake, flops, _backward, _setup_context)
register_op(
    f"{NAME}_backward(Tensor grad, Tensor saved, {_TENSORS}, {_SETTINGS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    compute_backward,
    _fake_backward,
    _flops_backward,
)
