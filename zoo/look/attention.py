"""The row of attention that one token of a linear attention layer has, without a matrix of all tokens by all tokens.

Every operator here is linear in the values and weighs all their channels alike: ``o_i = sum_n A_in v_n``. So row i of A
is the gradient of o_i in values of one channel, and the operator's own backward pass gives it in O(N d): with RALA's
token weights, the rotation, and any normalisation.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from zoo.backbones.inline import InjectiveAttention
from zoo.backbones.lightnet import AdditiveAttention
from zoo.backbones.ravlt import RankAugmentedAttention, RotarySoftmaxAttention
from zoo.backbones.slab import SimplifiedAttention, WindowedSimplifiedAttention
from zoo.backbones.van import LargeKernelAttention
from zoo.backbones.vig import GatedLinearMixer
from zoo.kernels import gated_linear_attention
from zoo.look.place import token_at

MIXERS = (
    RankAugmentedAttention,
    SimplifiedAttention,
    InjectiveAttention,
    AdditiveAttention,
    GatedLinearMixer,
    LargeKernelAttention,
)
OTHERS = (RotarySoftmaxAttention, WindowedSimplifiedAttention)  # not linear, or not over the whole map


@dataclass(frozen=True)
class Attention:
    """What a token attends to: the weights that the values of all tokens have in its result.

    Attributes:
        rows: by direction (of gated attention "in order" and "in reverse", else only "") weights (heads, H, W).
        prefix: sum of the weights (heads,) of tokens that are no part of the map, such as a class token.
    """

    rows: dict[str, Tensor]
    prefix: Tensor

    @property
    def whole(self) -> Tensor:
        """(heads, H, W), the sum of the directions."""
        return torch.stack(list(self.rows.values())).sum(0)


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of a model that can be looked into, by name, in the order in which they run.

    They are those with linear attention over the whole map, and VAN's with large kernel attention.
    """
    found = {name: module for name, module in model.named_modules() if isinstance(module, MIXERS)}
    return {name: module for name, module in found.items() if not isinstance(module, OTHERS)}


def attention_from(
    model: nn.Module, layer: nn.Module, pixels: Tensor, point: tuple[int, int], size: tuple[int, int]
) -> Attention:
    """What the token at a point attends to in a layer, before the layer's local term, gate and projection.

    Args:
        model: in evaluation mode.
        layer: of ``layers_of(model)``, with linear attention.
        pixels: what the model is given, (1, 3, H, W), for the whole picture.
        point: column and row of a pixel of the picture.
        size: width and height of the picture in pixels.

    Raises:
        ValueError: the point is outside the picture.
    """
    inputs: list[tuple] = []
    with torch.no_grad():
        with layer.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments)):
            model(pixels)
        with _Calls() as calls:
            layer(*inputs[0])
    x, *others = inputs[0]
    height, width = others if x.ndim == 3 else x.shape[1:3]  # tokens (B, N, C) come with the size of their map
    row, column = token_at(point, size, (height, width))
    op, arguments = calls.seen[0]
    prefix = arguments[0].shape[1] - height * width
    rows = ROWS[op](prefix + row * width + column, *arguments)
    return Attention(
        {name: weights[:, prefix:].unflatten(1, (height, width)) for name, weights in rows.items()},
        sum(weights[:, :prefix].sum(1) for weights in rows.values()),
    )


def linear_rows(token: int, q: Tensor, k: Tensor, v: Tensor, local: Any, gate: Any, *form: Any) -> dict[str, Tensor]:
    """The row (heads, N) of a token from the arguments of ``zoo::linear_attention``."""
    return {"": _row(lambda values: torch.ops.zoo.linear_attention(q, k, values, None, None, *form)[0], v, token)}


def gated_rows(
    token: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    log_decay_reverse: Tensor,
    scale: float | None = None,
) -> dict[str, Tensor]:
    """The row of each direction from the arguments of ``zoo::bidirectional_gated_linear_attention``."""
    q_, k_, decay_ = (x.flip(1) for x in (q, k, log_decay_reverse))
    ahead = _row(lambda values: gated_linear_attention(q, k, values, log_decay, scale=scale)[0], v, token)
    last = v.shape[1] - 1
    back = _row(lambda values: gated_linear_attention(q_, k_, values, decay_, scale=scale)[0], v, last - token)
    return {"in order": ahead, "in reverse": back.flip(1)}


ROWS: dict[Any, Callable[..., dict[str, Tensor]]] = {
    torch.ops.zoo.linear_attention.default: linear_rows,
    torch.ops.zoo.bidirectional_gated_linear_attention.default: gated_rows,
}


class _Calls(TorchDispatchMode):
    """Keeps the operators of ``ROWS`` that run, with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Any, tuple]] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if op in ROWS:
            self.seen.append((op, args))
        return op(*args, **(kwargs or {}))


def _row(attend: Callable[[Tensor], Tensor], v: Tensor, token: int) -> Tensor:
    """(heads, N): the gradient of a token's result in values of one channel, every head's in its own."""
    values = v.new_zeros((*v.shape[:3], 1)).requires_grad_()
    with torch.enable_grad():
        result = attend(values)[0, token].sum()
    return torch.autograd.grad(result, values)[0][0, :, :, 0].T
