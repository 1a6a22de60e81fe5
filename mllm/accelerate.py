"""Make a Hugging Face multimodal model cheaper or better grounded, without a fork: hooks that can be taken off."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from zoo.mllm import masks
from zoo.mllm.attention import PROBES, Probe, register
from zoo.mllm.families import check_family, image_tokens
from zoo.mllm.layout import TokenLayout
from zoo.mllm.reduce import Reduction, parse_reduction

CACHES = ("cache", "past_key_values")  # transformers 5.24 renamed the argument


@dataclass(frozen=True)
class Kept:
    """The tokens that a layer sees.

    Attributes:
        index: (B, M) int64, their positions in the sequence before; rows with fewer are filled up on the left.
        valid: (B, M) bool, False where filled up.
    """

    index: Tensor
    valid: Tensor

    @classmethod
    def of(cls, mask: Tensor) -> "Kept":
        """From (B, L) bool."""
        size = int(mask.sum(1).max())
        order = mask.int().argsort(dim=1, stable=True)[:, -size:]  # the kept ones come last, in their order
        return cls(order, mask.gather(1, order))

    @property
    def all_valid(self) -> bool:
        """Whether every row keeps the same number."""
        return bool(self.valid.all())

    def take(self, x: Tensor, dim: int = 1) -> Tensor:
        """The kept tokens of x, whose batch is dimension 0 (or 1, for positions of several axes) of any size."""
        batch_dim = dim - 1
        shape = list(x.shape)
        shape[batch_dim] = len(self.index)
        index = self.index.view(*(1,) * batch_dim, *self.index.shape, *(1,) * (x.ndim - dim - 1))
        shape[dim] = self.index.shape[1]
        return x.expand(*shape[:dim], x.shape[dim], *shape[dim + 1 :]).gather(dim, index.expand(shape))

    def then(self, inner: "Kept") -> "Kept":
        """What is kept of what is kept."""
        return Kept(self.index.gather(1, inner.index), self.valid.gather(1, inner.index) & inner.valid)


@dataclass
class Prefill:
    """What was decided in one prefill; the cache that it filled is decoded with it.

    Attributes:
        layout: of the prompt.
        before: what is kept before the decoder; None for all.
        kept: of what is before the decoder, what each layer sees; missing for all.
        length: tokens before the decoder.
    """

    layout: TokenLayout
    before: Kept | None = None
    kept: dict[int, Kept] = field(default_factory=dict)
    length: int = 0


class Acceleration:
    """What ``accelerate`` did to a model; a context manager that undoes it at its end.

    Attributes:
        last: the decisions of the last prefill.
    """

    def __init__(self, model: nn.Module, reductions: Sequence[Reduction], mask: str, prompt_end: Sequence[int]) -> None:
        self.model, self.mask, self.prompt_end = model, mask, prompt_end
        self.reductions = [reduction for reduction in reductions if reduction.keep < 1]
        self.last: Prefill | None = None
        self._decoder = model.get_decoder()
        self._tokens = image_tokens(model.config)
        self._prefills: WeakKeyDictionary[Any, Prefill] = WeakKeyDictionary()
        self._inputs: tuple[Tensor | None, Tensor | None] = (None, None)
        self._current: Prefill | None = None
        self._decoding: Prefill | None = None
        self._attention = self._decoder.config._attn_implementation
        self._check()
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

    def remove(self) -> None:
        """Take everything off: the outputs are those of the plain model again, bit by bit. May be called twice."""
        for handle in self._handles:
            handle.remove()
        if self._handles:
            self._decoder.set_attn_implementation(self._attention)
        self._handles = []

    def report(self) -> dict[str, Any]:
        """Visual tokens that each layer saw in the last prefill, summed over the batch, and what they were before.

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
            kept = self.last.kept.get(layer)
            seen.append(int((entering if kept is None else kept.take(entering) & kept.valid).sum()))
        return {"visual_tokens": int(is_image.sum()), "visual_tokens_per_layer": seen}

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
        self._inputs = (args[0] if args else kwargs.get("input_ids"), kwargs.get("attention_mask"))

    def _before_decoder(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        kwargs = dict(kwargs)
        cache = next((kwargs[name] for name in CACHES if kwargs.get(name) is not None), None)
        past = cache.get_seq_length() if cache is not None else 0
        self._current = self._decoding = None
        if past:
            self._decoding = self._prefills.get(cache)
            if self._decoding:
                self._before_decoding(kwargs, past)
        else:
            self._before_prefill(kwargs)
        return args, kwargs

    def _before_prefill(self, kwargs: dict[str, Any]) -> None:
        ids, padding = self._inputs
        embeds = kwargs["inputs_embeds"]
        if ids is None or ids.shape != embeds.shape[:2]:
            raise ValueError(
                "An accelerated model needs input_ids to know where its images are, but got inputs_embeds alone."
            )
        layout = TokenLayout.from_ids(ids, self._tokens, padding, self.prompt_end)
        prefill = self._current = self.last = Prefill(layout, length=ids.shape[1])
        mask = None if self.mask == "causal" else masks.RULES[self.mask](layout)[:, None]
        kept, hidden = self._reduce(0, embeds)
        if kept is not None:
            prefill.before, prefill.length = kept, hidden.shape[1]
            positions = kwargs.get("position_ids")
            if positions is None:
                positions = torch.arange(ids.shape[1], device=ids.device)[None]
            kwargs["position_ids"] = kept.take(positions, dim=positions.ndim - 1)
            kwargs["inputs_embeds"] = hidden
            kwargs["attention_mask"] = kept.valid.long()
            mask = None if mask is None else _take_mask(mask, kept)
        if mask is not None:
            kwargs["attention_mask"] = self._as_decoder_takes(mask, embeds.dtype)

    def _reduce(self, number: int, hidden: Tensor) -> tuple[Kept | None, Tensor]:
        """What is kept at a layer of what is before the decoder (at layer 0: of all), and the hidden states of it."""
        prefill = self._current
        kept = prefill.kept.get(number - 1) if number else None
        base = prefill.layout if prefill.before is None else _layout_of(prefill.layout, prefill.before)
        for reduction in self.reductions:
            if reduction.layer != number or not base.is_image.any():
                continue
            entering = base if kept is None else _layout_of(base, kept)
            probe = PROBES.get(self._decoder.layers[number - 1].self_attn) if reduction.needs_attention else None
            inner = Kept.of(reduction.select(entering, hidden, probe and probe.seen) & entering.valid)
            hidden = inner.take(hidden)
            kept = inner if kept is None else kept.then(inner)
        return kept, hidden

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
        if kwargs.get("position_ids") is None:  # as the plain model counts, which still has all tokens
            kwargs["position_ids"] = torch.arange(past, past + new, device=kept.valid.device)[None] + dropped

    def _before_layer(self, number: int) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
            if self._current:
                return self._prefill_layer(number, args, kwargs)
            if self._decoding and number in self._decoding.kept:
                return args, self._decode_layer(self._decoding.kept[number], args[0], kwargs)
            return None

        return hook

    def _prefill_layer(self, number: int, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        prefill = self._current
        kept, hidden = self._reduce(number, args[0]) if number else (None, args[0])
        if any(reduction.needs_attention and reduction.layer == number + 1 for reduction in self.reductions):
            # What is kept ends with each row's last token; before anything is dropped padding may follow it.
            base = prefill.layout if prefill.before is None else _layout_of(prefill.layout, prefill.before)
            last = base.last if kept is None else torch.full_like(base.last, hidden.shape[1] - 1)
            PROBES[self._decoder.layers[number].self_attn] = Probe(last)
        if kept is None:
            return None
        prefill.kept[number] = kept
        kwargs = dict(kwargs)
        kwargs["position_embeddings"] = tuple(kept.take(x) for x in kwargs["position_embeddings"])
        if kwargs.get("position_ids") is not None:
            kwargs["position_ids"] = kept.take(kwargs["position_ids"])
        mask = kwargs.get("attention_mask")
        if mask is None and not kept.all_valid:
            mask = torch.ones(prefill.length, prefill.length, dtype=torch.bool, device=hidden.device).tril()[None, None]
        kwargs["attention_mask"] = None if mask is None else _take_mask(mask, kept)
        return (hidden, *args[1:]), kwargs

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
            mask = torch.ones(batch, 1, 1, cache.get_seq_length() + 1, dtype=torch.bool, device=hidden.device)
        mask = mask.expand(batch, -1, -1, -1)
        prompt = kept.take(mask[..., :past].flatten(1)).view(batch, 1, 1, -1)
        return {**kwargs, "attention_mask": torch.cat([_hide(prompt, kept.valid[:, None, None]), mask[..., past:]], -1)}

    def _after_decoder(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        prefill, self._current, self._decoding = self._current, None, None
        for layer in self._decoder.layers:
            PROBES.pop(layer.self_attn, None)
        if prefill is None:
            return output
        cache = next((output.get(name) for name in CACHES if output.get(name) is not None), None)
        if cache is not None:
            self._prefills[cache] = prefill
        inner = prefill.kept.get(len(self._decoder.layers) - 1)
        kept = prefill.before if inner is None else inner if prefill.before is None else prefill.before.then(inner)
        if kept is not None:  # zeros where tokens were dropped, so that logits and labels stay aligned
            hidden = output["last_hidden_state"]
            full = hidden.new_zeros(len(hidden), prefill.layout.valid.shape[1], hidden.shape[-1])
            source = torch.where(kept.valid[..., None], hidden, 0)
            output["last_hidden_state"] = full.scatter_add(1, kept.index[..., None].expand_as(source), source)
        return output

    def _as_decoder_takes(self, mask: Tensor, dtype: torch.dtype) -> Tensor:
        """A bool mask as SDPA takes it, or for eager attention what is added to the logits."""
        if self._attention == "sdpa":
            return mask
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


def _hide(mask: Tensor, valid: Tensor) -> Tensor:
    return mask & valid if mask.dtype == torch.bool else mask.masked_fill(~valid, torch.finfo(mask.dtype).min)


def _layout_of(layout: TokenLayout, kept: Kept) -> TokenLayout:
    """The layout of what is kept. The prompt's end is not carried over: only masks need it, which are made before."""
    valid = kept.take(layout.valid) & kept.valid
    return TokenLayout(valid, torch.where(valid, kept.take(layout.image), -1), torch.full_like(layout.prompt_end, -1))


def _take_positions(kept: Kept, positions: Tensor | None, layout: TokenLayout) -> Tensor:
    if positions is None:
        positions = torch.arange(layout.valid.shape[1], device=layout.valid.device)[None]
    return kept.take(positions, dim=positions.ndim - 1)


def _take_mask(mask: Tensor, kept: Kept) -> Tensor:
    """Rows and columns (dimensions 2 and 3) of the kept tokens; what only fills up is seen by nothing but itself."""
    mask = mask.expand(len(kept.index), -1, -1, -1)
    index = kept.index[:, None]
    size = index.shape[-1]
    rows = mask.gather(2, index[..., None].expand(-1, mask.shape[1], size, mask.shape[3]))
    both = rows.gather(3, index[:, :, None].expand(-1, mask.shape[1], size, size))
    return _hide(both, kept.valid[:, None, None])


def accelerate(
    model: nn.Module,
    reduce: str | Reduction | Sequence[str | Reduction] = (),
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
    return Acceleration(model, sorted(reductions, key=lambda one: one.layer), mask, list(prompt_end))
