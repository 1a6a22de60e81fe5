"""The benchmark of the operators: every contender computes the same, and the numbers are what they are called."""

import json
import math
import time

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from zoo.tools import benchmark_kernels as B

SHAPES = {
    B.Op.linear_attention: (1, 2, 36, 8),
    B.Op.depthwise_conv2d: (1, 8, 12, 7, 3),
    B.Op.large_kernel_attention: (1, 8, 12),
    B.Op.gated_linear_attention: (1, 2, 20, 8, 4),
    B.Op.bidirectional_gated_linear_attention: (1, 2, 20, 8, 4),
}


@pytest.fixture
def uncompiled(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


@pytest.mark.parametrize("op", [op for op in B.Op if "gated" not in op.value])
def test_contenders_compute_the_same(op, uncompiled):
    """But SDPA, which does the same job with other numbers."""
    found = {}
    for contender in B.contenders(op, SHAPES[op], "cpu", torch.float32):
        y = contender.compute(*contender.inputs)
        assert all(x.is_leaf and x.requires_grad for x in contender.inputs)
        found[contender.name] = y.permute(0, 2, 3, 1) if "conv2d" in contender.name else y
        if "conv2d" in contender.name:
            layout = torch.channels_last if "NHWC" in contender.name else torch.contiguous_format
            assert contender.inputs[0].is_contiguous(memory_format=layout)
    expected = found.pop("ours")
    assert expected.std() > 1e-3 and "reference, compiled" in found
    sdpa = found.pop("SDPA", None)
    assert (sdpa is None) == (op is not B.Op.linear_attention)
    for y in found.values():
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


def test_shares_and_times(monkeypatch):
    """Ten elements in, five out: read and written once forward; backward reads 15 and writes 10."""
    x = torch.ones(10, requires_grad=True)
    contender = B.Contender("ours@torch", lambda x: x[:5] * 2, (x,))
    times = iter([2.0, 5.0])  # milliseconds
    monkeypatch.setattr(B, "_milliseconds", lambda step, cuda, seconds: step() or next(times))
    row = B.time_contender(B.Op.linear_attention, (10,), contender, 1e6, 0.0)
    assert (row.forward, row.both, row.forward_graph, row.host, row.peak) == (2.0, 5.0, None, None, None)
    assert row.forward_share == pytest.approx(4 * 15 / 1e6 / 2e-3)
    assert row.both_share == pytest.approx(4 * (15 + 15 + 10) / 1e6 / 5e-3)


def test_the_time_of_a_call_is_that_of_the_core():
    """Not of the clock on the wall."""

    def works():
        end = time.process_time() + 0.002
        while time.process_time() < end:
            pass

    assert 2 <= B._milliseconds(works, False, 0.02) < 3
    assert B._milliseconds(lambda: time.sleep(0.002), False, 0.02) < 0.5


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_time_is_bounded(monkeypatch, capsys):
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(B.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(
        B, "time_contender", lambda op, shape, contender, *_: B.Row(op, shape, contender.name, *[1.0] * 8)
    )
    problems = [(B.Op.gated_linear_attention, SHAPES[B.Op.gated_linear_attention])] * 9
    assert len(list(B.run(problems, "cpu", torch.float32, 1e9, 25))) == 2
    assert "The 25 seconds are over" in capsys.readouterr().err


def test_what_is_too_slow_or_fails_gets_no_larger_shape(monkeypatch, uncompiled, capsys):
    asked = []

    def time_contender(op, shape, contender, *_):
        asked.append(contender.name)
        if contender.name == "SDPA":
            raise RuntimeError("out of memory")
        slow = 2000.0 if contender.name == "reference, compiled" else 1.0
        return B.Row(op, shape, contender.name, 1.0, None, 0.5, slow, None, 0.5, None, None)

    monkeypatch.setattr(B, "time_contender", time_contender)
    problems = [(B.Op.linear_attention, (1, 2, tokens, 8)) for tokens in (36, 49, 25)]
    rows = list(B.run(problems, "cpu", torch.float32, 1e9, 100))
    assert [row.contender for row in rows] == ["ours", "reference, compiled", "ours", "ours", "reference, compiled"]
    assert asked == ["ours", "SDPA", "reference, compiled", "ours", "ours", "SDPA", "reference, compiled"]
    assert "SDPA does not run on linear_attention" in capsys.readouterr().err


def command(*arguments):
    import typer

    app = typer.Typer()
    app.command()(B.main)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_table_and_file(monkeypatch, tmp_path):
    monkeypatch.setattr(B, "CPU_SHAPES", {op: (shape,) for op, shape in SHAPES.items()})
    monkeypatch.setattr(B, "copy_bandwidth", lambda device: 1e10)
    out = tmp_path / "new/kernels.json"
    result = command("--seconds", 30, "--no-compile", "--json", out)
    assert result.exit_code == 0, result.output
    document = json.loads(out.read_text())
    assert document["environment"]["dtype"] == "fp32" and document["environment"]["copy_bandwidth"] == 1e10
    assert {row["op"] for row in document["rows"]} == {op.value for op in B.Op}
    assert all(row["both"] > row["forward"] > 0 and row["contender"] != B.COMPILED for row in document["rows"])
    lines = result.stdout.splitlines()
    assert len(lines) == 2 + len(document["rows"]) and "1 x 2 x 36 x 8" in result.stdout


def test_plot(monkeypatch, tmp_path):
    monkeypatch.setattr(B, "copy_bandwidth", lambda device: 1e10)
    out = tmp_path / "kernels.png"
    options = ["--op", "linear_attention", "--op", "depthwise_conv2d", "--no-compile", "--plot", out]
    result = command(*options, "--side", 64, "--side", 32)
    assert result.exit_code == 0, result.output
    assert result.stdout.index("1 x 1 x 64 x 64") < result.stdout.index("1 x 1 x 256 x 64")
    with Image.open(out) as image:
        colours = image.convert("RGB").resize((200, 100)).getcolors(20000)
    assert len(colours) > 50 and list(tmp_path.iterdir()) == [out]


def test_shapes_of_the_plot_are_of_stride_4():
    for op in B.Op:
        shape = B.plot_shape(op, 256)
        assert shape[2] == (64 if "conv" in op.value or "kernel" in op.value else 64**2)
        assert math.prod(next(B.contenders(op, B.plot_shape(op, 32), "cpu", torch.float32)).inputs[0].shape) <= 64 * 64


def test_no_such_device():
    result = command("--device", "tpu")
    assert result.exit_code == 2 and "the device 'tpu' cannot be used here" in result.stderr
