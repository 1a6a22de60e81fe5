"""ToMe, token merging: similar visual tokens become one (arXiv:2210.09461)."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.mllm.base import share_of
from zoo.mllm.tower_reduction import TowerReduction, chosen
from zoo.mllm.vision_attention import Picture


@dataclass(frozen=True)
class ToMe(TowerReduction):
    """Bipartite soft matching of the visual tokens, before the language model.

    The tokens are taken alternately as A and B. Each of A is matched to the one of B whose key (mean over heads) has
    the highest cosine with its own, and of these pairs the most similar are merged: B becomes the mean, weighted by how
    many tokens both stand for already, and A leaves. One round can halve the tokens; rounds follow until ``keep`` is
    reached, with the means of keys.

    The paper merges in each block of a tower, whose attention then counts a token as often as what it stands for. Here
    the tower is left as it is, and what it made is merged: towers that pool patches afterwards could not do with less.
    """

    def merge(self, picture: Picture, features: Tensor) -> tuple[Tensor, Tensor]:
        """See the class; of equal similarity the earlier token leaves."""
        total = share_of(len(features), self.keep)
        keys, values, sizes = picture.keys, features.float(), picture.keys.new_ones(len(features), 1)
        left = torch.arange(len(features), device=features.device)
        while len(left) > total:
            a, b = left[::2], left[1::2]
            unit = F.normalize(keys, dim=-1)
            similarity, partner = (unit[a] @ unit[b].T).max(1)
            first = similarity.argsort(descending=True, stable=True)[: min(len(left) - total, len(b))]
            source, target = a[first], b[partner[first]]
            whole = sizes.index_add(0, target, sizes[source])
            keys, values = ((x * sizes).index_add(0, target, x[source] * sizes[source]) / whole for x in (keys, values))
            sizes = whole
            left = left[~chosen(source, len(features))[left]]
        keep = chosen(left, len(features))
        merged = keep[:, None] & (sizes > 1)
        return keep, torch.where(merged, values.to(features.dtype), features)
