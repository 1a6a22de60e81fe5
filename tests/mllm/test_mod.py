"""The router's rules and ARank on matrices made by hand."""

from types import SimpleNamespace

import pytest
import torch

from zoo.mllm import FastV, MoD, TokenLayout, accelerate, arank

IDS = torch.tensor([[1, 9, 9, 9, 9, 9, 2], [0, 1, 9, 9, 9, 2, 2]])
LAYOUT = TokenLayout.from_ids(IDS, [9], IDS != 0)


def logits_of(p):
    return torch.stack([torch.log1p(-p), p.log()], -1)


def test_top_k_skips_the_lowest():
    p = torch.tensor([[0.1, 0.5, 0.2, 0.9, 0.3, 0.4, 0.1], [0.1, 0.1, 0.8, 0.7, 0.6, 0.1, 0.1]])
    kept = MoD(0.5).route(logits_of(p), LAYOUT)
    assert [(~row).nonzero()[:, 0].tolist() for row in kept] == [[2, 4], [4]]


def test_the_ratio_is_exact():
    """In float32, 75 * 0.84 is less than 63."""
    layout = TokenLayout.from_ids(torch.full((1, 75), 9), [9])
    assert (~MoD(0.84).route(torch.zeros(1, 75, 2), layout)).sum() == 63


def test_a_threshold_keeps_what_is_above():
    p = torch.tensor([[0.1, 0.5001, 0.2, 0.9, 0.3, 0.4, 0.1], [0.1, 0.1, 0.8, 0.7, 0.6, 0.1, 0.1]])
    kept = MoD(select="threshold").route(logits_of(p), LAYOUT)
    assert [(~row).nonzero()[:, 0].tolist() for row in kept] == [[2, 4, 5], []]


def test_the_loss_is_the_cross_entropy_of_the_selection():
    p = torch.tensor([[0.25, 0.5], [0.8, 0.9]])
    kept = torch.tensor([[False, True], [True, False]])
    mean = -(torch.tensor([0.75, 0.5, 0.8, 0.1]).log().mean())
    both = {3: (logits_of(p), kept), 4: (logits_of(p), kept)}
    torch.testing.assert_close(MoD(aux_weight=0.1).loss(both), 0.2 * mean)


class Attending(torch.nn.Module):
    def __init__(self, *attentions):
        super().__init__()
        self.attentions = attentions

    def forward(self, **kwargs):
        return SimpleNamespace(attentions=self.attentions)


def test_arank_of_matrices_made_by_hand():
    first = torch.zeros(4, 4)
    first[1:, 0] = 1.0  # all to the first token: rank 1 of at most 3
    before = torch.zeros(4, 4)
    before[[1, 2, 3], [0, 1, 2]] = 1.0  # each to the one before it: rank 3
    itself = torch.eye(4)  # the diagonal does not count
    layer = torch.stack([first, before])[None]
    mask = {"attention_mask": torch.ones(1, 4)}
    ranks = arank(Attending(layer, itself.expand(1, 2, 4, 4)), [mask, mask])
    assert ranks == pytest.approx([(1 / 3 + 1) / 2, 0.0])
    padded = torch.nn.functional.pad(layer, (2, 0, 2, 0), value=0.5)
    assert arank(Attending(padded), [{"attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1]])}]) == pytest.approx(
        ranks[:1]
    )
    assert arank(Attending(layer), [{}]) == pytest.approx(ranks[:1])


def test_arank_of_a_model(build):
    ids = torch.tensor([[1, 5, 6, 7, 8, 9]])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    ranks = arank(build("llava", "eager"), [batch])
    assert len(ranks) == 5 and all(0 < rank <= 1 for rank in ranks)
    with pytest.raises(ValueError, match="attn_implementation='eager'"):
        arank(Attending(), [batch])
    with pytest.raises(ValueError, match="got no batches"):
        arank(Attending(), [])


def test_wrong_options_are_named(build):
    model = build("llava")
    for options, message in [
        ({"ratio": 1}, "ratio is 1, expected at least 0 and less than 1"),
        ({"select": "all"}, "select is 'all', expected 'topk'"),
        ({"layers": [0, 2]}, "layer 0 cannot route"),
        ({"positions": "new"}, "positions is 'new', expected 'keep' or 'compact'"),
    ]:
        with pytest.raises(ValueError, match=message):
            MoD(**options)
    with pytest.raises(ValueError, match=r"layers are \[2, 5\], but the decoder has layers 1 to 4"):
        accelerate(model, depth=MoD(layers=[2, 5]))
    with pytest.raises(ValueError, match="no layer of a decoder with 5 layers is left to route"):
        accelerate(model, depth=MoD(layers=[]))
    with pytest.raises(ValueError, match="FastV at layer 3 needs the attention of layer 2, in which MoD skips"):
        accelerate(model, FastV(layer=3), MoD(layers=[2]))
    with pytest.raises(ValueError, match="positions of Qwen's models have several axes: take positions='keep'"):
        accelerate(build("qwen2_vl"), depth=MoD(positions="compact"))
    with accelerate(model) as handle, pytest.raises(RuntimeError, match="There is no loss"):
        handle.loss()
    assert accelerate(model, depth=MoD()).remove() is None  # published layers: all but the first three and the last
    assert MoD().attach(model.get_decoder()) == {3}
