"""`zoo chat` on a tiny model: what it asks, what it prints, and how it fails."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

pytest.importorskip("transformers", reason="multimodal models need the mllm extra")

from zoo import chat, cli
from zoo.mllm import MoD, accelerate, load
from zoo.mllm.conversations import assistant_marker
from zoo.mllm.prompts import encode, generate, message
from zoo.mllm.trained import save_trained

_spec = importlib.util.spec_from_file_location("tiny_vlm", Path(__file__).parents[1] / "tools" / "tiny_vlm.py")
tiny = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tiny)

FASTV = "fastv:layer=2,keep=0.5"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures and a model, as ``tiny.model`` says."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny.language_model(folder / "lm")
    tiny.data(folder, count=4)
    tiny.model(folder)
    return folder


@pytest.fixture(scope="module")
def loaded(folder):
    return load(folder / "model", dtype=torch.float32)


@pytest.fixture(autouse=True)
def here(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "200")


def zoo(*arguments, code=0, lines=""):
    command = ["chat", "--device", "cpu", "--max-new-tokens", "5", *map(str, arguments)]
    result = CliRunner().invoke(cli.app, command, input=lines)
    assert result.exit_code == code, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result


def error(*arguments, lines=""):
    """The one sentence on stderr of a usage error."""
    result = zoo(*arguments, code=2, lines=lines)
    assert result.stdout == "" and result.stderr.startswith("zoo: ") and result.stderr.count("\n") == 1
    return result.stderr


def expected(loaded, talk, **options):
    """What the model answers without the command."""
    model, processor = loaded
    with accelerate(model, **options):
        (answer,) = generate(model, processor, encode(model, processor, [talk]), max_new_tokens=5)
    return answer.strip()


def picture(name):
    return Image.open(name).convert("RGB")


def test_one_question_about_one_picture(loaded):
    answers = []
    for name in ("0.png", "1.png"):
        answers.append(zoo("--model", "model", "--image", name, "--prompt", "where is it ?").stdout)
        assert answers[-1] == expected(loaded, [message("user", "where is it ?", [picture(name)])]) + "\n"
    assert answers[0] != answers[1] and answers[0].strip()


def test_several_pictures_in_the_order_given(loaded):
    two = [picture("0.png"), picture("1.png")]
    given = zoo("--model", "model", "--image", "0.png", "--image", "1.png", "--prompt", "what is it ?", "--json")
    document = json.loads(given.stdout)
    assert document["model"] == "model" and document["images"] == ["0.png", "1.png"]
    answer = expected(loaded, [message("user", "what is it ?", two)])
    assert document["turns"] == [{"prompt": "what is it ?", "answer": answer}]
    assert answer != expected(loaded, [message("user", "what is it ?", two[::-1])])


def test_without_a_picture(loaded):
    found = zoo("--model", "model", "--prompt", "red ?").stdout
    assert found == expected(loaded, [message("user", "red ?")]) + "\n"


def test_fewer_visual_tokens(loaded):
    arguments = ("--model", "model", "--image", "0.png", "--prompt", "what colour is it ?", "--json")
    document = json.loads(zoo(*arguments, "--reduce", FASTV).stdout)
    asked = [message("user", "what colour is it ?", [picture("0.png")])]
    assert document["turns"][0]["answer"] == expected(loaded, asked, reduce=FASTV)
    tokens = loaded[1].tokens_per_tile
    assert document["report"]["visual_tokens_per_layer"] == [tokens, tokens, tokens // 2]
    both = json.loads(zoo(*arguments, "--reduce", "uniform:keep=0.5", "--reduce", FASTV).stdout)
    assert both["report"]["visual_tokens_per_layer"] == [tokens // 2, tokens // 2, tokens // 4]
    told = zoo(*arguments[:-1], "--verbose")
    assert f"visual_tokens_per_layer: {[tokens] * 3}" in told.stderr and "visual_tokens" not in told.stdout


def test_another_mask(loaded):
    asked = [message("user", "where is it ?", [picture("0.png")])]
    options = {"mask": "mma", "prompt_end": assistant_marker(loaded[1])}
    given = zoo("--model", "model", "--image", "0.png", "--prompt", "where is it ?", "--mask", "mma", "--reduce", FASTV)
    assert given.stdout == expected(loaded, asked, reduce=FASTV, **options) + "\n"
    assert expected(loaded, asked, **options) != expected(loaded, asked)


def test_a_model_is_run_as_it_was_trained(folder, tmp_path, loaded):
    for path in (folder / "model").iterdir():
        (tmp_path / path.name).symlink_to(path)
    model, processor = loaded
    torch.manual_seed(3)
    depth = MoD(0.5, layers=(1, 2))
    with accelerate(model, depth=depth, mask="mma", prompt_end=assistant_marker(processor)) as handle:
        save_trained(tmp_path, handle)
    asked = [message("user", "where is it ?", [picture("0.png")])]
    arguments = ("--model", tmp_path, "--image", "0.png", "--prompt", "where is it ?", "--json")
    trained = json.loads(zoo(*arguments).stdout)
    tokens = processor.tokens_per_tile
    assert trained["report"]["visual_tokens_per_layer"] == [tokens, tokens // 2, tokens // 2]
    options = {"depth": depth, "prompt_end": assistant_marker(processor)}
    answers = {mask: expected(loaded, asked, mask=mask, **options) for mask in ("mma", "causal")}
    assert trained["turns"][0]["answer"] == answers["mma"] != answers["causal"]
    causal = json.loads(zoo(*arguments, "--mask", "causal").stdout)
    assert causal["turns"][0]["answer"] == answers["causal"]


def test_an_answer_is_streamed(monkeypatch, loaded):
    said = []
    monkeypatch.setattr(chat.typer, "echo", lambda text="", **_: said.append(text))
    found = zoo("--model", "model", "--image", "0.png", "--prompt", "where is it ?", "--stream").stdout
    assert found.split() == expected(loaded, [message("user", "where is it ?", [picture("0.png")])]).split() != []
    assert said == []  # not once more at the end


def test_a_conversation_through_a_pipe(loaded):
    lines = "where is it ?\n\nwhat colour ?\n"
    first = [message("user", "where is it ?", [picture("0.png")])]
    answer = expected(loaded, first)
    second = [*first, message("assistant", answer), message("user", "what colour ?")]
    found = zoo("--model", "model", "--image", "0.png", lines=lines).stdout
    assert found.splitlines() == [answer, expected(loaded, second)]
    assert expected(loaded, second) != expected(loaded, [message("user", "what colour ?", [picture("0.png")])])


def test_the_installed_command_in_another_process(loaded):
    command = [sys.executable, "-m", "zoo", "chat", "--model", "model", "--image", "3.png", "--device", "cpu"]
    done = subprocess.run(
        [*command, "--max-new-tokens", "5", "--reduce", FASTV],
        input="where is it ?\n",
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    answer = expected(loaded, [message("user", "where is it ?", [picture("3.png")])], reduce=FASTV)
    assert (done.returncode, done.stdout, done.stderr) == (0, answer + "\n", "")


def test_a_typed_question_that_cannot_be_asked_ends_nothing(monkeypatch, loaded):
    monkeypatch.setattr(chat, "_typed", lambda: True)

    def encode_or_not(model, processor, talks):
        if talks[0][-1]["content"][-1]["text"] == "what ?":
            raise ValueError("The question is too long.")
        return encode(model, processor, talks)

    monkeypatch.setattr(chat, "encode", encode_or_not)
    result = zoo("--model", "model", "--image", "0.png", lines="what ?\nwhere is it ?\n")
    assert result.stdout == expected(loaded, [message("user", "where is it ?", [picture("0.png")])]) + "\n"
    assert result.stderr == "> zoo: The question is too long.\n> > \n"


def test_ctrl_c_stops_an_answer_and_not_the_conversation(monkeypatch, loaded):
    monkeypatch.setattr(chat, "_typed", lambda: True)
    whole, stopped = chat.generate, []

    def generate_once(*arguments, **options):
        if not stopped:
            stopped.append(True)
            raise KeyboardInterrupt
        return whole(*arguments, **options)

    monkeypatch.setattr(chat, "generate", generate_once)
    result = zoo("--model", "model", "--image", "0.png", lines="what is it ?\nwhere is it ?\n")
    # The question whose answer was stopped is forgotten: the pictures come with the next one.
    assert result.stdout == expected(loaded, [message("user", "where is it ?", [picture("0.png")])]) + "\n"
    assert "Stopped." in result.stderr


def test_bad_pictures_are_one_sentence(tmp_path):
    (tmp_path / "cut.png").write_bytes(Path("0.png").read_bytes()[:60])
    asked = ("--model", "model", "--prompt", "red ?", "--image")
    assert error(*asked, "none.png") == "zoo: none.png does not exist.\n"
    assert "is damaged or cut short" in error(*asked, tmp_path / "cut.png")
    assert "pass --allow-urls" in error(*asked, "https://example.org/a.png")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "./none"], "./none cannot be loaded as a multimodal model: "),
        (["--model", "lm"], "lm cannot be loaded as a multimodal model: "),
        (["--model", "model", "--reduce", "fastest"], "There is no reduction 'fastest'"),
        (["--model", "model", "--reduce", "fastv:layer=9"], "the decoder has 3 layers"),
        (["--model", "model", "--mask", "all"], "--mask is 'all', expected one of causal, mma"),
        (["--model", "model", "--prompt", " "], "--prompt is empty"),
        (["--model", "model", "--json", "--stream"], "--json and --stream exclude each other"),
        (["--model", "model"], "There was no question"),
    ],
)
def test_what_cannot_be_is_one_sentence(arguments, message):
    given = arguments if "--prompt" in arguments or arguments == ["--model", "model"] else [*arguments, "--prompt", "?"]
    assert message in error(*given)


def test_the_packaged_model_is_missing(monkeypatch, tmp_path):
    monkeypatch.setattr(chat, "PACKAGED", tmp_path / "none")
    assert f"The packaged model is missing ({tmp_path / 'none'} is no folder)" in error("--prompt", "red ?")
    result = CliRunner().invoke(cli.app, ["demo-chat"])
    assert result.exit_code == 2 and result.stderr.startswith("zoo: The packaged model is missing")


def test_the_demo_asks_about_the_packaged_scene(monkeypatch, folder, loaded):
    monkeypatch.setattr(chat, "PACKAGED", folder / "model")
    result = CliRunner().invoke(cli.app, ["demo-chat"])
    assert result.exit_code == 0, result.output
    model, processor = loaded
    scene = picture(chat.SCENE)
    for (question, right), line in zip(chat.QUESTIONS, result.stdout.splitlines()[1:], strict=True):
        inputs = encode(model, processor, [[message("user", question, [scene])]])
        (answer,) = generate(model, processor, inputs, max_new_tokens=16)
        assert line == f"{question} {answer.strip()} (no: {right})"
