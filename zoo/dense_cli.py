"""`zoo detect` and `zoo segment`: boxes, masks and maps of classes in pictures, folders and videos."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text

from zoo.bulk.command import run_command
from zoo.bulk.recipe import Recipe
from zoo.cli import (
    Checkpoint,
    Column,
    Device,
    Engine,
    Json,
    ShardRows,
    Urls,
    Workers,
    app,
    print_json,
    report_failures,
)
from zoo.console import output_console
from zoo.dense import DenseModel, DenseResult
from zoo.detector import Detections, Detector
from zoo.drawing import BACKGROUND, SMALLEST, draw_detections, draw_segmentation
from zoo.files import replacing
from zoo.images import ImageError
from zoo.printable import printable
from zoo.segmenter import Segmentation, Segmenter

PICTURES = (".png", ".jpg", ".jpeg", ".webp")

Paths = Annotated[list[str], typer.Argument(metavar="PATH...", help="Pictures, videos, folders, or globs in quotes.")]
Model = Annotated[str, typer.Option(help="Backbone of a quickstart model, whose config is part of the package.")]
Config = Annotated[Path | None, typer.Option(help="A config of mmdet or mmseg instead.")]
Out = Annotated[
    Path | None, typer.Option(help="Draw what was found: a folder, or a file name for a single picture or video.")
]
Batch = Annotated[int, typer.Option(min=1, help="Pictures of one size that go through the model at once.")]


@app.command()
def detect(
    paths: Paths,
    model: Model = "van_nano",
    config: Config = None,
    checkpoint: Checkpoint = None,
    score: Annotated[float, typer.Option(min=0, max=1, help="Least score of what is listed and drawn.")] = 0.3,
    as_json: Json = False,
    out: Out = None,
    batch_size: Batch = 8,
    device: Device = None,
    workers: Workers = 2,
    allow_urls: Urls = False,
    engine: Engine = None,
    shard_rows: ShardRows = 512,
    column: Column = None,
) -> None:
    """Find things in pictures. Exit code 1 if some could not be read, 2 if none could."""
    if engine:
        files = {"checkpoint": checkpoint, "config": config and str(config)}
        recipe = Recipe("detect", model, **files, score=score, device=device, batch_size=batch_size)
        run_command(recipe, paths, out, engine, workers, shard_rows, column, allow_urls, as_json)
        return
    detector = Detector(
        model,
        score=score,
        config=config,
        checkpoint=checkpoint,
        device=device,
        batch_size=batch_size,
        workers=workers,
    )
    _run(detector, paths, allow_urls, out, as_json, draw_detections, detected_objects, _name_detections)


@app.command()
def segment(
    paths: Paths,
    model: Model = "van_nano",
    config: Config = None,
    checkpoint: Checkpoint = None,
    as_json: Json = False,
    out: Out = None,
    batch_size: Batch = 8,
    device: Device = None,
    workers: Workers = 2,
    allow_urls: Urls = False,
    engine: Engine = None,
    shard_rows: ShardRows = 512,
    column: Column = None,
) -> None:
    """Name the class of every pixel. Exit code 1 if some pictures could not be read, 2 if none could."""
    if engine:
        files = {"checkpoint": checkpoint, "config": config and str(config)}
        recipe = Recipe("segment", model, **files, device=device, batch_size=batch_size)
        run_command(recipe, paths, out, engine, workers, shard_rows, column, allow_urls, as_json)
        return
    segmenter = Segmenter(
        model, config=config, checkpoint=checkpoint, device=device, batch_size=batch_size, workers=workers
    )
    _run(segmenter, paths, allow_urls, out, as_json, draw_segmentation, segmented_objects, _name_segments)


def _run(
    model: DenseModel,
    paths: Sequence[str],
    allow_urls: bool,
    out: Path | None,
    as_json: bool,
    draw: Callable[[Image.Image, Any], Image.Image],
    objects: Callable[[Any], Iterator[dict[str, Any]]],
    names: Callable[[Any], str],
) -> None:
    from zoo.media import Video, find_media

    pictures, videos, failed = find_media(paths, allow_urls)
    places = _places(out, pictures, videos)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    table = Table("Picture", "Found", box=None, pad_edge=False)

    def note(result: DenseResult, **where: Any) -> None:
        width, height = result.picture.size
        images.append({"id": len(images) + 1, "file_name": result.source, **where, "width": width, "height": height})
        if as_json:
            for thing in objects(result.answer):
                annotations.append({"id": len(annotations) + 1, "image_id": len(images), **thing})
        elif not where:
            table.add_row(Text(printable(result.source)), Text(printable(names(result.answer))))

    for result in _tracked(model.predict_all(pictures), len(pictures), ""):
        if result.error:
            failed.append(result.error)
            continue
        note(result)
        if out:
            path = places[result.source]
            with replacing(path) as part:
                kind = Image.registered_extensions()[path.suffix.lower()]
                draw(result.picture, result.answer).save(part, kind)
    for path in videos:
        try:
            video = Video(path)
        except ImageError as error:
            failed.append(error)
            continue
        before = len(images)
        with _video_sink(places.get(path), video.rate) as write:
            drawn = None
            results = _tracked(model.predict_all(video), video.frames, os.path.basename(path))
            for number, result in enumerate(results, 1):
                if result.error:
                    failed.append(result.error)
                else:
                    note(DenseResult(path, result.picture, result.answer), frame=number)
                    drawn = draw(result.picture, result.answer) if out else None
                if drawn:  # in the place of a frame that cannot be decoded, the one before it
                    write(drawn)
        table.add_row(Text(printable(path)), f"{len(images) - before} frames")

    if as_json:
        first = 0 if isinstance(model, Segmenter) else 1
        categories = [{"id": number, "name": name} for number, name in enumerate(model.labels, first)]
        document = {"images": images, "annotations": annotations, "categories": categories}
        print_json({**document, "failed": [vars(error) for error in failed]})
    elif images:
        output_console().print(table)
    if out and images:
        typer.echo(f"Wrote {out}", err=as_json)
    report_failures(failed, len(images))


def _tracked(results: Iterator[DenseResult], total: int, name: str) -> Iterator[DenseResult]:
    console = Console(stderr=True)
    return track(results, name, total or None, console=console, transient=True, disable=not console.is_terminal)


def _places(out: Path | None, pictures: Sequence[str], videos: Sequence[str]) -> dict[str, Path]:
    """Where the drawn copy of each source goes: to the file that ``--out`` names, or by its own name to that folder."""
    sources = [*pictures, *videos]
    if not out or not sources:
        return {}
    suffix = out.suffix.lower()
    single = len(sources) == 1 and suffix in (PICTURES if pictures else (".mp4",)) and not out.is_dir()
    if not single and (suffix in (*PICTURES, ".mp4") or out.is_file()):
        what = f"{len(sources)} files" if len(sources) > 1 else "a picture" if pictures else "a video"
        raise ValueError(f"--out {out} does not fit {what}: give a folder, or .png, .jpg or .mp4 for one file.")
    places = {sources[0]: out} if single else _names_in(out, sources)
    originals = {*map(os.path.realpath, sources)}
    if replaced := [path for path in places.values() if os.path.realpath(path) in originals]:
        raise ValueError(f"--out {out} would replace {replaced[0]}: give another place.")
    return places


def _names_in(folder: Path, sources: Sequence[str]) -> dict[str, Path]:
    """A path of its own in the folder for each source."""
    from zoo.media import VIDEOS

    taken: dict[Path, str] = {}
    for source in sources:
        stem, suffix = os.path.splitext(os.path.basename(source) or "picture")
        if suffix.lower() not in (*PICTURES, ".mp4"):
            suffix = ".mp4" if suffix.lower() in VIDEOS else ".png"
        number, path = 1, folder / f"{stem}{suffix}"
        while path in taken:
            number += 1
            path = folder / f"{stem}-{number}{suffix}"
        taken[path] = source
    return {source: path for path, source in taken.items()}


@contextmanager
def _video_sink(path: Path | None, rate: float) -> Iterator[Callable[[Image.Image], None]]:
    """A function that adds a frame to a video, which takes its name when all is written; of no frames there is none."""
    if path is None:
        yield lambda frame: None
        return
    import cv2

    writer: cv2.VideoWriter | None = None

    with ExitStack() as stack:

        def write(frame: Image.Image) -> None:
            nonlocal writer
            if writer is None:
                part = stack.enter_context(replacing(path, ".mp4"))
                writer = cv2.VideoWriter(str(part), cv2.VideoWriter_fourcc(*"mp4v"), rate, frame.size)
                stack.callback(writer.release)  # before the file takes its name
                if not writer.isOpened():
                    raise OSError("it cannot be written as a video here")
            writer.write(np.asarray(frame)[..., ::-1].copy())

        yield write


def detected_objects(found: Detections) -> Iterator[dict[str, Any]]:
    """The things in a picture as annotations of COCO, whose categories count from 1."""
    for row in range(len(found)):
        left, top, right, bottom = found.boxes[row].tolist()
        box = [left, top, right - left, bottom - top]
        mask = None if found.masks is None else _encoded(found.masks[row])
        yield {
            "category_id": int(found.labels[row]) + 1,
            "bbox": [round(value, 2) for value in box],
            "score": round(float(found.scores[row]), 4),
            "area": int(found.masks[row].sum()) if mask else round(box[2] * box[3], 2),
            "iscrowd": 0,
            **({"segmentation": mask} if mask else {}),
        }


def segmented_objects(found: Segmentation) -> Iterator[dict[str, Any]]:
    """The classes in a picture as annotations of COCO, whose categories count from 0."""
    for label in np.unique(found.labels):
        mask = found.labels == label
        rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
        box = [columns[0], rows[0], columns[-1] + 1 - columns[0], rows[-1] + 1 - rows[0]]
        yield {
            "category_id": int(label),
            "bbox": [int(value) for value in box],
            "area": int(mask.sum()),
            "iscrowd": 0,
            "segmentation": _encoded(mask),
        }


def _encoded(mask: np.ndarray) -> dict[str, Any]:
    from pycocotools import mask as coco

    code = coco.encode(np.asfortranarray(mask, np.uint8))
    return {"size": code["size"], "counts": code["counts"].decode()}


def _name_detections(found: Detections) -> str:
    return ", ".join(f"{name} {score:.0%}" for name, score in zip(found.names, found.scores)) or "nothing"


def _name_segments(found: Segmentation) -> str:
    shares = {name: share for name, share in found.shares().items() if name != BACKGROUND and share >= SMALLEST}
    return ", ".join(f"{name} {share:.1%}" for name, share in shares.items()) or "nothing"
