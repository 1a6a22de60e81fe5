"""Keys and values in a few bits, finer for the important tokens: a cache layer of transformers."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from zoo.mllm.kept import Kept

WHOLE = 16  # bits that mean: as the model computes them


@dataclass
class Packed:
    """Numbers in 2, 4 or 8 bits, or as they were.

    Channel-separable tokenwise quantisation (ZipCache, arXiv:2405.14256): each channel is divided by the root of its
    largest magnitude, then a token's channels share a scale and an offset.

    Attributes:
        codes: (B, heads, S, D * bits / 8) uint8; or the numbers (B, heads, S, D) themselves.
        scale: (B, heads, S, 1) float32; None for numbers as they were.
        offset: (B, heads, S, 1) float32.
        channel: (B, heads, 1, D) float32.
    """

    codes: Tensor
    scale: Tensor | None = None
    offset: Tensor | None = None
    channel: Tensor | None = None

    @classmethod
    def of(cls, x: Tensor, bits: int) -> "Packed":
        """From (B, heads, S, D); D times bits must be a multiple of 8."""
        if bits == WHOLE or not x.shape[2]:
            return cls(x.contiguous())
        largest = x.float().abs().amax(2, keepdim=True)
        channel = torch.where(largest > 0, largest, 1.0).sqrt()
        even = x.float() / channel
        offset, top = even.aminmax(dim=-1, keepdim=True)
        scale = (top - offset) / (2**bits - 1)
        levels = ((even - offset) / torch.where(scale > 0, scale, 1.0)).round().to(torch.uint8)
        shifts = torch.arange(0, 8, bits, device=x.device)
        codes = (levels.unflatten(-1, (-1, 8 // bits)) << shifts).sum(-1).to(torch.uint8)
        return cls(codes, scale, offset, channel)

    def numbers(self, dtype: torch.dtype) -> Tensor:
        """(B, heads, S, D)."""
        if self.scale is None:
            return self.codes.to(dtype)
        bits = 8 * self.codes.shape[-1] // self.channel.shape[-1]
        shifts = torch.arange(0, 8, bits, device=self.codes.device, dtype=torch.uint8)
        levels = (self.codes[..., None] >> shifts & 2**bits - 1).flatten(-2)
        return ((levels * self.scale + self.offset) * self.channel).to(dtype)


@dataclass
class Block:
    """Neighbouring tokens of which some are stored finer than the others.

    Attributes:
        index: (B, S) int64, the tokens' places: the important ones' first.
        fine: keys and values of the important ones.
        coarse: keys and values of the others.
    """

    index: Tensor
    fine: tuple[Packed, Packed]
    coarse: tuple[Packed, Packed]

    @classmethod
    def of(cls, states: tuple[Tensor, Tensor], important: Tensor, high: int, low: int) -> "Block":
        """From keys and values (B, heads, S, D) and (B, S) bool.

        Of rows with fewer important tokens, the last others are stored finely too.
        """
        count = int(important.sum(1).max())
        order = important.int().argsort(dim=1, stable=True).flip(1)
        fine, coarse = (
            tuple(Packed.of(_take(x, places), bits) for x in states)
            for places, bits in ((order[:, :count], high), (order[:, count:], low))
        )
        return cls(order, fine, coarse)

    def write(self, out: tuple[Tensor, Tensor]) -> None:
        """Put keys and values into (B, heads, S, D) each."""
        for x, fine, coarse in zip(out, self.fine, self.coarse):
            split = fine.codes.shape[2]
            for packed, places in ((fine, self.index[:, :split]), (coarse, self.index[:, split:])):
                x.scatter_(2, _over(places, x), packed.numbers(x.dtype))


class MixedLayer(DynamicLayer):
    """A prompt's keys and values in few bits, and those of later tokens, first as they are, then in few bits too.

    ``keys`` and ``values`` are what is stored as it is: the latest tokens.

    Args:
        filled: the layer that holds the prompt.
        important: (B, S) bool, of its tokens.
        valid: (B, S) bool, which of them are no padding.
        high: bits for the important ones: 2, 4, 8, or 16 for as they are.
        low: bits for the others; 0 leaves them out.
    """

    def __init__(self, filled: DynamicLayer, important: Tensor, valid: Tensor, high: int, low: int) -> None:
        super().__init__()
        states = (filled.keys, filled.values)
        self.lazy_initialization(*states)
        self.keys, self.values = (x.new_empty(*x.shape[:2], 0, x.shape[3]) for x in states)  # no view of all that was
        self.high, self.low, self.length = high, low, states[0].shape[2]
        self.kept: Kept | None = None  # of the prompt, what is stored; None for all
        if not low:
            self.kept = Kept.of(important)
            states = tuple(_take(x, self.kept.index) for x in states)
            valid, important = self.kept.valid, torch.ones_like(self.kept.valid)
        # Padding has no say in how coarsely the others are stored.
        states = tuple(x.masked_fill(~valid[:, None, :, None], 0.0) for x in states)
        self.blocks = [Block.of(states, important, high, low or high)]
        self.queries: list[Tensor] = []  # of the latest tokens

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append, and give all keys and values (B, heads, S, D)."""
        self.length += key_states.shape[2]
        self.keys = torch.cat([self.keys, key_states], 2)
        self.values = torch.cat([self.values, value_states], 2)
        packed, latest = sum(block.index.shape[1] for block in self.blocks), self.keys.shape[2]
        shape = (*self.keys.shape[:2], packed + latest, self.keys.shape[3])
        out = self.keys.new_empty(shape), self.values.new_empty((*shape[:3], self.values.shape[3]))
        start = 0
        for block in self.blocks:
            stop = start + block.index.shape[1]
            block.write(tuple(x[:, :, start:stop] for x in out))
            start = stop
        for x, new in zip(out, (self.keys, self.values)):
            x[:, :, start:] = new
        return out

    def compress(self, important: Tensor) -> None:
        """Store the latest tokens in few bits, given which are important (B, S) bool."""
        self.blocks.append(Block.of((self.keys, self.values), important, self.high, self.low or self.high))
        self.keys, self.values = (x.new_empty(*x.shape[:2], 0, x.shape[3]) for x in (self.keys, self.values))
        self.queries = []

    def get_seq_length(self) -> int:
        """The tokens that were appended, also those that are no longer stored."""
        return self.length

    def reset(self) -> None:
        """Not supported."""
        raise ValueError("ZipVL's cache cannot be used for another prompt: make a new one.")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take other rows, for beam search."""
        self._change_rows(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        self._change_rows(lambda x: x.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Take some rows only."""
        self._change_rows(lambda x: x[indices])

    def _change_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        self.keys, self.values = change(self.keys), change(self.values)
        self.queries = [change(query) for query in self.queries]
        if self.kept is not None:
            self.kept = Kept(change(self.kept.index), change(self.kept.valid))
        for block in self.blocks:
            block.index = change(block.index)
            for packed in (*block.fine, *block.coarse):
                for name, x in vars(packed).items():
                    setattr(packed, name, None if x is None else change(x))

    @property
    def bytes(self) -> int:
        """What is stored of keys and values, with all that is needed to read them."""
        tensors = [self.keys, self.values, *self.queries, *(block.index for block in self.blocks)]
        for block in self.blocks:
            tensors += [x for packed in (*block.fine, *block.coarse) for x in vars(packed).values() if x is not None]
        return sum(x.nbytes for x in tensors)


def cache_bytes(cache: Cache) -> int:
    """Bytes of the keys and values of all layers."""
    layers = (layer for layer in cache.layers if layer.is_initialized)
    return sum(
        layer.bytes if isinstance(layer, MixedLayer) else layer.keys.nbytes + layer.values.nbytes for layer in layers
    )


def _over(places: Tensor, x: Tensor) -> Tensor:
    """Places (B, S) for a gather from, or a scatter into, dimension 2 of (B, heads, any, D)."""
    return places[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])


def _take(x: Tensor, places: Tensor) -> Tensor:
    return x.gather(2, _over(places, x))
