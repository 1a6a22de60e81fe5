"""InLine: linear attention that is injective in the query, with a local residual.

Han et al.: Bridging the Divide: Reconsidering Softmax and Linear Attention, NeurIPS 2024, arXiv:2412.06590. Written
from measurements of the published models, on the bodies of DeiT, PVT, Swin and CSwin.

The mixer subtracts from the weights of the values what their sum exceeds one by, instead of dividing by it, and adds a
3x3 depthwise convolution of the values whose kernel depends on the mean token. It is global at any size.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_function
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from zoo.backbones.bodies import pvt, swin
from zoo.backbones.bodies.block import Block
from zoo.backbones.bodies.checkpoint import checkpoint_filter_fn
from zoo.backbones.bodies.cswin import CSwin
from zoo.backbones.bodies.deit import DeiT
from zoo.backbones.bodies.pvt import PVT
from zoo.backbones.bodies.swin import Swin
from zoo.backbones.layers.conv import DepthwiseConv2d
from zoo.backbones.model import QUICKSTART, Model, build, imagenet_cfg
from zoo.kernels import linear_attention

__all__ = ["InLineCSwin", "InLineDeiT", "InLinePVT", "InLineSwin"]


@register_notrace_function  # the size of the batch decides
def convolve_each(x: Tensor, kernels: Tensor) -> Tensor:
    """3x3 depthwise convolution of every map with kernels of its own.

    Args:
        x: (B, H, W, C).
        kernels: (B, 9C), the nine numbers of a channel together, row by row.

    Returns:
        (B, H, W, C).
    """
    B, H, W, C = x.shape
    if B == 0:
        return x  # a convolution has at least one group
    maps = x.permute(0, 3, 1, 2).reshape(1, B * C, H, W)
    maps = F.conv2d(maps, kernels.view(B * C, 1, 3, 3), padding=1, groups=B * C)
    return maps.view(B, C, H, W).permute(0, 2, 3, 1)


class InjectiveAttention(nn.Module):
    """``proj(attention(q, k, v) + local(v))`` (eq. 4-5): (B, H, W, C) to the same.

    Args:
        dim: C.
        num_heads: heads.
        grid: unused: there is no table of positions.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        grid: tuple[int, int],
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.residual = nn.Sequential(  # the mean token to the kernels of the local residual
            nn.Conv1d(dim, dim, 1, groups=num_heads, **dd),
            nn.GELU(),
            nn.Conv1d(dim, 9 * dim, 1, groups=num_heads, **dd),
        )
        self.proj = nn.Linear(dim, dim, **dd)

    def local(self, mean: Tensor, v: Tensor) -> Tensor:
        """Mean token (B, C) and map of values (B, H, W, C) to the local residual (B, H, W, C)."""
        return convolve_each(v, self.residual(mean.unsqueeze(-1)).flatten(1))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, local: Tensor) -> Tensor:
        """(B, N, heads, head_dim) each, to the same."""
        return linear_attention(
            q, k, v, "identity", local=local.to(v.dtype), normalisation="subtraction", scale=self.head_dim**-0.5
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same."""
        B, H, W, C = x.shape
        q, k, v = self.qkv(x).view(B, H * W, 3, self.num_heads, self.head_dim).unbind(2)
        local = self.local(x.mean((1, 2)), v.reshape(B, H, W, C)).reshape(v.shape)
        return self.proj(self.attend(q, k, v, local).reshape(B, H, W, C))


class TokenInjectiveAttention(InjectiveAttention):
    """The same of tokens (B, N, C), of which the first ``prefix_tokens`` are no part of the map and get no residual."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        grid: tuple[int, int],
        prefix_tokens: int,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, num_heads, grid, device=device, dtype=dtype)
        self.prefix_tokens = prefix_tokens

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        """(B, N, C) to the same."""
        B, N, C = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.num_heads, self.head_dim).unbind(2)
        local = self.local(x.mean(1), v[:, self.prefix_tokens :].reshape(B, height, width, C)).flatten(1, 2)
        local = F.pad(local, (0, 0, self.prefix_tokens, 0)).reshape(v.shape)
        return self.proj(self.attend(q, k, v, local).reshape(B, N, C))


class ConvolvedInjectiveAttention(InjectiveAttention):
    """The same with CSwin's depthwise convolution of the values; the kernels depend on what the norm has not seen."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        grid: tuple[int, int],
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, num_heads, grid, device=device, dtype=dtype)
        self.lepe = DepthwiseConv2d(dim, 3, device=device, dtype=dtype)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """Normed map and residual stream (B, H, W, C) to the same."""
        B, H, W, C = x.shape
        q, k, v = self.qkv(x).view(B, H * W, 3, self.num_heads, self.head_dim).unbind(2)
        values = v.reshape(B, H, W, C)
        local = self.local(residual.mean((1, 2)), values) + self.lepe(values)
        return self.proj(self.attend(q, k, v, local.reshape(v.shape)).reshape(B, H, W, C))


class ResidualBlock(Block):
    """A block whose mixer also sees the residual stream."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same."""
        x = x + self.drop_path1(self.mixer(self.norm1(x), x))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


class InLineDeiT(DeiT):
    """DeiT with injective linear attention."""

    mixers: ClassVar[Mapping[str, Callable[..., nn.Module]]] = {**DeiT.mixers, "inline": TokenInjectiveAttention}


class InLinePVT(PVT):
    """PVT with injective linear attention."""

    mixers: ClassVar[Mapping[str, Callable[..., nn.Module]]] = {"inline": InjectiveAttention}


class InLineSwin(Swin):
    """Swin with injective linear attention."""

    mixers: ClassVar[Mapping[str, Callable[..., nn.Module]]] = {"inline": InjectiveAttention}


class InLineCSwin(CSwin):
    """CSwin with injective linear attention."""

    mixers: ClassVar[Mapping[str, Callable[..., nn.Module]]] = {"inline": ConvolvedInjectiveAttention}
    block_types: ClassVar[Mapping[str, type[Block]]] = {"inline": ResidualBlock}


_cfg = partial(
    imagenet_cfg,
    crop_mode="squash",
    paper_name="Bridging the Divide: Reconsidering Softmax and Linear Attention",
    paper_ids="arXiv:2412.06590",
    origin_url="https://github.com/LeapLabTHU/InLine",
)
_deit_cfg = partial(_cfg, first_conv="patch_embed.proj", classifier="head")


default_cfgs = generate_default_cfgs(
    {
        "inline_deit_tiny.untrained": _deit_cfg(224),
        "inline_deit_small.untrained": _deit_cfg(288),
        "inline_deit_base.untrained": _deit_cfg(448),
        "inline_pvt_tiny.untrained": _cfg(),
        "inline_pvt_small.untrained": _cfg(),
        "inline_pvt_medium.untrained": _cfg(),
        "inline_pvt_large.untrained": _cfg(),
        "inline_swin_tiny.untrained": _cfg(),
        "inline_swin_small.untrained": _cfg(),
        "inline_swin_base.untrained": _cfg(),
        "inline_swin_base_384.untrained": _cfg(384, crop_pct=1.0),
        "inline_cswin_tiny.untrained": _cfg(),
        "inline_cswin_small.untrained": _cfg(),
        "inline_cswin_base.untrained": _cfg(),
        "inline_cswin_base_384.untrained": _cfg(384),
        "inline_nano.quickstart": _cfg(**QUICKSTART),
        "test_inline.untrained": _cfg(160),
        "test_inline_deit.untrained": _deit_cfg(160),
        "test_inline_pvt.untrained": _cfg(160),
        "test_inline_cswin.untrained": _cfg(160),
    }
)


def _create(model_class: type[Model], variant: str, pretrained: bool, **kwargs: Any) -> Model:
    return build(model_class, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **kwargs)


_INLINE = ("inline", "inline", "inline", "inline")
_PVT = {"attention": _INLINE, "num_heads": (2, 4, 10, 16)}


@register_model
def inline_deit_tiny(pretrained: bool = False, **kwargs: Any) -> InLineDeiT:
    """InLine-DeiT-T, 6.5 M parameters, for 224 x 224."""
    args = {"attention": "inline", "embed_dim": 192, "num_heads": 6}
    return _create(InLineDeiT, "inline_deit_tiny", pretrained, **{**args, **kwargs})


@register_model
def inline_deit_small(pretrained: bool = False, **kwargs: Any) -> InLineDeiT:
    """InLine-DeiT-S, 16.7 M parameters, for 288 x 288."""
    args = {"attention": "inline", "img_size": 288, "embed_dim": 320, "num_heads": 10}
    return _create(InLineDeiT, "inline_deit_small", pretrained, **{**args, **kwargs})


@register_model
def inline_deit_base(pretrained: bool = False, **kwargs: Any) -> InLineDeiT:
    """InLine-DeiT-B, 23.8 M parameters, for 448 x 448."""
    args = {"attention": "inline", "img_size": 448, "embed_dim": 384, "num_heads": 12}
    return _create(InLineDeiT, "inline_deit_base", pretrained, **{**args, **kwargs})


@register_model
def inline_pvt_tiny(pretrained: bool = False, **kwargs: Any) -> InLinePVT:
    """InLine-PVT-T, 12.0 M parameters."""
    args = {**_PVT, "depths": pvt.DEPTHS["tiny"]}
    return _create(InLinePVT, "inline_pvt_tiny", pretrained, **{**args, **kwargs})


@register_model
def inline_pvt_small(pretrained: bool = False, **kwargs: Any) -> InLinePVT:
    """InLine-PVT-S, 21.6 M parameters."""
    args = {**_PVT, "depths": pvt.DEPTHS["small"]}
    return _create(InLinePVT, "inline_pvt_small", pretrained, **{**args, **kwargs})


@register_model
def inline_pvt_medium(pretrained: bool = False, **kwargs: Any) -> InLinePVT:
    """InLine-PVT-M, 37.6 M parameters."""
    args = {**_PVT, "depths": pvt.DEPTHS["medium"]}
    return _create(InLinePVT, "inline_pvt_medium", pretrained, **{**args, **kwargs})


@register_model
def inline_pvt_large(pretrained: bool = False, **kwargs: Any) -> InLinePVT:
    """InLine-PVT-L, 51.2 M parameters."""
    args = {**_PVT, "depths": pvt.DEPTHS["large"]}
    return _create(InLinePVT, "inline_pvt_large", pretrained, **{**args, **kwargs})


@register_model
def inline_swin_tiny(pretrained: bool = False, **kwargs: Any) -> InLineSwin:
    """InLine-Swin-T, 29.2 M parameters."""
    args = {"attention": ("inline", "inline", "inline", "softmax")}
    return _create(InLineSwin, "inline_swin_tiny", pretrained, **{**args, **kwargs})


@register_model
def inline_swin_small(pretrained: bool = False, **kwargs: Any) -> InLineSwin:
    """InLine-Swin-S, 49.8 M parameters."""
    args = {"attention": ("inline", "inline", "softmax", "softmax"), **swin.SMALL}
    return _create(InLineSwin, "inline_swin_small", pretrained, **{**args, **kwargs})


_SWIN_BASE = {**swin.BASE, "attention": ("inline", "inline", ("inline",) * 2 + ("softmax",) * 16, "softmax")}


@register_model
def inline_swin_base(pretrained: bool = False, **kwargs: Any) -> InLineSwin:
    """InLine-Swin-B, 88.4 M parameters."""
    return _create(InLineSwin, "inline_swin_base", pretrained, **{**_SWIN_BASE, **kwargs})


@register_model
def inline_swin_base_384(pretrained: bool = False, **kwargs: Any) -> InLineSwin:
    """InLine-Swin-B for 384 x 384 with windows of 12 x 12, 88.5 M parameters."""
    args = {**_SWIN_BASE, "img_size": 384, "window_size": 12}
    return _create(InLineSwin, "inline_swin_base_384", pretrained, **{**args, **kwargs})


_CSWIN = ("inline", "inline", "stripe", "global")
_CSWIN_BASE = {"attention": _CSWIN, "dim": 96, "depths": (3, 6, 29, 2), "num_heads": (4, 8, 16, 32)}


@register_model
def inline_cswin_tiny(pretrained: bool = False, **kwargs: Any) -> InLineCSwin:
    """InLine-CSwin-T, 20.6 M parameters."""
    args = {"attention": _CSWIN}
    return _create(InLineCSwin, "inline_cswin_tiny", pretrained, **{**args, **kwargs})


@register_model
def inline_cswin_small(pretrained: bool = False, **kwargs: Any) -> InLineCSwin:
    """InLine-CSwin-S, 33.0 M parameters."""
    args = {"attention": _CSWIN, "depths": (3, 6, 29, 2)}
    return _create(InLineCSwin, "inline_cswin_small", pretrained, **{**args, **kwargs})


@register_model
def inline_cswin_base(pretrained: bool = False, **kwargs: Any) -> InLineCSwin:
    """InLine-CSwin-B, 73.4 M parameters."""
    return _create(InLineCSwin, "inline_cswin_base", pretrained, **{**_CSWIN_BASE, **kwargs})


@register_model
def inline_cswin_base_384(pretrained: bool = False, **kwargs: Any) -> InLineCSwin:
    """InLine-CSwin-B for 384 x 384 with stripes of 12, 73.4 M parameters."""
    args = {**_CSWIN_BASE, "img_size": 384, "stripe": 12}
    return _create(InLineCSwin, "inline_cswin_base_384", pretrained, **{**args, **kwargs})


@register_model
def inline_nano(pretrained: bool = False, **kwargs: Any) -> InLineSwin:
    """A small InLine-Swin of this zoo, for quick training."""
    args = {"attention": ("inline", "inline", "inline", "softmax"), "dim": 32, "num_heads": (2, 4, 8, 16)}
    return _create(InLineSwin, "inline_nano", pretrained, **{**args, **kwargs})


@register_model
def test_inline(pretrained: bool = False, **kwargs: Any) -> InLineSwin:
    """A tiny InLine-Swin for tests, with both kinds of blocks, shifted too."""
    args = {
        "attention": ("inline", "inline", ("inline", "softmax"), "inline"),
        "dim": 8,
        "depths": (1, 1, 2, 1),
        "num_heads": (1, 2, 2, 4),
        "window_size": 2,
    }
    return _create(InLineSwin, "test_inline", pretrained, **{**args, **kwargs})


@register_model
def test_inline_deit(pretrained: bool = False, **kwargs: Any) -> InLineDeiT:
    """A tiny InLine-DeiT for tests."""
    args = {"attention": "inline", "img_size": 160, "embed_dim": 32, "depth": 4, "num_heads": 2}
    return _create(InLineDeiT, "test_inline_deit", pretrained, **{**args, **kwargs})


@register_model
def test_inline_pvt(pretrained: bool = False, **kwargs: Any) -> InLinePVT:
    """A tiny InLine-PVT for tests."""
    args = {"attention": _INLINE, "img_size": 160, "dims": (8, 16, 24, 32), "depths": (1, 1, 2, 1)}
    args |= {"num_heads": (1, 2, 2, 4), "mlp_ratios": (2, 2, 2, 2)}
    return _create(InLinePVT, "test_inline_pvt", pretrained, **{**args, **kwargs})


@register_model
def test_inline_cswin(pretrained: bool = False, **kwargs: Any) -> InLineCSwin:
    """A tiny InLine-CSwin for tests."""
    args = {"attention": _CSWIN, "dim": 8, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 2, 4), "stripe": 2}
    return _create(InLineCSwin, "test_inline_cswin", pretrained, **{**args, **kwargs})
