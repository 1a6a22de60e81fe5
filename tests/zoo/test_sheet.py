"""zoo.sheet: the size, the pictures, the bars and the text of an annotated sheet."""

import numpy as np
import pytest
from PIL import Image, ImageOps

from zoo.classifier import Prediction, Result
from zoo.sheet import ACCENT, GAP, LIMIT, MARGIN, THUMBNAIL, TILE, TITLE, draw_sheet, fit, font

RED = (220, 20, 60)


def result(probabilities=(0.5, 0.3, 0.1), size=(THUMBNAIL, THUMBNAIL), name="apple", source="some/where/apple.png"):
    prediction = Prediction((name,) * len(probabilities), tuple(probabilities), tuple(range(len(probabilities))))
    thumbnail = ImageOps.contain(Image.new("RGB", size, RED), (THUMBNAIL, THUMBNAIL))
    return Result(source, prediction, thumbnail=thumbnail)


def is_colour(image, colour):
    return (np.asarray(image).astype(int) == colour).all(-1)


@pytest.mark.parametrize(
    ("count", "columns", "rows"), [(1, 1, 1), (3, 3, 1), (4, 4, 1), (5, 4, 2), (12, 4, 3), (17, 6, 3)]
)
def test_grid(count, columns, rows):
    sheet = draw_sheet([result()] * count, "m")
    width = 2 * MARGIN + columns * THUMBNAIL + (columns - 1) * GAP
    assert sheet.size == (width, 2 * MARGIN + TITLE + GAP + rows * TILE + (rows - 1) * GAP)
    red = is_colour(sheet, RED)
    assert red.sum() == pytest.approx(count * THUMBNAIL**2, rel=0.01)  # all but the round corners
    top = MARGIN + TITLE + GAP
    for index in range(count):
        row, column = divmod(index, columns)
        x, y = MARGIN + column * (THUMBNAIL + GAP), top + row * (TILE + GAP)
        assert red[y + 20 : y + THUMBNAIL - 20, x + 20 : x + THUMBNAIL - 20].all()
    border = np.ones(red.shape, bool)
    border[MARGIN:-MARGIN, MARGIN:-MARGIN] = False
    assert (np.asarray(sheet)[border] == 255).all()  # the margins are white


def test_bars_are_as_long_as_the_probabilities():
    def bar(probability):
        blue = is_colour(draw_sheet([result((probability, 0.0, 0.0))], "m"), tuple(bytes.fromhex(ACCENT[1:])))
        return blue.any(0).sum()

    for probability in (0.1, 0.25, 0.5, 0.9, 1.0):
        assert bar(probability) == pytest.approx(THUMBNAIL * probability, abs=1)
    assert bar(0.0) > 0


def test_letterboxing_keeps_the_shape():
    red = is_colour(draw_sheet([result(size=(400, 100))], "m"), RED)
    assert red.any(1).sum() == THUMBNAIL // 4 and red.any(0).sum() == THUMBNAIL


def test_names_are_written():
    one, other = (np.asarray(draw_sheet([result(name=name)], "m")) for name in ("apple", "bicycle"))
    text = slice(MARGIN + TITLE + GAP + THUMBNAIL, None)
    assert (one[text] < 128).any() and (one[text] != other[text]).any()
    assert (np.asarray(draw_sheet([result()], "one"))[:100] != np.asarray(draw_sheet([result()], "two"))[:100]).any()


def test_long_titles_and_names_stay_inside():
    long = "a name that is much too long for the width of a picture " * 3
    sheet = np.asarray(draw_sheet([result(name=long, source=long)], "title " * 30))
    assert (sheet[:, -MARGIN + 2 :] == 255).all()
    fitted = fit(long, 18, 200)
    assert fitted.endswith("…") and 150 < font(18).getlength(fitted) <= 200 and long.startswith(fitted[:-1])
    assert fit("short", 18, 200) == "short"
    assert fit("piñata Ω", 18, 200) == "pinata ?"
    assert fit("anything", 18, 0) == "…"


def test_a_sheet_is_limited():
    sheet = draw_sheet([result()] * (LIMIT + 5), "m")
    assert is_colour(sheet, RED).sum() == pytest.approx(LIMIT * THUMBNAIL**2, rel=0.01)
    footer = np.asarray(sheet)[-2 * MARGIN : -MARGIN]
    assert (footer < 200).any()  # "and 5 more pictures"


def test_fewer_names_than_three():
    assert draw_sheet([result((1.0,))], "m").size == draw_sheet([result()], "m").size
