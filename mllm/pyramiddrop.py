"""PyramidDrop: fewer visual tokens from stage to stage (arXiv:2410.17247)."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from zoo.mllm.attention import attention_of
from zoo.mllm.base import Choice, Scene, Step, best, check_layer, check_share, share_of


@dataclass(frozen=True)
class PyramidDrop(Step):
    """At the start of each stage, the tokens that the last prompt token would attend to most in the layer that follows.

    The layer's own projections of queries and keys are applied to its normalised input. With 576 visual tokens and the
    defaults, a decoder of 32 layers sees 576, 288, 144 and 72 of them, 8 layers each. A token keeps its position; the
    authors' code numbers those that stay anew.

    Attributes:
        keep: share of the visual tokens that stay from one stage to the next; of each row, rounded up.
        layers: the first of each stage but the first; empty for stages of a quarter of the decoder.
    """

    keep: float = 0.5
    layers: tuple[int, ...] = ()
    ranks_by_prompt: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_share(self, self.keep)
        for layer in self.layers:
            check_layer(self, layer, 1)

    @property
    def is_identity(self) -> bool:
        """Whether all stay."""
        return self.keep == 1

    @property
    def layer(self) -> int:
        """Of a step."""
        return self.layers[0]

    def steps(self, layers: int) -> Sequence[Step]:
        """One for each stage but the first."""
        starts = self.layers or sorted({layers * quarter // 4 for quarter in (1, 2, 3)} - {0})
        return [replace(self, layers=(start,)) for start in starts]

    def select(self, scene: Scene) -> Choice | None:
        """True for all that is no image and for the best ``keep`` of each row's visual tokens."""
        counts = [share_of(visual, self.keep) for visual in scene.layout.is_image.sum(1).tolist()]
        return Choice(best(next_attention(scene), scene.layout, counts))

    def visual_tokens(self, visual: float, entered: float, text: float) -> float:
        """The share, rounded up."""
        return share_of(visual, self.keep)

    def overhead(self, shape: Any, text: float, tokens: Sequence[float]) -> float:
        """The keys of all tokens that the layer before saw, and one row of attention."""
        before = tokens[self.layer - 1]
        return 2 * before * shape.dim * shape.num_kv_heads * shape.head_dim + 2 * before * (
            shape.num_heads * shape.head_dim
        )


def next_attention(scene: Scene) -> Tensor:
    """(B, L): attention of the last prompt token in the layer that is about to run, mean over heads, causal."""
    attention, (cos, sin) = scene.layer.self_attn, scene.rotary
    rows = torch.arange(len(scene.hidden), device=scene.hidden.device)
    place = scene.layout.query
    normed = scene.layer.input_layernorm(scene.hidden)
    cos, sin = (x.expand(len(normed), -1, -1) for x in (cos, sin))
    query = _rotated(attention, "q", normed[rows, place][:, None], cos[rows, place][:, None], sin[rows, place][:, None])
    key = _rotated(attention, "k", normed, cos, sin)
    allowed = scene.layout.valid & (torch.arange(normed.shape[1], device=place.device) <= place[:, None])
    return attention_of(query, key, allowed[:, None], attention.scaling)[:, 0]


def _rotated(attention: nn.Module, kind: str, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(B, heads, L, head_dim): queries ("q") or keys ("k") of x (B, L, C), with their rotary embedding."""
    heads = getattr(attention, f"{kind}_proj")(x).unflatten(-1, (-1, attention.head_dim))
    heads = getattr(attention, f"{kind}_norm", nn.Identity())(heads).transpose(1, 2)
    apply = sys.modules[type(attention).__module__].apply_rotary_pos_emb
    return apply(heads, heads, cos, sin)[0]
