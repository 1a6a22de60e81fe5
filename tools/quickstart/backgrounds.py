"""Backgrounds for the sample scenes, drawn by procedure: each function takes a side and a random source."""

import math
from collections.abc import Callable
from random import Random

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

Colour = tuple[int, int, int]


def _fade(side: int, top: Colour, bottom: Colour, angle: float = 90) -> Image.Image:
    """Returns a linear gradient; ``angle`` in degrees is where it goes, 90 is down."""
    y, x = np.mgrid[0:side, 0:side] / (side - 1)
    along = x * math.cos(math.radians(angle)) + y * math.sin(math.radians(angle))
    along = (along - along.min()) / np.ptp(along)
    return Image.fromarray(np.uint8(np.array(top) + along[..., None] * (np.array(bottom) - top)))


def _ridge(picture: Image.Image, random: Random, height: float, swing: float, top: Colour, bottom: Colour) -> None:
    """Fills everything below a gently waving line at ``height`` (fraction from the top) with a gradient."""
    side, phase = picture.width, random.uniform(0, 6.3)
    line = [(x, side * (height + swing * math.sin(phase + 5 * x / side))) for x in range(side + 1)]
    mask = Image.new("L", picture.size)
    ImageDraw.Draw(mask).polygon([*line, (side, side), (0, side)], fill=255)
    picture.paste(_fade(side, top, bottom), mask=mask)


def meadow(side: int, random: Random) -> Image.Image:
    """Sky, two hills and blades of grass."""
    picture = _fade(side, (96, 170, 236), (226, 242, 252))
    _ridge(picture, random, 0.55, 0.05, (124, 178, 92), (70, 130, 60))
    _ridge(picture, random, 0.68, 0.03, (104, 184, 78), (44, 112, 40))
    draw = ImageDraw.Draw(picture)
    for _ in range(side // 2):
        x, y = random.uniform(0, side), side * random.uniform(0.75, 1)
        draw.line((x, y, x + random.uniform(-4, 4), y - side * 0.04), fill=(60, random.randint(120, 170), 50), width=2)
    return picture


def dunes(side: int, random: Random) -> Image.Image:
    """A warm sky, a low sun and sand."""
    picture = _fade(side, (250, 176, 120), (255, 232, 190))
    x, y, radius = side * 0.82, side * 0.2, side * 0.08
    ImageDraw.Draw(picture).ellipse((x - radius, y - radius, x + radius, y + radius), fill=(255, 248, 220))
    for number, height in enumerate((0.52, 0.66, 0.8)):
        shade = 22 * number
        _ridge(picture, random, height, 0.04, (244 - shade, 200 - shade, 140 - shade), (196 - shade, 140 - shade, 84))
    return picture


def sea(side: int, random: Random) -> Image.Image:
    """Deep water with rays of light, bubbles and a sandy ground."""
    picture = _fade(side, (120, 214, 226), (10, 62, 120))
    light = Image.new("L", picture.size)
    draw = ImageDraw.Draw(light)
    for start in (0.1, 0.4, 0.7):
        draw.polygon(
            [
                (side * start, 0),
                (side * (start + 0.12), 0),
                (side * (start - 0.1), side),
                (side * (start - 0.35), side),
            ],
            fill=50,
        )
    picture.paste((255, 255, 255), mask=light.filter(ImageFilter.GaussianBlur(side / 40)))
    _ridge(picture, random, 0.88, 0.02, (214, 190, 140), (160, 130, 90))
    draw = ImageDraw.Draw(picture)
    for _ in range(14):
        x, y, radius = random.uniform(0, side), random.uniform(0, side * 0.85), side * random.uniform(0.008, 0.025)
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), outline=(200, 240, 250), width=2)
    return picture


def snow(side: int, random: Random) -> Image.Image:
    """A cold sky, hills of snow and falling flakes."""
    picture = _fade(side, (110, 140, 180), (206, 220, 236))
    _ridge(picture, random, 0.6, 0.05, (232, 240, 250), (196, 212, 232))
    _ridge(picture, random, 0.75, 0.03, (250, 252, 255), (214, 226, 242))
    draw = ImageDraw.Draw(picture)
    for _ in range(70):
        x, y, radius = random.uniform(0, side), random.uniform(0, side), side * random.uniform(0.004, 0.01)
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=(255, 255, 255))
    return picture


def street(side: int, random: Random) -> Image.Image:
    """Houses in haze behind a road."""
    picture = _fade(side, (170, 200, 226), (240, 236, 226))
    draw = ImageDraw.Draw(picture)
    x = 0.0
    while x < side:
        width, top = side * random.uniform(0.1, 0.18), side * random.uniform(0.2, 0.45)
        shade = random.randint(150, 200)
        draw.rectangle((x, top, x + width, side), fill=(shade, shade - 14, shade - 20))
        x += width
    draw.rectangle((0, side * 0.72, side, side), fill=(104, 106, 112))
    for start in range(0, side, side // 5):
        draw.rectangle((start, side * 0.87, start + side // 9, side * 0.89), fill=(236, 232, 210))
    return picture


def night(side: int, random: Random) -> Image.Image:
    """A night sky full of stars."""
    picture = _fade(side, (10, 12, 42), (66, 50, 116))
    draw = ImageDraw.Draw(picture)
    for _ in range(90):
        x, y, radius = random.uniform(0, side), random.uniform(0, side), side * random.uniform(0.001, 0.005)
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=(255, 250, random.randint(200, 255)))
    return picture


def checks(side: int, random: Random) -> Image.Image:
    """A checked tablecloth, a little tilted."""
    wide = 2 * side
    stripes = (np.arange(wide) // (side // 8)) % 2
    cloth = np.array([(250, 248, 240), (222, 120, 116), (186, 44, 48)])[stripes[:, None] + stripes]
    turned = Image.fromarray(np.uint8(cloth)).rotate(random.uniform(10, 30), Image.Resampling.BICUBIC)
    return turned.crop((side // 2, side // 2, side // 2 + side, side // 2 + side))


def table(side: int, random: Random) -> Image.Image:
    """A wall and a wooden table with its grain."""
    picture = _fade(side, (206, 222, 214), (178, 200, 190))
    wood = _fade(side, (196, 144, 92), (140, 92, 52))
    draw = ImageDraw.Draw(wood)
    for _ in range(60):
        x, y, shade = random.uniform(-side / 2, side), random.uniform(0, side), random.randint(-18, 18)
        draw.line(
            (x, y, x + side * 0.5, y + random.uniform(-3, 3)), fill=(158 + shade, 108 + shade, 64 + shade), width=2
        )
    picture.paste(wood.crop((0, 0, side, side - round(side * 0.62))), (0, round(side * 0.62)))
    return picture


def rain(side: int, random: Random) -> Image.Image:
    """Grey clouds and streaks of rain."""
    picture = _fade(side, (96, 108, 124), (176, 186, 196))
    draw = ImageDraw.Draw(picture)
    for _ in range(110):
        x, y, length = random.uniform(0, side * 1.1), random.uniform(-20, side), side * random.uniform(0.03, 0.08)
        draw.line((x, y, x - length * 0.3, y + length), fill=(206, 220, 232), width=2)
    return picture


def lights(side: int, random: Random) -> Image.Image:
    """Out-of-focus lights on a slanted gradient."""
    picture = _fade(side, (44, 110, 96), (206, 214, 120), 60)
    for _ in range(16):
        x, y, radius = random.uniform(0, side), random.uniform(0, side), side * random.uniform(0.04, 0.12)
        disc = Image.new("L", picture.size)
        ImageDraw.Draw(disc).ellipse((x - radius, y - radius, x + radius, y + radius), fill=70)
        picture.paste((255, 250, 200), mask=disc.filter(ImageFilter.GaussianBlur(side / 120)))
    return picture


def sunset(side: int, random: Random) -> Image.Image:
    """A red sky over dark hills."""
    picture = _fade(side, (88, 60, 130), (255, 160, 90))
    _ridge(picture, random, 0.7, 0.04, (92, 74, 96), (50, 44, 64))
    return picture


BACKGROUNDS: dict[str, Callable[[int, Random], Image.Image]] = {
    draw.__name__: draw for draw in (meadow, dunes, sea, snow, street, night, checks, table, rain, lights, sunset)
}
