"""Weights for the golden tests: every tensor is a function of its name in the authors' state dict and its shape."""

import json
import re
import zlib
from pathlib import Path

import numpy as np

NOT_DRAWN = {"num_batches_tracked", "relative_position_index", "attn_mask", "angle"}
TABLES = {"cls_token", "relative_position_bias_table", "positional_encoding"}
BLOCK_NORM = re.compile(r"(^|\.)(blocks|block[1-4]|stage[1-4])\.\d+\.norm[12]\.")


def make_tensor(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal numbers seeded by the name, scaled by what kind of parameter it is."""
    generator = np.random.Generator(np.random.PCG64(zlib.crc32(key.encode())))
    leaf = key.rpartition(".")[2]
    if leaf == "running_var":
        return (0.5 + generator.random(shape)).astype(np.float32)
    normal = generator.standard_normal(shape)
    if key.endswith(".bn.weight"):  # RepBN is affine: gains near 1 would let a deep model blow up
        normal = (0.25 if BLOCK_NORM.search(key) else 1.0) * (1.0 + 0.2 * normal)
    elif leaf in ("running_mean", "bias", "layer_scale_1", "layer_scale_2", "alpha"):
        normal *= 0.1
    elif leaf in ("gamma_1", "gamma_2"):
        normal = 0.5 * (1.0 + 0.2 * normal)
    elif "pos_embed" in leaf or leaf in TABLES:
        normal *= 0.5
    elif len(shape) == 1:
        normal = 1.0 + 0.1 * normal
    else:
        normal *= (0.2 if key.endswith(".pos.weight") else 1.0) / np.sqrt(float(np.prod(shape[1:])))
    return normal.astype(np.float32)


def make_state(meta: dict) -> dict[str, np.ndarray]:
    """The state dict that a golden json describes, without the constants and counters that a constructor makes.

    Raises:
        ValueError: the numbers are not those that the answers were computed with.
    """
    state = {
        key: make_tensor(key, tuple(shape))
        for key, shape, dtype in meta["state_dict"]
        if dtype.startswith("float") and key.rpartition(".")[2] not in NOT_DRAWN
    }
    checksum = 0
    for tensor in state.values():
        checksum = zlib.crc32(np.ascontiguousarray(tensor).tobytes(), checksum)
    if checksum != meta["state_checksum"]:
        raise ValueError(f"NumPy {np.__version__} draws other numbers than the golden data were made with.")
    return state


def read_meta(path: Path) -> dict:
    """A golden json."""
    return json.loads(path.read_text(encoding="utf-8"))
