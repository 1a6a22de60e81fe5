"""VAN: Visual Attention Network.

Guo, Lu, Liu, Cheng, Hu: Visual Attention Network, Computational Visual Media 2023, arXiv:2202.09741. The authors' code
and weights are under Apache-2.0: https://github.com/Visual-Attention-Network/VAN-Classification.

The token mixer is large kernel attention: a 21x21 convolution taken apart into a 5x5 depthwise, a dilated 7x7 depthwise
and a 1x1 convolution, whose result gates its input.
"""

import math
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from timm.data import IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
from timm.layers import DropPath, LayerScale, calculate_drop_path_rates
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from zoo.backbones.layers.conv import ConvNorm, DepthwiseConv2d
from zoo.backbones.layers.fold import affine, fold_after, fold_before
from zoo.backbones.layers.mlp import DepthwiseMlp
from zoo.backbones.model import QUICKSTART, Backbone, Stage, build, imagenet_cfg, packaged
from zoo.kernels import large_kernel_attention

__all__ = ["VAN"]


class LargeKernelAttention(nn.Module):
    """``x * mix(dilated(local(x)))`` (eq. 3-4): (B, H, W, C) to the same."""

    def __init__(self, dim: int, device: torch.device | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.local = DepthwiseConv2d(dim, 5, device=device, dtype=dtype)
        self.dilated = DepthwiseConv2d(dim, 7, dilation=3, device=device, dtype=dtype)
        self.mix = nn.Linear(dim, dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same."""
        return large_kernel_attention(
            x,
            self.local.weight,
            self.local.bias,
            self.dilated.weight,
            self.dilated.bias,
            self.mix.weight,
            self.mix.bias,
            self.dilated.dilation[0],
        )


class Mixer(nn.Module):
    """Linear, GELU, large kernel attention, linear, and a skip connection around all: (B, H, W, C) to the same."""

    def __init__(self, dim: int, device: torch.device | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.proj_in = nn.Linear(dim, dim, device=device, dtype=dtype)
        self.act = nn.GELU()
        self.attn = LargeKernelAttention(dim, device=device, dtype=dtype)
        self.proj_out = nn.Linear(dim, dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same."""
        return x + self.proj_out(self.attn(self.act(self.proj_in(x))))


class Block(nn.Module):
    """Two residual branches, each with batch norm before and a layer scale after: (B, H, W, C) to the same."""

    def __init__(
        self,
        dim: int,
        mlp_ratio: float,
        drop_path: float,
        init_values: float,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.norm1 = nn.BatchNorm2d(dim, **dd)
        self.mixer = Mixer(dim, **dd)
        self.ls1 = LayerScale(dim, init_values, **dd)
        self.drop_path1 = DropPath(drop_path)
        self.norm2 = nn.BatchNorm2d(dim, **dd)
        self.mlp = DepthwiseMlp(dim, int(dim * mlp_ratio), **dd)
        self.ls2 = LayerScale(dim, init_values, **dd)
        self.drop_path2 = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same."""
        y = self.norm1(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        x = x + self.drop_path1(self.ls1(self.mixer(y)))
        y = self.norm2(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x + self.drop_path2(self.ls2(self.mlp(y)))

    @torch.jit.ignore
    def fuse(self) -> nn.Module:
        """The block for inference."""
        return FusedBlock(self)


class FusedBlock(nn.Module):
    """A block for inference: the norms and layer scales are in the linear layers, one of each also in ``skip``."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        scale, shift = affine(block.norm1)
        self.register_buffer("skip", (1 + block.ls1.gamma.double() * scale).to(block.ls1.gamma.dtype))
        self.proj_in, self.act = block.mixer.proj_in, block.mixer.act
        self.attn, self.proj_out = block.mixer.attn, block.mixer.proj_out
        self.mlp = block.mlp
        fold_before(self.proj_in, scale, shift)
        fold_after(self.proj_out, block.ls1.gamma, block.ls1.gamma.double() * shift)
        fold_before(self.mlp.fc1, *affine(block.norm2))
        fold_after(self.mlp.fc2, block.ls2.gamma)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same."""
        x = x * self.skip + self.proj_out(self.attn(self.act(self.proj_in(x))))
        return x + self.mlp(x)


class VAN(Backbone):
    """VAN; the feature map of a stage is what its layer norm puts out.

    Args:
        in_chans: channels of the pictures.
        num_classes: outputs; 0 for pooled features.
        global_pool: pooling before the classifier.
        dims: channels of the stages.
        depths: blocks of the stages.
        mlp_ratios: hidden channels of the feed-forward layers over channels.
        init_values: first value of the layer scales.
        norm_eps: of the layer norms; the authors' dense models use 1e-5.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth, from 0 at the first block to this at the last.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        dims: Sequence[int] = (32, 64, 160, 256),
        depths: Sequence[int] = (3, 3, 5, 2),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        init_values: float = 1e-2,
        norm_eps: float = 1e-6,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        rates = calculate_drop_path_rates(drop_path_rate, depths, stagewise=True)
        stages = []
        for i, (dim, ratio, stage_rates) in enumerate(zip(dims, mlp_ratios, rates, strict=True)):
            blocks = [Block(dim, ratio, rate, init_values, **dd) for rate in stage_rates]
            downsample = ConvNorm(dims[i - 1], dim, 3, 2, **dd) if i else None
            stages.append(Stage(dim, blocks, downsample, nn.LayerNorm(dim, norm_eps, **dd)))
        stem = ConvNorm(in_chans, dims[0], 7, 4, **dd)
        super().__init__(stem, stages, nn.Identity(), dims[-1], in_chans, num_classes, global_pool, drop_rate, **dd)

    @staticmethod
    def init_module(module: nn.Module) -> None:
        """Every convolution, also the 1x1 ones, normal with variance 2 / fan-out; biases 0."""
        if isinstance(module, nn.Conv2d | nn.Linear):
            fan_out = module.weight[0, 0].numel() * (module.weight.shape[0] // getattr(module, "groups", 1))
            nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
            nn.init.zeros_(module.bias)


# The authors' names, as patterns with a number of a stage that counts from 1, and ours.
_RENAMES: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...] = (
    (r"^patch_embed1\.proj", "stem.conv"),
    (r"^patch_embed1\.norm", "stem.norm"),
    (r"^patch_embed(\d)\.proj", lambda m: f"stages.{int(m[1]) - 1}.downsample.conv"),
    (r"^patch_embed(\d)\.norm", lambda m: f"stages.{int(m[1]) - 1}.downsample.norm"),
    (r"^block(\d)\.", lambda m: f"stages.{int(m[1]) - 1}.blocks."),
    (r"^norm(\d)\.", lambda m: f"stages.{int(m[1]) - 1}.norm."),
    (r"\.layer_scale_(\d)$", r".ls\1.gamma"),
    (r"\.attn\.proj_1\.", ".mixer.proj_in."),
    (r"\.attn\.proj_2\.", ".mixer.proj_out."),
    (r"\.attn\.spatial_gating_unit\.conv0\.", ".mixer.attn.local."),
    (r"\.attn\.spatial_gating_unit\.conv_spatial\.", ".mixer.attn.dilated."),
    (r"\.attn\.spatial_gating_unit\.conv1\.", ".mixer.attn.mix."),
    (r"\.mlp\.dwconv\.dwconv\.", ".mlp.conv."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
)


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The authors' checkpoint in our names; a checkpoint in our names as it is."""
    renamed = {}
    for key, tensor in state_dict.items():
        if not key.startswith(("stem.", "stages.")):
            for pattern, name in _RENAMES:
                key = re.sub(pattern, name, key)
            if re.search(r"\.(fc\d|proj_in|proj_out|mix)\.weight$", key) and tensor.ndim == 4:
                tensor = tensor[:, :, 0, 0]  # a 1x1 convolution is a matrix product
        renamed[key] = tensor
    return renamed


_cfg = partial(
    imagenet_cfg,
    crop_pct=0.9,
    mean=IMAGENET_INCEPTION_MEAN,
    std=IMAGENET_INCEPTION_STD,
    license="apache-2.0",
    paper_name="Visual Attention Network",
    paper_ids="arXiv:2202.09741",
    origin_url="https://github.com/Visual-Attention-Network/VAN-Classification",
)


_URL = "https://huggingface.co/Visual-Attention-Network/VAN-{}-original/resolve/main/van_{}.pth.tar"

default_cfgs = generate_default_cfgs(
    {
        "van_b0.in1k": _cfg(url=_URL.format("Tiny", "tiny_754")),
        "van_b1.in1k": _cfg(url=_URL.format("Small", "small_811")),
        "van_b2.in1k": _cfg(url=_URL.format("Base", "base_828")),
        "van_b3.in1k": _cfg(url=_URL.format("Large", "large_839")),
        "van_b4.untrained": _cfg(),
        "van_b5.untrained": _cfg(),
        "van_b6.untrained": _cfg(),
        "van_nano.quickstart": _cfg(**QUICKSTART, file=packaged("van_nano")),
        "test_van.untrained": _cfg(160),
    }
)


def _create_van(variant: str, pretrained: bool, **kwargs: Any) -> VAN:
    return build(VAN, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **kwargs)


@register_model
def van_b0(pretrained: bool = False, **kwargs: Any) -> VAN:
    """VAN-B0 (tiny), 4.1 M parameters."""
    args = {"dims": (32, 64, 160, 256), "depths": (3, 3, 5, 2)}
    return _create_van("van_b0", pretrained, **{**args, **kwargs})


@register_model
def van_b1(pretrained: bool = False, **kwargs: Any) -> VAN:
    """VAN-B1 (small), 13.9 M parameters."""
    args = {"dims": (64, 128, 320, 512), "depths": (2, 2, 4, 2)}
    return _create_van("van_b1", pretrained, **{**args, **kwargs})


@register_model
def van_b2(pretrained: bool = False, **kwargs: Any) -> VAN:
    """VAN-B2 (base), 26.6 M parameters."""
    args = {"dims": (64, 128, 320, 512), "depths": (3, 3, 12, 3)}
    return _create_van("van_b2", pretrained, **{**args, **kwargs})


@register_model
def van_b3(pretrained: bool = False, **kwargs: Any) -> VAN:
    """VAN-B3 (large), 44.8 M parameters."""
    args = {"dims": (64, 128, 320, 512), "depths": (3, 5, 27, 3)}
    return _create_van("van_b3", pretrained, **{**args, **kwargs})


@register_model
def van_b4(pretrained: bool = False, **kwargs: Any) -> VAN:
    """VAN-B4, 60.3 M parameters."""
    args = {"dims": (64, 128, 320, 512), "depths": (3, 6, 40, 3)}
    return _create_van("van_b4", pretrained, **{**args, **kwargs})


@register_model
def van_b5(pretrained: bool = False, **kwargs: Any) -> VAN:
    """VAN-B5, 90.0 M parameters."""
    args = {"dims": (96, 192, 480, 768), "depths": (3, 3, 24, 3)}
    return _create_van("van_b5", pretrained, **{**args, **kwargs})


@register_model
def van_b6(pretrained: bool = False, **kwargs: Any) -> VAN:
    """VAN-B6, 199.8 M parameters; its third stage has 384 channels, not 480."""
    args = {"dims": (96, 192, 384, 768), "depths": (6, 6, 90, 6)}
    return _create_van("van_b6", pretrained, **{**args, **kwargs})


@register_model
def van_nano(pretrained: bool = False, **kwargs: Any) -> VAN:
    """A small VAN of this zoo, for quick training."""
    args = {"dims": (32, 64, 128, 192), "depths": (2, 2, 6, 2)}
    return _create_van("van_nano", pretrained, **{**args, **kwargs})


@register_model
def test_van(pretrained: bool = False, **kwargs: Any) -> VAN:
    """A tiny VAN for tests."""
    args = {"dims": (8, 16, 24, 32), "depths": (1, 1, 2, 1)}
    return _create_van("test_van", pretrained, **{**args, **kwargs})
