"""What is installed, what of it works, and what to install for what is missing: the table of `zoo doctor`."""

import importlib
import importlib.util
import os
import platform
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from typing import Any

import torch

from zoo import kernels

DISTRIBUTION = "linear-vision-zoo"
USES = {
    "": "everything",
    "bench": "plots",
    "bulk": "bulk inference",
    "dense": "boxes and masks",
    "export": "ONNX and Parquet files",
    "mllm": "multimodal language models",
    "serve": "serving",
    "train": "training",
}
# Extras that are unions of others, or for developers.
SKIPPED_EXTRAS = ("all", "dev")
# What else has the modules of a requirement: the compiled mmcv, and the maintained forks of the project onedl.
EQUIVALENTS = {
    "mmengine": ("onedl-mmengine",),
    "mmcv-lite": ("onedl-mmcv", "mmcv"),
    "mmdet": ("onedl-mmdetection",),
    "mmsegmentation": ("onedl-mmsegmentation",),
    "opencv-python": ("opencv-python-headless",),
}
# Used where they are there, required by no extra of ours, or only through others.
ALSO = {"triton": "GPU kernels", "opencv-python": USES["dense"]}
FORK = "onedl-"
RUNS = "runs"
# Modules that one distribution alone may bring.
MODULES = {"mmengine": "mmengine", "mmcv": "mmcv-lite", "mmdet": "mmdet", "mmseg": "mmsegmentation"}


@dataclass(frozen=True)
class Package:
    """One distribution.

    Attributes:
        name: what is installed, or would be.
        version: None if it is not installed.
        use: what it is for.
        extra: the extra of this package that brings it; empty for one that every installation has, None for one that
            is optional.
    """

    name: str
    version: str | None
    use: str
    extra: str | None


@dataclass(frozen=True)
class Diagnosis:
    """What `zoo doctor` prints.

    Attributes:
        python: its version.
        system: operating system and processor.
        toolkit: version of CUDA or ROCm that PyTorch is built for; None for a build without.
        gpus: names of the GPUs that PyTorch sees.
        triton: "runs", or why it does not.
        mmcv_ops: where the ops of ``mmcv.ops`` come from: "compiled", "torch", or None if there is no mmcv.
        torch_ops: the ops of ``mmcv.ops`` that PyTorch computes; where they are not compiled, the others raise.
        packages: what is installed or missing.
        advice: for each use that lacks packages, the command that installs them.
        problems: what is installed and does not work, one sentence each.
    """

    python: str
    system: str
    toolkit: str | None
    gpus: tuple[str, ...]
    triton: str
    mmcv_ops: str | None
    torch_ops: tuple[str, ...]
    packages: tuple[Package, ...]
    advice: dict[str, str]
    problems: tuple[str, ...]


def diagnose() -> Diagnosis:
    """Look at this Python. Imports mmengine, mmcv, mmdet and mmseg where they are, and runs one kernel on a GPU."""
    required = list(_required())
    names = {package.name for package in required}
    packages = [*required, *(_package(name, use, None) for name, use in ALSO.items() if name not in names)]
    problems = [*_version_conflicts(), *_rival_distributions()]
    triton = _triton()
    if triton != RUNS and torch.cuda.is_available():
        problems.append(f"Triton does not run: {triton}")
    mmcv_ops, torch_ops = None, ()
    if any(map(importlib.util.find_spec, MODULES)):
        mmcv_ops, torch_ops, broken = _openmmlab()
        problems += broken
    return Diagnosis(
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        toolkit=_toolkit(),
        gpus=tuple(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())),
        triton=triton,
        mmcv_ops=mmcv_ops,
        torch_ops=torch_ops,
        packages=tuple(packages),
        advice=_advice(packages),
        problems=tuple(problems),
    )


def _required() -> Iterator[Package]:
    """What the metadata of this package asks for, by extra."""
    for extra, need in _requirements():
        yield _package(need.name, USES.get(extra, extra), extra)


def _requirements() -> Iterator[tuple[str, Any]]:
    """(extra, requirement) for this Python, without the extras that are unions or for developers."""
    from packaging.requirements import Requirement

    needs = [Requirement(text) for text in requires(DISTRIBUTION) or ()]
    extras = [extra for extra in metadata(DISTRIBUTION).get_all("Provides-Extra") or () if extra not in SKIPPED_EXTRAS]
    for need in needs:
        if need.marker is None or need.marker.evaluate({"extra": ""}):
            yield "", need
        else:
            yield from ((extra, need) for extra in extras if need.marker.evaluate({"extra": extra}))


def _package(name: str, use: str, extra: str | None) -> Package:
    """A distribution, or what is installed in its place."""
    for candidate in (name, *EQUIVALENTS.get(name, ())):
        if found := _version(candidate):
            return Package(candidate, found, use, extra)
    return Package(name, None, use, extra)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _version_conflicts() -> Iterator[str]:
    for extra, need in _requirements():
        found = _version(need.name)
        if found and not need.specifier.contains(found, prereleases=True):
            yield (
                f"{need.name} {found} is installed, but {USES.get(extra, extra)} needs {need.specifier}: "
                f"pip install '{need.name}{need.specifier}'"
            )


def _rival_distributions() -> Iterator[str]:
    for name in MODULES.values():
        names = [candidate for candidate in (name, *EQUIVALENTS[name]) if _version(candidate)]
        if len(names) > 1:
            yield f"{' and '.join(names)} overwrite each other's files: uninstall them, then install one of them"


def _toolkit() -> str | None:
    return torch.version.cuda or torch.version.hip


def _triton() -> str:
    """Runs a kernel on the GPU, forward and backward."""
    if not importlib.util.find_spec("triton"):
        return "the package triton is not installed"
    if not torch.cuda.is_available():
        return "PyTorch sees no GPU" if _toolkit() else "this PyTorch is built without CUDA"
    asked = os.environ.get("ZOO_KERNELS")
    os.environ["ZOO_KERNELS"] = "triton"  # then it does not fall back, but says why it cannot run
    try:
        q, k, v = torch.randn(3, 1, 16, 1, 16, device="cuda", requires_grad=True)
        kernels.linear_attention(q, k, v).sum().backward()
        torch.cuda.synchronize()
    except Exception as error:  # a compiler, a driver and a GPU have many ways to fail
        return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    finally:
        os.environ.pop("ZOO_KERNELS") if asked is None else os.environ.update(ZOO_KERNELS=asked)
    return RUNS


def _openmmlab() -> tuple[str | None, tuple[str, ...], list[str]]:
    """Where the ops of mmcv come from, which of them PyTorch computes, and what does not work."""
    problems = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            openmmlab = importlib.import_module("zoo.openmmlab")
        except Exception as error:
            return None, (), [_failure("zoo.openmmlab", error)]
        for module in ("mmdet", "mmseg"):
            if importlib.util.find_spec(module):
                try:
                    importlib.import_module(module)
                except Exception as error:  # they assert which versions of the others they take
                    problems.append(_failure(module, error))
    problems += [str(warning.message) for warning in caught if "compiled ops of mmcv" in str(warning.message)]
    torch_ops = tuple(sorted(openmmlab.ops.OPS)) if openmmlab.OPS_FROM == "torch" else ()
    return openmmlab.OPS_FROM, torch_ops, problems


def _failure(module: str, error: Exception) -> str:
    return f"import {module} fails: {str(error).strip().partition(chr(10))[0] or type(error).__name__}"


def _advice(packages: Iterable[Package]) -> dict[str, str]:
    forks = any(package.name.startswith(FORK) for package in packages)
    missing: dict[str, list[Package]] = {}
    for package in packages:
        if package.version is None and package.extra is not None:
            missing.setdefault(package.extra, []).append(package)
    commands = {}
    for extra, group in missing.items():
        wanted = f"'{DISTRIBUTION}[{extra}]'" if extra else DISTRIBUTION
        if forks and extra == "dense":  # the extra would put the other family beside them
            equivalents = [(*EQUIVALENTS.get(package.name, ()), package.name) for package in group]
            wanted = " ".join(
                next((name for name in names if name.startswith(FORK)), names[-1]) for names in equivalents
            )
        commands[group[0].use] = f"pip install {wanted}"
    return commands
