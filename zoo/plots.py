"""Plots of measurements, as PNG files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zoo.files import replacing

Points = Sequence[tuple[float, float]]


def new_figure(width: float, height: float) -> Any:
    """An empty ``matplotlib.figure.Figure`` of a size in inches.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("A plot needs matplotlib: pip install 'linear-vision-zoo[bench]'.") from None
    return Figure((width, height), layout="constrained")


def draw_bars(path: Path, names: Sequence[str], panels: Mapping[str, Sequence[float | None]], title: str) -> None:
    """One panel for each quantity, one bar for each name; what is unknown (None) has no bar.

    Args:
        path: the PNG file.
        names: from top to bottom.
        panels: values in the order of the names, by what the panel's axis says.
        title: above all.
    """
    figure = new_figure(2.4 * len(panels) + 2, 0.35 * len(names) + 1.2)
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (label, values) in zip(axes, panels.items()):
        bars = axis.barh(range(len(names)), [value or 0 for value in values], color="tab:blue")
        axis.bar_label(bars, ["" if value is None else f"{value:.4g}" for value in values], padding=2)
        axis.margins(x=0.3)
        axis.set_xlabel(label)
        axis.set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    figure.suptitle(title, fontsize="medium")
    _save(figure, path)


def draw_lines(path: Path, panels: Mapping[str, Mapping[str, Points]], x_label: str, y_label: str, title: str) -> None:
    """One panel for each heading, one line for each name, on logarithmic axes.

    Args:
        path: the PNG file.
        panels: (x, y) of the points by name, by heading.
        x_label: of all panels.
        y_label: of all panels.
        title: above all.
    """
    figure = new_figure(5 * len(panels) + 1, 4.5)
    for axis, (heading, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items()):
        for name, points in lines.items():
            axis.plot(*zip(*sorted(points)), marker="o", label=name)
        ticks = sorted({x for points in lines.values() for x, _ in points})
        axis.set(xscale="log", yscale="log", xlabel=x_label, ylabel=y_label, title=heading)
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    figure.suptitle(title, fontsize="medium")
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    with replacing(path) as part:
        figure.savefig(part, format="png", dpi=150)
