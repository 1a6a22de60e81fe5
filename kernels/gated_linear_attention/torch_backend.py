"""Gated linear attention as matrix products over chunks of tokens, with a backward pass that recomputes them.

Inside a chunk every pair of tokens (query t, earlier key j) needs the decay of the tokens j + 1 to t. Pairs are taken
level by level: at level h the chunk falls into blocks of 2h tokens, and a pair belongs to the level where t is in the
right half and j in the left half of one block. There the decay is a product of two that meet in the middle,

    prefix_t = decay of the right half's tokens up to t, t included
    suffix_j = decay of the left half's tokens after j

so that a level is one matrix product. Both are products of numbers up to 1, never a quotient or a difference: however
strong the decay, nothing overflows and nothing cancels. Chunks are joined by their states in the same way.

The names are those of the formulas in ``reference.py``; a leading d is a gradient.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.kernels.library import accumulation_dtype

CHUNK = 32


class _Pass:
    """What the forward and the backward pass share, in the accumulation dtype: chunks, decays, states.

    Chunked tensors are (B, H, chunks, tokens of a chunk, channels); padding has k = 0 and decay 1, which changes no
    state.
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor | None) -> None:
        self.dtype = accumulation_dtype(q.dtype)
        self.tokens = q.shape[1]
        self.chunk = min(CHUNK, 1 << (self.tokens - 1).bit_length())
        self.q, self.k, self.v = self.split(q), self.split(k), self.split(v)
        self.prefix = self.split(log_decay).exp()
        self.suffix = torch.ones_like(self.prefix)
        B, H, chunks, _, D = self.q.shape
        self.states = self.q.new_empty(B, H, chunks + 1, D, v.shape[-1])  # before each chunk, and the last
        self.states[:, :, 0] = 0 if state is None else state

    def split(self, x: Tensor) -> Tensor:
        """(B, N, H, C) to chunks in the accumulation dtype, padded with zeros."""
        x = F.pad(x.transpose(1, 2).to(self.dtype), (0, 0, 0, -self.tokens % self.chunk))
        return x.unflatten(2, (-1, self.chunk)).contiguous()

    def join(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Chunks to (B, N, H, C)."""
        return x.flatten(2, 3)[:, :, : self.tokens].transpose(1, 2).to(dtype).contiguous()

    def levels(self) -> Iterator[int]:
        """The half sizes h of blocks; meanwhile the decays are those of halves, and at the end those of chunks."""
        h = 1
        while h < self.chunk:
            yield h
            left, right = halves(self.prefix, h)
            halves(self.suffix, h)[0].mul_(right[..., -1:, :])
            right *= left[..., -1:, :]
            h *= 2

    def scan(self) -> None:
        """Fill in the states, once the decays are those of chunks."""
        self.decay = self.prefix[..., -1, :, None]  # (B, H, chunks, D, 1)
        updates = (self.k * self.suffix).transpose(-1, -2) @ self.v
        for i in range(updates.shape[2]):
            torch.addcmul(updates[:, :, i], self.states[:, :, i], self.decay[:, :, i], out=self.states[:, :, i + 1])


def halves(x: Tensor, h: int) -> tuple[Tensor, Tensor]:
    """The left and the right half of every block of 2h tokens: views (..., blocks, h, channels)."""
    left, right = x.unflatten(-2, (-1, 2, h)).unbind(-3)
    return left, right


def corners(x: Tensor, h: int) -> Tensor:
    """Of matrices over the tokens of a chunk, the parts right half by left half: a view (..., blocks, h, h)."""
    blocks = x.unflatten(-1, (-1, 2, h)).unflatten(-4, (-1, 2, h))[..., 1, :, :, 0, :]
    return blocks.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)


def forward(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, initial_state: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """As ``gated_linear_attention``."""
    run = _Pass(q, k, v, log_decay, initial_state)
    out = _weights(run) @ run.v
    run.scan()
    out += (run.q * run.prefix) @ run.states[:, :, :-1]
    return run.join(out.mul_(scale), q.dtype), run.states[:, :, -1].clone()


def _weights(run: _Pass) -> Tensor:
    """What every token of a chunk takes of the values in it, a lower triangle; leaves the decays of chunks."""
    weights = torch.diag_embed((run.q * run.k).sum(-1))
    for h in run.levels():
        query, key = halves(run.q, h)[1] * halves(run.prefix, h)[1], halves(run.k, h)[0] * halves(run.suffix, h)[0]
        corners(weights, h).copy_(query @ key.transpose(-1, -2))
    return weights


def backward(
    grad: Tensor,
    d_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    initial_state: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, log_decay and the initial state."""
    run = _Pass(q, k, v, log_decay, initial_state)
    d_out = run.split(grad) * scale
    d_weights = d_out @ run.v.transpose(-1, -2)
    own = d_weights.diagonal(dim1=-2, dim2=-1)[..., None]
    d_q, d_k, d_g = own * run.k, own * run.q, torch.zeros_like(run.q)
    weights = torch.diag_embed((run.q * run.k).sum(-1))
    for h in run.levels():
        (_, q_), (k_, _), (_, d_q_), (d_k_, _), (before, after) = (halves(x, h) for x in (run.q, run.k, d_q, d_k, d_g))
        prefix, suffix = halves(run.prefix, h)[1], halves(run.suffix, h)[0]
        query, key, d_pairs = q_ * prefix, k_ * suffix, corners(d_weights, h)
        corners(weights, h).copy_(query @ key.transpose(-1, -2))
        d_query, d_key = d_pairs @ key, d_pairs.transpose(-1, -2) @ query
        d_q_ += d_query * prefix
        d_k_ += d_key * suffix
        after += _from_here_on(d_query * query)
        before += _before_here(d_key * key)
    run.scan()

    query, key = run.q * run.prefix, run.k * run.suffix
    d_states = torch.empty_like(run.states)
    d_states[:, :, -1] = 0 if d_state is None else d_state
    reads = query.transpose(-1, -2) @ d_out
    for i in reversed(range(reads.shape[2])):
        torch.addcmul(reads[:, :, i], d_states[:, :, i + 1], run.decay[:, :, i], out=d_states[:, :, i])
    states, d_next = run.states[:, :, :-1], d_states[:, :, 1:]
    d_query, d_key = d_out @ states.transpose(-1, -2), run.v @ d_next.transpose(-1, -2)
    d_q += d_query * run.prefix
    d_k += d_key * run.suffix
    d_v = weights.transpose(-1, -2) @ d_out + key @ d_next
    d_g += _from_here_on(d_query * query) + _before_here(d_key * key)
    d_g += (states * run.decay * d_next).sum(-1)[..., None, :]
    grads = (run.join(d, x.dtype) for d, x in ((d_q, q), (d_k, k), (d_v, v), (d_g, log_decay)))
    return *grads, d_states[:, :, 0].clone()


def _from_here_on(x: Tensor) -> Tensor:
    """For every token the sum over it and the later ones."""
    return x.flip(-2).cumsum(-2).flip(-2)


def _before_here(x: Tensor) -> Tensor:
    """For every token the sum over the earlier ones."""
    return F.pad(x[..., :-1, :].cumsum(-2), (0, 0, 1, 0))


def forward_both(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, log_decay_reverse: Tensor, scale: float) -> Tensor:
    """As ``bidirectional_gated_linear_attention``: the tokens and, as further pictures, their mirror in one pass."""
    out, _ = forward(*_mirrored(q, k, v, log_decay, log_decay_reverse), None, scale)
    return _folded(out).to(q.dtype)


def backward_both(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, log_decay_reverse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and of both decays."""
    tensors = _mirrored(q, k, v, log_decay, log_decay_reverse)
    *d_qkv, d_decay, _ = backward(torch.cat([grad, grad.flip(1)]), None, *tensors, None, scale)
    d_q, d_k, d_v = (_folded(d).to(x.dtype) for d, x in zip(d_qkv, (q, k, v), strict=True))
    ahead, back = d_decay.chunk(2)
    return d_q, d_k, d_v, ahead.to(log_decay.dtype, copy=True), back.flip(1).to(log_decay_reverse.dtype)


def _mirrored(q: Tensor, k: Tensor, v: Tensor, ahead: Tensor, back: Tensor) -> list[Tensor]:
    """q, k, v and the decay (2B, N, H, C), in the accumulation dtype: as they are, and with the tokens in reverse."""
    dtype = accumulation_dtype(q.dtype)
    pairs = (q, q), (k, k), (v, v), (ahead, back)
    return [torch.cat([x.to(dtype), y.to(dtype).flip(1)]) for x, y in pairs]


def _folded(x: Tensor) -> Tensor:
    """The sum of both directions, in the order of the tokens."""
    ahead, back = x.chunk(2)
    return ahead + back.flip(1)
