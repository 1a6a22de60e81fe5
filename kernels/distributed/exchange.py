"""The one collective of this package: every rank sends rows of a tensor to every other, forward and backward."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.autograd.function import once_differentiable


class Transfer:
    """An all-to-all of rows that is under way.

    Args:
        rows: (R, ...), those for rank 0 first.
        sent: how many rows go to each rank; their sum is R.
        received: how many rows come from each rank.
        group: the processes; each makes the same transfers in the same order.
    """

    def __init__(self, rows: Tensor, sent: Sequence[int], received: Sequence[int], group: dist.ProcessGroup) -> None:
        self.rows = rows.contiguous()  # kept until it is sent
        self.result = rows.new_empty(sum(received), *rows.shape[1:])
        arguments = (self.result, self.rows, list(received), list(sent), group)
        self.work = dist.all_to_all_single(*arguments, async_op=True)

    def finish(self) -> Tensor:
        """Wait; on a GPU the stream does, not this process. (sum(received), ...), from rank 0 first."""
        self.work.wait()
        self.rows = None
        return self.result


class _Start(torch.autograd.Function):
    """The rows that will be there when ``_Finish`` is through; both share a dict that holds the transfer."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], received: list[int], group: Any, shared: dict) -> Tensor:
        ctx.shared = shared
        shared["transfer"] = Transfer(rows, sent, received, group)
        return shared["transfer"].result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple:
        return ctx.shared.pop("transfer").finish(), None, None, None, None


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, result: Tensor, sent: list[int], received: list[int], group: Any, shared: dict) -> Tensor:
        ctx.back = (received, sent, group)
        ctx.shared = shared
        shared.pop("transfer").finish()
        return result.view_as(result)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        ctx.shared["transfer"] = Transfer(grad, *ctx.back)
        return grad, None, None, None, None  # ``_Start`` does not look at it


def exchange(
    rows: Tensor, sent: Sequence[int], received: Sequence[int], group: dist.ProcessGroup
) -> Callable[[], Tensor]:
    """Send rows to all ranks. The backward pass sends the gradients of what came back to where it came from.

    Args:
        rows: (R, ...), those for rank 0 first.
        sent: how many rows go to each rank; their sum is R.
        received: how many rows come from each rank.
        group: the processes; each calls this, and the backward pass, in the same order.

    Returns:
        What waits for the rows and gives them, (sum(received), ...), from rank 0 first. The work between the two calls
        hides the transfer; so does what lies between them in the backward pass.
    """
    arguments = (list(sent), list(received), group, {})
    result = _Start.apply(rows, *arguments)
    return lambda: _Finish.apply(result, *arguments)


def gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The tensors of all ranks, which have one shape: (...) to (ranks, ...); one collective forward, one backward."""
    ranks = dist.get_world_size(group)
    ones = [1] * ranks
    return exchange(x.expand(ranks, *x.shape), ones, ones, group)()
