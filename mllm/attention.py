"""Transformers' SDPA and eager attention, which can also be watched and replaced.

The outputs are those of the attention they stand for, bit by bit, unless another function came with a layer's
arguments. What some queries attend to is computed beside it, without the L x L matrix.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from zoo.mllm.kept import Kept

REPLACE = "zoo_attention"  # argument of a layer, handed on to its attention: what stands for it

See = Callable[[Tensor, Tensor, Tensor | None, float], Any]
WATCHED: WeakKeyDictionary[nn.Module, list[See]] = WeakKeyDictionary()


@dataclass
class Watch:
    """That an attention module is watched; undone by ``remove()``."""

    module: nn.Module
    see: See

    def remove(self) -> None:
        """Watch no longer. May be called twice."""
        if self.see in WATCHED.get(self.module, ()):
            WATCHED[self.module].remove(self.see)


def watch(module: nn.Module, see: See) -> Watch:
    """Show each pass of an attention module to ``see(query, key, mask, scaling)``.

    The module must run with the attention ``zoo_sdpa`` or ``zoo_eager``. The queries (B, heads, L, head_dim) and keys
    (B, kv heads, L, head_dim), with their positions in them, are detached.
    """
    WATCHED.setdefault(module, []).append(see)
    return Watch(module, see)


@dataclass(eq=False)
class Probe:
    """Sees what some queries attend to.

    Attributes:
        queries: which ones, of the sequence of the layer.
        seen: (B, R, L) float32, their attention, mean over heads, zero where a row has fewer; None before the layer
            has run.
    """

    queries: Kept
    seen: Tensor | None = None

    def __call__(self, query: Tensor, key: Tensor, mask: Tensor | None, scaling: float) -> None:
        """Look at one pass."""
        allowed = allowed_keys(mask, self.queries, key.shape[2])
        self.seen = attention_of(self.queries.take_heads(query), key, allowed, scaling)


def replace(kwargs: dict[str, Any], attend: Callable, name: str) -> dict[str, Any]:
    """The arguments of a layer, with ``attend(forward, module, query, key, value, mask, **kwargs)`` as its attention.

    As an argument, it is there again where a checkpointed layer is computed again. ``forward`` is transformers' own.

    Raises:
        ValueError: another method has replaced it.
    """
    if REPLACE in kwargs:
        raise ValueError(f"{name} and another method both replace the attention of a layer: give one of them.")
    return {**kwargs, REPLACE: attend}


def register() -> None:
    """Make ``zoo_sdpa`` and ``zoo_eager`` known to transformers, for attention and for its masks."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import eager_mask, sdpa_mask

    def eager(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        return sys.modules[type(module).__module__].eager_attention_forward(module, *args, **kwargs)

    for name, forward, mask in (("sdpa", sdpa_attention_forward, sdpa_mask), ("eager", eager, eager_mask)):
        AttentionInterface.register(f"zoo_{name}", _open(forward))
        AttentionMaskInterface.register(f"zoo_{name}", mask)


def _open(forward: Callable) -> Callable:
    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        for see in WATCHED.get(module, ()):
            # Detached before all else: what autograd saved would be missed when a checkpointed layer is computed again.
            see(query.detach(), key.detach(), attention_mask, kwargs["scaling"])
        attend = kwargs.pop(REPLACE, None)
        if attend:
            return attend(forward, module, query, key, value, attention_mask, **kwargs)
        return forward(module, query, key, value, attention_mask, **kwargs)

    return attention


def as_bool(mask: Tensor) -> Tensor:
    """Of a mask, bool or added to the logits: where attention is allowed."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def allowed_keys(mask: Tensor | None, queries: Kept, length: int) -> Tensor:
    """(B, R, L) bool: the keys that some queries may attend to, by a mask as attention takes it; None for causal."""
    if mask is None:
        allowed = torch.arange(length, device=queries.index.device) <= queries.index[..., None]
    else:
        allowed = as_bool(queries.take(mask.expand(len(queries.index), -1, -1, -1)[:, 0]))
    return allowed & queries.valid[..., None]


def attention_of(query: Tensor, key: Tensor, allowed: Tensor, scaling: float) -> Tensor:
    """(B, R, L) float32: attention of the queries (B, heads, R, D) among allowed (B, R, L) keys, mean over heads."""
    kv_heads, count = key.shape[1], query.shape[2]
    grouped = query.float().unflatten(1, (kv_heads, -1)).flatten(2, 3)  # (B, kv heads, heads per kv head * R, D)
    logits = (scaling * grouped @ key.float().transpose(-1, -2)).unflatten(2, (-1, count))
    attention = logits.masked_fill(~allowed[:, None, None], -torch.inf).softmax(-1).mean((1, 2))
    return attention.masked_fill(~allowed, 0.0)  # also where nothing is allowed
