"""YOPO: less computation for visual tokens, of which none is lost (arXiv:2410.06169)."""

import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from zoo.mllm.attention import as_bool, replace
from zoo.mllm.base import Choice, Method, Scene, Step, check_layer
from zoo.mllm.families import image_tokens
from zoo.mllm.grids import Images
from zoo.mllm.layout import TokenLayout
from zoo.mllm.plan_files import write_plan
from zoo.mllm.split_attention import Heads, Split, attend, split_attention
from zoo.mllm.split_layers import split_in, split_mlp, split_out
from zoo.mllm.visual_heads import visual_ratios

if TYPE_CHECKING:
    from zoo.mllm.flops import DecoderShape

SPLIT, IMAGE_KEYS, IMAGES = "zoo_split", "zoo_image_keys", "zoo_images"  # arguments that layers hand on


@dataclass(frozen=True)
class LayerDrop(Step):
    """From one layer on there are no visual tokens.

    Attributes:
        layer: the first without.
    """

    layer: int

    def __post_init__(self) -> None:
        check_layer(self, self.layer, 1)

    def select(self, scene: Scene) -> Choice:
        """All that is no image."""
        return Choice(~scene.layout.is_image)

    def visual_tokens(self, visual: float, entered: float, text: float) -> float:
        """None."""
        return 0


@dataclass(frozen=True)
class YOPO(Method):
    """A plan of what the decoder computes for visual tokens; text is computed in full.

    In pruned heads visual tokens ask nothing and text gets nothing from them. Later layers do without visual tokens
    altogether. The smaller MLP changes what a model says: it is for training with it.

    In the authors' code all this is masking of a full computation; here what is left out is not computed. There, layers
    without visual tokens may also lose what text would attend to in them: that needs the tokens and is not offered.

    Attributes:
        layer: the first without visual tokens; 0 for none.
        window: visual tokens see so many rows and columns of their picture around them, in both directions; an odd
            number, or 0 for all that is before them, as in the plain model. Pictures are squares, or in Qwen's models
            what their positions tell.
        ffn_ratio: visual tokens use the first ``1 / ffn_ratio`` of an MLP's neurons.
        pruned: of each layer, the heads that visual tokens do without; layers that are missing prune none.
        renorm: in pruned heads text attends to text alone; False: what it attends to visual tokens is lost, as in the
            authors' code, and visual tokens have all keys.
        plan: a file that ``save`` wrote; it tells all else.
    """

    layer: int = 0
    window: int = 0
    ffn_ratio: int = 1
    pruned: tuple[tuple[int, ...], ...] = field(default=(), metadata={"text": False})
    renorm: bool = False
    plan: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if self.plan:
            for name, value in vars(self.load(self.plan)).items():
                object.__setattr__(self, name, self.plan if name == "plan" else value)
        check_layer(self, self.layer, 0)
        if self.window and (self.window < 0 or self.window % 2 == 0):
            raise ValueError(f"YOPO: window is {self.window}, expected an odd number, or 0 for none.")
        if self.ffn_ratio < 1:
            raise ValueError(f"YOPO: ffn_ratio is {self.ffn_ratio}, expected 1 or more.")

    @property
    def needs_causal(self) -> bool:
        """Whether it sets what visual tokens see."""
        return bool(self.window)

    @property
    def is_identity(self) -> bool:
        """Whether it leaves nothing out."""
        return not (self.layer or self.window or self.ffn_ratio > 1 or any(self.pruned))

    def steps(self, layers: int) -> Sequence[Step]:
        """The drop of all visual tokens."""
        return [LayerDrop(self.layer)] if self.layer else []

    def plain_attention(self, layer: int) -> bool:
        """Not where heads are pruned."""
        return not self._pruned(layer)

    def save(self, path: str | os.PathLike) -> None:
        """Write it as JSON."""
        write_plan(path, {name: value for name, value in vars(self).items() if name != "plan"})

    @classmethod
    def load(cls, path: str | os.PathLike) -> "YOPO":
        """Read what ``save`` wrote.

        Raises:
            ValueError: the file is no plan.
        """
        try:
            plan = json.loads(Path(path).read_text(encoding="utf-8"))
            pruned = tuple(tuple(map(int, heads)) for heads in plan.pop("pruned"))
            return cls(**plan, pruned=pruned)
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError):
            raise ValueError(f'{path} is no plan of YOPO: expected JSON such as {{"pruned": [[], [3]]}}.') from None

    def calibrate(
        self,
        model: nn.Module,
        samples: Iterable[Mapping[str, Any]],
        threshold: float,
        votes: float = 0.4,
        first: int = 2,
    ) -> "YOPO":
        """The same plan with the heads pruned in which visual tokens matter little.

        For each sample and head, the ratio of what all queries attend to visual tokens and what they attend to text. A
        head is kept if in more than ``votes`` of the samples it is above the threshold.

        Args:
            model: as of ``accelerate``, not accelerated.
            samples: keyword arguments of the model; each row with an image is one sample. 100 are published.
            threshold: of the ratio. For LLaVA-1.5-13B, 0.035, 0.077 and 0.2 keep 30, 20 and 10 of 40 heads on average.
            votes: share of the samples.
            first: layers that prune none.

        Raises:
            ValueError: no sample has an image.
        """
        ratios = torch.cat([visual_ratios(model, sample) for sample in samples] or [torch.empty(0)])
        if not len(ratios):
            raise ValueError("YOPO: no sample has an image, and the heads are chosen by what is attended to in images.")
        kept = (ratios > threshold).float().mean(0) > votes
        kept[:first] = True
        return dataclasses.replace(
            self, plan="", pruned=tuple(tuple((~heads).nonzero()[:, 0].tolist()) for heads in kept)
        )

    def overhead(self, shape: "DecoderShape", text: float, tokens: Sequence[float]) -> float:
        """Minus the FLOPs that are saved in layers that have visual tokens, beside ``prefill_flops``.

        Windows count as the pairs that they allow, as in the paper; columns that are masked come on top.
        """
        return -sum(self._saved(shape, number, text, seen - text) for number, seen in enumerate(tokens) if seen > text)

    def _saved(self, shape: "DecoderShape", number: int, text: float, visual: float) -> float:
        heads, dim = shape.num_heads, shape.dim
        q, kv = heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        pruned = self._pruned(number)
        kept_kv = {head // (heads // shape.num_kv_heads) for head in range(heads) if head not in pruned}
        p, p_kv = 1 - len(pruned) / heads, len(kept_kv) / shape.num_kv_heads
        seen = min(self.window**2, visual) if self.window else visual
        projections = 2 * visual * dim * (2 * q * (1 - p) + (1 + self.renorm) * kv * (1 - p_kv))
        attention = 4 * visual * q * (text + visual - p * (text + seen))
        return projections + attention + 6 * visual * dim * shape.mlp_dim * (1 - 1 / self.ffn_ratio)

    def _pruned(self, number: int) -> tuple[int, ...]:
        return self.pruned[number] if number < len(self.pruned) else ()

    def _acts(self, number: int) -> bool:
        """Whether a layer that has visual tokens is not computed in full."""
        within = not self.layer or number < self.layer
        return within and bool(self.window or self.ffn_ratio > 1 or self._pruned(number))

    def before_layer(
        self, number: int, layout: TokenLayout, kwargs: dict[str, Any], memory: dict[Any, Any]
    ) -> dict[str, Any]:
        """Tell the layer which tokens are visual."""
        images = kwargs.get(IMAGES)
        kwargs = {name: value for name, value in kwargs.items() if name != IMAGES}
        if not self._acts(number):
            return kwargs
        if memory.get("layout") is not layout:
            memory["layout"] = layout
            memory[SPLIT] = None
            if layout.is_image.any():
                memory[SPLIT] = Split.of(layout, images.grids(layout) if self.window else ())
        return kwargs if memory[SPLIT] is None else {**kwargs, SPLIT: memory[SPLIT]}

    def before_decoding(
        self, number: int, layout: TokenLayout, kwargs: dict[str, Any], memory: dict[Any, Any]
    ) -> dict[str, Any]:
        """Tell the layer which keys of its cache are visual tokens'."""
        return {**kwargs, IMAGE_KEYS: layout.is_image} if self._pruned(number) and self._acts(number) else kwargs

    def attach(self, model: nn.Module, memory: dict[Any, Any]) -> list[Any]:
        """Put the hooks on the layers that are not computed in full."""
        decoder = model.get_decoder()
        self._check(model, decoder)
        tokens = torch.tensor(image_tokens(model.config))
        is_image: list[Tensor] = []

        def see_ids(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            ids = args[0] if args else kwargs["input_ids"]
            is_image[:] = [torch.isin(ids, tokens.to(ids.device))]

        def hand_on(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
            return args, {**kwargs, IMAGES: Images.of(is_image[0], kwargs.get("position_ids"))}

        handles: list[Any] = []
        if self.window:
            handles.append(model.base_model.register_forward_pre_hook(see_ids, with_kwargs=True))
            handles.append(decoder.register_forward_pre_hook(hand_on, with_kwargs=True))
        for number, layer in enumerate(decoder.layers):
            if self._acts(number):
                handles += self._attach_layer(number, layer, decoder.config)
        return handles

    def _attach_layer(self, number: int, layer: nn.Module, config: Any) -> list[Any]:
        count, attention, now = config.num_attention_heads, layer.self_attn, [None]
        kept = torch.tensor([head for head in range(count) if head not in self._pruned(number)], dtype=torch.long)
        heads = Heads.of(kept, count, config.num_key_value_heads, self.renorm)
        heads_on: Callable[[torch.device], Heads] = _by_device(heads)
        radius = self.window // 2 if self.window else -1

        def receive(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
            kwargs = dict(kwargs)
            now[0], image = kwargs.pop(SPLIT, None), kwargs.pop(IMAGE_KEYS, None)
            if now[0] is not None and (self.window or self._pruned(number)):
                kwargs = replace(kwargs, partial(_prefill, now[0], heads_on, radius), "YOPO")
            elif image is not None:
                kwargs = replace(kwargs, partial(_decode, image, heads_on), "YOPO")
            return args, kwargs

        def current() -> Split | None:
            return now[0]

        handles: list[Any] = [attention.register_forward_pre_hook(receive, with_kwargs=True)]
        if self._pruned(number):
            outputs, kv_outputs = (_channels(index, attention.head_dim) for index in (heads.kept, heads.kept_kv))
            handles += [split_in(attention.q_proj, outputs, current), split_in(attention.v_proj, kv_outputs, current)]
            handles += [split_in(attention.k_proj, kv_outputs, current)] if self.renorm else []
            handles += [split_out(attention.o_proj, outputs, current)]
        if self.ffn_ratio > 1:
            handles += [split_mlp(layer.mlp, layer.mlp.down_proj.in_features // self.ffn_ratio, current)]
        return handles

    def _check(self, model: nn.Module, decoder: nn.Module) -> None:
        count, layers = decoder.config.num_attention_heads, len(decoder.layers)
        if len(self.pruned) > layers or any(not 0 <= head < count for heads in self.pruned for head in heads):
            raise ValueError(
                f"YOPO: the plan prunes heads in {len(self.pruned)} layers, up to head "
                f"{max(map(max, filter(None, self.pruned)), default=-1)}, but the decoder has {layers} layers of "
                f"{count} heads: calibrate the plan with this model."
            )
        if self.window and model.config.model_type == "llava_next":
            raise ValueError(
                "YOPO: an image of LLaVA-NeXT is several pictures with separators, which are no grid: take window=0."
            )
        for number, layer in enumerate(decoder.layers):
            if not self._acts(number):
                continue
            used = [(layer.self_attn, f"{name}_proj") for name in "qkvo" if self._pruned(number)]
            used += [(layer.mlp, f"{name}_proj") for name in ("gate", "up", "down") if self.ffn_ratio > 1]
            for parent, name in used:
                if type(getattr(parent, name, None)) is not nn.Linear:
                    raise ValueError(
                        f"YOPO takes parts of the weights of nn.Linear, but {name} of layer {number} is "
                        f"{type(getattr(parent, name, None)).__name__}: merge adapters first, and do not quantise."
                    )


def _prefill(
    split: Split,
    heads_on: Callable[[torch.device], Heads],
    radius: int,
    forward: Callable,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    scaling: float,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Stands for a layer's attention in the prefill."""
    return split_attention(query, key, value, mask, split, heads_on(query.device), radius, scaling), None


def _decode(
    image: Tensor,
    heads_on: Callable[[torch.device], Heads],
    forward: Callable,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    scaling: float,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Stands for a layer's attention when new tokens come, one by one."""
    new = key.shape[2] - image.shape[1]
    image = torch.cat([image, image.new_zeros(len(image), new)], 1)[:, None, None]
    if mask is None:
        allowed = torch.ones_like(image).expand(-1, -1, query.shape[2], -1).tril(key.shape[2] - query.shape[2])
    else:
        allowed = as_bool(mask)
    return attend(query, key, value, allowed, scaling, image, heads_on(query.device)), None


def _by_device(heads: Heads) -> Callable[[torch.device], Heads]:
    """The heads on a device, where they are brought once."""
    there: dict[torch.device, Heads] = {}

    def on(device: torch.device) -> Heads:
        if device not in there:
            there[device] = Heads(
                **{name: x.to(device) if isinstance(x, Tensor) else x for name, x in vars(heads).items()}
            )
        return there[device]

    return on


def _channels(heads: Tensor, head_dim: int) -> Tensor:
    """The outputs of a projection that belong to heads."""
    return (heads[:, None] * head_dim + torch.arange(head_dim)).flatten()
