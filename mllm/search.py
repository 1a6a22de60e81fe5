"""How many visual tokens each layer keeps: schedules, and the two searches of arXiv:2412.00556 for them.

Both searches are told by a function how good a schedule is, such as the accuracy on a handful of samples or
``agreement``, which needs no labels. G-Search finds the cheapest schedule that loses nothing, P-Sigmoid the best one of
a given cost.
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from zoo.mllm.accelerate import accelerate
from zoo.mllm.flops import DecoderShape, prefill_flops
from zoo.mllm.plan_files import write_plan
from zoo.mllm.reduce import FastV, Reduction

FIRST = 2  # the attention of layer 0 ranks visual tokens unlike all later ones


@dataclass(frozen=True)
class Schedule:
    """The share of the visual tokens that each layer sees; it never rises.

    Attributes:
        rates: one for each layer, from 0 (excluded) to 1; those of the first two layers are 1.
    """

    rates: tuple[float, ...]

    def __post_init__(self) -> None:
        falling = all(0 < b <= a <= 1 for a, b in zip(self.rates, self.rates[1:]))
        if not falling or any(rate != 1 for rate in self.rates[:FIRST]):
            raise ValueError(
                f"Schedule: the rates are {self.rates}, expected 1 for the first {FIRST} layers, and then numbers "
                "above 0 that do not rise."
            )

    def reductions(self) -> list[Reduction]:
        """What ``accelerate`` takes: the tokens are ranked by the attention of the last prompt token."""
        steps = enumerate(zip(self.rates, self.rates[1:]), start=1)
        return [FastV(keep=after / before, layer=layer) for layer, (before, after) in steps if after < before]

    def flops(self, shape: DecoderShape, text: int, visual: int) -> float:
        """FLOPs of a prefill of so many text and visual tokens."""
        return prefill_flops(shape, [text + visual * rate for rate in self.rates])

    def save(self, path: str | os.PathLike) -> None:
        """Write it as JSON."""
        write_plan(path, {"rates": self.rates})

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Schedule":
        """Read what ``save`` wrote.

        Raises:
            ValueError: the file is no schedule.
        """
        try:
            return cls(tuple(map(float, json.loads(Path(path).read_text(encoding="utf-8"))["rates"])))
        except (KeyError, TypeError, json.JSONDecodeError):
            raise ValueError(f'{path} is no schedule: expected JSON such as {{"rates": [1, 1, 0.5]}}.') from None


def g_search(quality: Callable[[Schedule], float], layers: int, tolerance: float = 0.0, steps: int = 4) -> Schedule:
    """The smallest rates that keep the quality, found from the first layer to the last (G-Search).

    Each layer takes the smallest rate with which, if all later layers had the same, quality falls by no more than
    ``tolerance``; a bisection finds it, as if quality rose with the rate.

    Args:
        quality: of a schedule; higher is better.
        layers: of the decoder.
        tolerance: what may be lost of the quality of the schedule that keeps all.
        steps: of the bisection; rates are multiples of ``2 ** -steps``.
    """
    rates = [1.0] * layers
    floor = quality(Schedule(tuple(rates))) - tolerance
    for layer in range(FIRST, layers):
        low, high = 0, round(rates[layer - 1] * 2**steps)  # in units of 2 ** -steps; high is known to be good enough
        while high - low > 1:
            middle = (low + high) // 2
            tried = (*rates[:layer], *[middle / 2**steps] * (layers - layer))
            if quality(Schedule(tried)) >= floor:
                high = middle
            else:
                low = middle
        rates[layer:] = [high / 2**steps] * (layers - layer)
    return Schedule(tuple(rates))


def sigmoid_schedule(
    shape: DecoderShape, text: int, visual: int, budget: float, slope: float, middle: float, least: float = 0.01
) -> Schedule:
    """The schedule ``clip(c sigmoid(-slope (layer - middle)), least, 1)`` that costs ``budget`` of keeping all tokens.

    The paper does not print its parametrisation; this is a reconstruction. The scale c is found by bisection.

    Args:
        shape: of the decoder.
        text: tokens of text.
        visual: visual tokens.
        budget: share of the FLOPs of the plain prefill, more than 0 and at most 1.
        slope: of the sigmoid, for each layer; more than 0.
        middle: the layer where it has fallen to half.
        least: rate that no layer falls below.

    Raises:
        ValueError: even the least rates cost more.
    """

    def with_scale(scale: float) -> Schedule:
        falling = (scale / (1 + math.exp(slope * (layer - middle))) for layer in range(FIRST, shape.layers))
        return Schedule((1.0,) * FIRST + tuple(min(1.0, max(least, rate)) for rate in falling))

    wanted = budget * prefill_flops(shape, text + visual)
    low, high = 0.0, 1.0 + math.exp(slope * max(shape.layers - middle, 0.0))
    cheapest = with_scale(low).flops(shape, text, visual)
    if cheapest > wanted:
        share = cheapest / prefill_flops(shape, text + visual)
        raise ValueError(f"The budget is {budget}, but the smallest rates already cost {share:.3f}: give more.")
    for _ in range(60):
        scale = (low + high) / 2
        low, high = (scale, high) if with_scale(scale).flops(shape, text, visual) <= wanted else (low, scale)
    return with_scale(low)


def p_sigmoid(
    quality: Callable[[Schedule], float],
    shape: DecoderShape,
    text: int,
    visual: int,
    budget: float,
    trials: int = 24,
    seed: int = 0,
) -> Schedule:
    """The best of many sigmoid schedules of the same cost (P-Sigmoid); slope and middle are drawn at random.

    Args:
        quality: of a schedule; higher is better.
        shape: of the decoder.
        text: tokens of text in a typical prompt.
        visual: visual tokens in it.
        budget: share of the FLOPs of the plain prefill.
        trials: how many schedules are tried.
        seed: of the draw.
    """
    generator = torch.Generator().manual_seed(seed)
    draws = torch.rand(trials, 2, generator=generator, dtype=torch.float64).tolist()
    tried = [
        sigmoid_schedule(shape, text, visual, budget, 0.05 * 40**slope, middle * shape.layers)
        for slope, middle in draws
    ]
    return max(tried, key=quality)


def agreement(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> Callable[[Schedule], float]:
    """A quality that needs no labels: minus the divergence of the next token's distribution from the plain model's.

    Args:
        model: as of ``accelerate``.
        batches: keyword arguments of the model, padded on the left.

    Returns:
        A function that gives minus the mean KL divergence, in nats, of a schedule.
    """
    batches = list(batches)

    def next_token(batch: Mapping[str, Any]) -> torch.Tensor:
        with torch.no_grad():
            return model(**batch).logits[:, -1].float().log_softmax(-1)

    plain = [next_token(batch) for batch in batches]

    def quality(schedule: Schedule) -> float:
        with accelerate(model, schedule.reductions()):
            losses = [
                F.kl_div(next_token(batch), want, log_target=True, reduction="batchmean")
                for batch, want in zip(batches, plain)
            ]
        return -float(torch.stack(losses).mean())

    return quality
