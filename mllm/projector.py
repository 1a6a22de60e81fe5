"""Projectors: from a tower's map of features to tokens that a language model takes."""

import inspect
import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Projector(nn.Module, ABC):
    """Features (N, channels, H, W) to tokens (N, T, dim)."""

    @abstractmethod
    def tokens(self, grid: tuple[int, int]) -> int:
        """T for features of a grid (H, W)."""


class MLP(Projector):
    """Two linear layers with a GELU between them, for each place of the map (LLaVA-1.5, arXiv:2310.03744).

    Args:
        channels: of the features.
        dim: of the tokens.
    """

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(channels, dim), nn.GELU(), nn.Linear(dim, dim))

    def tokens(self, grid: tuple[int, int]) -> int:
        """One for each place."""
        return grid[0] * grid[1]

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels, H, W) to (N, H W, dim)."""
        return self.layers(x.flatten(2).mT)


class PixelShuffle(Projector):
    """Squares of neighbouring places become one token: space to depth, norm, two linear layers (arXiv:2404.16821).

    Args:
        channels: of the features.
        dim: of the tokens.
        factor: side of the squares.
    """

    def __init__(self, channels: int, dim: int, factor: int = 2) -> None:
        super().__init__()
        if factor < 1:
            raise ValueError(f"PixelShuffle: factor is {factor}, expected at least 1.")
        self.factor = factor
        self.norm = nn.LayerNorm(channels * factor**2)
        self.layers = nn.Sequential(nn.Linear(channels * factor**2, dim), nn.GELU(), nn.Linear(dim, dim))

    def tokens(self, grid: tuple[int, int]) -> int:
        """One for each square.

        Raises:
            ValueError: the grid does not divide into squares.
        """
        if grid[0] % self.factor or grid[1] % self.factor:
            raise ValueError(
                f"PixelShuffle: the tower's grid is {grid[0]} x {grid[1]}, which does not divide by {self.factor}: "
                "take another image_size, stage or factor."
            )
        return grid[0] * grid[1] // self.factor**2

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels, H, W) to (N, H W / factor^2, dim)."""
        return self.layers(self.norm(F.pixel_unshuffle(x, self.factor).flatten(2).mT))


class Resampler(Projector):
    """Learned queries that attend to the map, whatever its size (perceiver resampler, arXiv:2204.14198).

    Each layer is self-attention of the queries, cross-attention to the features with their two-dimensional sine
    positions, and an MLP.

    Args:
        channels: of the features.
        dim: of the tokens; a multiple of 4.
        queries: tokens for each picture.
        depth: layers.
        num_heads: of the attention; None for one for every 64 channels of a token.
    """

    def __init__(
        self, channels: int, dim: int, queries: int = 64, depth: int = 2, num_heads: int | None = None
    ) -> None:
        super().__init__()
        num_heads = num_heads or max(heads for heads in range(1, max(1, dim // 64) + 1) if dim % heads == 0)
        if queries < 1 or depth < 1 or dim % 4 or dim % num_heads:
            raise ValueError(
                f"Resampler: queries is {queries}, depth {depth}, num_heads {num_heads} and dim {dim}, expected at "
                "least one query and layer, and a dim that is a multiple of 4 and of num_heads."
            )
        self.queries = nn.Parameter(torch.randn(queries, dim) * 0.02)
        self.embed = nn.Linear(channels, dim)
        self.norm = nn.LayerNorm(dim)
        # Not nn.TransformerDecoder, whose layers begin as copies of one.
        self.layers = nn.ModuleList(
            nn.TransformerDecoderLayer(
                dim, num_heads, 4 * dim, dropout=0.0, activation=F.gelu, batch_first=True, norm_first=True
            )
            for _ in range(depth)
        )
        self.last_norm = nn.LayerNorm(dim)

    def tokens(self, grid: tuple[int, int]) -> int:
        """The number of queries."""
        return len(self.queries)

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels, H, W) to (N, queries, dim)."""
        features = self.norm(self.embed(x.flatten(2).mT))
        features = features + sine_positions(x.shape[-2], x.shape[-1], features.shape[-1], x.device).to(features)
        tokens = self.queries.expand(len(x), -1, -1)
        for layer in self.layers:
            tokens = layer(tokens, features)
        return self.last_norm(tokens)


def sine_positions(height: int, width: int, dim: int, device: torch.device | None = None) -> Tensor:
    """(H W, dim) float32: sines and cosines of row and column, a quarter of the channels each."""
    frequencies = torch.exp(torch.arange(dim // 4, device=device) * (-math.log(1e4) / (dim // 4)))
    rows, columns = (torch.arange(size, device=device)[:, None] * frequencies for size in (height, width))
    rows, columns = rows[:, None].expand(-1, width, -1), columns.expand(height, -1, -1)
    return torch.cat([rows.sin(), rows.cos(), columns.sin(), columns.cos()], -1).flatten(0, 1)


PROJECTORS: dict[str, type[Projector]] = {"mlp": MLP, "pixel_shuffle": PixelShuffle, "resampler": Resampler}


def make_projector(text: str, channels: int, dim: int) -> Projector:
    """A projector from text such as ``"resampler:queries=64,depth=2"``.

    Args:
        text: "mlp", "pixel_shuffle" or "resampler", and its options.
        channels: of the features.
        dim: of the tokens.

    Raises:
        ValueError: there is no such projector or option, or a value is out of range.
    """
    name, _, options = text.partition(":")
    if name not in PROJECTORS:
        raise ValueError(f"There is no projector {name!r}: expected one of {', '.join(PROJECTORS)}.")
    known = list(inspect.signature(PROJECTORS[name]).parameters)[2:]
    values: dict[str, Any] = {}
    for option in filter(None, options.split(",")):
        key, _, value = option.partition("=")
        if key not in known or not value.isdecimal():
            expected = ", ".join(f"{field}=int" for field in known) or "none"
            raise ValueError(f"{option!r} is no option of the projector {name}: expected {expected}.")
        values[key] = int(value)
    return PROJECTORS[name](channels, dim, **values)
