"""Vision towers: any timm model or open_clip visual tower, as one map of features for a picture."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import timm
import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn
from torch.nn import functional as F

OPEN_CLIP = "open_clip:"


class Tower(nn.Module):
    """A backbone's maps at some stages, brought to one grid and concatenated.

    Args:
        name: of ``timm.create_model``, or ``"open_clip:<model>"``, also with the tag of published weights:
            ``"open_clip:ViT-B-32/laion2b_s34b_b79k"``.
        stages: whose maps are taken, as indices of stages (of blocks in a plain ViT); negative ones count from the
            last. The first one gives the grid: finer maps are averaged down to it, coarser ones interpolated.
        image_size: height and width of the pictures, in pixels; None for what the model was made for.
        pretrained: load the published weights.
        options: more arguments of ``timm.create_model`` or ``open_clip.create_model``.

    Attributes:
        body: the model itself, without what follows the last stage.
        image_size: height and width of the pictures, in pixels.
        mean: of the channels of the pictures, which are in [0, 1] before they are normalised.
        std: of the same.
        interpolation: how pictures are resized, "bilinear" or "bicubic".

    Raises:
        ValueError: there is no such model or stage.
        ImportError: open_clip is missing.
    """

    def __init__(
        self,
        name: str,
        stages: Sequence[int] = (-1,),
        image_size: int | None = None,
        pretrained: bool = False,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        make = _open_clip if name.startswith(OPEN_CLIP) else _timm
        # transformers builds models on the meta device, where tables that no checkpoint holds would be lost.
        with torch.device("cpu"):
            self.body, data = make(name, image_size, pretrained, dict(options or {}))
        if not hasattr(self.body, "forward_intermediates"):
            raise ValueError(f"The tower {name!r} does not give the maps of its stages: take another model.")
        self.image_size: int = image_size or data["input_size"][-1]
        self.mean, self.std = tuple(data["mean"]), tuple(data["std"])
        self.interpolation: str = data["interpolation"]
        self._options: dict[str, Any] = {"intermediates_only": True}
        if "stop_early" in inspect.signature(self.body.forward_intermediates).parameters:
            self._options["stop_early"] = True
        self.stages = self._cut(name, list(stages))
        self._checkpointing = False
        self._tables = {key: buffer.clone() for key, buffer in self._buffers_of_no_checkpoint()}

    @property
    def dtype(self) -> torch.dtype:
        """Of the pictures and the features."""
        return next(self.parameters()).dtype

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Normalised pictures (N, 3, S, S) to features (N, C, H, W)."""
        depths = sorted(set(self.stages))
        maps = dict(zip(depths, self._maps(pixel_values, depths)))
        grid = maps[self.stages[0]].shape[-2:]
        return torch.cat([_resize(maps[stage], grid) for stage in self.stages], 1)

    @torch.no_grad()
    def measure(self) -> tuple[int, tuple[int, int]]:
        """Channels and grid (height, width) of the features."""
        _, channels, height, width = self(self._blank()).shape
        return channels, (height, width)

    @torch.no_grad()
    def restore_tables(self) -> None:
        """Fill the buffers that no checkpoint holds, such as tables of positions, after a load that emptied them."""
        for key, buffer in self._buffers_of_no_checkpoint():
            buffer.copy_(self._tables[key])

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether activations are computed again for the gradients, where the model can; transformers sets it."""
        return self._checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, enable: bool) -> None:
        self._checkpointing = enable
        with suppress(AttributeError, AssertionError):  # of models that cannot
            self.body.set_grad_checkpointing(enable)

    def _maps(self, pixel_values: Tensor, stages: list[int] | None) -> list[Tensor]:
        maps = self.body.forward_intermediates(pixel_values, indices=stages, output_fmt="NCHW", **self._options)
        return maps["image_intermediates"] if isinstance(maps, dict) else maps

    def _cut(self, name: str, stages: list[int]) -> list[int]:
        """Remove what the stages do not need, and count them from the first."""
        if not stages:
            raise ValueError("A tower needs stages to take its maps from: give at least one, such as (-1,).")
        try:
            if hasattr(self.body, "prune_intermediate_layers"):
                return self.body.prune_intermediate_layers(stages, prune_norm=True)
            with torch.no_grad():
                return [range(len(self._maps(self._blank(), None)))[stage] for stage in stages]
        except (AssertionError, IndexError) as error:
            raise ValueError(f"The tower {name!r} has no stages {stages}: {error}.") from None

    def _blank(self) -> Tensor:
        parameter = next(self.parameters())
        size = (1, 3, self.image_size, self.image_size)
        return torch.zeros(size, device=parameter.device, dtype=parameter.dtype)

    def _buffers_of_no_checkpoint(self) -> Iterator[tuple[str, Tensor]]:
        kept = self.state_dict(keep_vars=True).keys()
        return ((key, buffer) for key, buffer in self.named_buffers() if key not in kept)


def _resize(x: Tensor, grid: torch.Size) -> Tensor:
    if x.shape[-2:] == grid:
        return x
    if x.shape[-1] > grid[-1]:
        return F.adaptive_avg_pool2d(x, grid)
    return F.interpolate(x, grid, mode="bilinear")


def _timm(name: str, size: int | None, pretrained: bool, options: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    if not timm.is_model(name) and ":" not in name:
        raise ValueError(f"There is no tower {name!r}: expected a model of timm or the zoo, or 'open_clip:<model>'.")
    known = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    if size and known and known.fixed_input_size:
        options["img_size"] = size
    body = timm.create_model(name, pretrained=pretrained, **options)
    return body.eval(), resolve_model_data_config(body)


def _open_clip(
    name: str, size: int | None, pretrained: bool, options: dict[str, Any]
) -> tuple[nn.Module, dict[str, Any]]:
    try:
        import open_clip
    except ImportError:
        raise ImportError(f"The tower {name!r} needs open_clip: pip install 'linear-vision-zoo[mllm]'.") from None
    model, _, tag = name.removeprefix(OPEN_CLIP).partition("/")
    if pretrained and not tag:
        raise ValueError(
            f"The tower {name!r} names no weights: write '{name}/<tag>', one of "
            f"{', '.join(open_clip.list_pretrained_tags_by_model(model))}; or pretrained=False."
        )
    if model not in open_clip.list_models():
        raise ValueError(f"open_clip has no model {model!r}: see open_clip.list_models().")
    if size:
        options["force_image_size"] = size
    body = open_clip.create_model(model, pretrained=tag if pretrained else None, **options).visual
    data = open_clip.get_model_preprocess_cfg(body)
    size = data["size"] if isinstance(data["size"], int) else data["size"][-1]
    return body.eval(), {**data, "input_size": (3, size, size)}
