"""The body of Swin: four stages, between which two by two tokens are merged; softmax in shifted windows.

Liu et al.: Swin Transformer, ICCV 2021, arXiv:2103.14030.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from timm.layers import Mlp, calculate_drop_path_rates, register_notrace_module
from torch import Tensor, nn

from zoo.backbones.bodies.block import Block, ConvEmbed, grid_of, init_linear
from zoo.backbones.layers.prepbn import merge_into_readers, norm_layer
from zoo.backbones.model import Backbone, Stage

SMALL = {"depths": (2, 2, 18, 2)}
BASE = {**SMALL, "dim": 128, "num_heads": (4, 8, 16, 32)}


@register_notrace_module  # the number of windows decides on the shift
class WindowAttention(nn.Module):
    """Softmax attention with relative positions in windows, which may be shifted by half: (B, H, W, C) to the same.

    Queries, keys and values of maps that are no multiple of the window are padded with zeros, which take part. A map
    that is not larger than the window is not shifted. In detectors the map itself is padded, and always shifted.

    Args:
        dim: C.
        num_heads: heads.
        window_size: tokens of a window, along each side.
        shifted: shift the windows.
        dense: as in detectors.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int,
        shifted: bool,
        dense: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.window_size = window_size
        self.dense = dense
        self.shift = window_size // 2 if shifted else 0
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * window_size - 1) ** 2, num_heads, **dd))
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the table anew; the linear layers reset themselves."""
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def readers(self) -> list[nn.Module]:
        """The layers that read the input and nothing else."""
        return [] if self.dense else [self.qkv]

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same."""
        B, H, W, C = x.shape
        side, heads = self.window_size, self.num_heads
        rows, columns = (H + side - 1) // side, (W + side - 1) // side
        more = (0, 0, 0, columns * side - W, 0, rows * side - H)
        qkv = self.qkv(F.pad(x, more)) if self.dense else F.pad(self.qkv(x), more)
        bias = self.bias().unsqueeze(0)  # (1, heads, L, L) with the L tokens of a window
        batch, groups = B * rows * columns, heads
        down, right = 0, 0
        if self.shift:
            down, right = self.shift, self.shift
            if not self.dense:  # 0 for a single window
                down, right = self.shift * (1 - 1 // rows), self.shift * (1 - 1 // columns)
            qkv = qkv.roll((-down, -right), (1, 2))
            bias = bias + self.mask(rows, columns, down, right, bias)  # (windows, heads, L, L)
            bias = bias.flatten(0, 1).unsqueeze(0)
            batch, groups = B, rows * columns * heads  # one bias for all pictures
        windows = qkv.view(B, rows, side, columns, side, 3, heads, self.head_dim).permute(5, 0, 1, 3, 6, 2, 4, 7)
        q, k, v = windows.reshape(3, batch, groups, side * side, self.head_dim).unbind(0)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))
        out = out.view(B, rows, columns, heads, side, side, self.head_dim).permute(0, 1, 4, 2, 5, 3, 6)
        out = out.reshape(B, rows * side, columns * side, C)
        if self.shift:
            out = out.roll((down, right), (1, 2))
        # Copies, not slices: a dynamic graph would ask whether a slice is all of the map.
        out = out.index_select(1, torch.arange(H, device=x.device)).index_select(2, torch.arange(W, device=x.device))
        return self.proj(out)

    def bias(self) -> Tensor:
        """(heads, L, L): what is added to the scores, by the distance of query and key."""
        side = self.window_size
        place = torch.arange(side, device=self.relative_position_bias_table.device)
        distance = place[:, None] - place[None, :] + side - 1
        index = distance[:, None, :, None] * (2 * side - 1) + distance[None, :, None, :]  # rows, columns; of query, key
        bias = self.relative_position_bias_table[index.reshape(-1)]
        return bias.view(side * side, side * side, self.num_heads).permute(2, 0, 1)

    def mask(self, rows: int, columns: int, down: int, right: int, like: Tensor) -> Tensor:
        """(windows, 1, L, L): -100 between tokens that only the shift has brought together."""
        side = self.window_size
        place = torch.arange(rows * side, device=like.device)
        row = (place >= rows * side - side).int() + (place >= rows * side - down).int()
        place = torch.arange(columns * side, device=like.device)
        column = (place >= columns * side - side).int() + (place >= columns * side - right).int()
        region = (3 * row[:, None] + column[None, :]).view(rows, side, columns, side)
        region = region.transpose(1, 2).reshape(rows * columns, 1, side * side)
        return -100.0 * (region.unsqueeze(2) != region.unsqueeze(3)).to(like.dtype)


class PatchMerging(nn.Module):
    """Two by two tokens as one, norm, linear: (B, H, W, C) to (B, ceil(H / 2), ceil(W / 2), 2C)."""

    def __init__(
        self,
        dim: int,
        norm: Callable[..., nn.Module],
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.norm = norm(4 * dim, device=device, dtype=dtype)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to (B, H', W', 2C)."""
        padded = F.pad(x, (0, 0, 0, 1, 0, 1))
        left, right = padded[:, :, :-1:2], padded[:, :, 1::2]
        x = torch.cat((left[:, :-1:2], left[:, 1::2], right[:, :-1:2], right[:, 1::2]), -1)
        return self.reduction(self.norm(x))

    @torch.jit.ignore
    def fuse(self) -> "PatchMerging":
        """Merge a RepBN into the linear layer, for ``timm.utils.reparameterize_model``."""
        if merge_into_readers(self.norm, self.reduction):
            self.norm = nn.Identity()
        return self


class Swin(Backbone):
    """Swin with another token mixer.

    Args:
        img_size: size of the pictures that tables of positions of mixers are made for, in pixels.
        in_chans: channels of the pictures.
        num_classes: outputs; 0 for pooled features.
        global_pool: pooling before the classifier.
        dim: channels of the first stage; each has twice those of the one before.
        depths: blocks of the stages.
        num_heads: attention heads of the stages.
        window_size: tokens of a window of softmax attention, along each side.
        mlp_ratio: hidden channels of the feed-forward layers over channels.
        attention: for each stage a key of ``mixers`` or "softmax", or one for each of its blocks.
        norm: "layernorm", "repbn" or "prepbn".
        dense: mixers as in the authors' detectors, where those differ.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth, from 0 at the first block to this at the last.
    """

    # Each is called with (dim, num_heads, grid, device=, dtype=).
    mixers: ClassVar[Mapping[str, Callable[..., nn.Module]]] = {}
    # The same with whether the block has an odd number after the grid.
    dense_mixers: ClassVar[Mapping[str, Callable[..., nn.Module]]] = {}

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int = 7,
        mlp_ratio: float = 4.0,
        attention: Sequence[str | Sequence[str]] = ("softmax", "softmax", "softmax", "softmax"),
        norm: str = "layernorm",
        dense: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        norms = norm_layer(norm, 1e-5)
        rates = calculate_drop_path_rates(drop_path_rate, depths, stagewise=True)
        stages = []
        for i, stage_rates in enumerate(rates):
            width, grid = dim << i, grid_of(img_size, 4 << i)
            kinds = (attention[i],) * len(stage_rates) if isinstance(attention[i], str) else attention[i]
            blocks = []
            for j, (kind, rate) in enumerate(zip(kinds, stage_rates, strict=True)):
                if kind == "softmax":
                    mixer = WindowAttention(width, num_heads[i], window_size, bool(j % 2), dense, **dd)
                elif dense and kind in self.dense_mixers:
                    mixer = self.dense_mixers[kind](width, num_heads[i], grid, bool(j % 2), **dd)
                else:
                    mixer = self.mixers[kind](width, num_heads[i], grid, **dd)
                blocks.append(Block(width, mixer, Mlp(width, int(width * mlp_ratio), **dd), norms, rate, **dd))
            stages.append(Stage(width, blocks, PatchMerging(width // 2, norms, **dd) if i else None))
        features = dim << (len(depths) - 1)
        stem = ConvEmbed(in_chans, dim, 4, 4, 0, norms, **dd)
        final = norms(features, **dd)
        super().__init__(stem, stages, final, features, in_chans, num_classes, global_pool, drop_rate, **dd)

    init_module = staticmethod(init_linear)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """The tables of relative positions."""
        return {name for name, _ in self.named_parameters() if name.endswith("relative_position_bias_table")}
