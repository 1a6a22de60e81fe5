"""Which visual tokens stay: methods that rank an image's tokens, and the methods by name."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, get_args, get_origin, get_type_hints

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.mllm.base import Method, Reduction, Scene, Step, share_of
from zoo.mllm.prumerge import PruMerge
from zoo.mllm.pyramiddrop import PyramidDrop
from zoo.mllm.sparsevlm import SparseVLM
from zoo.mllm.tome import ToMe
from zoo.mllm.visionzip import VisionZip
from zoo.mllm.yopo import YOPO
from zoo.mllm.zipvl import ZipVL


@dataclass(frozen=True)
class FastV(Reduction):
    """The tokens that the last prompt token attends to most in the layer before (arXiv:2403.06764)."""

    layer: int = 2
    needs_attention: ClassVar[bool] = True
    ranks_by_prompt: ClassVar[bool] = True

    def scores(self, scene: Scene) -> Tensor:
        """Attention of the last prompt token."""
        return scene.attention[:, 0]

    def overhead(self, shape: Any, text: float, tokens: Sequence[float]) -> float:
        """One row of attention."""
        return 2 * tokens[self.layer - 1] * shape.num_heads * shape.head_dim


@dataclass(frozen=True)
class Uniform(Reduction):
    """Evenly spaced tokens: the baseline that any method must beat."""

    def scores(self, scene: Scene) -> Tensor:
        """1 where a stride of ``1 / keep`` passes, else 0."""
        count = scene.layout.is_image.cumsum(1)  # of visual tokens up to this one
        # The small step keeps products such as 0.1 * 10 from falling just short of a whole number.
        return (torch.floor(count * self.keep + 1e-6) > torch.floor((count - 1) * self.keep + 1e-6)).float()


@dataclass(frozen=True)
class Random(Reduction):
    """Tokens drawn at random, the same of all pictures of one size for the same seed: the other baseline.

    Attributes:
        seed: of the draw.
    """

    seed: int = 0

    def scores(self, scene: Scene) -> Tensor:
        """Uniform random numbers for the first visual token of a row, the second and so on.

        They are drawn on the CPU, so that every device drops the same; neither padding nor other rows matter.
        """
        generator = torch.Generator().manual_seed(self.seed)
        draw = torch.rand(scene.layout.valid.shape[1] + 1, generator=generator).to(scene.hidden.device)
        return draw[scene.layout.is_image.cumsum(1)]


@dataclass(frozen=True)
class DivPrune(Reduction):
    """The most diverse tokens: farthest-point selection by cosine distance (arXiv:2503.02175)."""

    def scores(self, scene: Scene) -> Tensor:
        """Minus the step at which a token is chosen; the first is the one farthest from its nearest neighbour."""
        hidden = scene.hidden
        scores = hidden.new_full(scene.layout.valid.shape, -math.inf, dtype=torch.float32)
        for row, where in enumerate(scene.layout.is_image):
            places = where.nonzero()[:, 0]
            if len(places) < 2:
                scores[row, places] = 0.0
                continue
            tokens = F.normalize(hidden[row, places].float(), dim=-1)
            distance = 1 - tokens @ tokens.T
            nearest = distance.fill_diagonal_(math.inf).amin(1)
            for step in range(share_of(len(places), self.keep)):
                best = nearest.argmax()
                scores[row, places[best]] = -float(step)
                nearest = distance[best] if step == 0 else torch.minimum(nearest, distance[best])
                nearest = nearest.masked_fill(scores[row, places] > -math.inf, -math.inf)
        return scores


METHODS: dict[str, type[Method]] = {
    method.__name__.lower(): method
    for method in (
        FastV,
        PyramidDrop,
        SparseVLM,
        ZipVL,
        YOPO,
        VisionZip,
        PruMerge,
        ToMe,
        DivPrune,
        Uniform,
        Random,
    )
}


def parse_reduction(text: str) -> Method:
    """A method from text such as ``"fastv:layer=2,keep=0.5"`` or ``"pyramiddrop:layers=8/16/24"``.

    Raises:
        ValueError: there is no such method or option, or a value is out of range.
    """
    name, _, options = text.partition(":")
    if name.lower() not in METHODS:
        raise ValueError(f"There is no reduction {name!r}: expected one of {', '.join(METHODS)}.")
    method = METHODS[name.lower()]
    hints = get_type_hints(method)
    kinds = {
        field.name: hints[field.name] for field in dataclasses.fields(method) if field.metadata.get("text", field.init)
    }
    values = {}
    for option in filter(None, options.split(",")):
        key, _, value = option.partition("=")
        try:
            values[key] = _read(kinds[key], value)
        except (KeyError, ValueError):
            known = ", ".join(f"{field}={_shown(kind)}" for field, kind in kinds.items())
            raise ValueError(f"{option!r} is no option of {name}: expected {known}.") from None
    return method(**values)


def parse_reductions(reduce: str | Method | Sequence[str | Method]) -> list[Method]:
    """The methods of ``accelerate(reduce=...)``, without those that change nothing."""
    several = [reduce] if isinstance(reduce, str | Method) else reduce
    methods = [parse_reduction(one) if isinstance(one, str) else one for one in several]
    return [method for method in methods if not method.is_identity]


def in_order(methods: Sequence[Method], layers: int) -> list[tuple[Step, int]]:
    """The steps of the methods in a decoder of so many layers, each with its method's number.

    By layer; what works on the tower comes first, and then all in the order in which they were given.
    """
    steps = [(step, number) for number, method in enumerate(methods) for step in method.steps(layers)]
    return sorted(steps, key=lambda one: (one[0].layer, not one[0].needs_tower))


def _read(kind: Any, value: str) -> Any:
    if get_origin(kind) is tuple:
        return tuple(_read(get_args(kind)[0], one) for one in value.split("/"))
    if kind is bool:
        return {"true": True, "false": False}[value.lower()]
    return kind(value)


def _shown(kind: Any) -> str:
    return f"{get_args(kind)[0].__name__}/..." if get_origin(kind) is tuple else kind.__name__
