"""The choice of a backend."""

import gc
import sys
import weakref
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from zoo.kernels import (
    bidirectional_gated_linear_attention,
    depthwise_conv2d,
    gated_linear_attention,
    large_kernel_attention,
    linear_attention,
)
from zoo.kernels.dispatch import PLANS, _missing, planned, select_backend, triton_backend

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
BOTH = {"torch": "torch", "triton": "triton"}


@pytest.fixture(autouse=True)
def asked_anew(monkeypatch):
    """A machine with Triton and a GPU for it, unless a test says otherwise."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    _missing.cache_clear()
    yield
    _missing.cache_clear()


def test_auto(monkeypatch):
    monkeypatch.delenv("ZOO_KERNELS", raising=False)
    assert select_backend("op", BOTH, CPU) == "torch"
    assert select_backend("op", BOTH, CUDA) == "triton"
    assert select_backend("op", {"torch": "torch"}, CUDA) == "torch"


@pytest.mark.parametrize(
    ("lacks", "reason"),
    [
        (("importlib.util.find_spec", lambda name: None), "the package triton is not installed"),
        (("torch.cuda.get_device_capability", lambda device: (6, 1)), "the GPU has compute capability 6.1"),
    ],
)
def test_pytorch_computes_where_triton_is_not_or_does_not_know_the_gpu(lacks, reason, monkeypatch):
    monkeypatch.setattr(*lacks)
    monkeypatch.setenv("ZOO_KERNELS", "auto")
    assert select_backend("op", BOTH, CUDA) == "torch"
    monkeypatch.setenv("ZOO_KERNELS", "triton")
    with pytest.raises(RuntimeError, match=reason):
        select_backend("op", BOTH, CUDA)


def test_torch_is_always_there(monkeypatch):
    monkeypatch.setenv("ZOO_KERNELS", "torch")
    assert select_backend("op", BOTH, CUDA) == "torch"


@pytest.mark.parametrize(
    ("backends", "device", "reason"),
    [
        (BOTH, CPU, "on the cpu device, not on a GPU"),
        ({"torch": "torch"}, CUDA, "has no Triton kernel for these arguments"),
    ],
)
def test_triton_where_it_cannot_run_says_why(backends, device, reason, monkeypatch):
    monkeypatch.setenv("ZOO_KERNELS", "triton")
    with pytest.raises(RuntimeError, match=f"op cannot run on Triton because .*{reason}: set ZOO_KERNELS=auto"):
        select_backend("op", backends, device)


def test_a_wrong_choice_reaches_the_user(monkeypatch):
    monkeypatch.setenv("ZOO_KERNELS", "cuda")
    with pytest.raises(ValueError, match="ZOO_KERNELS='cuda' is not one of auto, triton, torch"):
        depthwise_conv2d(torch.zeros(1, 2, 2, 1), torch.zeros(1, 1, 3, 3))


class _GivesUp:
    @staticmethod
    def plan(x):
        from triton.errors import TritonError

        def run(x):
            raise TritonError("out of resource: shared memory")

        return run


def test_where_triton_gives_up_pytorch_computes_with_a_warning(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setitem(sys.modules, "gives_up", _GivesUp)
    monkeypatch.delenv("ZOO_KERNELS", raising=False)
    run = triton_backend("gives_up", "plan", lambda x: x + 1)
    with pytest.warns(UserWarning, match="gives_up computes with PyTorch, because Triton cannot here: out of resource"):
        assert run(torch.ones(1)) == 2
    monkeypatch.setenv("ZOO_KERNELS", "triton")
    with pytest.raises(Exception, match="out of resource"):
        run(torch.ones(1))


def test_other_errors_reach_the_user(monkeypatch):
    monkeypatch.setitem(sys.modules, "fails", SimpleNamespace(plan=lambda x: len))
    with pytest.raises(TypeError, match="len"):
        triton_backend("fails", "plan", lambda x: x)(SimpleNamespace(is_cuda=False))


def test_triton_launches_on_the_device_of_the_tensors(monkeypatch):
    current = [0]

    @contextmanager
    def switch(device):
        before, current[0] = current[0], device.index
        yield
        current[0] = before

    monkeypatch.setattr("torch.cuda.current_device", lambda: current[0])
    monkeypatch.setattr("torch.cuda.device", switch)
    monkeypatch.setitem(sys.modules, "says_where", SimpleNamespace(plan=lambda x: lambda x: current[0]))
    run = triton_backend("says_where", "plan", None)
    for index in (1, 0, 1):
        x = SimpleNamespace(is_cuda=True, get_device=lambda index=index: index, device=torch.device("cuda", index))
        assert run(x) == index and current == [0]


def test_a_plan_is_for_arguments_alike(monkeypatch):
    made = []

    @planned
    def count(*arguments):
        made.append(arguments)
        return lambda *arguments: (len(made), *arguments)

    x = torch.zeros(4, 8)
    alike = [(x, None, 1, "a"), (torch.ones(4, 8), None, 1, "a"), (torch.zeros(5, 8)[1:], None, 1, "a")]
    for arguments in alike:
        found, *given = count(*arguments)
        assert found == 1 and given[0] is arguments[0]
    others = [
        (torch.zeros(8, 4), None, 1, "a"),
        (torch.zeros(8, 4).t(), None, 1, "a"),
        (x.double(), None, 1, "a"),
        (torch.zeros(33)[1:].view(4, 8), None, 1, "a"),  # not at a multiple of 16 bytes
        (x.to("meta"), None, 1, "a"),
        (x, x, 1, "a"),
        (x, None, 2, "a"),
    ]
    assert [count(*arguments)[0] for arguments in others] == list(range(2, 9))
    assert [count(*arguments)[0] for arguments in others] == [8] * 7
    monkeypatch.setenv("ZOO_KERNELS", "torch")
    assert count(*alike[0])[0] == 9


def test_plans_are_not_kept_without_end(monkeypatch):
    monkeypatch.setattr("zoo.kernels.dispatch.MAX_PLANS", 3)
    PLANS.clear()
    double = planned(lambda x: lambda x: 2 * x)
    assert [double(x) for x in range(10)] == list(range(0, 20, 2))
    assert len(PLANS) <= 3


def test_plans_keep_no_tensors():
    PLANS.clear()
    x = torch.randn(1, 2, 3, 4, requires_grad=True)
    kernel, mix = torch.randn(4, 1, 3, 3, requires_grad=True), torch.randn(4, 4, requires_grad=True)
    q, state = x.flatten(1, 2).unsqueeze(2), torch.randn(1, 1, 4, 4, requires_grad=True)
    y = depthwise_conv2d(x, kernel, activation="gelu", gate=x) + large_kernel_attention(
        x, kernel, None, kernel, None, mix, None
    )
    out = linear_attention(q, q, q, token_weights=True, grid=(2, 3), local=q, gate=q)
    out = out + bidirectional_gated_linear_attention(q, q, q, -q * q, -q * q)
    out = out + gated_linear_attention(q, q, q, -q * q, state)[0]
    (y.sum() + out.sum()).backward()
    assert len(PLANS) == 5 + 6  # each forward and backward; the convolution's activation has its own backward pass
    kept = [weakref.ref(tensor) for tensor in (x, kernel, mix, q, state, y, out, x.grad)]
    del x, kernel, mix, q, state, y, out
    gc.collect()
    assert [reference() for reference in kept] == [None] * len(kept)
