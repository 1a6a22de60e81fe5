"""The definition of gated linear attention (arXiv:2312.06635), in one direction and in both (arXiv:2405.18425).

Shapes: B pictures, N tokens, H heads, D channels of queries and keys, E channels of values.
"""

import torch
from torch import Tensor

from zoo.kernels.library import accumulation_dtype


def gated_linear_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    initial_state: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence, token by token.

    ::

        S_t = diag(exp(log_decay_t)) S_{t-1} + k_t v_t^T        (D, E)
        o_t = scale S_t^T q_t

    Args:
        q: (B, N, H, D).
        k: (B, N, H, D).
        v: (B, N, H, E).
        log_decay: (B, N, H, D), at most 0.
        initial_state: S_0 (B, H, D, E); None for zeros.
        scale: of the result; None for D ** -0.5.

    Returns:
        o (B, N, H, E) in the dtype of q, and S_N (B, H, D, E) in float32 or better.
    """
    dtype = accumulation_dtype(q.dtype)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if initial_state is None:
        initial_state = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3])
    state_bhde = initial_state.to(dtype)
    outputs = []
    for q_bhd, k_bhd, v_bhe, g_bhd in zip(*(x.to(dtype).unbind(1) for x in (q, k, v, log_decay)), strict=True):
        state_bhde = g_bhd.exp()[..., None] * state_bhde + k_bhd[..., None] * v_bhe[..., None, :]
        outputs.append(scale * (q_bhd[..., None] * state_bhde).sum(-2))
    out = torch.stack(outputs, 1) if outputs else q.new_zeros(v.shape)
    return out.to(q.dtype), state_bhde


def bidirectional_gated_linear_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, log_decay_reverse: Tensor, scale: float | None = None
) -> Tensor:
    """The sum of the recurrence over the tokens in order and of that over the tokens in reverse.

    A token's own key and value are in both, with weight 1 each.

    Args:
        q: (B, N, H, D).
        k: (B, N, H, D).
        v: (B, N, H, E).
        log_decay: (B, N, H, D), of the recurrence in order.
        log_decay_reverse: (B, N, H, D), of that in reverse.
        scale: of the result; None for D ** -0.5.

    Returns:
        (B, N, H, E) in the dtype of q.
    """
    q_, k_, v_, g_, r_ = (x.to(accumulation_dtype(q.dtype)) for x in (q, k, v, log_decay, log_decay_reverse))
    ahead, _ = gated_linear_attention_reference(q_, k_, v_, g_, scale=scale)
    back, _ = gated_linear_attention_reference(*(x.flip(1) for x in (q_, k_, v_, r_)), scale=scale)
    return (ahead + back.flip(1)).to(q.dtype)
