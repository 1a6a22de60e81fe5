"""The 2D rotation: the authors' angles, and what makes it a position encoding."""

from pathlib import Path

import numpy as np
import torch

from zoo.kernels.rotary import rotary_angles, rotate


def test_angles_are_the_authors():
    import json

    path = Path(__file__).parents[1] / "golden" / "ravlt" / "RAVLT_T.json"
    stored = json.loads(path.read_text())["buffers"]["layers.0.RoPE.angle"]["values"]  # each twice, of one half
    angles = rotary_angles(2, 3, 64, 10000.0, torch.device("cpu"))
    assert angles.shape == (6, 32)
    np.testing.assert_array_equal(angles[3, :16], np.array(stored[::2], np.float32))  # row 1, column 0
    assert not angles[3, 16:].any() and not angles[:3, :16].any()
    np.testing.assert_array_equal(angles[2, 16:], 2 * angles[1, 16:])  # row 0, columns 2 and 1


def test_products_depend_on_relative_positions():
    H, W, D = 6, 7, 8
    q, k = torch.randn(2, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    angles = rotary_angles(H, W, D, 10000.0, torch.device("cpu"), torch.float64)
    queries, keys = (rotate(x.expand(H * W, D), angles.cos(), angles.sin()).view(H, W, D) for x in (q, k))
    products = torch.einsum("ijd,uvd->ijuv", queries, keys)
    torch.testing.assert_close(products[:-1, :-2, :-1, :-2], products[1:, 2:, 1:, 2:])
    assert (products[0, 0, 0, 0] - products[0, 0, 1, 0]).abs() > 1e-3
    assert (products[0, 0, 1, 0] - products[0, 0, 0, 1]).abs() > 1e-3
    torch.testing.assert_close(queries.norm(dim=-1), q.norm().expand(H, W))
