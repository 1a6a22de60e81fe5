"""Where a prompt has the whole of a picture in one grid of tokens, also for models that cut pictures into tiles."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zoo.mllm.families import image_tokens

TILE_FIRST = {"llava", "llava_next", "zoo_vlm"}  # the tile with the whole picture comes first; elsewhere last


@dataclass(frozen=True)
class View:
    """The tokens that show all of a picture.

    Attributes:
        places: (rows * columns,) int64, their positions in the prompt, row by row.
        rows: of the grid.
        columns: of the grid.
    """

    places: Tensor
    rows: int
    columns: int


def whole_view(config: Any, inputs: Mapping[str, Tensor]) -> View:
    """Find the whole picture in a prompt.

    Args:
        config: of the model; one of the families that ``accelerate`` knows.
        inputs: of the processor, for one prompt with one picture.

    Raises:
        ValueError: the tokens of the picture are no such grid.
    """
    rows, columns = _grid(config, inputs)
    tokens = torch.tensor(image_tokens(config), device=inputs["input_ids"].device)
    places = torch.isin(inputs["input_ids"][0], tokens).nonzero()[:, 0]
    size, family = rows * columns, config.model_type
    tiled = family not in ("llava", "qwen2_vl", "qwen2_5_vl")
    if len(places) < size or (not tiled and len(places) != size):
        raise ValueError(
            f"A picture has {len(places)} tokens, but {rows} x {columns} are expected of {family}: "
            "give one picture, and a model whose picture tokens are patches alone."
        )
    return View(places[:size] if family in TILE_FIRST else places[-size:], rows, columns)


def whole_pixels(config: Any, inputs: Mapping[str, Tensor], values: Tensor) -> Tensor:
    """What belongs to the pixels of the whole picture, (3, H, W), summed over copies of a pixel.

    Args:
        config: as above.
        inputs: as above.
        values: of the shape of ``pixel_values``: these or their gradient.
    """
    family = config.model_type
    if not family.startswith("qwen"):
        return values.reshape(-1, *values.shape[-3:])[0 if family in TILE_FIRST else -1]
    vision, (rows, columns) = config.vision_config, _grid(config, inputs)
    patch, merge = vision.patch_size, vision.spatial_merge_size
    blocks = values.view(rows, columns, merge, merge, 3, vision.temporal_patch_size, patch, patch).sum(5)
    return blocks.permute(4, 0, 2, 5, 1, 3, 6).reshape(3, rows * merge * patch, columns * merge * patch)


def _grid(config: Any, inputs: Mapping[str, Tensor]) -> tuple[int, int]:
    """Rows and columns of the tokens."""
    family = config.model_type
    if family == "zoo_vlm":
        projector, _, options = config.projector.partition(":")
        if projector == "resampler":
            raise ValueError("The tokens of a resampler belong to no part of a picture: take another projector.")
        factor = int(options.partition("=")[2] or 2) if projector == "pixel_shuffle" else 1
        return config.grid[0] // factor, config.grid[1] // factor
    vision = config.vision_config
    if family.startswith("qwen"):
        _, rows, columns = inputs["image_grid_thw"][0].tolist()
        return rows // vision.spatial_merge_size, columns // vision.spatial_merge_size
    patch = vision.patch_size if isinstance(vision.patch_size, int) else vision.patch_size[0]
    merged = {"internvl": "downsample_ratio", "smolvlm": "scale_factor", "idefics3": "scale_factor"}.get(family)
    factor = getattr(config, merged) if merged else 1  # 1/2 and 2 both say that 2 x 2 patches are one token
    side = patch * max(factor, 1 / factor)
    height, width = inputs["pixel_values"].shape[-2:]
    return int(height / side), int(width / side)
