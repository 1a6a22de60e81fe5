"""A tiny model, pictures, and the command in a folder of its own."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

from zoo.cli import app

NAME = "test_convnext"  # of timm, 0.3 M parameters, 160 x 160


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """The arguments of the command for a model with weights."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_file(timm.create_model(NAME).state_dict(), path)
    return ["--model", NAME, "--checkpoint", str(path), "--device", "cpu"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with a picture ``a.png`` and ``in/b.png``."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "in").mkdir()
    for name in ("a.png", "in/b.png"):
        draw(tmp_path / name)
    return tmp_path


def draw(path, seed=0):
    """Write a small picture in PNG, whatever the name."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize((50, 40)).save(path, "PNG")


@pytest.fixture
def zoo():
    """Runs the command, which must end with an exit code and no other exception."""

    def run(*arguments, code=0):
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        assert result.exit_code == code, result.output
        return result

    return run


@pytest.fixture(name="draw")
def _draw():
    return draw
