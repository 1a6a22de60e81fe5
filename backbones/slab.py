"""SLAB: simplified linear attention, and PRepBN, which trains transformers from layer norm to a batch norm that merges.

Guo, Chen, Tang, Wang: SLAB: Efficient Transformers with Simplified Linear Attention and Progressive Re-parameterized
Batch Normalization, ICML 2024, arXiv:2405.11582. Written from the paper and from measurements of the published models,
on the bodies of DeiT, PVT, Swin and CSwin. The ``prepbn_*`` models have the norm alone, with the body's own attention.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from zoo.backbones.bodies import pvt, swin
from zoo.backbones.bodies.checkpoint import checkpoint_filter_fn
from zoo.backbones.bodies.cswin import CSwin
from zoo.backbones.bodies.deit import DeiT
from zoo.backbones.bodies.pvt import PVT
from zoo.backbones.bodies.swin import Swin
from zoo.backbones.layers.conv import DepthwiseConv2d
from zoo.backbones.layers.position import PositionTable
from zoo.backbones.layers.prepbn import replace_layer_norms, set_prep_progress
from zoo.backbones.model import QUICKSTART, Model, build, imagenet_cfg
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

    def attend(self, qkv: Tensor, lepe: Tensor | None = None) -> Tensor:
        """Queries, keys and values (B, H, W, 3C) and what is added to the result (B, H, W, C), to (B, H, W, C)."""
        B, H, W = qkv.shape[:3]
        weight, bias = self.local.weight.repeat(self.num_heads, 1, 1, 1), self.local.bias
        assert bias is not None  # TorchScript has to be told
        _, k_map, v_map = qkv.chunk(3, -1)
        local = depthwise_conv2d(v_map, weight, bias.repeat(self.num_heads))
        if lepe is not None:
            local = local + lepe
        shape = [B, H * W, self.num_heads, self.head_dim]
        q, _, v = qkv.view(B, H * W, 3, self.num_heads, self.head_dim).unbind(2)
        k = self.position(k_map).reshape(shape)
        out = linear_attention(q, k, v, "relu", local=local.reshape(shape))
        return out.reshape(B, H, W, self.num_heads * self.head_dim)

    def mix(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same."""
        return self.proj(self.attend(self.qkv(x)))

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same."""
        return self.mix(x)


class WindowedSimplifiedAttention(SimplifiedAttention):
    """The same in windows as large as the table, which may be shifted by half: so in the authors' detectors.

    Maps that are no multiple of the window are padded with zeros, which take part.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        grid: tuple[int, int],
        shifted: bool,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, num_heads, grid, device=device, dtype=dtype)
        self.window = grid
        self.shift = (grid[0] // 2, grid[1] // 2) if shifted else (0, 0)

    def readers(self) -> list[nn.Module]:
        """None that reads the input and nothing else."""
        return []

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same."""
        B, H, W, C = x.shape
        height, width = self.window
        down, right = self.shift
        rows, columns = (H + height - 1) // height, (W + width - 1) // width
        x = F.pad(x, (0, 0, 0, columns * width - W, 0, rows * height - H)).roll((-down, -right), (1, 2))
        windows = x.view(B, rows, height, columns, width, C).transpose(2, 3).reshape(-1, height, width, C)
        out = self.mix(windows).view(B, rows, columns, height, width, C).transpose(2, 3)
        return out.reshape(B, rows * height, columns * width, C).roll((down, right), (1, 2))[:, :H, :W]


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
        return self.mix(x.unflatten(1, (height, width))).flatten(1, 2)


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
        qkv = self.qkv(x)
        return self.proj(self.attend(qkv, self.lepe(qkv.chunk(3, -1)[2])))


class SlabDeiT(DeiT):
    """DeiT with simplified linear attention."""

    mixers: ClassVar[Mapping[str, Callable[..., nn.Module]]] = {**DeiT.mixers, "slab": TokenSimplifiedAttention}


class SlabPVT(PVT):
    """PVT with simplified linear attention."""

    mixers: ClassVar[Mapping[str, Callable[..., nn.Module]]] = {"slab": SimplifiedAttention}


class SlabSwin(Swin):
    """Swin with simplified linear attention."""

    mixers: ClassVar[Mapping[str, Callable[..., nn.Module]]] = {"slab": SimplifiedAttention}
    dense_mixers: ClassVar[Mapping[str, Callable[..., nn.Module]]] = {"slab": WindowedSimplifiedAttention}


class SlabCSwin(CSwin):
    """CSwin with simplified linear attention."""

    mixers: ClassVar[Mapping[str, Callable[..., nn.Module]]] = {"slab": ConvolvedSimplifiedAttention}


_URL = "https://github.com/xinghaochen/SLAB/releases/download/ckpts/{}.pth"


_cfg = partial(
    imagenet_cfg,
    paper_name="SLAB: Efficient Transformers with Simplified Linear Attention and PRepBN",
    paper_ids="arXiv:2405.11582",
    origin_url="https://github.com/xinghaochen/SLAB",
)
_deit_cfg = partial(_cfg, first_conv="patch_embed.proj", classifier="head")


default_cfgs = generate_default_cfgs(
    {
        "slab_deit_tiny.in1k": _deit_cfg(url=_URL.format("slab_deit_tiny")),
        "slab_deit_small.in1k": _deit_cfg(url=_URL.format("slab_deit_small")),
        "slab_pvt_tiny.in1k": _cfg(url=_URL.format("slab_pvt_tiny")),
        "slab_pvt_small.untrained": _cfg(),
        "slab_pvt_medium.untrained": _cfg(),
        "slab_swin_tiny.in1k": _cfg(url=_URL.format("slab_swin_tiny")),
        "slab_swin_small.in1k": _cfg(url=_URL.format("slab_swin_small")),
        "slab_swin_base.untrained": _cfg(),
        "slab_cswin_tiny.in1k": _cfg(url=_URL.format("slab_cswin_tiny")),
        "slab_cswin_small.untrained": _cfg(),
        "prepbn_deit_tiny.in1k": _deit_cfg(url=_URL.format("deit_tiny_prepbn")),
        "prepbn_deit_small.in1k": _deit_cfg(url=_URL.format("deit_small_prepbn")),
        "prepbn_pvt_tiny.in1k": _cfg(url=_URL.format("pvt_tiny_prepbn")),
        "prepbn_pvt_small.in1k": _cfg(url=_URL.format("pvt_small_prepbn")),
        "prepbn_pvt_medium.in1k": _cfg(url=_URL.format("pvt_medium_prepbn")),
        "prepbn_swin_tiny.in1k": _cfg(url=_URL.format("swin_tiny_prepbn")),
        "slab_nano.quickstart": _cfg(**QUICKSTART),
        "test_slab.untrained": _cfg(160),
        "test_slab_deit.untrained": _deit_cfg(160),
        "test_slab_pvt.untrained": _cfg(160),
        "test_slab_cswin.untrained": _cfg(160),
    }
)


def _create(model_class: type[Model], variant: str, pretrained: bool, **kwargs: Any) -> Model:
    args = {"norm": "prepbn", **kwargs}
    return build(model_class, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **args)


_DEIT = {"attention": "slab", "class_token": False, "global_pool": "avg"}


@register_model
def slab_deit_tiny(pretrained: bool = False, **kwargs: Any) -> SlabDeiT:
    """SLAB-DeiT-T, 6.2 M parameters."""
    args = {**_DEIT, "embed_dim": 192, "num_heads": 3}
    return _create(SlabDeiT, "slab_deit_tiny", pretrained, **{**args, **kwargs})


@register_model
def slab_deit_small(pretrained: bool = False, **kwargs: Any) -> SlabDeiT:
    """SLAB-DeiT-S, 23.0 M parameters."""
    args = {**_DEIT, "embed_dim": 384, "num_heads": 6}
    return _create(SlabDeiT, "slab_deit_small", pretrained, **{**args, **kwargs})


@register_model
def prepbn_deit_tiny(pretrained: bool = False, **kwargs: Any) -> SlabDeiT:
    """DeiT-T with RepBN, 5.7 M parameters."""
    args = {"embed_dim": 192, "num_heads": 3, "norm": "repbn"}
    return _create(SlabDeiT, "prepbn_deit_tiny", pretrained, **{**args, **kwargs})


@register_model
def prepbn_deit_small(pretrained: bool = False, **kwargs: Any) -> SlabDeiT:
    """DeiT-S with PRepBN, 22.1 M parameters."""
    args = {"embed_dim": 384, "num_heads": 6}
    return _create(SlabDeiT, "prepbn_deit_small", pretrained, **{**args, **kwargs})


_SLAB = ("slab", "slab", "slab", "slab")


@register_model
def slab_pvt_tiny(pretrained: bool = False, **kwargs: Any) -> SlabPVT:
    """SLAB-PVT-T, 12.2 M parameters."""
    args = {"attention": _SLAB, "depths": pvt.DEPTHS["tiny"]}
    return _create(SlabPVT, "slab_pvt_tiny", pretrained, **{**args, **kwargs})


@register_model
def slab_pvt_small(pretrained: bool = False, **kwargs: Any) -> SlabPVT:
    """SLAB-PVT-S, 21.7 M parameters."""
    args = {"attention": _SLAB, "depths": pvt.DEPTHS["small"]}
    return _create(SlabPVT, "slab_pvt_small", pretrained, **{**args, **kwargs})


@register_model
def slab_pvt_medium(pretrained: bool = False, **kwargs: Any) -> SlabPVT:
    """SLAB-PVT-M, 37.3 M parameters."""
    args = {"attention": _SLAB, "depths": pvt.DEPTHS["medium"]}
    return _create(SlabPVT, "slab_pvt_medium", pretrained, **{**args, **kwargs})


@register_model
def prepbn_pvt_tiny(pretrained: bool = False, **kwargs: Any) -> SlabPVT:
    """PVT-T with PRepBN, 13.2 M parameters."""
    return _create(SlabPVT, "prepbn_pvt_tiny", pretrained, **{"depths": pvt.DEPTHS["tiny"], **kwargs})


@register_model
def prepbn_pvt_small(pretrained: bool = False, **kwargs: Any) -> SlabPVT:
    """PVT-S with PRepBN, 24.5 M parameters."""
    return _create(SlabPVT, "prepbn_pvt_small", pretrained, **{"depths": pvt.DEPTHS["small"], **kwargs})


@register_model
def prepbn_pvt_medium(pretrained: bool = False, **kwargs: Any) -> SlabPVT:
    """PVT-M with PRepBN, 44.3 M parameters."""
    return _create(SlabPVT, "prepbn_pvt_medium", pretrained, **{"depths": pvt.DEPTHS["medium"], **kwargs})


_SWIN = ("slab", "slab", "softmax", "softmax")


@register_model
def slab_swin_tiny(pretrained: bool = False, **kwargs: Any) -> SlabSwin:
    """SLAB-Swin-T, 29.2 M parameters."""
    return _create(SlabSwin, "slab_swin_tiny", pretrained, **{"attention": _SWIN, **kwargs})


@register_model
def slab_swin_small(pretrained: bool = False, **kwargs: Any) -> SlabSwin:
    """SLAB-Swin-S, 50.6 M parameters."""
    args = {"attention": _SWIN, **swin.SMALL}
    return _create(SlabSwin, "slab_swin_small", pretrained, **{**args, **kwargs})


@register_model
def slab_swin_base(pretrained: bool = False, **kwargs: Any) -> SlabSwin:
    """SLAB-Swin-B, 89.0 M parameters."""
    args = {"attention": _SWIN, **swin.BASE}
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
def test_slab_deit(pretrained: bool = False, **kwargs: Any) -> SlabDeiT:
    """A tiny SLAB-DeiT for tests."""
    args = {**_DEIT, **_TINY, "embed_dim": 32, "depth": 4, "num_heads": 2}
    return _create(SlabDeiT, "test_slab_deit", pretrained, **{**args, **kwargs})


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
