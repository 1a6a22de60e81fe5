"""Which backend computes an operator.

``ZOO_KERNELS`` is ``auto`` (Triton on a GPU where the operator has a Triton backend, PyTorch elsewhere), ``torch`` or
``triton``; asking for Triton where it cannot run is an error that says why.
"""

import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

CHOICES = ("auto", "triton", "torch")
MIN_CAPABILITY = 7  # of an NVIDIA GPU, for Triton
MAX_PLANS = 1024
PLANS: dict[tuple, Callable] = {}


def planned(plan: Callable[..., Callable]) -> Callable:
    """A function that checks and chooses once for all arguments alike: that takes longer than to launch a kernel.

    Arguments are alike if they differ in nothing but the numbers in their tensors and where these lie, aligned to 16
    bytes alike.

    Args:
        plan: from the arguments to a function of arguments like them.
    """

    def compute(*arguments: Any) -> Any:
        kinds = [
            (x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % 16) if isinstance(x, Tensor) else x
            for x in arguments
        ]
        key = (plan, os.environ.get("ZOO_KERNELS"), *kinds)
        run = PLANS.get(key)
        if run is None:
            if len(PLANS) >= MAX_PLANS:
                PLANS.clear()
            run = PLANS[key] = plan(*arguments)
        return run(*arguments)

    return compute


def select_backend(op: str, backends: Mapping[str, Callable], device: torch.device) -> Callable:
    """The implementation of an operator for tensors on a device.

    Args:
        op: name of the operator, for messages.
        backends: implementations by backend; "torch" is always there.
        device: where the tensors are.

    Raises:
        ValueError: ``ZOO_KERNELS`` is not one of the choices.
        RuntimeError: ``ZOO_KERNELS=triton`` and Triton cannot compute this operator there.
    """
    wanted = os.environ.get("ZOO_KERNELS", "auto")
    if wanted not in CHOICES:
        raise ValueError(f"ZOO_KERNELS={wanted!r} is not one of {', '.join(CHOICES)}.")
    if wanted == "torch":
        return backends["torch"]
    obstacle = _obstacle(backends, device)
    if wanted == "triton" and obstacle:
        raise RuntimeError(
            f"ZOO_KERNELS=triton, but {op} cannot run on Triton because {obstacle}: set ZOO_KERNELS=auto."
        )
    return backends["torch" if obstacle else "triton"]


def planned_once(plan: Callable[..., Callable]) -> Callable:
    """As ``planned``, of a function whose arguments are all like those of its first call."""
    run = None

    def compute(*arguments: Any) -> Any:
        nonlocal run
        if run is None:
            run = plan(*arguments)
        return run(*arguments)

    return compute


def triton_backend(module: str, plan: str, fallback: Callable) -> Callable:
    """A function of arguments like those of its first call, which a module with Triton kernels plans.

    The module is imported then: not every platform has Triton. Where Triton gives up (a GPU it does not know, too
    little shared memory), the fallback computes, with a warning; not if the user asked for Triton.

    Args:
        module: its name.
        plan: name of a function there, from the arguments to a function of arguments like them.
        fallback: the same on PyTorch's operators.
    """
    run = planned_once(lambda *arguments: getattr(importlib.import_module(module), plan)(*arguments))

    def compute(first: Tensor, *rest: Any) -> Any:
        if first.is_cuda and first.get_device() != torch.cuda.current_device():  # which is where Triton launches
            with torch.cuda.device(first.device):
                return compute(first, *rest)
        try:
            return run(first, *rest)
        except Exception as error:
            from triton.errors import TritonError

            if triton_asked_for() or not isinstance(error, TritonError):
                raise
            reason = str(error).splitlines()[-1]
            warnings.warn(f"{module} computes with PyTorch, because Triton cannot here: {reason}", stacklevel=2)
            return fallback(first, *rest)

    return compute


def triton_asked_for() -> bool:
    """Whether the user wants Triton and nothing else."""
    return os.environ.get("ZOO_KERNELS") == "triton"


def _obstacle(backends: Mapping[str, Callable], device: torch.device) -> str:
    """Why Triton cannot compute an operator on a device; empty if it can."""
    if "triton" not in backends:
        return "it has no Triton kernel for these arguments"
    if device.type != "cuda" and not (triton_asked_for() and os.environ.get("TRITON_INTERPRET") == "1"):
        return f"its tensors are on the {device.type} device, not on a GPU"
    return _missing(device)


@functools.cache  # every call of an operator asks
def _missing(device: torch.device) -> str:
    """What Triton needs and this installation or the device does not have."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if major < MIN_CAPABILITY:
            return f"the GPU has compute capability {major}.{minor}, less than {MIN_CAPABILITY}.0"
    return ""
