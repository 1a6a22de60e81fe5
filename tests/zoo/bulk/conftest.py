"""A tiny model and pictures for the tests of bulk inference."""

import io

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

NAME = "test_convnext"  # of timm, 0.3 M parameters, 160 x 160


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """A checkpoint of that model that is sure of something."""
    torch.manual_seed(0)
    model = timm.create_model(NAME)
    with torch.no_grad():
        model.head.fc.weight.mul_(30)
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_file(model.state_dict(), path)
    return str(path)


def encoded(seed, kind="PNG"):
    """The bytes of a picture that no other seed gives."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize((50, 40), Image.Resampling.BICUBIC).save(file, kind)
    return file.getvalue()


@pytest.fixture
def folder(tmp_path):
    """20 pictures in two folders, two files that are none, and one that is not looked at."""
    root = tmp_path / "pictures"
    for index in range(20):
        path = root / ("a" if index < 12 else "b") / f"{index:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(index))
    (root / "a/05.png").write_bytes(b"hello")
    (root / "b/cut.jpg").write_bytes(encoded(3, "JPEG")[:300])
    (root / "notes.txt").write_text("no picture")
    return root
