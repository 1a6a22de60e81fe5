"""Do the necks and heads of a config expect the channels that its backbone puts out?"""

from collections.abc import Mapping
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from zoo.openmmlab.backbone import ZooBackbone

__all__ = ["CheckChannels", "channels", "check_channels"]

# Without a neck these read the maps of the backbone, in mmdet and in mmseg.
HEADS = ("decode_head", "auxiliary_head", "bbox_head", "panoptic_head", "rpn_head")


def channels(model_name: str, **kwargs: Any) -> tuple[int, ...]:
    """The channels of the maps of ``ZooBackbone``, for ``in_channels`` of a neck or head; nothing is loaded.

    Args:
        model_name: as of ``ZooBackbone``.
        **kwargs: of ``ZooBackbone``.

    Raises:
        ValueError: as of ``ZooBackbone``.
    """
    with torch.device("meta"):
        return ZooBackbone(model_name, **{**kwargs, "pretrained": False, "checkpoint": None}).out_channels


def check_channels(model: Mapping[str, Any]) -> None:
    """Compares the ``in_channels`` of what reads a ``ZooBackbone``, its neck or else its heads, with what it puts out.

    Args:
        model: the ``model`` of a config of mmdet or mmseg.

    Raises:
        ValueError: they differ; it names both sides.
    """
    backbone = dict(model.get("backbone") or {})
    if backbone.pop("type", None) != "ZooBackbone":
        return
    found = channels(**backbone)
    for name in ("neck",) if model.get("neck") else HEADS:
        parts = model.get(name) or []
        for part in [parts] if isinstance(parts, Mapping) else parts[:1] if name == "neck" else parts:
            expected = part.get("in_channels")
            if expected is None:
                continue
            several = isinstance(expected, list | tuple)
            # a single number is for one map: the one of in_index in mmseg, else every map
            indices = part.get("in_index", range(len(found)) if several or not name.endswith("_head") else -1)
            taken = [found[i] for i in ([indices] if isinstance(indices, int) else indices) if i < len(found)]
            if (list(expected) if several else [expected] * len(taken)) != taken:
                right = taken if several else taken[0]
                raise ValueError(
                    f"model.{name}.in_channels is {expected}, but the backbone {backbone['model_name']} puts out "
                    f"{right}: set in_channels={right}."
                )


@HOOKS.register_module()
class CheckChannels(Hook):
    """``check_channels`` before a run of mmengine's Runner: ``custom_hooks = [dict(type="CheckChannels")]``."""

    def before_run(self, runner: Any) -> None:
        """Checks the model of the run's config."""
        check_channels(runner.cfg.model)
