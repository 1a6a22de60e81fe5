"""Pictures of the quickstart data: decoding, bringing all styles to one extent, writing small files."""

import io

import numpy as np
import resvg_py
from PIL import Image

SIZE = 128
MARGIN = 5  # pixels left free on each side, about 4 %
RASTER = 256  # side at which drawings made of vectors are rasterised before they are scaled down
VISIBLE = 16  # alpha from which a pixel counts as part of the drawing
STEPS = (5, 5, 5, 17)  # red, green, blue and alpha are rounded to multiples of these: nobody sees it, and files halve


def decode(data: bytes, side: int = RASTER) -> Image.Image:
    """Decodes a PNG, WebP or SVG file to RGBA.

    Args:
        data: The file.
        side: Width in pixels at which an SVG is rasterised; other formats keep their size.

    Returns:
        The picture, RGBA.
    """
    if data.lstrip()[:5] in (b"<?xml", b"<svg "):
        data = resvg_py.svg_to_bytes(svg_string=data.decode(), width=side, skip_system_fonts=True)
    return Image.open(io.BytesIO(data)).convert("RGBA")


def normalise(picture: Image.Image, size: int = SIZE, margin: int = MARGIN) -> Image.Image:
    """Crops a drawing to what is visible, scales its longer side to the frame and centres it.

    Args:
        picture: RGBA, any size.
        size: Side of the result in pixels.
        margin: Pixels left free on each side.

    Returns:
        RGBA, ``size`` x ``size``, channels rounded to ``STEPS``; fully transparent pixels are black.

    Raises:
        ValueError: Nothing is visible.
    """
    box = picture.getchannel("A").point(lambda alpha: 255 * (alpha >= VISIBLE)).getbbox()
    if box is None:
        raise ValueError(f"the picture of {picture.width}x{picture.height} pixels is empty.")
    drawing = picture.crop(box)
    scale = (size - 2 * margin) / max(drawing.size)
    width, height = (max(1, round(side * scale)) for side in drawing.size)
    drawing = drawing.resize((width, height), Image.Resampling.LANCZOS)
    framed = Image.new("RGBA", (size, size))
    framed.paste(drawing, ((size - width) // 2, (size - height) // 2))
    pixels = np.rint(np.asarray(framed) / STEPS) * STEPS
    pixels[pixels[..., 3] == 0] = 0  # invisible colours cost bytes and make equal drawings differ
    return Image.fromarray(pixels.astype(np.uint8))


def encode(picture: Image.Image) -> bytes:
    """Returns a picture as a small PNG file without metadata."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def thumbprint(picture: Image.Image) -> np.ndarray:
    """Returns what an RGBA picture looks like at 32 x 32, alpha multiplied in: float32, (4096,), values in 0..1."""
    pixels = np.asarray(picture.resize((32, 32), Image.Resampling.BOX), np.float32) / 255
    pixels[..., :3] *= pixels[..., 3:]
    return pixels.ravel()


def close_pairs(prints: dict[str, np.ndarray], limit: float) -> list[tuple[str, str, float]]:
    """Finds pictures that look alike.

    Args:
        prints: :func:`thumbprint` by name.
        limit: Root mean square difference below which two pictures are alike; 0 is identical, 1 black against white.

    Returns:
        ``(name, later name, difference)`` in the order of ``prints``, the closest first.
    """
    names = list(prints)
    matrix = np.stack(list(prints.values())).astype(np.float64)
    squares = (matrix**2).mean(1)
    difference = np.sqrt(np.maximum(squares[:, None] + squares - 2 * (matrix @ matrix.T) / matrix.shape[1], 0))
    pairs = np.argwhere(np.triu(difference < limit, 1))
    found = [(names[i], names[j], round(float(difference[i, j]), 4)) for i, j in pairs]
    return sorted(found, key=lambda pair: pair[2])
