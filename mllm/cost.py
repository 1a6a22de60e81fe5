"""What a prompt costs with some methods, before anything is run."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from zoo.mllm.base import Method, Step
from zoo.mllm.flops import DecoderShape, kv_bytes, prefill_flops
from zoo.mllm.mod import MoD
from zoo.mllm.reduce import in_order, parse_reductions
from zoo.mllm.zipvl import ZipVL


@dataclass(frozen=True)
class Cost:
    """Of one prompt.

    Attributes:
        visual_tokens: that each layer processes.
        flops: of the layers, and of choosing the tokens.
        kv_bytes: of the keys and values that it leaves in the cache.
    """

    visual_tokens: tuple[float, ...]
    flops: float
    kv_bytes: float


def plan_cost(
    config: Any,
    text: int,
    visual: int,
    reduce: str | Method | Sequence[str | Method] = (),
    depth: MoD | None = None,
    bits: int = 16,
) -> Cost:
    """What a prompt costs with the methods of ``accelerate``.

    Where a method looks at the prompt to tell how much it keeps, this is the most that it can cost: ZipVL is counted as
    if all tokens were important, SparseVLM's adaptive rule as if all words of the text were of their own mind.

    Args:
        config: of a model of transformers; or a ``DecoderShape``.
        text: tokens of text.
        visual: visual tokens that the model makes of the pictures.
        reduce: as of ``accelerate``.
        depth: as of ``accelerate``; with select="topk".
        bits: of a number in the cache.

    Raises:
        ValueError: an option is not supported, or a method cannot tell before it has seen the picture.
    """
    shape = config if isinstance(config, DecoderShape) else DecoderShape.from_config(config)
    methods = parse_reductions(reduce)
    routing = depth.routing(shape.layers) if depth else set()
    if depth and depth.select != "topk":
        raise ValueError("MoD with a threshold skips what the picture tells: give select='topk' to count before.")
    steps, entered = [step for step, _ in in_order(methods, shape.layers)], float(visual)
    left, seen = entered, []
    for layer in range(shape.layers):
        for step in steps:
            if step.layer == layer:
                left = step.visual_tokens(left, entered, text)
        entered = left if layer == 0 else entered
        seen.append(left - math.floor(left * depth.ratio + 1e-9) if layer in routing else left)
    tokens = [text + one for one in seen]
    stored = kv_bytes(shape, tokens, bits / 8)
    for method in methods:
        if isinstance(method, ZipVL):
            stored *= method.kv_share(1.0, bits, shape.head_dim)
    return Cost(tuple(seen), flops_with(methods, shape, text, tokens), stored)


def flops_with(methods: Sequence[Method], shape: DecoderShape, text: float, tokens: Sequence[float]) -> float:
    """FLOPs of the layers, given the tokens that each of them sees, so many of text among them, and of choosing."""
    steps = [step for step, _ in in_order(methods, shape.layers)]
    parts = [*steps, *(method for method in methods if not isinstance(method, Step))]
    return prefill_flops(shape, tokens) + sum(part.overhead(shape, text, tokens) for part in parts)
