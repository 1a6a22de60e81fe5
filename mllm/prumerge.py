"""LLaVA-PruMerge: the outliers of the CLS token's attention, with their neighbours merged in (arXiv:2403.15388)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.mllm.base import share_of
from zoo.mllm.tower_reduction import TowerReduction, chosen
from zoo.mllm.vision_attention import Picture


@dataclass(frozen=True)
class PruMerge(TowerReduction):
    """As many tokens as stand out, before the language model.

    The attention is that of CLS in the tower's last block, from queries and keys as if there was one head; of a tower
    without CLS, that of all patches. To each kept token its nearest neighbours by the cosine of keys are added,
    weighted by their attention, which is not normalised. One token more is the sum of all that were not kept, weighted
    alike; it stands in the place of the last of them.

    In the authors' code the tokens come in the order of their attention, and all pictures of a batch have one number of
    them; here they stay in their places, and each picture has its own.

    Attributes:
        keep: share of the visual tokens, together with the one more; 0 for as many as are outliers: above the third
            quartile by more than 1.5 interquartile ranges.
        neighbours: that are merged into each.
        plus: keep evenly spaced tokens as well, three times as dense as the others are on average (PruMerge+).
    """

    keep: float = 0.0
    neighbours: int = 32
    plus: bool = False
    last_block: ClassVar[bool] = True
    one_head: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.keep <= 1:
            raise ValueError(f"PruMerge: keep is {self.keep}, expected 0 for as many as stand out, or up to 1.")
        if self.neighbours < 0:
            raise ValueError(f"PruMerge: neighbours is {self.neighbours}, expected 0 or more.")

    def visual_tokens(self, visual: float, entered: float, text: float) -> float:
        """The share, rounded up.

        Raises:
            ValueError: the number depends on the picture.
        """
        if not self.keep or self.plus:
            raise ValueError("PruMerge keeps what stands out in a picture: give keep, without plus, to count before.")
        return super().visual_tokens(visual, entered, text)

    def merge(self, picture: Picture, features: Tensor) -> tuple[Tensor, Tensor]:
        """See the class; of equal attention the earlier token is kept."""
        attention, tokens = picture.attention, len(features)
        count = share_of(tokens, self.keep) - 1 if self.keep else _outliers(attention)
        keep = chosen(attention.argsort(descending=True, stable=True)[:count], tokens)
        if self.plus and count:
            keep[:: max(1, tokens // count // 3)] = True
        index, rest = keep.nonzero()[:, 0], (~keep).nonzero()[:, 0]
        weighted = features.float() * attention[:, None]
        keys = F.normalize(picture.keys, dim=-1)
        similarity = (keys[index] @ keys.T).scatter(1, index[:, None], -torch.inf)  # nobody is its own neighbour
        nearest = similarity.topk(min(self.neighbours, tokens - 1), dim=1).indices
        merged = features[index].float() + weighted[nearest].sum(1)
        features = features.index_put((index,), merged.to(features.dtype))
        if len(rest):
            features = features.index_put((rest[-1:],), weighted[rest].sum(0, keepdim=True).to(features.dtype))
            keep[rest[-1]] = True
        return keep, features


def _outliers(attention: Tensor) -> int:
    first, third = attention.quantile(attention.new_tensor([0.25, 0.75]))
    return int((attention > third + 1.5 * (third - first)).sum())
