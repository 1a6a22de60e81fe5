"""Measure images/s and peak memory of models side by side, in one process.

    python -m zoo.tools.benchmark_models ravlt_tiny van_b1 convnext_tiny --batch 8 --threads 2
    python -m zoo.tools.benchmark_models ravlt_tiny --device cuda --dtype bf16 --amp --compile --train --json out.json

A name is any of timm or the zoo, or ``FILE.py:FUNCTION``, a function without arguments that makes a module. The models
take turns in rounds, each round beginning with another one, so that a machine that slows down slows all of them.
"""

import importlib
import itertools
import json
import math
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from enum import Enum
from importlib.metadata import version
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Annotated, Any

import timm
import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

import zoo  # noqa: F401  (registers the models)
from zoo.console import output_console

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
    """One model, eager or compiled.

    Attributes:
        name: as it was asked for.
        compiled: whether by ``torch.compile``.
        params: number of parameters.
        images_per_second: of each round.
        peak_mib: what the model and its step added to the memory in use: allocated by torch on CUDA, resident in a
            fresh process on a Linux CPU (if compiled, with what the compiler left behind). None elsewhere.
    """

    name: str
    compiled: bool
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


def build(name: str, size: int = 224) -> nn.Module:
    """Make a model with random weights.

    Args:
        name: of timm or the zoo, or ``FILE.py:FUNCTION``.
        size: of the pictures, for models of timm that are made for one size.

    Raises:
        ValueError: there is no such model.
    """
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


def make_step(model: nn.Module, settings: Settings, *, compiled: bool = False) -> Callable[[], Tensor]:
    """What is timed: one call runs one batch of the same random pictures through the model.

    The model is moved to the device, dtype and layout of the settings.
    """
    dtype = torch.float32 if settings.amp else settings.dtype.torch
    layout = torch.channels_last if settings.channels_last else torch.contiguous_format
    model = model.to(settings.device, dtype, memory_format=layout).train(settings.train)
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randn(settings.batch, 3, settings.size, settings.size, generator=generator)
    pictures = pictures.to(settings.device, dtype).contiguous(memory_format=layout)
    run = torch.compile(model, dynamic=False) if compiled else model
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


def measure(names: Sequence[str], settings: Settings, *, compiled: bool = False) -> list[Row]:
    """Measure models side by side.

    Args:
        names: as of ``build``.
        settings: the same for all.
        compiled: add a row for each model compiled.

    Returns:
        A row for each model, or two, in the order of the names.

    Raises:
        ValueError: there is no such model or device, or the model does not take pictures of this size.
    """
    cuda = settings.device.startswith("cuda")
    if cuda and not torch.cuda.is_available():
        raise ValueError("There is no CUDA device here: use --device cpu.")
    if settings.amp and settings.dtype is Dtype.fp32:
        raise ValueError("Autocast (--amp) is to bf16 or fp16: give --dtype one of them.")
    if settings.threads:
        torch.set_num_threads(settings.threads)
    cases = list(itertools.product(names, (False, True) if compiled else (False,)))
    # One frame of code serves all variants of a family, and each compiles it anew: too many would go on eagerly.
    with torch._dynamo.config.patch(recompile_limit=8 + 4 * len(cases), fail_on_recompile_limit_hit=True):
        return _measure(cases, settings, cuda)


def _measure(cases: Sequence[tuple[str, bool]], settings: Settings, cuda: bool) -> list[Row]:
    steps, params, peaks, repeats = [], [], [], []
    for name, compile_it in track(cases, "warming up", console=console, disable=not console.is_terminal):
        model = build(name, settings.size)
        params.append(sum(parameter.numel() for parameter in model.parameters()))
        before = torch.cuda.memory_allocated(settings.device) if cuda else 0
        steps.append(make_step(model, settings, compiled=compile_it))
        try:
            steps[-1]()
        except (AssertionError, RuntimeError) as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(f"{name} does not run on {settings.size} x {settings.size} pictures: {reason}") from error
        peaks.append(_cuda_peak(steps[-1], settings.device) - before if cuda else _cpu_peak(name, settings, compile_it))
        seconds = min(_time(steps[-1], 1, settings.device) for _ in range(2))
        repeats.append(math.ceil(settings.seconds / seconds))
    rates: list[list[float]] = [[] for _ in cases]
    for first in track(range(settings.rounds), "measuring", console=console, disable=not console.is_terminal):
        for turn in range(len(cases)):
            case = (first + turn) % len(cases)
            rates[case].append(settings.batch * repeats[case] / _time(steps[case], repeats[case], settings.device))
    return [
        Row(name, compile_it, count, tuple(rate), peak and peak / MEBIBYTE)
        for (name, compile_it), count, rate, peak in zip(cases, params, rates, peaks)
    ]


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


def _cpu_peak(name: str, settings: Settings, compiled: bool) -> int | None:
    """Bytes that a model and its steps add to a fresh process; other models would leave freed memory behind in ours."""
    if not (PROC / "clear_refs").exists():
        return None
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(_resident_growth, name, settings, compiled).result()


def _resident_growth(name: str, settings: Settings, compiled: bool) -> int:
    torch.set_num_threads(settings.threads or torch.get_num_threads())
    # What is loaded on first use (oneDNN, the compiler) is not the model's.
    make_step(nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()), settings, compiled=compiled)()
    before = _resident("VmRSS")
    step = make_step(build(name, settings.size), settings, compiled=compiled)
    step()
    (PROC / "clear_refs").write_text("5")  # forgets the peak so far, such as that of the compiler
    step()
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    line = next(line for line in (PROC / "status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def environment(settings: Settings) -> dict[str, Any]:
    """Device, versions and threads, for the header and the JSON file."""
    cuda = settings.device.startswith("cuda")
    return {
        "device": torch.cuda.get_device_name(settings.device)
        if cuda
        else f"CPU ({platform.machine()}, {torch.backends.cpu.get_cpu_capability()})",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "timm", "linear-vision-zoo")},
        **({"triton": importlib.import_module("triton").__version__} if cuda and find_spec("triton") else {}),
    }


def report(rows: Sequence[Row], settings: Settings) -> Table:
    """The table that is printed; the last column compares with the first row."""
    facts = ", ".join(f"{key} {value}" for key, value in environment(settings).items())
    autocast = " autocast" if settings.amp else ""
    what = f"{'training' if settings.train else 'inference'}, {settings.batch} x {settings.size} x {settings.size}"
    layout = ", channels last" if settings.channels_last else ""
    table = Table(title=f"{facts}\n{what}, {settings.dtype.value}{autocast}{layout}, {settings.rounds} rounds")
    table.add_column("model", no_wrap=True)
    for heading in ("mode", "params (M)", "images/s", "spread", "peak MiB", "relative"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            Path(row.name).name,
            "compiled" if row.compiled else "eager",
            f"{row.params / 1e6:.2f}",
            f"{row.median:.1f}",
            f"+-{row.spread:.0%}",
            "-" if row.peak_mib is None else f"{row.peak_mib:.0f}",
            f"{row.median / rows[0].median:.2f}x",
        )
    return table


def save(rows: Sequence[Row], settings: Settings, path: Path) -> None:
    """Write all numbers to a JSON file."""
    content = {
        "environment": environment(settings),
        "settings": asdict(settings),
        "rows": [{**asdict(row), "median": row.median, "spread": row.spread} for row in rows],
    }
    scratch = path.with_name(path.name + ".tmp")
    scratch.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(scratch, path)


def main(
    names: Annotated[list[str], typer.Argument(help="Models of timm or the zoo, or FILE.py:FUNCTION.")],
    size: Annotated[int, typer.Option(min=1, help="Height and width in pixels.")] = 224,
    batch: Annotated[int, typer.Option(min=1, help="Pictures in a step.")] = 8,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[Dtype, typer.Option(help="Of the weights, or of the autocast.")] = Dtype.fp32,
    amp: Annotated[bool, typer.Option("--amp", help="Float32 weights under autocast.")] = False,
    compiled: Annotated[bool, typer.Option("--compile", help="Measure each model compiled, too.")] = False,
    channels_last: Annotated[bool, typer.Option("--channels-last", help="NHWC strides.")] = False,
    train: Annotated[bool, typer.Option("--train", help="Forward and backward.")] = False,
    threads: Annotated[int, typer.Option(min=0, help="Of the CPU; 0 is torch's choice.")] = 0,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each model.")] = 7,
    seconds: Annotated[float, typer.Option(help="Least length of a turn.")] = 0.5,
    json_path: Annotated[Path | None, typer.Option("--json", help="Also write the numbers to a file.")] = None,
) -> None:
    """Measure images/s and peak memory of models side by side."""
    settings = Settings(size, batch, device, dtype, amp, channels_last, train, threads, rounds, seconds)
    try:
        rows = measure(names, settings, compiled=compiled)
    except ValueError as error:
        console.print(f"error: {error}", style="red", markup=False)
        raise typer.Exit(1) from None
    output_console().print(report(rows, settings))
    if json_path:
        save(rows, settings, json_path)


if __name__ == "__main__":
    typer.run(main)
