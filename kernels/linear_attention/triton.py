"""2D linear attention in Triton.

The names are those of the formulas in ``reference.py``; p_n are the token weights over N, which sum to 1. A program
works on a chunk of the tokens of one head of one picture, block by block. The forward pass has four kernels:

1. ``_mean``: parts of m, the mean query (only with token weights);
2. ``_state``: parts of S and of its vectors, with an online softmax of the token weights or of the keys' channels;
3. ``_combine``: the parts put together, in a fixed order;
4. ``_read``: o, the local term and the gate.

The backward pass starts from what ``Settings.saved`` names, O(D E) numbers per head, and computes the rest again:
``_read_backward`` (gradients of gate, local term and, without token weights, queries; parts of that of S),
``_combine_backward``, ``_keys_backward`` (keys and values, and parts of the gradient of m) and, with token weights,
``_query_backward``. The sums over tokens in the gradients of the softmaxes, such as sum_n p_n dp_n = <S, dS> + <mean
key, its gradient>, are products of states, so they take no pass over the tokens.

Tensors of N tokens that pass between the chip and memory, without local term and gate: 4 forward, that is q, k and v
read once and o written once, and 5 with token weights, which need the mean query before the first key; backward 7,
gradients and inputs once each, and 9 with token weights, which need all of dm before the first dq.

Short sequences have one kernel forward and one backward, a program for each head, that does all of this: there the time
goes into launches, and a head's tokens stay in the caches.
"""

import functools
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels.launch import Launch, with_unit_channels
from zoo.kernels.linear_attention.reference import angles_of_heads
from zoo.kernels.linear_attention.settings import Settings

KINDS = {"identity": 0, "relu": 1, "elu+1": 2, "exp": 3, "silu": 4}
MAX_SPLITS = 256
SHORT_TOKENS = 256  # up to here one program takes a head in any case
SHORT_TOKENS_OF_MANY = 1024  # up to here if there are MANY_HEADS, so that the chip is full
MANY_HEADS = 64
# Programs of a kernel, a few for each multiprocessor of a large GPU: more where they leave no parts to put together.
PROGRAMS = {
    "mean": 1056,
    "state": 528,
    "read": 1056,
    "read_backward": 528,
    "keys_backward": 528,
    "query_backward": 1056,
}
# Tokens of a block, its warps, and the blocks that are loaded or used at a time, for bfloat16 and heads of at most 64
# channels: few instructions for a token, no spilled register. Other sizes have not been timed kernel by kernel.
BLOCKS = {
    "mean": (64, 4, 3),
    "state": (64, 4, 3),
    "read": (64, 4, 3),
    "read_backward": (32, 4, 3),
    "keys_backward": (64, 8, 3),
    "query_backward": (64, 8, 3),
    "short": (32, 8, 3),
    "short_backward": (32, 8, 3),
}
# Numbers that change with the resolution or the batch: no kernel is compiled again for their values.
SIZES = ["N", "height", "width", "turn_h", "splits", "splits_m"]
# exp2 is one instruction where exp is five.
LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def _feature(x, KIND: tl.constexpr):
    if KIND == 1:
        return tl.maximum(x, 0.0)
    elif KIND == 2:
        return tl.maximum(x, 0.0) + tl.exp2(tl.minimum(x * LOG2E, 0.0))
    elif KIND == 3:
        return tl.exp2(x * LOG2E)
    elif KIND == 4:
        return x * tl.sigmoid(x)
    else:
        return x


@triton.jit
def _slope(x, KIND: tl.constexpr):
    """The derivative of the feature map."""
    if KIND == 1:
        return tl.where(x > 0, 1.0, 0.0)
    elif KIND == 2:
        return tl.exp2(tl.minimum(x * LOG2E, 0.0))
    elif KIND == 3:
        return tl.exp2(x * LOG2E)
    elif KIND == 4:
        s = tl.sigmoid(x)
        return s * (1 + x * (1 - s))
    else:
        return x * 0 + 1.0


@triton.jit
def _head(x, head, heads, step_b, step_h):
    """Where a head of a picture begins."""
    return x + (head // heads).to(tl.int64) * step_b + (head % heads) * step_h


@triton.jit
def _tokens(x, n, step, N, W: tl.constexpr, BW: tl.constexpr):
    """Channels of tokens n of a head, (BN, BW); 0 outside."""
    w = tl.arange(0, BW)
    mask = (n < N)[:, None] & (w < W)[None, :]
    return tl.load(x + n.to(tl.int64)[:, None] * step + w[None, :], mask=mask, other=0.0)


@triton.jit
def _put_tokens(x, y, n, step, N, W: tl.constexpr, BW: tl.constexpr):
    w = tl.arange(0, BW)
    mask = (n < N)[:, None] & (w < W)[None, :]
    tl.store(x + n.to(tl.int64)[:, None] * step + w[None, :], y.to(x.dtype.element_ty), mask=mask)


@triton.jit
def _map(x, KIND: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    """The feature map of tokens; 0 in channels from D on, but of tokens outside what the map makes of 0."""
    x = _feature(x, KIND)
    if D < BD:
        x = tl.where((tl.arange(0, BD) < D)[None, :], x, 0.0)
    return x


@triton.jit
def _table_of(table, head, heads, turn_h, D: tl.constexpr):
    offset = (head % heads) * turn_h
    if D % 8 == 0:
        offset = tl.multiple_of(offset, 4)
    return table + offset


@triton.jit
def _angles(table, n, height, width, D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr):
    """Cosines and sines (BN, BD / 2) of the pairs of tokens n, from a table (height + width, D / 4, 2)."""
    c = tl.arange(0, BD)
    by_row = c < D // 2
    row = n // width
    place = tl.where(by_row[None, :], row[:, None], height + (n - row * width)[:, None])
    place = tl.minimum(place, height + width - 1)
    at = place * (D // 2) + tl.where(by_row, c, c - D // 2)[None, :]
    if D % 8 == 0:
        at = tl.max_contiguous(tl.multiple_of(at, (1, 4)), (1, 4))  # four numbers in one load
    both = tl.load(table + at, mask=(c < D)[None, :], other=0.0)
    return tl.split(tl.reshape(both, (BN, BD // 2, 2)))


@triton.jit
def _turn(x, cos, sin, BN: tl.constexpr, BD: tl.constexpr):
    a, b = tl.split(tl.reshape(x, (BN, BD // 2, 2)))
    return tl.reshape(tl.join(a * cos - b * sin, b * cos + a * sin), (BN, BD))


@triton.jit
def _turn_rows(x, ROWS: tl.constexpr, BE: tl.constexpr):
    """Rows 2i and 2i + 1 become minus row 2i + 1 and row 2i: a quarter of a turn of every pair."""
    a, b = tl.split(tl.permute(tl.reshape(x, (ROWS // 2, 2, BE)), (0, 2, 1)))
    return tl.reshape(tl.permute(tl.join(-b, a), (0, 2, 1)), (ROWS, BE))


@triton.jit
def _swap_pairs(x, ROWS: tl.constexpr):
    a, b = tl.split(tl.reshape(x, (ROWS // 2, 2)))
    return tl.reshape(tl.join(b, a), (ROWS,))


@triton.jit
def _dot(a, b, DOT: tl.constexpr):
    """A matrix product with float32 sums, of bfloat16, of tf32, or of float32 numbers."""
    if DOT == 0:
        return tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16))
    elif DOT == 1:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="tf32")
    else:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")


@triton.jit
def _matrix(x, W: tl.constexpr, V: tl.constexpr, BW: tl.constexpr, BV: tl.constexpr):
    """A matrix (W, V) as (BW, BV); 0 outside."""
    w, v = tl.arange(0, BW), tl.arange(0, BV)
    mask = (w < W)[:, None] & (v < V)[None, :]
    return tl.load(x + w[:, None] * V + v[None, :], mask=mask, other=0.0)


@triton.jit
def _vector(x, W: tl.constexpr, BW: tl.constexpr):
    w = tl.arange(0, BW)
    return tl.load(x + w, mask=w < W, other=0.0)


@triton.jit
def _sum_parts(part, splits, STEP: tl.constexpr, W: tl.constexpr):
    """The sum of W numbers of every split, sixteen splits at a time."""
    s, w = tl.arange(0, 16), tl.arange(0, W)
    total = tl.zeros((W,), tl.float32)
    for first in range(0, splits, 16):
        place = (first + s).to(tl.int64)[:, None] * STEP + w[None, :]
        total += tl.sum(tl.load(part + place, mask=(first + s < splits)[:, None], other=0.0), 0)
    return total


# ---- over the tokens start to stop of a head, forward


@triton.jit
def _sum_queries(
    q, q_n, N, start, stop, scale, KIND: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr
):
    """sum_n f(q_n)."""
    total = tl.zeros((BN, BD), tl.float32)
    for first in range(start, stop, BN):
        n = first + tl.arange(0, BN)
        x = _map(_tokens(q, n, q_n, N, D, BD).to(tl.float32), KIND, D, BD)
        total += tl.where((n < N)[:, None], x, 0.0)
    return tl.sum(total, 0) * scale


@triton.jit
def _scan_division(
    k, v, query, table, k_n, v_n, N, start, stop, height, width,
    KIND: tl.constexpr, WEIGHTS: tl.constexpr, ROTATE: tl.constexpr, DOT: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """S (D, E) and the mean key (D), both times sum_n exp(score_n - top); top; that sum."""
    top, total = -float("inf"), 0.0
    keys = tl.zeros((BN, BD), tl.float32)
    state = tl.zeros((BD, BE), tl.float32)
    for first in range(start, stop, BN):
        n = first + tl.arange(0, BN)
        x = _map(_tokens(k, n, k_n, N, D, BD).to(tl.float32), KIND, D, BD)
        values = _tokens(v, n, v_n, N, E, BE)
        if WEIGHTS:
            scores = tl.where(n < N, tl.sum(x * query[None, :], 1), -float("inf"))
            higher = tl.maximum(top, tl.max(scores, 0))
            shrink = tl.exp(top - higher)
            weights = tl.exp(scores - higher)
            x = x * weights[:, None]
            total = total * shrink + tl.sum(weights, 0)
            keys = keys * shrink
            state = state * shrink
            top = higher
        else:
            x = tl.where((n < N)[:, None], x, 0.0)
        keys += x
        if ROTATE:
            cos, sin = _angles(table, n, height, width, D, BD, BN)
            x = _turn(x, cos, sin, BN, BD)
        state += _dot(tl.trans(x), values, DOT)
    if not WEIGHTS:
        top, total = 0.0, (stop - start).to(tl.float32)
    return state, tl.sum(keys, 0), top, total


@triton.jit
def _scan_subtraction(
    k, v, k_n, v_n, N, start, stop, KIND: tl.constexpr, DOT: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The sum of products of keys and values, both less their means; the means.

    What is added up is less the means of the first block: so no large terms cancel.
    """
    n = start + tl.arange(0, BN)
    guessed = tl.minimum(stop - start, BN).to(tl.float32)
    x = _map(_tokens(k, n, k_n, N, D, BD).to(tl.float32), KIND, D, BD)
    guess_k = tl.sum(tl.where((n < N)[:, None], x, 0.0), 0) / guessed
    guess_v = tl.sum(_tokens(v, n, v_n, N, E, BE).to(tl.float32), 0) / guessed
    keys, values = tl.zeros((BN, BD), tl.float32), tl.zeros((BN, BE), tl.float32)
    state = tl.zeros((BD, BE), tl.float32)
    for first in range(start, stop, BN):
        n = first + tl.arange(0, BN)
        x = _map(_tokens(k, n, k_n, N, D, BD).to(tl.float32), KIND, D, BD) - guess_k[None, :]
        x = tl.where((n < N)[:, None], x, 0.0)
        y = tl.where((n < N)[:, None], _tokens(v, n, v_n, N, E, BE).to(tl.float32) - guess_v[None, :], 0.0)
        keys += x
        values += y
        state += _dot(tl.trans(x), y, DOT)
    keys, values = tl.sum(keys, 0), tl.sum(values, 0)
    count = (stop - start).to(tl.float32)
    state -= keys[:, None] * (values / count)[None, :]
    return state, keys / count + guess_k, values / count + guess_v


@triton.jit
def _scan_keys(
    k, v, table, k_n, v_n, N, start, stop, height, width, ROTATE: tl.constexpr, DOT: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """sum_n exp(k_n - top) v_n^T, times cosines and times sines with a rotation; top; sum_n exp(k_n - top).

    The sums times cosines and times sines stay apart until the two channels of a pair are normalised.
    """
    top = tl.zeros((BD,), tl.float32) - 1e38
    total = tl.zeros((BN, BD), tl.float32)
    state = tl.zeros((BD, BE), tl.float32)
    sine = tl.zeros((BD, BE), tl.float32) if ROTATE else 0.0
    for first in range(start, stop, BN):
        n = first + tl.arange(0, BN)
        x = tl.where((n < N)[:, None], _tokens(k, n, k_n, N, D, BD).to(tl.float32), -float("inf"))
        values = _tokens(v, n, v_n, N, E, BE)
        higher = tl.maximum(top, tl.max(x, 0))
        shrink = tl.exp(top - higher)
        x = tl.exp2(x * LOG2E - (higher * LOG2E)[None, :])
        total = total * shrink[None, :] + x
        top = higher
        if ROTATE:
            cos, sin = _angles(table, n, height, width, D, BD, BN)
            a, b = tl.split(tl.reshape(x, (BN, BD // 2, 2)))
            across = tl.reshape(tl.join(a * sin, b * sin), (BN, BD))
            sine = sine * shrink[:, None] + _dot(tl.trans(across), values, DOT)
            x = tl.reshape(tl.join(a * cos, b * cos), (BN, BD))
        state = state * shrink[:, None] + _dot(tl.trans(x), values, DOT)
    return state, sine, top, tl.sum(total, 0)


@triton.jit
def _read_tokens(
    q, local, gate, out, table, state, key, value, q_n, l_n, g_n, out_n,
    N, start, stop, height, width, eps,
    KIND: tl.constexpr, KEYS: tl.constexpr, SUBTRACT: tl.constexpr, ROTATE: tl.constexpr,
    LOCAL: tl.constexpr, GATE: tl.constexpr, DOT: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """out = (o + local) * gate; state and key come times the scale of the queries."""
    for first in range(start, stop, BN):
        n = first + tl.arange(0, BN)
        x = _map(_tokens(q, n, q_n, N, D, BD).to(tl.float32), KIND, D, BD)
        if not KEYS and not SUBTRACT:
            share = 1 / tl.where(n < N, tl.sum(x * key[None, :], 1) + eps, 1.0)
        if ROTATE:
            cos, sin = _angles(table, n, height, width, D, BD, BN)
            x = _turn(x, cos, sin, BN, BD)
        y = _dot(x, state, DOT)
        if SUBTRACT:
            y += value[None, :]
        elif not KEYS:
            y = y * share[:, None]
        if LOCAL:
            y += _tokens(local, n, l_n, N, E, BE).to(tl.float32)
        if GATE:
            y *= _tokens(gate, n, g_n, N, E, BE).to(tl.float32)
        _put_tokens(out, y, n, out_n, N, E, BE)


# ---- over the tokens start to stop of a head, backward


@triton.jit
def _read_tokens_backward(
    grad, q, local, gate, d_q, d_local, d_gate, table, state, key, value, y_n, q_n, l_n, g_n, heads,
    N, start, stop, height, width, scale, eps,
    KIND: tl.constexpr, KEYS: tl.constexpr, SUBTRACT: tl.constexpr, ROTATE: tl.constexpr,
    LOCAL: tl.constexpr, GATE: tl.constexpr, QUERY: tl.constexpr, DOT: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Gradients of the gate, of the local term and, with QUERY, of the queries.

    Returns that of S and those of the mean key (division) and of the mean value (subtraction). State and key come
    times the scale of the queries.
    """
    d_state = tl.zeros((BD, BE), tl.float32)
    d_key, d_value = tl.zeros((BN, BD), tl.float32), tl.zeros((BN, BE), tl.float32)
    for first in range(start, stop, BN):
        n = first + tl.arange(0, BN)
        raw = _tokens(q, n, q_n, N, D, BD).to(tl.float32)
        dy = _tokens(grad, n, y_n, N, E, BE).to(tl.float32)
        x = _map(raw, KIND, D, BD)
        if not KEYS and not SUBTRACT:
            share = 1 / tl.where(n < N, tl.sum(x * key[None, :], 1) + eps, 1.0)
        turned = x
        if ROTATE:
            cos, sin = _angles(table, n, height, width, D, BD, BN)
            turned = _turn(x, cos, sin, BN, BD)
        if GATE or (not KEYS and not SUBTRACT and not QUERY):
            y = _dot(turned, state, DOT)
            if SUBTRACT:
                y += value[None, :]
            elif not KEYS:
                y = y * share[:, None]
        if GATE:
            full = y
            if LOCAL:
                full += _tokens(local, n, l_n, N, E, BE).to(tl.float32)
            _put_tokens(d_gate, dy * full, n, heads * E, N, E, BE)
            dy *= _tokens(gate, n, g_n, N, E, BE).to(tl.float32)
        if LOCAL:
            _put_tokens(d_local, dy, n, heads * E, N, E, BE)
        if SUBTRACT:
            d_value += dy
        elif not KEYS:
            dy = dy * share[:, None]
        d_state += _dot(tl.trans(turned), dy, DOT)
        if QUERY:
            dx = _dot(dy, tl.trans(state), DOT)
        if not KEYS and not SUBTRACT:
            # The product of dx with the turned queries is that of dy and R(f(q)) S.
            d_normaliser = -tl.sum(dx * turned, 1) * share if QUERY else -tl.sum(dy * y, 1)
            d_key += x * d_normaliser[:, None]
        if QUERY:
            if ROTATE:
                dx = _turn(dx, cos, -sin, BN, BD)
            if not KEYS and not SUBTRACT:
                dx += d_normaliser[:, None] * key[None, :]
            _put_tokens(d_q, dx * _slope(raw, KIND), n, heads * D, N, D, BD)
    return d_state * scale, tl.sum(d_key, 0) * scale, tl.sum(d_value, 0)


@triton.jit
def _key_tokens_backward(
    k, v, d_k, d_v, table, d_state, d_key, d_value, key, value, query, top, total, average, k_n, v_n, heads,
    N, start, stop, height, width, root,
    KIND: tl.constexpr, KEYS: tl.constexpr, SUBTRACT: tl.constexpr, WEIGHTS: tl.constexpr, ROTATE: tl.constexpr,
    DOT: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Gradients of keys and values; returns that of m.

    ``average`` is what a softmax takes off its gradients: sum_n p_n dp_n, or in every channel sum_n khat_n dkhat_n.
    """
    d_query = tl.zeros((BN, BD), tl.float32)
    for first in range(start, stop, BN):
        n = first + tl.arange(0, BN)
        raw = _tokens(k, n, k_n, N, D, BD).to(tl.float32)
        values = _tokens(v, n, v_n, N, E, BE)
        if SUBTRACT:
            values = values.to(tl.float32) - value[None, :]
        dx = _dot(values, tl.trans(d_state), DOT)
        if KEYS:
            x = tl.exp2(raw * LOG2E - (key * LOG2E)[None, :])
            weighted = x
        else:
            x = _map(raw, KIND, D, BD)
            if WEIGHTS:
                p = tl.exp(tl.sum(x * query[None, :], 1) * root - top) / total
            else:
                p = tl.zeros((BN,), tl.float32) + 1.0 / N
            weighted = x * p[:, None]
            if SUBTRACT:
                weighted = (x - key[None, :]) * p[:, None]
        if ROTATE:
            cos, sin = _angles(table, n, height, width, D, BD, BN)
            weighted = _turn(weighted, cos, sin, BN, BD)
            dx = _turn(dx, cos, -sin, BN, BD)
        dv = _dot(weighted, d_state, DOT)
        if SUBTRACT:
            dv += d_value[None, :] / N
        elif not KEYS:
            dx += d_key[None, :]
        if KEYS:
            dx = (dx - average[None, :]) * x
        elif WEIGHTS:
            d_score = tl.where(n < N, p * (tl.sum(dx * x, 1) - average), 0.0) * root
            dx = dx * p[:, None] + d_score[:, None] * query[None, :]
            d_query += x * d_score[:, None]
        else:
            dx = dx * p[:, None]
        if not KEYS:
            dx *= _slope(raw, KIND)
        _put_tokens(d_k, dx, n, heads * D, N, D, BD)
        _put_tokens(d_v, dv, n, heads * E, N, E, BE)
    return tl.sum(d_query, 0)


@triton.jit
def _query_tokens_backward(
    grad, q, gate, d_q, table, state, key, d_query, y_n, q_n, g_n, heads, N, start, stop, height, width, eps,
    KIND: tl.constexpr, ROTATE: tl.constexpr, GATE: tl.constexpr, DOT: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The gradient of the queries, with that of their mean; division only. State, key and d_query have the scale."""
    for first in range(start, stop, BN):
        n = first + tl.arange(0, BN)
        raw = _tokens(q, n, q_n, N, D, BD).to(tl.float32)
        dy = _tokens(grad, n, y_n, N, E, BE).to(tl.float32)
        if GATE:
            dy *= _tokens(gate, n, g_n, N, E, BE).to(tl.float32)
        x = _map(raw, KIND, D, BD)
        share = 1 / tl.where(n < N, tl.sum(x * key[None, :], 1) + eps, 1.0)
        dy = dy * share[:, None]
        if ROTATE:
            cos, sin = _angles(table, n, height, width, D, BD, BN)
            x = _turn(x, cos, sin, BN, BD)
        # The product of dx with the turned queries is that of dy and R(f(q)) S.
        dx = _dot(dy, tl.trans(state), DOT)
        d_normaliser = -tl.sum(dx * x, 1) * share
        if ROTATE:
            dx = _turn(dx, cos, -sin, BN, BD)
        dx += d_normaliser[:, None] * key[None, :] + d_query[None, :]
        _put_tokens(d_q, dx * _slope(raw, KIND), n, heads * D, N, D, BD)


@triton.jit
def _products(d_state, d_key, state, key, cosine, KEYS: tl.constexpr, ROTATE: tl.constexpr, ROWS: tl.constexpr):
    """Of some rows of S: their part of sum_n p_n dp_n, or in every channel sum_n khat_n dkhat_n."""
    if not KEYS:
        return tl.sum(tl.sum(d_state * state, 1) + d_key * key, 0)
    elif ROTATE:
        return tl.sum(d_state * cosine, 1) + _swap_pairs(tl.sum(d_state * (state - cosine), 1), ROWS)
    else:
        return tl.sum(d_state * state, 1)


# ---- the kernels of long sequences


@triton.jit(do_not_specialize=SIZES)
def _mean(
    q, part, q_b, q_n, q_h, N, heads, chunk, scale,
    KIND: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """part[head, split] = sum of f(q) over a chunk."""
    head, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start, stop = split * chunk, tl.minimum(N, (split + 1) * chunk)
    total = _sum_queries(_head(q, head, heads, q_b, q_h), q_n, N, start, stop, scale, KIND, D, BD, BN)
    tl.store(part + (head * tl.num_programs(1) + split) * BD + tl.arange(0, BD), total)


@triton.jit(do_not_specialize=SIZES)
def _state(
    k, v, mean_part, table, part, k_b, k_n, k_h, v_b, v_n, v_h, N, heads, chunk, splits_m, height, width, turn_h, root,
    KIND: tl.constexpr, KEYS: tl.constexpr, SUBTRACT: tl.constexpr, WEIGHTS: tl.constexpr, ROTATE: tl.constexpr,
    DOT: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, BN: tl.constexpr,
    PART: tl.constexpr,
):  # fmt: skip
    """Parts of the state and its vectors over a chunk: state, vector of keys, other vector, state times sines."""
    head, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start, stop = split * chunk, tl.minimum(N, (split + 1) * chunk)
    d, e = tl.arange(0, BD), tl.arange(0, BE)
    k, v = _head(k, head, heads, k_b, k_h), _head(v, head, heads, v_b, v_h)
    table = _table_of(table, head, heads, turn_h, D)
    part += (head * tl.num_programs(1) + split) * PART
    vector, other = part + BD * BE, part + BD * BE + BD
    where = part + d[:, None] * BE + e[None, :]
    if KEYS:
        state, sine, top, total = _scan_keys(
            k, v, table, k_n, v_n, N, start, stop, height, width, ROTATE, DOT, D, E, BD, BE, BN
        )
        tl.store(vector + d, top)
        tl.store(other + d, total)
        if ROTATE:
            tl.store(where + BD * BE + 2 * BD, sine)
    elif SUBTRACT:
        state, keys, values = _scan_subtraction(k, v, k_n, v_n, N, start, stop, KIND, DOT, D, E, BD, BE, BN)
        tl.store(vector + d, keys)
        tl.store(other + e, values)
    else:
        query = tl.zeros((BD,), tl.float32)
        if WEIGHTS:
            query = _sum_parts(mean_part + head * splits_m * BD, splits_m, BD, BD) * (root / N)
        state, keys, top, total = _scan_division(
            k, v, query, table, k_n, v_n, N, start, stop, height, width, KIND, WEIGHTS, ROTATE, DOT, D, E, BD, BE, BN
        )
        tl.store(vector + d, keys)
        tl.store(other, top)
        tl.store(other + 1, total)
    tl.store(where, state)


@triton.jit(do_not_specialize=SIZES)
def _combine(
    part, mean_part, saved, splits, splits_m, chunk, N,
    KEYS: tl.constexpr, SUBTRACT: tl.constexpr, WEIGHTS: tl.constexpr, ROTATE: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
    PART: tl.constexpr, SAVED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """What is saved, from its parts, sixteen at a time; a program puts some rows of S together."""
    head, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    s, d, e = tl.arange(0, 16), tile * ROWS + tl.arange(0, ROWS), tl.arange(0, BE)
    part += head * splits * PART
    vector, other = part + BD * BE, part + BD * BE + BD
    rows = tl.zeros((ROWS, BE), tl.float32)
    turned = tl.zeros((ROWS, BE), tl.float32)
    keys, values = tl.zeros((ROWS,), tl.float32), tl.zeros((BE,), tl.float32)
    top = tl.zeros((ROWS,), tl.float32) - 1e38
    # What has to be known of all parts before the first is added: the highest top, or the means.
    for first in range(0, splits, 16):
        here = (first + s < splits)[:, None]
        place = (first + s).to(tl.int64)[:, None] * PART
        if SUBTRACT:
            count = tl.minimum(N - (first + s) * chunk, chunk).to(tl.float32)[:, None] / N
            keys += tl.sum(tl.load(vector + place + d[None, :], mask=here, other=0.0) * count, 0)
            values += tl.sum(tl.load(other + place + e[None, :], mask=here, other=0.0) * count, 0)
        elif KEYS:
            top = tl.maximum(top, tl.max(tl.load(vector + place + d[None, :], mask=here, other=-1e38), 0))
        else:
            at = other + place + tl.zeros((ROWS,), tl.int32)[None, :]
            top = tl.maximum(top, tl.max(tl.load(at, mask=here, other=-1e38), 0))
    total = tl.zeros((ROWS,), tl.float32)
    for first in range(0, splits, 16):
        here = (first + s < splits)[:, None]
        place = (first + s).to(tl.int64)[:, None] * PART
        where = place[:, :, None] + d[None, :, None] * BE + e[None, None, :]
        block = tl.load(part + where, mask=here[:, :, None], other=0.0)
        if SUBTRACT:
            count = tl.where(here, tl.minimum(N - (first + s) * chunk, chunk).to(tl.float32)[:, None], 0.0)
            off_k = tl.load(vector + place + d[None, :], mask=here, other=0.0) - keys[None, :]
            off_v = tl.load(other + place + e[None, :], mask=here, other=0.0) - values[None, :]
            rows += tl.sum(block + (off_k * count)[:, :, None] * off_v[:, None, :], 0)
        else:
            if KEYS:
                tops = tl.load(vector + place + d[None, :], mask=here, other=-1e38)
                totals = tl.load(other + place + d[None, :], mask=here, other=0.0)
            else:
                at = other + place + tl.zeros((ROWS,), tl.int32)[None, :]
                tops = tl.load(at, mask=here, other=-1e38)
                totals = tl.load(at + 1, mask=here, other=0.0)
            share = tl.where(here, tl.exp(tops - top[None, :]), 0.0)
            total += tl.sum(share * totals, 0)
            rows += tl.sum(share[:, :, None] * block, 0)
            if KEYS and ROTATE:
                sines = tl.load(part + where + BD * BE + 2 * BD, mask=here[:, :, None], other=0.0)
                turned += tl.sum(share[:, :, None] * sines, 0)
            if not KEYS:
                keys += tl.sum(share * tl.load(vector + place + d[None, :], mask=here, other=0.0), 0)
    saved += head * SAVED
    extra = saved + D * E + D
    target, inside = d[:, None] * E + e[None, :], (d < D)[:, None] & (e < E)[None, :]
    if SUBTRACT:
        rows = rows / N
        tl.store(extra + e, values, mask=(e < E) & (tile == 0))
    else:
        rows = rows / total[:, None]
        keys = top + tl.log(total) if KEYS else keys / total
        if KEYS and ROTATE:
            tl.store(extra + target, rows, mask=inside)
            rows += _turn_rows(turned / total[:, None], ROWS, BE)
        if WEIGHTS:
            query = _sum_parts(mean_part + head * splits_m * BD + tile * ROWS, splits_m, BD, ROWS) / N
            tl.store(extra + d, query, mask=d < D)
            one = tl.arange(0, ROWS)
            tl.store(extra + D + one, tl.where(one == 0, top, total), mask=(one < 2) & (tile == 0))
    tl.store(saved + target, rows, mask=inside)
    tl.store(saved + D * E + d, keys, mask=d < D)


@triton.jit(do_not_specialize=SIZES)
def _read(
    q, local, gate, out, table, saved, q_b, q_n, q_h, l_b, l_n, l_h, g_b, g_n, g_h,
    N, heads, chunk, height, width, turn_h, scale, eps,
    KIND: tl.constexpr, KEYS: tl.constexpr, SUBTRACT: tl.constexpr, ROTATE: tl.constexpr,
    LOCAL: tl.constexpr, GATE: tl.constexpr, DOT: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, BN: tl.constexpr, SAVED: tl.constexpr,
):  # fmt: skip
    """The read-out of a chunk."""
    head, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start, stop = split * chunk, tl.minimum(N, (split + 1) * chunk)
    saved += head * SAVED
    value = _vector(saved + D * E + D, E, BE) if SUBTRACT else 0.0
    _read_tokens(
        _head(q, head, heads, q_b, q_h), _head(local, head, heads, l_b, l_h), _head(gate, head, heads, g_b, g_h),
        _head(out, head, heads, N * heads * E, E), _table_of(table, head, heads, turn_h, D),
        _matrix(saved, D, E, BD, BE) * scale, _vector(saved + D * E, D, BD) * scale, value, q_n, l_n, g_n, heads * E,
        N, start, stop, height, width, eps, KIND, KEYS, SUBTRACT, ROTATE, LOCAL, GATE, DOT, D, E, BD, BE, BN,
    )  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def _read_backward(
    grad, q, local, gate, d_q, d_local, d_gate, table, saved, part,
    y_b, y_n, y_h, q_b, q_n, q_h, l_b, l_n, l_h, g_b, g_n, g_h, N, heads, chunk, height, width, turn_h, scale, eps,
    KIND: tl.constexpr, KEYS: tl.constexpr, SUBTRACT: tl.constexpr, ROTATE: tl.constexpr,
    LOCAL: tl.constexpr, GATE: tl.constexpr, QUERY: tl.constexpr, DOT: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, BN: tl.constexpr,
    SAVED: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Gradients of gate, local term and queries over a chunk; parts of those of S and its vector."""
    head, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start, stop = split * chunk, tl.minimum(N, (split + 1) * chunk)
    d, e = tl.arange(0, BD), tl.arange(0, BE)
    saved += head * SAVED
    value = _vector(saved + D * E + D, E, BE) if SUBTRACT else 0.0
    d_state, d_key, d_value = _read_tokens_backward(
        _head(grad, head, heads, y_b, y_h), _head(q, head, heads, q_b, q_h), _head(local, head, heads, l_b, l_h),
        _head(gate, head, heads, g_b, g_h), _head(d_q, head, heads, N * heads * D, D),
        _head(d_local, head, heads, N * heads * E, E), _head(d_gate, head, heads, N * heads * E, E),
        _table_of(table, head, heads, turn_h, D), _matrix(saved, D, E, BD, BE) * scale,
        _vector(saved + D * E, D, BD) * scale, value,
        y_n, q_n, l_n, g_n, heads, N, start, stop, height, width, scale, eps,
        KIND, KEYS, SUBTRACT, ROTATE, LOCAL, GATE, QUERY, DOT, D, E, BD, BE, BN,
    )  # fmt: skip
    part += (head * tl.num_programs(1) + split) * PART
    tl.store(part + d[:, None] * BE + e[None, :], d_state)
    if SUBTRACT:
        tl.store(part + BD * BE + e, d_value)
    else:
        tl.store(part + BD * BE + d, d_key)


@triton.jit(do_not_specialize=SIZES)
def _combine_backward(
    part, saved, combined, splits, KEYS: tl.constexpr, SUBTRACT: tl.constexpr, ROTATE: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
    SAVED: tl.constexpr, PART: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The gradients of S and its vector, and what the softmax takes off: of a channel, or the part of some rows."""
    head, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    s, d, e = tl.arange(0, 16), tile * ROWS + tl.arange(0, ROWS), tl.arange(0, BE)
    part += head * splits * PART
    rows = tl.zeros((ROWS, BE), tl.float32)
    for first in range(0, splits, 16):
        here = (first + s < splits)[:, None, None]
        where = (first + s).to(tl.int64)[:, None, None] * PART + d[None, :, None] * BE + e[None, None, :]
        rows += tl.sum(tl.load(part + where, mask=here, other=0.0), 0)
    combined += head * PART
    tl.store(combined + d[:, None] * BE + e[None, :], rows)
    vector = BD * BE
    if SUBTRACT:
        if tile == 0:
            tl.store(combined + vector + e, _sum_parts(part + vector, splits, PART, BE))
    else:
        saved += head * SAVED
        keys = _sum_parts(part + vector + tile * ROWS, splits, PART, ROWS)
        target, inside = d[:, None] * E + e[None, :], (d < D)[:, None] & (e < E)[None, :]
        state = tl.load(saved + target, mask=inside, other=0.0)
        key = tl.load(saved + D * E + d, mask=d < D, other=0.0)
        cosine = tl.load(saved + D * E + D + target, mask=inside, other=0.0) if KEYS and ROTATE else state
        products = _products(rows, keys, state, key, cosine, KEYS, ROTATE, ROWS)
        if KEYS:
            tl.store(combined + vector + d, products)
        else:
            tl.store(combined + vector + d, keys)
            tl.store(combined + vector + BD + tile, products)


@triton.jit(do_not_specialize=SIZES)
def _keys_backward(
    k, v, d_k, d_v, table, saved, combined, mean_part,
    k_b, k_n, k_h, v_b, v_n, v_h, N, heads, chunk, height, width, turn_h, root,
    KIND: tl.constexpr, KEYS: tl.constexpr, SUBTRACT: tl.constexpr, WEIGHTS: tl.constexpr, ROTATE: tl.constexpr,
    DOT: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, BN: tl.constexpr,
    SAVED: tl.constexpr, PART: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Gradients of keys and values over a chunk; parts of that of m."""
    head, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start, stop = split * chunk, tl.minimum(N, (split + 1) * chunk)
    saved += head * SAVED
    combined += head * PART
    vector, extra = combined + BD * BE, saved + D * E + D
    d_state = _matrix(combined, BD, BE, BD, BE)
    key = _vector(saved + D * E, D, BD)
    d_key = _vector(vector, BD, BD)
    value = _vector(extra, E, BE) if SUBTRACT else 0.0
    d_value = _vector(vector, BE, BE) if SUBTRACT else 0.0
    query = _vector(extra, D, BD) if WEIGHTS else 0.0
    top = tl.load(extra + D) if WEIGHTS else 0.0
    total = tl.load(extra + D + 1) if WEIGHTS else 0.0
    average = d_key
    if WEIGHTS:
        average = tl.sum(tl.load(vector + BD + tl.arange(0, TILES)), 0)
    d_query = _key_tokens_backward(
        _head(k, head, heads, k_b, k_h), _head(v, head, heads, v_b, v_h), _head(d_k, head, heads, N * heads * D, D),
        _head(d_v, head, heads, N * heads * E, E), _table_of(table, head, heads, turn_h, D),
        d_state, d_key, d_value, key, value, query, top, total, average, k_n, v_n, heads,
        N, start, stop, height, width, root,
        KIND, KEYS, SUBTRACT, WEIGHTS, ROTATE, DOT, D, E, BD, BE, BN,
    )  # fmt: skip
    if WEIGHTS:
        tl.store(mean_part + (head * tl.num_programs(1) + split) * BD + tl.arange(0, BD), d_query)


@triton.jit(do_not_specialize=SIZES)
def _query_backward(
    grad, q, gate, d_q, table, saved, mean_part, y_b, y_n, y_h, q_b, q_n, q_h, g_b, g_n, g_h,
    N, heads, chunk, splits, height, width, turn_h, scale, eps,
    KIND: tl.constexpr, WEIGHTS: tl.constexpr, ROTATE: tl.constexpr, GATE: tl.constexpr, DOT: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, BN: tl.constexpr, SAVED: tl.constexpr,
):  # fmt: skip
    """The gradient of the queries over a chunk."""
    head, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start, stop = split * chunk, tl.minimum(N, (split + 1) * chunk)
    saved += head * SAVED
    d_query = tl.zeros((BD,), tl.float32)
    if WEIGHTS:
        d_query = _sum_parts(mean_part + head * splits * BD, splits, BD, BD) / N
    _query_tokens_backward(
        _head(grad, head, heads, y_b, y_h), _head(q, head, heads, q_b, q_h), _head(gate, head, heads, g_b, g_h),
        _head(d_q, head, heads, N * heads * D, D), _table_of(table, head, heads, turn_h, D),
        _matrix(saved, D, E, BD, BE) * scale, _vector(saved + D * E, D, BD) * scale, d_query * scale, y_n, q_n, g_n,
        heads, N, start, stop, height, width, eps, KIND, ROTATE, GATE, DOT, D, E, BD, BE, BN,
    )  # fmt: skip


# ---- the kernels of short sequences


@triton.jit(do_not_specialize=SIZES)
def _short(
    q, k, v, local, gate, out, table, saved,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, l_b, l_n, l_h, g_b, g_n, g_h,
    N, heads, height, width, turn_h, root, scale, eps,
    KIND: tl.constexpr, KEYS: tl.constexpr, SUBTRACT: tl.constexpr, WEIGHTS: tl.constexpr, ROTATE: tl.constexpr,
    LOCAL: tl.constexpr, GATE: tl.constexpr, DOT: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, BN: tl.constexpr, SAVED: tl.constexpr,
):  # fmt: skip
    """The forward pass of a head."""
    head = tl.program_id(0).to(tl.int64)
    d, e = tl.arange(0, BD), tl.arange(0, BE)
    q, k, v = _head(q, head, heads, q_b, q_h), _head(k, head, heads, k_b, k_h), _head(v, head, heads, v_b, v_h)
    table = _table_of(table, head, heads, turn_h, D)
    saved += head * SAVED
    extra = saved + D * E + D
    target, inside = d[:, None] * E + e[None, :], (d < D)[:, None] & (e < E)[None, :]
    value = 0.0
    if KEYS:
        state, sine, top, total = _scan_keys(
            k, v, table, k_n, v_n, N, 0, N, height, width, ROTATE, DOT, D, E, BD, BE, BN
        )
        key = top + tl.log(total)
        state = state / total[:, None]
        if ROTATE:
            tl.store(extra + target, state, mask=inside)
            state += _turn_rows(sine / total[:, None], BD, BE)
    elif SUBTRACT:
        state, key, value = _scan_subtraction(k, v, k_n, v_n, N, 0, N, KIND, DOT, D, E, BD, BE, BN)
        state = state / N
        tl.store(extra + e, value, mask=e < E)
    else:
        query = tl.zeros((BD,), tl.float32)
        if WEIGHTS:
            query = _sum_queries(q, q_n, N, 0, N, scale, KIND, D, BD, BN) / N
            tl.store(extra + d, query, mask=d < D)
        state, key, top, total = _scan_division(
            k, v, query * root, table, k_n, v_n, N, 0, N, height, width, KIND, WEIGHTS, ROTATE, DOT, D, E, BD, BE, BN
        )
        state, key = state / total, key / total
        if WEIGHTS:
            tl.store(extra + D, top)
            tl.store(extra + D + 1, total)
    tl.store(saved + target, state, mask=inside)
    tl.store(saved + D * E + d, key, mask=d < D)
    _read_tokens(
        q, _head(local, head, heads, l_b, l_h), _head(gate, head, heads, g_b, g_h),
        _head(out, head, heads, N * heads * E, E), table, state * scale, key * scale, value, q_n, l_n, g_n, heads * E,
        N, 0, N, height, width, eps, KIND, KEYS, SUBTRACT, ROTATE, LOCAL, GATE, DOT, D, E, BD, BE, BN,
    )  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def _short_backward(
    grad, q, k, v, local, gate, d_q, d_k, d_v, d_local, d_gate, table, saved,
    y_b, y_n, y_h, q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, l_b, l_n, l_h, g_b, g_n, g_h,
    N, heads, height, width, turn_h, root, scale, eps,
    KIND: tl.constexpr, KEYS: tl.constexpr, SUBTRACT: tl.constexpr, WEIGHTS: tl.constexpr, ROTATE: tl.constexpr,
    LOCAL: tl.constexpr, GATE: tl.constexpr, DOT: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, BN: tl.constexpr, SAVED: tl.constexpr,
):  # fmt: skip
    """The backward pass of a head."""
    head = tl.program_id(0).to(tl.int64)
    grad, q, gate = (
        _head(grad, head, heads, y_b, y_h),
        _head(q, head, heads, q_b, q_h),
        _head(gate, head, heads, g_b, g_h),
    )
    d_q = _head(d_q, head, heads, N * heads * D, D)
    table = _table_of(table, head, heads, turn_h, D)
    saved += head * SAVED
    extra = saved + D * E + D
    state, key = _matrix(saved, D, E, BD, BE), _vector(saved + D * E, D, BD)
    value = _vector(extra, E, BE) if SUBTRACT else 0.0
    d_state, d_key, d_value = _read_tokens_backward(
        grad, q, _head(local, head, heads, l_b, l_h), gate, d_q, _head(d_local, head, heads, N * heads * E, E),
        _head(d_gate, head, heads, N * heads * E, E), table, state * scale, key * scale, value,
        y_n, q_n, l_n, g_n, heads, N, 0, N, height, width, scale, eps,
        KIND, KEYS, SUBTRACT, ROTATE, LOCAL, GATE, not WEIGHTS, DOT, D, E, BD, BE, BN,
    )  # fmt: skip
    query = _vector(extra, D, BD) if WEIGHTS else 0.0
    top = tl.load(extra + D) if WEIGHTS else 0.0
    total = tl.load(extra + D + 1) if WEIGHTS else 0.0
    cosine = _matrix(extra, D, E, BD, BE) if KEYS and ROTATE else state
    average = _products(d_state, d_key, state, key, cosine, KEYS, ROTATE, BD)
    d_query = _key_tokens_backward(
        _head(k, head, heads, k_b, k_h), _head(v, head, heads, v_b, v_h), _head(d_k, head, heads, N * heads * D, D),
        _head(d_v, head, heads, N * heads * E, E), table,
        d_state, d_key, d_value, key, value, query, top, total, average, k_n, v_n, heads,
        N, 0, N, height, width, root, KIND, KEYS, SUBTRACT, WEIGHTS, ROTATE, DOT, D, E, BD, BE, BN,
    )  # fmt: skip
    if WEIGHTS:
        _query_tokens_backward(
            grad, q, gate, d_q, table, state * scale, key * scale, d_query * (scale / N), y_n, q_n, g_n, heads,
            N, 0, N, height, width, eps, KIND, ROTATE, GATE, DOT, D, E, BD, BE, BN,
        )  # fmt: skip


# ---- launchers


@functools.lru_cache(maxsize=64)
def _table(settings: Settings, heads: int, dim: int, device: torch.device) -> Tensor:
    """Cosines and sines of rows, then of columns: (heads or 1, height + width, dim / 4, 2); a few kilobytes."""
    quarter = dim // 4

    def angles(height: int, width: int) -> Tensor:
        base, across_heads = settings.rotary_base, settings.rotary_across_heads
        of_all = angles_of_heads(height, width, heads, dim, base, across_heads, device, torch.float32)
        return of_all.view(-1, height * width, dim // 2)

    rows, columns = angles(settings.height, 1)[..., :quarter], angles(1, settings.width)[..., quarter:]
    both = torch.cat([rows, columns], dim=1)
    return torch.stack([both.cos(), both.sin()], dim=-1).contiguous()


def _block(kernel: str, BD: int, BE: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """As in BLOCKS: as many tokens as no register spills for.

    Products of float16 numbers are taken of float32 ones, and those of float32 numbers not on tensor cores.
    """
    if dtype == torch.bfloat16 and max(BD, BE) <= 64:
        return BLOCKS[kernel]
    numbers = {torch.bfloat16: 4096, torch.float16: 2048}.get(dtype, 1024) // (2 if kernel.startswith("short") else 1)
    return min(64, max(16, numbers // max(BD, BE))), 8, 3


def _chunk(N: int, heads: int, BN: int, programs: int) -> int:
    """Tokens of a program, whole blocks of them."""
    blocks = triton.cdiv(N, BN)
    return triton.cdiv(blocks, min(blocks, max(1, programs // heads), MAX_SPLITS)) * BN


# The kernels by name, and how many of their tensors, the first ones, are strided.
KERNELS = {
    "mean": (_mean, 1),
    "state": (_state, 2),
    "combine": (_combine, 0),
    "read": (_read, 3),
    "read_backward": (_read_backward, 4),
    "combine_backward": (_combine_backward, 0),
    "keys_backward": (_keys_backward, 2),
    "query_backward": (_query_backward, 3),
    "short": (_short, 5),
    "short_backward": (_short_backward, 6),
}


class _Plan:
    """Block sizes, splits and constants of calls with the same shapes; only the grid depends on the tokens."""

    def __init__(
        self,
        shape: torch.Size,
        E: int,
        dtype: torch.dtype,
        device: torch.device,
        settings: Settings,
        local: bool,
        gate: bool,
    ) -> None:
        batch, N, heads, D = shape
        self.device = device
        BD, BE = (max(16, triton.next_power_of_2(x)) for x in (D, E))
        count = batch * heads
        longest = SHORT_TOKENS_OF_MANY if count >= MANY_HEADS else SHORT_TOKENS
        self.short = longest >= N and max(BD, BE) <= 64  # registers spill with more
        block = {kernel: _block(kernel, BD, BE, dtype) for kernel in BLOCKS}
        chunk = {kernel: _chunk(N, count, block[kernel][0], PROGRAMS[kernel]) for kernel in PROGRAMS}
        splits = {kernel: triton.cdiv(N, tokens) for kernel, tokens in chunk.items()}
        self.splits, self.tokens = splits, {kernel: (N, heads, chunk[kernel]) for kernel in PROGRAMS}
        self.tokens |= dict.fromkeys(("short", "short_backward"), (N, heads))
        rows = 2 if BE > 64 else 4
        self.grids = {kernel: (count, splits[kernel]) for kernel in PROGRAMS}
        self.grids |= dict.fromkeys(("short", "short_backward"), (count,))
        self.grids |= dict.fromkeys(("combine", "combine_backward"), (count, BD // rows))
        keys, rotate = settings.normalisation == "keys", settings.height > 0
        self.table = _table(settings, heads, D, device) if rotate else None
        turn = self.table.stride(0) if settings.rotary_across_heads and rotate else 0
        self.map = (settings.height, settings.width, turn)
        self.root = D**-0.5
        part_size = BD * BE + max(2 * BD, BD + BE) + (BD * BE if keys and rotate else 0)
        self.saved = (batch, heads, settings.saved_size(D, E))
        self.parts = {kernel: (count, splits[kernel], part_size) for kernel in ("state", "read_backward")}
        self.mean_parts = {kernel: (count, splits[kernel], BD) for kernel in ("mean", "keys_backward")}
        self.combined = (count, part_size)

        # Triton's interpreter, on the CPU, has no bfloat16 products.
        dot = {torch.bfloat16: 0, torch.float16: 1}.get(dtype, 2) if device.type == "cuda" else 2
        kind, sizes = KINDS[settings.feature_map], {"D": D, "E": E, "BD": BD, "BE": BE}
        form = {"KEYS": keys, "SUBTRACT": settings.normalisation == "subtraction", "ROTATE": rotate}
        tokens = {
            kernel: {"KIND": kind, "DOT": dot, "BN": BN, "num_warps": warps, "num_stages": stages, **sizes}
            for kernel, (BN, warps, stages) in block.items()
        }
        weights, terms = {"WEIGHTS": settings.token_weights}, {"LOCAL": local, "GATE": gate}
        saved, part = {"SAVED": self.saved[2]}, {"PART": part_size}
        rows_of_states = {"ROWS": rows, "num_warps": 4}
        self.constants = {
            "mean": {key: tokens["mean"][key] for key in ("KIND", "D", "BD", "BN", "num_warps", "num_stages")},
            "state": {**tokens["state"], **form, **weights, **part},
            "combine": {**sizes, **form, **weights, **saved, **part, **rows_of_states},
            "read": {**tokens["read"], **form, **terms, **saved},
            "read_backward": {
                **tokens["read_backward"], **form, **terms, **saved, **part, "QUERY": not settings.token_weights,
            },
            "combine_backward": {**sizes, **form, **saved, **part, **rows_of_states},
            "keys_backward": {**tokens["keys_backward"], **form, **weights, **saved, **part, "TILES": BD // rows},
            "query_backward": {
                **tokens["query_backward"], **weights, **saved, "ROTATE": rotate, "GATE": gate and not local,
            },
            **{
                kernel: {**tokens[kernel], **form, **terms, **saved, **weights}
                for kernel in ("short", "short_backward")
            },
        }  # fmt: skip

    def launch(self, name: str, *numbers: float) -> Launch:
        """A kernel with its grid, its tokens and its constants, and with the numbers that follow the tokens."""
        kernel, strided = KERNELS[name]
        numbers = (*self.tokens.get(name, ()), *numbers)
        return Launch(kernel, self.grids[name], numbers, self.constants[name], self.device, strided)


_plan = functools.lru_cache(maxsize=256)(_Plan)


def plan_of(q: Tensor, v: Tensor, local: Tensor | None, gate: Tensor | None, settings: Settings) -> _Plan:
    """The plan of a call with such arguments."""
    return _plan(q.shape, v.shape[-1], q.dtype, q.device, settings, local is not None, gate is not None)


def empty_float32(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Memory for sums."""
    return torch.empty(shape, device=device, dtype=torch.float32)


def terms_of(q: Tensor, local: Tensor | None, gate: Tensor | None) -> tuple[Tensor, Tensor]:
    """Local term and gate; any tensor for what is None, which no kernel reads."""
    return q if local is None else local, q if gate is None else gate


@with_unit_channels
def plan_forward(
    q: Tensor, k: Tensor, v: Tensor, local: Tensor | None, gate: Tensor | None, settings: Settings
) -> Callable[..., tuple[Tensor, Tensor]]:
    """A function of arguments like these: the result of ``linear_attention``, and what the backward pass needs."""
    plan = plan_of(q, v, local, gate, settings)
    splits, where, factors = plan.splits, plan.map, (settings.scale, settings.eps)
    N, _, chunk = plan.tokens["state"]
    short = plan.launch("short", *where, plan.root, *factors)
    mean = plan.launch("mean", settings.scale)
    state = plan.launch("state", splits["mean"], *where, plan.root)
    combine = plan.launch("combine", splits["state"], splits["mean"], chunk, N)
    read = plan.launch("read", *where, *factors)

    def run(
        q: Tensor, k: Tensor, v: Tensor, local: Tensor | None, gate: Tensor | None, settings: Settings
    ) -> tuple[Tensor, Tensor]:
        terms, table = terms_of(q, local, gate), q if plan.table is None else plan.table
        out, saved = q.new_empty(v.shape), empty_float32(plan.saved, q.device)
        if plan.short:
            short(q, k, v, *terms, out, table, saved)
            return out, saved
        mean_part = q
        if settings.token_weights:
            mean_part = empty_float32(plan.mean_parts["mean"], q.device)
            mean(q, mean_part)
        part = empty_float32(plan.parts["state"], q.device)
        state(k, v, mean_part, table, part)
        combine(part, mean_part, saved)
        read(q, *terms, out, table, saved)
        return out, saved

    return run


@with_unit_channels
def plan_backward(
    grad: Tensor,
    saved: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    local: Tensor | None,
    gate: Tensor | None,
    settings: Settings,
) -> Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
    """A function of arguments like these: gradients of q, k, v, local and gate; of what is None an empty tensor."""
    plan = plan_of(q, v, local, gate, settings)
    splits, where, factors = plan.splits, plan.map, (settings.scale, settings.eps)
    short = plan.launch("short_backward", *where, plan.root, *factors)
    read = plan.launch("read_backward", *where, *factors)
    combine = plan.launch("combine_backward", splits["read_backward"])
    keys = plan.launch("keys_backward", *where, plan.root)
    query = plan.launch("query_backward", splits["keys_backward"], *where, *factors)

    def run(
        grad: Tensor,
        saved: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        local: Tensor | None,
        gate: Tensor | None,
        settings: Settings,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        saved = saved.contiguous()
        terms, table = terms_of(q, local, gate), q if plan.table is None else plan.table
        grads = d_q, d_k, d_v, d_local, _ = tuple(
            q.new_empty(0) if x is None else x.new_empty(x.shape) for x in (q, k, v, local, gate)
        )
        if plan.short:
            short(grad, q, k, v, *terms, *grads, table, saved)
            return grads
        part, combined = empty_float32(plan.parts["read_backward"], q.device), empty_float32(plan.combined, q.device)
        read(grad, q, *terms, d_q, *grads[3:], table, saved, part)
        combine(part, saved, combined)
        mean_part = empty_float32(plan.mean_parts["keys_backward"], q.device) if settings.token_weights else q
        keys(k, v, d_k, d_v, table, saved, combined, mean_part)
        if settings.token_weights:
            # The gradient of a local term is that of o.
            d_out, times = (grad, terms[1]) if local is None else (d_local, q)
            query(d_out, q, times, d_q, table, saved, mean_part)
        return grads

    return run
