"""Which rows of a map each rank holds."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from torch import distributed as dist


@dataclass(frozen=True)
class Strips:
    """Strips of rows of a map, from the top, in the order of the ranks; a strip may be empty.

    Attributes:
        bounds: the first row of each rank, then the rows of the whole map.
        rank: of this process in the group.
        group: the processes.
    """

    bounds: tuple[int, ...]
    rank: int
    group: dist.ProcessGroup

    @classmethod
    def of(cls, heights: Sequence[int], group: dist.ProcessGroup) -> "Strips":
        """The strips of these heights in rows, one for each rank."""
        return cls((0, *accumulate(heights)), dist.get_rank(group), group)

    @property
    def spans(self) -> list[tuple[int, int]]:
        """The first row of each rank, and the end of its rows."""
        return list(pairwise(self.bounds))

    @property
    def heights(self) -> list[int]:
        """Rows of each rank."""
        return [stop - start for start, stop in self.spans]

    @property
    def start(self) -> int:
        """The first row of this rank."""
        return self.bounds[self.rank]

    @property
    def height(self) -> int:
        """Rows of this rank."""
        return self.heights[self.rank]

    @property
    def total(self) -> int:
        """Rows of the whole map."""
        return self.bounds[-1]

    def reduced(self, stride: int) -> "Strips":
        """The strips of a map of ceil(rows / stride): row i is with the rank that holds row ``stride * i``."""
        return Strips(tuple(-(-bound // stride) for bound in self.bounds), self.rank, self.group)
