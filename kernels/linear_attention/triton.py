"""2D linear attention in Triton.

The names are those of the formulas in ``reference.py``; p_n are the token weights over N, which sum to 1. A program
works on a chunk of the tokens of one head of one picture, block by block. The forward pass has four kernels:

1. ``_mean``: parts of m, the mean query (only with token weights);
2. ``_state``: parts of S and of the mean key, with an online softmax of the token weights;
3. ``_combine``: the parts put together, in a fixed order;
4. ``_read``: o, the local term and the gate.

The backward pass keeps S, the mean key, m and the softmax's maximum and sum, O(D E) numbers per head, and computes the
rest again: ``_read_backward`` (gradients of gate, local term and parts of that of S), ``_combine_backward``,
``_state_backward`` (keys and values, and parts of the gradient of m) and ``_query_backward``. The gradient of the
softmax needs sum_n p_n dp_n, which is <S, dS> + <mean key, its gradient>, so it takes no pass over the tokens.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels.linear_attention.torch_backend import Settings
from zoo.kernels.rotary import rotary_angles

KINDS = {"identity": 0, "relu": 1, "elu+1": 2, "exp": 3}
PROGRAMS = 1024  # a few for each multiprocessor of a large GPU


@triton.jit
def _feature(x, KIND: tl.constexpr):
    if KIND == 1:
        return tl.maximum(x, 0.0)
    elif KIND == 2:
        return tl.where(x > 0, x + 1, tl.exp(tl.minimum(x, 0.0)))
    elif KIND == 3:
        return tl.exp(x)
    else:
        return x


@triton.jit
def _slope(x, KIND: tl.constexpr):
    """The derivative of the feature map."""
    if KIND == 1:
        return tl.where(x > 0, 1.0, 0.0)
    elif KIND == 2:
        return tl.where(x > 0, 1.0, tl.exp(tl.minimum(x, 0.0)))
    elif KIND == 3:
        return tl.exp(x)
    else:
        return x * 0 + 1.0


@triton.jit
def _angles(table, n, height, width, D: tl.constexpr, BD: tl.constexpr):
    """Cosines and sines (BN, BD / 2) of the pairs of tokens n, from a table (height + width, D / 4, 2)."""
    pair = tl.arange(0, BD // 2)
    by_row = pair < D // 4
    row = n // width
    place = tl.where(by_row[None, :], row[:, None], height + (n - row * width)[:, None])
    place = tl.minimum(place, height + width - 1)
    frequency = tl.where(by_row, pair, pair - D // 4)
    where = (place * (D // 4) + frequency[None, :]) * 2
    valid = (pair < D // 2)[None, :]
    return tl.load(table + where, mask=valid, other=1.0), tl.load(table + where + 1, mask=valid, other=0.0)


@triton.jit
def _turn(x, cos, sin, BN: tl.constexpr, BD: tl.constexpr):
    a, b = tl.split(tl.reshape(x, (BN, BD // 2, 2)))
    return tl.reshape(tl.join(a * cos - b * sin, b * cos + a * sin), (BN, BD))


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
def _mean(
    q, part, s_b, s_n, s_h, N, heads, chunk, KIND: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr
):
    """part[head, split] = sum of f(q) over a chunk."""
    split, head = tl.program_id(0), tl.program_id(1)
    d = tl.arange(0, BD)
    q += (head // heads).to(tl.int64) * s_b + (head % heads) * s_h
    total = tl.zeros((BD,), tl.float32)
    for start in range(split * chunk, tl.minimum(N, (split + 1) * chunk), BN):
        n = start + tl.arange(0, BN)
        valid = (n < N)[:, None] & (d < D)[None, :]
        x = tl.load(q + n.to(tl.int64)[:, None] * s_n + d[None, :], mask=valid, other=0.0).to(tl.float32)
        total += tl.sum(tl.where(valid, _feature(x, KIND), 0.0), 0)
    tl.store(part + (head * tl.num_programs(0) + split) * BD + d, total)


@triton.jit
def _sum_parts(part, head, splits, BD: tl.constexpr):
    d = tl.arange(0, BD)
    total = tl.zeros((BD,), tl.float32)
    for split in range(splits):
        total += tl.load(part + (head * splits + split) * BD + d)
    return total


@triton.jit
def _state(
    k, v, mean_part, table, state_part, key_part, stats_part,
    k_b, k_n, k_h, v_b, v_n, v_h,
    N, heads, chunk, splits_m, height, width, scale,
    KIND: tl.constexpr, WEIGHTS: tl.constexpr, ROTATE: tl.constexpr, DOT: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Parts of S (D, E) and the mean key (D) over a chunk, both times sum_n exp(score_n - maximum)."""
    split, head = tl.program_id(0), tl.program_id(1)
    d, e = tl.arange(0, BD), tl.arange(0, BE)
    k += (head // heads).to(tl.int64) * k_b + (head % heads) * k_h
    v += (head // heads).to(tl.int64) * v_b + (head % heads) * v_h
    if WEIGHTS:
        query = _sum_parts(mean_part, head, splits_m, BD) * (scale / N)
    top, total = -float("inf"), 0.0
    keys = tl.zeros((BD,), tl.float32)
    state = tl.zeros((BD, BE), tl.float32)
    for start in range(split * chunk, tl.minimum(N, (split + 1) * chunk), BN):
        n = start + tl.arange(0, BN)
        at = n.to(tl.int64)[:, None]
        valid = (n < N)[:, None] & (d < D)[None, :]
        x = tl.load(k + at * k_n + d[None, :], mask=valid, other=0.0).to(tl.float32)
        values = tl.load(v + at * v_n + e[None, :], mask=(n < N)[:, None] & (e < E)[None, :], other=0.0)
        x = tl.where(valid, _feature(x, KIND), 0.0)
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
        keys += tl.sum(x, 0)
        if ROTATE:
            cos, sin = _angles(table, n, height, width, D, BD)
            x = _turn(x, cos, sin, BN, BD)
        state += _dot(tl.trans(x), values.to(tl.float32) if DOT > 0 else values, DOT)
    if not WEIGHTS:
        top, total = 0.0, (tl.minimum(N, (split + 1) * chunk) - split * chunk).to(tl.float32)
    place = head * tl.num_programs(0) + split
    tl.store(stats_part + place * 2, top)
    tl.store(stats_part + place * 2 + 1, total)
    tl.store(key_part + place * BD + d, keys)
    tl.store(state_part + (place.to(tl.int64) * BD + d[:, None]) * BE + e[None, :], state)


@triton.jit
def _combine(
    state_part, key_part, stats_part, mean_part, state, key, stats, mean, splits, splits_m, N,
    WEIGHTS: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """S, the mean key, the softmax's maximum and sum, and m; a program puts some rows of S together."""
    tile, head = tl.program_id(0), tl.program_id(1)
    d, e = tile * ROWS + tl.arange(0, ROWS), tl.arange(0, BE)
    top = -float("inf")
    for split in range(splits):
        top = tl.maximum(top, tl.load(stats_part + (head * splits + split) * 2))
    total = 0.0
    keys = tl.zeros((ROWS,), tl.float32)
    rows = tl.zeros((ROWS, BE), tl.float32)
    for split in range(splits):
        place = head * splits + split
        share = tl.exp(tl.load(stats_part + place * 2) - top)
        total += share * tl.load(stats_part + place * 2 + 1)
        keys += share * tl.load(key_part + place * BD + d)
        rows += share * tl.load(state_part + (place.to(tl.int64) * BD + d[:, None]) * BE + e[None, :])
    tl.store(state + (head * BD + d[:, None]) * BE + e[None, :], rows / total)
    tl.store(key + head * BD + d, keys / total)
    if WEIGHTS:
        query = tl.zeros((ROWS,), tl.float32)
        for split in range(splits_m):
            query += tl.load(mean_part + (head * splits_m + split) * BD + d)
        tl.store(mean + head * BD + d, query / N)
    if tile == 0:
        tl.store(stats + head * 2, top)
        tl.store(stats + head * 2 + 1, total)


@triton.jit
def _read(
    q, state, key, table, local, gate, out,
    q_b, q_n, q_h, l_b, l_n, l_h, g_b, g_n, g_h,
    N, heads, chunk, height, width, eps,
    KIND: tl.constexpr, ROTATE: tl.constexpr, LOCAL: tl.constexpr, GATE: tl.constexpr, DOT: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """out = (R(f(q)) S / (f(q) . mean key + eps) + local) * gate."""
    split, head = tl.program_id(0), tl.program_id(1)
    batch, place = (head // heads).to(tl.int64), head % heads
    d, e = tl.arange(0, BD), tl.arange(0, BE)
    q += batch * q_b + place * q_h
    matrix = tl.load(state + (head * BD + d[:, None]) * BE + e[None, :])
    keys = tl.load(key + head * BD + d)
    for start in range(split * chunk, tl.minimum(N, (split + 1) * chunk), BN):
        n = start + tl.arange(0, BN)
        at = n.to(tl.int64)[:, None]
        valid = (n < N)[:, None] & (d < D)[None, :]
        x = tl.load(q + at * q_n + d[None, :], mask=valid, other=0.0).to(tl.float32)
        x = tl.where(valid, _feature(x, KIND), 0.0)
        normaliser = tl.sum(x * keys[None, :], 1) + eps
        if ROTATE:
            cos, sin = _angles(table, n, height, width, D, BD)
            x = _turn(x, cos, sin, BN, BD)
        y = _dot(x, matrix, DOT) / normaliser[:, None]
        valid = (n < N)[:, None] & (e < E)[None, :]
        if LOCAL:
            y += tl.load(local + batch * l_b + place * l_h + at * l_n + e[None, :], mask=valid, other=0.0).to(
                tl.float32
            )
        if GATE:
            y *= tl.load(gate + batch * g_b + place * g_h + at * g_n + e[None, :], mask=valid, other=0.0).to(tl.float32)
        target = out + ((batch * N + at) * heads + place) * E + e[None, :]
        tl.store(target, y.to(out.dtype.element_ty), mask=valid)


@triton.jit
def _read_backward(
    grad, q, state, key, table, local, gate, d_out, d_gate, d_state_part, d_key_part,
    y_b, y_n, y_h, q_b, q_n, q_h, l_b, l_n, l_h, g_b, g_n, g_h,
    N, heads, chunk, height, width, eps,
    KIND: tl.constexpr, ROTATE: tl.constexpr, LOCAL: tl.constexpr, GATE: tl.constexpr, WRITE: tl.constexpr,
    DOT: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Gradients of the gate and of o (which is the local term's), and parts of those of S and of the mean key."""
    split, head = tl.program_id(0), tl.program_id(1)
    batch, place = (head // heads).to(tl.int64), head % heads
    d, e = tl.arange(0, BD), tl.arange(0, BE)
    matrix = tl.load(state + (head * BD + d[:, None]) * BE + e[None, :])
    keys = tl.load(key + head * BD + d)
    d_state = tl.zeros((BD, BE), tl.float32)
    d_key = tl.zeros((BD,), tl.float32)
    for start in range(split * chunk, tl.minimum(N, (split + 1) * chunk), BN):
        n = start + tl.arange(0, BN)
        at = n.to(tl.int64)[:, None]
        valid = (n < N)[:, None] & (d < D)[None, :]
        x = tl.load(q + batch * q_b + place * q_h + at * q_n + d[None, :], mask=valid, other=0.0).to(tl.float32)
        x = tl.where(valid, _feature(x, KIND), 0.0)
        normaliser = tl.sum(x * keys[None, :], 1) + eps
        turned = x
        if ROTATE:
            cos, sin = _angles(table, n, height, width, D, BD)
            turned = _turn(x, cos, sin, BN, BD)
        y = _dot(turned, matrix, DOT) / normaliser[:, None]
        valid = (n < N)[:, None] & (e < E)[None, :]
        dy = tl.load(grad + batch * y_b + place * y_h + at * y_n + e[None, :], mask=valid, other=0.0).to(tl.float32)
        target = ((batch * N + at) * heads + place) * E + e[None, :]
        if GATE:
            full = y
            if LOCAL:
                full += tl.load(local + batch * l_b + place * l_h + at * l_n + e[None, :], mask=valid, other=0.0)
            tl.store(d_gate + target, (dy * full).to(d_gate.dtype.element_ty), mask=valid)
            dy *= tl.load(gate + batch * g_b + place * g_h + at * g_n + e[None, :], mask=valid, other=0.0)
        if WRITE:
            tl.store(d_out + target, dy.to(d_out.dtype.element_ty), mask=valid)
        dy = dy / normaliser[:, None]
        d_normaliser = -tl.sum(dy * y, 1)
        d_state += _dot(tl.trans(turned), dy, DOT)
        d_key += tl.sum(x * d_normaliser[:, None], 0)
    part = head * tl.num_programs(0) + split
    tl.store(d_key_part + part * BD + d, d_key)
    tl.store(d_state_part + (part.to(tl.int64) * BD + d[:, None]) * BE + e[None, :], d_state)


@triton.jit
def _combine_backward(
    d_state_part, d_key_part, state, key, d_state, d_key, inner, splits,
    BD: tl.constexpr, BE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The gradients of S and the mean key, and for each tile of rows its part of <S, dS> + <mean key, its gradient>."""
    tile, head = tl.program_id(0), tl.program_id(1)
    d, e = tile * ROWS + tl.arange(0, ROWS), tl.arange(0, BE)
    keys = tl.zeros((ROWS,), tl.float32)
    rows = tl.zeros((ROWS, BE), tl.float32)
    for split in range(splits):
        part = head * splits + split
        keys += tl.load(d_key_part + part * BD + d)
        rows += tl.load(d_state_part + (part.to(tl.int64) * BD + d[:, None]) * BE + e[None, :])
    place = (head * BD + d[:, None]) * BE + e[None, :]
    tl.store(d_state + place, rows)
    tl.store(d_key + head * BD + d, keys)
    products = tl.sum(tl.sum(rows * tl.load(state + place), 1) + keys * tl.load(key + head * BD + d), 0)
    tl.store(inner + head * tl.num_programs(0) + tile, products)


@triton.jit
def _state_backward(
    k, v, mean, stats, table, d_state, d_key, inner, d_k, d_v, d_mean_part,
    k_b, k_n, k_h, v_b, v_n, v_h,
    N, heads, chunk, tiles, height, width, scale,
    KIND: tl.constexpr, WEIGHTS: tl.constexpr, ROTATE: tl.constexpr, DOT: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Gradients of keys and values, and parts of that of m."""
    split, head = tl.program_id(0), tl.program_id(1)
    batch, place = (head // heads).to(tl.int64), head % heads
    d, e = tl.arange(0, BD), tl.arange(0, BE)
    matrix = tl.load(d_state + (head * BD + d[:, None]) * BE + e[None, :])
    keys = tl.load(d_key + head * BD + d)
    if WEIGHTS:
        query = tl.load(mean + head * BD + d) * scale
        top, total = tl.load(stats + head * 2), tl.load(stats + head * 2 + 1)
        average = 0.0
        for tile in range(tiles):
            average += tl.load(inner + head * tiles + tile)
        d_query = tl.zeros((BD,), tl.float32)
    for start in range(split * chunk, tl.minimum(N, (split + 1) * chunk), BN):
        n = start + tl.arange(0, BN)
        at = n.to(tl.int64)[:, None]
        valid_k, valid_v = (n < N)[:, None] & (d < D)[None, :], (n < N)[:, None] & (e < E)[None, :]
        raw = tl.load(k + batch * k_b + place * k_h + at * k_n + d[None, :], mask=valid_k, other=0.0).to(tl.float32)
        values = tl.load(v + batch * v_b + place * v_h + at * v_n + e[None, :], mask=valid_v, other=0.0)
        values = values.to(tl.float32) if DOT > 0 else values
        x = tl.where(valid_k, _feature(raw, KIND), 0.0)
        if WEIGHTS:
            p = tl.exp(tl.sum(x * query[None, :], 1) - top) / total
        else:
            p = tl.zeros((BN,), tl.float32) + 1.0 / N
        dx = _dot(values, tl.trans(matrix), DOT)
        weighted = x * p[:, None]
        if ROTATE:
            cos, sin = _angles(table, n, height, width, D, BD)
            weighted = _turn(weighted, cos, sin, BN, BD)
            dx = _turn(dx, cos, -sin, BN, BD)
        dv = _dot(weighted, matrix, DOT)
        dx += keys[None, :]
        if WEIGHTS:
            d_score = tl.where(n < N, p * (tl.sum(dx * x, 1) - average), 0.0)
            dx = dx * p[:, None] + d_score[:, None] * query[None, :]
            d_query += tl.sum(x * d_score[:, None], 0)
        else:
            dx = dx * p[:, None]
        dx *= _slope(raw, KIND)
        base = (batch * N + at) * heads + place
        tl.store(d_k + base * D + d[None, :], dx.to(d_k.dtype.element_ty), mask=valid_k)
        tl.store(d_v + base * E + e[None, :], dv.to(d_v.dtype.element_ty), mask=valid_v)
    if WEIGHTS:
        tl.store(d_mean_part + (head * tl.num_programs(0) + split) * BD + d, d_query * scale)


@triton.jit
def _query_backward(
    d_out, q, state, key, table, d_mean_part, d_q,
    y_b, y_n, y_h, q_b, q_n, q_h,
    N, heads, chunk, splits, height, width, eps,
    KIND: tl.constexpr, WEIGHTS: tl.constexpr, ROTATE: tl.constexpr, DOT: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The gradient of the queries, from that of o."""
    split, head = tl.program_id(0), tl.program_id(1)
    batch, place = (head // heads).to(tl.int64), head % heads
    d, e = tl.arange(0, BD), tl.arange(0, BE)
    matrix = tl.load(state + (head * BD + d[:, None]) * BE + e[None, :])
    keys = tl.load(key + head * BD + d)
    if WEIGHTS:
        d_query = _sum_parts(d_mean_part, head, splits, BD) / N
    for start in range(split * chunk, tl.minimum(N, (split + 1) * chunk), BN):
        n = start + tl.arange(0, BN)
        at = n.to(tl.int64)[:, None]
        valid = (n < N)[:, None] & (d < D)[None, :]
        raw = tl.load(q + batch * q_b + place * q_h + at * q_n + d[None, :], mask=valid, other=0.0).to(tl.float32)
        valid_e = (n < N)[:, None] & (e < E)[None, :]
        dy = tl.load(d_out + batch * y_b + place * y_h + at * y_n + e[None, :], mask=valid_e, other=0.0).to(tl.float32)
        x = tl.where(valid, _feature(raw, KIND), 0.0)
        normaliser = tl.sum(x * keys[None, :], 1) + eps
        dy = dy / normaliser[:, None]
        if ROTATE:
            cos, sin = _angles(table, n, height, width, D, BD)
            x = _turn(x, cos, sin, BN, BD)
        dx = _dot(
            dy, tl.trans(matrix), DOT
        )  # of the turned queries, whose product with them is that of dy and R(f(q)) S
        d_normaliser = -tl.sum(dx * x, 1) / normaliser
        if ROTATE:
            dx = _turn(dx, cos, -sin, BN, BD)
        dx += d_normaliser[:, None] * keys[None, :]
        if WEIGHTS:
            dx += d_query[None, :]
        dx *= _slope(raw, KIND)
        tl.store(d_q + ((batch * N + at) * heads + place) * D + d[None, :], dx.to(d_q.dtype.element_ty), mask=valid)


@functools.lru_cache(maxsize=64)
def _table(height: int, width: int, dim: int, base: float, device: torch.device) -> Tensor:
    """Cosines and sines of rows, then of columns: (height + width, dim / 4, 2); a few kilobytes."""
    quarter = dim // 4
    rows = rotary_angles(height, 1, dim, base, device)[:, :quarter]
    columns = rotary_angles(1, width, dim, base, device)[:, quarter:]
    angles = torch.cat([rows, columns])
    return torch.stack([angles.cos(), angles.sin()], -1).contiguous()


class _Plan:
    """Block sizes, splits and constants of a call; only the grid depends on the number of tokens."""

    def __init__(self, q: Tensor, v: Tensor, settings: Settings) -> None:
        batch, self.N, self.heads, D = q.shape
        E = v.shape[-1]
        self.BD, self.BE = (max(16, triton.next_power_of_2(x)) for x in (D, E))
        # With 8 warps no register spills for bfloat16 heads of 64. Products of float16 numbers are taken of float32
        # ones, so they need as much shared memory as those of float32.
        self.BN = 64 if max(self.BD, self.BE) <= 64 or q.dtype == torch.bfloat16 else 32
        self.count = batch * self.heads
        blocks = triton.cdiv(self.N, self.BN)
        self.splits = min(blocks, max(1, PROGRAMS // self.count), 64)
        self.chunk = triton.cdiv(blocks, self.splits) * self.BN
        self.splits = triton.cdiv(self.N, self.chunk)
        self.grid = (self.splits, self.count)
        self.rows = 16
        self.tiles = self.BD // self.rows
        rotate = settings.height > 0
        self.table = _table(settings.height, settings.width, D, settings.rotary_base, q.device) if rotate else q
        # Triton's interpreter, on the CPU, has no bfloat16 products.
        dot = {torch.bfloat16: 0, torch.float16: 1}.get(q.dtype, 2) if q.is_cuda else 2
        sizes = {"D": D, "E": E, "BD": self.BD, "BE": self.BE, "BN": self.BN}
        self.constants = {"KIND": KINDS[settings.feature_map], "ROTATE": rotate, "DOT": dot, **sizes, "num_warps": 8}
        self.place = (settings.height, settings.width)
        self.scale = D**-0.5

    def empty(self, like: Tensor, *shape: int) -> Tensor:
        return torch.empty(shape, device=like.device, dtype=torch.float32)


def _unit(x: Tensor) -> Tensor:
    """The tensor with neighbouring channels neighbouring in memory, as the kernels need."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _strides(x: Tensor) -> tuple[int, int, int]:
    return x.stride()[:3]


def _states(q: Tensor, k: Tensor, v: Tensor, plan: _Plan, settings: Settings) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """S, mean key, m, and maximum and sum of the softmax."""
    mean_part, sizes = q, {key: plan.constants[key] for key in ("KIND", "D", "BD", "BN", "num_warps")}
    if settings.token_weights:
        mean_part = plan.empty(q, plan.count, plan.splits, plan.BD)
        _mean[plan.grid](q, mean_part, *_strides(q), plan.N, plan.heads, plan.chunk, **sizes)
    state_part, key_part, stats_part = (
        plan.empty(q, plan.count, plan.splits, size) for size in (plan.BD * plan.BE, plan.BD, 2)
    )
    weights = {"WEIGHTS": settings.token_weights}
    _state[plan.grid](
        k, v, mean_part, plan.table, state_part, key_part, stats_part, *_strides(k), *_strides(v),
        plan.N, plan.heads, plan.chunk, plan.splits, *plan.place, plan.scale, **weights, **plan.constants,
    )  # fmt: skip
    state, key, mean, stats = (plan.empty(q, plan.count, size) for size in (plan.BD * plan.BE, plan.BD, plan.BD, 2))
    _combine[(plan.tiles, plan.count)](
        state_part, key_part, stats_part, mean_part, state, key, stats, mean, plan.splits, plan.splits, plan.N,
        **weights, BD=plan.BD, BE=plan.BE, ROWS=plan.rows,
    )  # fmt: skip
    return state, key, mean, stats


def forward(q: Tensor, k: Tensor, v: Tensor, local: Tensor | None, gate: Tensor | None, settings: Settings) -> Tensor:
    """As ``linear_attention``."""
    q, k, v = _unit(q), _unit(k), _unit(v)
    local, gate = (x if x is None else _unit(x) for x in (local, gate))
    plan = _Plan(q, v, settings)
    state, key, _, _ = _states(q, k, v, plan, settings)
    out = q.new_empty(v.shape)
    terms = (q if local is None else local, q if gate is None else gate)
    _read[plan.grid](
        q, state, key, plan.table, *terms, out, *_strides(q), *_strides(terms[0]), *_strides(terms[1]),
        plan.N, plan.heads, plan.chunk, *plan.place, settings.eps,
        LOCAL=local is not None, GATE=gate is not None, **plan.constants,
    )  # fmt: skip
    return out


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, local: Tensor | None, gate: Tensor | None, settings: Settings
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, local and gate; of what is None an empty tensor."""
    grad, q, k, v = _unit(grad), _unit(q), _unit(k), _unit(v)
    local, gate = (x if x is None else _unit(x) for x in (local, gate))
    plan = _Plan(q, v, settings)
    state, key, mean, stats = _states(q, k, v, plan, settings)
    d_q, d_k = (torch.empty(q.shape, device=q.device, dtype=q.dtype) for _ in range(2))
    d_v, d_local, d_gate = (
        q.new_empty(0) if x is None else torch.empty(v.shape, device=q.device, dtype=x.dtype) for x in (v, local, gate)
    )
    # With a gate alone, what reaches o is not written by itself: it goes where the gradient of a local term would.
    d_out = torch.empty(v.shape, device=q.device, dtype=q.dtype) if local is None and gate is not None else d_local
    d_out = grad if local is None and gate is None else d_out
    d_state_part, d_key_part = (plan.empty(q, plan.count, plan.splits, n) for n in (plan.BD * plan.BE, plan.BD))
    terms = (q if local is None else local, q if gate is None else gate)
    flags = {"LOCAL": local is not None, "GATE": gate is not None}
    _read_backward[plan.grid](
        grad, q, state, key, plan.table, *terms, d_out, d_gate, d_state_part, d_key_part,
        *_strides(grad), *_strides(q), *_strides(terms[0]), *_strides(terms[1]),
        plan.N, plan.heads, plan.chunk, *plan.place, settings.eps, WRITE=d_out is not grad, **flags, **plan.constants,
    )  # fmt: skip
    d_state, d_key = plan.empty(q, plan.count, plan.BD * plan.BE), plan.empty(q, plan.count, plan.BD)
    inner = plan.empty(q, plan.count, plan.tiles)
    _combine_backward[(plan.tiles, plan.count)](
        d_state_part, d_key_part, state, key, d_state, d_key, inner, plan.splits,
        BD=plan.BD, BE=plan.BE, ROWS=plan.rows,
    )  # fmt: skip
    weights = {"WEIGHTS": settings.token_weights}
    d_mean_part = plan.empty(q, plan.count, plan.splits, plan.BD)
    _state_backward[plan.grid](
        k, v, mean, stats, plan.table, d_state, d_key, inner, d_k, d_v, d_mean_part, *_strides(k), *_strides(v),
        plan.N, plan.heads, plan.chunk, plan.tiles, *plan.place, plan.scale, **weights, **plan.constants,
    )  # fmt: skip
    _query_backward[plan.grid](
        d_out, q, state, key, plan.table, d_mean_part, d_q, *_strides(d_out), *_strides(q),
        plan.N, plan.heads, plan.chunk, plan.splits, *plan.place, settings.eps, **weights, **plan.constants,
    )  # fmt: skip
    return d_q, d_k, d_v, d_local, d_gate
