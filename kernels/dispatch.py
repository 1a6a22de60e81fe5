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

CHOICES = ("auto", "triton", "torch")
MIN_CAPABILITY = 7  # of an NVIDIA GPU, for Triton


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


def triton_backend(module: str, function: str, fallback: Callable) -> Callable:
    """A function of a module with Triton kernels, which is imported when it runs: not every platform has Triton.

    Where Triton gives up (a GPU it does not know, too little shared memory), the fallback computes, with a warning;
    not if the user asked for Triton.
    """

    def run(*arguments: Any) -> Any:
        from triton.errors import TritonError

        try:
            return getattr(importlib.import_module(module), function)(*arguments)
        except TritonError as error:
            if triton_asked_for():
                raise
            reason = str(error).splitlines()[-1]
            warnings.warn(f"{module} computes with PyTorch, because Triton cannot here: {reason}", stacklevel=2)
            return fallback(*arguments)

    return run


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
