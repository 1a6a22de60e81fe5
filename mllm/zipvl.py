"""ZipVL: layers attend among their important tokens, and store the others coarsely or not at all (arXiv:2410.08584)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from zoo.mllm.attention import allowed_keys, attention_of, replace
from zoo.mllm.base import Method, cache_in
from zoo.mllm.kept import Kept, mask_of
from zoo.mllm.layout import TokenLayout

BITS = (2, 4, 8, 16)


@dataclass(frozen=True)
class ZipVL(Method):
    """How many tokens are important is up to each layer and prompt.

    Some probes, the latest tokens and random ones, tell what all tokens are worth: ``a_j``, the sum of their attention
    to token j. As many tokens are important as the largest ``a_j`` need to sum up to ``tau`` of all; they are those
    with the largest ``a_j`` divided by the number of probes that may see token j. In the prefill, only they attend, and
    only to each other; the others pass the layer's attention unchanged. In the cache, they have ``high`` bits and the
    others ``low`` ones; both are read by later tokens, whose own keys and values are compressed likewise, ``every`` at
    a time.

    The bits and the numbers of probes are those of the first version of the paper, which is not quite sure; its second
    version evicts: ``low=0``. It is for inference only.

    Attributes:
        tau: share of the attention that the important tokens have, more than 0 and at most 1; 1 for all tokens.
        high: bits of the important tokens' keys and values: 2, 4, 8, or 16 for as they are.
        low: bits of the others', at most ``high``; 0 evicts those of the prompt.
        recent: probes among the latest tokens.
        random: probes among the tokens before.
        every: generated tokens between compressions.
        seed: of the random probes.
    """

    tau: float = 0.975
    high: int = 4
    low: int = 2
    recent: int = 64
    random: int = 64
    every: int = 100
    seed: int = 0
    inference_only: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.tau <= 1:
            raise ValueError(f"ZipVL: tau is {self.tau}, expected more than 0 and at most 1.")
        if self.high not in BITS or self.low not in (0, *BITS) or self.low > self.high:
            raise ValueError(
                f"ZipVL: high is {self.high} and low is {self.low} bits, expected 2, 4, 8 or 16 for high, and at most "
                "that, or 0, for low."
            )
        if self.recent < 1 or self.random < 0 or self.every < 1:
            raise ValueError(
                f"ZipVL: recent is {self.recent}, random {self.random} and every {self.every}, expected at least 1, 0 "
                "and 1."
            )

    @property
    def is_identity(self) -> bool:
        """Whether all attend and all is stored as it is."""
        return self.tau == 1 and self.high == 16

    def before_layer(
        self, number: int, layout: TokenLayout, kwargs: dict[str, Any], memory: dict[Any, Any]
    ) -> dict[str, Any]:
        """Attend among the important tokens, and compress the cache."""
        return replace(kwargs, partial(self._prefill, number, layout.valid, cache_in(kwargs), memory), "ZipVL")

    def before_decoding(
        self, number: int, layout: TokenLayout, kwargs: dict[str, Any], memory: dict[Any, Any]
    ) -> dict[str, Any]:
        """Compress what was generated, from time to time."""
        if self.high == 16 and self.low in (0, 16):
            return kwargs
        return replace(kwargs, partial(self._decode, cache_in(kwargs).layers[number]), "ZipVL")

    def report(self, memory: dict[Any, Any]) -> dict[str, Any]:
        """Tokens, of text too, that were important to each layer, summed over the batch."""
        return {"important_tokens_per_layer": [int(mask.sum()) for _, mask in sorted(memory.items())]}

    def overhead(self, shape: Any, text: float, tokens: Sequence[float]) -> float:
        """The probes' rows of attention."""
        return 2 * (self.recent + self.random) * sum(tokens) * shape.num_heads * shape.head_dim

    def kv_share(self, important: float, bits: int, head_dim: int) -> float:
        """Bytes of the prompt's keys and values over what they are in so many bits, given the important share."""
        parts = ((important, self.high), (1 - important, self.low))
        # Below 16 bits a token's head has a scale and an offset of 32 bits each.
        return sum(share * (bits if b == 16 else b + 64 / head_dim) for share, b in parts if b) / bits

    def _prefill(
        self,
        number: int,
        valid: Tensor,
        cache: Any,
        memory: dict[Any, Any],
        forward: Callable,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        important = memory[number] = self.important(query, key, mask, valid, kwargs["scaling"])
        if torch.equal(important, valid):
            out = forward(module, query, key, value, mask, **kwargs)[0]
        else:
            kept = Kept.of(important)
            part = (kept.take_heads(x) for x in (query, key, value))
            inside = forward(module, *part, mask_of(mask, kept, key.shape[2]), **kwargs)[0]  # (B, M, heads, D)
            whole = inside.new_zeros(*valid.shape, inside.shape[2] * inside.shape[3])
            out = kept.put(inside.flatten(2), whole).unflatten(-1, inside.shape[2:])
        if cache is not None:
            self._compress(cache, number, important, valid)
        return out, None

    def _compress(self, cache: Any, number: int, important: Tensor, valid: Tensor) -> None:
        from transformers.cache_utils import DynamicLayer

        from zoo.mllm.mixed_cache import MixedLayer

        if self.low == 16:
            return
        if type(cache.layers[number]) is not DynamicLayer:
            raise ValueError(
                f"ZipVL compresses the cache itself, but that of layer {number} is a "
                f"{type(cache.layers[number]).__name__}: leave out cache_implementation."
            )
        cache.layers[number] = MixedLayer(cache.layers[number], important, valid, self.high, self.low)

    def _decode(
        self,
        stored: Any,
        forward: Callable,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        latest, length = stored.keys.shape[2], key.shape[2]
        if latest > self.every - self.recent:  # the last of them are the probes
            stored.queries.append(query)
        if latest >= self.every:
            queries = torch.cat(stored.queries, 2)
            place = torch.arange(length - queries.shape[2], length, device=key.device).expand(len(key), -1)
            allowed = torch.arange(length, device=key.device) <= place[..., None]
            if mask is not None:  # the last token's row tells what is padding
                last = Kept(place.new_full((len(key), 1), mask.shape[2] - 1), torch.ones_like(place[:, :1]).bool())
                allowed = allowed & allowed_keys(mask, last, length)
            attention = attention_of(queries, key, allowed, kwargs["scaling"])[..., -latest:]
            window = allowed[..., -latest:]
            stored.compress(self._largest(attention, window, window.any(1)))
        return forward(module, query, key, value, mask, **kwargs)

    def important(self, query: Tensor, key: Tensor, mask: Tensor | None, valid: Tensor, scaling: float) -> Tensor:
        """(B, L) bool: the important ones of the valid tokens.

        Args:
            query: (B, heads, L, head_dim), with positions.
            key: (B, kv heads, L, head_dim), with positions.
            mask: as attention takes it, bool or additive; None for a causal one.
            valid: (B, L) bool.
            scaling: of the logits.
        """
        probes = Kept.of(self._probes(valid))
        allowed = allowed_keys(mask, probes, key.shape[2])
        return self._largest(attention_of(probes.take_heads(query), key, allowed, scaling), allowed, valid)

    def _largest(self, attention: Tensor, allowed: Tensor, valid: Tensor) -> Tensor:
        """(B, L) bool, given the attention (B, R, L) of the probes and what they may see."""
        if self.tau == 1:
            return valid
        mass = attention.sum(1)
        reached = mass.sort(dim=1, descending=True).values.cumsum(1)
        count = (reached < self.tau * mass.sum(1, keepdim=True)).sum(1, keepdim=True) + 1
        worth = (mass / allowed.sum(1).clamp(min=1)).masked_fill(~valid, -torch.inf)
        rank = worth.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        return valid & (rank < count)

    def _probes(self, valid: Tensor) -> Tensor:
        """(B, L) bool: the latest tokens and random ones before them."""
        behind = valid.flip(1).cumsum(1).flip(1)  # of the valid ones, counted from the end, from 1 on
        recent = valid & (behind <= self.recent)
        # Drawn on the CPU so that every device takes the same, and by the distance from the end, so that padding does
        # not matter and rows that are alike, as in beam search, take the same.
        draw = torch.rand(valid.shape[1], generator=torch.Generator().manual_seed(self.seed)).to(valid.device)
        lot = draw[(behind - 1).clamp(min=0)].masked_fill(recent | ~valid, torch.inf)
        rank = lot.argsort(dim=1, stable=True).argsort(dim=1)
        return recent | (valid & (rank < self.random))
