"""RAVLT: Rank-Augmented Vision Linear Transformer.

Fan, Huang, He: Breaking the Low-Rank Dilemma of Linear Attention, CVPR 2025, arXiv:2411.07635. Written from the paper
and from measurements of the published models. The weights are on the Hugging Face Hub under MIT (aldjalkdf/RAVLT).

Rank-augmented linear attention (RALA) weighs the tokens of its state and gates its result. The published models use it
in the first two stages; the last two use softmax attention with the same projections, rotation, local term and gate.
"""

import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerScale, calculate_drop_path_rates
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from zoo.backbones.layers.conv import ConvNorm, DepthwiseConv2d
from zoo.backbones.layers.fold import affine, fold_after
from zoo.backbones.layers.mlp import DepthwiseMlp
from zoo.backbones.model import QUICKSTART, Backbone, Stage, build, imagenet_cfg
from zoo.kernels import linear_attention
from zoo.kernels.rotary import rotary_angles, rotate

__all__ = ["RAVLT"]


class RankAugmentedAttention(nn.Module):
    """RALA, ``proj((attention(q, k, v) + local(v)) * o)`` (eq. 5-9): (B, H, W, C) to the same.

    Args:
        dim: C.
        num_heads: heads, each of ``dim / num_heads`` channels, a multiple of 4.
    """

    def __init__(
        self, dim: int, num_heads: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        if dim % num_heads or dim // num_heads % 4:
            raise ValueError(f"dim {dim} over {num_heads} heads is no multiple of 4, as the rotation needs.")
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.rotary_base = 10000.0
        self.qkvo = nn.Linear(dim, 4 * dim, device=device, dtype=dtype)
        self.lepe = DepthwiseConv2d(dim, 5, device=device, dtype=dtype)
        self.proj = nn.Linear(dim, dim, device=device, dtype=dtype)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, local: Tensor, gate: Tensor, height: int, width: int) -> Tensor:
        """(B, N, heads, head_dim) each, to the same: attention with rotation, local term and gate."""
        return linear_attention(q, k, v, "elu+1", True, (height, width), self.rotary_base, local, gate)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same."""
        B, H, W, C = x.shape
        q, k, v, gate = self.qkvo(x).view(B, H * W, 4, self.num_heads, self.head_dim).unbind(2)
        local = self.lepe(v.reshape(B, H, W, C)).view(B, H * W, self.num_heads, self.head_dim)
        return self.proj(self.attend(q, k, v, local, gate, H, W).reshape(B, H, W, C))


class RotarySoftmaxAttention(RankAugmentedAttention):
    """The same layer with softmax attention."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, local: Tensor, gate: Tensor, height: int, width: int) -> Tensor:
        """(B, N, heads, head_dim) each, to the same."""
        angles = rotary_angles(height, width, self.head_dim, self.rotary_base, q.device)
        cos, sin = angles.cos(), angles.sin()  # float32: half precision would blur the angles of a large map
        q, k = (rotate(x.transpose(1, 2), cos, sin).to(x.dtype) for x in (q, k))
        out = F.scaled_dot_product_attention(q, k, v.transpose(1, 2)).transpose(1, 2)
        return (out + local) * gate


class Block(nn.Module):
    """Positional convolution, attention, feed-forward layer: (B, H, W, C) to the same."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        attention: str,
        drop_path: float,
        init_values: float,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.pos = DepthwiseConv2d(dim, 3, residual=True, **dd)
        self.norm1 = nn.LayerNorm(dim, 1e-6, **dd)
        self.mixer = ATTENTIONS[attention](dim, num_heads, **dd)
        self.ls1 = LayerScale(dim, init_values, **dd)
        self.drop_path1 = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim, 1e-6, **dd)
        self.mlp = DepthwiseMlp(dim, int(dim * mlp_ratio), residual=True, **dd)
        self.ls2 = LayerScale(dim, init_values, **dd)
        self.drop_path2 = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same."""
        x = self.pos(x)
        x = x + self.drop_path1(self.ls1(self.mixer(self.norm1(x))))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))

    @torch.jit.ignore
    def fuse(self) -> nn.Module:
        """Fold the layer scales into the layers before them."""
        fold_after(self.mixer.proj, self.ls1.gamma)
        fold_after(self.mlp.fc2, self.ls2.gamma)
        self.ls1, self.ls2 = nn.Identity(), nn.Identity()
        return self


ATTENTIONS = {"linear": RankAugmentedAttention, "softmax": RotarySoftmaxAttention}


class FinalProjection(nn.Module):
    """Linear, batch norm, SiLU: (B, H, W, C) to (B, H, W, out_dim)."""

    def __init__(
        self, dim: int, out_dim: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, out_dim, device=device, dtype=dtype)
        self.norm = nn.BatchNorm2d(out_dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to (B, H, W, out_dim)."""
        return F.silu(self.norm(self.proj(x).permute(0, 3, 1, 2))).permute(0, 2, 3, 1)

    @torch.jit.ignore
    def fuse(self) -> nn.Module:
        """Fold the norm into the projection."""
        fold_after(self.proj, *affine(self.norm))
        self.norm = nn.Identity()
        return self


class RAVLT(Backbone):
    """RAVLT.

    Args:
        in_chans: channels of the pictures.
        num_classes: outputs; 0 for pooled features.
        global_pool: pooling before the classifier.
        dims: channels of the stages.
        depths: blocks of the stages.
        num_heads: attention heads of the stages.
        attention: "linear" or "softmax" for each stage.
        mlp_ratio: hidden channels of the feed-forward layers over channels.
        init_values: first value of the layer scales, for each stage.
        projection: channels after the last stage, which the classifier gets.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth, from 0 at the first block to this at the last.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (1, 2, 4, 8),
        attention: Sequence[str] = ("linear", "linear", "softmax", "softmax"),
        mlp_ratio: float = 3.5,
        init_values: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
        projection: int = 1024,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        rates = calculate_drop_path_rates(drop_path_rate, depths, stagewise=True)
        stages = []
        for i, (dim, stage_rates) in enumerate(zip(dims, rates, strict=True)):
            blocks = [
                Block(dim, num_heads[i], mlp_ratio, attention[i], rate, init_values[i], **dd) for rate in stage_rates
            ]
            stages.append(Stage(dim, blocks, ConvNorm(dims[i - 1], dim, 3, 2, **dd) if i else None))
        half = dims[0] // 2
        stem = nn.Sequential(
            ConvNorm(in_chans, half, 3, 2, act=True, **dd),
            ConvNorm(half, half, 3, act=True, **dd),
            ConvNorm(half, half, 3, act=True, **dd),
            ConvNorm(half, dims[0], 3, 2, **dd),
        )
        norm = FinalProjection(dims[-1], projection, **dd)
        super().__init__(stem, stages, norm, projection, in_chans, num_classes, global_pool, drop_rate, **dd)

    @staticmethod
    def init_module(module: nn.Module) -> None:
        """Every convolution, also the 1x1 ones, truncated normal with deviation 0.02; biases 0."""
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)


# The authors' names as patterns, and ours. Their downsampling ends a stage, ours begins the next.
_RENAMES = (
    (r"^patch_embed\.proj\.([0369])\.", lambda m: f"stem.{int(m[1]) // 3}.conv."),
    (r"^patch_embed\.proj\.(1|4|7|10)\.", lambda m: f"stem.{int(m[1]) // 3}.norm."),
    (r"^layers\.(\d)\.downsample\.reduction\.", lambda m: f"stages.{int(m[1]) + 1}.downsample.conv."),
    (r"^layers\.(\d)\.downsample\.norm\.", lambda m: f"stages.{int(m[1]) + 1}.downsample.norm."),
    (r"^layers\.", "stages."),
    (r"\.gamma_(\d)$", r".ls\1.gamma"),
    (r"\.norm(\d)\.norm\.", r".norm\1."),
    (r"\.attn\.", ".mixer."),
    (r"\.ffn\.dwconv\.", ".mlp.conv."),
    (r"\.ffn\.", ".mlp."),
    (r"^norm\.", "norm.norm."),
    (r"^proj\.", "norm.proj."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
)


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The authors' checkpoint in our names; a checkpoint in our names as it is."""
    if not any(key.startswith(("patch_embed.", "layers.")) for key in state_dict):
        return state_dict
    renamed = {}
    for key, tensor in state_dict.items():
        if key.endswith(".RoPE.angle"):  # a constant
            continue
        for pattern, name in _RENAMES:
            key = re.sub(pattern, name, key)
        if re.search(r"(qkvo|proj|fc\d?)\.weight$", key) and tensor.ndim == 4:
            tensor = tensor[:, :, 0, 0]  # a 1x1 convolution is a matrix product
        elif key.endswith(".gamma"):
            tensor = tensor.flatten()
        renamed[key] = tensor
    return renamed


_cfg = partial(
    imagenet_cfg,
    first_conv="stem.0.conv",
    license="mit",
    paper_name="Breaking the Low-Rank Dilemma of Linear Attention",
    paper_ids="arXiv:2411.07635",
    origin_url="https://github.com/qhfan/RALA",
)


_URL = "https://huggingface.co/aldjalkdf/RAVLT/resolve/main/RAVLT_{}.pth"

default_cfgs = generate_default_cfgs(
    {
        "ravlt_tiny.in1k": _cfg(url=_URL.format("T")),
        "ravlt_small.in1k": _cfg(url=_URL.format("S")),
        "ravlt_base.in1k": _cfg(url=_URL.format("B")),
        "ravlt_large.in1k": _cfg(url=_URL.format("L")),
        "ravlt_nano.quickstart": _cfg(**QUICKSTART),
        "test_ravlt.untrained": _cfg(160),
    }
)


def _create_ravlt(variant: str, pretrained: bool, **kwargs: Any) -> RAVLT:
    return build(RAVLT, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **kwargs)


@register_model
def ravlt_tiny(pretrained: bool = False, **kwargs: Any) -> RAVLT:
    """RAVLT-T, 14.9 M parameters."""
    args = {"dims": (64, 128, 256, 512), "depths": (2, 2, 6, 2), "num_heads": (1, 2, 4, 8)}
    return _create_ravlt("ravlt_tiny", pretrained, **{**args, **kwargs})


@register_model
def ravlt_small(pretrained: bool = False, **kwargs: Any) -> RAVLT:
    """RAVLT-S, 25.6 M parameters."""
    args = {"dims": (64, 128, 320, 512), "depths": (3, 5, 9, 3), "num_heads": (1, 2, 5, 8)}
    return _create_ravlt("ravlt_small", pretrained, **{**args, **kwargs})


@register_model
def ravlt_base(pretrained: bool = False, **kwargs: Any) -> RAVLT:
    """RAVLT-B, 48.2 M parameters."""
    args = {
        "dims": (96, 192, 384, 512),
        "depths": (4, 6, 12, 6),
        "num_heads": (1, 2, 6, 8),
        "init_values": (1.0, 1.0, 1e-6, 1e-6),
    }
    return _create_ravlt("ravlt_base", pretrained, **{**args, **kwargs})


@register_model
def ravlt_large(pretrained: bool = False, **kwargs: Any) -> RAVLT:
    """RAVLT-L, 95.2 M parameters."""
    args = {
        "dims": (96, 192, 448, 640),
        "depths": (4, 7, 19, 8),
        "num_heads": (1, 2, 7, 10),
        "init_values": (1e-6, 1e-6, 1e-6, 1e-6),
    }
    return _create_ravlt("ravlt_large", pretrained, **{**args, **kwargs})


@register_model
def ravlt_nano(pretrained: bool = False, **kwargs: Any) -> RAVLT:
    """A small RAVLT of this zoo, for quick training."""
    args = {"dims": (32, 64, 128, 192), "depths": (2, 2, 5, 2), "num_heads": (1, 2, 4, 6), "projection": 320}
    return _create_ravlt("ravlt_nano", pretrained, **{**args, **kwargs})


@register_model
def test_ravlt(pretrained: bool = False, **kwargs: Any) -> RAVLT:
    """A tiny RAVLT for tests."""
    args = {"dims": (8, 16, 24, 32), "depths": (1, 1, 2, 1), "num_heads": (1, 2, 3, 4), "projection": 64}
    return _create_ravlt("test_ravlt", pretrained, **{**args, **kwargs})
