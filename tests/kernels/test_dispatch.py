"""The choice of a backend."""

import sys

import pytest
import torch

from zoo.kernels import depthwise_conv2d
from zoo.kernels.dispatch import _missing, select_backend, triton_backend

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
    def forward(x):
        from triton.errors import TritonError

        raise TritonError("out of resource: shared memory")


def test_where_triton_gives_up_pytorch_computes_with_a_warning(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setitem(sys.modules, "gives_up", _GivesUp)
    monkeypatch.delenv("ZOO_KERNELS", raising=False)
    run = triton_backend("gives_up", "forward", lambda x: x + 1)
    with pytest.warns(UserWarning, match="gives_up computes with PyTorch, because Triton cannot here: out of resource"):
        assert run(1) == 2
    monkeypatch.setenv("ZOO_KERNELS", "triton")
    with pytest.raises(Exception, match="out of resource"):
        run(1)
