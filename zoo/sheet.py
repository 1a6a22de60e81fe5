"""One picture that shows pictures with what a model sees in them: the annotated sheet of `zoo classify --out`."""

import os
import unicodedata
from collections.abc import Sequence
from functools import lru_cache

from PIL import Image, ImageDraw, ImageFont

from zoo.classifier import Result

LIMIT = 60  # pictures on a sheet
THUMBNAIL = 280  # pixels, the width of a tile and the edge of its square picture
NAMES = 3  # predictions under a picture
MARGIN, GAP = 48, 36
TITLE, CAPTION, TEXT = 30, 20, 18  # font sizes
ROW = 44  # height of a name with its bar
BAR = 8
TILE = THUMBNAIL + 16 + CAPTION + 20 + NAMES * ROW
INK, MUTED, FAINT, TRACK, BACKDROP = "#18181b", "#52525b", "#71717a", "#e4e4e7", "#f4f4f5"
ACCENT, ACCENT_LIGHT = "#2563eb", "#93b4f5"


def draw_sheet(results: Sequence[Result], title: str, total: int | None = None) -> Image.Image:
    """Draw the pictures in a grid, under each its file name and the top names with bars of their probabilities.

    Args:
        results: predictions with thumbnails; the first `LIMIT` are drawn.
        title: the line at the top.
        total: number of pictures there were, to say how many are not shown; by default those in `results`.

    Returns:
        An RGB image on white.
    """
    shown = results[:LIMIT]
    columns = columns_of(len(shown))
    rows = -(-len(shown) // columns)
    left_out = (total or len(results)) - len(shown)
    top = MARGIN + TITLE + GAP
    grid = columns * THUMBNAIL + (columns - 1) * GAP
    width = 2 * MARGIN + max(grid, round(font(TITLE).getlength(title)))
    height = top + rows * TILE + (rows - 1) * GAP + (MARGIN if not left_out else 2 * MARGIN)
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN), title, INK, font(TITLE))
    for index, result in enumerate(shown):
        row, column = divmod(index, columns)
        _draw_tile(sheet, draw, MARGIN + column * (THUMBNAIL + GAP), top + row * (TILE + GAP), result)
    if left_out:
        draw.text((MARGIN, height - MARGIN - CAPTION), f"and {left_out:,} more pictures", FAINT, font(CAPTION))
    return sheet


def _draw_tile(sheet: Image.Image, draw: ImageDraw.ImageDraw, x: int, y: int, result: Result) -> None:
    edge = THUMBNAIL
    paste_in_square(sheet, x, y, edge, result.thumbnail)
    y += edge + 16
    draw.text((x, y), fit(os.path.basename(result.source) or result.source, CAPTION, edge), MUTED, font(CAPTION))
    y += CAPTION + 20
    best = zip(result.prediction.names[:NAMES], result.prediction.probabilities)
    for rank, (name, probability) in enumerate(best):
        share = f"{probability:.1%}"
        share_width = font(TEXT).getlength(share)
        draw.text((x, y), fit(name, TEXT, edge - share_width - 16), INK if rank == 0 else MUTED, font(TEXT))
        draw.text((x + edge - share_width, y), share, INK if rank == 0 else MUTED, font(TEXT))
        bar = (x, y + TEXT + 7, x + edge - 1, y + TEXT + 6 + BAR)
        draw.rounded_rectangle(bar, BAR // 2, TRACK)
        filled = max(BAR, round(edge * probability))  # never thinner than its round ends
        draw.rounded_rectangle((*bar[:2], x + filled - 1, bar[3]), BAR // 2, ACCENT if rank == 0 else ACCENT_LIGHT)
        y += ROW


def columns_of(count: int) -> int:
    """How many of so many pictures are side by side."""
    return min(count, 4 if count <= 16 else 6)


def paste_in_square(sheet: Image.Image, x: int, y: int, edge: int, picture: Image.Image) -> None:
    """Put a picture of at most that edge in the middle of a light square with round corners."""
    backdrop = Image.new("RGB", (edge, edge), BACKDROP)
    backdrop.paste(picture, ((edge - picture.width) // 2, (edge - picture.height) // 2))
    sheet.paste(backdrop, (x, y), _rounded(edge))


@lru_cache
def _rounded(edge: int) -> Image.Image:
    """A mask with round corners, drawn four times as large so that they are smooth."""
    mask = Image.new("L", (4 * edge, 4 * edge))
    ImageDraw.Draw(mask).rounded_rectangle((0, 0, 4 * edge - 1, 4 * edge - 1), 4 * 14, 255)
    return mask.resize((edge, edge), Image.Resampling.LANCZOS)


@lru_cache
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font, of that many pixels."""
    return ImageFont.load_default(size=size)


def fit(text: str, size: int, width: float) -> str:
    """The text in letters that Pillow's own font has, cut with an ellipsis where it is too wide."""
    letters = (c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    text = "".join(c if (c.isascii() and c.isprintable()) or c in "·…" else "?" for c in letters)
    if font(size).getlength(text) <= width:
        return text
    while text and font(size).getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"
