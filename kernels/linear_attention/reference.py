"""The definition of 2D linear attention, with the rank augmentation of RALA (arXiv:2411.07635).

Shapes: B pictures, N tokens, H heads, D channels of queries and keys, E channels of values.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.kernels.library import accumulation_dtype
from zoo.kernels.rotary import rotary_angles, rotary_angles_across_heads, rotate

FEATURE_MAPS = {
    "identity": lambda x: x,
    "relu": F.relu,
    "elu+1": lambda x: F.elu(x) + 1,
    "exp": torch.exp,
    "silu": F.silu,
}
NORMALISATIONS = ("division", "subtraction", "keys")


def angles_of_heads(
    height: int,
    width: int,
    heads: int,
    dim: int,
    base: float,
    across_heads: bool,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    """Rotations of all heads alike, (N, D / 2), or of each, (heads, N, D / 2), in radians."""
    if across_heads:
        return rotary_angles_across_heads(height, width, heads, dim, base, device, dtype)
    return rotary_angles(height, width, dim, base, device, dtype)


def linear_attention_reference(
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
    """Normalised linear attention.

    With the feature map f (of queries: times the scale), the rotation R_n of token n and weights w_n that sum to N::

        m   = mean_n f(q_n)
        w   = N softmax_n(m . f(k_n) / sqrt(D))                  or 1 without token_weights
        S   = sum_n R_n(w_n f(k_n)) v_n^T / N                    (D, E)
        o_n = R_n(f(q_n)) S / (f(q_n) . mean_j(w_j f(k_j)) + eps)
        y_n = (o_n + local_n) * gate_n

    The normaliser uses what is not rotated. With "subtraction" instead of "division" the weights of the values sum to
    one because their mean is corrected, which makes attention injective in the query (InLine, arXiv:2412.06590)::

        o_n = f(q_n) S + (1 - f(q_n) . mean_j(w_j f(k_j))) mean_j(v_j)

    With "keys" every channel of the keys is normalised over the tokens by itself, which is the additive recurrence of
    LightNet (arXiv:2405.21022) after its one scan; f is of the queries alone, and there are no weights::

        S   = sum_n R_n(khat_n) v_n^T,  khat_n,d = exp(k_n,d) / sum_j exp(k_j,d)
        o_n = R_n(f(q_n)) S

    Args:
        q: (B, N, H, D).
        k: (B, N, H, D).
        v: (B, N, H, E).
        feature_map: one of ``FEATURE_MAPS``.
        token_weights: weigh the tokens of the state.
        grid: rows and columns of the map, for the rotation; None for no rotation.
        rotary_base: of ``rotary_angles``.
        local: (B, N, H, E).
        gate: (B, N, H, E).
        eps: added to the normaliser.
        normalisation: one of ``NORMALISATIONS``.
        scale: multiplies f(q).
        rotary_across_heads: rotate as in ``rotary_angles_across_heads`` (MD-LRPE), not as in ``rotary_angles``.

    Returns:
        (B, N, H, E) in the dtype of q.
    """
    dtype = accumulation_dtype(q.dtype)
    tokens, heads, dim = q.shape[1:]
    q_bhnd, k_bhnd, v_bhne = (x.to(dtype).transpose(1, 2) for x in (q, k, v))
    q_bhnd = FEATURE_MAPS[feature_map](q_bhnd) * scale
    k_bhnd = k_bhnd.softmax(2) * tokens if normalisation == "keys" else FEATURE_MAPS[feature_map](k_bhnd)
    if token_weights:
        mean_bh1d = q_bhnd.mean(2, keepdim=True)
        scores_bhn1 = (k_bhnd * mean_bh1d).sum(-1, keepdim=True) * dim**-0.5
        k_bhnd = k_bhnd * (scores_bhn1.softmax(2) * tokens)
    sums_bhn1 = (q_bhnd * k_bhnd.mean(2, keepdim=True)).sum(-1, keepdim=True)
    if grid is not None:
        angles = angles_of_heads(*grid, heads, dim, rotary_base, rotary_across_heads, q.device, dtype)
        q_bhnd, k_bhnd = (rotate(x, angles.cos(), angles.sin()) for x in (q_bhnd, k_bhnd))
    state_bhde = k_bhnd.transpose(2, 3) @ v_bhne / tokens
    if normalisation == "division":
        out_bhne = q_bhnd @ state_bhde / (sums_bhn1 + eps)
    elif normalisation == "keys":
        out_bhne = q_bhnd @ state_bhde
    else:
        out_bhne = q_bhnd @ state_bhde + (1 - sums_bhn1) * v_bhne.mean(2, keepdim=True)
    y = out_bhne.transpose(1, 2)
    if local is not None:
        y = y + local.to(dtype)
    if gate is not None:
        y = y * gate.to(dtype)
    return y.to(q.dtype)
