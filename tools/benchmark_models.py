"""Measure images/s and peak memory of models side by side, in one process.

    python -m zoo.tools.benchmark_models ravlt_tiny van_b1 convnext_tiny --batch 8 --threads 2
    python -m zoo.tools.benchmark_models ravlt_tiny --device cuda --dtype bf16 --amp --compile --train --json out.json
    python -m zoo.tools.benchmark_models ravlt_small ravlt_small@torch --device cuda --dtype bf16 --compile --optimize
    python -m zoo.tools.benchmark_models ravlt_tiny deit_tiny_patch16_224 --size 224 --size 512 --plot speed.png

A name is any of timm or the zoo, or ``FILE.py:FUNCTION``, a function without arguments that makes a module; with
``@torch`` after it the model runs on PyTorch's operators instead of the Triton kernels. Of several sizes the first has
the batch that is asked for, and the others as many pictures as make about as many pixels.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from zoo.console import output_console
from zoo.files import write_text
from zoo.measure import Dtype, Mode, Row, Settings, console, environment, measure
from zoo.plots import draw_lines, new_figure


def measure_sizes(names: Sequence[str], sizes: Sequence[int], settings: Settings, modes: Sequence[Mode]) -> list[Row]:
    """As ``measure``, for pictures of several sizes; at a size where no model runs there are no rows."""
    rows, failure = [], None
    for size in sizes:
        batch = max(1, round(settings.batch * (sizes[0] / size) ** 2))
        try:
            rows += measure(names, replace(settings, size=size, batch=batch), modes)
        except ValueError as error:
            if len(sizes) == 1:
                raise
            failure = error
            console.print(f"left out: {error}", style="yellow", markup=False)
    if not rows:
        raise failure
    return rows


def report(rows: Sequence[Row], settings: Settings) -> Table:
    """The table that is printed; the last column compares with the first row of the same size."""
    facts = ", ".join(f"{key} {value}" for key, value in environment(settings.device).items())
    autocast = " autocast" if settings.amp else ""
    what = "training" if settings.train else "inference"
    layout = ", channels last" if settings.channels_last else ""
    table = Table(title=f"{facts}\n{what}, {settings.dtype.value}{autocast}{layout}, {settings.rounds} rounds")
    table.add_column("model", no_wrap=True)
    for heading in ("mode", "pictures", "params (M)", "images/s", "spread", "peak MiB", "relative"):
        table.add_column(heading, justify="right")
    first: dict[int, float] = {}
    for row in rows:
        table.add_row(
            Path(row.name).name,
            row.mode.value,
            f"{row.batch} x {row.size} x {row.size}",
            f"{row.params / 1e6:.2f}",
            f"{row.median:.1f}",
            f"+-{row.spread:.0%}",
            "-" if row.peak_mib is None else f"{row.peak_mib:.0f}",
            f"{row.median / first.setdefault(row.size, row.median):.2f}x",
        )
    return table


def save(rows: Sequence[Row], settings: Settings, path: Path) -> None:
    """Write all numbers to a JSON file."""
    content = {
        "environment": environment(settings.device),
        "settings": {key: value for key, value in asdict(settings).items() if key not in ("size", "batch")},
        "rows": [{**asdict(row), "median": row.median, "spread": row.spread} for row in rows],
    }
    write_text(path, json.dumps(content, indent=1) + "\n")


def plot(rows: Sequence[Row], settings: Settings, path: Path) -> None:
    """Draw images per second against the size of the pictures, a line for each model."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        lines.setdefault(f"{Path(row.name).name}, {row.mode.value}", []).append((row.size, row.median))
    what = (
        f"{'training' if settings.train else 'inference'}, {settings.dtype.value}{' autocast' if settings.amp else ''}"
    )
    draw_lines(
        path, {what: lines}, "height and width (pixels)", "images per second", environment(settings.device)["device"]
    )


def main(
    names: Annotated[list[str], typer.Argument(help="Models of timm or the zoo, or FILE.py:FUNCTION; then @KERNELS.")],
    size: Annotated[list[int], typer.Option(min=1, help="Height and width in pixels; may be given again.")] = [224],  # noqa: B006
    batch: Annotated[int, typer.Option(min=1, help="Pictures in a step, at the first size.")] = 8,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[Dtype, typer.Option(help="Of the weights, or of the autocast.")] = Dtype.fp32,
    amp: Annotated[bool, typer.Option("--amp", help="Float32 weights under autocast.")] = False,
    eager: Annotated[bool, typer.Option("--eager/--no-eager", help="Measure each model as it is.")] = True,
    compiled: Annotated[bool, typer.Option("--compile", help="Measure each model compiled, too.")] = False,
    optimized: Annotated[bool, typer.Option("--optimize", help="Measure each through zoo.optimize, too.")] = False,
    channels_last: Annotated[bool, typer.Option("--channels-last", help="NHWC strides.")] = False,
    train: Annotated[bool, typer.Option("--train", help="Forward and backward.")] = False,
    threads: Annotated[int, typer.Option(min=0, help="Of the CPU; 0 is torch's choice.")] = 0,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each model.")] = 7,
    seconds: Annotated[float, typer.Option(help="Least length of a turn.")] = 0.5,
    json_path: Annotated[Path | None, typer.Option("--json", help="Also write the numbers to a file.")] = None,
    plot_path: Annotated[Path | None, typer.Option("--plot", help="Also draw images/s against the size.")] = None,
) -> None:
    """Measure images/s and peak memory of models side by side."""
    settings = Settings(size[0], batch, device, dtype, amp, channels_last, train, threads, rounds, seconds)
    modes = [mode for mode, wanted in zip(Mode, (eager, compiled, optimized)) if wanted]
    try:
        if plot_path:
            new_figure(1, 1)  # what is missing is said before the work is done
        rows = measure_sizes(names, size, settings, modes)
    except (ValueError, ImportError) as error:
        console.print(f"error: {error}", style="red", markup=False)
        raise typer.Exit(1) from None
    output_console().print(report(rows, settings))
    if json_path:
        save(rows, settings, json_path)
    if plot_path:
        plot(rows, settings, plot_path)


if __name__ == "__main__":
    typer.run(main)
