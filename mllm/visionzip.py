"""VisionZip: the tokens that the vision tower attends to most, and a summary of the others (arXiv:2412.04467)."""

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from zoo.mllm.base import share_of
from zoo.mllm.tower_reduction import TowerReduction, chosen
from zoo.mllm.vision_attention import Picture


@dataclass(frozen=True)
class VisionZip(TowerReduction):
    """Dominant and contextual tokens, before the language model.

    Dominant tokens get the most attention of CLS in the block whose output the projector takes, summed over heads; of a
    tower without CLS, the most of all patches. Of the rest, evenly spaced ones are contextual: to each the mean of
    those is added whose keys (mean over heads) are more similar to its own than to those of the other contextual ones.

    Published for LLaVA, where CLS is kept as well; here it stays out, as the model has it. Where a visual token pools
    several patches, their attention and keys are averaged.

    Attributes:
        contextual: share of the kept tokens that are contextual; 10 of 64 are published.
    """

    contextual: float = 10 / 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.contextual < 1:
            raise ValueError(f"VisionZip: contextual is {self.contextual}, expected at least 0 and less than 1.")

    def merge(self, picture: Picture, features: Tensor) -> tuple[Tensor, Tensor]:
        """See the class; of equal attention the earlier token is dominant."""
        tokens = len(features)
        total = share_of(tokens, self.keep)
        contextual = round(total * self.contextual)
        order = picture.attention.argsort(descending=True, stable=True)
        dominant, rest = order[: total - contextual], order[total - contextual :].sort().values
        if not contextual:
            return chosen(dominant, tokens), features
        targets = rest[:: len(rest) // contextual][:contextual]
        others = rest[~chosen(targets, tokens)[rest]]
        keys = F.normalize(picture.keys, dim=-1)
        best = (keys[others] @ keys[targets].T).argmax(1)
        counts = best.bincount(minlength=contextual).clamp(min=1)
        context = features[targets].float().index_add(0, best, features[others].float() / counts[best, None])
        features = features.index_put((targets,), context.to(features.dtype))
        return chosen(dominant, tokens) | chosen(targets, tokens), features
