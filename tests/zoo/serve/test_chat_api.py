"""Chat over the JSON API: the words of a tiny model as they come, with part of its visual tokens."""

import base64
import importlib.util
import io
import json
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("gradio", reason="serving needs the serve extra")
pytest.importorskip("fastapi_offline", reason="serving needs the serve extra")
pytest.importorskip("transformers", reason="multimodal models need the mllm extra")

import torch
from PIL import Image
from serving import NAME, encoded, error_of, picture, post, serving

from zoo.mllm import load
from zoo.mllm.prompts import encode, generate, message
from zoo.serve import Chat, Limits, Models
from zoo.serve.chat import draw_seen, load_chat

_spec = importlib.util.spec_from_file_location("tiny_vlm", Path(__file__).parents[2] / "tools" / "tiny_vlm.py")
tiny = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tiny)

QUESTION = "what colour is it ?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    tiny.language_model(folder / "lm")
    tiny.data(folder, count=4)
    tiny.model(folder)
    return folder / "model"


@pytest.fixture(scope="module")
def loaded(folder):
    return load(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def client(classifier, loaded):
    with serving(Models({NAME: classifier}, chat=Chat(*loaded, "tiny"))) as client:
        yield client


def plain(loaded, image, *texts):
    """What the model itself answers after questions and answers in turn."""
    roles = ("user", "assistant")
    talk = [message(roles[place % 2], text, [] if place else [image]) for place, text in enumerate(texts)]
    return generate(*loaded, encode(*loaded, [talk]), max_new_tokens=6)[0].strip()


def test_it_answers_as_the_model(client, loaded):
    found = set()
    for seed in range(3):
        data = encoded(picture(seed))
        answer = post(client, data, "chat", question=QUESTION, max_new_tokens=6).json()
        assert answer["answer"] == plain(loaded, picture(seed), QUESTION) != ""
        assert answer["visual_tokens"] == answer["kept_tokens"] == 16
        found.add(answer["answer"])
    assert len(found) > 1


def test_earlier_turns_count(client, loaded):
    turns = [["where is it ?", "left"]]
    answer = post(client, encoded(), "chat", question=QUESTION, turns=json.dumps(turns), max_new_tokens=6).json()
    assert answer["answer"] == plain(loaded, picture(), "where is it ?", "left", QUESTION)


def test_part_of_the_tokens(client, loaded):
    whole = post(client, encoded(), "chat", question=QUESTION, max_new_tokens=6).json()
    part = post(client, encoded(), "chat", question=QUESTION, keep=0.25, max_new_tokens=6).json()
    assert (part["visual_tokens"], part["kept_tokens"]) == (16, 4)
    shown = [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(one["overlay"].split(",")[1])))) for one in (whole, part)
    ]
    dark = shown[1].mean() / shown[0].mean()
    assert 0.3 < dark < 0.6  # 12 of 16 fields are darkened to a quarter
    again = post(client, encoded(), "chat", question=QUESTION, max_new_tokens=6).json()
    assert again == whole  # nothing of it stays


def test_words_come_one_by_one(client, loaded):
    fields = {"question": QUESTION, "max_new_tokens": 6, "stream": True}
    with client.stream("POST", "/api/chat", files={"image": encoded()}, data=fields) as response:
        assert response.headers["content-type"] == "application/x-ndjson"
        *pieces, last = [json.loads(line) for line in response.iter_lines()]
    assert len(pieces) > 1
    assert "".join(piece["text"] for piece in pieces).strip() == last["answer"] == plain(loaded, picture(), QUESTION)
    assert last["overlay"].startswith("data:image/jpeg;base64,")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({}, "question: "),
        ({"question": ""}, "question: "),
        ({"question": "x" * 3000}, "question: "),
        ({"question": "a", "keep": 0}, "keep: "),
        ({"question": "a", "keep": "nan"}, "keep: "),
        ({"question": "a", "max_new_tokens": 10**6}, "max_new_tokens: "),
        ({"question": "a", "turns": "["}, "turns is no JSON list"),
        ({"question": "a", "turns": "[" * 19_000}, "turns is no JSON list"),
        ({"question": "a", "turns": '[["a"]]'}, "turns is no JSON list"),
        ({"question": "a", "turns": '[["a", {"type": "image", "image": "/etc/passwd"}]]'}, "turns is no JSON list"),
    ],
)
def test_wrong_fields(client, fields, reason):
    assert reason in error_of(post(client, encoded(), "chat", **fields), 422)


def test_a_bad_picture(client):
    for stream in (False, True):
        assert "not a picture" in error_of(post(client, b"hello", "chat", question="a", stream=stream), 422)


class Failing(Chat):
    """A model that says something and then fails, or says the same until it is stopped."""

    def __init__(self, error=None):
        self.name, self.error, self.ended = "failing", error, False

    def ask(self, *args, say, stop, **options):
        say("well ")
        if self.error:
            raise self.error
        while not stop():
            time.sleep(0.01)
            say("and ")
        self.ended = True
        raise ValueError("It was stopped.")


def streamed(client):
    lines = post(client, encoded(), "chat", question=QUESTION, stream=True).text.splitlines()
    return [json.loads(line) for line in lines]


def test_errors_come_in_the_stream(classifier, caplog):
    with serving(Models({NAME: classifier}, chat=Failing(ValueError("The text holds <image>.")))) as client:
        assert streamed(client) == [{"text": "well "}, {"error": "The text holds <image>."}]
        assert error_of(post(client, encoded(), "chat", question="a"), 422) == "The text holds <image>."
    with serving(Models({NAME: classifier}, chat=Failing(RuntimeError("a secret")))) as client:
        assert "server failed" in streamed(client)[1]["error"]
        assert "server failed" in error_of(post(client, encoded(), "chat", question="a"), 500)
    assert "a secret" in caplog.text


def test_an_answer_ends_before_its_time_is_up(classifier, monkeypatch):
    monkeypatch.setattr("zoo.serve.api.HASTE", 0.3)
    chat = Failing()
    with serving(Models({NAME: classifier}, chat=chat), Limits(seconds=0.8)) as client:
        assert streamed(client)[-1] == {"error": "It was stopped."}
    assert chat.ended


def test_loading(folder, loaded):
    chat = load_chat(str(folder), "cpu")
    assert chat.name == str(folder)
    assert chat.ask(picture(), [], QUESTION, max_new_tokens=6).text == plain(loaded, picture(), QUESTION)
    with pytest.raises(ValueError, match="cannot be loaded as a multimodal model"):
        load_chat(str(folder.parent), "cpu")


def test_what_is_seen_is_drawn():
    image = Image.new("RGB", (80, 40), "white")
    drawn = np.asarray(draw_seen(image, torch.tensor([True, False, False, False, False, False, False, True])))
    assert drawn.shape == (40, 80, 3)
    assert (drawn[:20, :20] == 255).all() and (drawn[20:, 60:] == 255).all()
    assert (drawn[:20, 20:] == 64).all() and (drawn[20:, :60] == 64).all()
    assert draw_seen(image, torch.ones(7, dtype=torch.bool)) is None
