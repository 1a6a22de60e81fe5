"""What the tests of `zoo serve` share: clients, pictures, and classifiers that wait."""

import io
import threading
from contextlib import contextmanager

import numpy as np
from fastapi.testclient import TestClient
from PIL import Image

from zoo.classifier import Classifier
from zoo.serve import Limits, Models, create_app

NAME = "test_convnext"  # of timm, 0.3 M parameters, 160 x 160


class Waiting(Classifier):
    """A classifier that computes when it is let, and counts."""

    def __init__(self, model):
        super().__init__(model)
        self.let, self.lock = threading.Event(), threading.Lock()
        self.running = self.most = self.done = 0

    def _run(self, forward, batch):
        with self.lock:
            self.running += 1
            self.most = max(self.most, self.running)
        assert self.let.wait(20)
        with self.lock:
            self.running -= 1
            self.done += 1
        return super()._run(forward, batch)


@contextmanager
def serving(models, limits=None, **options):
    """A client of an app of some models, or of one classifier."""
    if not isinstance(models, Models):
        models = Models({NAME: models})
    app = create_app(models, limits or Limits(), **options)
    with TestClient(app, base_url="http://localhost") as client:
        yield client


def picture(seed=0, size=(50, 40)):
    """A picture that no other seed gives."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def encoded(image=None, kind="PNG", **options):
    """The bytes of its file."""
    file = io.BytesIO()
    (image or picture()).save(file, kind, **options)
    return file.getvalue()


def post(client, data, task="classify", name="picture.png", **fields):
    """Ask the API."""
    return client.post(f"/api/{task}", files={"image": (name, data)}, data=fields)


def error_of(response, status):
    """The one sentence of a refusal."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert list(response.json()) == ["error"]
    text = response.json()["error"]
    assert text.endswith(".") and "Traceback" not in text and "\n" not in text, text
    return text
