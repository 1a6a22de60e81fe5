"""Rows and columns of the pictures in a prompt."""

import math
from dataclasses import dataclass

from torch import Tensor

from zoo.mllm.layout import TokenLayout


@dataclass(frozen=True)
class Grid:
    """A picture's tokens in a batch: `rows` x `columns` in row-major order, from `start` on in row `row`."""

    row: int
    start: int
    rows: int
    columns: int


@dataclass(frozen=True)
class Images:
    """The visual tokens that entered a model.

    Attributes:
        count: of the batch.
        places: (3, count) int64, frame, row and column of each, from any number on; None where pictures are squares.
    """

    count: int
    places: Tensor | None

    @classmethod
    def of(cls, is_image: Tensor, positions: Tensor | None) -> "Images":
        """From (B, L) bool and the position ids of the decoder, of which Qwen's have several axes."""
        flat = positions is None or positions.ndim < 3 or positions.shape[-1] != is_image.shape[1]
        return cls(int(is_image.sum()), None if flat else positions[-3:, is_image])

    def grids(self, layout: TokenLayout) -> tuple[Grid, ...]:
        """The pictures of a batch, in its order.

        Raises:
            ValueError: tokens are missing, a picture is no square, or there is a video.
        """
        left = int(layout.is_image.sum())
        if left != self.count:
            raise ValueError(
                f"YOPO's window needs whole pictures, but {left} of {self.count} visual tokens are left: take "
                "window=0, or drop tokens in later layers."
            )
        found: list[Grid] = []
        done = 0
        for row, image in enumerate(layout.image.tolist()):
            for number in sorted(set(image) - {-1}):
                size = image.count(number)
                found.append(Grid(row, image.index(number), *self._size(done, size)))
                done += size
        return tuple(found)

    def _size(self, start: int, size: int) -> tuple[int, int]:
        frames, rows, columns = 1, math.isqrt(size), math.isqrt(size)
        if self.places is not None:
            places = self.places[:, start : start + size]
            frames, rows, columns = (places.amax(1) - places.amin(1) + 1).tolist()
        if frames > 1 or rows * columns != size:
            raise ValueError(
                f"YOPO's window is for images of rows and columns, but got {size} visual tokens in a row, a video or "
                "no square: take window=0."
            )
        return rows, columns
