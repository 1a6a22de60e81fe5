"""2D rotary position encoding: the first half of a head turns with the row, the second half with the column.

Channel pairs (2i, 2i + 1) are rotated by ``position * base ** -t_i``; the exponents t are evenly spaced from 0 to 1,
both included, over the pairs of one half.
"""

import math

import torch
from torch import Tensor


def rotary_angles(
    height: int, width: int, head_dim: int, base: float, device: torch.device, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Angles of every channel pair of every token of a map, in row-major order.

    Args:
        height: rows of the map.
        width: columns of the map.
        head_dim: channels per head, a multiple of 4.
        base: largest wavelength over 2 pi, in tokens.
        device: of the result.
        dtype: of the result.

    Returns:
        (height * width, head_dim / 2), radians.
    """
    exponents = torch.linspace(0, 1, head_dim // 4, device=device, dtype=dtype)
    frequencies = 1 / base**exponents
    rows = torch.arange(height, device=device, dtype=dtype)[:, None] * frequencies
    columns = torch.arange(width, device=device, dtype=dtype)[:, None] * frequencies
    rows = rows[:, None, :].expand(height, width, head_dim // 4)
    columns = columns[None, :, :].expand(height, width, head_dim // 4)
    return torch.cat([rows, columns], dim=-1).reshape(height * width, head_dim // 2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate channel pairs: (a, b) -> (a cos - b sin, b cos + a sin).

    Args:
        x: (..., N, head_dim).
        cos: of the angles, broadcastable to (..., N, head_dim / 2).
        sin: of the angles, likewise.

    Returns:
        Like ``x``, in the dtype of ``x`` and the tables together.
    """
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)


def rotary_angles_across_heads(
    height: int,
    width: int,
    num_heads: int,
    head_dim: int,
    base: float,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """MD-LRPE of a map: like ``rotary_angles``, but the frequencies continue to fall from head to head.

    Pair j of either half of head h turns by ``position * base ** (-2 (h D / 2 + j) / (heads D))``.

    Args:
        height: rows of the map.
        width: columns of the map.
        num_heads: heads.
        head_dim: D, a multiple of 4.
        base: largest wavelength over 2 pi, in tokens.
        device: of the result.
        dtype: of the result.

    Returns:
        (num_heads, height * width, head_dim / 2), radians.
    """
    pairs = torch.arange(head_dim // 4, device=device, dtype=dtype)
    heads = torch.arange(num_heads, device=device, dtype=dtype)[:, None]
    exponents = (2 * pairs + heads * head_dim) / (num_heads * head_dim)
    frequencies = torch.exp(exponents * -math.log(base))[:, None, :]
    rows = torch.arange(height, device=device, dtype=dtype)[:, None] * frequencies  # (heads, height, D / 4)
    columns = torch.arange(width, device=device, dtype=dtype)[:, None] * frequencies
    shape = [num_heads, height, width, head_dim // 4]
    angles = torch.cat([rows[:, :, None].expand(shape), columns[:, None].expand(shape)], dim=-1)
    return angles.reshape(num_heads, height * width, head_dim // 2)
