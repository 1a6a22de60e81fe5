"""Maps over a picture, side by side in one picture, in the manner of the sheet of `zoo classify --out`."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch.nn.functional as F
from PIL import Image, ImageColor, ImageDraw, ImageOps
from torch import Tensor

from zoo.sheet import BAR, CAPTION, GAP, INK, MARGIN, MUTED, TEXT, TITLE, columns_of, fit, font, paste_in_square

EDGE = 320  # pixels of a panel's square
PANEL = EDGE + 16 + CAPTION + 10 + TEXT + 14 + BAR + 8 + TEXT
# Colours of positive and of negative values at half the largest and at the largest; towards 0 they become transparent.
FOR, AGAINST = ("#fbbf24", "#b91c1c"), ("#7dd3fc", "#1d4ed8")
DENSITY = 0.85  # of colours, at most: the picture is seen through them
PALE = 0.45  # how far the picture under a map is lightened
SIGNED = 1e-3  # a share of the largest value below which negative ones are rounding


@dataclass(frozen=True)
class Panel:
    """A picture with what is said under it.

    Attributes:
        title: what it shows.
        note: one line more.
        picture: at most EDGE pixels wide and high.
        ends: values at the ends of the scale of colours; None for no scale.
    """

    title: str
    note: str
    picture: Image.Image
    ends: tuple[float, float] | None = None


def map_panel(title: str, note: str, picture: Image.Image, values: Tensor, smooth: bool = False) -> Panel:
    """A map over a picture: yellow to red where it is positive, light to dark blue where it is negative.

    The colours of a map without negative values begin at its least one, so that an even map shows differences too.

    Args:
        title: of the panel.
        note: of the panel.
        picture: RGB, the panel's size.
        values: (H, W), of the whole picture.
        smooth: interpolate linearly instead of showing squares.
    """
    values = values.float().cpu()
    low, high = values.min().item(), values.abs().max().item()
    low = -high if low < -SIGNED * high else max(low, 0.0)
    shares = (upsampled(values, picture.size, smooth) - max(low, 0)) / (high - max(low, 0) or 1)
    grey = np.asarray(ImageOps.grayscale(picture).convert("RGB"), np.float32)
    pale = grey + (255 - grey) * PALE
    return Panel(title, note, Image.fromarray(_coloured(pale, shares.numpy())), (low, high))


def upsampled(values: Tensor, size: tuple[int, int], smooth: bool) -> Tensor:
    """A map (H, W) as large as a picture of some width and height: (height, width)."""
    form = {"mode": "bilinear", "align_corners": False} if smooth else {"mode": "nearest-exact"}
    return F.interpolate(values[None, None], size[::-1], **form)[0, 0]


def marked(picture: Image.Image, point: tuple[int, int], size: tuple[int, int]) -> Image.Image:
    """A copy with a ring around a pixel of the original, which is of some width and height."""
    x, y = ((at + 0.5) * edge / whole for at, edge, whole in zip(point, picture.size, size))
    copy = picture.copy()
    draw = ImageDraw.Draw(copy)
    for radius, width, colour in ((9, 5, "white"), (8, 3, INK)):
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), outline=colour, width=width)
    return copy


def draw_panels(title: str, panels: Sequence[Panel]) -> Image.Image:
    """Draw panels in a grid, on white, with a title at the top."""
    columns = columns_of(len(panels))
    rows = -(-len(panels) // columns)
    grid, top = columns * EDGE + (columns - 1) * GAP, MARGIN + TITLE + GAP
    sheet = Image.new("RGB", (2 * MARGIN + grid, top + rows * PANEL + (rows - 1) * GAP + MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN), fit(title, TITLE, grid), INK, font(TITLE))
    for index, panel in enumerate(panels):
        row, column = divmod(index, columns)
        _draw_panel(sheet, draw, MARGIN + column * (EDGE + GAP), top + row * (PANEL + GAP), panel)
    return sheet


def _draw_panel(sheet: Image.Image, draw: ImageDraw.ImageDraw, x: int, y: int, panel: Panel) -> None:
    paste_in_square(sheet, x, y, EDGE, panel.picture)
    y += EDGE + 16
    draw.text((x, y), fit(panel.title, CAPTION, EDGE), INK, font(CAPTION))
    y += CAPTION + 10
    draw.text((x, y), fit(panel.note, TEXT, EDGE), MUTED, font(TEXT))
    if panel.ends is None:
        return
    y += TEXT + 14
    low, high = panel.ends
    scale = np.broadcast_to(np.linspace(-1 if low < 0 else 0, 1, EDGE), (BAR, EDGE))
    sheet.paste(Image.fromarray(_coloured(np.full((BAR, EDGE, 3), 228, np.float32), scale)), (x, y))
    y += BAR + 8
    draw.text((x, y), f"{low:.3g}", MUTED, font(TEXT))
    end = f"{high:.3g}"
    draw.text((x + EDGE - font(TEXT).getlength(end), y), end, MUTED, font(TEXT))


def _coloured(under: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Colours laid over pixels (H, W, 3), by values (H, W) in -1..1."""
    far = np.abs(shares)
    stops = np.where(shares[None, ..., None] < 0, _rgb(AGAINST), _rgb(FOR))  # (2, H, W, 3)
    colours = stops[0] + (stops[1] - stops[0]) * np.maximum(2 * far - 1, 0)[..., None]
    density = DENSITY * np.minimum(2 * far, 1)[..., None]
    return (under + (colours - under) * density).round().astype(np.uint8)


def _rgb(colours: Sequence[str]) -> np.ndarray:
    return np.array([ImageColor.getrgb(colour) for colour in colours], np.float32)[:, None, None]
