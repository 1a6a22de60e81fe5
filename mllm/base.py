"""What a method of reduction is: what it is shown, what it answers, and where it may take part."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from zoo.mllm.layout import TokenLayout

if TYPE_CHECKING:
    from zoo.mllm.flops import DecoderShape


@dataclass(frozen=True)
class Scene:
    """What a step may look at.

    Attributes:
        layout: of the tokens that are left before the step.
        hidden: (B, L, C), what the layer is about to see; at layer 0 the embeddings, those of images included.
        attention: (B, R, L) float32, of the R asked queries of each row in the layer before, mean over heads; zeros
            where a row asked fewer. None for a step that did not ask.
        entered: (B,) int64, visual tokens that each row had when it entered the decoder.
        layer: the decoder layer that is about to run; None before the decoder.
        rotary: cosine and sine, each (B or 1, L, head_dim), of these tokens; None before the decoder.
        memory: what the method's own hooks have put there in this pass.
    """

    layout: TokenLayout
    hidden: Tensor
    attention: Tensor | None = None
    entered: Tensor | None = None
    layer: nn.Module | None = None
    rotary: tuple[Tensor, Tensor] | None = None
    memory: dict[Any, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Choice:
    """What a step answers.

    Attributes:
        keep: (B, L) bool, the tokens that stay.
        mix: (B, L, L), row i the weights of all tokens in what token i becomes; None where nothing is merged.
    """

    keep: Tensor
    mix: Tensor | None = None


class Method:
    """What ``accelerate(reduce=...)`` takes. All does nothing until a method says otherwise."""

    needs_attention: ClassVar[bool] = False  # of ``queries``, in the layer before each step
    needs_tower: ClassVar[bool] = False  # the vision tower runs with an attention that can be watched
    ranks_by_prompt: ClassVar[bool] = False  # by the last token of the prompt, which training has to tell apart
    inference_only: ClassVar[bool] = False

    @property
    def is_identity(self) -> bool:
        """Whether it changes nothing, so that it can be left out."""
        return False

    @property
    def needs_causal(self) -> bool:
        """Whether it works with the causal mask only."""
        return False

    def steps(self, layers: int) -> Sequence["Step"]:
        """Where it drops tokens, in a decoder of so many layers."""
        return ()

    def attach(self, model: nn.Module, memory: dict[Any, Any]) -> list[Any]:
        """Hooks of its own on the model, which have a ``remove()``; the memory is emptied after each pass."""
        return []

    def queries(self, layout: TokenLayout, embeds: Tensor) -> Tensor:
        """(B, L) bool: whose attention the steps are shown, of what enters the decoder, with embeddings (B, L, C)."""
        return torch.arange(layout.valid.shape[1], device=embeds.device) == layout.query[:, None]

    def plain_attention(self, layer: int) -> bool:
        """Whether a layer attends as its queries and keys tell."""
        return True

    def before_layer(
        self, number: int, layout: TokenLayout, kwargs: dict[str, Any], memory: dict[Any, Any]
    ) -> dict[str, Any]:
        """The arguments of a layer in the prefill, given the layout of its tokens."""
        return kwargs

    def before_decoding(
        self, number: int, layout: TokenLayout, kwargs: dict[str, Any], memory: dict[Any, Any]
    ) -> dict[str, Any]:
        """The arguments of a layer for new tokens, given the layout of the prompt's tokens in its cache."""
        return kwargs

    def report(self, memory: dict[Any, Any]) -> dict[str, Any]:
        """What ``Acceleration.report`` also tells, asked at the end of a prefill."""
        return {}

    def overhead(self, shape: "DecoderShape", text: float, tokens: Sequence[float]) -> float:
        """FLOPs of choosing, given the tokens that each layer sees."""
        return 0.0


class Step(Method, ABC):
    """A method, or a part of one, that drops visual tokens before one layer, for this and all later layers.

    Attributes:
        layer: the first layer that does not see them; 0 drops them before the decoder.
    """

    layer: int

    def steps(self, layers: int) -> Sequence["Step"]:
        """Itself."""
        return (self,)

    @abstractmethod
    def select(self, scene: Scene) -> Choice | None:
        """Which tokens stay; None for all. Not asked of a batch without images."""

    @abstractmethod
    def visual_tokens(self, visual: float, entered: float, text: float) -> float:
        """How many of the visual tokens stay, of so many that entered the decoder beside so many of text."""


@dataclass(frozen=True)
class Reduction(Step):
    """A step that ranks the visual tokens and keeps a share of them.

    Attributes:
        keep: share of the visual tokens that stay, more than 0 and at most 1; of each row, rounded up.
        layer: the first layer that does not see the others; 0 drops them before the decoder.
    """

    keep: float = 0.5
    layer: int = 0

    def __post_init__(self) -> None:
        check_share(self, self.keep)
        check_layer(self, self.layer)

    @property
    def is_identity(self) -> bool:
        """Whether all stay."""
        return self.keep == 1

    def select(self, scene: Scene) -> Choice | None:
        """True for all that is no image and for the best ``keep`` of each row's visual tokens.

        Of equal scores the earlier token stays.
        """
        counts = [share_of(visual, self.keep) for visual in scene.layout.is_image.sum(1).tolist()]
        return Choice(best(self.scores(scene), scene.layout, counts))

    @abstractmethod
    def scores(self, scene: Scene) -> Tensor:
        """(B, L): the higher, the sooner a visual token stays; other tokens' are ignored."""

    def visual_tokens(self, visual: float, entered: float, text: float) -> float:
        """The share, rounded up."""
        return share_of(visual, self.keep)


def cache_in(named: Mapping[str, Any]) -> Any:
    """The cache among the arguments or outputs of a model or layer; None without one."""
    # transformers 5.24 renamed it
    return next((named[name] for name in ("cache", "past_key_values") if named.get(name) is not None), None)


def check_share(method: Method, keep: float) -> None:
    """Raise a ValueError for a share that is none."""
    if not 0 < keep <= 1:
        raise ValueError(f"{type(method).__name__}: keep is {keep}, expected more than 0 and at most 1.")


def check_layer(method: Method, layer: int, least: int | None = None) -> None:
    """Raise a ValueError for a layer before the first that can be taken."""
    least = int(method.needs_attention) if least is None else least
    if layer < least:
        raise ValueError(f"{type(method).__name__}: layer is {layer}, expected at least {least}.")


def share_of(count: float, share: float) -> int:
    """The share of a count, rounded up; float32 would be too coarse."""
    return math.ceil(count * share - 1e-9)


def best(scores: Tensor, layout: TokenLayout, counts: Sequence[int]) -> Tensor:
    """(B, L) bool: all that is no image, and of each row's visual tokens so many of the highest score (B, L)."""
    ranked = scores.masked_fill(~layout.is_image, -math.inf)
    rank = ranked.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return ~layout.is_image | (rank < torch.tensor(counts, device=rank.device)[:, None])
