"""Gated linear attention in Triton.

The names are those of ``reference.py``: f are the log decays in order, b those in reverse, t a query and j a key. The
tokens fall into chunks, and neighbouring chunks into segments, so that small batches fill a GPU too. The directions
share their programs: keys before a query decay by f, keys after it by b, so that inside a chunk both make one matrix.

1. ``_states``: the state that enters each chunk from its segment, of each direction; a program walks a segment;
2. ``_join``: the state that enters each segment (only if there are several);
3. ``_read``: o, from the pairs of tokens of a chunk and from the states that enter it.

The backward pass stores nothing but states. Their gradients are states too: of the queries and the gradient of o, and
in the other order. So ``_states``, ``_join`` and ``_read`` also serve for them and for the gradient of v, under the
flag ``GRADIENT``; ``_backward`` has the gradients of q, k and the decays.

A sum of log decays is the product with a matrix of zeros and ones, never a difference, which would lose the small among
the large. Where a chunk forgets little, exp(sums from its first token to t) and exp(-sums from there to j) are far from
overflow, and their products are the decays of all pairs at once (``LITTLE``). Elsewhere the pairs are taken
level by level, as ``torch_backend.py`` describes.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels.launch import Launch, with_unit_channels

PROGRAMS = 1024  # a few for each multiprocessor of a large GPU
LITTLE = tl.constexpr(-30.0)  # a sum of log decays from which on exp(-sum) is safe, and as exact as exp(sum)
CHUNK, TILE_D, TILE_E, WARPS = 32, 32, 64, 4  # tokens of a chunk, channels of a tile, warps of a program
AT_ONCE = 32  # segments joined by one scan
# Not to be specialised: a picture of another size must not compile again.
SIZES = ["N", "heads", "chunks", "segments", "length", "levels", "directions"]
STRIDES = [f"{x}_{axis}" for x in "qkvfbxy" for axis in "bnh"]


@triton.jit
def _load(x, start, n, c, N, CHANNELS, step):
    """Tokens start + n and channels c of a head as float32, zeros where there are none."""
    valid = (n < N - start)[:, None] & (c < CHANNELS)[None, :]
    x += start.to(tl.int64) * step
    return tl.load(x + (n[:, None] * step + c[None, :]), mask=valid, other=0.0).to(tl.float32)


@triton.jit
def _load_decay(x, start, n, c, N, CHANNELS, step):
    """As ``_load``, in its own dtype; for minus infinity a finite number, which times zero is zero and whose exp is."""
    return tl.maximum(_load(x, start, n, c, N, CHANNELS, step), -1e4).to(x.dtype.element_ty)


@triton.jit
def _factor(x, DOT: tl.constexpr):
    """As a factor of a product that may be kept."""
    return x.to(tl.bfloat16) if DOT == 0 else x


@triton.jit
def _dot(a, b, DOT: tl.constexpr):
    """A matrix product with float32 sums, of bfloat16, of tf32, or of float32 numbers."""
    if DOT == 0:
        return tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16))
    elif DOT == 1:
        return tl.dot(a, b, input_precision="tf32")
    else:
        return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _sum(mask, x, DOT: tl.constexpr):
    """For every row of the mask the sum of the rows of x that it selects; x is not rounded to bfloat16."""
    if DOT == 0 and x.dtype == tl.bfloat16:
        return tl.dot(mask.to(tl.bfloat16), x)
    else:
        return _dot(mask.to(tl.float32), x.to(tl.float32), 2 if DOT == 2 else 1)


@triton.jit
def _upto(i, j, sign):
    """Whether a direction, in order with sign 1 and in reverse with -1, has come to token j once it is at i."""
    return j * sign <= i * sign


@triton.jit
def _again(level, C: tl.constexpr):
    """The places in a chunk, as a column and as a row.

    That they are the same at every level is hidden from the compiler, which would keep what follows from them, the
    masks above all, in registers, where there is no room.
    """
    place = tl.arange(0, C) + (level >> 8)
    return place[:, None], place[None, :]


@triton.jit
def _to_middle(i, j, level, sign):
    """Whether the decay of token j is between that of i and the middle of the block of 2 ** (level + 1) tokens."""
    in_second_half = ((i >> level) & 1) == (sign + 1) // 2
    return ((i >> level) == (j >> level)) & (in_second_half == _upto(i, j, sign))


@triton.jit
def _level(
    q, k, g, q_n, k_n, g_n, start, d, N, scale, level, sign,
    DOT: tl.constexpr, UNIT: tl.constexpr, D: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Queries and keys, and their decays from or to the middle of their block: (C, D) each."""
    i, j = _again(level, C)
    n = tl.arange(0, C) + (level >> 8)
    decay = tl.exp(_sum(_to_middle(i, j, level, sign), _load_decay(g, start, n, d, N, D, g_n * UNIT), DOT))
    return _load(q, start, n, d, N, D, q_n * UNIT) * scale, _load(k, start, n, d, N, D, k_n * UNIT), decay


@triton.jit
def _meet(x, level, sign, C: tl.constexpr):
    """Of a matrix over queries and keys the pairs in different halves of a block, the key's before, else zero."""
    t, j = _again(level, C)
    return tl.where((((t ^ j) >> level) == 1) & _upto(t, j, sign), x, 0.0)


@triton.jit
def _entering(
    states, decays, starts, row, chunk, chunks, segments, length, d, e, PD: tl.constexpr, PE: tl.constexpr
):  # fmt: skip
    """The state that enters a chunk, (len(d), len(e)); row is that of a direction and head."""
    place, at = (row * chunks + chunk).to(tl.int64), d[:, None] * PE + e[None, :]
    state = tl.load(states + place * (PD * PE) + at).to(tl.float32)
    if segments > 1:
        start = (row * segments + chunk // length).to(tl.int64)
        passed = tl.load(decays + place * PD + d)
        state += passed[:, None] * tl.load(starts + start * (PD * PE) + at)
    return state


@triton.jit(do_not_specialize=SIZES + STRIDES)
def _states(
    x, y, f, b, first, states, decays, ends, totals,
    x_b, x_n, x_h, y_b, y_n, y_h, f_b, f_n, f_h, b_b, b_n, b_h,
    N, heads, chunks, segments, length, levels, directions, scale,
    GRADIENT: tl.constexpr, FIRST: tl.constexpr, DOT: tl.constexpr, UNIT: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, PD: tl.constexpr, PE: tl.constexpr,
    C: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """A tile of the state before every chunk of a segment, in the order of the walk, and of that after the last.

    The state is of keys x and values y, or, as a gradient, of queries x and gradients y. decays and totals are those
    since the segment's beginning.
    """
    head, segment = tl.program_id(0) // segments, tl.program_id(0) % segments
    direction = tl.program_id(1)
    d = tl.program_id(2) // (PE // BE) * BD + tl.arange(0, BD)
    e = tl.program_id(2) % (PE // BE) * BE + tl.arange(0, BE)
    batch, place = (head // heads).to(tl.int64), head % heads
    x += (batch * x_b + place * x_h) * UNIT
    y += (batch * y_b + place * y_h) * UNIT
    if direction == 0:
        g, g_n = f + (batch * f_b + place * f_h) * UNIT, f_n
    else:
        g, g_n = b + (batch * b_b + place * b_h) * UNIT, b_n
    row = direction * (tl.num_programs(0) // segments) + head
    backwards = (direction == 1) != GRADIENT
    at, token = d[:, None] * PE + e[None, :], tl.arange(0, C)
    n, m = token[:, None], token[None, :]
    # A token's own decay comes before its key and value, and before its query reads.
    sign = 1 - 2 * direction
    counted = _upto(n, m, sign) if GRADIENT else (_upto(n, m, sign) == 0)
    state = tl.zeros((BD, BE), tl.float32)
    if FIRST:  # noqa: SIM102, one of them is decided by the compiler
        if segment == (segments - 1) * backwards.to(tl.int32):
            start = first + head.to(tl.int64) * (D * E) + d[:, None] * E + e[None, :]
            state += tl.load(start, mask=(d < D)[:, None] & (e < E)[None, :], other=0.0).to(tl.float32)
    passed = tl.zeros((BD,), tl.float32)
    for i in range(length):
        chunk = segment * length + tl.where(backwards, length - 1 - i, i)
        target = (row * chunks + chunk).to(tl.int64)
        tl.store(states + target * (PD * PE) + at, state.to(states.dtype.element_ty))
        tl.store(decays + target * PD + d, tl.exp(passed))
        keys, values = _load(x, chunk * C, token, d, N, D, x_n * UNIT), _load(y, chunk * C, token, e, N, E, y_n * UNIT)
        gates = _load_decay(g, chunk * C, token, d, N, D, g_n * UNIT)
        total = tl.sum(gates.to(tl.float32), 0)
        keys *= scale * tl.exp(_sum(counted, gates, DOT))
        state = state * tl.exp(total)[:, None] + _dot(tl.trans(keys), values, DOT)
        passed += total
    target = (row * segments + segment).to(tl.int64)
    tl.store(ends + target * (PD * PE) + at, state)
    tl.store(totals + target * PD + d, tl.exp(passed))


@triton.jit
def _compose(decay, state, next_decay, next_state):
    return decay * next_decay, state * next_decay + next_state


@triton.jit(do_not_specialize=["segments"])
def _join(
    ends, totals, starts, last, segments, GRADIENT: tl.constexpr, PD: tl.constexpr, PE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The state that enters each segment, but that of the first is zero, and the state after all; block by block."""
    row, direction = tl.program_id(0) + tl.program_id(1) * tl.num_programs(0), tl.program_id(1)
    at = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    backwards = (direction == 1) != GRADIENT
    order = tl.arange(0, ROWS)
    state = tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, segments, ROWS):
        i = begin + order
        place = row * segments + tl.where(backwards, segments - 1 - i, i)
        place, valid = place.to(tl.int64)[:, None], (i < segments)[:, None]
        decay = tl.load(totals + place * PD + (at // PE)[None, :], mask=valid, other=1.0)
        update = tl.load(ends + place * (PD * PE) + at[None, :], mask=valid, other=0.0)
        decay, update = tl.associative_scan((decay, update), 0, _compose)
        after = update + decay * state[None, :]
        step = tl.where(backwards, -1, 1)
        tl.store(starts + (place + step) * (PD * PE) + at[None, :], after, mask=(i + 1 < segments)[:, None])
        state = tl.sum(tl.where(order[:, None] == ROWS - 1, after, 0.0), 0)
    begin = (row * segments + tl.where(backwards, segments - 1, 0)).to(tl.int64)
    tl.store(starts + begin * (PD * PE) + at, tl.zeros((BLOCK,), tl.float32))
    tl.store(last + row.to(tl.int64) * (PD * PE) + at, state)


@triton.jit(do_not_specialize=SIZES + STRIDES)
def _read(
    q, k, v, f, b, states, decays, starts, out,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, f_b, f_n, f_h, b_b, b_n, b_h,
    N, heads, chunks, segments, length, levels, directions, scale,
    GRADIENT: tl.constexpr, DOT: tl.constexpr, UNIT: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, PD: tl.constexpr, PE: tl.constexpr,
    C: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """A tile of o, or of the gradient of v if v and the states are gradients."""
    blocks = tl.cdiv(N, C)
    head, chunk = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    batch, place = (head // heads).to(tl.int64), head % heads
    q += (batch * q_b + place * q_h) * UNIT
    k += (batch * k_b + place * k_h) * UNIT
    v += (batch * v_b + place * v_h) * UNIT
    start, n = chunk * C, tl.arange(0, C)
    e = tl.program_id(1) * BE + tl.arange(0, BE)
    t, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    weights = tl.zeros((C, C), tl.float32)
    result = tl.zeros((C, BE), tl.float32)
    for direction in range(directions):
        sign = 1 - 2 * direction
        if direction == 0:
            g, g_n = f + (batch * f_b + place * f_h) * UNIT, f_n
        else:
            g, g_n = b + (batch * b_b + place * b_h) * UNIT, b_n
        row = direction * (tl.num_programs(0) // blocks) + head
        for tile in range(PD // BD):
            d = tile * BD + tl.arange(0, BD)
            queries, keys = _load(q, start, n, d, N, D, q_n * UNIT) * scale, _load(k, start, n, d, N, D, k_n * UNIT)
            gates = _load_decay(g, start, n, d, N, D, g_n * UNIT)
            since = _sum(_upto(t, j, sign), gates, DOT)
            state = _entering(states, decays, starts, row, chunk, chunks, segments, length, d, e, PD, PE)
            if GRADIENT:
                result += _dot(keys * tl.exp(_sum(_upto(t, j, sign) == 0, gates, DOT)), state, DOT)
            else:
                result += _dot(queries * tl.exp(since), state, DOT)
            if tl.min(tl.min(since, 1), 0) > LITTLE:
                pairs = _dot(queries * tl.exp(since), tl.trans(keys * tl.exp(-since)), DOT)
                weights += tl.where(_upto(t, j, sign), pairs, 0.0)
            else:
                weights += tl.where(t == j, tl.sum(queries * keys, 1)[:, None], 0.0)
                for level in range(levels):
                    query, key, decay = _level(
                        q, k, g, q_n, k_n, g_n, start, d, N, scale, level, sign, DOT, UNIT, D, C
                    )  # fmt: skip
                    weights += _meet(_dot(query * decay, tl.trans(key * decay), DOT), level, sign, C)
    values = _load(v, start, n, e, N, E, v_n * UNIT)
    result += _dot(tl.trans(weights) if GRADIENT else weights, values, DOT)
    out += ((batch * N + start) * heads + place) * E
    tl.store(
        out + n[:, None] * (heads * E) + e[None, :],
        result.to(out.dtype.element_ty),
        mask=(n < N - start)[:, None] & (e < E)[None, :],
    )


@triton.jit(do_not_specialize=SIZES + STRIDES)
def _backward(
    grad, q, k, v, f, b, states, decays, starts, d_states, d_decays, d_starts, d_q, d_k, d_f, d_b,
    y_b, y_n, y_h, q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, f_b, f_n, f_h, b_b, b_n, b_h,
    N, heads, chunks, segments, length, levels, directions, scale,
    DOT: tl.constexpr, UNIT: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, PD: tl.constexpr, PE: tl.constexpr,
    C: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """A tile of the gradients of q, k and the decays.

    The gradient of a sum of decays is, pair by pair of query and key, the weight times its gradient. It goes to the
    decays in the sum, so that no pair counts, not even with both signs, where it has no part.
    """
    blocks = tl.cdiv(N, C)
    head, chunk = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    batch, place = (head // heads).to(tl.int64), head % heads
    grad += (batch * y_b + place * y_h) * UNIT
    q += (batch * q_b + place * q_h) * UNIT
    k += (batch * k_b + place * k_h) * UNIT
    v += (batch * v_b + place * v_h) * UNIT
    start, n = chunk * C, tl.arange(0, C)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    t, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    target, at = ((batch * N + start) * heads + place) * D, n[:, None] * (heads * D) + d[None, :]
    valid = (n < N - start)[:, None] & (d < D)[None, :]
    d_weights = tl.zeros((C, C), tl.float32)
    for tile in range(PE // BE):
        e = tile * BE + tl.arange(0, BE)
        values = _load(v, start, n, e, N, E, v_n * UNIT)
        d_weights += _dot(_load(grad, start, n, e, N, E, y_n * UNIT), tl.trans(values), DOT)
    own = tl.sum(tl.where(t == j, d_weights, 0.0), 1)[:, None] * directions
    d_weights = _factor(tl.where(t == j, 0.0, d_weights), DOT)
    dq = own * _load(k, start, n, d, N, D, k_n * UNIT)
    dk = own * _load(q, start, n, d, N, D, q_n * UNIT) * scale
    for direction in range(directions):
        sign = 1 - 2 * direction
        if direction == 0:
            g, g_n, d_g = f + (batch * f_b + place * f_h) * UNIT, f_n, d_f
        else:
            g, g_n, d_g = b + (batch * b_b + place * b_h) * UNIT, b_n, d_b
        row = direction * (tl.num_programs(0) // blocks) + head
        d_query, d_key = tl.zeros((C, BD), tl.float32), tl.zeros((C, BD), tl.float32)
        through = tl.zeros((BD,), tl.float32)
        for tile in range(PE // BE):
            e = tile * BE + tl.arange(0, BE)
            state = _entering(states, decays, starts, row, chunk, chunks, segments, length, d, e, PD, PE)
            d_query += _dot(_load(grad, start, n, e, N, E, y_n * UNIT), tl.trans(state), DOT)
            d_state = _entering(d_states, d_decays, d_starts, row, chunk, chunks, segments, length, d, e, PD, PE)
            d_key += _dot(_load(v, start, n, e, N, E, v_n * UNIT), tl.trans(d_state), DOT)
            through += tl.sum(state * d_state, 1)
        gates = _load_decay(g, start, n, d, N, D, g_n * UNIT)
        since = _sum(_upto(t, j, sign), gates, DOT)
        through *= tl.exp(tl.sum(gates.to(tl.float32), 0))
        d_query *= tl.exp(since)
        d_key *= tl.exp(_sum(_upto(t, j, sign) == 0, gates, DOT))
        dq += d_query
        dk += d_key
        queries, keys = _load(q, start, n, d, N, D, q_n * UNIT) * scale, _load(k, start, n, d, N, D, k_n * UNIT)
        dg = through[None, :] + _sum(_upto(j, t, sign) == 0, d_key * keys, DOT)
        dg += _sum(_upto(j, t, sign), d_query * queries, DOT)
        if tl.min(tl.min(since, 1), 0) > LITTLE:
            pairs = tl.where(_upto(t, j, sign), d_weights, 0.0)
            d_query = _dot(pairs, keys * tl.exp(-since), DOT) * tl.exp(since)
            d_key = _dot(tl.trans(pairs), queries * tl.exp(since), DOT) * tl.exp(-since)
            dq += d_query
            dk += d_key
            dg += _sum(_upto(j, t, sign), d_query * queries - d_key * keys, DOT)
        else:
            for level in range(levels):
                query, key, decay = _level(
                    q, k, g, q_n, k_n, g_n, start, d, N, scale, level, sign, DOT, UNIT, D, C
                )  # fmt: skip
                pairs = _meet(d_weights, level, sign, C)
                d_query = _dot(pairs, key * decay, DOT) * decay
                d_key = _dot(tl.trans(pairs), query * decay, DOT) * decay
                dq += d_query
                dk += d_key
                i, m = _again(level, C)
                dg += _sum(_to_middle(m, i, level, sign), d_query * query + d_key * key, DOT)
        tl.store(d_g + target + at, dg.to(d_g.dtype.element_ty), mask=valid)
    tl.store(d_q + target + at, (dq * scale).to(d_q.dtype.element_ty), mask=valid)
    tl.store(d_k + target + at, dk.to(d_k.dtype.element_ty), mask=valid)


class _Plan:
    """Block sizes, constants and grids of a call; the number of tokens is in the grids and plain numbers only."""

    def __init__(self, *tensors: Tensor, both: bool, scale: float) -> None:
        q, v = tensors[0], tensors[2]
        batch, self.N, self.heads, D = q.shape
        E = v.shape[-1]
        self.device, self.scale, self.count, self.directions = q.device, scale, batch * self.heads, 1 + both
        # Triton's interpreter, on the CPU, has no bfloat16 products.
        dot = {torch.bfloat16: 0, torch.float16: 1}.get(q.dtype, 2) if q.is_cuda else 2
        # Products of float32 numbers need the most registers, and _backward the most of all kernels.
        self.C, exact = CHUNK, q.dtype == torch.float32
        self.BD, self.BE, warps = (16, 32, 8) if exact else (TILE_D, TILE_E, WARPS)
        self.BD, self.BE = (min(tile, max(16, triton.next_power_of_2(x))) for x, tile in ((D, self.BD), (E, self.BE)))
        self.PD, self.PE = triton.cdiv(D, self.BD) * self.BD, triton.cdiv(E, self.BE) * self.BE
        self.tiles = self.PD // self.BD * (self.PE // self.BE)
        self.blocks = triton.cdiv(self.N, self.C)
        wanted = max(1, PROGRAMS // (self.count * self.directions * self.tiles))
        self.length = triton.cdiv(self.blocks, min(self.blocks, wanted))
        self.segments = triton.cdiv(self.blocks, self.length)
        self.chunks = self.segments * self.length
        # Steps between tokens and heads are given in units, so that a load knows its alignment whatever they are.
        self.unit = math.gcd(16, *(step for x in tensors for step in x.stride()[:3]))
        self.constants = {
            "DOT": dot, "UNIT": self.unit, "D": D, "E": E, "PD": self.PD, "PE": self.PE,
            "C": self.C, "BD": self.BD, "BE": self.BE, "num_warps": warps, "num_stages": 1,
        }  # fmt: skip
        self.levels = self.C.bit_length() - 1

        self.sizes = (self.N, self.heads, self.chunks, self.segments, self.length, self.levels, self.directions)

    def launch(
        self, kernel: Any, grid: tuple[int, ...], strided: int, scale: float | None = None, **constants: Any
    ) -> Launch:
        """A kernel whose first tensors are strided."""
        numbers = (*self.sizes, self.scale if scale is None else scale)
        return Launch(kernel, grid, numbers, {**self.constants, **constants}, self.device, strided, self.unit)

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(self.directions, self.count, *shape, device=self.device, dtype=dtype)


class _Walk:
    """The states that enter each chunk, or their gradients, for arguments alike."""

    def __init__(self, plan: _Plan, first: Tensor | None, gradient: bool) -> None:
        self.plan = plan
        # Sums are float32 throughout; where products are of bfloat16 numbers, these are only rounded earlier.
        self.factor = torch.bfloat16 if plan.constants["DOT"] == 0 else torch.float32
        grid = plan.count * plan.segments, plan.directions, plan.tiles
        scale = plan.scale if gradient else 1.0
        self.states = plan.launch(_states, grid, 4, scale, GRADIENT=gradient, FIRST=first is not None)
        grid = plan.count, plan.directions, plan.PD * plan.PE // 64
        constants = {"GRADIENT": gradient, "PD": plan.PD, "PE": plan.PE, "ROWS": AT_ONCE, "BLOCK": 64}
        self.join = Launch(_join, grid, (plan.segments,), constants, plan.device)

    def __call__(
        self, x: Tensor, y: Tensor, f: Tensor, b: Tensor, first: Tensor | None
    ) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
        """What ``_entering`` takes, and the last state (directions, B H, PD, PE)."""
        plan = self.plan
        states = plan.empty(plan.chunks, plan.PD, plan.PE, dtype=self.factor)
        ends = plan.empty(plan.segments, plan.PD, plan.PE)
        decays, totals = (plan.empty(n, plan.PD) for n in (plan.chunks, plan.segments))
        self.states(x, y, f, b, x if first is None else first.contiguous(), states, decays, ends, totals)
        if plan.segments == 1:
            return (states, decays, ends), ends[:, :, 0]
        starts, last = torch.empty_like(ends), plan.empty(plan.PD, plan.PE)
        self.join(ends, totals, starts, last)
        return (states, decays, starts), last


def _plan_forward(
    q: Tensor, k: Tensor, v: Tensor, f: Tensor, b: Tensor | None, first: Tensor | None, scale: float
) -> Callable[..., tuple[Tensor, Tensor]]:
    """A function of q, k, v, f, b and the first state, alike: o, and the last state as ``_Walk`` gives it."""
    plan = _Plan(q, k, v, f, f if b is None else b, both=b is not None, scale=scale)
    walk = _Walk(plan, first, gradient=False)
    read = plan.launch(_read, (plan.count * plan.blocks, plan.PE // plan.BE), 5, GRADIENT=False)

    def run(
        q: Tensor, k: Tensor, v: Tensor, f: Tensor, b: Tensor | None, first: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        b = f if b is None else b
        entering, last = walk(k, v, f, b, first)
        out = q.new_empty(v.shape)
        read(q, k, v, f, b, *entering, out)
        return out, last

    return run


def _plan_backward(
    grad: Tensor,
    d_last: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    f: Tensor,
    b: Tensor | None,
    first: Tensor | None,
    scale: float,
) -> Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]]:
    """A function of such arguments without the scale: gradients of q, k, v, f, b and the first state."""
    plan = _Plan(q, k, v, f, f if b is None else b, grad, both=b is not None, scale=scale)
    walk, walk_back = _Walk(plan, first, gradient=False), _Walk(plan, d_last, gradient=True)
    read = plan.launch(_read, (plan.count * plan.blocks, plan.PE // plan.BE), 5, GRADIENT=True)
    pairs = plan.launch(_backward, (plan.count * plan.blocks, plan.PD // plan.BD), 6, BE=min(plan.BE, 32))

    def run(
        grad: Tensor,
        d_last: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        f: Tensor,
        b: Tensor | None,
        first: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        b = f if b is None else b
        entering, _ = walk(k, v, f, b, first)
        d_entering, d_first = walk_back(q, grad, f, b, d_last)
        d_q, d_k, d_v, d_f, d_b = (x.new_empty(x.shape) for x in (q, k, v, f, b))
        read(q, k, grad, f, b, *d_entering, d_v)
        pairs(grad, q, k, v, f, b, *entering, *d_entering, d_q, d_k, d_f, d_b)
        return d_q, d_k, d_v, d_f, d_b, d_first

    return run


def _cropped(state: Tensor, q: Tensor, v: Tensor) -> Tensor:
    """The state of the direction in order without padding, (B, H, D, E)."""
    return state[0].unflatten(0, (q.shape[0], q.shape[2]))[..., : q.shape[3], : v.shape[3]].contiguous()


@with_unit_channels
def plan_forward(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, initial_state: Tensor | None, scale: float
) -> Callable[..., tuple[Tensor, Tensor]]:
    """A function of arguments like these, as ``gated_linear_attention``."""
    run_all = _plan_forward(q, k, v, log_decay, None, initial_state, scale)

    def run(
        q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, initial_state: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        out, last = run_all(q, k, v, log_decay, None, initial_state)
        return out, _cropped(last, q, v)

    return run


@with_unit_channels
def plan_forward_both(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, log_decay_reverse: Tensor, scale: float
) -> Callable[..., Tensor]:
    """A function of arguments like these, as ``bidirectional_gated_linear_attention``."""
    run_all = _plan_forward(q, k, v, log_decay, log_decay_reverse, None, scale)
    return lambda *arguments: run_all(*arguments[:5], None)[0]


@with_unit_channels
def plan_backward(
    grad: Tensor,
    d_state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    initial_state: Tensor | None,
    scale: float,
) -> Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
    """A function of arguments like these: gradients of q, k, v, log_decay and the initial state."""
    run_all = _plan_backward(grad, d_state, q, k, v, log_decay, None, initial_state, scale)

    def run(
        grad: Tensor,
        d_state: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor,
        initial_state: Tensor | None,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        d_q, d_k, d_v, d_f, _, d_first = run_all(grad, d_state, q, k, v, log_decay, None, initial_state)
        return d_q, d_k, d_v, d_f, _cropped(d_first, q, v)

    return run


@with_unit_channels
def plan_backward_both(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, log_decay_reverse: Tensor, scale: float
) -> Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
    """A function of arguments like these: gradients of q, k, v and of both decays."""
    run_all = _plan_backward(grad, None, q, k, v, log_decay, log_decay_reverse, None, scale)
    return lambda grad, *arguments: run_all(grad, None, *arguments[:5], None)[:5]
