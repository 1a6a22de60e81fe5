"""The sample pictures of the demo: drawings of the held-out style in scenes, so nothing in them was trained on."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from random import Random

from PIL import Image, ImageFilter

from zoo.files import write_bytes, write_text
from zoo.tools.quickstart.attribution import LICENCE_TEXTS
from zoo.tools.quickstart.backgrounds import BACKGROUNDS
from zoo.tools.quickstart.classes import key
from zoo.tools.quickstart.packages import PACKAGES, Package, read_members
from zoo.tools.quickstart.pictures import VISIBLE, decode

SIDE = 320

# Class slug and background of every picture; the class is also the file's name.
SAMPLES = (
    ("bicycle", "street"),
    ("cactus", "dunes"),
    ("dog-face", "meadow"),
    ("elephant", "sunset"),
    ("locomotive", "rain"),
    ("octopus", "sea"),
    ("penguin", "snow"),
    ("pizza", "checks"),
    ("rocket", "night"),
    ("strawberry", "lights"),
    ("teapot", "table"),
    ("umbrella", "street"),
)

ATTRIBUTION = """# Where these pictures come from

Each picture shows a drawing of {name} {version} (<{source}>)
by {author}, licensed under
[{licence}]({text}).
The drawing was rasterised, turned a little, given a shadow and put on a background that
`tools/build_quickstart_data.py samples` draws. The pictures are therefore licensed under {licence} too.

"""


def compose(drawing: Image.Image, background: str, random: Random) -> Image.Image:
    """Puts a drawing into a scene.

    Args:
        drawing: RGBA.
        background: One of ``BACKGROUNDS``.
        random: Where size (64 % to 78 % of the side), turn (up to 10 degrees) and place come from.

    Returns:
        RGB, ``SIDE`` x ``SIDE``.
    """
    side = 2 * SIDE  # drawn at twice the size, so that every edge is smooth
    scene = BACKGROUNDS[background](side, random)
    turned = drawing.rotate(random.uniform(-10, 10), Image.Resampling.BICUBIC, expand=True)
    turned = turned.crop(turned.getchannel("A").point(lambda alpha: 255 * (alpha >= VISIBLE)).getbbox())
    scale = side * random.uniform(0.64, 0.78) / max(turned.size)
    turned = turned.resize([round(length * scale) for length in turned.size], Image.Resampling.LANCZOS)
    left, top = (round((side - length) * random.uniform(0.4, 0.6)) for length in turned.size)
    shadow = Image.new("L", scene.size)
    shadow.paste(turned.getchannel("A").point(lambda alpha: alpha * 0.4), (left + side // 60, top + side // 40))
    scene.paste((0, 0, 0), mask=shadow.filter(ImageFilter.GaussianBlur(side / 60)))
    scene.paste(turned, (left, top), turned)
    return scene.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def write_samples(root: Path, out: Path, tarballs: Path, packages: Sequence[Package] = PACKAGES) -> list[Path]:
    """Writes the sample pictures and their attribution, and removes samples that are no longer listed.

    Args:
        root: A built data folder, whose ``classes.json`` says which emoji a slug is.
        out: Folder of the pictures; JPEG files in it that are not in ``SAMPLES`` are deleted.
        tarballs: Folder with the tarball of the held-out style.
        packages: The pinned packages.

    Returns:
        The pictures.

    Raises:
        FileNotFoundError: ``root`` was not built, or the tarball is missing.
        ValueError: A slug of ``SAMPLES`` is no class.
    """
    hexcodes = {entry["slug"]: entry["hexcode"] for entry in json.loads((root / "classes.json").read_text("utf-8"))}
    unknown = [slug for slug, _ in SAMPLES if slug not in hexcodes]
    if unknown:
        raise ValueError(f"{', '.join(unknown)} in SAMPLES is no class of {root}: use slugs from its classes.json.")
    (package,) = (package for package in packages if package.held_out)
    sources = {
        key(Path(name).stem): data for name, data in read_members(tarballs / package.tarball, package.folder).items()
    }
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for slug, background in SAMPLES:
        buffer = io.BytesIO()
        compose(decode(sources[hexcodes[slug]], 2 * SIDE), background, Random(slug)).save(
            buffer, "JPEG", quality=88, optimize=True
        )
        written.append(out / f"{slug}.jpg")
        write_bytes(written[-1], buffer.getvalue())
    for old in set(out.glob("*.jpg")) - set(written):
        old.unlink()
    text = ATTRIBUTION.format(**vars(package), text=LICENCE_TEXTS[package.licence])
    text += "".join(f"* `{path.name}`: OpenMoji {hexcodes[path.stem]}\n" for path in written)
    write_text(out / "ATTRIBUTION.md", text)
    return written
