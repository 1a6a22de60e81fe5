"""The mask rules against the stored matrices, and what must hold of any layout."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.mllm import masks
from zoo.mllm.layout import TokenLayout

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "mllm" / "masks.json").read_text(encoding="utf-8"))
NAMES = {"framewise_block_causal": "framewise"}
RULES = [(NAMES.get(rule, rule), rule) for rule in GOLDEN["rules"]]
TEXT, MARKER, IMAGE = 1, 2, 100


def layout(*rows):
    """Of rows such as "ss00qAr..": text, images by digit, the assistant marker A, padding."""
    ids = [[MARKER if c == "A" else IMAGE + int(c) if c.isdigit() else TEXT for c in row] for row in rows]
    padding = torch.tensor([[c != "." for c in row] for row in rows])
    image = torch.tensor([[int(c) if c.isdigit() else -1 for c in row] for row in rows])
    read = TokenLayout.from_ids(torch.tensor(ids), range(IMAGE, IMAGE + 10), padding, [MARKER])
    return TokenLayout(read.valid, image, read.prompt_end)  # images that touch are told apart by their digits


def matrix(rows):
    return torch.tensor([[c == "1" for c in row] for row in rows])


@pytest.mark.parametrize("case", GOLDEN["layouts"], ids=lambda case: case["name"])
@pytest.mark.parametrize(("name", "rule"), RULES)
def test_golden(case, name, rule):
    assert torch.equal(masks.RULES[name](layout(case["layout"]))[0], matrix(case["masks"][rule]))


@pytest.mark.parametrize("case", GOLDEN["batches"], ids=lambda case: case["name"])
def test_golden_batches(case):
    rules = [(name, rule) for name, rule in RULES if rule in case]
    assert len(rules) >= 3
    for name, rule in rules:
        want = torch.stack([matrix(rows) for rows in case[rule]])
        assert torch.equal(masks.RULES[name](layout(*case["layouts"])), want)


@pytest.mark.parametrize("case", GOLDEN["yopo"], ids=lambda case: f"radius{case['radius']}")
def test_golden_neighbours(case):
    rows, columns = case["grid"]
    row = "s" * case["pre"] + "0" * (rows * columns) + "q" * case["post"]
    assert torch.equal(masks.neighbour(layout(row), (rows, columns), case["radius"])[0], matrix(case["mask"]))


def test_a_wrong_grid_is_named():
    with pytest.raises(ValueError, match=r"An image has 6 tokens, the grid \(2, 2\) expects 4"):
        masks.neighbour(layout("s000000q"), (2, 2), 1)


def test_ids_are_read():
    ids = torch.tensor([[5, 9, 9, 5, 9, 7, 8, 5], [0, 0, 9, 9, 7, 8, 7, 8]])
    read = TokenLayout.from_ids(ids, [9], ids != 0, [7, 8])
    assert read.image.tolist() == [[-1, 0, 0, -1, 1, -1, -1, -1], [-1, -1, 0, 0, -1, -1, -1, -1]]
    assert read.prompt_end.tolist() == [6, 5] and read.last.tolist() == [7, 7]
    right = TokenLayout.from_ids(ids.flip(1), [9], ids.flip(1) != 0, [1])
    assert right.last.tolist() == [7, 5] and right.prompt_end.tolist() == [-1, -1]


rows = st.text("sq0", min_size=1, max_size=6).flatmap(
    lambda prompt: st.text("r", max_size=3).map(lambda answer: prompt + "A" + answer)
)


@settings(deadline=None, max_examples=40)
@given(rows, st.integers(0, 3), st.integers(0, 3), st.sampled_from(sorted(masks.RULES)))
def test_padding_changes_nothing_and_answers_stay_hidden(row, left, right, name):
    alone = masks.RULES[name](layout(row))[0]
    padded = masks.RULES[name](layout("." * left + row + "." * right))[0]
    inside = slice(left, left + len(row))
    assert torch.equal(padded[inside, inside], alone)
    assert not padded[:, :left].any() and not padded[:, left + len(row) :].any()
    prompt = row.index("A") + 1
    assert not alone[:prompt, prompt:].any() and alone.diagonal().all()
