"""Learned tables of positions, for maps of any size."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PositionTable(nn.Module):
    """Adds a learned table, resized to the map: (B, H, W, C) to the same.

    At the table's own size it is added as it is.

    Args:
        dim: C.
        grid: rows and columns of the table.
        mode: "bilinear" or "bicubic", as of ``torch.nn.functional.interpolate``.
    """

    def __init__(
        self,
        dim: int,
        grid: tuple[int, int],
        mode: str,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.mode = mode
        self.table = nn.Parameter(torch.empty(1, *grid, dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the table anew."""
        nn.init.trunc_normal_(self.table, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same."""
        # float32: half precision has no interpolation on a CPU. No branch for the own size: graphs are for every size.
        return x + _resized(self.table, x.shape[1], x.shape[2], self.mode).to(x.dtype)


def _resized(table: Tensor, height: int, width: int, mode: str) -> Tensor:
    """(1, H, W, C) to (1, height, width, C) in float32."""
    table = F.interpolate(table.float().permute(0, 3, 1, 2), size=(height, width), mode=mode, align_corners=False)
    return table.permute(0, 2, 3, 1)


def resize_tables(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A checkpoint with every ``PositionTable`` at the size that the model's has, so that it loads strictly."""
    tables = {f"{name}.table": module for name, module in model.named_modules() if isinstance(module, PositionTable)}
    resized = {
        key: _resized(state_dict[key], *module.table.shape[1:3], module.mode).to(state_dict[key].dtype)
        for key, module in tables.items()
        if key in state_dict and state_dict[key].shape != module.table.shape
    }
    return {**state_dict, **resized}
