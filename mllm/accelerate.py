"""Make a Hugging Face multimodal model cheaper or better grounded, without a fork: hooks that can be taken off."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from zoo.mllm import masks
from zoo.mllm.attention import PROBES, Probe, register
from zoo.mllm.families import check_family, image_tokens
from zoo.mllm.kept import Kept, hide, layout_of, take_mask
from zoo.mllm.layout import TokenLayout
from zoo.mllm.mod import MoD
from zoo.mllm.reduce import Reduction, parse_reduction

CACHES = ("cache", "past_key_values")  # transformers 5.24 renamed the argument
GATE = "zoo_gate"  # argument of a layer that it hands on to its attention
PREFILL = "zoo_prefill"  # argument of the layers; and attribute of a cache, so that copies of it can be decoded with


@dataclass
class Prefill:
    """What was decided in one prefill; the cache that it filled is decoded with it.

    Attributes:
        layout: of the prompt.
        before: what is kept before the decoder; None for all.
        kept: of what is before the decoder, what each layer is given; missing for all.
        length: tokens before the decoder.
        routed: for each layer that routes, the router's logits (B, M, 2) and what it processes of what it is given,
            (B, M) bool.
        cached: of what is before the decoder, what each layer has put into its cache; missing for all.
        steps: of what each layer is handed, what it keeps, None for all. Decided once: a checkpointed layer is computed
            again for its gradients.
    """

    layout: TokenLayout
    before: Kept | None = None
    kept: dict[int, Kept] = field(default_factory=dict)
    length: int = 0
    routed: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    cached: dict[int, Kept] = field(default_factory=dict)
    steps: dict[int, Kept | None] = field(default_factory=dict)


class Acceleration:
    """What ``accelerate`` did to a model; a context manager that undoes it at its end.

    Attributes:
        last: the decisions of the last prefill.
    """

    def __init__(
        self, model: nn.Module, reductions: Sequence[Reduction], depth: MoD | None, mask: str, prompt_end: Sequence[int]
    ) -> None:
        self.model, self.depth, self.mask, self.prompt_end = model, depth, mask, prompt_end
        self.reductions = [reduction for reduction in reductions if reduction.keep < 1]
        self.last: Prefill | None = None
        self._decoder = model.get_decoder()
        self._tokens = image_tokens(model.config)
        self._inputs: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)
        self._current: Prefill | None = None
        self._decoding: Prefill | None = None
        self._attention = self._decoder.config._attn_implementation
        self._gates: dict[int, Tensor] = {}
        self._whole: dict[int, Tensor] = {}  # hidden states of layers that skip tokens, while they run
        self._inner: dict[int, Kept] = {}
        self._check()
        self._routing = routing = depth.attach(self._decoder) if depth else set()
        for reduction in self.reductions:
            if reduction.needs_attention and reduction.layer - 1 in routing:
                raise ValueError(
                    f"{type(reduction).__name__} at layer {reduction.layer} needs the attention of layer "
                    f"{reduction.layer - 1}, in which MoD skips tokens: take another layer."
                )
        register()
        self._decoder.set_attn_implementation(f"zoo_{self._attention}")
        self._handles = [
            model.base_model.register_forward_pre_hook(self._see_inputs, with_kwargs=True),
            self._decoder.register_forward_pre_hook(self._before_decoder, with_kwargs=True),
            self._decoder.register_forward_hook(self._after_decoder, with_kwargs=True),
            *(
                layer.register_forward_pre_hook(self._before_layer(number), with_kwargs=True)
                for number, layer in enumerate(self._decoder.layers)
            ),
        ]
        for number in sorted(routing):
            layer = self._decoder.layers[number]
            self._handles += [
                layer.self_attn.register_forward_pre_hook(self._receive_gate(number), with_kwargs=True),
                layer.mlp.register_forward_hook(self._gate(number)),
                layer.register_forward_hook(self._merge(number)),
            ]

    def remove(self) -> None:
        """Take everything off: the outputs are those of the plain model again, bit by bit. May be called twice.

        A cache that was filled before is of no use to the plain model.
        """
        for handle in self._handles:
            handle.remove()
        if self._handles:
            self._decoder.set_attn_implementation(self._attention)
        self._handles = []

    def report(self) -> dict[str, Any]:
        """Visual tokens that each layer processed in the last prefill, summed over the batch, and what came in.

        Raises:
            RuntimeError: the model has not run yet.
        """
        if self.last is None:
            raise RuntimeError("There is nothing to report: run the model first.")
        is_image = self.last.layout.is_image
        before = self.last.before
        entering = is_image if before is None else before.take(is_image) & before.valid
        seen = []
        for layer in range(len(self._decoder.layers)):
            kept = self.last.cached.get(layer)
            seen.append(int((entering if kept is None else kept.take(entering) & kept.valid).sum()))
        return {"visual_tokens": int(is_image.sum()), "visual_tokens_per_layer": seen}

    def loss(self) -> Tensor:
        """MoD's auxiliary loss of the last prefill, to be added to the model's."""
        if self.depth is None or self.last is None:
            raise RuntimeError("There is no loss: accelerate with depth=MoD(...) and run the model first.")
        return self.depth.loss(self.last.routed)

    def __enter__(self) -> "Acceleration":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.remove()

    def _check(self) -> None:
        layers = len(self._decoder.layers)
        for reduction in self.reductions:
            if reduction.layer >= layers:
                raise ValueError(
                    f"{type(reduction).__name__}: layer is {reduction.layer}, but the decoder has {layers} layers."
                )
        if not self._tokens:
            raise ValueError("The model's config names no image token: set image_token_id in it.")
        if self._attention.startswith("zoo_"):
            raise ValueError("The model is accelerated already: call remove() of what accelerate() returned, first.")
        if self._attention not in ("sdpa", "eager"):
            raise ValueError(
                f"The model uses the attention {self._attention!r}, which takes no custom mask and shows no scores: "
                "load it with attn_implementation='sdpa'."
            )
        if self.mask not in masks.RULES:
            raise ValueError(f"mask is {self.mask!r}, expected one of {', '.join(masks.RULES)}.")
        if self.mask.startswith("mma") and not self.prompt_end:
            raise ValueError(f"The mask {self.mask} needs prompt_end: the ids of the assistant marker.")

    def _see_inputs(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        ids = args[0] if args else kwargs.get("input_ids")
        self._inputs = (ids, kwargs.get("attention_mask"), kwargs.get("position_ids"))

    def _before_decoder(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        kwargs = dict(kwargs)
        cache = next((kwargs[name] for name in CACHES if kwargs.get(name) is not None), None)
        past = cache.get_seq_length() if cache is not None else 0
        self._current = self._decoding = None
        self._forget_probes()  # of a pass that an error ended
        if cache is not None and cache.is_compileable and self._changes:
            raise ValueError(
                "An accelerated model needs a cache that grows, but got one of fixed size: leave out "
                "cache_implementation='static'."
            )
        if past:
            self._decoding = getattr(cache, PREFILL, None)
            self._check_continued(kwargs["inputs_embeds"])
            if self._decoding:
                self._before_decoding(kwargs, past)
        else:
            self._before_prefill(kwargs)
        return args, kwargs

    def _before_prefill(self, kwargs: dict[str, Any]) -> None:
        ids, padding, _ = self._inputs
        embeds = kwargs["inputs_embeds"]
        if ids is None or ids.shape != embeds.shape[:2]:
            raise ValueError(
                "An accelerated model needs input_ids to know where its images are, but got inputs_embeds alone."
            )
        layout = TokenLayout.from_ids(ids, self._tokens, padding, self.prompt_end)
        prefill = self._current = self.last = kwargs[PREFILL] = Prefill(layout, length=ids.shape[1])
        mask = None if self.mask == "causal" else masks.RULES[self.mask](layout)[:, None]
        kept = self._decide(0, prefill, embeds)
        if kept is not None:
            prefill.before, prefill.length = kept, kept.index.shape[1]
            positions = kwargs.get("position_ids")
            if positions is None:
                positions = torch.arange(ids.shape[1], device=ids.device)[None]
            kwargs["position_ids"] = kept.take(positions, dim=positions.ndim - 1)
            kwargs["inputs_embeds"] = kept.take(embeds)
            kwargs["attention_mask"] = kept.valid.long()
            mask = None if mask is None else take_mask(mask, kept)
        if mask is not None:
            kwargs["attention_mask"] = self._as_decoder_takes(mask, embeds.dtype)

    @torch.no_grad()
    def _decide(self, number: int, prefill: Prefill, hidden: Tensor) -> Kept | None:
        """What the reductions at a layer keep of what it is handed; None for all. At layer 0: before the decoder."""
        here = [reduction for reduction in self.reductions if reduction.layer == number]
        if not here:
            return None
        layout = _layout_at(prefill, number - 1)
        probe = PROBES.get(self._decoder.layers[number - 1].self_attn) if number else None
        attention, step = probe and probe.seen, None
        for reduction in here if layout.is_image.any() else ():
            inner = Kept.of(reduction.select(layout, hidden, attention) & layout.valid)
            layout, hidden = layout_of(layout, inner), inner.take(hidden)
            attention = None if attention is None else inner.take(attention)
            step = inner if step is None else step.then(inner)
        return step

    @property
    def _changes(self) -> bool:
        """Whether anything differs from the plain model."""
        return bool(self.reductions or self.depth or self.mask != "causal")

    def _check_continued(self, embeds: Tensor) -> None:
        """Refuse what would be computed as if nothing was accelerated: parts of a prompt behind a filled cache."""
        ids, new = self._inputs[0], embeds.shape[1]
        if new == 1 or ids is None or not self._changes:
            return
        unfinished = False
        if self._decoding and self.mask.startswith("mma"):
            layout = self._decoding.layout
            unfinished = bool((layout.is_image.any(1) & (layout.prompt_end < 0)).any())
        if unfinished or TokenLayout.from_ids(ids, self._tokens).is_image.any():
            raise ValueError(
                "A part of the prompt came after the cache was filled, but an accelerated model has to see all of it "
                "with its images at once: give the whole prompt in one call, without prefill_chunk_size."
            )

    def _before_decoding(self, kwargs: dict[str, Any], past: int) -> None:
        kept, dropped = self._decoding.before, self._decoding.layout.valid.shape[1] - self._decoding.length
        if kept is None:
            return
        new = kwargs["inputs_embeds"].shape[1]
        padding = kwargs.get("attention_mask")
        if padding is None:
            generated = kept.valid.new_ones(len(kept.valid), past + new - self._decoding.length)
        else:
            generated = padding[:, self._decoding.layout.valid.shape[1] :]
        kwargs["attention_mask"] = torch.cat([kept.valid.long(), generated.long()], 1)
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = torch.arange(past, past + new, device=kept.valid.device)[None]
        if kwargs.get("position_ids") is None or (self._inputs[1] is None and self._inputs[2] is None):
            kwargs["position_ids"] = positions + dropped  # counted from the cache: the plain model's has all tokens

    def _before_layer(self, number: int) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
            kwargs = dict(kwargs)
            # An argument, because older transformers call hooks again where a checkpointed layer is computed again.
            prefill = kwargs.pop(PREFILL, None)
            if prefill:
                args, kwargs = self._prefill_layer(number, prefill, args, kwargs)
            elif self._decoding and number in self._decoding.cached:
                kwargs = self._decode_layer(self._decoding.cached[number], args[0], kwargs)
            return self._route(number, prefill, module, args, kwargs) if number in self._routing else (args, kwargs)

        return hook

    def _prefill_layer(self, number: int, prefill: Prefill, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        hidden, kept = args[0], prefill.kept.get(number - 1)
        if number not in prefill.steps:
            prefill.steps[number] = step = self._decide(number, prefill, hidden) if number else None
            if step is not None:
                kept = step if kept is None else kept.then(step)
            if kept is not None:
                prefill.kept[number] = prefill.cached[number] = kept
            if any(reduction.needs_attention and reduction.layer == number + 1 for reduction in self.reductions):
                PROBES[self._decoder.layers[number].self_attn] = Probe(_layout_at(prefill, number).last)
        step, kept = prefill.steps[number], prefill.kept.get(number)
        if kept is None:
            return args, kwargs
        return (hidden if step is None else step.take(hidden), *args[1:]), _cut(kwargs, kept, prefill.length)

    def _route(
        self, number: int, prefill: Prefill | None, layer: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict]:
        """Leave the tokens that are not selected out of a layer."""
        hidden, router = args[0], self.depth.router
        logits = router(layer.input_layernorm(hidden).to(router.weight.dtype))
        gate = logits.softmax(-1)[..., 1:].to(hidden.dtype)
        self._whole.pop(number, None)
        if prefill is None:
            return args, {**kwargs, GATE: gate}
        layout = _layout_at(prefill, number)
        if number not in prefill.routed:
            prefill.routed[number] = (logits, self.depth.route(logits, layout))
        keep = prefill.routed[number][1]
        if not (layout.is_image & ~keep).any():
            return args, {**kwargs, GATE: gate}
        inner, given = Kept.of(keep & layout.valid), prefill.kept.get(number)
        prefill.cached[number] = inner if given is None else given.then(inner)
        self._whole[number], self._inner[number] = hidden, inner
        return (inner.take(hidden), *args[1:]), {**_cut(kwargs, inner, hidden.shape[1]), GATE: inner.take(gate)}

    def _receive_gate(self, number: int) -> Callable:
        """The gate comes with the arguments, so that a checkpointed layer finds its own when it is computed again."""

        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
            kwargs = dict(kwargs)
            self._gates[number] = kwargs.pop(GATE)
            return args, kwargs

        return hook

    def _gate(self, number: int) -> Callable:
        def hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
            return output * self._gates[number] if self.depth.gate else None

        return hook

    def _merge(self, number: int) -> Callable:
        """Put what a layer made of the selected tokens back among the others."""

        def hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
            whole = self._whole.pop(number, None)
            return None if whole is None else self._inner.pop(number).put(output, whole)

        return hook

    def _decode_layer(self, kept: Kept, hidden: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        if hidden.shape[1] != 1:
            raise ValueError(
                "A prompt was reduced inside the decoder, and then several tokens came at once: feed them one by one, "
                "or give the whole prompt in one call."
            )
        mask = kwargs.get("attention_mask")
        if mask is None and kept.all_valid:
            return kwargs
        past, batch = self._decoding.length, len(kept.valid)
        if mask is None:
            cache = next(kwargs[name] for name in CACHES if kwargs.get(name) is not None)
            # Layer 0, which tells the length, has put the new token in already.
            mask = torch.ones(batch, 1, 1, cache.get_seq_length(), dtype=torch.bool, device=hidden.device)
        mask = mask.expand(batch, -1, -1, -1)
        prompt = kept.take(mask[..., :past].flatten(1)).view(batch, 1, 1, -1)
        return {**kwargs, "attention_mask": torch.cat([hide(prompt, kept.valid[:, None, None]), mask[..., past:]], -1)}

    def _after_decoder(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        prefill, self._current, self._decoding = self._current, None, None
        self._inputs = (None, None, None)
        self._forget_probes()
        if prefill is None:
            return output
        cache = next((output.get(name) for name in CACHES if output.get(name) is not None), None)
        if cache is not None:
            setattr(cache, PREFILL, prefill)
        inner = prefill.kept.get(len(self._decoder.layers) - 1)
        kept = prefill.before if inner is None else inner if prefill.before is None else prefill.before.then(inner)
        if kept is not None:  # zeros where tokens were dropped, so that logits and labels stay aligned
            hidden = output["last_hidden_state"]
            zeros = hidden.new_zeros(*prefill.layout.valid.shape, hidden.shape[-1])
            output["last_hidden_state"] = kept.put(hidden, zeros)
        return output

    def _forget_probes(self) -> None:
        for layer in self._decoder.layers:
            PROBES.pop(layer.self_attn, None)

    def _as_decoder_takes(self, mask: Tensor, dtype: torch.dtype) -> Tensor:
        """A bool mask as SDPA takes it, or for eager attention what is added to the logits."""
        if self._attention == "sdpa":
            return mask
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


def _layout_at(prefill: Prefill, number: int) -> TokenLayout:
    """The layout of what a layer is given; of -1: of what is before the decoder."""
    layout, kept = prefill.layout, prefill.kept.get(number)
    if prefill.before is not None:
        layout = layout_of(layout, prefill.before)
    return layout if kept is None else layout_of(layout, kept)


def _cut(kwargs: dict[str, Any], kept: Kept, length: int) -> dict[str, Any]:
    """The arguments of a layer for a part of its `length` tokens."""
    kwargs = {**kwargs, "position_embeddings": tuple(kept.take(x) for x in kwargs["position_embeddings"])}
    if kwargs.get("position_ids") is not None:
        kwargs["position_ids"] = kept.take(kwargs["position_ids"])
    mask = kwargs.get("attention_mask")
    if mask is None and not kept.all_valid:
        mask = torch.ones(length, length, dtype=torch.bool, device=kept.index.device).tril()[None, None]
    kwargs["attention_mask"] = None if mask is None else take_mask(mask, kept)
    return kwargs


def accelerate(
    model: nn.Module,
    reduce: str | Reduction | Sequence[str | Reduction] = (),
    depth: MoD | None = None,
    mask: str = "causal",
    prompt_end: Sequence[int] = (),
) -> Acceleration:
    """Reduce the visual tokens of a model, or let them see the question, until ``remove()``.

    Nothing of the model is copied or renamed; its ``state_dict`` stays. Dropped tokens leave the tensors, so that time
    and the key-value cache shrink. With everything kept the outputs are those of the plain model, bit by bit.

    Args:
        model: LLaVA, LLaVA-NeXT, Qwen2-VL, Qwen2.5-VL, InternVL, SmolVLM or Idefics3 of transformers, with SDPA or
            eager attention.
        reduce: a method or several, as an object or as text: ``"fastv:layer=2,keep=0.5"``; see ``zoo.mllm.reduce``.
        depth: layers that process part of the visual tokens only; its router is trained with the model.
        mask: "causal", "mma", "mma_mutual", "framewise" or "composite"; see ``zoo.mllm.masks``.
        prompt_end: ids of the assistant marker, which the masks "mma" and "mma_mutual" need.

    Returns:
        A handle, also a context manager, with ``remove()`` and ``report()``.

    Raises:
        ValueError: the model's family, its attention or an option is not supported.
    """
    check_family(model)
    several = [reduce] if isinstance(reduce, str | Reduction) else reduce
    reductions = [parse_reduction(one) if isinstance(one, str) else one for one in several]
    return Acceleration(model, sorted(reductions, key=lambda one: one.layer), depth, mask, list(prompt_end))
