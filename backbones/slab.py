"""SLAB: simplified linear attention, and PRepBN, which trains transformers from layer norm to a batch norm that merges.

Guo, Chen, Tang, Wang: SLAB: Efficient Transformers with Simplified Linear Attention and Progressive Re-parameterized
Batch Normalization, ICML 2024, arXiv:2405.11582. Written from the paper and from measurements of the published models,
on the bodies of DeiT, PVT, Swin and CSwin. The ``prepbn_*`` models have the norm alone, with the body's own attention.
"""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from zoo.backbones.bodies.checkpoint import checkpoint_filter_fn
from zoo.backbones.bodies.cswin import CSwin
from zoo.backbones.bodies.deit import DeiT
from zoo.backbones.bodies.pvt import PVT
from zoo.backbones.bodies.swin import Swin
from zoo.backbones.layers.conv import DepthwiseConv2d
from zoo.backbones.layers.position import PositionTable
from zoo.backbones.layers.prepbn import replace_layer_norms, set_prep_progress
from zoo.backbones.model import QUICKSTART, Backbone, build
from zoo.kernels import depthwise_conv2d, linear_attention

__all__ = ["SlabCSwin", "SlabDeiT", "SlabPVT", "SlabSwin", "replace_layer_norms", "set_prep_progress"]


class SimplifiedAttention(nn.Module):
    """``proj(attention(relu(q), relu(k + table), v) + local(v))`` (eq. 8-10): (B, H, W, C) to the same.

    Args:
        dim: C.
        num_heads: heads.
        grid: rows and columns of the table of positions, which is resized to the map.
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
        self.position = PositionTable(dim, grid, "bicubic", **dd)
        self.local = DepthwiseConv2d(self.head_dim, 5, **dd)  # all heads share it
        self.proj = nn.Linear(dim, dim, **dd)

    def readers(self) -> list[nn.Module]:
        """The layers that read the input."""
        return [self.qkv]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, height: int, width: int, lepe: Tensor | None = None) -> Tensor:
        """(B, N, heads, head_dim) each and what is added (B, H, W, C), to (B, N, heads, head_dim)."""
        B, N, heads, dim = v.shape
        k = self.position(k.reshape(B, height, width, heads * dim)).view(B, N, heads, dim)
        weight, bias = self.local.weight.repeat(heads, 1, 1, 1), self.local.bias
        assert bias is not None  # TorchScript has to be told
        local = depthwise_conv2d(v.reshape(B, height, width, heads * dim), weight, bias.repeat(heads))
        if lepe is not None:
            local = local + lepe
        return linear_attention(q, k, v, "relu", local=local.reshape(B, N, heads, dim))

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same."""
        B, H, W, C = x.shape
        q, k, v = self.qkv(x).view(B, H * W, 3, self.num_heads, self.head_dim).unbind(2)
        return self.proj(self.attend(q, k, v, H, W).reshape(B, H, W, C))


class TokenSimplifiedAttention(SimplifiedAttention):
    """The same of tokens (B, N, C), which are those of the map and no others."""

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
        if prefix_tokens:
            raise ValueError("Simplified linear attention takes no class token: set class_token=False.")

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        """(B, N, C) to the same."""
        B, N, C = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.num_heads, self.head_dim).unbind(2)
        return self.proj(self.attend(q, k, v, height, width).reshape(B, N, C))


class ConvolvedSimplifiedAttention(SimplifiedAttention):
    """The same with CSwin's depthwise convolution of the values."""

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

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same."""
        B, H, W, C = x.shape
        q, k, v = self.qkv(x).view(B, H * W, 3, self.num_heads, self.head_dim).unbind(2)
        lepe = self.lepe(v.reshape(B, H, W, C))
        return self.proj(self.attend(q, k, v, H, W, lepe).reshape(B, H, W, C))


class SlabDeiT(DeiT):
    """DeiT with simplified linear attention."""

    mixers: ClassVar[Mapping[str, Callable[..., nn.Module]]] = {**DeiT.mixers, "slab": TokenSimplifiedAttention}


class SlabPVT(PVT):
    """PVT with simplified linear attention."""

    mixers: ClassVar[Mapping[str, Callable[..., nn.Module]]] = {"slab": SimplifiedAttention}


class SlabSwin(Swin):
    """Swin with simplified linear attention."""

    mixers: ClassVar[Mapping[str, Callable[..., nn.Module]]] = {"slab": SimplifiedAttention}


class SlabCSwin(CSwin):
    """CSwin with simplified linear attention."""

    mixers: ClassVar[Mapping[str, Callable[..., nn.Module]]] = {"slab": ConvolvedSimplifiedAttention}


_URL = "https://github.com/xinghaochen/SLAB/releases/download/ckpts/{}.pth"


def _cfg(file: str = "", size: int = 224, **kwargs: Any) -> dict[str, Any]:
    return {
        "url": _URL.format(file) if file else "",
        "num_classes": 1000,
        "input_size": (3, size, size),
        "pool_size": (size // 32, size // 32),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.conv",
        "classifier": "head.fc",
        "paper_name": "SLAB: Efficient Transformers with Simplified Linear Attention and PRepBN",
        "paper_ids": "arXiv:2405.11582",
        "origin_url": "https://github.com/xinghaochen/SLAB",
        **kwargs,
    }


def _deit_cfg(file: str) -> dict[str, Any]:
    return _cfg(file, first_conv="patch_embed.proj", classifier="head")


default_cfgs = generate_default_cfgs(
    {
        "slab_deit_tiny.in1k": _deit_cfg("slab_deit_tiny"),
        "slab_deit_small.in1k": _deit_cfg("slab_deit_small"),
        "slab_pvt_tiny.in1k": _cfg("slab_pvt_tiny"),
        "slab_pvt_small.untrained": _cfg(),
        "slab_pvt_medium.untrained": _cfg(),
        "slab_swin_tiny.in1k": _cfg("slab_swin_tiny"),
        "slab_swin_small.in1k": _cfg("slab_swin_small"),
        "slab_swin_base.untrained": _cfg(),
        "slab_cswin_tiny.in1k": _cfg("slab_cswin_tiny"),
        "slab_cswin_small.untrained": _cfg(),
        "prepbn_deit_tiny.in1k": _deit_cfg("deit_tiny_prepbn"),
        "prepbn_deit_small.in1k": _deit_cfg("deit_small_prepbn"),
        "prepbn_pvt_tiny.in1k": _cfg("pvt_tiny_prepbn"),
        "prepbn_pvt_small.in1k": _cfg("pvt_small_prepbn"),
        "prepbn_pvt_medium.in1k": _cfg("pvt_medium_prepbn"),
        "prepbn_swin_tiny.in1k": _cfg("swin_tiny_prepbn"),
        "slab_nano.quickstart": _cfg(**QUICKSTART),
        "test_slab.untrained": _cfg(size=160),
        "test_slab_pvt.untrained": _cfg(size=160),
        "test_slab_cswin.untrained": _cfg(size=160),
    }
)


def _create(model_class: type[Backbone], variant: str, pretrained: bool, **kwargs: Any) -> Backbone:
    args = {"norm": "prepbn", **kwargs}
    return build(model_class, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **args)


def _create_deit(variant: str, pretrained: bool, **kwargs: Any) -> SlabDeiT:
    return build_model_with_cfg(
        SlabDeiT,
        variant,
        pretrained,
        feature_cfg={"out_indices": 3, "feature_cls": "getter"},
        pretrained_filter_fn=checkpoint_filter_fn,
        **{"norm": "prepbn", **kwargs},
    )


_DEIT = {"attention": "slab", "class_token": False, "global_pool": "avg"}


@register_model
def slab_deit_tiny(pretrained: bool = False, **kwargs: Any) -> SlabDeiT:
    """SLAB-DeiT-T, 6.2 M parameters."""
    args = {**_DEIT, "embed_dim": 192, "num_heads": 3}
    return _create_deit("slab_deit_tiny", pretrained, **{**args, **kwargs})


@register_model
def slab_deit_small(pretrained: bool = False, **kwargs: Any) -> SlabDeiT:
    """SLAB-DeiT-S, 23.0 M parameters."""
    args = {**_DEIT, "embed_dim": 384, "num_heads": 6}
    return _create_deit("slab_deit_small", pretrained, **{**args, **kwargs})


@register_model
def prepbn_deit_tiny(pretrained: bool = False, **kwargs: Any) -> SlabDeiT:
    """DeiT-T with RepBN, 5.7 M parameters."""
    args = {"embed_dim": 192, "num_heads": 3, "norm": "repbn"}
    return _create_deit("prepbn_deit_tiny", pretrained, **{**args, **kwargs})


@register_model
def prepbn_deit_small(pretrained: bool = False, **kwargs: Any) -> SlabDeiT:
    """DeiT-S with PRepBN, 22.1 M parameters."""
    args = {"embed_dim": 384, "num_heads": 6}
    return _create_deit("prepbn_deit_small", pretrained, **{**args, **kwargs})


_SLAB = ("slab", "slab", "slab", "slab")


@register_model
def slab_pvt_tiny(pretrained: bool = False, **kwargs: Any) -> SlabPVT:
    """SLAB-PVT-T, 12.2 M parameters."""
    args = {"attention": _SLAB, "depths": (2, 2, 2, 2)}
    return _create(SlabPVT, "slab_pvt_tiny", pretrained, **{**args, **kwargs})


@register_model
def slab_pvt_small(pretrained: bool = False, **kwargs: Any) -> SlabPVT:
    """SLAB-PVT-S, 21.7 M parameters."""
    args = {"attention": _SLAB, "depths": (3, 4, 6, 3)}
    return _create(SlabPVT, "slab_pvt_small", pretrained, **{**args, **kwargs})


@register_model
def slab_pvt_medium(pretrained: bool = False, **kwargs: Any) -> SlabPVT:
    """SLAB-PVT-M, 37.3 M parameters."""
    args = {"attention": _SLAB, "depths": (3, 4, 18, 3)}
    return _create(SlabPVT, "slab_pvt_medium", pretrained, **{**args, **kwargs})


@register_model
def prepbn_pvt_tiny(pretrained: bool = False, **kwargs: Any) -> SlabPVT:
    """PVT-T with PRepBN, 13.2 M parameters."""
    return _create(SlabPVT, "prepbn_pvt_tiny", pretrained, **{"depths": (2, 2, 2, 2), **kwargs})


@register_model
def prepbn_pvt_small(pretrained: bool = False, **kwargs: Any) -> SlabPVT:
    """PVT-S with PRepBN, 24.5 M parameters."""
    return _create(SlabPVT, "prepbn_pvt_small", pretrained, **{"depths": (3, 4, 6, 3), **kwargs})


@register_model
def prepbn_pvt_medium(pretrained: bool = False, **kwargs: Any) -> SlabPVT:
    """PVT-M with PRepBN, 44.3 M parameters."""
    return _create(SlabPVT, "prepbn_pvt_medium", pretrained, **{"depths": (3, 4, 18, 3), **kwargs})


_SWIN = ("slab", "slab", "softmax", "softmax")


@register_model
def slab_swin_tiny(pretrained: bool = False, **kwargs: Any) -> SlabSwin:
    """SLAB-Swin-T, 29.2 M parameters."""
    return _create(SlabSwin, "slab_swin_tiny", pretrained, **{"attention": _SWIN, **kwargs})


@register_model
def slab_swin_small(pretrained: bool = False, **kwargs: Any) -> SlabSwin:
    """SLAB-Swin-S, 50.6 M parameters."""
    args = {"attention": _SWIN, "depths": (2, 2, 18, 2)}
    return _create(SlabSwin, "slab_swin_small", pretrained, **{**args, **kwargs})


@register_model
def slab_swin_base(pretrained: bool = False, **kwargs: Any) -> SlabSwin:
    """SLAB-Swin-B, 89.0 M parameters."""
    args = {"attention": _SWIN, "dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)}
    return _create(SlabSwin, "slab_swin_base", pretrained, **{**args, **kwargs})


@register_model
def prepbn_swin_tiny(pretrained: bool = False, **kwargs: Any) -> SlabSwin:
    """Swin-T with RepBN, 28.3 M parameters."""
    return _create(SlabSwin, "prepbn_swin_tiny", pretrained, **{"norm": "repbn", **kwargs})


_CSWIN = ("slab", "slab", "stripe", "global")


@register_model
def slab_cswin_tiny(pretrained: bool = False, **kwargs: Any) -> SlabCSwin:
    """SLAB-CSwin-T, 21.2 M parameters."""
    return _create(SlabCSwin, "slab_cswin_tiny", pretrained, **{"attention": _CSWIN, **kwargs})


@register_model
def slab_cswin_small(pretrained: bool = False, **kwargs: Any) -> SlabCSwin:
    """SLAB-CSwin-S, 35.5 M parameters."""
    args = {"attention": _CSWIN, "depths": (2, 4, 32, 2)}
    return _create(SlabCSwin, "slab_cswin_small", pretrained, **{**args, **kwargs})


@register_model
def slab_nano(pretrained: bool = False, **kwargs: Any) -> SlabSwin:
    """A small SLAB-Swin of this zoo, for quick training."""
    args = {"attention": _SWIN, "img_size": 96, "dim": 32, "num_heads": (2, 4, 8, 16)}
    return _create(SlabSwin, "slab_nano", pretrained, **{**args, **kwargs})


_TINY = {"img_size": 160, "norm": "repbn"}  # of PRepBN one branch has no gradient in eval mode, which some tests need


@register_model
def test_slab(pretrained: bool = False, **kwargs: Any) -> SlabSwin:
    """A tiny SLAB-Swin for tests, with both kinds of blocks, shifted too."""
    args = {**_TINY, "attention": ("slab", "slab", ("slab", "softmax"), "slab"), "dim": 8, "depths": (1, 1, 2, 1)}
    args |= {"num_heads": (1, 2, 2, 4), "window_size": 2}
    return _create(SlabSwin, "test_slab", pretrained, **{**args, **kwargs})


@register_model
def test_slab_pvt(pretrained: bool = False, **kwargs: Any) -> SlabPVT:
    """A tiny SLAB-PVT for tests, with both kinds of attention."""
    args = {**_TINY, "attention": ("slab", "softmax", "slab", "softmax"), "dims": (8, 16, 24, 32)}
    args |= {"depths": (1, 1, 2, 1), "num_heads": (1, 2, 2, 4), "mlp_ratios": (2, 2, 2, 2)}
    return _create(SlabPVT, "test_slab_pvt", pretrained, **{**args, **kwargs})


@register_model
def test_slab_cswin(pretrained: bool = False, **kwargs: Any) -> SlabCSwin:
    """A tiny SLAB-CSwin for tests."""
    args = {**_TINY, "attention": _CSWIN, "dim": 8, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 2, 4), "stripe": 2}
    return _create(SlabCSwin, "test_slab_cswin", pretrained, **{**args, **kwargs})
