"""What was decided in one prefill, and what it took."""

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from zoo.mllm.base import Choice, Step
from zoo.mllm.kept import Kept, layout_of
from zoo.mllm.layout import TokenLayout


@dataclass(frozen=True)
class Cut:
    """What one step makes of a sequence.

    Attributes:
        kept: the tokens that stay.
        merged: those of which something else becomes; None for none.
        weights: (B, R, L), of all tokens in what each merged one becomes.
    """

    kept: Kept
    merged: Kept | None = None
    weights: Tensor | None = None

    @classmethod
    def by(cls, choice: Choice, keep: Tensor) -> "Cut":
        """From a choice, of which these (B, L) stay."""
        if choice.mix is None:
            return cls(Kept.of(keep))
        itself = torch.eye(keep.shape[1], dtype=choice.mix.dtype, device=keep.device)
        merged = Kept.of((choice.mix != itself).any(-1))
        return cls(Kept.of(keep), merged, merged.take(choice.mix))

    def of(self, hidden: Tensor) -> Tensor:
        """(B, M, C) of (B, L, C): merged where it says so, the others bit by bit as they were."""
        if self.merged is not None:
            hidden = self.merged.put(self.weights.to(hidden.dtype) @ hidden, hidden)
        return self.kept.take(hidden)


@dataclass
class Prefill:
    """What was decided in one prefill; the cache that it filled is decoded with it.

    Attributes:
        layout: of the prompt.
        before: what is kept before the decoder; None for all.
        kept: of what is before the decoder, what each layer is given; missing for all.
        length: tokens before the decoder.
        asked: (B, length) bool, whose attention a step wants to see.
        routed: for each layer that routes, the router's logits (B, M, 2) and what it processes of what it is given,
            (B, M) bool.
        cached: of what is before the decoder, what each layer processes and puts into its cache; missing for all.
        cuts: what the steps before each layer do to what it is handed. Decided once: a checkpointed layer is computed
            again for its gradients.
        decoded: for each layer, what its cache leaves out by itself, and then what is stored of what is before the
            decoder, None for all, with its layout.
        latest: the layout that was made last: what it is of, before the decoder and in it, and the layout.
        extras: what methods add to the report.
        kv_bytes: of the cache, after the prefill.
        prefill: its time.
        decoding: the time of each later pass.
    """

    layout: TokenLayout
    before: Kept | None = None
    kept: dict[int, Kept] = field(default_factory=dict)
    length: int = 0
    asked: dict[Step, Tensor] = field(default_factory=dict)
    routed: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    cached: dict[int, Kept] = field(default_factory=dict)
    cuts: dict[int, list[Cut]] = field(default_factory=dict)
    decoded: dict[int, tuple[Kept | None, Kept | None, TokenLayout]] = field(default_factory=dict)
    latest: tuple[Kept | None, Kept | None, TokenLayout] | None = None
    extras: dict[str, Any] = field(default_factory=dict)
    kv_bytes: int | None = None
    prefill: "Stopwatch | None" = None
    decoding: "list[Stopwatch]" = field(default_factory=list)

    @property
    def entering(self) -> TokenLayout:
        """The layout of what is before the decoder."""
        return self._part(None)

    def layout_at(self, number: int) -> TokenLayout:
        """The layout of what a layer is given; of -1: of what is before the decoder."""
        return self._part(self.kept.get(number))

    def layout_in(self, number: int) -> TokenLayout:
        """The layout of what a layer processes."""
        return self._part(self.cached.get(number))

    def _part(self, kept: Kept | None) -> TokenLayout:
        """The layout of a part of what is before the decoder, None for all; the same one as long as the part is."""
        if self.latest is None or self.latest[0] is not self.before or self.latest[1] is not kept:
            layout = self.layout if self.before is None else layout_of(self.layout, self.before)
            self.latest = self.before, kept, layout if kept is None else layout_of(layout, kept)
        return self.latest[2]

    def stored(self, number: int, evicted: Kept | None) -> tuple[Kept | None, TokenLayout]:
        """What the cache of a layer has of what is before the decoder, None for all, and its layout.

        Args:
            number: of the layer.
            evicted: what the cache itself keeps of what the layer processed; None for all.
        """
        if number not in self.decoded or self.decoded[number][0] is not evicted:
            kept = self.cached.get(number)
            if evicted is not None:
                kept = evicted if kept is None else kept.then(evicted)
            self.decoded[number] = evicted, kept, self._part(kept)
        return self.decoded[number][1:]

    def places(self, row: int, layers: int) -> Tensor:
        """(layers, L) bool: which tokens of a row's prompt each layer processes."""
        seen = torch.zeros(layers, self.layout.valid.shape[1], dtype=torch.bool)
        for number in range(layers):
            place, valid = torch.arange(self.length), torch.ones(self.length, dtype=torch.bool)
            if self.before is not None:
                place, valid = self.before.index[row].cpu(), self.before.valid[row].cpu()
            kept = self.cached.get(number)
            if kept is not None:
                place, valid = place[kept.index[row].cpu()], valid[kept.index[row].cpu()] & kept.valid[row].cpu()
            seen[number, place[valid]] = True
        return seen & self.layout.valid[row].cpu()

    def __deepcopy__(self, memo: dict) -> "Prefill":
        return self  # a copied cache is decoded with the same decisions


class Stopwatch:
    """Time from its making to ``stop()``, on a GPU without waiting for it."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.start = self._now()
        self.end: Any = None

    def stop(self) -> None:
        """The end."""
        self.end = self._now()

    @property
    def seconds(self) -> float:
        """Between the two; waits for the GPU."""
        if not self.on_gpu:
            return self.end - self.start
        self.end.synchronize()
        return self.start.elapsed_time(self.end) / 1000

    def _now(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
