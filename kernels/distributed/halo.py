"""Convolutions and the like over a map that is split into strips of rows."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from zoo.kernels.distributed.exchange import exchange
from zoo.kernels.distributed.strips import Strips


def with_halo(function: Callable[[Tensor], Tensor], x: Tensor, reach: int, strips: Strips) -> Tensor:
    """What a function of the whole map gives in the rows of this rank.

    The function is called on the strip while the rows of other ranks are under way; the rows of the result that depend
    on those are then computed again. So there is no second copy of the strip, unless a rank has less than two reaches.

    Args:
        function: (B, H, W, C) to (B, H, W, C'), any H of at least 1: takes what is outside the map as zeros, and of a
            map that continues differently changes no row farther than ``reach`` from there. Its result is new memory.
        x: the strip (B, h, W, C).
        reach: in rows.
        strips: of the map.

    Returns:
        (B, h, W, C').
    """
    h = x.shape[1]
    spans = [(start - reach, stop + reach) if start < stop else (0, 0) for start, stop in strips.spans]
    finish = fetch(x, spans, strips)
    # All ranks the same way: their graphs must be alike for what follows a gradient, such as its all-reduce.
    if min(strips.heights) < max(2 * reach, 1):
        above, below = finish()
        rows = torch.cat((above, x, below), 1)
        if rows.shape[1] == 0:
            rows = F.pad(rows, (0, 0, 0, 0, 0, 1))
        return function(rows)[:, above.shape[1] : above.shape[1] + h]
    y = function(x)
    above, below = finish()
    first, last = y[:, :0], y[:, :0]
    if above.shape[1]:
        band = function(torch.cat((above, x[:, : 2 * reach]), 1))
        first = band[:, above.shape[1] : above.shape[1] + reach]
    if below.shape[1]:
        last = function(torch.cat((x[:, h - 2 * reach :], below), 1))[:, reach : 2 * reach]
    return _Replace.apply(y, first, last)


class _Replace(torch.autograd.Function):
    """A map (B, H, W, C) whose first and last rows are put in place of those that it has, without a copy.

    The map must not be used, nor have been kept for a backward pass; results of convolutions are not kept.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, first: Tensor, last: Tensor) -> Tensor:
        ctx.rows = (first.shape[1], y.shape[1] - last.shape[1])
        y = y.detach()
        y[:, : ctx.rows[0]] = first
        y[:, ctx.rows[1] :] = last
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        stop, start = ctx.rows
        d_y = grad.clone()
        d_y[:, :stop] = 0
        d_y[:, start:] = 0
        return d_y, grad[:, :stop], grad[:, start:]


def strided(
    function: Callable[[Tensor], Tensor], x: Tensor, size: int, stride: int, padding: int, strips: Strips
) -> Tensor:
    """What a convolution of the whole map gives in the rows of this rank, which are ``strips.reduced(stride)``.

    Args:
        function: the convolution without padding of rows: (B, H, W, C) to (B, (H - size) // stride + 1, W', C').
        x: the strip (B, h, W, C).
        size: rows of its kernel.
        stride: in rows.
        padding: rows of zeros above the map; below, as many as make the result ceil(H / stride) rows.
        strips: of the map that it reads.

    Returns:
        (B, h', W', C').
    """
    out = strips.reduced(stride)
    spans = [
        (start * stride - padding, (stop - 1) * stride - padding + size) if start < stop else (0, 0)
        for start, stop in out.spans
    ]
    above, below = fetch(x, spans, strips)()
    first, last = spans[strips.rank]
    own = x[:, max(first - strips.start, 0) : max(last - strips.start, 0)]
    rows = torch.cat((above, own, below), 1)
    zeros = (max(-first, 0), max(last - strips.total, 0)) if out.height else (0, size)
    if any(zeros):
        rows = F.pad(rows, (0, 0, 0, 0, *zeros))
    return function(rows)[:, : out.height]


def fetch(x: Tensor, spans: Sequence[tuple[int, int]], strips: Strips) -> Callable[[], tuple[Tensor, Tensor]]:
    """Ask other ranks for rows.

    Args:
        x: the strip (B, h, W, C).
        spans: first row and end of what each rank wants, known to all; outside the map, and what it has, is left out.
        strips: of the map.

    Returns:
        What waits for the rows and gives those before and those after this rank's own, (B, rows, W, C) each.

    Raises:
        ValueError: the strip has not the rows that it should.
    """
    if x.shape[1] != strips.height:
        raise ValueError(f"The strip of rank {strips.rank} has {x.shape[1]} rows, expected {strips.height}.")
    ranks = range(len(spans))
    parts = [[_overlap(spans[to], strips, source) if source != to else (0, 0) for to in ranks] for source in ranks]
    if not any(stop > start for row in parts for start, stop in row):
        return lambda: (x[:, :0], x[:, :0])
    sent, received = parts[strips.rank], [row[strips.rank] for row in parts]
    rows = torch.cat([x[:, start:stop] for start, stop in sent], 1).transpose(0, 1)  # (rows, B, W, C)
    sent, received = ([stop - start for start, stop in spans] for spans in (sent, received))
    finish = exchange(rows, sent, received, strips.group)
    return lambda: finish().transpose(0, 1).tensor_split([sum(received[: strips.rank])], 1)


def _overlap(span: tuple[int, int], strips: Strips, rank: int) -> tuple[int, int]:
    """What of a span a rank holds, counted from its own first row."""
    start, stop = strips.bounds[rank : rank + 2]
    first, last = max(span[0], start) - start, min(span[1], stop) - start
    return (first, last) if first < last else (0, 0)
