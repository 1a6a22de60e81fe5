"""gamma-MoD, mixture of depths for multimodal models (arXiv:2410.13859): layers that process part of the image only."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.mllm.layout import TokenLayout


class MoD(nn.Module):
    """The router that all chosen layers share, and what is routed.

    A layer gives each token the probability ``p = softmax(router(input_layernorm(hidden)))[1]``. Visual tokens that are
    not selected pass the layer unchanged; text is always selected. A selected token's MLP output is multiplied by its
    p, the only way from the loss of the language model to the router.

    A freshly made router is no identity, even at ratio 0: it halves the MLP's output. ``gate=False`` leaves it out.

    Args:
        ratio: share of a row's visual tokens that is skipped, at least 0 and less than 1; rounded down.
        layers: which layers route; None for all but the first three and the last, as published. Never layer 0, whose
            cache tells the length of what came before.
        select: "topk" skips the ratio with the lowest p (training); "threshold" all with p up to ``threshold``.
        threshold: of p. The published checkpoints take 0.005.
        gate: multiply the MLP's output by p.
        aux_weight: of ``loss``.
        positions: "keep" for those of the prompt; "compact" numbers the tokens of each layer that routes from 0 on, as
            the published checkpoints were trained.
    """

    def __init__(
        self,
        ratio: float = 0.34,
        layers: Sequence[int] | None = None,
        select: Literal["topk", "threshold"] = "topk",
        threshold: float = 0.5,
        gate: bool = True,
        aux_weight: float = 0.01,
        positions: Literal["keep", "compact"] = "keep",
    ) -> None:
        super().__init__()
        if not 0 <= ratio < 1:
            raise ValueError(f"MoD: ratio is {ratio}, expected at least 0 and less than 1.")
        if select not in ("topk", "threshold"):
            raise ValueError(f"MoD: select is {select!r}, expected 'topk' or 'threshold'.")
        if positions not in ("keep", "compact"):
            raise ValueError(f"MoD: positions is {positions!r}, expected 'keep' or 'compact'.")
        if layers is not None and 0 in layers:
            raise ValueError("MoD: layer 0 cannot route, because its cache tells the length of what came before.")
        self.ratio, self.layers, self.select, self.threshold = ratio, layers, select, threshold
        self.gate, self.aux_weight, self.positions = gate, aux_weight, positions
        self.router: nn.Linear | None = None  # its width is the model's

    def attach(self, decoder: nn.Module) -> set[int]:
        """Make the router for a decoder, unless there is one, and say which of its layers route."""
        layers, dim = self.routing(len(decoder.layers)), decoder.config.hidden_size
        parameter = next(decoder.parameters())
        if self.router is None:
            self.router = nn.Linear(dim, 2, bias=False, device=parameter.device, dtype=parameter.dtype)
        if self.router.in_features != dim:
            raise ValueError(f"MoD: the router is {self.router.in_features} wide, but the decoder's width is {dim}.")
        return layers

    def routing(self, count: int) -> set[int]:
        """Which of so many layers route.

        Raises:
            ValueError: there are no such layers, or none is left.
        """
        layers = set(range(3, count - 1) if self.layers is None else self.layers)
        if not all(0 < layer < count for layer in layers):
            raise ValueError(f"MoD: layers are {sorted(layers)}, but the decoder has layers 1 to {count - 1} to route.")
        if not layers:
            raise ValueError(f"MoD: no layer of a decoder with {count} layers is left to route: give layers.")
        return layers

    def route(self, logits: Tensor, layout: TokenLayout) -> Tensor:
        """(B, L) bool: which tokens a layer processes, given the router's logits (B, L, 2)."""
        score = logits.detach().float().softmax(-1)[..., 1]
        if self.select == "threshold":
            return ~layout.is_image | (score > self.threshold)
        skipped = [[math.floor(visual * self.ratio + 1e-9)] for visual in layout.is_image.sum(1).tolist()]
        rank = score.masked_fill(~layout.is_image, torch.inf).argsort(dim=1, stable=True).argsort(dim=1)
        return rank >= torch.tensor(skipped, device=rank.device)

    def loss(self, routed: Mapping[int, tuple[Tensor, Tensor]]) -> Tensor:
        """What teaches the router its own selection, so that a threshold can replace the top-k.

        ``aux_weight`` times the sum over layers of the mean cross entropy between the logits and the selection.

        Args:
            routed: for each layer its logits (B, L, 2) and selection (B, L), as in ``Acceleration.last.routed``.
        """
        losses = [
            F.cross_entropy(logits.flatten(0, 1).float(), kept.flatten().long()) for logits, kept in routed.values()
        ]
        return self.aux_weight * torch.stack(losses).sum()


def arank(model: nn.Module, batches: Iterable[Mapping[str, Any]], tolerance: float | None = None) -> list[float]:
    """How many different things the tokens of each layer attend to: low ranks mark the layers to route.

    The rank of the attention matrix below its diagonal, mean over heads, samples and batches, divided by the number of
    tokens less one. Published for the whole prompt; needs eager attention.

    Args:
        model: of transformers, loaded with ``attn_implementation="eager"``.
        batches: keyword arguments of the model; rows may be padded.
        tolerance: singular values up to this count as zero; None for ``torch.linalg.matrix_rank``'s own.

    Returns:
        A number from 0 to 1 for each layer.
    """
    totals: list[float] = []
    rows = 0
    with torch.no_grad():
        for batch in batches:
            attentions = model(**batch, output_attentions=True, use_cache=False).attentions
            if not attentions or attentions[0] is None:
                raise ValueError("arank needs the attention matrices: load the model with attn_implementation='eager'.")
            mask = batch.get("attention_mask")
            valid = torch.ones_like(attentions[0][:, 0, 0]) if mask is None else mask
            totals = totals or [0.0] * len(attentions)
            for row, inside in enumerate(valid.bool()):
                rows += 1
                for layer, attention in enumerate(attentions):
                    below = attention[row][:, inside][:, :, inside].float().tril(-1)
                    rank = torch.linalg.matrix_rank(below, atol=tolerance).float().mean()
                    totals[layer] += float(rank) / (int(inside.sum()) - 1)
    if not rows:
        raise ValueError("arank got no batches: give some prompts with images.")
    return [total / rows for total in totals]
