"""A picture of what is kept of a picture."""

import math
import os
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from zoo.mllm.plan_files import replacing

SHOWN = 4  # layers at most, for each picture


def draw_kept(path: str | os.PathLike, seen: Tensor, image: Tensor, pictures: Sequence[Any] = ()) -> None:
    """Draw as a PNG how many visual tokens each layer sees, and for each picture where they are.

    A picture's tokens are taken for a grid of its aspect, row by row. In the layers in which their number falls, what
    is no longer seen is darkened.

    Args:
        path: of the file.
        seen: (layers, L) bool, the tokens of one prompt that each layer sees.
        image: (L,) int64, the number of each token's image, -1 for text.
        pictures: the prompt's images, as arrays (H, W, 3) or PIL images; empty for the numbers alone.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there are more or fewer pictures than images, or a picture's tokens form no grid of its aspect.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("A plot needs matplotlib: pip install 'linear-vision-zoo[bench]'.") from None
    seen, image = seen.cpu(), image.cpu()
    count = int(image.max()) + 1
    if len(pictures) not in (0, count):
        raise ValueError(f"There are {len(pictures)} pictures, but the prompt has {count} images: give all of them.")
    numbers = (seen & (image >= 0)).sum(1).tolist()
    layers = [0] + [layer for layer in range(1, len(numbers)) if numbers[layer] < numbers[layer - 1]]
    layers = layers if len(layers) <= SHOWN else [*layers[: SHOWN - 1], layers[-1]]
    figure = Figure((2.5 * max(len(layers), 2), 2.5 * (1 + len(pictures))), layout="constrained")
    chart, *rows = figure.subfigures(1 + len(pictures), squeeze=False)[:, 0]
    axis = chart.subplots()
    axis.bar(range(len(numbers)), numbers)
    axis.set(xlabel="layer", ylabel="visual tokens", ylim=(0, None))
    for number, (row, picture) in enumerate(zip(rows, pictures)):
        where = image == number
        for axis, layer in zip(row.subplots(1, len(layers), squeeze=False)[0], layers):
            _show(axis, picture, seen[layer, where], f"layer {layer}")
    with replacing(path) as part:
        figure.savefig(part, format="png", dpi=150)


def grid_of(tokens: int, width: int, height: int) -> tuple[int, int]:
    """Rows and columns of the grid of so many tokens whose aspect is nearest to a picture's.

    Raises:
        ValueError: the nearest has more than twice another aspect, as when tokens that separate rows are among them.
    """
    grids = [(rows, tokens // rows) for rows in range(1, tokens + 1) if tokens % rows == 0]

    def distance(grid: tuple[int, int]) -> float:
        return abs(math.log(grid[1] / grid[0] * height / width))

    # Most towers see a square, whatever the picture.
    side = math.isqrt(tokens)
    best = (side, side) if side * side == tokens else min(grids, key=distance)
    if side * side != tokens and distance(best) > math.log(2):
        raise ValueError(f"The {tokens} tokens of a picture of {width} x {height} form no grid: plot without pictures.")
    return best


def _show(axis: Any, picture: Any, seen: Tensor, title: str) -> None:
    import numpy as np

    pixels = np.asarray(picture)
    height, width = pixels.shape[:2]
    grid = seen.view(grid_of(len(seen), width, height)).numpy()
    axis.imshow(pixels, extent=(0, 1, 1, 0), aspect=height / width)
    shade = np.zeros((*grid.shape, 4))
    shade[~grid] = 0.0, 0.0, 0.0, 0.75
    axis.imshow(shade, extent=(0, 1, 1, 0), aspect=height / width, interpolation="nearest")
    axis.set_title(f"{title}: {int(seen.sum())}", fontsize="small")
    axis.set_axis_off()
