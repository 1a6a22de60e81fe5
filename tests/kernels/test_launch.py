"""Launches of Triton kernels past Triton's look at their arguments."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from zoo.kernels import launch


class _Kernel:
    """Notes what it is called with, as Triton's kernels are, and what its compiled form is called with."""

    arg_names = ("x", "y", "x_b", "x_n", "N", "D", "WIDE")

    def __init__(self, compiled=True):
        self.calls, self.launches = [], []
        self.compiled = SimpleNamespace(
            function="function", packed_metadata="metadata", run=lambda *arguments: self.launches.append(arguments)
        )
        if not compiled:
            self.compiled = None

    def __getitem__(self, grid):
        def call(*arguments, **constants):
            self.calls.append((grid, arguments, constants))
            return self.compiled

        return call


CONSTANTS = {"WIDE": True, "D": 8, "num_warps": 4}


@pytest.fixture
def tensors():
    return [(torch.zeros(2, 6, 8)[:, ::2], torch.zeros(4)) for _ in range(3)]


def test_the_first_goes_through_triton_and_the_others_straight_to_its_launcher(monkeypatch, tensors):
    streams = SimpleNamespace(active=SimpleNamespace(get_current_stream=lambda index: f"stream of {index}"))
    monkeypatch.setattr(launch, "driver", streams)
    kernel = _Kernel()
    run = launch.Launch(kernel, (5, 7), (3,), CONSTANTS, torch.device("cuda", 1), strided=1, unit=2)
    for x, y in tensors:
        run(x, y)
    x, y = tensors[0]
    assert kernel.calls == [((5, 7, 1), (x, y, 24, 8, 3), CONSTANTS)]
    start = (5, 7, 1, "stream of 1", "function", "metadata", None, None, None)
    for (x, y), found in zip(tensors[1:], kernel.launches, strict=True):
        assert found[:9] == start and found[9] is x and found[10] is y
        assert found[11:] == (24, 8, 3, 8, True)  # constants in the order of the parameters, options left out


def test_the_interpreter_is_called_every_time(tensors):
    kernel = _Kernel(compiled=False)
    run = launch.Launch(kernel, (5,), (24, 8, 3), CONSTANTS, torch.device("cpu"))
    for x, y in tensors:
        run(x, y)
    assert len(kernel.calls) == 3 and all(grid == (5, 1, 1) for grid, *_ in kernel.calls)


def test_tensors_without_unit_channels_are_copied():
    def plan(x, y, number):
        assert x.stride(-1) == y.stride(-1) == 1
        return lambda x, y, number: (x, y, number)

    run_any = launch.with_unit_channels(plan)
    x, y = torch.arange(6.0).view(2, 3), torch.arange(6.0).view(3, 2).t()
    run = run_any(x, y, 5)
    for _ in range(2):
        a, b, number = run(x, y, 5)
        assert a is x and number == 5 and torch.equal(b, y) and b.is_contiguous()
    run = run_any(x, x[:, :2], 5)
    assert run(x, x[:, :2], 5)[1].stride() == (3, 1)
    one = torch.ones(()).expand(2, 3)
    assert run_any(x, one, 5)(x, one, 5)[1].is_contiguous()
