import importlib.util
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

pytest.importorskip("transformers", reason="multimodal models need the mllm extra")
pytest.importorskip("matplotlib", reason="the plot needs the bench extra")

from zoo.mllm import load
from zoo.mllm.conversations import (
    Conversation,
    answer_end,
    answer_labels,
    assistant_marker,
    read_conversations,
)
from zoo.tools import evaluate_mllm as E

_spec = importlib.util.spec_from_file_location("tiny_vlm", Path(__file__).with_name("tiny_vlm.py"))
tiny = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tiny)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Data and a model, as ``tiny.model`` says."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny.language_model(folder / "lm")
    tiny.data(folder)
    tiny.model(folder)
    return folder


@pytest.fixture(scope="module")
def loaded(folder):
    return load(folder / "model")


@pytest.fixture(scope="module")
def asked(folder):
    return E.questions_of(read_conversations(folder / "train.json"))


def test_questions_are_asked_one_by_one(folder, asked):
    assert len(asked) == 32
    assert asked[1] == E.Question((folder / "0.png",), "where is it ?", "left", "where")


def test_what_a_plan_saves(loaded, asked):
    model, processor = loaded
    tokens = processor.tokens_per_tile
    plain, _ = E.evaluate(model, processor, asked, batch_size=8, max_new_tokens=3)
    half, _ = E.evaluate(model, processor, asked, "uniform:keep=0.5", batch_size=8, max_new_tokens=3)
    late, _ = E.evaluate(model, processor, asked, "fastv:layer=1,keep=0.5", batch_size=8, max_new_tokens=3)
    both, _ = E.evaluate(model, processor, asked, "uniform:keep=0.5+fastv:layer=2,keep=0.5", batch_size=8)
    assert (plain.visual_tokens, half.visual_tokens) == (tokens, tokens / 2)
    assert late.visual_tokens == pytest.approx(tokens * 2 / 3, abs=0.1)  # the first of three layers sees all
    assert both.visual_tokens == pytest.approx(tokens * 5 / 12, abs=0.1)
    assert half.gflops < late.gflops < plain.gflops and half.kv_megabytes < late.kv_megabytes < plain.kv_megabytes
    # Two keys and values of 16 numbers of 4 bytes in 3 layers, for a visual token.
    assert plain.kv_megabytes - half.kv_megabytes == pytest.approx(tokens / 2 * 2 * 16 * 4 * 3 / 1e6)
    windows, _ = E.evaluate(model, processor, asked, "yopo:window=3", batch_size=8, max_new_tokens=3)
    coarse, _ = E.evaluate(model, processor, asked, "zipvl:tau=0.5,low=0", batch_size=8, max_new_tokens=3)
    assert windows.visual_tokens == tokens and windows.gflops < plain.gflops  # fewer pairs
    assert coarse.visual_tokens == tokens and coarse.kv_megabytes < plain.kv_megabytes / 2
    assert min(plain.milliseconds, plain.prefill_milliseconds) > 0


def test_answers_are_scored_by_kind(loaded, asked, monkeypatch):
    model, processor = loaded
    right, some = asked[:8], asked[8:16]
    given = iter([[one.answer for one in right], ["Red. " if one.kind == "colour" else "up" for one in some]])
    monkeypatch.setattr(E, "generate", lambda *_, **__: next(given))
    result, _ = E.evaluate(model, processor, asked[:16], batch_size=8)
    assert result.kinds == {"colour": 75.0, "where": 50.0} and result.accuracy == 62.5


def test_answers_do_not_depend_on_the_batch(loaded, asked):
    model, processor = loaded
    mixed = asked[:5]
    _, together = E.evaluate(model, processor, mixed, "uniform:keep=0.5", batch_size=5, max_new_tokens=4)
    _, alone = E.evaluate(model, processor, mixed, "uniform:keep=0.5", batch_size=1, max_new_tokens=4)
    assert together == alone and len(set(together)) > 1


def test_the_command_writes_table_plot_and_json(folder, tmp_path):
    plans = ["--plan", "none", "--plan", "uniform:keep=0.5", "--plan", "uniform:keep=0.25"]
    options = ["--limit", "6", "--max-new-tokens", "2", "--device", "cpu", "--out", str(tmp_path)]
    arguments = [str(folder / "model"), str(folder / "train.json"), *plans, *options]
    result = CliRunner().invoke(E.app, arguments, env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert "uniform:keep=0.25" in result.stdout and "GFLOPs" in result.stdout
    found = json.loads((tmp_path / "results.json").read_text())
    assert [one["plan"] for one in found["results"]] == plans[1::2] and found["questions"] == 6
    assert found["results"][0]["visual_tokens"] == 4 * found["results"][2]["visual_tokens"]
    answers = json.loads((tmp_path / "answers.json").read_text())
    assert len(answers["questions"]) == 6 == len(answers["answers"]["none"])
    with Image.open(tmp_path / "results.png") as picture:
        assert picture.width > 1000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--plan", "fastest"], "There is no reduction 'fastest'"),
        (["--plan", "none", "--plan", "fastv:layer=9"], "the decoder has 3 layers"),
        (["--images", "/nowhere"], "16 pictures"),
    ],
)
def test_errors_are_told_before_anything_is_measured(folder, tmp_path, arguments, message):
    command = [str(folder / "model"), str(folder / "train.json"), "--out", str(tmp_path), *arguments]
    result = CliRunner().invoke(E.app, command, env={"COLUMNS": "300"})
    assert result.exit_code == 1 and message in result.stderr
    assert not (tmp_path / "results.json").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "holds no list of records"),
        ([{"image": "0.png"}], "Record 0 .* it lacks 'conversations'"),
        ([{"conversations": [{"from": "gpt", "value": "a"}]}], "expected human and gpt by turns"),
        ([{"conversations": [{"from": "human", "value": "<image> a"}, {"from": "gpt", "value": "b"}]}], "has 0 images"),
        (
            [
                {
                    "image": "0.png",
                    "conversations": [
                        {"from": "human", "value": "a"},
                        {"from": "gpt", "value": "b"},
                        {"from": "human", "value": "<image> c"},
                        {"from": "gpt", "value": "d"},
                    ],
                }
            ],
            "stands in a later turn",
        ),
        (
            [
                {
                    "image": "none.png",
                    "conversations": [{"from": "human", "value": "<image> a"}, {"from": "gpt", "value": "b"}],
                }
            ],
            "1 pictures of .* are missing, the first is .*none.png",
        ),
    ],
)
def test_records_that_cannot_be_used_are_named(folder, tmp_path, content, message):
    file = tmp_path / "a.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read_conversations(file, folder)


def test_several_pictures_and_none(folder, tmp_path):
    turns = [{"from": "human", "value": "<image>\n<image>\nsame ?"}, {"from": "gpt", "value": "no"}]
    text = [{"from": "human", "value": "1 + 1 ?"}, {"from": "gpt", "value": "2"}]
    records = [{"image": ["0.png", "1.png"], "conversations": turns}, {"conversations": text}]
    (tmp_path / "a.json").write_text(json.dumps(records))
    two, none = read_conversations(tmp_path / "a.json", folder)
    assert two == Conversation((folder / "0.png", folder / "1.png"), (("same ?", "no"),), ("",))
    assert [part["type"] for part in two.messages()[0]["content"]] == ["image", "image", "text"]
    assert none.images == () and none.messages()[1]["content"] == [{"type": "text", "text": "2"}]
    (tmp_path / "0.png").write_bytes((folder / "0.png").read_bytes()[:60])
    with pytest.raises(ValueError, match=r"0\.png is not a readable picture"):
        Conversation((tmp_path / "0.png",), (("a", "b"),), ("",)).messages()


def test_labels_of_any_template_are_those_of_ours(loaded, folder):
    _, processor = loaded
    talks = [talk.messages() for talk in read_conversations(folder / "train.json")[:3]]
    ours = processor.with_labels(talks)
    begin, (end, added) = assistant_marker(processor), answer_end(processor)
    assert (begin, end, added) == ([tiny.WORDS.index("<assistant>")], tiny.WORDS.index("<end>"), "")
    assert torch.equal(answer_labels(ours["input_ids"], begin, end, [2, 2, 2]), ours["labels"])
    with pytest.raises(ValueError, match="has 3 answers, but its tokens mark 2"):
        answer_labels(ours["input_ids"], begin, end, [2, 3, 2])


def test_a_template_without_an_end_gets_that_of_the_tokenizer(folder):
    _, processor = load(folder / "model")
    processor.chat_template = tiny.TEMPLATE.replace("<end>", "")
    assert assistant_marker(processor) == [tiny.WORDS.index("<assistant>")]
    end, added = answer_end(processor)
    assert (end, added) == (processor.tokenizer.eos_token_id, "<end>")
    (talk,) = read_conversations(folder / "train.json")[:1]
    assert [turn["content"][-1]["text"] for turn in talk.messages(added)[1::2]] == ["red<end>", "left<end>"]
    processor.chat_template = "{{ messages }}"
    with pytest.raises(ValueError, match="does not mark where answers begin"):
        assistant_marker(processor)
