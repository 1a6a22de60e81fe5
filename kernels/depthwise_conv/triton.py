"""The depthwise convolution in Triton, on channels-last memory.

The work is bound by instructions long before it is bound by memory: a 7x7 convolution multiplies 49 times for 4 bytes
of traffic in bfloat16. So every loaded (and converted) number has to serve many multiplications, in both directions:

- A lane holds a few channels and makes ``SPAN`` neighbouring columns of a row, from ``SPAN + K - 1`` loaded columns.
- Up to 7x7 (``_conv``) it keeps all taps in registers and goes down a strip of ``rows`` rows with a window of K rows of
  sums: an input row is loaded once, adds to all rows of the window, and completes the oldest of them. The next row is
  loaded before the arithmetic of this one, which hides the way to memory. Rows above and below the map are left out.
- For 11x11 and 21x21 (``_conv_large``) the 121 or 441 taps of a channel do not fit into registers, nor K rows of sums.
  A lane makes ``ROWS x SPAN`` results. For each input row it loads one row of K taps per row of results: a tap serves
  SPAN multiplications, an input ROWS times K of them. The same taps come back with the next input row, from the L1
  cache: ROWS K CHANNELS float32 numbers, 22 KB for 21x21. They lie one after another for each block of channels, with
  ROWS - 1 rows of zeros above and below, so that no load needs a mask or any arithmetic for its address.
- The gradient of the weight (``_conv_weight``) keeps the sums of ``TAPS x TAPS`` taps in registers (all up to 7x7)
  and a window of as many rows of the gradient, while it goes down the rows of the input.

With a dilation d, the rows and the columns of a lane are d apart, which makes their inputs d apart as well. The
gradient of the input is the convolution with the taps turned around; with a stride of 2 it sees the gradient spread
out, with zeros between (``SPREAD``). No argument that depends on the size of the map is specialised or a constant: a
new resolution does not compile again.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels.launch import Launch, with_unit_channels

PROGRAMS = 1056  # at least as many, if the rows allow: 8 for each of the 132 multiprocessors of a large GPU
PARTS = 528  # programs of the weight gradient; each writes its sums
REGISTER_SIZE = 7  # the taps of a larger kernel do not fit into registers

_SIZES = ("b_x", "h_x", "w_x", "b_gate", "h_gate", "w_gate", "b_grad", "h_grad", "w_grad", "H", "W", "out_h", "out_w",
          "rows", "tiles")  # fmt: skip


def _kernel(function):
    """Compile a kernel without a look at the values of its sizes: they differ from picture to picture."""
    return triton.jit(function, do_not_specialize=[name for name in _SIZES if name in function.__code__.co_varnames])


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "gelu":
        return 0.5 * x * (1 + tl.math.erf(x * 0.7071067811865476))
    elif ACTIVATION == "silu":
        return x * tl.sigmoid(x)
    else:
        return x


@triton.jit
def _slope(x, ACTIVATION: tl.constexpr):
    """The derivative of the activation."""
    if ACTIVATION == "gelu":
        return 0.5 * (1 + tl.math.erf(x * 0.7071067811865476)) + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif ACTIVATION == "silu":
        s = tl.sigmoid(x)
        return s * (1 + x * (1 - s))
    else:
        return x * 0 + 1.0


@triton.jit
def _first(lane, count, DILATION: tl.constexpr):
    """The first of the ``count`` positions, DILATION apart, that fall to a lane."""
    return lane // DILATION * (count * DILATION) + lane % DILATION


@triton.jit
def _row(x, row, j, h, w, H, W, in_c, COUNT: tl.constexpr, DILATION: tl.constexpr, SPREAD: tl.constexpr):
    """COUNT columns of a row from j on, DILATION apart; zeros outside the map, and between spread tokens."""
    in_row = (row >= 0) & (row < H) & (row % SPREAD == 0)
    x += (row // SPREAD).to(tl.int64) * h
    values = ()
    for q in tl.static_range(COUNT):
        column = j + q * DILATION
        valid = in_row & (column >= 0) & (column < W) & (column % SPREAD == 0)
        place = x + (column // SPREAD)[:, None] * w
        values = values + (tl.load(place, mask=valid[:, None] & in_c[None, :], other=0.0),)
    return values


@triton.jit
def _put(
    total, y, gate, grad, d_gate, row, j, h_gate, w_gate, h_grad, w_grad, out_w, C, valid,
    ACTIVATION: tl.constexpr, GATE: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """y = activation(total) * gate; backward the gradients of total, into y, and of the gate."""
    place = row.to(tl.int64) * out_w * C + j[:, None] * C
    if GATE:
        factor = tl.load(gate + row.to(tl.int64) * h_gate + j[:, None] * w_gate, mask=valid, other=0.0).to(tl.float32)
    if BACKWARD:
        result = tl.load(grad + row.to(tl.int64) * h_grad + j[:, None] * w_grad, mask=valid, other=0.0).to(tl.float32)
        if GATE:
            d_factor = result * _activate(total, ACTIVATION)
            tl.store(d_gate + place, d_factor.to(d_gate.dtype.element_ty), mask=valid)
            result *= factor
        result *= _slope(total, ACTIVATION)
    else:
        result = _activate(total, ACTIVATION)
        if GATE:
            result *= factor
    tl.store(y + place, result.to(y.dtype.element_ty), mask=valid)


@_kernel
def _conv(
    x, taps, bias, gate, grad, y, d_gate, b_x, h_x, w_x, b_gate, h_gate, w_gate, b_grad, h_grad, w_grad,
    H, W, C, out_h, out_w, rows,
    K: tl.constexpr, STRIDE: tl.constexpr, DILATION: tl.constexpr, SPREAD: tl.constexpr, ALIGN: tl.constexpr,
    FLIP: tl.constexpr, RESIDUAL: tl.constexpr, BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
    GATE: tl.constexpr, BACKWARD: tl.constexpr, SPAN: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Up to 7x7; taps is (K K, C) in float32, and a step of the loop reads STRIDE rows of x."""
    WINDOW: tl.constexpr = (K + STRIDE - 1) // STRIDE  # rows of the result that a step adds to
    WIDTH: tl.constexpr = STRIDE * (SPAN - 1) + K
    h_x, w_x = h_x * ALIGN, w_x * ALIGN
    blocks_c = tl.cdiv(C, CHANNELS)
    blocks_w = tl.cdiv(tl.cdiv(out_w, SPAN * DILATION) * DILATION, COLUMNS)
    bands = tl.cdiv(out_h, rows * DILATION) * DILATION
    pid = tl.program_id(0)
    c = pid % blocks_c * CHANNELS + tl.arange(0, CHANNELS)
    j = _first(pid // blocks_c % blocks_w * COLUMNS + tl.arange(0, COLUMNS), SPAN, DILATION)
    i = _first(pid // (blocks_c * blocks_w) % bands, rows, DILATION)
    b = (pid // (blocks_c * blocks_w * bands)).to(tl.int64)
    in_c = c < C
    zero = tl.zeros((COLUMNS, CHANNELS), tl.float32)
    every = tl.zeros((COLUMNS, 1), tl.int32) + c[None, :]  # the layout of x: no exchange between threads
    weights = ()
    for t in tl.static_range(K * K):
        tap = tl.load(taps + (K * K - 1 - t if FLIP else t) * C + every, mask=every < C, other=0.0)
        weights = weights + (tap + 1.0 if RESIDUAL and t == K * K // 2 else tap,)
    shift = zero
    if BIAS:
        shift = tl.load(bias + every, mask=every < C, other=0.0).to(tl.float32)
    x += b * (b_x * ALIGN) + c[None, :]
    gate += b * (b_gate * ALIGN) + c[None, :]
    grad += b * (b_grad * ALIGN) + c[None, :]
    y += b * out_h * out_w * C + c[None, :]
    d_gate += b * out_h * out_w * C + c[None, :]
    h_gate, w_gate = h_gate * ALIGN, w_gate * ALIGN
    h_grad, w_grad = h_grad * ALIGN, w_grad * ALIGN

    # Steps that read at least one row of the map. Before and after them x is zero.
    start = tl.maximum((K // 2 - STRIDE * i // DILATION) // STRIDE, 0)
    stop = tl.minimum(rows + WINDOW - 1, (K // 2 + (H - 1 - STRIDE * i) // DILATION) // STRIDE + 1)
    top = STRIDE * i - K // 2 * DILATION
    left = STRIDE * j - K // 2 * DILATION
    ahead = ()
    for e in tl.static_range(STRIDE):
        first = top + (STRIDE * start + e) * DILATION
        ahead = ahead + _row(x, first, left, h_x, w_x, H, W, in_c, WIDTH, DILATION, SPREAD)
    window = ()  # row a of it belongs to row ``step - a`` of the strip
    for _ in tl.static_range((WINDOW - 1) * SPAN):
        window = window + (zero,)
    for step in range(start, stop):
        values = ahead
        ahead = ()
        for e in tl.static_range(STRIDE):
            row = top + (STRIDE * (step + 1) + e) * DILATION
            ahead = ahead + _row(x, row, left, h_x, w_x, H, W, in_c, WIDTH, DILATION, SPREAD)
        sums = ()
        for _ in tl.static_range(SPAN):
            sums = sums + (zero,)
        sums = sums + window
        for t in tl.static_range(STRIDE * K):
            updated = ()
            for s in tl.static_range(WINDOW * SPAN):
                if s // SPAN * STRIDE + t // K < K:
                    value = values[t // K * WIDTH + s % SPAN * STRIDE + t % K].to(tl.float32)
                    updated = updated + (sums[s] + value * weights[(s // SPAN * STRIDE + t // K) * K + t % K],)
                else:
                    updated = updated + (sums[s],)
            sums = updated
        done = step - (WINDOW - 1)
        row = i + done * DILATION
        for p in tl.static_range(SPAN):
            column = j + p * DILATION
            valid = ((done >= 0) & (done < rows) & (row < out_h) & (column < out_w))[:, None] & in_c[None, :]
            _put(sums[(WINDOW - 1) * SPAN + p] + shift, y, gate, grad, d_gate, row, column,
                 h_gate, w_gate, h_grad, w_grad, out_w, C, valid, ACTIVATION, GATE, BACKWARD)  # fmt: skip
        window = ()
        for s in tl.static_range((WINDOW - 1) * SPAN):
            window = window + (sums[s],)
    # What the rows below the map would have completed.
    for s in tl.static_range((WINDOW - 1) * SPAN):
        if s // SPAN >= WINDOW - 1 - (K // 2 + STRIDE - 1) // STRIDE:
            done = stop - 1 - s // SPAN
            row = i + done * DILATION
            column = j + s % SPAN * DILATION
            valid = ((done >= 0) & (done < rows) & (row < out_h) & (column < out_w))[:, None] & in_c[None, :]
            _put(window[s] + shift, y, gate, grad, d_gate, row, column,
                 h_gate, w_gate, h_grad, w_grad, out_w, C, valid, ACTIVATION, GATE, BACKWARD)  # fmt: skip


@_kernel
def _conv_large(
    x, taps, bias, gate, grad, y, d_gate, b_x, h_x, w_x, b_gate, h_gate, w_gate, b_grad, h_grad, w_grad,
    H, W, C, out_h, out_w,
    K: tl.constexpr, STRIDE: tl.constexpr, DILATION: tl.constexpr, SPREAD: tl.constexpr, ALIGN: tl.constexpr,
    BIAS: tl.constexpr, ACTIVATION: tl.constexpr, GATE: tl.constexpr, BACKWARD: tl.constexpr,
    ROWS: tl.constexpr, SPAN: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Above 7x7; taps is (blocks of channels, above + K + above, K, CHANNELS) in float32, zeros above and below."""
    WIDTH: tl.constexpr = STRIDE * (SPAN - 1) + K
    ABOVE: tl.constexpr = STRIDE * (ROWS - 1)
    h_x, w_x = h_x * ALIGN, w_x * ALIGN
    blocks_w = tl.cdiv(tl.cdiv(out_w, SPAN * DILATION) * DILATION, COLUMNS)
    bands = tl.cdiv(out_h, ROWS * DILATION) * DILATION
    blocks_c = tl.cdiv(C, CHANNELS)
    pid = tl.program_id(0)
    others = tl.num_programs(0) // blocks_c
    block = pid // others  # programs side by side share the taps in the cache
    c = block * CHANNELS + tl.arange(0, CHANNELS)
    j = _first(pid % blocks_w * COLUMNS + tl.arange(0, COLUMNS), SPAN, DILATION)
    i = _first(pid // blocks_w % bands, ROWS, DILATION)
    b = (pid % others // (blocks_w * bands)).to(tl.int64)
    in_c = c < C
    x += b * (b_x * ALIGN) + c[None, :]
    gate += b * (b_gate * ALIGN) + c[None, :]
    grad += b * (b_grad * ALIGN) + c[None, :]
    y += b * out_h * out_w * C + c[None, :]
    d_gate += b * out_h * out_w * C + c[None, :]
    h_gate, w_gate = h_gate * ALIGN, w_gate * ALIGN
    h_grad, w_grad = h_grad * ALIGN, w_grad * ALIGN
    zero = tl.zeros((COLUMNS, CHANNELS), tl.float32)
    every = tl.zeros((COLUMNS, 1), tl.int32) + c[None, :]  # the layout of x: no exchange between threads
    taps += block * ((ABOVE + K + ABOVE) * K * CHANNELS - CHANNELS) + every
    shift = zero
    if BIAS:
        shift = tl.load(bias + every, mask=every < C, other=0.0).to(tl.float32)

    start = tl.maximum(K // 2 - STRIDE * i // DILATION, 0)  # the first row of the window that lies in the map
    stop = tl.minimum(ABOVE + K, K // 2 + (H - 1 - STRIDE * i) // DILATION + 1)
    top = STRIDE * i - K // 2 * DILATION
    left = STRIDE * j - K // 2 * DILATION
    sums = ()
    for _ in tl.static_range(ROWS * SPAN):
        sums = sums + (zero,)
    for m in range(start, stop):
        values = _row(x, top + m * DILATION, left, h_x, w_x, H, W, in_c, WIDTH, DILATION, SPREAD)
        updated = ()
        for s in tl.static_range(ROWS):
            part = ()
            for p in tl.static_range(SPAN):
                part = part + (sums[s * SPAN + p],)
            row_of_taps = taps + (m + (ABOVE - STRIDE * s)) * (K * CHANNELS)
            for v in tl.static_range(K):
                tap = tl.load(row_of_taps + v * CHANNELS)
                step = ()
                for p in tl.static_range(SPAN):
                    step = step + (part[p] + values[p * STRIDE + v].to(tl.float32) * tap,)
                part = step
            updated = updated + part
        sums = updated
    for s in tl.static_range(ROWS * SPAN):
        row = i + s // SPAN * DILATION
        column = j + s % SPAN * DILATION
        valid = ((row < out_h) & (column < out_w))[:, None] & in_c[None, :]
        _put(sums[s] + shift, y, gate, grad, d_gate, row, column,
             h_gate, w_gate, h_grad, w_grad, out_w, C, valid, ACTIVATION, GATE, BACKWARD)  # fmt: skip


@_kernel
def _conv_weight(
    grad, x, part, b_grad, h_grad, w_grad, b_x, h_x, w_x, tiles, rows, H, W, C, out_h, out_w,
    K: tl.constexpr, STRIDE: tl.constexpr, DILATION: tl.constexpr, ALIGN: tl.constexpr,
    TAPS: tl.constexpr, SPAN: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """part[p] = gradients of the K K taps and of the bias, summed over every tile that falls to program p.

    A program has TAPS x TAPS of the taps. Row a of its window is row ``step - a`` of a strip of the gradient, and meets
    row e of the STRIDE rows of x of the step under row ``STRIDE * a + e`` of its taps.
    """
    WIDTH: tl.constexpr = STRIDE * (SPAN - 1) + TAPS
    WINDOW: tl.constexpr = (TAPS + STRIDE - 1) // STRIDE
    GROUPS: tl.constexpr = (K + TAPS - 1) // TAPS  # of rows, and of columns of taps
    h_x, w_x, b_x = h_x * ALIGN, w_x * ALIGN, b_x * ALIGN
    h_grad, w_grad = h_grad * ALIGN, w_grad * ALIGN
    b_grad = b_grad * ALIGN
    up = tl.program_id(0) % GROUPS * TAPS
    across = tl.program_id(0) // GROUPS % GROUPS * TAPS
    c = tl.program_id(0) // (GROUPS * GROUPS) * CHANNELS + tl.arange(0, CHANNELS)
    in_c = c < C
    blocks_w = tl.cdiv(tl.cdiv(out_w, SPAN * DILATION) * DILATION, COLUMNS)
    bands = tl.cdiv(out_h, rows * DILATION) * DILATION
    zero = tl.zeros((COLUMNS, CHANNELS), tl.float32)
    sums = ()
    for _ in tl.static_range(TAPS * TAPS):
        sums = sums + (zero,)
    total = zero
    for tile in range(tl.program_id(1), tiles, tl.num_programs(1)):
        j = _first(tile % blocks_w * COLUMNS + tl.arange(0, COLUMNS), SPAN, DILATION)
        i = _first(tile // blocks_w % bands, rows, DILATION)
        b = (tile // (blocks_w * bands)).to(tl.int64)
        x_b = x + b * b_x + c[None, :]
        grad_b = grad + b * b_grad + c[None, :]
        bottom = tl.minimum(out_h, i + rows * DILATION)
        top = STRIDE * i + (up - K // 2) * DILATION
        left = STRIDE * j + (across - K // 2) * DILATION
        start, stop = 0, rows + WINDOW - 1
        if GROUPS == 1:  # leave out the steps that read no row of the map
            start = tl.maximum((K // 2 - STRIDE * i // DILATION) // STRIDE, 0)
            stop = tl.minimum(stop, (K // 2 + (H - 1 - STRIDE * i) // DILATION) // STRIDE + 1)
        window = ()
        for a in tl.static_range(1, WINDOW):
            above = tl.where(start >= a, i + (start - a) * DILATION, -1)
            earlier = _row(grad_b, above, j, h_grad, w_grad, bottom, out_w, in_c, SPAN, DILATION, 1)
            for p in tl.static_range(SPAN):
                window = window + (earlier[p].to(tl.float32),)
                total += earlier[p].to(tl.float32)
        ahead = ()
        for e in tl.static_range(STRIDE):
            first = top + (STRIDE * start + e) * DILATION
            ahead = ahead + _row(x_b, first, left, h_x, w_x, H, W, in_c, WIDTH, DILATION, 1)
        ahead = ahead + _row(grad_b, i + start * DILATION, j, h_grad, w_grad, bottom, out_w, in_c, SPAN, DILATION, 1)
        for step in range(start, stop):
            values = ahead
            ahead = ()
            for e in tl.static_range(STRIDE):
                row = top + (STRIDE * (step + 1) + e) * DILATION
                ahead = ahead + _row(x_b, row, left, h_x, w_x, H, W, in_c, WIDTH, DILATION, 1)
            row = i + (step + 1) * DILATION
            ahead = ahead + _row(grad_b, row, j, h_grad, w_grad, bottom, out_w, in_c, SPAN, DILATION, 1)
            grads = ()
            for p in tl.static_range(SPAN):
                g = values[STRIDE * WIDTH + p].to(tl.float32)
                grads = grads + (g,)
                total += g
            grads = grads + window
            for p in tl.static_range(SPAN):
                updated = ()
                for t in tl.static_range(TAPS * TAPS):
                    value = values[t // TAPS % STRIDE * WIDTH + p * STRIDE + t % TAPS].to(tl.float32)
                    updated = updated + (sums[t] + value * grads[t // TAPS // STRIDE * SPAN + p],)
                sums = updated
            window = ()
            for s in tl.static_range((WINDOW - 1) * SPAN):
                window = window + (grads[s],)
    part += tl.program_id(1) * ((K * K + 1) * C) + c
    for t in tl.static_range(TAPS * TAPS):
        u, v = up + t // TAPS, across + t % TAPS
        tl.store(part + (u * K + v) * C, tl.sum(sums[t], 0), mask=in_c & (u < K) & (v < K))
    tl.store(part + K * K * C, tl.sum(total, 0), mask=in_c & (up == 0) & (across == 0))


def _shape(kernel: str, size: int, stride: int, x: Tensor) -> dict[str, int]:
    """What a program makes: rows, columns of a lane, lanes side by side, channels; two channels per thread.

    ``kernel`` is "conv", "epilogue" (the same with an activation or a gate, which need registers), "large" or "weight".
    With these numbers no kernel spills registers on Hopper.
    """
    block = 64 if x.shape[-1] % 64 == 0 else 32
    shape = {"COLUMNS": 128 // block, "CHANNELS": block, "num_warps": 2}
    if kernel == "large":
        return {"ROWS": 2, "SPAN": 4 if x.dtype == torch.float32 else 8, **shape}
    if kernel == "weight":
        taps = triton.cdiv(size, triton.cdiv(size, REGISTER_SIZE))  # blocks of equal size
        return {"rows": 32, "SPAN": 4 if size <= 5 else 3 - stride, "TAPS": taps, **shape}
    narrow = int(x.shape[-1] % 16 > 0)  # loads of one channel take more registers
    if kernel == "conv" and stride == 1:
        return {"rows": 32, "SPAN": {1: 4, 3: 7, 5: 7, 7: 4 - narrow}[size], **shape}
    return {"rows": 32, "SPAN": 2 - narrow if size == 7 else 4, **shape}


def _rows(shape: dict[str, int], height: int, dilation: int, others: int) -> int:
    """Rows of a strip: about as many as the shape says, fewer if the programs would not fill the GPU."""
    height = -(-height // dilation)
    strips = max(-(-height // shape.pop("rows")), min(-(-PROGRAMS // (others * dilation)), -(-height // 8)))
    return -(-height // strips)


def _lanes(width: int, dilation: int, shape: dict[str, int]) -> int:
    """Blocks of ``COLUMNS`` lanes in a row."""
    return triton.cdiv(triton.cdiv(width, shape["SPAN"] * dilation) * dilation, shape["COLUMNS"])


def _align(*tensors: Tensor) -> int:
    """What divides all strides, in elements. Kernels get them divided by it, and so know how wide loads may be."""
    return 8 if all(stride % 8 == 0 for x in tensors for stride in x.stride()[:3]) else 1


class _Convolution:
    """A convolution of arguments like these, or its epilogue backward.

    ``size`` is that of the map of x, which is larger than x itself if its tokens are spread out.
    """

    def __init__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        size: tuple[int, int],
        stride: int = 1,
        dilation: int = 1,
        residual: bool = False,
        activation: str = "none",
        gate: Tensor | None = None,
        grad: Tensor | None = None,
        flip: bool = False,
        spread: int = 1,
    ) -> None:
        batch, _, _, channels = x.shape
        kernel = weight.shape[-1]
        height, width = (-(-side // stride) for side in size)
        self.shape, self.flip, self.residual = (batch, height, width, channels), flip, residual
        self.large = kernel > REGISTER_SIZE
        plain = activation == "none" and gate is None
        shape = _shape("large" if self.large else "conv" if plain else "epilogue", kernel, stride, x)
        self.blocks_c, self.block = triton.cdiv(channels, shape["CHANNELS"]), shape["CHANNELS"]
        others = batch * self.blocks_c * _lanes(width, dilation, shape)
        if self.large:
            rows, sizes, ways = shape["ROWS"], (), {}
            self.above = stride * (rows - 1)
        else:
            rows = _rows(shape, height, dilation, others)
            sizes, ways = (rows,), {"FLIP": flip, "RESIDUAL": residual}
        views = [x if view is None else view for view in (x, gate, grad)]
        align = _align(*views)
        strides = [stride // align for view in views for stride in view.stride()[:3]]
        self.launch = Launch(
            _conv_large if self.large else _conv, (others * triton.cdiv(height, rows * dilation) * dilation,),
            (*strides, *size, channels, height, width, *sizes),
            {
                "K": kernel, "STRIDE": stride, "DILATION": dilation, "SPREAD": spread, "ALIGN": align,
                "BIAS": bias is not None, "ACTIVATION": activation, "GATE": gate is not None,
                "BACKWARD": grad is not None, **ways, **shape,
            },
            x.device,
        )  # fmt: skip

    def __call__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        gate: Tensor | None = None,
        grad: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The result, and with ``grad`` the gradients of what enters the activation and of the gate."""
        y = x.new_empty(self.shape)
        d_gate = y if gate is None or grad is None else gate.new_empty(self.shape)
        taps = self.taps(weight)
        self.launch(
            x, taps, x if bias is None else bias, x if gate is None else gate, x if grad is None else grad, y, d_gate
        )
        return y, d_gate

    def taps(self, weight: Tensor) -> Tensor:
        """The taps in float32 as the kernel reads them."""
        taps = weight.permute(2, 3, 0, 1).to(torch.float32, memory_format=torch.contiguous_format, copy=True)
        if not self.large:
            return taps
        taps, middle = taps.squeeze(-1), weight.shape[-1] // 2
        taps = taps.flip(0, 1) if self.flip else taps
        taps[middle, middle] += self.residual
        padding = self.blocks_c * self.block - self.shape[-1]
        taps = F.pad(taps, (0, padding, 0, 0, self.above, self.above))
        return taps.unflatten(2, (self.blocks_c, -1)).permute(2, 0, 1, 3).contiguous()


@with_unit_channels
def plan_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    dilation: int,
    residual: bool,
    activation: str = "none",
    gate: Tensor | None = None,
) -> Callable[..., Tensor]:
    """A function of arguments like these, as ``depthwise_conv2d``."""
    convolve = _Convolution(x, weight, bias, x.shape[1:3], stride, dilation, residual, activation, gate)

    def run(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: int,
        dilation: int,
        residual: bool,
        activation: str = "none",
        gate: Tensor | None = None,
    ) -> Tensor:
        return convolve(x, weight, bias, gate)[0]

    return run


@with_unit_channels
def plan_epilogue_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    dilation: int,
    residual: bool,
    activation: str,
    gate: Tensor | None,
) -> Callable[..., tuple[Tensor, Tensor]]:
    """A function of arguments like these: gradients of what enters the activation, computed again, and of the gate.

    The latter is empty without a gate.
    """
    convolve = _Convolution(x, weight, bias, x.shape[1:3], stride, dilation, residual, activation, gate, grad)

    def run(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
        gate = rest[-1]
        d_total, d_gate = convolve(x, weight, bias, gate, grad)
        return d_total, x.new_empty(0) if gate is None else d_gate

    return run


@with_unit_channels
def plan_backward(
    grad: Tensor, x: Tensor, weight: Tensor, has_bias: bool, stride: int, dilation: int, residual: bool
) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """A function of arguments like these: gradients of x, weight and bias of the convolution alone.

    The last is empty without a bias.
    """
    convolve = _Convolution(grad, weight, None, x.shape[1:3], 1, dilation, residual, flip=True, spread=stride)
    batch, height, width, channels = grad.shape
    size = weight.shape[-1]
    shape = _shape("weight", size, stride, x)
    blocks_c = triton.cdiv(channels, shape["CHANNELS"])
    programs = blocks_c * triton.cdiv(size, shape["TAPS"]) ** 2
    lanes = _lanes(width, dilation, shape)
    rows = _rows(shape, height, dilation, batch * lanes * programs)
    tiles = batch * lanes * triton.cdiv(height, rows * dilation) * dilation
    parts = min(tiles, max(1, PARTS // programs))
    align = _align(grad, x)
    launch = Launch(
        _conv_weight, (programs, parts), (tiles, rows, *x.shape[1:3], channels, height, width),
        {"K": size, "STRIDE": stride, "DILATION": dilation, "ALIGN": align, **shape},
        x.device, strided=2, unit=align,
    )  # fmt: skip

    def run(grad: Tensor, x: Tensor, weight: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
        grad_x, _ = convolve(grad, weight)
        part = torch.empty(parts, size * size + 1, channels, device=x.device, dtype=torch.float32)
        launch(grad, x, part)
        sums = part.sum(0)
        grad_weight = sums[:-1].t().reshape(weight.shape).to(weight.dtype)
        return grad_x, grad_weight, sums[-1].to(weight.dtype) if has_bias else weight.new_empty(0)

    return run
