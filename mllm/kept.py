"""Part of a batch's tokens, and everything that goes with the tokens cut down to it."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from zoo.mllm.layout import TokenLayout


@dataclass(frozen=True)
class Kept:
    """The tokens that a layer sees.

    Attributes:
        index: (B, M) int64, their positions in the sequence before; rows with fewer are filled up on the left.
        valid: (B, M) bool, False where filled up.
    """

    index: Tensor
    valid: Tensor

    @classmethod
    def of(cls, mask: Tensor) -> "Kept":
        """From (B, L) bool."""
        size = int(mask.sum(1).max())
        order = mask.int().argsort(dim=1, stable=True)[:, -size:]  # the kept ones come last, in their order
        return cls(order, mask.gather(1, order))

    @cached_property
    def all_valid(self) -> bool:
        """Whether every row keeps the same number."""
        return bool(self.valid.all())

    def take(self, x: Tensor, dim: int = 1) -> Tensor:
        """The kept tokens of x, whose batch is dimension 0 (or 1, for positions of several axes) of any size."""
        batch_dim = dim - 1
        shape = list(x.shape)
        shape[batch_dim] = len(self.index)
        index = self.index.view(*(1,) * batch_dim, *self.index.shape, *(1,) * (x.ndim - dim - 1))
        shape[dim] = self.index.shape[1]
        return x.expand(*shape[:dim], x.shape[dim], *shape[dim + 1 :]).gather(dim, index.expand(shape))

    def take_heads(self, x: Tensor) -> Tensor:
        """The kept tokens of queries, keys or values (B, heads, L, D)."""
        return self.take(x.transpose(1, 2)).transpose(1, 2)

    def put(self, x: Tensor, whole: Tensor) -> Tensor:
        """The whole (B, L, C), with x (B, M, C) in the places of the kept tokens."""
        fill = whole.new_zeros(len(whole), 1, whole.shape[2])  # one place more, for what only fills up
        index = torch.where(self.valid, self.index, whole.shape[1])[..., None].expand_as(x)
        return torch.cat([whole, fill], 1).scatter(1, index, x)[:, :-1]

    def then(self, inner: "Kept") -> "Kept":
        """What is kept of what is kept."""
        return Kept(self.index.gather(1, inner.index), self.valid.gather(1, inner.index) & inner.valid)


def hide(mask: Tensor, valid: Tensor) -> Tensor:
    """A mask, bool or additive, that also forbids what is not valid."""
    return mask & valid if mask.dtype == torch.bool else mask.masked_fill(~valid, torch.finfo(mask.dtype).min)


def layout_of(layout: TokenLayout, kept: Kept) -> TokenLayout:
    """The layout of what is kept."""
    valid = kept.take(layout.valid) & kept.valid
    ends = valid & (kept.index == layout.prompt_end[:, None])
    end = torch.where(ends.any(1), ends.int().argmax(1), -1)
    return TokenLayout(valid, torch.where(valid, kept.take(layout.image), -1), end)


def mask_of(mask: Tensor | None, kept: Kept, length: int, flat: bool = False) -> Tensor | None:
    """The mask of an attention over the kept ones of so many tokens; None, before and after, for a causal one.

    Args:
        mask: (B or 1, 1, L, L); or flat (B, L), True where a causal attention may look.
        kept: the tokens.
        length: L.
        flat: whether the attention takes flat masks.
    """
    if mask is None and kept.all_valid:
        return None
    if flat:
        return kept.valid  # padding is never kept
    if mask is None:
        mask = torch.ones(length, length, dtype=torch.bool, device=kept.index.device).tril()[None, None]
    return take_mask(mask, kept)


def take_mask(mask: Tensor, kept: Kept) -> Tensor:
    """Rows and columns (dimensions 2 and 3) of the kept tokens; what only fills up is seen by nothing."""
    mask = mask.expand(len(kept.index), -1, -1, -1)
    index = kept.index[:, None]
    size = index.shape[-1]
    rows = mask.gather(2, index[..., None].expand(-1, mask.shape[1], size, mask.shape[3]))
    both = rows.gather(3, index[:, :, None].expand(-1, mask.shape[1], size, size))
    return hide(both, kept.valid[:, None, None])
