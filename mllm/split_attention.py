"""Attention of a prompt whose visual tokens see a window of their picture, in some of the heads only.

Text and visual queries are computed apart: a visual query only in the heads that are kept, and only with the keys that
it may see. This is the attention of YOPO (arXiv:2410.06169).
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.mllm.attention import allowed_keys
from zoo.mllm.grids import Grid
from zoo.mllm.kept import Kept
from zoo.mllm.layout import TokenLayout


@dataclass(frozen=True)
class Split:
    """Where the text and the visual tokens of a batch are.

    Attributes:
        layout: of the batch.
        text: text tokens, without padding.
        visual: visual tokens.
        text_rows: (T,) int64, places of the text in the batch taken as one sequence.
        visual_rows: (N,) int64, places of the visual tokens in it.
        grids: of the pictures, for windows.
    """

    layout: TokenLayout
    text: Kept
    visual: Kept
    text_rows: Tensor
    visual_rows: Tensor
    grids: tuple[Grid, ...] = ()

    @classmethod
    def of(cls, layout: TokenLayout, grids: tuple[Grid, ...] = ()) -> "Split":
        """From the layout of a batch with images."""
        is_text = layout.valid & ~layout.is_image
        rows = (mask.flatten().nonzero()[:, 0] for mask in (is_text, layout.is_image))
        return cls(layout, Kept.of(is_text), Kept.of(layout.is_image), *rows, grids)


@dataclass(frozen=True)
class Heads:
    """Which heads of a layer visual tokens have.

    Attributes:
        kept: (K,) int64, of the queries.
        pruned: (heads,) bool, the others.
        kv: (K,) int64, the key head of each kept one.
        kept_kv: int64, the key heads of kept ones, once each.
        renorm: in a pruned head, text attends to text alone; False: what it attends to visual tokens is lost, as in the
            authors' code.
    """

    kept: Tensor
    pruned: Tensor
    kv: Tensor
    kept_kv: Tensor
    renorm: bool

    @classmethod
    def of(cls, kept: Tensor, heads: int, kv_heads: int, renorm: bool) -> "Heads":
        """From the kept ones of so many heads."""
        pruned = torch.ones(heads, dtype=torch.bool, device=kept.device).index_fill(0, kept, False)
        kv = kept // (heads // kv_heads)
        return cls(kept, pruned, kv, kv.unique(), renorm)


def split_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    split: Split,
    heads: Heads,
    radius: int,
    scaling: float,
) -> Tensor:
    """Attention of a prompt.

    Args:
        query: (B, heads, L, D).
        key: (B, kv heads, L, D).
        value: as key.
        mask: (B or 1, 1, L, L), bool or added to the logits; None for causal.
        split: of the batch.
        heads: that visual tokens have.
        radius: of the window in a picture, in rows and columns; negative for what the mask says.
        scaling: of the logits.

    Returns:
        (B, L, heads, D), zeros for padding, and for visual tokens in pruned heads.
    """
    batch, count, length, dim = query.shape
    shape = (batch, length, count, dim)
    image = split.layout.is_image[:, None, None, :]
    text = split.text.take_heads(query)
    out = attend(text, key, value, allowed_keys(mask, split.text, length)[:, None], scaling, image, heads)
    out = split.text.put(out.flatten(2), query.new_zeros(batch, length, count * dim)).view(shape)
    if not len(heads.kept):
        return out
    query, key, value = query[:, heads.kept], key[:, heads.kv], value[:, heads.kv]
    if radius < 0:
        seen = F.scaled_dot_product_attention(
            split.visual.take_heads(query), key, value, allowed_keys(mask, split.visual, length)[:, None], scale=scaling
        )
        seen = split.visual.put(
            seen.transpose(1, 2).flatten(2), query.new_zeros(batch, length, len(heads.kept) * dim)
        ).unflatten(2, (-1, dim))
        return out.index_add(2, heads.kept, seen)
    for one in split.grids:
        row, end = one.row, one.start + one.rows * one.columns
        before = split.layout.valid[row, : one.start]
        parts = (x[row, :, :end] for x in (query, key, value))
        out[row, one.start : end][:, heads.kept] = _window(*parts, before, one, radius, scaling).transpose(0, 1)
    return out


def attend(
    query: Tensor, key: Tensor, value: Tensor, allowed: Tensor, scaling: float, image: Tensor, heads: Heads
) -> Tensor:
    """Attention of text, whose pruned heads get nothing from visual tokens.

    Args:
        query: (B, heads, Q, D).
        key: (B, kv heads, L, D).
        value: as key.
        allowed: (B or 1, 1, Q, L) bool.
        scaling: of the logits.
        image: (B, 1, 1, L) bool, which keys are visual tokens.
        heads: that visual tokens have.

    Returns:
        (B, Q, heads, D).
    """
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) if groups > 1 else x for x in (key, value))
    gone = heads.pruned[:, None, None] & image
    if heads.renorm:
        allowed = allowed & ~gone
    else:
        value = value.masked_fill(gone.transpose(-1, -2), 0.0)
    return F.scaled_dot_product_attention(query, key, value, allowed, scale=scaling).transpose(1, 2)


def _window(
    query: Tensor, key: Tensor, value: Tensor, before: Tensor, picture: Grid, radius: int, scaling: float
) -> Tensor:
    """Attention of a picture: all that is before it, and of itself a window; (K, N, D).

    Each row of the picture is multiplied with the rows that are near it, of which columns that are far are masked.

    Args:
        query: (K, S + N, D), of what is before the picture and of the picture.
        key: as query.
        value: as query.
        before: (S,) bool, what is no padding of what is before.
        picture: of N tokens.
        radius: of the window.
        scaling: of the logits.
    """
    start, rows, columns = len(before), picture.rows, picture.columns
    grid = query[:, start:].unflatten(1, (rows, columns))
    near_key, near_value = (_bands(x[:, start:].unflatten(1, (rows, columns)), radius) for x in (key, value))
    row, column = (torch.arange(size, device=query.device) for size in (rows, columns))
    band = row[:, None] + torch.arange(-radius, radius + 1, device=query.device)  # (rows, bands), the rows near each
    near = ((band >= 0) & (band < rows))[:, None, :, None] & ((column[:, None] - column).abs() <= radius)[:, None]
    logits = torch.cat(
        [
            (query[:, start:] @ key[:, :start].transpose(1, 2)).masked_fill(~before, -torch.inf),
            (grid @ near_key.transpose(-1, -2)).masked_fill(~near.flatten(2), -torch.inf).flatten(1, 2),
        ],
        -1,
    )
    accurate = torch.promote_types(logits.dtype, torch.float32)
    weights = (scaling * logits.to(accurate)).softmax(-1).to(value.dtype)
    far, close = weights[..., :start], weights[..., start:].unflatten(1, (rows, columns))
    return far @ value[:, :start] + (close @ near_value).flatten(1, 2)


def _bands(x: Tensor, radius: int) -> Tensor:
    """(K, rows, bands x columns, D): for each row of x (K, rows, columns, D) the rows near it, zeros outside."""
    padded = F.pad(x, (0, 0, 0, 0, radius, radius))
    return padded.unfold(1, 2 * radius + 1, 1).permute(0, 1, 4, 2, 3).flatten(2, 3)
