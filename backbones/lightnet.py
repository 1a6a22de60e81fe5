"""LightNet: linear attention with an additive recurrence, which needs one scan for any number of axes.

Qin, Mao, Shen, Li, Zhang, Dai, Zhong: You Only Scan Once: Efficient Multi-dimension Sequential Modeling with LightNet,
arXiv:2405.21022. No code or weights of the authors' image models were at hand. This file is a reconstruction from
descriptions of the paper and from the authors' later libraries for language and tokenizers:

- As described: the additive recurrence with the decay tied to the keys (a softmax of the keys over all tokens),
  ``q = SiLU(.)``, a low-rank output gate, GLU channel mixing, pre-norm RMSNorm, MD-TPE once after the patch embedding,
  MD-LRPE on the queries and the normalised keys.
- Reconstructed: patches of 16, depth 12, heads of 64 channels, the rank 64 of the gate, ``RMSNorm(o) * SiLU(gate)``,
  the frequencies of MD-LRPE, and all of MD-TPE's inside: one decay for each head, in one direction of each axis, and an
  output projection of low rank. The ranks were chosen for models of 6.0, 22.6 and 87.7 M parameters, the sizes that the
  paper is said to report; its table was not at hand.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import calculate_drop_path_rates
from timm.models import generate_default_cfgs, register_model, register_notrace_function
from torch import Tensor, nn

from zoo.backbones.bodies.block import Block
from zoo.backbones.layers.mlp import swiglu
from zoo.backbones.layers.norm import RMSNorm
from zoo.backbones.model import QUICKSTART, Backbone, Stage, build, imagenet_cfg
from zoo.kernels import linear_attention
from zoo.kernels.library import accumulation_dtype

__all__ = ["LightNet"]


class LowRankLinear(nn.Sequential):
    """Two matrices without anything between them: (..., dim) to the same."""

    def __init__(
        self, dim: int, rank: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(
            nn.Linear(dim, rank, bias=False, device=device, dtype=dtype),
            nn.Linear(rank, dim, bias=False, device=device, dtype=dtype),
        )


class AdditiveAttention(nn.Module):
    """``proj(norm(attention(SiLU(q), k, v)) * SiLU(gate))``: (B, H, W, C) to the same.

    Attention is linear with keys normalised over the tokens, which the additive recurrence leaves after its one scan;
    queries and normalised keys turn with MD-LRPE.

    Args:
        dim: C.
        num_heads: heads, each of ``dim / num_heads`` channels, a multiple of 4.
        gate_rank: of the two matrices of the gate.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        gate_rank: int,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if dim % num_heads or dim // num_heads % 4:
            raise ValueError(f"dim {dim} over {num_heads} heads is no multiple of 4, as the rotation needs.")
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False, device=device, dtype=dtype)
        self.gate = LowRankLinear(dim, gate_rank, device=device, dtype=dtype)
        self.norm = RMSNorm(dim, 1e-6, device=device, dtype=dtype)
        self.proj = nn.Linear(dim, dim, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same."""
        B, H, W, C = x.shape
        q, k, v = self.qkv(x).view(B, H * W, 3, self.num_heads, self.head_dim).unbind(2)
        out = linear_attention(q, k, v, "silu", grid=(H, W), normalisation="keys", rotary_across_heads=True)
        return self.proj(self.norm(out.reshape(B, H, W, C)) * F.silu(self.gate(x)))


@register_notrace_function
def toeplitz(scale: Tensor, log_decay: Tensor, length: int) -> Tensor:
    """The matrices ``scale sigmoid(log_decay) ** (t - s)`` for s <= t, 0 elsewhere: (heads,) to (heads, L, L).

    The powers are taken in float32 or better; the result has the dtype of ``scale``.
    """
    steps = torch.arange(length, device=scale.device, dtype=accumulation_dtype(scale.dtype))
    log_lambda = F.logsigmoid(log_decay.to(steps.dtype))[:, None, None]
    powers = torch.exp(log_lambda * (steps[:, None] - steps).relu()).tril()
    return (scale[:, None, None] * powers).to(scale.dtype)


class ToeplitzEncoding(nn.Module):
    """TPE along one axis: ``proj(norm(y)), y_t = (q . k) sum_{s <= t} lambda ** (t - s) x_s`` in every head.

    The sum is a product with a triangular Toeplitz matrix, L multiply-accumulates for each number of an axis of L
    tokens. lambda = sigmoid(log_decay).

    Args:
        dim: channels.
        num_heads: heads, each with a decay.
        rank: of the two matrices of the output projection.
    """

    def __init__(
        self, dim: int, num_heads: int, rank: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.q = nn.Parameter(torch.empty(dim, **dd))
        self.k = nn.Parameter(torch.empty(dim, **dd))
        self.log_decay = nn.Parameter(torch.empty(num_heads, **dd))
        self.norm = RMSNorm(dim, 1e-6, **dd)
        self.proj = LowRankLinear(dim, rank, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(B, M, L, C) to the same, along L."""
        B, M, L, C = x.shape
        x = x.reshape(B, M, L, self.num_heads, C // self.num_heads)
        scale = (self.q * self.k).view(self.num_heads, -1).sum(1)
        y = torch.einsum("hts,bmshd->bmthd", toeplitz(scale, self.log_decay, L).to(x.dtype), x)
        return self.proj(self.norm(y.reshape(B, M, L, C)))


class Stem(nn.Module):
    """Patch embedding, then MD-TPE in its place: the sum of the encodings along rows and columns.

    Pictures (B, H, W, in_chans), padded with zeros at the right and the bottom, to (B, ceil(H / p), ceil(W / p), dim).
    """

    def __init__(
        self,
        in_chans: int,
        dim: int,
        patch_size: int,
        num_heads: int,
        rank: int,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.patch_size = patch_size
        self.conv = nn.Conv2d(in_chans, dim, patch_size, patch_size, **dd)
        self.along_rows = ToeplitzEncoding(dim, num_heads, rank, **dd)
        self.along_columns = ToeplitzEncoding(dim, num_heads, rank, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, in_chans) to (B, ceil(H / p), ceil(W / p), dim)."""
        H, W = x.shape[1], x.shape[2]
        x = F.pad(x.permute(0, 3, 1, 2), (0, -W % self.patch_size, 0, -H % self.patch_size))
        x = self.conv(x).permute(0, 2, 3, 1)
        return self.along_rows(x) + self.along_columns(x.transpose(1, 2)).transpose(1, 2)


class LightNet(Backbone):
    """LightNet: one resolution throughout; its stages are equal parts of the depth.

    Args:
        in_chans: channels of the pictures.
        num_classes: outputs; 0 for pooled features.
        global_pool: pooling before the classifier.
        patch_size: side of a token in pixels.
        dim: channels.
        depths: blocks of the stages.
        num_heads: attention heads.
        gate_rank: of the output gates and of the projections of MD-TPE.
        mlp_ratio: hidden channels of the GLU over channels, rounded up to a multiple of 32.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth, from 0 at the first block to this at the last.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        patch_size: int = 16,
        dim: int = 192,
        depths: Sequence[int] = (3, 3, 3, 3),
        num_heads: int = 3,
        gate_rank: int = 64,
        mlp_ratio: float = 8 / 3,
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
                    AdditiveAttention(dim, num_heads, gate_rank, **dd),
                    swiglu(dim, mlp_ratio, 32, **dd),
                    norm,
                    rate,
                    **dd,
                )
                for rate in rates
            ]
            stages.append(Stage(dim, blocks))
        stem = Stem(in_chans, dim, patch_size, num_heads, gate_rank, **dd)
        final, reductions = norm(dim, **dd), [patch_size] * len(depths)
        super().__init__(stem, stages, final, dim, in_chans, num_classes, global_pool, drop_rate, reductions, **dd)

    @staticmethod
    def init_module(module: nn.Module) -> None:
        """Matrices truncated normal with deviation 0.02, biases 0; MD-TPE begins with q . k = 1 and mixed decays."""
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, ToeplitzEncoding):
            nn.init.constant_(module.q, (module.num_heads / module.q.numel()) ** 0.5)
            nn.init.constant_(module.k, (module.num_heads / module.k.numel()) ** 0.5)
            nn.init.uniform_(module.log_decay, 0, 4)


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The checkpoint as it is: the authors' names are not known."""
    return state_dict


_cfg = partial(
    imagenet_cfg,
    pool_size=(14, 14),
    crop_pct=0.9,
    license="apache-2.0",
    paper_name="You Only Scan Once: Efficient Multi-dimension Sequential Modeling with LightNet",
    paper_ids="arXiv:2405.21022",
)


default_cfgs = generate_default_cfgs(
    {
        "lightnet_tiny.untrained": _cfg(),
        "lightnet_small.untrained": _cfg(),
        "lightnet_base.untrained": _cfg(),
        "lightnet_nano.quickstart": _cfg(**{**QUICKSTART, "pool_size": (12, 12)}),
        "test_lightnet.untrained": _cfg(160, pool_size=(10, 10)),
    }
)


def _create_lightnet(variant: str, pretrained: bool, **kwargs: Any) -> LightNet:
    return build(LightNet, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **kwargs)


@register_model
def lightnet_tiny(pretrained: bool = False, **kwargs: Any) -> LightNet:
    """LightNet-T, 6.0 M parameters; a reconstruction."""
    args = {"dim": 192, "num_heads": 3}
    return _create_lightnet("lightnet_tiny", pretrained, **{**args, **kwargs})


@register_model
def lightnet_small(pretrained: bool = False, **kwargs: Any) -> LightNet:
    """LightNet-S, 22.6 M parameters; a reconstruction."""
    args = {"dim": 384, "num_heads": 6}
    return _create_lightnet("lightnet_small", pretrained, **{**args, **kwargs})


@register_model
def lightnet_base(pretrained: bool = False, **kwargs: Any) -> LightNet:
    """LightNet-B, 87.7 M parameters; a reconstruction."""
    args = {"dim": 768, "num_heads": 12}
    return _create_lightnet("lightnet_base", pretrained, **{**args, **kwargs})


@register_model
def lightnet_nano(pretrained: bool = False, **kwargs: Any) -> LightNet:
    """A small LightNet of this zoo, for quick training; its patches of 8 suit small pictures."""
    args = {"patch_size": 8, "dim": 128, "depths": (2, 3, 3, 2), "num_heads": 4, "gate_rank": 32}
    return _create_lightnet("lightnet_nano", pretrained, **{**args, **kwargs})


@register_model
def test_lightnet(pretrained: bool = False, **kwargs: Any) -> LightNet:
    """A tiny LightNet for tests."""
    args = {"dim": 32, "depths": (1, 1, 2, 1), "num_heads": 2, "gate_rank": 8}
    return _create_lightnet("test_lightnet", pretrained, **{**args, **kwargs})
