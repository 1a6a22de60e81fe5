"""PyramidDrop: what each stage keeps, against the attention that transformers' eager code gives."""

from itertools import pairwise

import pytest
import torch
from against_plain import IMAGE, MARKER, continued, generated, logits, seen_by_layers

from zoo.mllm import PyramidDrop, accelerate
from zoo.mllm.reduce import parse_reduction


def attended(eager, inputs, layer, places):
    """(B, L): what one token of each row attends to in a layer, mean over heads, from transformers."""
    with torch.no_grad():
        attention = eager(**inputs, output_attentions=True).attentions[layer].mean(1)
    return attention[torch.arange(len(places)), places]


def best(scores, is_image, share):
    """For each row the places of the largest scores among its visual tokens, as many as the share rounded up."""
    found = []
    for row, image in zip(scores, is_image):
        places = image.nonzero()[:, 0]
        order = sorted(places.tolist(), key=lambda place: -float(row[place]))
        found.append(sorted(order[: -(-len(places) * round(share * 100) // 100)]))
    return found


def images_of(mask, is_image):
    return [(row & image).nonzero()[:, 0].tolist() for row, image in zip(mask, is_image)]


@pytest.mark.parametrize("layer", [1, 3])
def test_the_next_layer_would_attend_to_what_stays(build, model, family, batch, layer):
    inputs = batch(3)
    is_image = inputs["input_ids"] == IMAGE
    last = torch.full((3,), is_image.shape[1] - 1)
    want = best(attended(build(family, "eager"), inputs, layer, last), is_image, 0.3)
    with accelerate(model, PyramidDrop(0.3, (layer,))) as handle:
        logits(model, inputs)
    seen = seen_by_layers(handle)
    assert images_of(seen[layer], is_image) == want
    assert (seen[layer - 1] & is_image).sum() == is_image.sum()


def test_an_answer_does_not_rank(build, model, family, batch):
    """In training the last token of the prompt ranks, not that of the answer."""
    inputs = batch(1)
    inputs = continued(inputs, torch.cat([inputs["input_ids"], torch.tensor([[30, 31, 32]])], 1))
    is_image, marker = inputs["input_ids"] == IMAGE, int((inputs["input_ids"][0] == MARKER).nonzero())
    want = best(attended(build(family, "eager"), inputs, 2, torch.tensor([marker])), is_image, 0.3)
    with accelerate(model, PyramidDrop(0.3, (2,)), prompt_end=[MARKER]) as handle:
        logits(model, inputs)
    assert images_of(seen_by_layers(handle)[2], is_image) == want


def test_stages_are_nested_and_as_long_as_planned(build, llava_batch):
    model, inputs = build("llava"), llava_batch(3)
    method = PyramidDrop(0.5, (1, 2, 4))
    with accelerate(model, method) as handle:
        _, _, cache = generated(model, inputs)
        report, seen = handle.report(), seen_by_layers(handle)
    assert report["visual_tokens_per_layer"] == [2 * count for count in (16, 8, 4, 4, 2)]
    text = int(inputs["attention_mask"].sum(1).max()) - 16
    padded = inputs["input_ids"].shape[1]
    assert [layer.keys.shape[2] - 2 for layer in cache.layers] == [padded, *(text + count for count in (8, 4, 4, 2))]
    assert all((after <= before).all() for before, after in pairwise(seen))


def test_the_published_pyramid():
    """576 visual tokens, 32 layers."""
    steps, left = PyramidDrop().steps(32), 576
    assert [step.layer for step in steps] == [8, 16, 24]
    for step, want in zip(steps, (288, 144, 72)):
        left = step.visual_tokens(left, 576, 64)
        assert left == want
    assert [step.layer for step in PyramidDrop().steps(5)] == [1, 2, 3]
    assert [step.layer for step in PyramidDrop().steps(2)] == [1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pyramiddrop:keep=0", "PyramidDrop: keep is 0.0, expected more than 0"),
        ("pyramiddrop:layers=0/2", "PyramidDrop: layer is 0, expected at least 1"),
        ("pyramiddrop:layers=a", r"'layers=a' is no option of pyramiddrop: expected keep=float, layers=int/\.\.\."),
    ],
)
def test_wrong_text_is_named(text, message):
    with pytest.raises(ValueError, match=message):
        parse_reduction(text)


def test_text_is_an_object():
    assert parse_reduction("pyramiddrop:keep=0.25,layers=8/16") == PyramidDrop(0.25, (8, 16))
