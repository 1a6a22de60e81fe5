"""The body of CSwin: overlapping convolutions between stages; softmax in horizontal and vertical stripes.

Dong et al.: CSWin Transformer, CVPR 2022, arXiv:2107.00652.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from timm.layers import Mlp, calculate_drop_path_rates
from torch import Tensor, nn

from zoo.backbones.bodies.block import Block, ConvEmbed, grid_of, init_linear
from zoo.backbones.layers.conv import DepthwiseConv2d
from zoo.backbones.layers.prepbn import norm_layer
from zoo.backbones.model import Backbone, Stage


class StripeAttention(nn.Module):
    """Softmax attention in stripes, with a depthwise convolution of the values: (B, H, W, C) to the same.

    The first half of the heads has stripes of all rows, the second of all columns. Queries, keys and values of maps
    that are no multiple of the stripes are padded with zeros, which take part.

    Args:
        dim: C.
        num_heads: heads.
        stripe: width of a stripe, in tokens.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        stripe: int,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.head_dim = dim // num_heads
        self.stripe = stripe
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.lepe_vertical = DepthwiseConv2d(dim // 2, 3, **dd)
        self.lepe_horizontal = DepthwiseConv2d(dim // 2, 3, **dd)
        self.proj = nn.Linear(dim, dim, **dd)

    def readers(self) -> list[nn.Module]:
        """The layers that read the input."""
        return [self.qkv]

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same."""
        B, H, W, C = x.shape
        vertical, horizontal = self.qkv(x).view(B, H, W, 3, 2, C // 2).unbind(4)
        # A horizontal stripe is a vertical one of the map with rows and columns exchanged, before and after.
        vertical = self.stripes(vertical, True)
        horizontal = self.stripes(horizontal.transpose(1, 2), False).transpose(1, 2)
        return self.proj(torch.cat((vertical, horizontal), -1))

    def stripes(self, qkv: Tensor, vertical: bool) -> Tensor:
        """(B, H, W, 3, C / 2) to (B, H, W, C / 2): attention in stripes of all rows and some columns."""
        B, H, W, C = qkv.shape[0], qkv.shape[1], qkv.shape[2], qkv.shape[4]
        count = (W + self.stripe - 1) // self.stripe
        qkv = F.pad(qkv.flatten(3), (0, 0, 0, count * self.stripe - W))
        qkv = qkv.view(B, H, count, self.stripe, 3, C).permute(4, 0, 2, 1, 3, 5)
        q, k, v = qkv.reshape(3, B * count, H * self.stripe, C).unbind(0)
        lepe = v.view(B * count, H, self.stripe, C)
        if vertical:
            lepe = self.lepe_vertical(lepe)
        else:
            lepe = self.lepe_horizontal(lepe.transpose(1, 2)).transpose(1, 2)
        q, k, v = self.heads(q), self.heads(k), self.heads(v)
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(lepe.shape) + lepe
        out = out.view(B, count, H, self.stripe, C).transpose(1, 2).reshape(B, H, count * self.stripe, C)
        # A copy, not a slice: a dynamic graph would ask whether a slice is all of the map.
        return out.index_select(2, torch.arange(W, device=out.device))

    def heads(self, x: Tensor) -> Tensor:
        """(B, N, C) to (B, heads, N, head_dim)."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class GlobalAttention(nn.Module):
    """Softmax attention over the map, with a depthwise convolution of the values: (B, H, W, C) to the same."""

    def __init__(
        self, dim: int, num_heads: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.lepe = DepthwiseConv2d(dim, 3, **dd)
        self.proj = nn.Linear(dim, dim, **dd)

    def readers(self) -> list[nn.Module]:
        """The layers that read the input."""
        return [self.qkv]

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same."""
        B, H, W, C = x.shape
        qkv = self.qkv(x).view(B, H * W, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, H, W, C)
        return self.proj(out + self.lepe(qkv[:, :, 2].reshape(B, H, W, C)))


class CSwin(Backbone):
    """CSwin with another token mixer.

    Args:
        img_size: size of the pictures that tables of positions of mixers are made for, in pixels.
        in_chans: channels of the pictures.
        num_classes: outputs; 0 for pooled features.
        global_pool: pooling before the classifier.
        dim: channels of the first stage; each has twice those of the one before.
        depths: blocks of the stages.
        num_heads: attention heads of the stages.
        stripe: width of the stripes of "stripe" attention, in tokens.
        mlp_ratio: hidden channels of the feed-forward layers over channels.
        attention: for each stage a key of ``mixers``, "stripe" or "global".
        norm: "layernorm", "repbn" or "prepbn".
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth, from 0 at the first block to this at the last.
    """

    # Each is called with (dim, num_heads, grid, device=, dtype=).
    mixers: ClassVar[Mapping[str, Callable[..., nn.Module]]] = {}
    block_types: ClassVar[Mapping[str, type[Block]]] = {}  # for mixers that need another block around them

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        dim: int = 64,
        depths: Sequence[int] = (2, 4, 18, 1),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        stripe: int = 7,
        mlp_ratio: float = 4.0,
        attention: Sequence[str] = ("stripe", "stripe", "stripe", "global"),
        norm: str = "layernorm",
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
            width, grid, kind = dim << i, grid_of(img_size, 4 << i), attention[i]
            blocks = []
            for rate in stage_rates:
                if kind == "stripe":
                    mixer = StripeAttention(width, num_heads[i], stripe, **dd)
                elif kind == "global":
                    mixer = GlobalAttention(width, num_heads[i], **dd)
                else:
                    mixer = self.mixers[kind](width, num_heads[i], grid, **dd)
                mlp = Mlp(width, int(width * mlp_ratio), **dd)
                blocks.append(self.block_types.get(kind, Block)(width, mixer, mlp, norms, rate, **dd))
            merge = ConvEmbed(width // 2, width, 3, 2, 1, norms, **dd) if i else None
            stages.append(Stage(width, blocks, merge))
        features = dim << (len(depths) - 1)
        stem = ConvEmbed(in_chans, dim, 7, 4, 2, norms, **dd)
        final = norms(features, **dd)
        super().__init__(stem, stages, final, features, in_chans, num_classes, global_pool, drop_rate, **dd)

    init_module = staticmethod(init_linear)
