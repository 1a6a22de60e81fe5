"""Which visual tokens stay: each method ranks an image's tokens and keeps a share of them from some layer on."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.mllm.layout import TokenLayout


@dataclass(frozen=True)
class Reduction(ABC):
    """A method that drops visual tokens before one layer, for this and all later layers.

    Attributes:
        keep: share of the visual tokens that stay, more than 0 and at most 1; of each row, rounded up.
        layer: the first layer that does not see the others; 0 drops them before the decoder.
    """

    keep: float = 0.5
    layer: int = 0
    needs_attention: ClassVar[bool] = False  # of the last prompt token, in the layer before

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise ValueError(f"{type(self).__name__}: keep is {self.keep}, expected more than 0 and at most 1.")
        if self.layer < (1 if self.needs_attention else 0):
            raise ValueError(
                f"{type(self).__name__}: layer is {self.layer}, expected at least {int(self.needs_attention)}."
            )

    def select(self, layout: TokenLayout, hidden: Tensor, attention: Tensor | None) -> Tensor:
        """Which tokens stay.

        Args:
            layout: of the tokens that are left before this reduction.
            hidden: (B, L, C), what the layer is about to see.
            attention: (B, L), of the last prompt token in the layer before, mean over heads.

        Returns:
            (B, L) bool, True for all that is no image and for the best ``keep`` of each row's visual tokens. Of equal
            scores the earlier token stays.
        """
        is_image = layout.is_image
        counts = [
            [math.ceil(visual * self.keep - 1e-9)] for visual in is_image.sum(1).tolist()
        ]  # float32 is too coarse
        scores = self.scores(layout, hidden, attention).masked_fill(~is_image, -math.inf)
        rank = scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        return ~is_image | (rank < torch.tensor(counts, device=rank.device))

    @abstractmethod
    def scores(self, layout: TokenLayout, hidden: Tensor, attention: Tensor | None) -> Tensor:
        """(B, L): the higher, the sooner a visual token stays; other tokens' are ignored."""


@dataclass(frozen=True)
class FastV(Reduction):
    """The tokens that the last prompt token attends to most in the layer before (arXiv:2403.06764)."""

    layer: int = 2
    needs_attention: ClassVar[bool] = True

    def scores(self, layout: TokenLayout, hidden: Tensor, attention: Tensor | None) -> Tensor:
        """Attention of the last prompt token."""
        return attention


@dataclass(frozen=True)
class Uniform(Reduction):
    """Evenly spaced tokens: the baseline that any method must beat."""

    def scores(self, layout: TokenLayout, hidden: Tensor, attention: Tensor | None) -> Tensor:
        """1 where a stride of ``1 / keep`` passes, else 0."""
        count = layout.is_image.cumsum(1)  # of visual tokens up to this one
        # The small step keeps products such as 0.1 * 10 from falling just short of a whole number.
        return (torch.floor(count * self.keep + 1e-6) > torch.floor((count - 1) * self.keep + 1e-6)).float()


@dataclass(frozen=True)
class Random(Reduction):
    """Tokens drawn at random, the same for the same seed and lengths: the other baseline.

    Attributes:
        seed: of the draw.
    """

    seed: int = 0

    def scores(self, layout: TokenLayout, hidden: Tensor, attention: Tensor | None) -> Tensor:
        """Uniform random numbers, drawn on the CPU so that every device drops the same."""
        generator = torch.Generator().manual_seed(self.seed)
        return torch.rand(layout.valid.shape, generator=generator).to(hidden.device)


@dataclass(frozen=True)
class DivPrune(Reduction):
    """The most diverse tokens: farthest-point selection by cosine distance (arXiv:2503.02175)."""

    def scores(self, layout: TokenLayout, hidden: Tensor, attention: Tensor | None) -> Tensor:
        """Minus the step at which a token is chosen; the first is the one farthest from its nearest neighbour."""
        scores = hidden.new_full(layout.valid.shape, -math.inf, dtype=torch.float32)
        for row, where in enumerate(layout.is_image):
            places = where.nonzero()[:, 0]
            if len(places) < 2:
                scores[row, places] = 0.0
                continue
            tokens = F.normalize(hidden[row, places].float(), dim=-1)
            distance = 1 - tokens @ tokens.T
            nearest = distance.fill_diagonal_(math.inf).amin(1)
            for step in range(math.ceil(len(places) * self.keep - 1e-9)):
                best = nearest.argmax()
                scores[row, places[best]] = -float(step)
                nearest = distance[best] if step == 0 else torch.minimum(nearest, distance[best])
                nearest = nearest.masked_fill(scores[row, places] > -math.inf, -math.inf)
        return scores


METHODS: dict[str, type[Reduction]] = {method.__name__.lower(): method for method in (FastV, Uniform, Random, DivPrune)}


def parse_reduction(text: str) -> Reduction:
    """A method from text such as ``"fastv:layer=2,keep=0.5"``.

    Raises:
        ValueError: there is no such method or option, or a value is out of range.
    """
    name, _, options = text.partition(":")
    if name.lower() not in METHODS:
        raise ValueError(f"There is no reduction {name!r}: expected one of {', '.join(METHODS)}.")
    method = METHODS[name.lower()]
    fields = {field: kind for field, kind in (("keep", float), ("layer", int), ("seed", int))
              if field in method.__dataclass_fields__}  # fmt: skip
    values = {}
    for option in filter(None, options.split(",")):
        key, _, value = option.partition("=")
        try:
            values[key] = fields[key](value)
        except (KeyError, ValueError):
            known = ", ".join(f"{field}={kind.__name__}" for field, kind in fields.items())
            raise ValueError(f"{option!r} is no option of {name}: expected {known}.") from None
    return method(**values)
