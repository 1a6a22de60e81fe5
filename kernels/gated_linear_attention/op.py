"""Gated linear attention as PyTorch operators, one for each form.

``zoo::gated_linear_attention`` runs over the tokens in order, with an initial and a final state;
``zoo::bidirectional_gated_linear_attention`` in both directions.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zoo.kernels.dispatch import planned, select_backend, triton_backend
from zoo.kernels.gated_linear_attention import torch_backend
from zoo.kernels.library import accumulation_dtype, check_float, check_shape, register_op

CAUSAL, BOTH = "gated_linear_attention", "bidirectional_gated_linear_attention"
MAX_HEAD_DIM, MAX_VALUE_DIM = 256, 512


def gated_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    initial_state: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal linear attention whose state forgets (arXiv:2312.06635); the formula is in ``reference.py``.

    ``S_t = diag(exp(log_decay_t)) S_{t-1} + k_t v_t^T`` and ``o_t = scale S_t^T q_t``. The tensors may be strided views
    of one projection. Any floating-point dtypes; sums and states are kept in float32 or better.

    Args:
        q: queries (B, N, H, D), D at most 256.
        k: keys (B, N, H, D).
        v: values (B, N, H, E), E at most 512.
        log_decay: (B, N, H, D), natural logarithms of factors from 0 to 1, so at most 0; any strength, -inf too.
        initial_state: (B, H, D, E), the final state of what came before; None for zeros.
        scale: of the result; None for D ** -0.5.

    Returns:
        The result (B, N, H, E), contiguous, in the dtype of q, and the final state (B, H, D, E), in float32 or, for
        float64 queries, float64.

    Raises:
        ValueError: an argument has another shape or dtype.
    """
    return torch.ops.zoo.gated_linear_attention(q, k, v, log_decay, initial_state, scale)


def bidirectional_gated_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, log_decay_reverse: Tensor, scale: float | None = None
) -> Tensor:
    """The sum of gated linear attention over the tokens in order and in reverse (ViG, arXiv:2405.18425).

    The directions share queries, keys and values; each has its own decay. A token's own key and value are in both, with
    weight 1 each. The tensors may be strided views, of any floating-point dtypes.

    Args:
        q: queries (B, N, H, D), D at most 256.
        k: keys (B, N, H, D).
        v: values (B, N, H, E), E at most 512.
        log_decay: (B, N, H, D), at most 0, of the recurrence in order.
        log_decay_reverse: (B, N, H, D), at most 0, of that in reverse.
        scale: of the result; None for D ** -0.5.

    Returns:
        (B, N, H, E), contiguous, in the dtype of q.

    Raises:
        ValueError: an argument has another shape or dtype.
    """
    return torch.ops.zoo.bidirectional_gated_linear_attention(q, k, v, log_decay, log_decay_reverse, scale)


def check(name: str, q: Tensor, k: Tensor, v: Tensor, **others: Tensor | None) -> None:
    """Raise a ValueError for tensors that an operator does not take; the others are decays and the initial state."""
    check_float(name, q=q, k=k, v=v, **others)
    if q.ndim != 4:
        raise ValueError(f"{name}: q has shape {tuple(q.shape)}, expected (B, N, heads, head_dim).")
    check_shape(name, "k", k, q.shape, "the shape of q")
    check_shape(name, "v", v, (*q.shape[:3], v.shape[-1]), "(B, N, heads, value_dim)")
    for other, tensor in others.items():
        if other == "initial_state":
            state = (q.shape[0], *q.shape[2:], v.shape[-1])
            check_shape(name, other, tensor, state, "(B, heads, head_dim, value_dim)")
        else:
            check_shape(name, other, tensor, q.shape, "the shape of q")
    if not (1 <= q.shape[-1] <= MAX_HEAD_DIM and 1 <= v.shape[-1] <= MAX_VALUE_DIM):
        raise ValueError(
            f"{name}: the head dims of q and v are {q.shape[-1]} and {v.shape[-1]}, "
            f"expected 1 to {MAX_HEAD_DIM} and 1 to {MAX_VALUE_DIM}."
        )


@planned
def compute(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, initial_state: Tensor | None, scale: float | None
) -> Callable:
    """The forward pass in order, on the backend for the device of q."""
    check(CAUSAL, q, k, v, log_decay=log_decay, initial_state=initial_state)
    return _of_nothing if v.numel() == 0 else _scaled(select_backend(CAUSAL, _backends(q, "forward"), q.device), q)


@planned
def compute_backward(grad: Tensor, grad_state: Tensor, q: Tensor, *_: Any) -> Callable:
    """The backward pass in order, on the backend for the device of q."""
    if grad.numel() == 0:
        return _backward_of_nothing
    return _scaled(select_backend(f"{CAUSAL}_backward", _backends(q, "backward"), q.device), q)


@planned
def compute_both(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, log_decay_reverse: Tensor, scale: float | None
) -> Callable:
    """The forward pass in both directions, on the backend for the device of q."""
    check(BOTH, q, k, v, log_decay=log_decay, log_decay_reverse=log_decay_reverse)
    return _fake_both if v.numel() == 0 else _scaled(select_backend(BOTH, _backends(q, "forward_both"), q.device), q)


@planned
def compute_both_backward(grad: Tensor, q: Tensor, *_: Any) -> Callable:
    """The backward pass in both directions, on the backend for the device of q."""
    if grad.numel() == 0:
        return lambda *arguments: tuple(x.zero_() for x in _fake_both_backward(*arguments))
    return _scaled(select_backend(f"{BOTH}_backward", _backends(q, "backward_both"), q.device), q)


def _scaled(backend: Callable, q: Tensor) -> Callable:
    """A backend that takes None for the scale, its last argument."""
    default = q.shape[-1] ** -0.5
    return lambda *arguments: backend(*arguments[:-1], default if arguments[-1] is None else arguments[-1])


def _of_nothing(*arguments: Any) -> tuple[Tensor, Tensor]:
    (out, state), initial_state = _fake(*arguments), arguments[-2]
    return out, state.zero_() if initial_state is None else state.copy_(initial_state)


def _backward_of_nothing(grad: Tensor, grad_state: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *others, state = _fake_backward(grad, grad_state, *rest)
    return *(x.zero_() for x in others), state.copy_(grad_state)


def _backends(q: Tensor, function: str) -> dict[str, Callable]:
    backends = {"torch": getattr(torch_backend, function)}
    if q.dtype != torch.float64:
        backends["triton"] = triton_backend(
            "zoo.kernels.gated_linear_attention.triton", f"plan_{function}", backends["torch"]
        )
    return backends


def _fake(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, initial_state: Tensor | None, scale: float | None
) -> tuple[Tensor, Tensor]:
    check(CAUSAL, q, k, v, log_decay=log_decay, initial_state=initial_state)
    state = q.new_empty(q.shape[0], *q.shape[2:], v.shape[-1], dtype=accumulation_dtype(q.dtype))
    return q.new_empty(v.shape), state


def _fake_backward(
    grad: Tensor, grad_state: Tensor, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return *(x.new_empty(x.shape) for x in (q, k, v, log_decay)), grad_state.new_empty(grad_state.shape)


def _fake_both(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, log_decay_reverse: Tensor, scale: float | None
) -> Tensor:
    check(BOTH, q, k, v, log_decay=log_decay, log_decay_reverse=log_decay_reverse)
    return q.new_empty(v.shape)


def _fake_both_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, log_decay_reverse: Tensor, scale: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return tuple(x.new_empty(x.shape) for x in (q, k, v, log_decay, log_decay_reverse))


def flops(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    """Of the recurrence: two per multiply-accumulate of the state's update and of the read-out."""
    return 4 * math.prod(q) * v[3]


def flops_backward(grad: Any, grad_state: Any, q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    """The state again, its gradient, and one product each for the gradients of q, k and v."""
    return 10 * math.prod(q) * v[3]


def flops_both(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    """Twice that of one direction."""
    return 2 * flops(q, k, v)


def flops_both_backward(grad: Any, q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    """Twice that of one direction."""
    return 2 * flops_backward(grad, None, q, k, v)


def _setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor, grad_state: Tensor) -> tuple:
    tensors = ctx.saved_tensors
    *grads, d_state = torch.ops.zoo.gated_linear_attention_backward(grad, grad_state, *tensors, ctx.scale)
    state = tensors[-1]
    return *grads, None if state is None else d_state.to(state.dtype), None


def _backward_both(ctx: Any, grad: Tensor) -> tuple:
    return *torch.ops.zoo.bidirectional_gated_linear_attention_backward(grad, *ctx.saved_tensors, ctx.scale), None


_QKV = "Tensor q, Tensor k, Tensor v, Tensor log_decay"
_CAUSAL, _BOTH = f"{_QKV}, Tensor? initial_state, float? scale", f"{_QKV}, Tensor log_decay_reverse, float? scale"
_FIVE = "(Tensor, Tensor, Tensor, Tensor, Tensor)"
register_op(f"{CAUSAL}({_CAUSAL}) -> (Tensor, Tensor)", compute, _fake, flops, _backward, _setup_context)
register_op(f"{BOTH}({_BOTH}) -> Tensor", compute_both, _fake_both, flops_both, _backward_both, _setup_context)
register_op(
    f"{CAUSAL}_backward(Tensor grad, Tensor grad_state, {_CAUSAL}) -> {_FIVE}",
    compute_backward,
    _fake_backward,
    flops_backward,
)
register_op(
    f"{BOTH}_backward(Tensor grad, {_BOTH}) -> {_FIVE}",
    compute_both_backward,
    _fake_both_backward,
    flops_both_backward,
)
