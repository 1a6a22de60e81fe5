"""The benchmark of models on the command line: table, file, plot and messages."""

import json
import os
import subprocess
import sys
from importlib.metadata import version

import pytest
from PIL import Image

from zoo.measure import Mode, Row, Settings
from zoo.tools import benchmark_models as B

MODEL = """
from torch import nn

def light():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
"""


@pytest.fixture
def model(tmp_path):
    (tmp_path / "models.py").write_text(MODEL)
    return f"{tmp_path / 'models.py'}:light"


def test_the_batch_follows_the_size(monkeypatch):
    asked = []

    def measure(names, settings, modes):
        asked.append((settings.size, settings.batch))
        if settings.size == 512:
            raise ValueError("too large")
        return [Row(names[0], Mode.eager, settings.size, settings.batch, 1, (1.0,), None)]

    monkeypatch.setattr(B, "measure", measure)
    rows = B.measure_sizes(["model"], [128, 256, 512, 1024], Settings(batch=8), [Mode.eager])
    assert asked == [(128, 8), (256, 2), (512, 1), (1024, 1)]
    assert [row.size for row in rows] == [128, 256, 1024]
    with pytest.raises(ValueError, match="too large"):
        B.measure_sizes(["model"], [512], Settings(), [Mode.eager])


def test_each_size_has_its_own_comparison(capsys):
    rows = [
        Row(name, Mode.eager, size, 1, 1, (rate,), None)
        for size, name, rate in [(8, "a", 10.0), (8, "b", 20.0), (16, "a", 2.0), (16, "b", 3.0)]
    ]
    relative = list(B.report(rows, Settings()).columns[-1].cells)
    assert relative == ["1.00x", "2.00x", "1.00x", "1.50x"]


def test_command_line(model, tmp_path):
    command = [sys.executable, "-m", "zoo.tools.benchmark_models"]
    options = ["--size", "16", "--batch", "2", "--rounds", "2", "--seconds", "0.01", "--threads", "1"]
    out, plot = tmp_path / "new/out.json", tmp_path / "other/plot.png"
    files = ["--json", str(out), "--plot", str(plot)]
    wide = {**os.environ, "COLUMNS": "160"}
    done = subprocess.run([*command, model, *options, *files], capture_output=True, text=True, env=wide)
    assert done.returncode == 0, done.stderr
    assert "models.py:light" in done.stdout and "2 x 16 x 16" in done.stdout
    content = json.loads(out.read_text())
    assert content["settings"]["dtype"] == "fp32" and content["environment"]["threads"] == 1
    assert content["environment"]["torch"] == version("torch")
    (row,) = content["rows"]
    assert (row["mode"], row["size"], row["batch"]) == ("eager", 16, 2)
    assert row["params"] == 112 and len(row["images_per_second"]) == 2 and row["median"] > 0
    assert not list(tmp_path.rglob("*.tmp"))
    with Image.open(plot) as image:
        assert image.format == "PNG" and len(set(image.convert("RGB").resize((60, 40)).get_flattened_data())) > 10

    failed = subprocess.run([*command, "no_such_model"], capture_output=True, text=True)
    assert failed.returncode == 1 and failed.stderr.startswith("error: There is no model no_such_model")
