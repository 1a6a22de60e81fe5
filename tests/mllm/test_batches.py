"""Rows with any number of pictures: each is as it is alone, and as the plain model with what was dropped masked."""

import pytest
import torch
from against_plain import IMAGE, MARKER, continued, generated, logits, masked, merged_by_layers, seen_by_layers

from zoo.mllm import TokenLayout, ToMe, ZipVL, accelerate
from zoo.mllm.base import Scene
from zoo.mllm.tower_reduction import DROPPED
from zoo.mllm.vision_attention import tower_of

PICTURE = [92, *[IMAGE] * 16, 93]
ROWS = [
    [1, 5, *PICTURE, 6, *PICTURE, 7, 8, MARKER],  # two pictures
    [1, 9, 10, 11, 12, *PICTURE, 13, MARKER],  # one behind most of the question
    [1, 14, 15, MARKER],  # none
    [1, 20, 21, 22, *PICTURE],  # nothing behind it
    [1, 23, 24, *PICTURE[:-1]],  # not even what ends it
]
COUNTS = [2, 1, 0, 1, 1]
METHODS = [
    "fastv:layer=2,keep=0.5",
    "uniform:keep=0.3",
    "random:layer=1,keep=0.5",
    "divprune:keep=0.4",
    "pyramiddrop:keep=0.5",
    "sparsevlm:layers=2/3,keep=0.6/0.3",
    "visionzip:keep=0.5",
    "prumerge",
    "tome:keep=0.4",
    "yopo:layer=3,window=3,ffn_ratio=2",
    ZipVL(0.8, 16, 0, recent=8, random=6),
]


def batch_of(rows):
    texts, counts = [ROWS[row] for row in rows], [COUNTS[row] for row in rows]
    length = max(map(len, texts))
    ids = torch.tensor([[0] * (length - len(text)) + text for text in texts])
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    pixels = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(1)).split(COUNTS)
    if sum(counts):
        inputs["pixel_values"] = torch.cat([pixels[row] for row in rows])
    return inputs


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_row_is_as_it_is_alone(llava, method):
    with accelerate(llava, method) as handle:
        _, together, _ = generated(llava, batch_of(range(4)))
        seen, inputs = seen_by_layers(handle), batch_of(range(4))
        for row, text in enumerate(ROWS[:4]):
            _, alone, _ = generated(llava, batch_of([row]))
            torch.testing.assert_close(alone[0], together[row], atol=1e-5, rtol=1e-5)
            mine = seen_by_layers(handle)[:, 0] & (torch.tensor(text) == IMAGE)
            assert torch.equal(seen[:, row, -len(text) :] & (inputs["input_ids"][row, -len(text) :] == IMAGE), mine)


@pytest.mark.parametrize("method", [one for one in METHODS if not isinstance(one, ZipVL) and "yopo" not in one])
def test_dropping_is_masking(llava, method):
    inputs, given, projector = batch_of(range(4)), [], tower_of(llava).projector
    with accelerate(llava, method) as handle:
        spy = projector.register_forward_pre_hook(lambda module, args: given.append(args[0]))
        sequences, answer, _ = generated(llava, inputs)
        seen, merged = seen_by_layers(handle), merged_by_layers(handle)
        spy.remove()
    replay = projector.register_forward_pre_hook(lambda module, args: (given[0],))
    want = masked(llava, continued(inputs, sequences), seen, merged=merged)
    replay.remove()
    last = inputs["input_ids"].shape[1] - 1
    torch.testing.assert_close(answer, want[:, last:-1], atol=1e-5, rtol=1e-5)
    images = (inputs["input_ids"] == IMAGE) & seen[-1]
    assert (images.sum(1) > 0).tolist() == [True, True, False, True] and images.sum() < 16 * 4


@pytest.mark.parametrize("method", ["fastv:layer=2,keep=0.3", "uniform:keep=0.3", "pyramiddrop:keep=0.3"])
def test_the_last_token_stays(llava, method):
    """The answer starts from it, also where it is a picture's."""
    inputs = batch_of([0, 4])
    with accelerate(llava, method) as handle:
        sequences, answer, _ = generated(llava, inputs)
        seen = seen_by_layers(handle)
    assert seen[:, :, -1].all() and handle.report()["visual_tokens_per_layer"][-1] <= 16
    want = masked(llava, continued(inputs, sequences), seen)
    torch.testing.assert_close(answer, want[:, inputs["input_ids"].shape[1] - 1 : -1], atol=1e-5, rtol=1e-5)


def test_a_tower_cannot_keep_the_last_token():
    layout = TokenLayout.from_ids(torch.tensor([[1, 9, 9, 2], [0, 1, 9, 9]]), [9])
    hidden = torch.zeros(2, 4, 3)
    hidden[0, 2] = hidden[1, 2] = DROPPED
    assert ToMe(0.5).select(Scene(layout, hidden)).keep.tolist() == [[True, True, False, True]] * 2
    hidden[1, 3] = DROPPED
    message = r"ToMe drops the last token of a prompt, .* put text behind its last picture"
    with pytest.raises(ValueError, match=message):
        ToMe(0.5).select(Scene(layout, hidden))


def test_a_batch_without_pictures_is_the_plain_model(llava):
    inputs = batch_of([2, 2])
    plain = logits(llava, inputs)
    for method in METHODS[:-1]:
        with accelerate(llava, method):
            assert torch.equal(logits(llava, inputs), plain)


@pytest.mark.parametrize("rows", [[1], [0, 2]])
def test_more_pictures_than_placeholders_are_an_error(llava, rows):
    inputs = batch_of(rows)
    inputs["pixel_values"] = torch.cat([inputs["pixel_values"], inputs["pixel_values"][:1]])
    with (
        accelerate(llava, "fastv"),
        pytest.raises(ValueError, match=r"[Ii]mage features and image tokens do not match"),
    ):
        logits(llava, inputs)


def test_after_an_error_all_is_as_before(llava):
    """A pass that fails leaves nothing behind: not for a shorter prompt, nor another handle, nor the plain model."""
    inputs, shorter = batch_of(range(4)), batch_of([1])
    plain, reduce = logits(llava, inputs), ["fastv:layer=2,keep=0.5", "tome:keep=0.5"]

    def fail():
        hook = llava.get_decoder().layers[1].register_forward_hook(lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            logits(llava, inputs)
        hook.remove()

    with accelerate(llava, reduce):
        want = generated(llava, shorter)[1]
        fail()
        assert torch.equal(generated(llava, shorter)[1], want)
        fail()
    assert torch.equal(logits(llava, inputs), plain)
    with accelerate(llava, reduce):
        assert torch.equal(generated(llava, shorter)[1], want)
