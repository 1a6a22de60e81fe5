"""VAN and RAVLT as published: plain eager PyTorch on (B, C, H, W), under the names of the authors' checkpoints.

Written from the papers' formulas, apart from the zoo's models: a second opinion on their numbers, and the baseline of
their speed (``python -m zoo.tools.benchmark_models van_b0 tests/backbones/authors_maths.py:van_b0``).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def depthwise(dim: int, kernel: int, dilation: int = 1) -> nn.Conv2d:
    return nn.Conv2d(dim, dim, kernel, padding=dilation * (kernel // 2), dilation=dilation, groups=dim)


class LKA(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.conv0, self.conv_spatial = depthwise(dim, 5), depthwise(dim, 7, dilation=3)
        self.conv1 = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.conv1(self.conv_spatial(self.conv0(x)))


class VANAttention(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.proj_1, self.proj_2 = nn.Conv2d(dim, dim, 1), nn.Conv2d(dim, dim, 1)
        self.spatial_gating_unit = LKA(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj_2(self.spatial_gating_unit(F.gelu(self.proj_1(x)))) + x


class VANMlp(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(dim, hidden, 1), nn.Conv2d(hidden, dim, 1)
        self.dwconv = nn.ModuleDict({"dwconv": depthwise(hidden, 3)})

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.dwconv["dwconv"](self.fc1(x))))


class VANBlock(nn.Module):
    def __init__(self, dim: int, ratio: int):
        super().__init__()
        self.layer_scale_1, self.layer_scale_2 = (nn.Parameter(torch.full((dim,), 0.01)) for _ in range(2))
        self.norm1, self.attn = nn.BatchNorm2d(dim), VANAttention(dim)
        self.norm2, self.mlp = nn.BatchNorm2d(dim), VANMlp(dim, dim * ratio)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.layer_scale_1[:, None, None] * self.attn(self.norm1(x))
        return x + self.layer_scale_2[:, None, None] * self.mlp(self.norm2(x))


class VAN(nn.Module):
    def __init__(self, dims: tuple[int, ...], depths: tuple[int, ...]):
        super().__init__()
        for i, (dim, depth, ratio) in enumerate(zip(dims, depths, (8, 8, 4, 4)), start=1):
            conv = nn.Conv2d(dims[i - 2], dim, 3, 2, 1) if i > 1 else nn.Conv2d(3, dim, 7, 4, 3)
            setattr(self, f"patch_embed{i}", nn.ModuleDict({"proj": conv, "norm": nn.BatchNorm2d(dim)}))
            setattr(self, f"block{i}", nn.ModuleList(VANBlock(dim, ratio) for _ in range(depth)))
            setattr(self, f"norm{i}", nn.LayerNorm(dim, eps=1e-6))
        self.head = nn.Linear(dims[-1], 1000)

    def forward(self, x: Tensor) -> Tensor:
        for i in range(1, 5):
            embed = getattr(self, f"patch_embed{i}")
            x = embed["norm"](embed["proj"](x))
            for block in getattr(self, f"block{i}"):
                x = block(x)
            B, C, H, W = x.shape
            tokens = getattr(self, f"norm{i}")(x.flatten(2).transpose(1, 2))  # (B, N, C)
            x = tokens.transpose(1, 2).reshape(B, C, H, W).contiguous()
        return self.head(tokens.mean(1))


class ChannelNorm(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1).contiguous()).permute(0, 3, 1, 2).contiguous()


class RoPE(nn.Module):
    def __init__(self, head_dim: int):
        super().__init__()
        angle = 10000.0 ** -torch.linspace(0, 1, head_dim // 4)
        self.register_buffer("angle", angle.repeat_interleave(2))

    def forward(self, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Sines and cosines (N, head_dim): the first half of the channels turns by rows, the second by columns."""
        rows = (torch.arange(height, device=self.angle.device)[:, None] * self.angle)[:, None].expand(-1, width, -1)
        columns = (torch.arange(width, device=self.angle.device)[:, None] * self.angle)[None].expand(height, -1, -1)
        angles = torch.cat([rows, columns], -1).flatten(0, 1)
        return angles.sin(), angles.cos()


def turn(x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    return x * cos + torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2) * sin


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads, self.scale = heads, (dim // heads) ** -0.5
        self.qkvo, self.lepe, self.proj = nn.Conv2d(dim, 4 * dim, 1), depthwise(dim, 5), nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
        B, C, H, W = x.shape
        q, k, v, o = self.qkvo(x).chunk(4, 1)
        lepe = self.lepe(v)
        q, k, v = (t.reshape(B, self.heads, C // self.heads, H * W).transpose(2, 3) for t in (q, k, v))
        out = self.attend(q, k, v, sin, cos).transpose(2, 3).reshape(B, C, H, W)
        return self.proj((out + lepe) * o)


class SoftmaxAttention(Attention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
        scores = turn(q, sin, cos) @ turn(k, sin, cos).transpose(2, 3) * self.scale
        return scores.softmax(-1) @ v


class LinearAttention(Attention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
        N = q.shape[2]
        q, k = F.elu(q) + 1, F.elu(k) + 1
        weights = (self.scale * q.mean(2, keepdim=True) @ k.transpose(2, 3)).softmax(-1)  # (B, heads, 1, N)
        k = k * weights.transpose(2, 3) * N
        z = 1 / (q @ k.mean(2, keepdim=True).transpose(2, 3) + 1e-6)
        state = (turn(k, sin, cos).transpose(2, 3) * N**-0.5) @ (v * N**-0.5)
        return turn(q, sin, cos) @ state * z


class FFN(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1, self.fc2, self.dwconv = nn.Conv2d(dim, hidden, 1), nn.Conv2d(hidden, dim, 1), depthwise(hidden, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.fc1(x))
        return self.fc2(x + self.dwconv(x))


class RAVLTBlock(nn.Module):
    def __init__(self, dim: int, heads: int, linear: bool):
        super().__init__()
        self.gamma_1, self.gamma_2 = (nn.Parameter(torch.ones(1, dim, 1, 1)) for _ in range(2))
        self.pos, self.norm1, self.norm2 = depthwise(dim, 3), ChannelNorm(dim), ChannelNorm(dim)
        self.attn = (LinearAttention if linear else SoftmaxAttention)(dim, heads)
        self.ffn = FFN(dim, int(3.5 * dim))

    def forward(self, x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
        x = x + self.pos(x)
        x = x + self.gamma_1 * self.attn(self.norm1(x), sin, cos)
        return x + self.gamma_2 * self.ffn(self.norm2(x))


class RAVLT(nn.Module):
    def __init__(self, dims: tuple[int, ...], depths: tuple[int, ...], heads: tuple[int, ...]):
        super().__init__()
        half = dims[0] // 2
        stem = []
        for cin, cout, stride in ((3, half, 2), (half, half, 1), (half, half, 1), (half, dims[0], 2)):
            stem += [nn.Conv2d(cin, cout, 3, stride, 1), nn.BatchNorm2d(cout), nn.GELU()]
        self.patch_embed = nn.ModuleDict({"proj": nn.Sequential(*stem[:-1])})
        self.layers = nn.ModuleList()
        for i, dim in enumerate(dims):
            blocks = nn.ModuleList(RAVLTBlock(dim, heads[i], linear=i < 2) for _ in range(depths[i]))
            layer = nn.ModuleDict({"RoPE": RoPE(dim // heads[i]), "blocks": blocks})
            if i < 3:
                reduction = nn.Conv2d(dim, dims[i + 1], 3, 2, 1)
                layer["downsample"] = nn.ModuleDict({"reduction": reduction, "norm": nn.BatchNorm2d(dims[i + 1])})
            self.layers.append(layer)
        self.proj, self.norm, self.head = nn.Conv2d(dims[-1], 1024, 1), nn.BatchNorm2d(1024), nn.Conv2d(1024, 1000, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed["proj"](x)
        for layer in self.layers:
            sin, cos = layer["RoPE"](*x.shape[2:])
            for block in layer["blocks"]:
                x = block(x, sin, cos)
            if "downsample" in layer:
                x = layer["downsample"]["norm"](layer["downsample"]["reduction"](x))
        return self.head(F.silu(self.norm(self.proj(x))).mean((2, 3), keepdim=True)).flatten(1)


def van_b0() -> nn.Module:
    return VAN((32, 64, 160, 256), (3, 3, 5, 2))


def van_b1() -> nn.Module:
    return VAN((64, 128, 320, 512), (2, 2, 4, 2))


def van_b2() -> nn.Module:
    return VAN((64, 128, 320, 512), (3, 3, 12, 3))


def ravlt_tiny() -> nn.Module:
    return RAVLT((64, 128, 256, 512), (2, 2, 6, 2), (1, 2, 4, 8))


def ravlt_small() -> nn.Module:
    return RAVLT((64, 128, 320, 512), (3, 5, 9, 3), (1, 2, 5, 8))
