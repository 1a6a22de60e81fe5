"""One picture of what a classifier looks at in a picture."""

import os
from collections.abc import Sequence
from difflib import get_close_matches

import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn

from zoo.backbones.van import LargeKernelAttention
from zoo.catalogue import DEFAULT_MODEL
from zoo.classifier import Classifier
from zoo.images import Source, describe, read_image
from zoo.look.attention import attention_from, layers_of
from zoo.look.class_map import class_map
from zoo.look.panels import EDGE, Panel, draw_panels, map_panel, marked
from zoo.look.place import token_at
from zoo.look.receptive_field import receptive_field

STRIDE = 32  # what the sides of pictures are multiples of, so that the maps of all strides end with the picture
MAX_STRETCH = 8  # longer pictures are made shorter


def look(
    image: Source,
    model: str | nn.Module | None = None,
    *,
    checkpoint: str | None = None,
    point: tuple[int, int] | None = None,
    layer: int | None = None,
    label: str | None = None,
    device: str | torch.device | None = None,
) -> Image.Image:
    """Draw where a model sees a class, and what one of its layers sees from a point.

    The model is given the whole picture, in about its shape and with about as many pixels as the model's cfg says;
    `zoo classify` cuts off what the cfg says, so its probabilities may differ.

    Args:
        image: anything `zoo.images.read_image` takes.
        model: as of `zoo.Classifier`. Of a model without linear attention and large kernel attention only the
            class-activation map is drawn.
        checkpoint: as of `zoo.Classifier`.
        point: column and row of a pixel of the upright picture, from 0; by default its middle.
        layer: number of a layer of `layers_of`, from 0, or from the end if negative; by default the last.
        label: name of a class, or its number; by default the most probable one.
        device: as of `zoo.Classifier`.

    Returns:
        An RGB image on white: the picture with the point; the class-activation map; the row of attention from the point
        as the mean of the heads, in each direction where the attention has two, and in each head. In large kernel
        attention, which has no such row, the effective receptive field.

    Raises:
        ImageError: the picture cannot be read.
        ValueError: there is no such model, class or layer, or the point is outside the picture.
    """
    picture = read_image(image)
    middle = (picture.width // 2, picture.height // 2)
    token_at(point or middle, picture.size, (1, 1))  # says that it is outside, before the work is done
    classifier = Classifier(model, checkpoint=checkpoint, device=device)
    name = model if isinstance(model, str) else type(model).__name__ if model else DEFAULT_MODEL
    model = classifier.model
    if getattr(model, "num_classes", None) == 0:
        raise ValueError(f"{name} has no classes (num_classes=0): there is none to map.")
    layers = list(layers_of(model))
    if not layers and (point or layer is not None):
        raise ValueError(
            f"{name} has no layer of linear attention or large kernel attention: leave out the point and the layer."
        )
    number = len(layers) - 1 if layer is None else layer
    if layers and not -len(layers) <= number < len(layers):
        raise ValueError(f"{name} has no layer {number} to look into, only 0 to {len(layers) - 1}.")
    pixels = _prepared(picture, model).to(classifier.device, next(model.parameters()).dtype)
    small = picture.resize(_inside(picture.size), Image.Resampling.LANCZOS)
    panels = [_class_panel(classifier, pixels, label, small)]
    title, shown, note = name, small, f"given as {pixels.shape[3]} x {pixels.shape[2]}"
    if layers:
        point, number = point or middle, number % len(layers)
        title = f"{name} · layer {number} of 0 to {len(layers) - 1}: {layers[number]}"
        shown, note = marked(small, point, picture.size), f"{note}, point {point[0]},{point[1]}"
        panels += _layer_panels(model, model.get_submodule(layers[number]), pixels, point, picture.size, small)
    return draw_panels(title, [Panel(os.path.basename(describe(image)), note, shown), *panels])


def _class_panel(classifier: Classifier, pixels: Tensor, label: str | None, small: Image.Image) -> Panel:
    with torch.no_grad():
        logits = classifier.model(pixels)[0].float()
    names = classifier.labels or [f"class {number}" for number in range(len(logits))]
    place = int(logits.argmax()) if label is None else _class(label, names, logits)
    found = class_map(classifier.model, pixels, place)
    title = f"{'CAM' if found.exact else 'Grad-CAM'}: {names[place]}"
    return map_panel(title, f"probability {logits.softmax(0)[place]:.1%}", small, found.map, smooth=True)


def _layer_panels(
    model: nn.Module,
    layer: nn.Module,
    pixels: Tensor,
    point: tuple[int, int],
    size: tuple[int, int],
    small: Image.Image,
) -> list[Panel]:
    if isinstance(layer, LargeKernelAttention):
        field = receptive_field(model, layer, pixels, point, size)
        return [map_panel("Effective receptive field (gradient)", "large kernel attention has no rows", small, field)]
    attention = attention_from(model, layer, pixels, point, size)
    whole, prefix = attention.whole, attention.prefix.mean().item()
    note = f"sum {whole.mean(0).sum().item() + prefix:.4g}" + (f", class token {prefix:.2g}" if prefix else "")
    panels = [map_panel("Attention, mean of heads", note, small, whole.mean(0))]
    if len(attention.rows) > 1:
        panels += [map_panel(f"Only {way}", "mean of heads", small, row.mean(0)) for way, row in attention.rows.items()]
    if len(whole) > 1:
        panels += [map_panel(f"Head {head}", f"sum {row.sum():.4g}", small, row) for head, row in enumerate(whole)]
    return panels


def _class(wanted: str, names: Sequence[str], logits: Tensor) -> int:
    """Place of a class; the most probable one where several have the name."""
    places = [place for place, name in enumerate(names) if name.casefold() == wanted.casefold()]
    if not places and wanted.isdecimal() and int(wanted) < len(names):
        return int(wanted)
    if not places:
        nearest = ", ".join(repr(name) for name in get_close_matches(wanted, names, 3, cutoff=0))
        raise ValueError(f"The model has no class {wanted!r}; the nearest names are {nearest}.")
    return max(places, key=lambda place: logits[place].item())


def _prepared(picture: Image.Image, model: nn.Module) -> Tensor:
    """The whole picture, in about its own shape, as the model's transform gives it: (1, 3, H, W)."""
    config = resolve_data_config({}, model=model)
    channels, height, width = config["input_size"]
    if not (getattr(model, "pretrained_cfg", None) or {}).get("fixed_input_size"):
        stretch = min(max((picture.width / picture.height) ** 0.5, 1 / MAX_STRETCH), MAX_STRETCH)
        edge = (height * width) ** 0.5
        height, width = (max(1, round(edge * share / STRIDE)) * STRIDE for share in (1 / stretch, stretch))
    shape = {"input_size": (channels, height, width), "crop_pct": 1.0, "crop_mode": "squash"}
    return create_transform(**{**config, **shape}, is_training=False)(picture)[None]


def _inside(size: tuple[int, int]) -> tuple[int, int]:
    """Width and height of a picture that fits a panel."""
    return tuple(max(1, round(edge * EDGE / max(size))) for edge in size)
