"""What a vision tower attends to, seen through hooks on it, for each visual token that its projector makes.

A visual token is what enters the language model. It pools one patch (LLaVA, LLaVA-NeXT) or a square of patches (all
that shuffle pixels or merge patches), of which it has the mean attention and the mean key.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zoo.mllm.attention import as_bool

CHUNK = 2**24  # numbers of an attention matrix that are held at once


@dataclass(frozen=True)
class Picture:
    """The visual tokens of one picture that the tower saw: an image, a tile or crop of one, or a video's frame.

    Attributes:
        attention: (N,) float32, what each is attended to.
        keys: (N, D) float32.
    """

    attention: Tensor
    keys: Tensor


@dataclass(frozen=True)
class Tower:
    """The parts of a vision tower that token reduction works on.

    Attributes:
        module: the whole tower.
        attention: of the block that is looked at.
        projector: what is given a row for each visual token, and makes what enters the language model of it.
        cls: whether the first token of a picture is a CLS token.
        patches: (N, G) int64, the patches of each visual token, for a number of patches.
    """

    module: nn.Module
    attention: nn.Module
    projector: nn.Module
    cls: bool
    patches: Callable[[int], Tensor]

    @torch.no_grad()
    def look(self, query: Tensor, key: Tensor, mask: Tensor | None, scaling: float, one_head: bool) -> list[Picture]:
        """The pictures of one pass of the attention: what CLS attends to, or without one what all patches do.

        Args:
            query: (B, heads, L, D).
            key: (B, heads, L, D).
            mask: (B, 1, L, L), bool or added to the logits; None for none.
            scaling: of the logits.
            one_head: take all heads as one, whose key is as wide as they are together; else the attention is the sum
                over heads, and the key is their mean.
        """
        keys = key.transpose(1, 2).float()
        if one_head:
            query, key = (x.transpose(1, 2).flatten(2)[:, None] for x in (query, key))
            scaling = query.shape[-1] ** -0.5
        rows = query[:, :, :1] if self.cls else query
        received = _received(rows.float(), key.float(), mask, scaling)[:, self.cls :]
        keys = (keys.flatten(2) if one_head else keys.mean(2))[:, self.cls :]
        patches = self.patches(received.shape[1]).to(received.device)
        return [Picture(a[patches].mean(1), k[patches].mean(1)) for a, k in zip(received, keys)]


def _received(query: Tensor, key: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """(B, L): the attention that each key gets, summed over heads, mean over queries."""
    batch, heads, rows, _ = query.shape
    step = max(1, CHUNK // (batch * heads * key.shape[2]))
    total = key.new_zeros(batch, key.shape[2])
    for start in range(0, rows, step):
        logits = scaling * query[:, :, start : start + step] @ key.transpose(-1, -2)
        if mask is not None:
            logits = logits.masked_fill(~as_bool(mask[..., start : start + step, :]), -torch.inf)
        total += logits.softmax(-1).nan_to_num().sum((1, 2))  # a query that may attend to nothing counts nothing
    return total / rows


def tower_of(model: nn.Module, last: bool = False) -> Tower:
    """The tower of a model of the seven families.

    Args:
        model: of transformers.
        last: look at the last block, also if the projector takes the output of an earlier one.

    Raises:
        ValueError: the model's family is another, or its projector takes what comes before the first block.
    """
    family, base = model.config.model_type, model.base_model
    if family not in PARTS:
        raise ValueError(
            f"It is not known where the vision tower of the family {family!r} has its attention: expected one of "
            f"{', '.join(PARTS)}, or take a reduction that needs no tower, such as divprune."
        )
    module, projector, patches = PARTS[family](base)
    attentions = [part for part in module.modules() if _is_attention(part)]
    block = _block(model.config, len(attentions), last)
    cls = any(name.endswith(("class_embedding", "cls_token")) for name, _ in module.named_parameters())
    return Tower(module, attentions[block], projector, cls, patches)


def _is_attention(module: nn.Module) -> bool:
    return type(module).__name__.endswith("Attention") and not isinstance(module, nn.MultiheadAttention)


def _block(config: Any, blocks: int, last: bool) -> int:
    """The number of the block whose attention is looked at."""
    whole = getattr(config.vision_config, "fullatt_block_indexes", None)
    if whole:  # the others see windows only
        return max(whole)
    taken = getattr(config, "vision_feature_layer", -1)
    taken = taken if isinstance(taken, int) else taken[-1]
    block = blocks - 1 if last else blocks + taken if taken < 0 else taken - 1
    if block < 0:
        raise ValueError(
            f"The projector takes vision_feature_layer={taken}, which no block of the tower has attended for: take a "
            "later layer, or a reduction that needs no tower, such as divprune."
        )
    return block


Parts = tuple[nn.Module, nn.Module, Callable[[int], Tensor]]


def _llava(base: nn.Module) -> Parts:
    return base.vision_tower, base.multi_modal_projector, lambda count: torch.arange(count)[:, None]


def _internvl(base: nn.Module) -> Parts:
    def patches(count: int) -> Tensor:
        side = math.isqrt(count)
        return base.pixel_shuffle(torch.arange(count).view(1, side, side, 1), base.config.downsample_ratio).flatten(
            0, 2
        )

    return base.vision_tower, base.multi_modal_projector, patches


def _idefics(base: nn.Module) -> Parts:
    def patches(count: int) -> Tensor:
        return base.connector.pixel_shuffle(torch.arange(count).view(1, count, 1), base.connector.scale_factor)[0]

    return base.vision_model, base.connector.modality_projection, patches


def _qwen(base: nn.Module) -> Parts:
    merged = base.visual.spatial_merge_size**2
    return base.visual, base.visual.merger.mlp, lambda count: torch.arange(count).view(-1, merged)


PARTS: dict[str, Callable[[nn.Module], Parts]] = {
    "llava": _llava,
    "llava_next": _llava,
    "internvl": _internvl,
    "smolvlm": _idefics,
    "idefics3": _idefics,
    "qwen2_vl": _qwen,
    "qwen2_5_vl": _qwen,
}
