"""The transformer block and the layers around it, which all bodies share."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from timm.layers import DropPath, to_2tuple
from torch import Tensor, nn

from zoo.backbones.layers.position import PositionTable
from zoo.backbones.layers.prepbn import merge_into_readers, merge_into_writer


class Block(nn.Module):
    """``x + mixer(norm1(x))``, then ``x + mlp(norm2(x))``: (B, H, W, C) to the same.

    Args:
        dim: C.
        mixer: (B, H, W, C) to the same. If it has a method ``readers``, that gives the layers that read its input, or
            none if they read more than that.
        mlp: the same; its first layer is called ``fc1``.
        norm: makes a norm over channels.
        drop_path: rate of stochastic depth.
    """

    def __init__(
        self,
        dim: int,
        mixer: nn.Module,
        mlp: nn.Module,
        norm: Callable[..., nn.Module],
        drop_path: float,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.norm1 = norm(dim, **dd)
        self.mixer = mixer
        self.drop_path1 = DropPath(drop_path)
        self.norm2 = norm(dim, **dd)
        self.mlp = mlp
        self.drop_path2 = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same."""
        x = x + self.drop_path1(self.mixer(self.norm1(x)))
        return x + self.drop_path2(self.mlp(self.norm2(x)))

    @torch.jit.ignore
    def fuse(self) -> "Block":
        """Merge RepBNs into the layers that read them, for ``timm.utils.reparameterize_model``."""
        readers = self.mixer.readers() if hasattr(self.mixer, "readers") else []
        if readers and merge_into_readers(self.norm1, *readers):
            self.norm1 = nn.Identity()
        if merge_into_readers(self.norm2, self.mlp.fc1):
            self.norm2 = nn.Identity()
        return self


class ConvEmbed(nn.Module):
    """Convolution, norm, and a table of positions: (B, H, W, C) to (B, ceil(H / s), ceil(W / s), C').

    What is no multiple of the stride is padded with zeros below and to the right.

    Args:
        in_dim: C.
        out_dim: C'.
        kernel_size: of the convolution.
        stride: s.
        padding: of the convolution.
        norm: makes a norm over channels.
        grid: rows and columns of the table; None for no table.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        kernel_size: int,
        stride: int,
        padding: int,
        norm: Callable[..., nn.Module],
        grid: tuple[int, int] | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.conv = nn.Conv2d(in_dim, out_dim, kernel_size, stride, padding, **dd)
        self.more = kernel_size - 2 * padding - 1  # rows and columns that make the convolution round up
        self.norm = norm(out_dim, **dd)
        self.position = PositionTable(out_dim, grid, "bilinear", **dd) if grid else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to (B, H', W', C')."""
        x = F.pad(x, (0, 0, 0, self.more, 0, self.more))
        x = self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.position(self.norm(x))

    @torch.jit.ignore
    def fuse(self) -> "ConvEmbed":
        """Merge a RepBN into the convolution, for ``timm.utils.reparameterize_model``."""
        if merge_into_writer(self.norm, self.conv):
            self.norm = nn.Identity()
        return self


def init_linear(module: nn.Module) -> None:
    """Linear layers truncated normal with deviation 0.02, biases 0, as the authors of all bodies draw them."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def grid_of(img_size: int | tuple[int, int], reduction: int) -> tuple[int, int]:
    """Rows and columns of a map, of which one token stands for ``reduction`` pixels of each side."""
    height, width = to_2tuple(img_size)
    return -(-height // reduction), -(-width // reduction)
