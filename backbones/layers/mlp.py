"""Feed-forward layers: with a depthwise convolution inside, and with a gate."""

import math

import torch
from timm.layers import GluMlp
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
        self.fc1 = nn.Linear(dim, hidden_dim, device=device, dtype=dtype)
        self.act = nn.GELU() if residual else nn.Identity()
        activation = "none" if residual else "gelu"
        self.conv = DepthwiseConv2d(hidden_dim, 3, 1, residual, activation=activation, device=device, dtype=dtype)
        self.fc2 = nn.Linear(hidden_dim, dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same."""
        return self.fc2(self.conv(self.act(self.fc1(x))))


def swiglu(
    dim: int, ratio: float, multiple: int, device: torch.device | None = None, dtype: torch.dtype | None = None
) -> GluMlp:
    """``fc2(SiLU(g) * y)`` with g and y the halves of ``fc1(x)``, no biases: (..., dim) to the same.

    Args:
        dim: channels.
        ratio: hidden channels, which are those of g, over channels; rounded down.
        multiple: then rounded up to a multiple of this.
        device: of the weights.
        dtype: of the weights.
    """
    hidden = math.ceil(int(dim * ratio) / multiple) * multiple
    return GluMlp(dim, 2 * hidden, act_layer=nn.SiLU, gate_last=False, bias=False, device=device, dtype=dtype)
