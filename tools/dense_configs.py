"""Writes the configs of detectors and segmenters, which differ in little, from the table of what was published.

    python -m zoo.tools.dense_configs [configs]

Each is short and complete but for four files of ``configs/_base_``: head and optimizer, data, schedule, runtime.
"""

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import timm
import typer

import zoo.openmmlab
from zoo.catalogue import CATALOGUE
from zoo.files import write_text

HEADS = {
    "retinanet": "RetinaNet",
    "mask_rcnn": "Mask R-CNN",
    "cascade_mask_rcnn": "Cascade Mask R-CNN",
    "panoptic_fpn": "Panoptic FPN",
    "mask2former": "Mask2Former",
    "semantic_fpn": "Semantic FPN",
    "upernet": "UPerNet",
}
SEGMENTERS = ("semantic_fpn", "upernet")


@dataclass(frozen=True)
class Recipe:
    """One config.

    Attributes:
        head: a key of ``HEADS``.
        schedule: "1x", "3x", "50e", "40k", "80k" or "160k".
        model: name of the backbone.
        data: file of the data in ``configs/_base_``.
        backbone: arguments of the backbone.
        published: what its authors report, in words; empty if they report nothing.
        changes: further lines of the config.
        variant: what tells it from the config of the same backbone with other arguments.
    """

    head: str
    schedule: str
    model: str
    data: str
    backbone: dict[str, Any] = field(default_factory=dict)
    published: str = ""
    changes: str = ""
    variant: str = ""

    @property
    def file(self) -> str:
        """Its path under ``configs``."""
        folder = "segmentation" if self.head in SEGMENTERS else "detection"
        return f"{folder}/{self.head}_{self.schedule}_{self.variant or self.model}.py"


def _ravlt() -> list[Recipe]:
    """The authors' table of results; drop path as of their classifiers."""
    rates = {"tiny": 0.1, "small": 0.15, "base": 0.4, "large": 0.55}
    results = {
        ("retinanet", "1x", "coco_boxes"): ("45.9", "48.3", "49.8", "50.9"),
        ("mask_rcnn", "1x", "coco_masks"): ("47.3 / 42.7", "49.8 / 44.6", "51.2 / 45.7", "52.3 / 46.4"),
        ("mask_rcnn", "3x", "coco_masks_multiscale"): (None, "51.4 / 45.5", "52.7 / 46.4", "53.6 / 47.3"),
        ("cascade_mask_rcnn", "3x", "coco_masks_multiscale"): (None, "54.2 / 46.8", "55.3 / 47.7", "55.6 / 48.0"),
        ("semantic_fpn", "80k", "ade20k"): ("47.9", "49.5", "51.9", "52.6"),
        ("upernet", "160k", "ade20k"): (None, "50.7", "52.5", "53.2"),
    }
    return [
        Recipe(head, schedule, f"ravlt_{size}", data, {"drop_path_rate": rates[size]}, published)
        for (head, schedule, data), row in results.items()
        for size, published in zip(rates, row, strict=True)
        if published
    ]


def _van() -> list[Recipe]:
    """The authors' segmenters; UPerNet's results are with several scales and flips at test time."""
    pyramid = "optim_wrapper = dict(optimizer=dict(lr=2e-4))\ntrain_dataloader = dict(batch_size=4)\n"
    fpn = {"b0": (0.2, "38.5"), "b1": (0.2, "42.9"), "b2": (0.2, "46.7"), "b3": (0.3, "48.1"), "b4": (0.4, "")}
    uper = {"b0": (0.1, "41.1"), "b1": (0.1, "44.9"), "b2": (0.1, "50.1"), "b3": (0.3, "50.6")}
    uper |= {"b4": (0.4, "52.2, from ImageNet-22k 53.5"), "b5": (0.4, "from ImageNet-22k 53.9")}
    uper |= {"b6": (0.5, "from ImageNet-22k 54.7")}
    return [
        *(
            Recipe("semantic_fpn", "40k", f"van_{size}", "ade20k", {"drop_path_rate": rate}, published, pyramid)
            for size, (rate, published) in fpn.items()
        ),
        *(
            Recipe("upernet", "160k", f"van_{size}", "ade20k", {"drop_path_rate": rate}, published)
            for size, (rate, published) in uper.items()
        ),
    ]


def _slab() -> list[Recipe]:
    """The authors' detectors; results are read off a figure. The statistics of batch norms are held."""
    held, multiscale = {"norm_eval": True}, "coco_masks_multiscale"
    figure = "{} (read off a figure)"
    small = {"depths": [2, 2, 18, 2]}  # of no model of the zoo: Swin-S with the norm alone
    swin = {**held, "norm": "prepbn"}
    return [
        Recipe("mask_rcnn", "1x", "slab_swin_tiny", multiscale, {"drop_path_rate": 0.1, **held}),
        Recipe("mask_rcnn", "1x", "slab_swin_small", multiscale, {"drop_path_rate": 0.2, **held}),
        *(
            Recipe("mask_rcnn", schedule, "prepbn_swin_tiny", multiscale, {**args, **swin}, published, variant=name)
            for schedule, args, published, name in (
                ("1x", {"drop_path_rate": 0.1}, figure.format(42.9), "prepbn_swin_tiny"),
                ("3x", {"drop_path_rate": 0.2}, "", "prepbn_swin_tiny"),
                ("1x", {"drop_path_rate": 0.2, **small}, figure.format(45.9), "prepbn_swin_small"),
                ("3x", {"drop_path_rate": 0.2, **small}, "", "prepbn_swin_small"),
            )
        ),
        Recipe("mask_rcnn", "1x", "prepbn_pvt_tiny", "coco_masks", held, figure.format(36.5)),
        Recipe(
            "mask_rcnn",
            "1x",
            "prepbn_pvt_small",
            "coco_masks",
            {"drop_path_rate": 0.1, **held},
            figure.format(40.6),
            "optim_wrapper = dict(optimizer=dict(lr=2e-4, weight_decay=1e-4))\n",
        ),
    ]


def _unpublished() -> list[Recipe]:
    """Backbones and heads that nobody published together, or not how: a start with the usual settings."""
    boxes, masks, panoptic, scenes = "coco_boxes", "coco_masks", "coco_panoptic", "ade20k"
    pairs = [
        ("retinanet", "1x", "van_b2", boxes, 0.1),
        ("mask_rcnn", "1x", "van_b2", masks, 0.1),
        ("mask_rcnn", "1x", "vig_h_tiny", masks, 0.2),
        ("mask_rcnn", "1x", "vig_small", masks, 0.2),
        ("mask_rcnn", "1x", "inline_swin_tiny", masks, 0.2),
        ("mask_rcnn", "1x", "inline_pvt_small", masks, 0.1),
        ("mask_rcnn", "1x", "lightnet_small", masks, 0.1),
        ("panoptic_fpn", "1x", "van_b2", panoptic, 0.1),
        ("panoptic_fpn", "1x", "ravlt_small", panoptic, 0.15),
        ("mask2former", "50e", "van_b2", panoptic, 0.1),
        ("mask2former", "50e", "ravlt_small", panoptic, 0.15),
        ("upernet", "160k", "vig_h_tiny", scenes, 0.2),
        ("upernet", "160k", "vig_small", scenes, 0.2),
        ("upernet", "160k", "inline_swin_tiny", scenes, 0.2),
        ("upernet", "160k", "slab_swin_tiny", scenes, 0.2),
    ]
    return [Recipe(head, time, model, data, {"drop_path_rate": rate}) for head, time, model, data, rate in pairs]


RECIPES = {recipe.file: recipe for recipe in (*_ravlt(), *_van(), *_slab(), *_unpublished())}


def config_text(recipe: Recipe) -> str:
    """The file of a recipe."""
    pretrained = bool(timm.get_pretrained_cfg(recipe.model).url) and "depths" not in recipe.backbone
    backbone = {"model_name": recipe.model, "pretrained": pretrained, **recipe.backbone}
    widths = list(widths_of(recipe.model))[recipe.head == "retinanet" :]  # RetinaNet leaves the finest map out
    readers = {
        "upernet": {"decode_head": widths, "auxiliary_head": widths[2]},
        "mask2former": {"panoptic_head": widths},
    }
    model = {"backbone": backbone} | {
        name: {"in_channels": value} for name, value in readers.get(recipe.head, {"neck": widths}).items()
    }
    bases = (recipe.head, recipe.data, f"schedule_{recipe.schedule}", "runtime")
    title = f"# {HEADS[recipe.head]}, {recipe.schedule}, {recipe.variant or recipe.model}: "
    title += f"published {metric(recipe)} {recipe.published}." if recipe.published else "no published result."
    weights = "" if pretrained else "\n# No weights are at hand by name: set checkpoint, or it begins from scratch."
    return (
        f"{title}{weights}\n_base_ = [\n"
        + "".join(f'    "../_base_/{base}.py",\n' for base in bases)
        + "]\nmodel = dict(\n"
        + "".join(f"    {name}={_dict(args, 4)},\n" for name, args in model.items())
        + f")\n{recipe.changes}"
    )


@cache
def widths_of(model: str) -> tuple[int, ...]:
    """The channels of a backbone's maps, which other arguments of the recipes do not change."""
    return zoo.openmmlab.channels(model)


def metric(recipe: Recipe) -> str:
    """What its published numbers are."""
    if recipe.head in SEGMENTERS:
        return "mIoU"
    return "box / mask AP" if "/" in recipe.published else "box AP"


def _dict(args: dict[str, Any], indent: int) -> str:
    """A dict as the formatter has it: on one line if that is short enough, else one for each value."""
    values = [f"{key}={_quoted(value)}" for key, value in args.items()]
    line = f"dict({', '.join(values)})"
    if len(line) < 100:
        return line
    return "dict(\n" + "".join(f"{' ' * (indent + 4)}{value},\n" for value in values) + " " * indent + ")"


def _quoted(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)


def main(folder: Annotated[Path, typer.Argument(help="The folder of the configs.")] = Path("configs")) -> None:
    """Write all configs of the table."""
    for file, recipe in RECIPES.items():
        write_text(folder / file, config_text(recipe))
    print(
        f"{len(RECIPES)} configs, {len({r.model for r in RECIPES.values()} & CATALOGUE.keys())} backbones of the zoo."
    )


if __name__ == "__main__":
    typer.run(main)
