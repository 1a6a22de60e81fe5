"""What a detector or a segmenter found, drawn into the picture with supervision."""

import numpy as np
from PIL import Image

from zoo.detector import Detections
from zoo.segmenter import Segmentation

# White text is legible on each of them, and each on white.
COLOURS = [
    "#d62728", "#1f77b4", "#2a7f2a", "#8e44ad", "#b8570a", "#0b7a75", "#c2185b", "#4a55c8", "#7a5230", "#5c6b00",
]  # fmt: skip
BACKGROUND = "background"
SMALLEST = 0.001  # share of a picture from which a class of a segmentation is named


def draw_detections(picture: Image.Image, found: Detections) -> Image.Image:
    """Draw masks, boxes, names and scores.

    Args:
        picture: RGB.
        found: in it.

    Returns:
        A new picture of the same size.
    """
    sv = _supervision()
    if not len(found):
        return picture.copy()
    detections = sv.Detections(found.boxes, found.masks, found.scores, found.labels)
    names = [f"{name} {score:.0%}" for name, score in zip(found.names, found.scores)]
    canvas = np.asarray(picture)[..., ::-1].copy()
    palette, line = _palette(), _line(picture)
    if found.masks is not None:
        canvas = sv.MaskAnnotator(palette, opacity=0.45).annotate(canvas, detections)
    # A white line under the coloured one: seen on dark pictures too.
    canvas = sv.BoxAnnotator(sv.Color.WHITE, thickness=line + 2).annotate(canvas, detections)
    canvas = sv.BoxAnnotator(palette, thickness=line).annotate(canvas, detections)
    return _labelled(canvas, detections, names, sv.Position.TOP_LEFT)


def draw_segmentation(picture: Image.Image, found: Segmentation) -> Image.Image:
    """Draw each class in a colour, with its name in the middle of it; what is called "background" is left as it is.

    Args:
        picture: RGB.
        found: in it.

    Returns:
        A new picture of the same size.
    """
    sv = _supervision()
    labels = np.array([k for k in np.unique(found.labels) if found.names[k] != BACKGROUND], np.int64)
    if not len(labels):
        return picture.copy()
    masks = found.labels[None] == labels[:, None, None]
    detections = sv.Detections(sv.mask_to_xyxy(masks).astype(np.float32), masks, class_id=labels)
    canvas = np.asarray(picture)[..., ::-1].copy()
    canvas = sv.MaskAnnotator(_palette(), opacity=0.6).annotate(canvas, detections)
    named = masks.mean((1, 2)) >= SMALLEST
    return _labelled(canvas, detections[named], [found.names[k] for k in labels[named]], sv.Position.CENTER_OF_MASS)


def _labelled(canvas: np.ndarray, detections: object, names: list[str], position: object) -> Image.Image:
    sv = _supervision()
    height, width = canvas.shape[:2]
    scale = min(1.2, max(0.35, 0.0012 * min(height, width)))
    annotator = sv.LabelAnnotator(
        _palette(),
        text_color=sv.Color.WHITE,
        text_scale=scale,
        text_thickness=max(1, round(1.6 * scale)),
        text_padding=max(2, round(7 * scale)),
        text_position=position,
        smart_position=True,
    )
    return Image.fromarray(annotator.annotate(canvas, detections, names)[..., ::-1].copy())


def _line(picture: Image.Image) -> int:
    return max(2, round(min(picture.size) / 240))


def _palette() -> object:
    return _supervision().ColorPalette.from_hex(COLOURS)


def _supervision() -> object:
    try:
        import supervision
    except ImportError:
        raise ImportError("Drawing needs supervision: pip install 'linear-vision-zoo[dense]'.") from None
    return supervision
