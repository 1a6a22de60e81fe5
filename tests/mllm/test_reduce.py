"""Which tokens the methods keep, and what they refuse."""

import pytest
import torch

from zoo.mllm import DivPrune, FastV, Random, TokenLayout, Uniform, accelerate, register_family
from zoo.mllm.base import Scene
from zoo.mllm.families import FAMILIES
from zoo.mllm.reduce import parse_reduction

IDS = torch.tensor([[1, 9, 9, 9, 9, 9, 9, 2], [0, 0, 1, 9, 9, 9, 2, 2]])
LAYOUT = TokenLayout.from_ids(IDS, [9], IDS != 0)


def kept(method, hidden=None, attention=None):
    hidden = torch.zeros(*IDS.shape, 4) if hidden is None else hidden
    mask = method.select(Scene(LAYOUT, hidden, attention)).keep
    assert mask[~LAYOUT.is_image].all()
    return [(row & image).nonzero()[:, 0].tolist() for row, image in zip(mask, LAYOUT.is_image)]


def test_uniform_keeps_a_stride():
    assert kept(Uniform(0.5)) == [[2, 4, 6], [3, 4]]
    assert kept(Uniform(1 / 3)) == [[3, 6], [5]]


@pytest.mark.parametrize("method", [Uniform(0.6), DivPrune(0.6), Random(0.6)])
def test_the_share_is_exact(method):
    """In float32, 25 * 0.6 is more than 15."""
    layout = TokenLayout.from_ids(torch.full((1, 25), 9), [9])
    hidden = torch.randn(1, 25, 8, generator=torch.Generator().manual_seed(0))
    assert method.select(Scene(layout, hidden)).keep.sum() == 15


def test_fastv_keeps_what_is_attended_to_and_the_earlier_of_equals():
    attention = torch.tensor([[9, 0.1, 0.3, 0.1, 0.5, 0.1, 0.1, 9], [9, 9, 9, 0.2, 0.2, 0.2, 9, 9]])
    assert kept(FastV(0.5), attention=attention[:, None]) == [[1, 2, 4], [3, 4]]


def test_random_is_the_same_for_the_same_seed():
    draws = {str(kept(Random(0.5, seed=seed))) for seed in (0, 0, 1, 2, 3)}
    assert 1 < len(draws) < 5


def test_divprune_keeps_the_different_ones():
    hidden = torch.zeros(*IDS.shape, 4)
    hidden[0, 1:7, 0] = 1.0
    hidden[0, 3] = torch.tensor([0.0, 1.0, 0, 0])
    hidden[0, 5] = torch.tensor([0.0, 0.0, 1, 0])
    hidden[1, 3:6] = torch.eye(4)[:3]
    assert kept(DivPrune(0.5), hidden) == [[1, 3, 5], [3, 4]]


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("fastv", FastV()),
        ("FastV:layer=3,keep=0.25", FastV(0.25, 3)),
        ("random:seed=4", Random(seed=4)),
        ("uniform:keep=0.1,layer=1", Uniform(0.1, 1)),
    ],
)
def test_text(text, want):
    assert parse_reduction(text) == want


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fast", "There is no reduction 'fast': expected one of fastv"),
        ("fastv:keep=0", "FastV: keep is 0.0, expected more than 0"),
        ("fastv:layer=0", "FastV: layer is 0, expected at least 1"),
        ("uniform:seed=1", "'seed=1' is no option of uniform: expected keep=float, layer=int"),
        ("uniform:keep=half", "'keep=half' is no option"),
    ],
)
def test_wrong_text_is_named(text, message):
    with pytest.raises(ValueError, match=message):
        parse_reduction(text)


def test_wrong_models_and_options_are_named(build):
    model = build("llava")
    with pytest.raises(ValueError, match="the family 'Linear', expected one of idefics3"):
        accelerate(torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="FastV: layer is 7, but the decoder has 5 layers"):
        accelerate(model, FastV(layer=7))
    with pytest.raises(ValueError, match="mask is 'full', expected one of causal"):
        accelerate(model, mask="full")
    with pytest.raises(ValueError, match="needs prompt_end"):
        accelerate(model, mask="mma")
    with accelerate(model), pytest.raises(ValueError, match="accelerated already"):
        accelerate(model)
    handle = accelerate(model, "fastv")
    with pytest.raises(RuntimeError, match="run the model first"):
        handle.report()
    with pytest.raises(ValueError, match="needs input_ids"):
        model(inputs_embeds=torch.zeros(1, 3, 32))
    handle.remove()
    handle.remove()
    assert model.get_decoder().config._attn_implementation == "sdpa"


def test_another_family_can_be_registered(build):
    register_family("llama")
    with pytest.raises(ValueError, match="config names no image token"):
        accelerate(build("llava").get_decoder())
    FAMILIES.discard("llama")
