"""Make a Hugging Face multimodal model cheaper or better grounded, without a fork: hooks that can be taken off."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from zoo.mllm import masks
from zoo.mllm.attention import Probe, Watch, register, watch
from zoo.mllm.base import Method, Scene, Step, cache_in
from zoo.mllm.families import ACCELERATED, check_family, image_tokens, warn_of_version
from zoo.mllm.kept import Kept, hide, layout_of, mask_of, take_mask
from zoo.mllm.layout import TokenLayout
from zoo.mllm.mod import MoD
from zoo.mllm.plots import draw_kept
from zoo.mllm.prefill import Cut, Prefill, Stopwatch
from zoo.mllm.reduce import in_order, parse_reductions

GATE = "zoo_gate"  # argument of a layer that it hands on to its attention
PREFILL = "zoo_prefill"  # argument of the layers; and attribute of a cache, so that copies of it can be decoded with


class Acceleration:
    """What ``accelerate`` did to a model; a context manager that undoes it at its end.

    Attributes:
        last: the decisions of the last prefill.
    """

    def __init__(
        self, model: nn.Module, methods: Sequence[Method], depth: MoD | None, mask: str, prompt_end: Sequence[int]
    ) -> None:
        self.model, self.depth, self.mask, self.prompt_end = model, depth, mask, prompt_end
        self.last: Prefill | None = None
        self._decoder = model.get_decoder()
        self._tokens = image_tokens(model.config)
        self._inputs: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)
        self._stopwatch: Stopwatch | None = None
        self._current: Prefill | None = None
        self._decoding: Prefill | None = None
        self._length = 0  # of the sequence so far, while it is decoded
        self._attention = self._decoder.config._attn_implementation
        self._flash = self._attention.startswith("flash_attention")  # which is left as it is, and takes flat masks
        self._probes: dict[tuple[int, Step], tuple[Probe, Watch]] = {}
        self._gates: dict[int, Tensor] = {}
        self._whole: dict[int, Tensor] = {}  # hidden states of layers that skip tokens, while they run
        self._inner: dict[int, Kept] = {}
        # Of a method, what its own hooks leave for it.
        self._methods: list[tuple[Method, dict[Any, Any]]] = [(method, {}) for method in methods]
        self._steps = in_order(methods, len(self._decoder.layers))
        self._check()
        self._routing = routing = depth.attach(self._decoder) if depth else set()
        self._check_together()
        towers = self._towers() if any(method.needs_tower for method in methods) else []
        register()
        setattr(self._decoder, ACCELERATED, True)
        self._handles = [
            _Undo(partial(delattr, self._decoder, ACCELERATED)),
            *(_attend(part) for part in (*towers, *(() if self._flash else (self._decoder,)))),
            model.base_model.register_forward_pre_hook(self._see_inputs, with_kwargs=True),
            model.base_model.register_forward_hook(self._see_end),
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
        try:
            for method, memory in self._methods:
                self._handles += method.attach(model, memory)
        except ValueError:  # the model is not for this method
            self.remove()
            raise

    def remove(self) -> None:
        """Take everything off: the outputs are those of the plain model again, bit by bit. May be called twice.

        A cache that was filled before is of no use to the plain model.
        """
        self._forget_probes()  # of a pass that an error ended
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def report(self) -> dict[str, Any]:
        """What the last prefill, and the decoding after it, kept and took.

        Returns:
            ``visual_tokens``, those that came in, and ``visual_tokens_per_layer``, those that each layer processed,
            summed over the batch; ``kv_bytes``, of the cache after the prefill (None without one);
            ``prefill_seconds``, and for each later pass ``decode_seconds``, of the whole model but its head;
            ``peak_bytes`` on a GPU, what PyTorch has taken of it at most; and what the methods add.

        Raises:
            RuntimeError: the model has not run yet.
        """
        if self.last is None:
            raise RuntimeError("There is nothing to report: run the model first.")
        last = self.last
        report = {
            "visual_tokens": int(last.layout.is_image.sum()),
            "visual_tokens_per_layer": [
                int(last.layout_in(number).is_image.sum()) for number in range(len(self._decoder.layers))
            ],
            "kv_bytes": last.kv_bytes,
            "prefill_seconds": last.prefill.seconds,
            "decode_seconds": [one.seconds for one in last.decoding],
            **last.extras,
        }
        device = last.layout.valid.device
        return {**report, "peak_bytes": torch.cuda.max_memory_allocated(device)} if device.type == "cuda" else report

    def plot(self, path: str | os.PathLike, pictures: Sequence[Any] = (), row: int = 0) -> None:
        """Draw as a PNG how many visual tokens each layer processed in the last prefill, and where they are.

        Args:
            path: of the file.
            pictures: the images of one row, as a processor takes them; each is shown with the tokens that are left in
                some layers. Empty for the numbers alone.
            row: of the batch.

        Raises:
            RuntimeError: the model has not run yet.
            ImportError: matplotlib is not installed.
            ValueError: the row has another number of images.
        """
        if self.last is None:
            raise RuntimeError("There is nothing to plot: run the model first.")
        draw_kept(path, self.last.places(row, len(self._decoder.layers)), self.last.layout.image[row], pictures)

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
        for step, _ in self._steps:
            if step.layer >= layers:
                raise ValueError(f"{_name(step)}: layer is {step.layer}, but the decoder has {layers} layers.")
        if not self._tokens:
            raise ValueError("The model's config names no image token: set image_token_id in it.")
        if hasattr(self._decoder, ACCELERATED):
            raise ValueError("The model is accelerated already: call remove() of what accelerate() returned, first.")
        if not self._flash and self._attention not in ("sdpa", "eager"):
            raise ValueError(
                f"The model uses the attention {self._attention!r}, expected SDPA, eager or FlashAttention: load it "
                "with attn_implementation='sdpa'."
            )
        if len(devices := {parameter.device for parameter in self._decoder.parameters()}) > 1:
            raise ValueError(
                f"The decoder is spread over {', '.join(sorted(map(str, devices)))}: load it on one device."
            )
        if self.mask not in masks.RULES:
            raise ValueError(f"mask is {self.mask!r}, expected one of {', '.join(masks.RULES)}.")
        if self.mask.startswith("mma") and not self.prompt_end:
            raise ValueError(f"The mask {self.mask} needs prompt_end: the ids of the assistant marker.")

    def _check_together(self) -> None:
        methods = [method for method, _ in self._methods]
        if self._flash:
            looking = [method for method in methods if method.needs_attention]
            looking += [method for method, _ in self._overriding("before_layer")]
            needs = f"The mask {self.mask}" if self.mask != "causal" else _name(looking[0]) if looking else ""
            if needs:
                raise ValueError(
                    f"{needs} needs an attention that takes custom masks and shows its scores, but the model uses "
                    f"{self._attention!r}: load it with attn_implementation='sdpa'."
                )
        towers = [_name(method) for method in methods if method.needs_tower]
        if len(towers) > 1:
            raise ValueError(f"{towers[0]} and {towers[1]} both work on the vision tower: take one of them.")
        for method in methods:
            if self.mask != "causal" and method.needs_causal:
                raise ValueError(f"{_name(method)} and mask={self.mask!r} both say what is seen: take one of them.")
        changing = [_name(method) for method, _ in self._overriding("before_layer")]
        if len(set(changing)) < len(changing):
            raise ValueError(f"There are two methods {max(changing, key=changing.count)}: give one that does all.")
        if self.depth and self.depth.positions == "compact" and self.model.config.model_type.startswith("qwen"):
            raise ValueError("MoD: positions of Qwen's models have several axes: take positions='keep'.")
        if self._routing and changing:
            raise ValueError(f"{changing[0]} and MoD both change what a layer computes: take one of them.")
        for step, _ in self._steps:
            if not step.needs_attention:
                continue
            needs = f"{_name(step)} at layer {step.layer} needs the attention of layer {step.layer - 1}, in which"
            if step.layer - 1 in self._routing:
                raise ValueError(f"{needs} MoD skips tokens: take another layer.")
            for other in methods:
                if not other.plain_attention(step.layer - 1):
                    raise ValueError(f"{needs} {_name(other)} changes it: take another layer.")

    def _overriding(self, hook: str) -> list[tuple[Method, dict[Any, Any]]]:
        """The methods that have a hook of their own, with their memory."""
        return [one for one in self._methods if getattr(type(one[0]), hook) is not getattr(Method, hook)]

    def _towers(self) -> list[nn.Module]:
        """What is beside the decoder and attends, and can be watched."""
        towers = [
            module
            for module in self.model.base_model.children()
            if hasattr(module, "set_attn_implementation") and self._decoder not in set(module.modules())
        ]
        for attention in (tower.config._attn_implementation for tower in towers):
            if attention not in ("sdpa", "eager"):
                raise ValueError(
                    f"The vision tower uses the attention {attention!r}, which shows no scores: load the model with "
                    "attn_implementation='sdpa', or {'vision_config': 'sdpa', ...}."
                )
        return towers

    def _see_inputs(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        ids = args[0] if args else kwargs.get("input_ids")
        self._inputs = (ids, kwargs.get("attention_mask"), kwargs.get("position_ids"))
        self._stopwatch = Stopwatch(next(self._decoder.parameters()).device)

    def _see_end(self, module: nn.Module, args: tuple, output: Any) -> None:
        self._stopwatch.stop()

    def _before_decoder(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        kwargs = dict(kwargs)
        cache = cache_in(kwargs)
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
                self._length = past + kwargs["inputs_embeds"].shape[1]
                self._decoding.decoding.append(self._stopwatch)
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
        self._check_training()
        layout = TokenLayout.from_ids(ids, self._tokens, padding, self.prompt_end)
        prefill = self._current = self.last = kwargs[PREFILL] = Prefill(layout, length=ids.shape[1])
        prefill.prefill = self._stopwatch
        mask = None if self.mask == "causal" else masks.RULES[self.mask](layout)[:, None]
        kept, kwargs["inputs_embeds"] = self._cut(0, prefill, embeds, None)
        if kept is not None:
            prefill.before, prefill.length = kept, kept.index.shape[1]
            positions = kwargs.get("position_ids")
            if positions is None:
                positions = torch.arange(ids.shape[1], device=ids.device)[None]
            kwargs["position_ids"] = kept.take(positions, dim=positions.ndim - 1)
            kwargs["attention_mask"] = kept.valid.long()
            mask = None if mask is None else take_mask(mask, kept)
        if mask is not None:
            kwargs["attention_mask"] = self._as_decoder_takes(mask, embeds.dtype)

        for number, (method, _) in enumerate(self._methods):
            if method.needs_attention:
                prefill.asked[number] = method.queries(prefill.entering, kwargs["inputs_embeds"])

    def _check_training(self) -> None:
        if not (self._decoder.training and torch.is_grad_enabled()):
            return
        for method, _ in self._methods:
            if method.inference_only:
                raise ValueError(f"{_name(method)} is for inference only: train without it, or call model.eval().")
            if method.ranks_by_prompt and not self.prompt_end:
                raise ValueError(
                    f"{_name(method)} ranks by the last token of the prompt, which in training is not the last of the "
                    "row: give prompt_end, the ids of the assistant marker."
                )

    def _cut(
        self, number: int, prefill: Prefill, hidden: Tensor, rotary: tuple[Tensor, Tensor] | None
    ) -> tuple[Kept | None, Tensor]:
        """What the steps before a layer keep of what it is handed, None for all, and what they make of it."""
        if number not in prefill.cuts:
            prefill.cuts[number] = self._decide(number, prefill, hidden, rotary)
        kept = None
        for cut in prefill.cuts[number]:
            hidden = cut.of(hidden)
            kept = cut.kept if kept is None else kept.then(cut.kept)
        return kept, hidden

    @torch.no_grad()
    def _decide(self, number: int, prefill: Prefill, hidden: Tensor, rotary: tuple[Tensor, Tensor] | None) -> list[Cut]:
        here = [one for one in self._steps if one[0].layer == number]
        if not here:
            return []
        layout = prefill.layout_at(number - 1)
        if not layout.is_image.any():
            return []
        entered = prefill.entering.is_image.sum(1)
        layer, cuts, kept = self._decoder.layers[number] if number else None, [], None
        for step, method in here:
            probe = self._probes.get((method, step))
            attention = None if probe is None else probe[0].seen
            if kept is not None and attention is not None:
                attention = kept.take(attention.mT).mT
            memory = self._methods[method][1]
            choice = step.select(Scene(layout, hidden, attention, entered, layer, rotary, memory))
            if choice is None:
                continue
            last = torch.arange(layout.valid.shape[1], device=hidden.device) == layout.last[:, None]
            cut = Cut.by(choice, (choice.keep | last) & layout.valid)  # the answer starts from the last token
            cuts.append(cut)
            layout, hidden = layout_of(layout, cut.kept), cut.of(hidden)
            rotary = None if rotary is None else tuple(cut.kept.take(x) for x in rotary)
            kept = cut.kept if kept is None else kept.then(cut.kept)
        return cuts

    @property
    def _changes(self) -> bool:
        """Whether anything differs from the plain model."""
        return bool(self._methods or self.depth or self.mask != "causal")

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
            elif self._decoding:
                kwargs = self._decode_layer(number, self._decoding, args[0], kwargs)
            if number in self._routing:
                return self._route(number, prefill, module, args, kwargs)
            if prefill and (takers := self._overriding("before_layer")):
                layout = prefill.layout_in(number)
                for method, memory in takers:
                    kwargs = method.before_layer(number, layout, kwargs, memory)
            return args, kwargs

        return hook

    def _prefill_layer(self, number: int, prefill: Prefill, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        before, hidden = prefill.kept.get(number - 1), args[0]
        if number:
            rotary = kwargs["position_embeddings"]
            if before is not None:
                rotary = tuple(before.take(x) for x in rotary)
            step, hidden = self._cut(number, prefill, hidden, rotary)
            kept = step if before is None else before if step is None else before.then(step)
            if kept is not None and number not in prefill.kept:
                prefill.kept[number] = prefill.cached[number] = kept
        self._probe(number, prefill)
        kept = prefill.kept.get(number)
        if self._flash and (kept is not None or prefill.before is not None):
            kwargs["position_ids"] = None  # rotary embeddings are there already, and gaps would be read as packing
        return (hidden, *args[1:]), kwargs if kept is None else _part(kwargs, kept, prefill.length, self._flash)

    def _probe(self, number: int, prefill: Prefill) -> None:
        """Have a layer tell what the steps before the next one want to see."""
        kept, module = prefill.kept.get(number), self._decoder.layers[number].self_attn
        for step, method in self._steps:
            if step.needs_attention and step.layer == number + 1 and (method, step) not in self._probes:
                asked = prefill.asked[method]
                asked = asked if kept is None else kept.take(asked) & kept.valid
                probe = Probe(Kept.of(asked))
                self._probes[method, step] = probe, watch(module, probe)

    def _route(
        self, number: int, prefill: Prefill | None, layer: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict]:
        """Leave the tokens that are not selected out of a layer."""
        hidden, router = args[0], self.depth.router
        logits = router(layer.input_layernorm(hidden).to(router.weight.dtype))
        gate = logits.softmax(-1)[..., 1:].to(hidden.dtype)
        self._whole.pop(number, None)
        compact = self.depth.positions == "compact"
        if prefill is None:
            if compact and self._decoding:
                prompt = self._decoding.stored(number, None)[1].valid.sum(1, keepdim=True)
                kwargs = self._numbered(kwargs, hidden, prompt + self._length - self._decoding.length - 1)
            return args, {**kwargs, GATE: gate}
        layout = prefill.layout_at(number)
        if number not in prefill.routed:
            prefill.routed[number] = (logits, self.depth.route(logits, layout))
        keep = prefill.routed[number][1]
        if compact:
            kwargs = self._numbered(kwargs, hidden, ((keep & layout.valid).cumsum(1) - 1).clamp(min=0))
        if not (layout.is_image & ~keep).any():
            return args, {**kwargs, GATE: gate}
        inner, given = Kept.of(keep & layout.valid), prefill.kept.get(number)
        prefill.cached[number] = inner if given is None else given.then(inner)
        self._whole[number], self._inner[number] = hidden, inner
        kwargs = _part(kwargs, inner, hidden.shape[1], self._flash)
        return (inner.take(hidden), *args[1:]), {**kwargs, GATE: inner.take(gate)}

    def _numbered(self, kwargs: dict[str, Any], hidden: Tensor, positions: Tensor) -> dict[str, Any]:
        """The arguments of a layer, with its tokens at other positions (B, L)."""
        return {**kwargs, "position_embeddings": self._decoder.rotary_emb(hidden, position_ids=positions)}

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

    def _decode_layer(self, number: int, prefill: Prefill, hidden: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        kept, layout = prefill.stored(number, getattr(cache_in(kwargs).layers[number], "kept", None))
        if kept is not None:
            kwargs = self._part_of_mask(kept, hidden, kwargs)
        for method, memory in self._overriding("before_decoding"):
            kwargs = method.before_decoding(number, layout, kwargs, memory)
        return kwargs

    def _part_of_mask(self, kept: Kept, hidden: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a layer whose cache has only a part of the prompt."""
        if hidden.shape[1] != 1:
            raise ValueError(
                "A prompt was reduced inside the decoder, and then several tokens came at once: feed them one by one, "
                "or give the whole prompt in one call."
            )
        mask = kwargs.get("attention_mask")
        if mask is None and kept.all_valid:
            return kwargs
        past, batch = self._decoding.length, len(kept.valid)
        if self._flash:
            mask = torch.ones(batch, self._length, dtype=torch.bool, device=hidden.device) if mask is None else mask
            return {**kwargs, "attention_mask": torch.cat([kept.take(mask[:, :past]) & kept.valid, mask[:, past:]], 1)}
        if mask is None:
            mask = torch.ones(batch, 1, 1, self._length, dtype=torch.bool, device=hidden.device)
        mask = mask.expand(batch, -1, -1, -1)
        prompt = kept.take(mask[..., :past].flatten(1)).view(batch, 1, 1, -1)
        return {**kwargs, "attention_mask": torch.cat([hide(prompt, kept.valid[:, None, None]), mask[..., past:]], -1)}

    def _after_decoder(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        prefill, self._current, self._decoding = self._current, None, None
        self._inputs = (None, None, None)
        self._forget_probes()
        for method, memory in self._methods:
            if prefill:
                prefill.extras |= method.report(memory)
            memory.clear()
        if prefill is None:
            return output
        cache = cache_in(output)
        if cache is not None:
            from zoo.mllm.mixed_cache import cache_bytes

            setattr(cache, PREFILL, prefill)
            if self._changes:
                cache.crop = _refuse_crop
            prefill.kv_bytes = cache_bytes(cache)
        inner = prefill.kept.get(len(self._decoder.layers) - 1)
        kept = prefill.before if inner is None else inner if prefill.before is None else prefill.before.then(inner)
        if kept is not None:  # zeros where tokens were dropped, so that logits and labels stay aligned
            hidden = output["last_hidden_state"]
            zeros = hidden.new_zeros(*prefill.layout.valid.shape, hidden.shape[-1])
            output["last_hidden_state"] = kept.put(hidden, zeros)
        return output

    def _forget_probes(self) -> None:
        for _, watched in self._probes.values():
            watched.remove()
        self._probes.clear()

    def _as_decoder_takes(self, mask: Tensor, dtype: torch.dtype) -> Tensor:
        """A bool mask as SDPA takes it, or for eager attention what is added to the logits."""
        if self._attention == "sdpa":
            return mask
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


@dataclass
class _Undo:
    """Like the handle of a hook."""

    remove: Callable[[], None]


def _attend(module: nn.Module) -> _Undo:
    """Let a model attend in a way that can be watched and replaced."""
    attention = module.config._attn_implementation
    module.set_attn_implementation(f"zoo_{attention}")
    return _Undo(partial(module.set_attn_implementation, attention))


def _refuse_crop(tokens: int) -> None:
    """What candidates of an answer came with would have been taken for the prompt's end."""
    raise ValueError(
        "The cache of an accelerated model cannot be cut back: generate without an assistant model and without "
        "prompt_lookup_num_tokens."
    )


def _name(method: Method) -> str:
    return type(method).__name__


def _part(kwargs: dict[str, Any], kept: Kept, length: int, flat: bool) -> dict[str, Any]:
    """The arguments of a layer for a part of its `length` tokens; flat as of ``mask_of``."""
    kwargs = {**kwargs, "position_embeddings": tuple(kept.take(x) for x in kwargs["position_embeddings"])}
    if kwargs.get("position_ids") is not None:
        kwargs["position_ids"] = None if flat else kept.take(kwargs["position_ids"])
    kwargs["attention_mask"] = mask_of(kwargs.get("attention_mask"), kept, length, flat)
    return kwargs


def accelerate(
    model: nn.Module,
    reduce: str | Method | Sequence[str | Method] = (),
    depth: MoD | None = None,
    mask: str = "causal",
    prompt_end: Sequence[int] = (),
) -> Acceleration:
    """Reduce the visual tokens of a model, or let them see the question, until ``remove()``.

    Nothing of the model is copied or renamed; its ``state_dict`` stays. Dropped tokens leave the tensors, so that time
    and the key-value cache shrink. With everything kept the outputs are those of the plain model, bit by bit.

    Args:
        model: LLaVA, LLaVA-NeXT, Qwen2-VL, Qwen2.5-VL, InternVL, SmolVLM or Idefics3 of transformers, or a
            ``VisionLanguageModel``, with SDPA or eager attention; with FlashAttention if nothing needs the scores of
            the attention or another mask.
        reduce: a method or several, as an object or as text: ``"fastv:layer=2,keep=0.5"``; see ``zoo.mllm.reduce``.
        depth: layers that process part of the visual tokens only; its router is trained with the model.
        mask: "causal", "mma", "mma_mutual", "framewise" or "composite"; see ``zoo.mllm.masks``.
        prompt_end: ids of the assistant marker, with which a prompt ends. The masks "mma" and "mma_mutual" need it, and
            in training the methods that rank by the last token of the prompt.

    Returns:
        A handle, also a context manager, with ``remove()`` and ``report()``.

    Raises:
        ValueError: the model's family, its attention or an option is not supported.
    """
    check_family(model)
    warn_of_version()
    return Acceleration(model, parse_reductions(reduce), depth, mask, list(prompt_end))
