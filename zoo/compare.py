"""Models side by side: what is published, what is counted, and what is measured here: `zoo compare`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from zoo.catalogue import CATALOGUE
from zoo.measure import Settings, build, environment, measure, split_name
from zoo.plots import draw_bars
from zoo.stages import stage_table


@dataclass(frozen=True)
class Comparison:
    """One model.

    Attributes:
        name: as it was asked for.
        top1: accuracy on ImageNet-1k in percent, as the authors published it; None where the zoo knows of none.
        params: number of parameters.
        macs: multiply-accumulates for one picture of the size.
        images_per_second: the median of what was measured.
        spread: half the distance from the slowest to the fastest round, relative to the median.
        peak_mib: what the model and a batch add to the memory in use, in MiB; None where that cannot be measured.
    """

    name: str
    top1: float | None
    params: int
    macs: int
    images_per_second: float
    spread: float
    peak_mib: float | None


def compare(names: Sequence[str], settings: Settings) -> list[Comparison]:
    """Look models up, count and measure them, in inference with random weights.

    Args:
        names: of the zoo or timm; with ``@torch`` after it a model runs without Triton kernels.
        settings: device, batch and size of the pictures.

    Returns:
        One for each model that runs on pictures of this size, in the order of the names.

    Raises:
        ValueError: there is no such model or device, or none of the models runs.
    """
    comparisons = []
    for row in measure(names, settings):
        entry = CATALOGUE.get(split_name(row.name)[0])
        macs = stage_table(build(row.name, row.size), (row.size, row.size))[-1].macs
        top1 = entry.top1 if entry else None
        comparisons.append(Comparison(row.name, top1, row.params, macs, row.median, row.spread, row.peak_mib))
    return comparisons


def draw(comparisons: Sequence[Comparison], settings: Settings, path: Path) -> None:
    """Draw a panel of bars for each quantity into a PNG file.

    Raises:
        ImportError: matplotlib is not installed.
    """
    panels = {
        "top-1 (%), published": [c.top1 for c in comparisons],
        "parameters (M)": [c.params / 1e6 for c in comparisons],
        "MACs (G)": [c.macs / 1e9 for c in comparisons],
        "images/s": [c.images_per_second for c in comparisons],
        "memory (MiB)": [c.peak_mib for c in comparisons],
    }
    dtype = settings.dtype.value + (" autocast" if settings.amp else "")
    title = f"{settings.batch} x {settings.size} x {settings.size}, {dtype}, {environment(settings.device)['device']}"
    draw_bars(path, [c.name for c in comparisons], panels, title)
