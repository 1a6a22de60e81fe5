"""The body of DeiT: plain, with tokens (B, N, C), a class token and learned positions.

Touvron et al.: Training data-efficient image transformers, ICML 2021, arXiv:2012.12877. It is timm's
``VisionTransformer`` with other blocks, so names and conventions are those of timm's token models.
"""

from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp, calculate_drop_path_rates, resample_abs_pos_embed
from timm.models._features import feature_take_indices
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from zoo.backbones.layers.prepbn import merge_into_readers, norm_layer


class TokenAttention(nn.Module):
    """Softmax attention over all tokens: (B, N, C) to the same.

    Args:
        dim: C.
        num_heads: heads.
        grid: unused.
        prefix_tokens: unused.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        grid: tuple[int, int],
        prefix_tokens: int,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.qkv = nn.Linear(dim, 3 * dim, device=device, dtype=dtype)
        self.proj = nn.Linear(dim, dim, device=device, dtype=dtype)

    def readers(self) -> list[nn.Module]:
        """The layers that read the input."""
        return [self.qkv]

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        """(B, N, C) to the same."""
        B, N, C = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, N, C))


class TokenBlock(nn.Module):
    """As ``block.Block``, of tokens (B, N, C) and the rows and columns of the map that they hold."""

    def __init__(
        self,
        dim: int,
        attn: nn.Module,
        norm: Callable[..., nn.Module],
        mlp_ratio: float,
        drop_path: float,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.norm1 = norm(dim, **dd)
        self.attn = attn
        self.drop_path1 = DropPath(drop_path)
        self.norm2 = norm(dim, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), **dd)
        self.drop_path2 = DropPath(drop_path)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        """(B, N, C) to the same."""
        x = x + self.drop_path1(self.attn(self.norm1(x), height, width))
        return x + self.drop_path2(self.mlp(self.norm2(x)))

    @torch.jit.ignore
    def fuse(self) -> "TokenBlock":
        """Merge RepBNs into the layers that read them, for ``timm.utils.reparameterize_model``."""
        if hasattr(self.attn, "readers") and merge_into_readers(self.norm1, *self.attn.readers()):
            self.norm1 = nn.Identity()
        if merge_into_readers(self.norm2, self.mlp.fc1):
            self.norm2 = nn.Identity()
        return self


class DeiT(VisionTransformer):
    """DeiT with another token mixer.

    Positions are resized to the picture, which may have any size.

    Args:
        img_size: size of pictures that the table of positions is made for, in pixels.
        patch_size: pixels of a patch, along each side.
        in_chans: channels of the pictures.
        num_classes: outputs; 0 for pooled features.
        global_pool: "token", "avg" or another name of timm's; "" for none.
        embed_dim: channels.
        depth: blocks.
        num_heads: attention heads.
        mlp_ratio: hidden channels of the feed-forward layers over channels.
        class_token: put a class token before the others.
        attention: a key of ``mixers``.
        norm: "layernorm", "repbn" or "prepbn".
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth, from 0 at the first block to this at the last.
    """

    mixers: ClassVar[Mapping[str, Callable[..., nn.Module]]] = {"softmax": TokenAttention}

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        embed_dim: int = 192,
        depth: int = 12,
        num_heads: int = 3,
        mlp_ratio: float = 4.0,
        class_token: bool = True,
        attention: str = "softmax",
        norm: str = "layernorm",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        norms = norm_layer(norm, 1e-6)
        super().__init__(
            img_size=img_size,
            patch_size=patch_size,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            embed_dim=embed_dim,
            depth=0,
            num_heads=num_heads,
            class_token=class_token,
            fc_norm=False,
            norm_layer=norms,
            dynamic_img_size=True,
            dynamic_img_pad=True,
            drop_rate=drop_rate,
            **dd,
        )
        grid, prefix = self.patch_embed.grid_size, self.num_prefix_tokens
        mixers = [self.mixers[attention](embed_dim, num_heads, grid, prefix, **dd) for _ in range(depth)]
        rates = calculate_drop_path_rates(drop_path_rate, depth)
        blocks = zip(mixers, rates, strict=True)
        self.blocks = nn.ModuleList(TokenBlock(embed_dim, m, norms, mlp_ratio, rate, **dd) for m, rate in blocks)
        self.feature_info = [
            {"module": f"blocks.{i}", "num_chs": embed_dim, "reduction": patch_size} for i in range(depth)
        ]
        self.init_weights(needs_reset=False)

    def _patches(self, x: Tensor) -> Tensor:
        """Pictures to patches (B, H, W, C), which also lie so in memory, as all layers after this want them."""
        return self.patch_embed(x.contiguous(memory_format=torch.channels_last))

    def _pos_embed(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to tokens with positions; timm's own, in a file where its tracer finds the function."""
        height, width = x.shape[1], x.shape[2]
        positions = resample_abs_pos_embed(
            self.pos_embed, [height, width], self.patch_embed.grid_size, num_prefix_tokens=self.num_prefix_tokens
        )
        x = x.flatten(1, 2)
        if self.cls_token is not None:
            x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), 1)
        return x + positions

    def _run_blocks(self, x: Tensor, height: int, width: int) -> Tensor:
        for block in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x, height, width, use_reentrant=False)
            else:
                x = block(x, height, width)
        return x

    def forward_features(self, x: Tensor) -> Tensor:
        """Pictures (B, in_chans, H, W) to normed tokens (B, N, C), the class token first."""
        x = self._patches(x)
        height, width = x.shape[1], x.shape[2]
        return self.norm(self._run_blocks(self._pos_embed(x), height, width))

    def forward(self, x: Tensor) -> Tensor:
        """Pictures (B, in_chans, H, W) to logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))

    @torch.jit.ignore
    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The features of the blocks.

        Args:
            x: pictures (B, in_chans, H, W).
            indices: the last n blocks, these blocks, or all if None.
            return_prefix_tokens: give pairs of the map and the class token (B, 1, C).
            norm: apply the final norm to them.
            stop_early: do not run blocks that are not asked for.
            output_fmt: "NCHW" for maps, "NLC" for tokens.
            intermediates_only: leave out the final features.

        Returns:
            Features of the blocks, or final features (as ``forward_features``) and those.

        Raises:
            ValueError: another output format.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt is {output_fmt!r}, expected 'NCHW' or 'NLC'.")
        take, last = feature_take_indices(len(self.blocks), indices)
        x = self._patches(x)
        B, height, width, C = x.shape
        x = self._pos_embed(x)
        features = []
        for index, block in enumerate(self.blocks[: last + 1] if stop_early else self.blocks):
            if self.grad_checkpointing:
                x = checkpoint(block, x, height, width, use_reentrant=False)
            else:
                x = block(x, height, width)
            if index in take:
                y = self.norm(x) if norm else x
                prefix, y = y[:, : self.num_prefix_tokens], y[:, self.num_prefix_tokens :]
                if output_fmt == "NCHW":
                    y = y.reshape(B, height, width, C).permute(0, 3, 1, 2)
                features.append((y, prefix) if return_prefix_tokens else y)
        return features if intermediates_only else (self.norm(x), features)
