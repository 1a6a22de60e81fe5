"""Scenes of many drawings with exact boxes, instance masks, semantic and panoptic maps, in COCO's and mmseg's layouts.

A folder of scenes holds, for the splits ``train`` (training styles) and ``test`` (the held-out style)::

    images/train/000000.jpg         the scene
    labels/train/000000.png         class of every pixel: 0 is the background, k the k-th category (mmseg)
    panoptic/train/000000.png       segment of every pixel, as COCO codes it in red, green and blue
    annotations/instances_train.json, annotations/panoptic_train.json
    ATTRIBUTION.md

A scene is a pure function of the seed, its split and its number. What was complete when a build was stopped is kept.
"""

import dataclasses
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from itertools import count
from multiprocessing import get_context
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter
from rich.console import Console
from rich.progress import track

from zoo.files import write_bytes, write_text
from zoo.tools.quickstart.attribution import attribution
from zoo.tools.quickstart.backgrounds import BACKGROUNDS
from zoo.tools.quickstart.packages import PACKAGES
from zoo.tools.sprites import PLAIN, Composer, Draws, Recipe, Sprites, load_sprites, paint_background, seed_of

# Clear things of one drawing each; slugs of the quickstart classes, sorted.
_SLUGS = """
airplane anchor balloon banana bicycle birthday-cake bus butterfly cactus camera carrot crab crown dog-face elephant
fish grapes guitar hamburger hammer honeybee light-bulb locomotive mushroom octopus owl palm-tree penguin pineapple
pizza rocket sailboat scissors snail soccer-ball strawberry sunflower teapot turtle umbrella
"""
CATEGORIES = tuple(_SLUGS.split())
SPLITS = ("train", "test")
# Training drawings change what styles change; those of the held-out style are only turned, tilted and mirrored.
RECIPES = {
    "train": Recipe(geometry=0.6, colour=0.8),
    "test": dataclasses.replace(PLAIN, geometry=0.5, flip=0.35),
}
DRAWN = 144  # pixels, side of a drawing before it is scaled into a scene
CHUNK = 50  # scenes that are made, kept or lost together
VERSIONS = 8  # drawings per category for a chunk, which no other has

SIDES = (250, 400)  # pixels, of scenes
LENGTHS = (16, 200)  # pixels, the longer side of a drawing in a scene
MOST = {"train": 20, "test": 12}  # drawings in a scene: a detector learns from each, a step takes as long for few
EMPTY = 0.04  # share of scenes without any
VISIBLE = 0.4  # share of a drawing that later ones leave
INSIDE = 0.65  # share of a drawing that is within the picture
FEWEST = 24  # pixels of a drawing
OPAQUE = 128  # alpha from which a pixel belongs to the drawing
PAINTED = 0.6  # share of scenes in front of colours and patterns; the rest are landscapes


@dataclass(frozen=True)
class Scene:
    """One scene.

    Attributes:
        picture: RGB, (H, W, 3) uint8.
        instances: (H, W) uint8, 0 for the background and k for what ``categories[k - 1]`` is of; the visible parts.
        categories: places in ``CATEGORIES``, (N,), at most ``MOST``.
    """

    picture: np.ndarray
    instances: np.ndarray
    categories: list[int]


def build_scenes(
    root: Path, out: Path, *, train: int = 6000, test: int = 1000, seed: int = 0, workers: int | None = None
) -> dict[str, dict[str, int]]:
    """Builds a folder of scenes from the quickstart sprites.

    Args:
        root: Folder with ``train``, ``test`` and ``classes.json``, as ``build`` makes it.
        out: Where to build. What an interrupted build with the same settings completed there is kept.
        train: Scenes of the training styles.
        test: Scenes of the held-out style.
        seed: Of all randomness.
        workers: Processes; None for one per core.

    Returns:
        Number of scenes and of objects by split.

    Raises:
        FileNotFoundError: ``root`` was not built.
        ValueError: ``out`` holds scenes of other settings, or other files.
    """
    categories = _categories(root)
    sizes = {"train": train, "test": test}
    claim(out / "scenes.json", {"categories": list(CATEGORIES), "sizes": sizes, "seed": seed})
    done = {}
    for split, scenes in sizes.items():
        final = out / "annotations" / f"instances_{split}.json"
        if not final.exists():
            _build_split(root, out, split, scenes, seed, workers, categories)
        found = json.loads(final.read_text("utf-8"))
        done[split] = {"scenes": len(found["images"]), "objects": len(found["annotations"])}
    write_text(out / "ATTRIBUTION.md", attribution(PACKAGES))
    shutil.rmtree(out / ".building", ignore_errors=True)
    return done


def claim(file: Path, settings: dict[str, Any]) -> None:
    """Write down with what settings a folder is built; refuse one that holds anything else."""
    out = file.parent
    if not file.exists() and out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} holds other files: choose an empty or a new folder.")
    if file.exists() and json.loads(file.read_text("utf-8")) != settings:
        raise ValueError(f"{out} was built with other settings: choose another folder.")
    write_text(file, json.dumps(settings, indent=1))


def entries(root: Path, slugs: Sequence[str]) -> list[dict[str, str]]:
    """What ``classes.json`` says about some classes: slug, name and group."""
    if not (root / "classes.json").is_file():
        raise FileNotFoundError(
            f"{root} holds no classes.json: build it with `python -m zoo.tools.build_quickstart_data build {root}`."
        )
    known = {entry["slug"]: entry for entry in json.loads((root / "classes.json").read_text("utf-8"))}
    if lacking := [slug for slug in slugs if slug not in known]:
        raise ValueError(f"{', '.join(lacking)}: no class of {root}, build it again.")
    return [known[slug] for slug in slugs]


def _categories(root: Path) -> list[dict[str, Any]]:
    return [
        {"id": number, "name": entry["name"], "supercategory": entry["group"]}
        for number, entry in enumerate(entries(root, CATEGORIES), 1)
    ]


def _build_split(
    root: Path,
    out: Path,
    split: str,
    scenes: int,
    seed: int,
    workers: int | None,
    categories: list[dict[str, Any]],
) -> None:
    scratch = out / ".building"
    scratch.mkdir(exist_ok=True)
    for kind in ("images", "labels", "panoptic"):
        (out / kind / split).mkdir(parents=True, exist_ok=True)
    parts = [scratch / f"{split}-{start:06d}.json" for start in range(0, scenes, CHUNK)]
    if missing := [number for number, part in enumerate(parts) if not part.exists()]:
        jobs = [(root, out, split, number * CHUNK, min(scenes, (number + 1) * CHUNK), seed) for number in missing]
        run_jobs(_build_chunk, jobs, split, workers)
    records = [record for part in parts for record in json.loads(part.read_text("utf-8"))]
    write_json(out / "annotations" / f"panoptic_{split}.json", _panoptic(records, categories))
    write_json(out / "annotations" / f"instances_{split}.json", _instances(records, categories))


def run_jobs(build: Callable[[Any], None], jobs: Sequence[Any], title: str, workers: int | None) -> None:
    """Build in worker processes, one per core by default, with a progress bar on a terminal."""
    console = Console(stderr=True)
    # Not forked: torch's threads do not survive that.
    with ProcessPoolExecutor(workers or os.cpu_count(), get_context("spawn")) as pool:
        done = pool.map(build, jobs)
        for _ in track(done, title, len(jobs), console=console, disable=not console.is_terminal):
            pass


def draw_versions(
    folder: Path, slugs: Sequence[str], recipe: Recipe, versions: int, side: int, seed: int
) -> np.ndarray:
    """Drawings (slugs, versions, side, side, 4) uint8, colour premultiplied by alpha; the slugs are sorted."""
    composer = Composer(_sprites(folder, tuple(slugs)), side, seed, recipe)
    found = np.zeros((len(slugs), versions, side, side, 4), np.uint8)
    for version in range(versions):
        pixels, labels = composer.drawings(version, len(slugs))
        found[labels.numpy(), version] = (pixels.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    return found


@lru_cache(maxsize=1)
def _sprites(folder: Path, slugs: tuple[str, ...]) -> Sprites:
    return load_sprites(folder, classes=slugs)


def _build_chunk(job: tuple[Path, Path, str, int, int, int]) -> None:
    """In a worker process: the files of some scenes, and last of all their annotations."""
    root, out, split, start, stop, seed = job
    torch.set_num_threads(1)
    key = seed_of(seed, SPLITS.index(split), start)
    drawings = draw_versions(root / split, CATEGORIES, RECIPES[split], VERSIONS, DRAWN, key)
    backdrops = painted(key, stop - start, SIDES[1])
    records = []
    for number, backdrop in zip(range(start, stop), backdrops):
        random = Random(seed_of(seed, SPLITS.index(split), number, 1))
        scene = compose_scene(drawings, backdrop, random, MOST[split])
        name = f"{number:06d}"
        quality = random.randint(75, 95)
        write_bytes(out / "images" / split / f"{name}.jpg", encoded(scene.picture, "JPEG", quality=quality))
        classes = np.array([0, *(category + 1 for category in scene.categories)], np.uint8)
        write_bytes(out / "labels" / split / f"{name}.png", encoded(classes[scene.instances], "PNG", compress_level=1))
        colours = np.stack([scene.instances, *[np.zeros_like(scene.instances)] * 2], -1)
        colours[scene.instances == 0] = (len(scene.categories) + 1, 0, 0)  # 0 would mean unlabelled
        write_bytes(out / "panoptic" / split / f"{name}.png", encoded(colours, "PNG", compress_level=1))
        records.append({"number": number, **_record(scene)})
    write_json(out / ".building" / f"{split}-{start:06d}.json", records)


def painted(seed: int, scenes: int, side: int) -> Iterator[np.ndarray]:
    """Colours and patterns (side, side, 3) uint8, a few at a time for the memory's sake."""
    for first in count(0, 10):
        draws = Draws(seed_of(seed, first), min(10, scenes - first), torch.device("cpu"), torch.float32)
        found = paint_background(draws, side, Recipe(white=0.15, plain=0.15))
        yield from (found * 255).byte().permute(0, 2, 3, 1).numpy()


def compose_scene(drawings: np.ndarray, painted: np.ndarray, random: Random, most: int) -> Scene:
    """Puts drawings into a scene, later ones over earlier ones.

    Args:
        drawings: (categories, versions, side, side, 4) uint8, colour premultiplied by alpha.
        painted: A backdrop of ``SIDES[1]`` squared, (side, side, 3) uint8, for the scenes that are no landscapes.
        random: Where everything else comes from.
        most: Drawings in a scene.

    Returns:
        The scene.
    """
    width, height = (random.randint(*SIDES) for _ in "wh")
    side = max(width, height)
    if random.random() >= PAINTED:
        painted = np.asarray(BACKGROUNDS[random.choice(list(BACKGROUNDS))](side, random))
    picture = painted[(len(painted) - height) // 2 :, (len(painted) - width) // 2 :][:height, :width].copy()
    instances = np.zeros((height, width), np.uint8)
    categories: list[int] = []
    whole, visible = [0], [0]
    shadow = random.uniform(0.15, 0.5) if random.random() < 0.3 else 0.0
    for _ in range(0 if random.random() < EMPTY else random.randint(1, most)):
        category = random.randrange(len(drawings))
        drawing = scaled(drawings[category, random.randrange(drawings.shape[1])], _length(random))
        opaque = drawing[..., 3] >= OPAQUE
        area = int(opaque.sum())
        for _ in range(10):
            left = random.randint(-drawing.shape[1] // 3, width - 2 * drawing.shape[1] // 3)
            top = random.randint(-drawing.shape[0] // 3, height - 2 * drawing.shape[0] // 3)
            there, part = _overlap(top, left, drawing.shape[:2], (height, width))
            inside = opaque[part]
            covered = np.bincount(instances[there][inside], minlength=len(whole))
            fits = inside.sum() >= max(FEWEST, INSIDE * area)
            if fits and all(visible[k] - covered[k] >= max(FEWEST, VISIBLE * whole[k]) for k in range(1, len(whole))):
                break
        else:
            continue
        if shadow:
            cast_shadow(picture, drawing[..., 3], top, left, shadow)
        picture[there] = over(drawing[part], picture[there])
        visible = [have - int(gone) for have, gone in zip(visible, covered)] + [int(inside.sum())]
        whole.append(area)
        categories.append(category)
        instances[there][inside] = len(categories)
    return Scene(soften(picture, random), instances, categories)


def _length(random: Random) -> float:
    """Small drawings as often as large ones."""
    low, high = map(math.log, LENGTHS)
    return math.exp(random.uniform(low, high))


def scaled(drawing: np.ndarray, length: float) -> np.ndarray:
    """A drawing (H, W, 4) cut to what is visible, its longer side of that many pixels."""
    # Pillow's name of premultiplied colours; as RGBA they would be multiplied again, and edges come out too bright.
    image = Image.frombytes("RGBa", drawing.shape[1::-1], drawing.tobytes())
    image = image.crop(image.getchannel("a").point(lambda alpha: 255 * (alpha >= OPAQUE)).getbbox())
    size = [max(4, round(edge * length / max(image.size))) for edge in image.size]
    return np.asarray(image.resize(size, Image.Resampling.BICUBIC, reducing_gap=2.0))


def over(drawing: np.ndarray, picture: np.ndarray) -> np.ndarray:
    """A drawing (H, W, 4), colour premultiplied by alpha, on a picture (H, W, 3)."""
    colour, alpha = drawing[..., :3], drawing[..., 3:].astype(np.uint16)
    return np.minimum(255, colour + picture * (255 - alpha) // 255).astype(np.uint8)


def _overlap(
    top: int, left: int, size: tuple[int, int], limits: tuple[int, int]
) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """Where in a picture of ``limits`` something of ``size`` lands, and which part of it does."""
    there, part = [], []
    for start, length, limit in zip((top, left), size, limits):
        first, last = max(start, 0), max(0, min(start + length, limit))
        there.append(slice(first, last))
        part.append(slice(first - start, last - start))
    return tuple(there), tuple(part)


def cast_shadow(picture: np.ndarray, alpha: np.ndarray, top: int, left: int, strength: float) -> None:
    """Darken a picture, in place, a little below and to the left of something that is ``alpha`` (H, W) opaque."""
    reach = max(2, max(alpha.shape) // 16)
    soft = np.asarray(Image.fromarray(np.pad(alpha, 2 * reach)).filter(ImageFilter.BoxBlur(reach)))
    there, part = _overlap(top - reach // 2, left - reach, soft.shape, picture.shape[:2])
    picture[there] = (picture[there] * (1 - strength / 255 * soft[part][..., None])).astype(np.uint8)


def soften(picture: np.ndarray, random: Random) -> np.ndarray:
    """Some pictures out of focus, some with grain."""
    kind = random.random()
    if kind < 0.15:
        blur = ImageFilter.GaussianBlur(random.uniform(0.4, 1.1))
        return np.asarray(Image.fromarray(picture).filter(blur))
    if kind < 0.3:
        grain = np.random.default_rng(random.getrandbits(32)).standard_normal(picture.shape, np.float32)
        return (picture + random.uniform(2, 12) * grain).clip(0, 255).astype(np.uint8)
    return picture


def _record(scene: Scene) -> dict[str, Any]:
    """Size and objects of a scene; boxes and areas are those of the masks."""
    from pycocotools import mask as coco

    masks = scene.instances[..., None] == np.arange(1, len(scene.categories) + 1)
    codes = coco.encode(np.asfortranarray(masks, np.uint8)) if scene.categories else []
    objects = [
        {
            "category_id": category + 1,
            "bbox": coco.toBbox(code).tolist(),
            "area": int(coco.area(code)),
            "iscrowd": 0,
            "segmentation": {"size": code["size"], "counts": code["counts"].decode()},
        }
        for category, code in zip(scene.categories, codes)
    ]
    height, width = scene.instances.shape
    return {"height": height, "width": width, "background": int((scene.instances == 0).sum()), "objects": objects}


def _image(record: dict[str, Any]) -> dict[str, Any]:
    size = {key: record[key] for key in ("height", "width")}
    return {"id": record["number"] + 1, "file_name": f"{record['number']:06d}.jpg", **size}


def _instances(records: Sequence[dict[str, Any]], categories: list[dict[str, Any]]) -> dict[str, Any]:
    number = count(1)
    annotations = [
        {"id": next(number), "image_id": record["number"] + 1, **thing}
        for record in records
        for thing in record["objects"]
    ]
    return {"images": [_image(record) for record in records], "annotations": annotations, "categories": categories}


def _panoptic(records: Sequence[dict[str, Any]], categories: list[dict[str, Any]]) -> dict[str, Any]:
    things = [{**category, "isthing": 1} for category in categories]
    stuff = {"id": len(categories) + 1, "name": "background", "supercategory": "background", "isthing": 0}
    annotations = []
    for record in records:
        kept = ("category_id", "bbox", "area", "iscrowd")
        segments = [{"id": k, **{key: thing[key] for key in kept}} for k, thing in enumerate(record["objects"], 1)]
        behind = {"id": len(segments) + 1, "category_id": stuff["id"], "area": record["background"], "iscrowd": 0}
        if record["background"]:
            segments.append({**behind, "bbox": [0, 0, record["width"], record["height"]]})
        annotations.append(
            {
                "image_id": record["number"] + 1,
                "file_name": f"{record['number']:06d}.png",
                "segments_info": segments,
            }
        )
    images = [_image(record) for record in records]
    return {"images": images, "annotations": annotations, "categories": [*things, stuff]}


def encoded(pixels: np.ndarray, kind: str, **options: Any) -> bytes:
    """The file that Pillow makes of pixels."""
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def npy(array: np.ndarray) -> bytes:
    """The file that NumPy makes of an array."""
    buffer = BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def write_json(path: Path, content: Any) -> None:
    """Write JSON without spaces."""
    write_text(path, json.dumps(content, ensure_ascii=False, separators=(",", ":")))
