"""SparseVLM: the words of the question that look at the image say what stays of it (arXiv:2410.04417)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from zoo.mllm.base import Choice, Scene, Step, best, check_layer, check_share, share_of
from zoo.mllm.layout import TokenLayout

RECYCLED = 0.3  # share of the dropped tokens that is merged instead
CLUSTERS = 0.1  # merged tokens for each of these
NEIGHBOURS = 5  # that tell how dense it is around a token


@dataclass(frozen=True)
class SparseVLM(Step):
    """The tokens that the text raters attend to most in the layer before; of the others the best are merged.

    Raters are the words of the question that, on the embeddings, take more than the mean share of the visual tokens'
    attention: ``mean_v softmax_t(V T^T)`` above its mean. A visual token's score is their mean attention in the layer
    before. 30% of those that are dropped, the best, are recycled: density peaks gather them into a tenth as many
    clusters, and each stays as one token, the mean of its cluster at the place of its centre.

    Attributes:
        keep: share of the visual tokens that entered the decoder which stay at each step, without the recycled ones;
            one number for all steps or one for each. The default are the authors' 300, 200 and 110 of 576 tokens.
        layers: the first that does not see the others, for each step. The authors rank by the attention of layers 2, 6
            and 15 and drop behind them.
        scale: of the adaptive rule, more than 0 and at most 1, instead of ``keep``: ``scale * (N - rank)`` of N visual
            tokens are dropped, with the rank of the matrix of the raters' attention to them. 0 for ``keep``.
        recycle: whether the best of the dropped are merged.
    """

    keep: tuple[float, ...] = (300 / 576, 200 / 576, 110 / 576)
    layers: tuple[int, ...] = (3, 7, 16)
    scale: float = 0.0
    recycle: bool = True
    needs_attention: ClassVar[bool] = True
    ranks_by_prompt: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for keep in self.keep:
            check_share(self, keep)
        for layer in self.layers:
            check_layer(self, layer)
        if not self.scale and len(self.keep) not in (1, len(self.layers)):
            raise ValueError(
                f"SparseVLM: keep has {len(self.keep)} numbers for {len(self.layers)} layers, expected one, or one for "
                "each layer."
            )
        if not 0 <= self.scale <= 1:
            raise ValueError(f"SparseVLM: scale is {self.scale}, expected 0 or more, and at most 1.")

    @property
    def is_identity(self) -> bool:
        """Whether all stay."""
        return not self.scale and set(self.keep) == {1}

    @property
    def layer(self) -> int:
        """Of a step."""
        return self.layers[0]

    def steps(self, layers: int) -> Sequence[Step]:
        """One for each layer."""
        shares = self.keep if len(self.keep) == len(self.layers) else self.keep[:1] * len(self.layers)
        return [replace(self, keep=(keep,), layers=(layer,)) for keep, layer in zip(shares, self.layers)]

    def queries(self, layout: TokenLayout, embeds: Tensor) -> Tensor:
        """(B, L) bool: the raters."""
        place = torch.arange(layout.valid.shape[1], device=embeds.device)
        prompt = layout.valid & ~layout.is_image & (place <= layout.query[:, None])
        question = prompt & (layout.is_image.cumsum(1) > 0)
        question = torch.where(question.any(1, keepdim=True), question, prompt)  # a question before its image
        raters = torch.zeros_like(question)
        for row, where in enumerate(question):
            visual, text = embeds[row, layout.is_image[row]].float(), embeds[row, where].float()
            if len(visual):
                shares = (visual @ text.T).softmax(1).mean(0)
                above = shares > shares.mean()
                raters[row, where] = above | ~above.any()
        return raters

    def select(self, scene: Scene) -> Choice | None:
        """True for all that is no image, for the best of it and for the centres of what is merged."""
        is_image = scene.layout.is_image
        scores, visual = scene.attention.sum(1), is_image.sum(1).tolist()
        if self.scale:
            ranks = [_rank(rows[:, where]) for rows, where in zip(scene.attention, is_image)]
            counts = [count - math.floor(self.scale * (count - rank) + 1e-9) for count, rank in zip(visual, ranks)]
        else:
            counts = [share_of(entered, self.keep[0]) for entered in scene.entered.tolist()]
        keep = best(scores, scene.layout, counts)
        if not self.recycle or keep.all():
            return Choice(keep)
        mix = torch.eye(keep.shape[1], device=keep.device).repeat(len(keep), 1, 1)
        for row, (dropped, hidden) in enumerate(zip(~keep, scene.hidden)):
            places = dropped.nonzero()[:, 0]
            pool = places[scores[row, places].argsort(descending=True, stable=True)]
            pool = pool[: math.floor(RECYCLED * len(pool))].sort().values
            if len(pool):
                centres, owner = density_peaks(hidden[pool].float(), math.ceil(CLUSTERS * len(pool) - 1e-9))
                members = (owner == torch.arange(len(centres), device=owner.device)[:, None]).float()
                mix[row, pool[centres]] = 0.0
                mix[row, pool[centres][:, None], pool] = members / members.sum(1, keepdim=True)
                keep[row, pool[centres]] = True
        return Choice(keep, mix)

    def visual_tokens(self, visual: float, entered: float, text: float) -> float:
        """At most: the adaptive rule is counted as if all words of the text were raters of their own mind."""
        kept = share_of(entered, self.keep[0])
        if self.scale:
            kept = visual - math.floor(self.scale * (visual - min(text, visual)) + 1e-9)
        kept = min(kept, visual)
        pool = math.floor(RECYCLED * (visual - kept)) if self.recycle else 0
        return kept + math.ceil(CLUSTERS * pool - 1e-9)

    def overhead(self, shape: Any, text: float, tokens: Sequence[float]) -> float:
        """The raters' rows of attention, as if all words of the text were raters."""
        return 2 * text * tokens[self.layer - 1] * shape.num_heads * shape.head_dim


def density_peaks(tokens: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Clusters around density peaks (DPC-KNN).

    A token's density is ``exp(-mean squared distance to its nearest neighbours)``, distances divided by ``sqrt(C)``.
    Centres are the tokens with the largest density times distance to the nearest denser token; the others go to the
    nearest centre.

    Args:
        tokens: (N, C) float32.
        count: of clusters, at most N.

    Returns:
        (count,) int64, the centres, and (N,) int64, the cluster of each token.
    """
    distance = torch.cdist(tokens, tokens) / tokens.shape[1] ** 0.5
    nearest = distance.topk(min(NEIGHBOURS, len(tokens)), largest=False).values
    density = (-nearest.square().mean(1)).exp()
    place = torch.arange(len(tokens), device=tokens.device)
    earlier = (density == density[:, None]) & (place < place[:, None])  # counts as denser
    denser = (density > density[:, None]) | earlier
    gap = distance.masked_fill(~denser, torch.inf).amin(1)
    gap = torch.where(denser.any(1), gap, distance.amax())
    centres = (gap * density).argsort(descending=True, stable=True)[:count]
    owner = distance[:, centres].argmin(1)
    owner[centres] = torch.arange(count, device=tokens.device)  # also where centres coincide
    return centres, owner


def _rank(attention: Tensor) -> int:
    """Rank of a matrix (R, N); rows of zeros do not count."""
    return int(torch.linalg.matrix_rank(attention)) if attention.numel() else 0
