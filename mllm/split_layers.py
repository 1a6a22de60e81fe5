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
    rows, bias = Part(columns, 0), Part(columns, 0)

    def visual(x: Tensor) -> Tensor:
        return F.linear(x, rows.of(linear.weight), None if linear.bias is None else bias.of(linear.bias))

    return _apart(linear, split, visual, columns)


def split_out(linear: nn.Linear, columns: Tensor, split: Callable[[], Split | None]) -> Forward:
    """Let a linear layer read some of its inputs only, for visual tokens, whose others are zero.

    Args:
        linear: with the inputs of all heads.
        columns: int64, the inputs that visual tokens have.
        split: as of ``split_in``.
    """
    part = Part(columns, 1)

    def visual(x: Tensor) -> Tensor:
        return F.linear(x.index_select(1, columns.to(x.device)), part.of(linear.weight), linear.bias)

    return _apart(linear, split, visual)


def split_mlp(mlp: nn.Module, neurons: int, split: Callable[[], Split | None]) -> Forward:
    """Let a gated MLP use its first neurons only, for visual tokens.

    Args:
        mlp: with ``gate_proj``, ``up_proj``, ``down_proj`` and ``act_fn``.
        neurons: that visual tokens use.
        split: as of ``split_in``.
    """
    gate, up, down = mlp.gate_proj, mlp.up_proj, mlp.down_proj

    def first(linear: nn.Linear, x: Tensor) -> Tensor:
        return F.linear(x, linear.weight[:neurons], None if linear.bias is None else linear.bias[:neurons])

    def visual(x: Tensor) -> Tensor:
        return F.linear(mlp.act_fn(first(gate, x)) * first(up, x), down.weight[:, :neurons], down.bias)

    return _apart(mlp, split, visual)


def _apart(
    module: nn.Module,
    split: Callable[[], Split | None],
    visual: Callable[[Tensor], Tensor],
    columns: Tensor | None = None,
) -> Forward:
    """Let a module compute text as it does, and visual tokens by another function; padding becomes zeros.

    Args:
        module: (B, L, C) to (B, L, D).
        split: as of ``split_in``.
        visual: (N, C) to (N, D), or to as many outputs as there are columns.
        columns: int64, which outputs these are, the others being zero; None for all.
    """
    whole = module.forward

    def forward(x: Tensor) -> Tensor:
        now = split()
        if now is None:
            return whole(x)
        flat = x.flatten(0, 1)
        text = whole(flat[now.text_rows])
        out = text.new_zeros(len(flat), text.shape[-1])
        out[now.text_rows] = text
        places = now.visual_rows if columns is None else (now.visual_rows[:, None], columns.to(x.device))
        out[places] = visual(flat[now.visual_rows])
        return out.unflatten(0, x.shape[:2])

    return Forward(module, forward)
