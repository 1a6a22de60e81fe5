"""The arguments of the operator that are no tensors, and what its forward pass leaves for the backward pass."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

ALIGNMENT = 16  # numbers


@dataclass(frozen=True)
class Settings:
    """As in ``linear_attention``; height 0 is no rotation."""

    feature_map: str
    token_weights: bool
    height: int
    width: int
    rotary_base: float
    eps: float
    normalisation: str = "division"
    scale: float = 1.0
    rotary_across_heads: bool = False

    def saved(self, dim: int, value_dim: int) -> dict[str, tuple[int, int]]:
        """Names and shapes of what the forward pass saves for a head: O(D E) numbers, whatever the tokens.

        "key" is the mean of the weighted keys, or the logarithm of the sum of their exponentials. "cosine" is the state
        of keys that are multiplied by the cosines of their rotations only.
        """
        shapes = {"state": (dim, value_dim), "key": (1, dim)}
        if self.token_weights:
            shapes |= {"query": (1, dim), "top": (1, 1), "total": (1, 1)}  # the softmax's maximum and sum
        if self.normalisation == "subtraction":
            shapes |= {"value": (1, value_dim)}
        if self.normalisation == "keys" and self.height:
            shapes |= {"cosine": (dim, value_dim)}
        return shapes

    def saved_size(self, dim: int, value_dim: int) -> int:
        """Numbers that are saved for a head, with some at the end that keep the next head aligned."""
        used = sum(map(math.prod, self.saved(dim, value_dim).values()))
        return -(-used // ALIGNMENT) * ALIGNMENT


def pack(fields: Mapping[str, Tensor], settings: Settings) -> Tensor:
    """The fields (B, H, rows, columns) as one tensor (B, H, size)."""
    dim, value_dim = fields["state"].shape[2:]
    flat = torch.cat([fields[name].flatten(2) for name in settings.saved(dim, value_dim)], dim=2)
    return F.pad(flat, (0, settings.saved_size(dim, value_dim) - flat.shape[2]))


def unpack(saved: Tensor, settings: Settings, dim: int, value_dim: int) -> dict[str, Tensor]:
    """The fields (B, H, rows, columns) of one tensor (B, H, size)."""
    shapes = settings.saved(dim, value_dim)
    used = sum(map(math.prod, shapes.values()))
    parts = saved[..., :used].split([math.prod(shape) for shape in shapes.values()], dim=2)
    return {name: part.unflatten(2, shapes[name]) for name, part in zip(shapes, parts, strict=True)}
