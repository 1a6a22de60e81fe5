"""The names of the classes that a model tells apart."""

import json
import os
from functools import lru_cache
from importlib.resources import files
from pathlib import Path

from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import nn


def label_names(model: nn.Module) -> list[str] | None:
    """Class names in the order of a model's outputs, or None where they are not known.

    They come from the packaged list for weights trained on the quickstart data, from the pretrained cfg where it
    carries them (models of the Hugging Face Hub), and for the sizes of ImageNet-1k, -12k and -21k from timm.

    Args:
        model: a timm or zoo model.
    """
    num_classes = getattr(model, "num_classes", 0)
    cfg = getattr(model, "pretrained_cfg", None) or {}
    if (cfg.get("tag") or "").startswith("quickstart") and len(_quickstart()) == num_classes:
        return list(_quickstart())
    names = cfg.get("label_names")
    if isinstance(names, list | tuple) and len(names) == num_classes:
        return list(names)
    subset = infer_imagenet_subset({"num_classes": num_classes})
    return list(_imagenet(subset)) if subset else None


def read_labels(path: str | os.PathLike) -> list[str]:
    """Class names from a text file in UTF-8 with one name on each line.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is empty or no such text.
    """
    try:
        names = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: expected one class name on each line.") from error
    if not names:
        raise ValueError(f"{path} is empty: expected one class name on each line.")
    return names


@lru_cache
def _quickstart() -> tuple[str, ...]:
    text = files("zoo").joinpath("weights/quickstart_classes.json").read_text(encoding="utf-8")
    return tuple(entry["name"] for entry in json.loads(text))


@lru_cache
def _imagenet(subset: str) -> tuple[str, ...]:
    return tuple(ImageNetInfo(subset).label_descriptions())
