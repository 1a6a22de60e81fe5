"""Norms and scales folded into the linear layers and convolutions next to them, for inference."""

import torch
from torch import Tensor, nn


def affine(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """What a batch norm does in evaluation: ``scale * x + shift``, each (C,) float64."""
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    return scale, norm.bias.double() - scale * norm.running_mean.double()


@torch.no_grad()
def fold_after(layer: nn.Linear | nn.Conv2d, scale: Tensor, shift: Tensor | float = 0.0) -> None:
    """Make a layer put out ``scale * y + shift`` instead of y; scale and shift are (C_out,)."""
    scale = scale.double()
    weight = layer.weight.double() * scale.view(-1, *[1] * (layer.weight.ndim - 1))
    bias = layer.bias.double() * scale + shift
    layer.weight.copy_(weight)
    layer.bias.copy_(bias)


@torch.no_grad()
def fold_before(layer: nn.Linear, scale: Tensor, shift: Tensor) -> None:
    """Make a layer expect x where it expected ``scale * x + shift``; scale and shift are (C_in,)."""
    weight = layer.weight.double()
    layer.bias.copy_(layer.bias.double() + weight @ shift)
    layer.weight.copy_(weight * scale)
