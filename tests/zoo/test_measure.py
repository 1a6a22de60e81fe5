"""Measuring models: what is measured, in which order, and what is said where something cannot be."""

import os

import pytest
import torch
from torch import nn

from zoo import measure as B

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
    assert [light.name, heavy.name] == models and light.mode is B.Mode.eager and (light.size, light.batch) == (32, 2)
    assert (light.params, heavy.params) == (112, 112 + 2**24)
    assert 0 <= light.peak_mib < 32 and 120 < heavy.peak_mib < 160
    assert len(light.images_per_second) == 3 and light.median > 5 * heavy.median > 0


def test_median_and_spread():
    row = B.Row("model", B.Mode.eager, 224, 8, 1, (10.0, 40.0, 20.0), None)
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
    rows = B.measure(models, B.Settings(size=8, rounds=1, seconds=0.0), [B.Mode.eager, B.Mode.compiled])
    assert [(row.name, row.mode.value) for row in rows] == [(name, m) for name in models for m in ("eager", "compiled")]
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
        ([], {}, "nothing to measure"),
        (["test_van"], {"device": "mps"}, "The device is mps: measured are cpu and cuda"),
        (["test_van"], {"amp": True}, r"Autocast \(--amp\) is to bf16 or fp16"),
        (["vgg11"], {"size": 8}, "vgg11 does not run on 8 x 8 pictures"),
        (["test_van@cuda"], {}, "test_van@cuda asks for the kernels 'cuda', expected one of auto, triton, torch"),
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


def test_a_model_that_does_not_run_is_left_out(no_memory, capsys):
    rows = B.measure(["vgg11", "test_van"], B.Settings(size=8, rounds=1, batch=1, seconds=0.0))
    assert [row.name for row in rows] == ["test_van"]
    assert "left out: vgg11 does not run on 8 x 8 pictures" in capsys.readouterr().err


def test_kernels_by_name(models, no_memory, monkeypatch):
    """The same model on two backends in one process, and no trace of it afterwards."""
    monkeypatch.setenv("ZOO_KERNELS", "auto")
    seen = []
    monkeypatch.setattr(B, "_time", lambda step, repeats, device: seen.append(os.environ["ZOO_KERNELS"]) or 1.0)
    names = [models[0], models[0] + "@torch"]
    rows = B.measure(names, B.Settings(size=8, rounds=2, seconds=0.0))
    assert [row.name for row in rows] == names
    assert seen == ["auto"] * 2 + ["torch"] * 2 + ["auto", "torch", "torch", "auto"]
    assert os.environ["ZOO_KERNELS"] == "auto"
    monkeypatch.delenv("ZOO_KERNELS")
    with B.kernels("model@torch"):
        assert os.environ["ZOO_KERNELS"] == "torch"
    assert "ZOO_KERNELS" not in os.environ


def test_optimized_rows(models, no_memory, monkeypatch):
    asked = []
    monkeypatch.setattr(B, "optimize", lambda model, sample: asked.append(sample) or model)
    settings = B.Settings(size=8, batch=2, rounds=1, seconds=0.0, dtype=B.Dtype.fp32)
    (row,) = B.measure(models[:1], settings, [B.Mode.optimized])
    assert row.mode is B.Mode.optimized and [sample.shape for sample in asked] == [(2, 3, 8, 8)]
    with pytest.raises(ValueError, match=r"zoo\.optimize is for inference"):
        B.measure(models[:1], B.Settings(train=True), [B.Mode.optimized])
