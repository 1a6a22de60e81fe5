"""Images per second and peak memory of models, measured side by side in one process.

The models take turns in rounds, each round beginning with another one, so that a machine that slows down slows all of
them.
"""

import importlib
import itertools
import math
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from importlib.metadata import version
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import timm
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from zoo import backbones  # noqa: F401  (registers the models)
from zoo.deploy import optimize
from zoo.kernels.dispatch import CHOICES

MEBIBYTE = 2**20
PROC = Path("/proc/self")

console = Console(stderr=True)


class Dtype(str, Enum):
    """Names of the dtypes on the command line."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"

    @property
    def torch(self) -> torch.dtype:
        """The dtype itself."""
        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.value]


class Mode(str, Enum):
    """How a model runs: as it is, through ``torch.compile``, or through ``zoo.optimize``."""

    eager = "eager"
    compiled = "compiled"
    optimized = "optimized"


@dataclass(frozen=True)
class Settings:
    """What every model is measured under.

    Attributes:
        size: height and width of the pictures in pixels.
        batch: pictures in a step.
        device: "cpu" or "cuda", with an index if wanted.
        dtype: of the weights, or of the autocast if ``amp``.
        amp: float32 weights under autocast to ``dtype``.
        channels_last: weights and pictures in ``torch.channels_last``.
        train: a step is forward, cross entropy and backward in training mode; else forward in ``inference_mode``.
        threads: of torch on the CPU; 0 leaves them as they are.
        rounds: how often each model has its turn.
        seconds: least length of a turn.
    """

    size: int = 224
    batch: int = 8
    device: str = "cpu"
    dtype: Dtype = Dtype.fp32
    amp: bool = False
    channels_last: bool = False
    train: bool = False
    threads: int = 0
    rounds: int = 7
    seconds: float = 0.5


@dataclass(frozen=True)
class Row:
    """One model in one mode.

    Attributes:
        name: as it was asked for.
        mode: how it ran.
        size: height and width of the pictures.
        batch: pictures in a step.
        params: number of parameters.
        images_per_second: of each round.
        peak_mib: what the model and its step added to the memory in use: allocated by torch on CUDA, resident in a
            fresh process on a Linux CPU (if compiled, with what the compiler left behind). None elsewhere.
    """

    name: str
    mode: Mode
    size: int
    batch: int
    params: int
    images_per_second: tuple[float, ...]
    peak_mib: float | None

    @property
    def median(self) -> float:
        """Images per second in the median round."""
        return statistics.median(self.images_per_second)

    @property
    def spread(self) -> float:
        """Half the distance from the slowest to the fastest round, relative to the median."""
        return (max(self.images_per_second) - min(self.images_per_second)) / 2 / self.median


def split_name(name: str) -> tuple[str, str]:
    """The model and the kernels of ``MODEL@KERNELS``; the kernels are empty where there is no such ending."""
    model, at, wanted = name.rpartition("@")
    return (model, wanted) if at and wanted.isalpha() else (name, "")


def build(name: str, size: int = 224) -> nn.Module:
    """Make a model with random weights.

    Args:
        name: of timm or the zoo, or ``FILE.py:FUNCTION``; what follows an @ is for ``kernels``.
        size: of the pictures, for models of timm that are made for one size.

    Raises:
        ValueError: there is no such model.
    """
    name, _ = split_name(name)
    path, colon, function = name.rpartition(":")
    if not colon:
        if not timm.is_model(name):
            raise ValueError(
                f"There is no model {name} in timm or the zoo: `zoo list` and timm.list_models() name them."
            )
        fixed = timm.models.get_pretrained_cfg_value(name, "fixed_input_size")
        return timm.create_model(name, **({"img_size": size} if fixed else {}))
    if not Path(path).is_file():
        raise ValueError(f"There is no file {path}: a model that is not registered is named as FILE.py:FUNCTION.")
    spec = spec_from_file_location(Path(path).stem, path)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, function):
        raise ValueError(f"{path} has no function {function}.")
    return getattr(module, function)()


@contextmanager
def kernels(name: str) -> Iterator[None]:
    """The operators' backend that a name asks for: ``ravlt_small@torch`` runs on PyTorch's operators, not on Triton.

    Raises:
        ValueError: there is no such backend.
    """
    _, wanted = split_name(name)
    if wanted and wanted not in CHOICES:
        raise ValueError(f"{name} asks for the kernels {wanted!r}, expected one of {', '.join(CHOICES)}.")
    before = os.environ.get("ZOO_KERNELS")
    try:
        if wanted:
            os.environ["ZOO_KERNELS"] = wanted
        yield
    finally:
        if wanted and before is None:
            del os.environ["ZOO_KERNELS"]
        elif wanted:
            os.environ["ZOO_KERNELS"] = before


def make_step(model: nn.Module, settings: Settings, mode: Mode = Mode.eager) -> Callable[[], Tensor]:
    """What is timed: one call runs one batch of the same random pictures through the model.

    The model is moved to the device, dtype and layout of the settings.
    """
    dtype = torch.float32 if settings.amp else settings.dtype.torch
    layout = torch.channels_last if settings.channels_last else torch.contiguous_format
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randn(settings.batch, 3, settings.size, settings.size, generator=generator)
    pictures = pictures.to(settings.device, dtype).contiguous(memory_format=layout)
    if mode is Mode.optimized:
        model = run = optimize(model, pictures)
    else:
        model = model.to(settings.device, dtype, memory_format=layout).train(settings.train)
        run = torch.compile(model, dynamic=False) if mode is Mode.compiled else model
    autocast = torch.autocast(settings.device.partition(":")[0], settings.dtype.torch, enabled=settings.amp)

    def train() -> Tensor:
        model.zero_grad()
        with autocast:
            logits = run(pictures)
            loss = nn.functional.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long, device=logits.device))
        loss.backward()
        return loss

    @torch.inference_mode()
    def infer() -> Tensor:
        with autocast:
            return run(pictures)

    return train if settings.train else infer


def measure(names: Sequence[str], settings: Settings, modes: Sequence[Mode] = (Mode.eager,)) -> list[Row]:
    """Measure models side by side.

    Args:
        names: as of ``build``, each with the kernels it runs on after an @, if not those of ``ZOO_KERNELS``.
        settings: the same for all.
        modes: a row for each model in each of them.

    Returns:
        The rows, in the order of the names. A model that does not run on these pictures has none: it is named on
        stderr.

    Raises:
        ValueError: there is no such model, kernels or device, or none of the models runs.
    """
    cuda = settings.device.startswith("cuda")
    if not cuda and settings.device != "cpu":
        raise ValueError(f"The device is {settings.device}: measured are cpu and cuda.")
    if cuda and not torch.cuda.is_available():
        raise ValueError("There is no CUDA device here: use --device cpu.")
    if settings.amp and settings.dtype is Dtype.fp32:
        raise ValueError("Autocast (--amp) is to bf16 or fp16: give --dtype one of them.")
    if Mode.optimized in modes and (settings.train or settings.amp):
        raise ValueError("zoo.optimize is for inference in the dtype of the pictures: leave --train and --amp out.")
    if settings.threads:
        torch.set_num_threads(settings.threads)
    cases = list(itertools.product(names, modes))
    if not cases:
        raise ValueError("There is nothing to measure: give a model and a mode.")
    # One frame of code serves all variants of a family, and each compiles it anew: too many would go on eagerly.
    with torch._dynamo.config.patch(recompile_limit=8 + 4 * len(cases), fail_on_recompile_limit_hit=True):
        return _measure(cases, settings, cuda)


@dataclass
class _Case:
    """A model that has run and waits for its turns."""

    name: str
    mode: Mode
    params: int
    step: Callable[[], Tensor]
    repeats: int
    peak: int | None
    rates: list[float]


def _measure(cases: Sequence[tuple[str, Mode]], settings: Settings, cuda: bool) -> list[Row]:
    ready, failures = [], []
    for name, mode in track(cases, "warming up", console=console, disable=not console.is_terminal):
        model = build(name, settings.size)
        try:
            with kernels(name):
                ready.append(_warmed_up(name, model, settings, mode, cuda))
        except (AssertionError, RuntimeError) as error:
            reason = str(error).partition("\n")[0]
            failures.append(f"{name} does not run on {settings.size} x {settings.size} pictures: {reason}")
    if not ready:
        raise ValueError("; ".join(failures))
    for failure in failures:
        console.print(f"left out: {failure}", style="yellow", markup=False)
    for first in track(range(settings.rounds), "measuring", console=console, disable=not console.is_terminal):
        for turn in range(len(ready)):
            case = ready[(first + turn) % len(ready)]
            with kernels(case.name):
                seconds = _time(case.step, case.repeats, settings.device)
            case.rates.append(settings.batch * case.repeats / seconds)
    return [
        Row(
            case.name,
            case.mode,
            settings.size,
            settings.batch,
            case.params,
            tuple(case.rates),
            case.peak and case.peak / MEBIBYTE,
        )
        for case in ready
    ]


def _warmed_up(name: str, model: nn.Module, settings: Settings, mode: Mode, cuda: bool) -> _Case:
    params = sum(parameter.numel() for parameter in model.parameters())
    before = torch.cuda.memory_allocated(settings.device) if cuda else 0
    step = make_step(model, settings, mode)
    step()
    peak = _cuda_peak(step, settings.device) - before if cuda else _cpu_peak(name, settings, mode)
    seconds = min(_time(step, 1, settings.device) for _ in range(2))
    return _Case(name, mode, params, step, max(1, math.ceil(settings.seconds / seconds)), peak, [])


def _time(step: Callable[[], Tensor], repeats: int, device: str) -> float:
    """Seconds of some steps in a row."""
    cuda = device.startswith("cuda")
    if cuda:
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    if cuda:
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _cuda_peak(step: Callable[[], Tensor], device: str) -> int:
    torch.cuda.reset_peak_memory_stats(device)
    step()
    return torch.cuda.max_memory_allocated(device)


def _cpu_peak(name: str, settings: Settings, mode: Mode) -> int | None:
    """Bytes that a model and its steps add to a fresh process; other models would leave freed memory behind in ours."""
    if not (PROC / "clear_refs").exists():
        return None
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(_resident_growth, name, settings, mode).result()


def _resident_growth(name: str, settings: Settings, mode: Mode) -> int:
    torch.set_num_threads(settings.threads or torch.get_num_threads())
    # What is loaded on first use (oneDNN, the compiler) is not the model's.
    make_step(nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()), settings, mode)()
    before = _resident("VmRSS")
    step = make_step(build(name, settings.size), settings, mode)
    step()
    (PROC / "clear_refs").write_text("5")  # forgets the peak so far, such as that of the compiler
    step()
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    line = next(line for line in (PROC / "status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def environment(device: str) -> dict[str, Any]:
    """Device, versions and threads, for headers and JSON files."""
    cuda = device.startswith("cuda")
    return {
        "device": torch.cuda.get_device_name(device)
        if cuda
        else f"CPU ({platform.machine()}, {torch.backends.cpu.get_cpu_capability()})",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "timm", "linear-vision-zoo")},
        **({"triton": importlib.import_module("triton").__version__} if cuda and find_spec("triton") else {}),
    }
