"""Softmax attention over tokens that are split over ranks: ring attention.

Liu, Zaharia, Abbeel: Ring Attention with Blockwise Transformers for Near-Infinite Context, arXiv:2310.01889. Keys and
values go from rank to rank. Each block is attended to while the next one is under way, and the results are put together
by the logarithms of their sums of exponentials. The backward pass sends the gradients of keys and values after them.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch import distributed as dist
from torch.autograd.function import once_differentiable

from zoo.kernels.distributed.exchange import Transfer
from zoo.kernels.library import accumulation_dtype, check_shape

aten = torch.ops.aten
_ALIGNMENT = 32  # queries, of the logarithms that PyTorch's memory-efficient attention takes back


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, group: dist.ProcessGroup, tokens: Sequence[int]) -> Tensor:
    """``softmax(q k^T / sqrt(D)) v`` over the tokens of all ranks.

    Args:
        q: the queries of this rank (B, H, N, D), float32, bfloat16 or float16.
        k: its keys, likewise.
        v: its values, likewise.
        group: the processes.
        tokens: N of each rank; may be 0.

    Returns:
        (B, H, N, D) in the dtype of q.

    Raises:
        ValueError: q, k and v are not alike, or N is not what ``tokens`` says.
    """
    expected = (*q.shape[:2], tokens[dist.get_rank(group)], q.shape[-1])
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_shape("softmax_attention", name, x, expected, "(B, H, tokens of this rank, D)")
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    return _Ring.apply(q, k, v, group, list(tokens))


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, group: dist.ProcessGroup, tokens: list[int]) -> Tensor:
        out = q.new_zeros(q.shape, dtype=accumulation_dtype(q.dtype))
        log_sum = out.new_full(q.shape[:3], -math.inf)
        for keys, values in _blocks(k, v, group, tokens):
            if q.shape[2] and keys.shape[2]:
                block, block_sum = _attend(q, keys, values)
                both = torch.logaddexp(log_sum, block_sum)
                out = out * (log_sum - both).exp().unsqueeze(-1) + block * (block_sum - both).exp().unsqueeze(-1)
                log_sum = both
        out = out.to(q.dtype)
        ctx.group, ctx.tokens = group, tokens
        ctx.save_for_backward(q, k, v, out, log_sum)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        q, k, v, out, log_sum = ctx.saved_tensors
        group, tokens = ctx.group, ctx.tokens
        grad = grad.contiguous()
        d_q = out.new_zeros(q.shape, dtype=log_sum.dtype)
        under_way = None
        for step, (keys, values) in enumerate(_blocks(k, v, group, tokens)):
            d_block = keys.new_zeros(2, *keys.shape, dtype=d_q.dtype)
            if q.shape[2] and keys.shape[2]:
                d_query, *d_keys = _attend_backward(grad, q, keys, values, out, log_sum)
                d_q += d_query
                d_block += torch.stack(d_keys)
            if under_way is not None:
                d_block += _unpacked(under_way.finish(), d_block)
            under_way = _pass_on(d_block, group, tokens, step)
        own = k.new_empty(2, *k.shape)
        d_k, d_v = _unpacked(under_way.finish(), own).to(k.dtype)
        return d_q.to(q.dtype), d_k, d_v, None, None


def _blocks(k: Tensor, v: Tensor, group: dist.ProcessGroup, tokens: list[int]) -> Iterator[tuple[Tensor, Tensor]]:
    """Keys and values of every rank, this one's first, then that of the rank before, and so on."""
    block = torch.stack((k, v))
    for step in range(len(tokens)):
        following = _pass_on(block, group, tokens, step) if step + 1 < len(tokens) else None
        yield block.unbind(0)
        if following is not None:
            coming = tokens[(dist.get_rank(group) - step - 1) % len(tokens)]
            block = _unpacked(following.finish(), block.new_empty(*block.shape[:3], coming, block.shape[4]))


def _pass_on(block: Tensor, group: dist.ProcessGroup, tokens: list[int], step: int) -> Transfer:
    """Send the block (2, B, H, N, D) that came ``step`` steps far to the next rank, and get that of the rank before."""
    ranks, rank = len(tokens), dist.get_rank(group)
    sent, received = [0] * ranks, [0] * ranks
    sent[(rank + 1) % ranks] = tokens[(rank - step) % ranks]
    received[(rank - 1) % ranks] = tokens[(rank - step - 1) % ranks]
    return Transfer(block.permute(3, 0, 1, 2, 4), sent, received, group)  # tokens first


def _unpacked(rows: Tensor, like: Tensor) -> Tensor:
    return rows.permute(1, 2, 3, 0, 4).reshape(like.shape)


def _kernel(q: Tensor) -> str:
    if q.device.type == "cpu":
        return "cpu"
    return "flash" if q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] % 8 == 0 else "efficient"


def _attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Attention (B, H, N, D), and the logarithms of the sums of exponentials (B, H, N)."""
    if _kernel(q) == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    if _kernel(q) == "flash":
        return aten._scaled_dot_product_flash_attention(q, k, v)[:2]
    out, log_sum, *_ = aten._scaled_dot_product_efficient_attention(q, k, v, None, True)
    return out, log_sum[..., : q.shape[2]]


def _attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values of one block, from the result and the logarithms of all blocks."""
    if _kernel(q) == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(grad, q, k, v, out, log_sum, 0.0, False)
    if _kernel(q) == "flash":
        no_dropout = torch.zeros(2, dtype=torch.uint64, device=q.device)
        lengths = (None, None, q.shape[2], k.shape[2])
        return aten._scaled_dot_product_flash_attention_backward(
            grad, q, k, v, out, log_sum, *lengths, 0.0, False, no_dropout, no_dropout
        )
    no_dropout = torch.zeros((), dtype=torch.int64, device=q.device)
    log_sum = F.pad(log_sum, (0, -log_sum.shape[2] % _ALIGNMENT), value=math.inf)
    return aten._scaled_dot_product_efficient_attention_backward(
        grad, q, k, v, None, out, log_sum, no_dropout, no_dropout, 0.0, [True, True, True, False]
    )[:3]
