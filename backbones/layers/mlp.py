"""The feed-forward layer with a depthwise convolution inside."""

import torch
from torch import Tensor, nn

from zoo.backbones.layers.conv import DepthwiseConv2d


class DepthwiseMlp(nn.Module):
    """Linear, 3x3 depthwise convolution and GELU, linear: (B, H, W, C) to the same.

    Args:
        dim: C.
        hidden_dim: channels between the linear layers.
        residual: False for ``GELU(conv(h))`` as in VAN, True for ``g + conv(g), g = GELU(h)`` as in RAVLT.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        residual: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.residual = residual
        self.fc1 = nn.Linear(dim, hidden_dim, device=device, dtype=dtype)
        self.conv = DepthwiseConv2d(hidden_dim, 3, residual=residual, device=device, dtype=dtype)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same."""
        x = self.fc1(x)
        x = self.conv(self.act(x)) if self.residual else self.act(self.conv(x))
        return self.fc2(x)
