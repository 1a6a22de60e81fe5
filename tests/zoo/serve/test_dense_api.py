"""Boxes, masks and maps over the JSON API, from stand-ins for the models of mmdet and mmseg."""

import base64
import io
from importlib.resources import files

import numpy as np
import pytest

pytest.importorskip("gradio", reason="serving needs the serve extra")
pytest.importorskip("fastapi_offline", reason="serving needs the serve extra")
pytest.importorskip("supervision", reason="dense prediction needs the dense extra")
pytest.importorskip("pycocotools", reason="dense prediction needs the dense extra")

from PIL import Image
from pycocotools import mask as coco
from serving import NAME, encoded, error_of, post, serving
from stand_ins import RedAreas, RedThings, square

from zoo.serve import Models
from zoo.serve.models import load_models


@pytest.fixture(scope="module")
def client(classifier):
    with serving(Models({NAME: classifier}, RedThings(), RedAreas())) as client:
        yield client


def drawing(answer):
    head, data = answer["drawn"].split(",")
    assert head == "data:image/jpeg;base64"
    return Image.open(io.BytesIO(base64.b64decode(data)))


def test_detect(client):
    answer = post(client, encoded(square()), "detect").json()
    assert (answer["width"], answer["height"], answer["drawn"]) == (300, 200, None)
    whole, half = answer["detections"]
    assert (whole["name"], whole["bbox"], whole["area"]) == ("square", [60, 40, 100, 80], 8000)
    assert whole["score"] == pytest.approx(0.9, abs=1e-3)
    assert (half["name"], half["bbox"]) == ("half", [60, 40, 100, 40])
    mask = coco.decode(whole["segmentation"])
    assert mask.shape == (200, 300) and mask[40:120, 60:160].all() and mask.sum() == 8000


def test_the_least_score(client):
    (sure,) = post(client, encoded(square()), "detect", score=0.5).json()["detections"]
    assert sure["name"] == "square"
    assert post(client, encoded(square()), "detect", score=0.95).json()["detections"] == []
    assert error_of(post(client, encoded(square()), "detect", score=0.01), 422).startswith("score: ")
    assert error_of(post(client, encoded(square()), "detect", score="nan"), 422).startswith("score: ")


@pytest.mark.parametrize("task", ["detect", "segment"])
def test_drawings(client, task):
    plain = square()
    drawn = drawing(post(client, encoded(plain), task, draw=True).json())
    assert drawn.size == plain.size
    difference = np.abs(np.asarray(drawn, int) - np.asarray(plain, int)).max(-1)
    assert difference[50:110, 60:160].max() > 60  # in the square or on its edge
    assert difference[150:, 200:].max() < 30  # and not far from it


def test_segment(client):
    answer = post(client, encoded(square()), "segment").json()
    background, found = answer["classes"]
    assert background["name"] == "background" and background["share"] == pytest.approx(52 / 60)
    assert found["name"] == "square" and found["share"] == pytest.approx(8 / 60)
    assert coco.decode(found["segmentation"])[40:120, 60:160].all()


def test_large_pictures_are_scaled_down(client):
    answer = post(client, encoded(square((4096, 1024), (1024, 256, 2048, 512))), "detect", draw=True).json()
    assert (answer["width"], answer["height"]) == drawing(answer).size == (2048, 512)
    assert answer["detections"][0]["bbox"] == pytest.approx([512, 128, 512, 128], abs=2)


def test_bad_pictures(client):
    for task in ("detect", "segment"):
        assert "not a picture" in error_of(post(client, b"hello", task), 422)
        assert "damaged" in error_of(post(client, encoded(square(), "JPEG")[:400], task), 422)


def test_what_the_package_has_no_weights_for_is_missing(monkeypatch):
    pytest.importorskip("mmdet", reason="dense prediction needs the dense extra")
    real = files("zoo")

    class Without:
        def __truediv__(self, name):
            return real / f"no/{name}"

    monkeypatch.setattr("zoo.dense.files", lambda name: Without() if name == "zoo" else files(name))
    models = load_models(["van_nano"], device="cpu")
    assert models.detector is models.segmenter is None
    assert "has no packaged weights" in models.missing["detect"] and "segmenter" in models.missing["segment"]
    with serving(models) as client:
        picture = (real / "samples/rocket.jpg").read_bytes()
        assert post(client, picture).json()["names"][0] == "rocket"
        assert "has no packaged weights" in error_of(post(client, picture, "detect"), 501)
        assert "has no packaged weights" in client.get("/").text
