"""Linear layers and MLPs that compute less for visual tokens than for text, with the weights that are there."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.mllm.split_attention import Split


class Forward:
    """Stands for the ``forward`` of a module until ``remove()``."""

    def __init__(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        self._module, self._before = module, module.__dict__.get("forward")
        module.forward = forward

    def remove(self) -> None:
        """Put back what was there."""
        if self._before is None:
            del self._module.forward
        else:
            self._module.forward = self._before


class Part:
    """Rows or columns of a weight, copied once unless gradients are wanted or the weight changes."""

    def __init__(self, index: Tensor, dim: int) -> None:
        self._index, self._dim = index, dim
        self._of: tuple[Any, ...] = ()
        self._copy: Tensor | None = None

    def of(self, weight: Tensor) -> Tensor:
        """The part of a weight, always the same one."""
        if torch.is_grad_enabled() and weight.requires_grad:
            return weight.index_select(self._dim, self._index.to(weight.device))
        of = (weight.data_ptr(), weight.dtype, None if weight.is_inference() else weight._version)
        if of != self._of:
            self._of, self._copy = of, weight.detach().index_select(self._dim, self._index.to(weight.device))
        return self._copy


def split_in(linear: nn.Linear, columns: Tensor, split: Callable[[], Split | None]) -> Forward:
    """Let a linear layer compute some of its outputs only, for visual tokens; the others are zero.

    Args:
        linear: with the outputs of all heads.
        columns: int64, the outputs that visual tokens get.
        split: of the batch that is being computed; None for the layer as it is.
    """
    whole, rows, bias = linear.forward, Part(columns, 0), Part(columns, 0)

    def forward(x: Tensor) -> Tensor:
        now = split()
        if now is None:
            return whole(x)
        flat = x.flatten(0, 1)
        text = whole(flat[now.text_rows])
        out = text.new_zeros(len(flat), linear.out_features)
        out[now.text_rows] = text
        part = F.linear(
            flat[now.visual_rows], rows.of(linear.weight), None if linear.bias is None else bias.of(linear.bias)
        )
        out[now.visual_rows[:, None], columns.to(x.device)] = part
        return out.unflatten(0, x.shape[:2])

    return Forward(linear, forward)


def split_out(linear: nn.Linear, columns: Tensor, split: Callable[[], Split | None]) -> Forward:
    """Let a linear layer read some of its inputs only, for visual tokens, whose others are zero.

    Args:
        linear: with the inputs of all heads.
        columns: int64, the inputs that visual tokens have.
        split: as of ``split_in``.
    """
    whole, part = linear.forward, Part(columns, 1)

    def forward(x: Tensor) -> Tensor:
        now = split()
        if now is None:
            return whole(x)
        flat = x.flatten(0, 1)
        text = whole(flat[now.text_rows])
        out = text.new_zeros(len(flat), linear.out_features)
        out[now.text_rows] = text
        seen = flat[now.visual_rows].index_select(1, columns.to(x.device))
        out[now.visual_rows] = F.linear(seen, part.of(linear.weight), linear.bias)
        return out.unflatten(0, x.shape[:2])

    return Forward(linear, forward)


def split_mlp(mlp: nn.Module, neurons: int, split: Callable[[], Split | None]) -> Forward:
    """Let a gated MLP use its first neurons only, for visual tokens.

    Args:
        mlp: with ``gate_proj``, ``up_proj``, ``down_proj`` and ``act_fn``.
        neurons: that visual tokens use.
        split: as of ``split_in``.
    """
    whole, gate, up, down = mlp.forward, mlp.gate_proj, mlp.up_proj, mlp.down_proj

    def first(linear: nn.Linear, x: Tensor) -> Tensor:
        return F.linear(x, linear.weight[:neurons], None if linear.bias is None else linear.bias[:neurons])

    def forward(x: Tensor) -> Tensor:
        now = split()
        if now is None:
            return whole(x)
        flat = x.flatten(0, 1)
        text = whole(flat[now.text_rows])
        out = text.new_zeros(len(flat), down.out_features)
        out[now.text_rows] = text
        visual = flat[now.visual_rows]
        inner = mlp.act_fn(first(gate, visual)) * first(up, visual)
        out[now.visual_rows] = F.linear(inner, down.weight[:, :neurons], down.bias)
        return out.unflatten(0, x.shape[:2])

    return Forward(mlp, forward)
