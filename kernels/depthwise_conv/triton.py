"""The depthwise convolution in Triton, on channels-last memory.

A program makes ``ROWS`` rows of ``COLUMNS`` columns of ``CHANNELS`` channels of the result. All taps and the sums of
all rows stay in registers: an input row is loaded (and converted) once for each horizontal tap and serves every output
row that it reaches, a few multiplications per load. With a dilation d the rows of a program are d apart, which makes
their inputs d apart as well. The gradient of the input is the same kernel with the taps turned around.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

PARTS = 1056  # programs of the weight gradient: 8 for each of the 132 multiprocessors of a large GPU


@triton.jit
def _conv(
    x, weight, bias, y, x_b, x_h, x_w, H, W, C, out_h, out_w,
    K: tl.constexpr, STRIDE: tl.constexpr, DILATION: tl.constexpr, RESIDUAL: tl.constexpr, BIAS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """y = convolution of x; weight is (K K, C) in float32."""
    pid, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    blocks_c, blocks_w = tl.cdiv(C, CHANNELS), tl.cdiv(out_w, COLUMNS)
    c = (pid % blocks_c) * CHANNELS + tl.arange(0, CHANNELS)
    j = (pid // blocks_c % blocks_w) * COLUMNS + tl.arange(0, COLUMNS)
    band = pid // (blocks_c * blocks_w)  # of ROWS rows that are DILATION apart
    i0 = band // DILATION * (ROWS * DILATION) + band % DILATION
    in_c = c < C
    taps = ()
    for t in tl.static_range(K * K):
        tap = tl.load(weight + t * C + c, mask=in_c, other=0.0)
        taps = taps + (tap + 1.0 if RESIDUAL and t == K * K // 2 else tap,)
    first = tl.zeros((COLUMNS, CHANNELS), tl.float32)
    if BIAS:
        first += tl.load(bias + c, mask=in_c, other=0.0)[None, :]
    sums = ()
    for _ in tl.static_range(ROWS):
        sums = sums + (first,)
    x += b * x_b + c[None, :]
    for r in tl.static_range(STRIDE * (ROWS - 1) + K):
        row = i0 * STRIDE + (r - K // 2) * DILATION
        in_row = (row >= 0) & (row < H)
        for v in tl.static_range(K):
            column = j * STRIDE + (v - K // 2) * DILATION
            valid = (in_row & (column >= 0) & (column < W))[:, None] & in_c[None, :]
            values = tl.load(x + row.to(tl.int64) * x_h + column[:, None] * x_w, mask=valid, other=0.0).to(tl.float32)
            updated = ()
            for i in tl.static_range(ROWS):
                if r - STRIDE * i >= 0 and r - STRIDE * i < K:
                    updated = updated + (sums[i] + values * taps[(r - STRIDE * i) * K + v][None, :],)
                else:
                    updated = updated + (sums[i],)
            sums = updated
    for i in tl.static_range(ROWS):
        row = i0 + i * DILATION
        target = y + ((b * out_h + row) * out_w + j[:, None]) * C + c[None, :]
        tl.store(target, sums[i].to(y.dtype.element_ty), mask=((row < out_h) & (j < out_w))[:, None] & in_c[None, :])


@triton.jit
def _conv_weight(
    grad, x, part, g_b, g_h, g_w, x_b, x_h, x_w, tiles, H, W, C,
    K: tl.constexpr, DILATION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """part[p] = gradients of the K K taps and of the bias, summed over every tile that falls to program p; stride 1."""
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    in_c = c < C
    blocks_w, bands = tl.cdiv(W, COLUMNS), tl.cdiv(H, ROWS * DILATION) * DILATION
    zero = tl.zeros((COLUMNS, CHANNELS), tl.float32)
    taps = ()
    for _ in tl.static_range(K * K + 1):
        taps = taps + (zero,)
    for tile in range(tl.program_id(1), tiles, tl.num_programs(1)):
        j = tile % blocks_w * COLUMNS + tl.arange(0, COLUMNS)
        band = tile // blocks_w % bands
        b = (tile // (blocks_w * bands)).to(tl.int64)
        i0 = band // DILATION * (ROWS * DILATION) + band % DILATION
        in_w = (j < W)[:, None] & in_c[None, :]
        grads = ()
        total = taps[K * K]
        for i in tl.static_range(ROWS):
            row = i0 + i * DILATION
            place = grad + b * g_b + row.to(tl.int64) * g_h + j[:, None] * g_w + c[None, :]
            g = tl.load(place, mask=in_w & (row < H), other=0.0).to(tl.float32)
            grads = grads + (g,)
            total += g
        updated = ()
        for t in tl.static_range(K * K):
            updated = updated + (taps[t],)
        for r in tl.static_range(ROWS - 1 + K):
            row = i0 + (r - K // 2) * DILATION
            in_row = (row >= 0) & (row < H)
            for v in tl.static_range(K):
                column = j + (v - K // 2) * DILATION
                valid = (in_row & (column >= 0) & (column < W))[:, None] & in_c[None, :]
                place = x + b * x_b + row.to(tl.int64) * x_h + column[:, None] * x_w + c[None, :]
                values = tl.load(place, mask=valid, other=0.0).to(tl.float32)
                step = ()
                for t in tl.static_range(K * K):
                    if t % K == v and r - t // K >= 0 and r - t // K < ROWS:
                        step = step + (updated[t] + values * grads[r - t // K],)
                    else:
                        step = step + (updated[t],)
                updated = step
        taps = updated + (total,)
    for t in tl.static_range(K * K + 1):
        tl.store(part + (tl.program_id(1) * (K * K + 1) + t) * C + c, tl.sum(taps[t], 0), mask=in_c)


def _shape(size: int) -> dict[str, int]:
    """Rows, columns and channels of a program: two channels and one column per thread."""
    return {"ROWS": 8 if size <= 5 else 6, "COLUMNS": 4, "CHANNELS": 64, "num_warps": 4}


def _unit(x: Tensor) -> Tensor:
    """The tensor with neighbouring channels neighbouring in memory, as the kernels need."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, dilation: int, residual: bool, flip: bool = False
) -> Tensor:
    x = _unit(x)
    batch, height, width, channels = x.shape
    size = weight.shape[-1]
    taps = weight.view(channels, size * size).t().float()
    taps = (taps.flip(0) if flip else taps).contiguous()
    out_height, out_width = (-(-side // stride) for side in (height, width))
    y = x.new_empty(batch, out_height, out_width, channels)
    shape = _shape(size)
    bands = triton.cdiv(out_height, shape["ROWS"] * dilation) * dilation
    blocks = triton.cdiv(channels, shape["CHANNELS"]) * triton.cdiv(out_width, shape["COLUMNS"]) * bands
    _conv[(blocks, batch)](
        x, taps, taps if bias is None else bias, y, *x.stride()[:3], height, width, channels, out_height, out_width,
        K=size, STRIDE=stride, DILATION=dilation, RESIDUAL=residual, BIAS=bias is not None, **shape,
    )  # fmt: skip
    return y


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, dilation: int, residual: bool) -> Tensor:
    """As ``depthwise_conv2d``."""
    return _convolve(x, weight, bias, stride, dilation, residual)


def backward(
    grad: Tensor, x: Tensor, weight: Tensor, has_bias: bool, stride: int, dilation: int, residual: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias for stride 1; the last is empty without a bias."""
    grad, x = _unit(grad), _unit(x)
    grad_x = _convolve(grad, weight, None, 1, dilation, residual, flip=True)
    batch, height, width, channels = x.shape
    size = weight.shape[-1]
    shape = _shape(size)
    blocks = triton.cdiv(channels, shape["CHANNELS"])
    bands = triton.cdiv(height, shape["ROWS"] * dilation) * dilation
    tiles = batch * bands * triton.cdiv(width, shape["COLUMNS"])
    parts = min(tiles, max(1, PARTS // blocks))
    part = torch.empty(parts, size * size + 1, channels, device=x.device, dtype=torch.float32)
    _conv_weight[(blocks, parts)](
        grad, x, part, *grad.stride()[:3], *x.stride()[:3], tiles, height, width, channels,
        K=size, DILATION=dilation, **shape,
    )  # fmt: skip
    sums = part.sum(0)
    grad_weight = sums[:-1].t().reshape(weight.shape).to(weight.dtype)
    return grad_x, grad_weight, sums[-1].to(weight.dtype) if has_bias else weight.new_empty(0)
