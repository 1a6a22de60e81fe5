"""Attention in which visual tokens have a window and fewer heads, against the full computation with masks."""

import pytest
import torch

from zoo.mllm import masks
from zoo.mllm.grids import Grid
from zoo.mllm.layout import TokenLayout
from zoo.mllm.split_attention import Heads, Split, split_attention

GRID = (3, 4)
ROW = [1, 1, *[9] * 12, 2, 2, *[9] * 12, 3]  # two pictures
LAYOUT = TokenLayout.from_ids(
    torch.tensor([ROW, [0] * 12 + [1, 1, *[9] * 12, 2, 2, 3]]), [9], torch.tensor([[1] * 29, [0] * 12 + [1] * 17])
)
GRIDS = (Grid(0, 2, *GRID), Grid(0, 16, *GRID), Grid(1, 14, *GRID))


def full(query, key, value, allowed, pruned, renorm, scaling):
    """Softmax over all, then what the rules say, without any care for time."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    image = LAYOUT.is_image
    gone = torch.zeros(query.shape[1], dtype=torch.bool)
    gone[list(pruned)] = True
    to_image = gone[:, None, None] & image[:, None, None, :]
    logits = scaling * query @ key.transpose(-1, -2)
    logits = logits.masked_fill(~allowed[:, None], -torch.inf)
    if renorm:
        logits = logits.masked_fill(to_image, -torch.inf)
    weights = logits.softmax(-1).masked_fill(to_image, 0.0)
    out = (weights @ value).masked_fill(gone[:, None, None] & image[:, None, :, None], 0.0)
    return out.transpose(1, 2)


@pytest.mark.parametrize("renorm", [False, True], ids=["lost", "renorm"])
@pytest.mark.parametrize("pruned", [(), (1,), (0, 1), (2, 1, 3), (0, 1, 2, 3)], ids=str)
@pytest.mark.parametrize("radius", [-1, 0, 1, 2])
@pytest.mark.parametrize("kind", [torch.bool, torch.float64, None])
def test_leaving_out_is_masking(radius, pruned, renorm, kind):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, heads, 29, 8, generator=generator, dtype=torch.float64) for heads in (4, 2, 2))
    causal = masks.causal(LAYOUT)
    allowed = causal if radius < 0 else masks.neighbour(LAYOUT, GRID, radius)
    mask = None if kind is None else causal[:, None]
    if kind is torch.float64:
        mask = torch.zeros(mask.shape, dtype=kind).masked_fill(~mask, torch.finfo(kind).min)
    kept = torch.tensor([head for head in range(4) if head not in pruned], dtype=torch.long)
    split = Split.of(LAYOUT, GRIDS)
    out = split_attention(query, key, value, mask, split, Heads.of(kept, 4, 2, renorm), radius, 0.3)
    want = full(query, key, value, allowed, pruned, renorm, 0.3)
    rows = LAYOUT.valid if kind else torch.tensor([[True], [False]]) & LAYOUT.valid  # causal alone knows no padding
    torch.testing.assert_close(out[rows], want[rows])
    assert (out[:, :, kept] != 0).any() or not len(kept)
