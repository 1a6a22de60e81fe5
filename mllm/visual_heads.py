"""How much the heads of a decoder attend to visual tokens (YOPO, arXiv:2410.06169)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from zoo.mllm.attention import as_bool, watch
from zoo.mllm.layout import TokenLayout

CHUNK = 2**24  # numbers of an attention matrix that are held at once


@torch.no_grad()
def visual_ratios(model: nn.Module, sample: Mapping[str, Any]) -> Tensor:
    """(rows with an image, layers, heads) of the attention to visual tokens and to text, on the CPU."""
    from zoo.mllm.accelerate import accelerate  # which knows this method

    layers, masses = model.get_decoder().layers, []
    with accelerate(model) as handle:

        def see(query: Tensor, key: Tensor, mask: Tensor | None, scaling: float) -> None:
            masses.append(_visual_mass(query, key, mask, scaling, handle.last.layout))

        watches = [watch(layer.self_attn, see) for layer in layers]
        try:
            model(**sample, use_cache=False)
        finally:
            for one in watches:
                one.remove()
        layout = handle.last.layout
    visual = torch.stack(masses, 1)  # (B, layers, heads)
    return (visual / (layout.valid.sum(1)[:, None, None] - visual))[layout.is_image.any(1)].cpu()


def _visual_mass(query: Tensor, key: Tensor, mask: Tensor | None, scaling: float, layout: TokenLayout) -> Tensor:
    """(B, heads): what all queries attend to visual tokens, summed."""
    batch, heads, length, _ = query.shape
    key = key.float().repeat_interleave(heads // key.shape[1], 1)
    step = max(1, CHUNK // (batch * heads * length))
    mass = key.new_zeros(batch, heads)
    position = torch.arange(length, device=query.device)
    for start in range(0, length, step):
        rows = slice(start, start + step)
        allowed = position <= position[rows, None] if mask is None else as_bool(mask[..., rows, :])
        logits = scaling * query[:, :, rows].float() @ key.transpose(-1, -2)
        weights = logits.masked_fill(~allowed, -torch.inf).softmax(-1).nan_to_num()
        queries = layout.valid[:, None, rows, None] & layout.is_image[:, None, None]
        mass += (weights * queries).sum((2, 3))
    return mass
