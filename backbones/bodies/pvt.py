"""The body of PVT: four stages, each with a patch embedding and a learned table of positions, no final norm.

Wang et al.: Pyramid Vision Transformer, ICCV 2021, arXiv:2102.12122.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from timm.layers import Mlp, calculate_drop_path_rates
from torch import Tensor, nn

from zoo.backbones.bodies.block import Block, ConvEmbed, grid_of, init_linear
from zoo.backbones.layers.prepbn import merge_into_writer, norm_layer
from zoo.backbones.model import Backbone, Stage

DEPTHS = {"tiny": (2, 2, 2, 2), "small": (3, 4, 6, 3), "medium": (3, 4, 18, 3), "large": (3, 8, 27, 3)}


class ReducedAttention(nn.Module):
    """Softmax attention to a map whose sides are divided by a ratio: (B, H, W, C) to the same.

    Args:
        dim: C.
        num_heads: heads.
        ratio: stride of the convolution that makes the smaller map; 1 for none.
        norm: makes the norm after it.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        ratio: int,
        norm: Callable[..., nn.Module],
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.q = nn.Linear(dim, dim, **dd)
        self.kv = nn.Linear(dim, 2 * dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.reduction = Reduction(dim, ratio, norm, **dd) if ratio > 1 else nn.Identity()

    def readers(self) -> list[nn.Module]:
        """The layers that read the input."""
        return [self.q, self.reduction.conv if isinstance(self.reduction, Reduction) else self.kv]

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same."""
        B, H, W, C = x.shape
        q = self.q(x).view(B, H * W, self.num_heads, self.head_dim).transpose(1, 2)
        k, v = self.kv(self.reduction(x)).flatten(1, 2).unflatten(-1, (2, self.num_heads, -1)).unbind(2)
        out = F.scaled_dot_product_attention(q, k.transpose(1, 2), v.transpose(1, 2))
        return self.proj(out.transpose(1, 2).reshape(B, H, W, C))


class Reduction(nn.Module):
    """Convolution whose kernel is its stride, and norm: (B, H, W, C) to (B, ceil(H / r), ceil(W / r), C).

    Maps that are no multiple of the stride r are continued with their last rows and columns: that, unlike zeros, is the
    same before and after the norm of the block, so that it can be merged.
    """

    def __init__(
        self,
        dim: int,
        ratio: int,
        norm: Callable[..., nn.Module],
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, ratio, ratio, device=device, dtype=dtype)
        self.norm = norm(dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to (B, H', W', C)."""
        more = self.conv.stride[0] - 1  # makes the convolution round up
        x = F.pad(x.permute(0, 3, 1, 2), (0, more, 0, more), mode="replicate")
        return self.norm(self.conv(x).permute(0, 2, 3, 1))

    @torch.jit.ignore
    def fuse(self) -> "Reduction":
        """Merge a RepBN into the convolution, for ``timm.utils.reparameterize_model``."""
        if merge_into_writer(self.norm, self.conv):
            self.norm = nn.Identity()
        return self


class PVT(Backbone):
    """PVT with another token mixer.

    Args:
        img_size: size of the pictures that the tables of positions are made for, in pixels.
        in_chans: channels of the pictures.
        num_classes: outputs; 0 for pooled features.
        global_pool: pooling before the classifier.
        dims: channels of the stages.
        depths: blocks of the stages.
        num_heads: attention heads of the stages.
        mlp_ratios: hidden channels of the feed-forward layers over channels.
        attention: for each stage a key of ``mixers``, or "softmax".
        norm: "layernorm", "repbn" or "prepbn".
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth, from 0 at the first block to this at the last.
    """

    # Each is called with (dim, num_heads, grid, device=, dtype=).
    mixers: ClassVar[Mapping[str, Callable[..., nn.Module]]] = {}

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (2, 2, 2, 2),
        num_heads: Sequence[int] = (1, 2, 5, 8),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        attention: Sequence[str] = ("softmax", "softmax", "softmax", "softmax"),
        norm: str = "layernorm",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        norms = norm_layer(norm, 1e-6)
        rates = calculate_drop_path_rates(drop_path_rate, depths, stagewise=True)
        embeds, stages = [], []
        for i, (dim, stage_rates) in enumerate(zip(dims, rates, strict=True)):
            grid, ratio, patch = grid_of(img_size, 4 << i), (8, 4, 2, 1)[i], 2 if i else 4
            blocks = []
            for rate in stage_rates:
                if attention[i] == "softmax":
                    mixer = ReducedAttention(dim, num_heads[i], ratio, norms, **dd)
                else:
                    mixer = self.mixers[attention[i]](dim, num_heads[i], grid, **dd)
                blocks.append(Block(dim, mixer, Mlp(dim, int(dim * mlp_ratios[i]), **dd), norms, rate, **dd))
            embeds.append(
                ConvEmbed(dims[i - 1] if i else in_chans, dim, patch, patch, 0, norm_layer(norm, 1e-5), grid, **dd)
            )
            stages.append(Stage(dim, blocks, embeds[i] if i else None))
        super().__init__(
            embeds[0], stages, nn.Identity(), dims[-1], in_chans, num_classes, global_pool, drop_rate, **dd
        )

    init_module = staticmethod(init_linear)
