"""The benchmark: what is measured, in which order, and what is said about it."""

import json
import subprocess
import sys
from importlib.metadata import version

import pytest
import torch
from torch import nn

from zoo.tools import benchmark_models as B

MODELS = """
import torch
from torch import nn

class Light(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return self.conv(x).mean((2, 3))

class Heavy(Light):
    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.ones(2**24))  # 64 MiB

    def forward(self, x):
        return super().forward(x) * self.table.add(1).max()  # and as much for the sum

light, heavy = Light, Heavy
"""


@pytest.fixture
def models(tmp_path):
    (tmp_path / "models.py").write_text(MODELS)
    return [f"{tmp_path / 'models.py'}:{name}" for name in ("light", "heavy")]


@pytest.fixture
def no_memory(monkeypatch):
    """Measuring memory starts processes."""
    monkeypatch.setattr(B, "_cpu_peak", lambda *_: None)


@pytest.mark.skipif(not (B.PROC / "clear_refs").exists(), reason="the memory of a process is measured on Linux only")
def test_numbers(models):
    settings = B.Settings(size=32, batch=2, rounds=3, seconds=0.01, threads=1)
    light, heavy = B.measure(models, settings)
    assert [light.name, heavy.name] == models and not light.compiled
    assert (light.params, heavy.params) == (112, 112 + 2**24)
    assert 0 <= light.peak_mib < 32 and 120 < heavy.peak_mib < 160
    assert len(light.images_per_second) == 3 and light.median > 5 * heavy.median > 0


def test_median_and_spread():
    row = B.Row("model", False, 1, (10.0, 40.0, 20.0), None)
    assert (row.median, row.spread) == (20.0, 0.75)


def test_models_take_turns(models, no_memory, monkeypatch):
    """Each round begins with another model, and every model has one turn in each."""
    turns, times = [], iter([0.25] * 4 + [1.0] * 100)

    def fake_time(step, repeats, device):
        turns.append((step, repeats))
        return next(times)

    monkeypatch.setattr(B, "_time", fake_time)
    rows = B.measure(models, B.Settings(size=8, batch=3, rounds=4, seconds=1.0))
    first, second = turns[0][0], turns[2][0]
    assert [step for step, _ in turns[4:]] == [first, second, second, first, first, second, second, first]
    assert {repeats for _, repeats in turns[4:]} == {4}  # as many as the least length of a turn needs
    assert rows[0].images_per_second == (12.0,) * 4


def test_compiled_rows(models, no_memory, monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "compile", lambda model, **kwargs: asked.append(kwargs) or model)
    rows = B.measure(models, B.Settings(size=8, rounds=1, seconds=0.0), compiled=True)
    assert [(row.name, row.compiled) for row in rows] == [(name, c) for name in models for c in (False, True)]
    assert asked == [{"dynamic": False}] * 2


def test_steps():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    seen = []
    model[0].register_forward_hook(lambda _module, inputs, output: seen.append((inputs[0], output)))

    infer = B.make_step(model, B.Settings(size=16, batch=2, channels_last=True, dtype=B.Dtype.bf16))
    assert infer().dtype == torch.bfloat16 and not model.training
    assert seen[-1][0].shape == (2, 3, 16, 16) and seen[-1][0].is_contiguous(memory_format=torch.channels_last)
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last) and not infer().requires_grad

    train = B.make_step(model, B.Settings(size=16, batch=2, train=True, amp=True, dtype=B.Dtype.bf16))
    train()
    once = model[0].weight.grad.clone()
    assert model.training and model[0].weight.dtype == torch.float32 and once.abs().max() > 0
    assert seen[-1][1].dtype == torch.bfloat16
    assert train().requires_grad and model[0].weight.grad.abs().max() < 2 * once.abs().max()  # not added up


def test_a_model_of_timm_that_is_made_for_one_size():
    assert B.build("vit_tiny_patch16_224", 64).eval()(torch.zeros(1, 3, 64, 64)).shape == (1, 1000)


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (["no_such_model"], {}, "There is no model no_such_model"),
        (["nowhere.py:model"], {}, "There is no file nowhere.py"),
        (["test_van"], {"amp": True}, r"Autocast \(--amp\) is to bf16 or fp16"),
        (["vgg11"], {"size": 8}, "vgg11 does not run on 8 x 8 pictures"),
    ],
)
def test_one_sentence_for_bad_input(no_memory, names, options, message):
    with pytest.raises(ValueError, match=message):
        B.measure(names, B.Settings(rounds=1, batch=1, seconds=0.0, **options))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_cuda():
    with pytest.raises(ValueError, match="There is no CUDA device here"):
        B.measure(["test_van"], B.Settings(device="cuda"))


def test_a_file_without_the_function(models):
    with pytest.raises(ValueError, match=r"models.py has no function none\."):
        B.build(models[0].replace("light", "none"))


def test_command_line(models, tmp_path):
    command = [sys.executable, "-m", "zoo.tools.benchmark_models"]
    options = ["--size", "16", "--batch", "2", "--rounds", "2", "--seconds", "0.01", "--threads", "1"]
    out = tmp_path / "out.json"
    done = subprocess.run([*command, models[0], *options, "--json", str(out)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "models.py:light" in done.stdout and "2 x 16 x 16" in done.stdout
    content = json.loads(out.read_text())
    assert content["settings"]["dtype"] == "fp32" and content["environment"]["threads"] == 1
    assert content["environment"]["torch"] == version("torch")
    (row,) = content["rows"]
    assert row["params"] == 112 and len(row["images_per_second"]) == 2 and row["median"] > 0
    assert not list(tmp_path.glob("*.tmp"))

    failed = subprocess.run([*command, "no_such_model"], capture_output=True, text=True)
    assert failed.returncode == 1 and failed.stderr.startswith("error: There is no model no_such_model")
