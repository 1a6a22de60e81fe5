"""ViG: Vision Gated linear attention, plain and hierarchical.

Liao, Wang, Zhu, Zhang, Liu, Wang: ViG: Linear-complexity Visual Sequence Learning with Gated Linear Attention,
AAAI 2025, arXiv:2405.18425. The authors' code is under MIT: https://github.com/hustvl/ViG.

The token mixer runs gated linear attention over the tokens in row-major order and in reverse, each direction with
decays of its own, and blends the result with a 3x3 depthwise convolution. The plain body, ``vig_*``, keeps one
resolution; the hierarchical one, ``vig_h_*``, halves it three times.
"""

import math
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import calculate_drop_path_rates
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from zoo.backbones.bodies.block import Block, ConvEmbed, grid_of, init_linear
from zoo.backbones.layers.conv import DepthwiseConv2d
from zoo.backbones.layers.mlp import swiglu
from zoo.backbones.layers.norm import RMSNorm
from zoo.backbones.layers.position import PositionTable, resize_tables
from zoo.backbones.model import QUICKSTART, Backbone, Stage, build, imagenet_cfg
from zoo.kernels import bidirectional_gated_linear_attention

__all__ = ["HierViG", "ViG"]

LayerNorm = partial(nn.LayerNorm, eps=1e-5)


class GatedLinearMixer(nn.Module):
    """Bidirectional gated linear attention with gated locality: (B, H, W, C) to the same.

    With everything after the convolution linear in s::

        s = act(local(x))
        o = attention(q, k, v, log_decay)                both directions, logsigmoid(decay) / 16
        w = sigmoid(gate)
        y = proj(act(w * norm_global(o) + (1 - w) * norm_local(s)))

    Args:
        dim: C; queries and keys have C / 2 channels in all.
        num_heads: heads of the attention and of both norms.
        out_scale: of the attention, besides 1 / sqrt(head_dim): the norm after it takes it back but for its eps.
        act: SiLU for act; else nothing.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        out_scale: float,
        act: bool,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        if dim % (2 * num_heads):
            raise ValueError(f"dim is {dim}, expected a multiple of 2 x {num_heads} heads.")
        rank = 16
        self.num_heads = num_heads
        self.scale = out_scale * (dim // num_heads // 2) ** -0.5
        self.decay_divisor = 16
        self.local = DepthwiseConv2d(dim, 3, bias=False, **dd)
        self.act = nn.SiLU() if act else nn.Identity()
        self.qkv = nn.Linear(dim, 2 * dim, bias=False, **dd)
        self.decay = nn.Sequential(nn.Linear(dim, rank, bias=False, **dd), nn.Linear(rank, dim, **dd))
        self.gate = nn.Linear(dim, dim, **dd)
        self.norm_global = RMSNorm(dim // num_heads, 1e-6, **dd)
        self.norm_local = RMSNorm(dim // num_heads, 1e-6, **dd)
        self.proj = nn.Linear(dim, dim, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same."""
        B, H, W, C = x.shape
        s = self.act(self.local(x)).view(B, H * W, C)
        q, k, v = self.qkv(s).split([C // 2, C // 2, C], -1)
        log_decay = F.logsigmoid(self.decay(s)) / self.decay_divisor
        ahead, back = log_decay.split([C // 2, C // 2], -1)
        out = bidirectional_gated_linear_attention(
            self.heads(q), self.heads(k), self.heads(v), self.heads(ahead), self.heads(back), self.scale
        )
        local = self.norm_local(self.heads(s))
        out = local + self.heads(self.gate(s).sigmoid()) * (self.norm_global(out) - local)
        return self.proj(self.act(out).view(B, H, W, C))

    def heads(self, x: Tensor) -> Tensor:
        """(B, N, C) to (B, N, heads, C / heads)."""
        return x.unflatten(-1, [self.num_heads, -1])


class ViG(Backbone):
    """Plain ViG: one token for 16 x 16 pixels throughout; its stages are equal parts of the depth.

    Args:
        img_size: size of the pictures that the table of positions is made for, in pixels; others resize it.
        in_chans: channels of the pictures.
        num_classes: outputs; 0 for pooled features.
        global_pool: pooling before the classifier.
        dim: channels.
        depths: blocks of the stages.
        num_heads: attention heads.
        mixer_act: SiLU in the mixers.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth, from 0 at the first block to this at the last.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        dim: int = 192,
        depths: Sequence[int] = (3, 3, 3, 3),
        num_heads: int = 3,
        mixer_act: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        norm = partial(RMSNorm, eps=1e-6)
        stages = []
        for rates in calculate_drop_path_rates(drop_path_rate, depths, stagewise=True):
            blocks = [
                Block(
                    dim,
                    GatedLinearMixer(dim, num_heads, 1 / 4, mixer_act, **dd),
                    swiglu(dim, 8 / 3, 256, **dd),
                    norm,
                    rate,
                    **dd,
                )
                for rate in rates
            ]
            stages.append(Stage(dim, blocks))
        stem = nn.Sequential(
            ConvEmbed(in_chans, dim // 2, 9, 8, 1, LayerNorm, **dd),
            nn.SiLU(),
            ConvEmbed(dim // 2, dim, 3, 2, 1, LayerNorm, **dd),
            PositionTable(dim, grid_of(img_size, 16), "bicubic", **dd),
        )
        reductions = [16] * len(depths)
        super().__init__(
            stem, stages, norm(dim, **dd), dim, in_chans, num_classes, global_pool, drop_rate, reductions, **dd
        )

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """As of ``Backbone``; the mixers' projections begin small, Xavier uniform with gain 2 ** -2.5."""
        super().init_weights(needs_reset)
        for mixer in self.modules():
            if isinstance(mixer, GatedLinearMixer):
                for layer in mixer.modules():
                    if isinstance(layer, nn.Linear):
                        nn.init.xavier_uniform_(layer.weight, 2**-2.5)

    @staticmethod
    def init_module(module: nn.Module) -> None:
        """Linear layers normal with deviation 0.02, biases 0; depthwise convolutions as the mixers' projections."""
        init_linear(module)
        if isinstance(module, DepthwiseConv2d):
            nn.init.xavier_uniform_(module.weight, 2**-2.5)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """The table of positions."""
        return {"stem.3.table"}


class HierViG(Backbone):
    """Hierarchical ViG, without positions besides those that its convolutions see.

    Args:
        in_chans: channels of the pictures.
        num_classes: outputs; 0 for pooled features.
        global_pool: pooling before the classifier.
        dims: channels of the stages.
        depths: blocks of the stages.
        num_heads: attention heads of the stages.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth, from 0 at the first block to this at the last.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        dims: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (2, 2, 5, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        rates = calculate_drop_path_rates(drop_path_rate, depths, stagewise=True)
        stages = []
        for i, (dim, heads, stage_rates) in enumerate(zip(dims, num_heads, rates, strict=True)):
            blocks = [
                Block(
                    dim,
                    GatedLinearMixer(dim, heads, 1 / 2, False, **dd),
                    swiglu(dim, 8 / 3, 32, **dd),
                    LayerNorm,
                    rate,
                    **dd,
                )
                for rate in stage_rates
            ]
            downsample = ConvEmbed(dims[i - 1], dim, 3, 2, 1, LayerNorm, **dd) if i else None
            stages.append(Stage(dim, blocks, downsample))
        stem = nn.Sequential(
            ConvEmbed(in_chans, dims[0] // 2, 3, 2, 1, LayerNorm, **dd),
            nn.GELU(),
            ConvEmbed(dims[0] // 2, dims[0], 3, 2, 1, LayerNorm, **dd),
        )
        norm = LayerNorm(dims[-1], **dd)
        super().__init__(stem, stages, norm, dims[-1], in_chans, num_classes, global_pool, drop_rate, **dd)

    init_module = staticmethod(ViG.init_module)


# Numbers of the stem's layers in the authors' names, of the plain and of the hierarchical body.
_STEM = {
    **{"proj.0": "0.conv", "proj.1": "0.norm", "proj.3": "2.conv", "proj.4": "2.norm"},
    **{"0": "0.conv", "2": "0.norm", "5": "2.conv", "7": "2.norm"},
}
# The authors' names as patterns, and ours. Their downsampling ends a stage, ours begins the next.
_RENAMES: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...] = (
    (r"^patch_embed\.((?:proj\.)?\d)\.", lambda m: f"stem.{_STEM.get(m[1], m[1])}."),
    (r"^pos_embed$", "stem.3.table"),
    (r"^layers\.(\d)\.downsample\.1\.", lambda m: f"stages.{int(m[1]) + 1}.downsample.conv."),
    (r"^layers\.(\d)\.downsample\.3\.", lambda m: f"stages.{int(m[1]) + 1}.downsample.norm."),
    (r"^layers\.", "stages."),
    (r"(\.blocks\.\d+)\.(attn_norm|norm|ln_1)\.", r"\1.norm1."),
    (r"\.mlp_norm\.", ".norm2."),
    (r"\.(attn|op|self_attention)\.", ".mixer."),
    (r"\.in_proj\.0\.", ".local."),
    (r"\.qkv_proj\.", ".qkv."),
    (r"\.gk_proj\.", ".decay."),
    (r"\.g_proj\.", ".gate."),
    (r"\.g_norm\.", ".norm_global."),
    (r"\.l_norm\.", ".norm_local."),
    (r"\.o_proj\.", ".proj."),
    (r"\.gate_proj\.", ".fc1."),
    (r"\.down_proj\.", ".fc2."),
    (r"^(classifier\.)?norm\.", "norm."),
    (r"^(classifier\.)?head\.", "head.fc."),
)


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The authors' checkpoint, of either body, in our names; one in our names as it is, but for the table's size."""
    if not any(key.startswith("patch_embed.") for key in state_dict):
        return resize_tables(state_dict, model)
    places = [f"stages.{i}.blocks.{j}" for i, stage in enumerate(model.stages) for j in range(len(stage.blocks))]
    numbered = {f"blocks.{number}": place for number, place in enumerate(places)}
    renamed = {}
    for key, tensor in state_dict.items():
        key = re.sub(r"^blocks\.\d+", lambda m: numbered.get(m[0], m[0]), key)
        for pattern, name in _RENAMES:
            key = re.sub(pattern, name, key)
        if re.search(r"\.(qkv|decay\.\d|gate|proj|fc\d)\.weight$", key) and tensor.ndim == 4:
            tensor = tensor[:, :, 0, 0]  # a 1x1 convolution is a matrix product
        elif key == "stem.3.table" and tensor.ndim == 3:
            tensor = tensor.unflatten(1, (math.isqrt(tensor.shape[1]), -1))  # tables of square maps
        renamed[key] = tensor
    return resize_tables(renamed, model)


_cfg = partial(
    imagenet_cfg,
    first_conv="stem.0.conv",
    license="mit",
    paper_name="ViG: Linear-complexity Visual Sequence Learning with Gated Linear Attention",
    paper_ids="arXiv:2405.18425",
    origin_url="https://github.com/hustvl/ViG",
)


# The authors' weights are at https://huggingface.co/hustvl/ViG, under file names that they do not give.
default_cfgs = generate_default_cfgs(
    {
        "vig_tiny.in1k": _cfg(pool_size=(14, 14)),
        "vig_small.in1k": _cfg(pool_size=(14, 14)),
        "vig_base.in1k": _cfg(pool_size=(14, 14)),
        "vig_h_tiny.in1k": _cfg(),
        "vig_h_small.in1k": _cfg(),
        "vig_h_base.in1k": _cfg(),
        "vig_nano.quickstart": _cfg(**QUICKSTART),
        "test_vig.untrained": _cfg(160, pool_size=(10, 10)),
        "test_vig_h.untrained": _cfg(160),
    }
)


def _create_vig(variant: str, pretrained: bool, **kwargs: Any) -> ViG:
    return build(ViG, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **kwargs)


def _create_vig_h(variant: str, pretrained: bool, **kwargs: Any) -> HierViG:
    return build(HierViG, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **kwargs)


@register_model
def vig_tiny(pretrained: bool = False, **kwargs: Any) -> ViG:
    """ViG-T, 5.8 M parameters; alone of all it has activations in the mixers."""
    args = {"dim": 192, "num_heads": 3, "mixer_act": True}
    return _create_vig("vig_tiny", pretrained, **{**args, **kwargs})


@register_model
def vig_small(pretrained: bool = False, **kwargs: Any) -> ViG:
    """ViG-S, 22.6 M parameters."""
    args = {"dim": 384, "num_heads": 6}
    return _create_vig("vig_small", pretrained, **{**args, **kwargs})


@register_model
def vig_base(pretrained: bool = False, **kwargs: Any) -> ViG:
    """ViG-B, 89.0 M parameters."""
    args = {"dim": 768, "num_heads": 12}
    return _create_vig("vig_base", pretrained, **{**args, **kwargs})


@register_model
def vig_h_tiny(pretrained: bool = False, **kwargs: Any) -> HierViG:
    """ViG-H-T, hierarchical, 28.6 M parameters."""
    args = {"dims": (96, 192, 384, 768), "depths": (2, 2, 5, 2), "num_heads": (3, 6, 12, 24)}
    return _create_vig_h("vig_h_tiny", pretrained, **{**args, **kwargs})


@register_model
def vig_h_small(pretrained: bool = False, **kwargs: Any) -> HierViG:
    """ViG-H-S, hierarchical, 50.1 M parameters."""
    args = {"dims": (96, 192, 384, 768), "depths": (2, 2, 17, 2), "num_heads": (3, 6, 12, 24)}
    return _create_vig_h("vig_h_small", pretrained, **{**args, **kwargs})


@register_model
def vig_h_base(pretrained: bool = False, **kwargs: Any) -> HierViG:
    """ViG-H-B, hierarchical, 88.9 M parameters."""
    args = {"dims": (128, 256, 512, 1024), "depths": (2, 2, 17, 2), "num_heads": (4, 8, 16, 32)}
    return _create_vig_h("vig_h_base", pretrained, **{**args, **kwargs})


@register_model
def vig_nano(pretrained: bool = False, **kwargs: Any) -> HierViG:
    """A small ViG of this zoo, for quick training; hierarchical, since small pictures have few patches of 16 x 16."""
    args = {"dims": (32, 64, 128, 192), "depths": (2, 2, 6, 2), "num_heads": (1, 2, 4, 6)}
    return _create_vig_h("vig_nano", pretrained, **{**args, **kwargs})


@register_model
def test_vig(pretrained: bool = False, **kwargs: Any) -> ViG:
    """A tiny plain ViG for tests."""
    args = {"dim": 32, "depths": (1, 1, 2, 1), "num_heads": 2, "mixer_act": True, "img_size": 160}
    return _create_vig("test_vig", pretrained, **{**args, **kwargs})


@register_model
def test_vig_h(pretrained: bool = False, **kwargs: Any) -> HierViG:
    """A tiny hierarchical ViG for tests."""
    args = {"dims": (8, 16, 24, 32), "depths": (1, 1, 2, 1), "num_heads": (1, 2, 3, 4)}
    return _create_vig_h("test_vig_h", pretrained, **{**args, **kwargs})
