"""Transformers' SDPA and eager attention, which can also tell what one query attends to.

The outputs are those of the attention they stand for, bit by bit. Where a probe waits for a layer, the attention of one
query per row is computed beside it, without the L x L matrix.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn


@dataclass
class Probe:
    """What to look at in the next forward pass, and what was seen.

    Attributes:
        query: (B,) int64, position of the query in the sequence of the layer.
        seen: (B, L), the attention of that query, mean over heads, in float32; None before the layer has run.
    """

    query: Tensor
    seen: Tensor | None = None


PROBES: WeakKeyDictionary[nn.Module, Probe] = WeakKeyDictionary()  # of the attention modules that are looked at


def register() -> None:
    """Make ``zoo_sdpa`` and ``zoo_eager`` known to transformers, for attention and for its masks."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import eager_mask, sdpa_mask

    def eager(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        return sys.modules[type(module).__module__].eager_attention_forward(module, *args, **kwargs)

    for name, forward, mask in (("sdpa", sdpa_attention_forward, sdpa_mask), ("eager", eager, eager_mask)):
        AttentionInterface.register(f"zoo_{name}", _probing(forward))
        AttentionMaskInterface.register(f"zoo_{name}", mask)


def _probing(forward: Callable) -> Callable:
    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        probe = PROBES.get(module)
        if probe:
            probe.seen = _attention_of(query, key, attention_mask, probe.query, kwargs["scaling"])
        return forward(module, query, key, value, attention_mask, **kwargs)

    return attention


def _attention_of(query: Tensor, key: Tensor, mask: Tensor | None, place: Tensor, scaling: float) -> Tensor:
    """(B, L) attention of the query at `place` of each row, mean over heads."""
    batch, heads, _, dim = query.shape
    rows = torch.arange(batch, device=query.device)
    # Detached before all else: what autograd saved would be missed when a checkpointed layer is computed again.
    one = query.detach()[rows, :, place].float().view(batch, key.shape[1], heads // key.shape[1], dim)
    logits = scaling * one @ key.detach().float().transpose(-1, -2)  # (B, kv heads, heads per kv head, L)
    positions = torch.arange(key.shape[2], device=key.device)
    allowed = positions <= place[:, None]
    if mask is not None:
        row = mask.expand(batch, -1, -1, -1)[rows, 0, place]
        allowed = row if row.dtype == torch.bool else row > torch.finfo(row.dtype).min / 2
    return logits.masked_fill(~allowed[:, None, None], -torch.inf).softmax(-1).mean((1, 2))
