"""Convolutions over channels-last tokens."""

import torch
from torch import Tensor, nn

from zoo.backbones.layers.fold import affine, fold_after
from zoo.kernels import depthwise_conv2d


class DepthwiseConv2d(nn.Conv2d):
    """Depthwise convolution with "same" padding over (B, H, W, C), through `zoo.kernels.depthwise_conv2d`.

    The parameters are those of ``nn.Conv2d``: weight (C, 1, K, K), bias (C,).

    Args:
        dim: channels.
        kernel_size: odd.
        dilation: distance between taps.
        residual: add the input to the result.
        bias: add a learned bias.
        activation: after all that: "none", "gelu" or "silu".
    """

    def __init__(
        self,
        dim: int,
        kernel_size: int,
        dilation: int = 1,
        residual: bool = False,
        bias: bool = True,
        activation: str = "none",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        padding = dilation * (kernel_size // 2)
        super().__init__(dim, dim, kernel_size, 1, padding, dilation, groups=dim, bias=bias, device=device, dtype=dtype)
        self.residual = residual
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same."""
        return depthwise_conv2d(x, self.weight, self.bias, 1, self.dilation[0], self.residual, self.activation)


class ConvNorm(nn.Module):
    """Convolution, batch norm and an optional activation: (B, H, W, C) to (B, ceil(H / s), ceil(W / s), C').

    Args:
        in_dim: channels in.
        out_dim: channels out.
        kernel_size: odd.
        stride: s.
        act: GELU after the norm.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        kernel_size: int,
        stride: int = 1,
        act: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_dim, out_dim, kernel_size, stride, kernel_size // 2, device=device, dtype=dtype)
        self.norm = nn.BatchNorm2d(out_dim, device=device, dtype=dtype)
        self.act = nn.GELU() if act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to (B, H', W', C')."""
        x = self.norm(self.conv(x.permute(0, 3, 1, 2)))
        return self.act(x.permute(0, 2, 3, 1))

    @torch.jit.ignore
    def fuse(self) -> nn.Module:
        """Fold the norm into the convolution."""
        fold_after(self.conv, *affine(self.norm))
        self.norm = nn.Identity()
        return self
