"""Builds the quickstart data: one folder per emoji, drawn in nine styles to train on and in a tenth to evaluate on."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.progress import track

from zoo.tools.quickstart.attribution import attribution
from zoo.tools.quickstart.classes import MIN_STYLES, EmojiClass, choose, key, plain
from zoo.tools.quickstart.packages import PACKAGES, Package, obtain, read_icons, read_members
from zoo.tools.quickstart.pictures import close_pairs, decode, encode, normalise, thumbprint
from zoo.tools.quickstart.questions import build_questions
from zoo.tools.quickstart.samples import write_samples
from zoo.tools.quickstart.scenes import build_scenes

INDISTINCT = 0.01  # below this difference two pictures of one style cannot be told apart
CONFUSABLE = 0.06  # below this one they are worth a line in the report

Drawing = tuple[bytes, np.ndarray]  # the PNG file and its thumbprint

app = typer.Typer(add_completion=False, help=__doc__)
console = Console(stderr=True)


def build(root: Path, *, packages: Sequence[Package] = PACKAGES, tarballs: Path | None = None) -> dict[str, Any]:
    """Builds the data folder; the same packages always give the same bytes.

    It holds ``train/<slug>/<style>.png`` and ``test/<slug>/<held-out style>.png`` (RGBA, 128 x 128, transparent),
    ``classes.json`` (slug, name, group and hexcode, sorted by slug as an ImageFolder is), ``ATTRIBUTION.md`` and
    ``report.json`` (what was counted, left out and found to look alike).

    Args:
        root: Where to build. An earlier build there is replaced once the new one is complete.
        packages: Pinned packages: training styles, one held-out style, and emojibase, which names the emoji.
        tarballs: Folder with the packages' tarballs; without it npm downloads them to ``root/cache``.

    Returns:
        The report.

    Raises:
        FileNotFoundError: A tarball, or npm, is missing.
        RuntimeError: npm failed.
        ValueError: A tarball is not the pinned one, or ``root`` holds a ``train`` folder that this tool did not build.
    """
    scratch = root / ".building"
    if (root / "train").exists() and not (root / "classes.json").exists() and not scratch.exists():
        raise ValueError(f"{root} has a train folder that was not built by this tool: choose another folder.")
    paths = obtain(packages, tarballs or root / "cache", console, download=tarballs is None)
    (held_out,) = (package.style for package in packages if package.held_out)
    (emojibase,) = (package for package in packages if not package.style)
    tables = {
        name: json.loads(data)
        for name, data in read_members(paths[emojibase], emojibase.folder).items()
        if name in ("data.json", "messages.json")
    }
    codes_of = {plain(record["label"]): key(record["hexcode"]) for record in tables["data.json"]}
    sources = {package: _pictures(package, paths[package], codes_of) for package in packages if package.style}
    drawn = {package.style: codes.keys() for package, codes in sources.items()}
    candidates = choose(tables["data.json"], tables["messages.json"], drawn, held_out)

    drawings: dict[str, dict[str, Drawing]] = {}
    for package, codes in sources.items():
        wanted = {chosen.slug: codes[chosen.hexcode] for chosen in candidates if chosen.hexcode in codes}
        with ThreadPoolExecutor() as pool:
            made = track(
                pool.map(_draw, wanted.values()),
                package.style,
                len(wanted),
                console=console,
                disable=not console.is_terminal,
            )
            drawings[package.style] = dict(zip(wanted, made))
    classes, report = _distinct(candidates, drawings, held_out)

    shutil.rmtree(scratch, ignore_errors=True)
    for style, pictures in drawings.items():
        for slug, (data, _) in pictures.items():
            folder = scratch / ("test" if style == held_out else "train") / slug
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{style}.png").write_bytes(data)
    _write_json(scratch / "classes.json", [chosen.json() for chosen in classes])
    _write_json(scratch / "report.json", report)
    (scratch / "ATTRIBUTION.md").write_text(attribution(packages), encoding="utf-8")
    for made in sorted(scratch.iterdir()):
        if (root / made.name).is_dir():
            shutil.rmtree(root / made.name)
        os.replace(made, root / made.name)
    scratch.rmdir()
    return report


def _pictures(package: Package, path: Path, codes_of: Mapping[str, str]) -> dict[str, bytes]:
    """The picture files of a package by the key of their emoji; icons whose name is no emoji's are left out."""
    if package.icons:
        icons = {plain(name): data for name, data in read_icons(path, package.folder).items()}
        return {codes_of[name]: data for name, data in icons.items() if name in codes_of}
    return {key(Path(name).stem): data for name, data in read_members(path, package.folder).items()}


def _draw(source: bytes) -> Drawing:
    picture = normalise(decode(source))
    return encode(picture), thumbprint(picture)


def _distinct(
    candidates: Sequence[EmojiClass], drawings: dict[str, dict[str, Drawing]], held_out: str
) -> tuple[list[EmojiClass], dict[str, Any]]:
    """Removes from ``drawings`` what cannot be told apart, and returns the classes that remain, and the report.

    A training picture that several classes share teaches nothing, so all of them lose it. In the held-out style the
    class that comes first in Unicode's order keeps it, and the others are no classes: no answer could be right.
    """
    shared, gone = [], set()
    for style, pictures in drawings.items():
        for first, second, _ in close_pairs({slug: seen for slug, (_, seen) in pictures.items()}, INDISTINCT):
            shared.append([style, first, second])
            if style == held_out:
                gone.add(second)
    for style, first, second in shared:
        if style != held_out:
            drawings[style].pop(first, None)
            drawings[style].pop(second, None)
    training = [pictures for style, pictures in drawings.items() if style != held_out]
    gone |= {c.slug for c in candidates if sum(c.slug in pictures for pictures in training) < MIN_STYLES}
    for pictures in drawings.values():
        for slug in gone & pictures.keys():
            del pictures[slug]
    classes = sorted((chosen for chosen in candidates if chosen.slug not in gone), key=lambda chosen: chosen.slug)
    return classes, {
        "classes": len(classes),
        "pictures": {style: len(pictures) for style, pictures in drawings.items()},
        "mebibytes": round(sum(len(data) for p in drawings.values() for data, _ in p.values()) / 2**20, 1),
        "shared_pictures": shared,
        "left_out_classes": sorted(gone),
        "look_alikes": {
            style: close_pairs({slug: seen for slug, (_, seen) in pictures.items()}, CONFUSABLE)
            for style, pictures in drawings.items()
        },
    }


def _write_json(path: Path, content: list | Mapping) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def _in_one_line(*errors: type[Exception]) -> Iterator[None]:
    """Errors of the user end a command with a line instead of a trace."""
    try:
        yield
    except errors as error:
        console.print(f"error: {error}", style="red", markup=False)
        raise typer.Exit(1) from None


Root = Annotated[Path, typer.Argument(help="Folder of the quickstart data.")]
Tarballs = Annotated[
    Path | None, typer.Option(help="Folder with the npm tarballs; without it they are downloaded to ROOT/cache.")
]


@app.command("build")
def build_command(root: Root, tarballs: Tarballs = None) -> None:
    """Build the data folder ROOT from the pinned npm packages."""
    with _in_one_line(OSError, RuntimeError, ValueError):
        report = build(root, tarballs=tarballs)
    print(f"{report['classes']} classes, {report['pictures']} pictures, {report['mebibytes']} MiB in {root}")


@app.command("samples")
def samples_command(
    root: Root, out: Annotated[Path, typer.Argument(help="Folder of the pictures.")], tarballs: Tarballs = None
) -> None:
    """Compose the demo's sample pictures from drawings of the held-out style; ROOT has been built before."""
    with _in_one_line(OSError, ValueError):
        print(f"{len(write_samples(root, out, tarballs or root / 'cache'))} pictures in {out}")


Built = Annotated[Path, typer.Option("--root", help="Folder of the quickstart data, which has been built before.")]
Train = Annotated[int, typer.Option(min=0, help="Scenes of the training styles.")]
Test = Annotated[int, typer.Option(min=0, help="Scenes of the held-out style.")]
Seed = Annotated[int, typer.Option(help="Of all randomness.")]
Workers = Annotated[int | None, typer.Option(min=1, help="Processes; by default one per core.")]


@app.command("scenes")
def scenes_command(
    out: Annotated[Path, typer.Argument(help="Folder of the scenes.")],
    root: Built = Path("data/quickstart"),
    train: Train = 6000,
    test: Test = 1000,
    seed: Seed = 0,
    workers: Workers = None,
) -> None:
    """Compose scenes with boxes, masks, semantic and panoptic maps; a build that was stopped goes on."""
    with _in_one_line(OSError, ValueError):
        done = build_scenes(root, out, train=train, test=test, seed=seed, workers=workers)
    for split, counts in done.items():
        print(f"{split}: {counts['scenes']} scenes, {counts['objects']} objects in {out}")


@app.command("questions")
def questions_command(
    out: Annotated[Path, typer.Argument(help="Folder of the scenes and questions.")],
    root: Built = Path("data/quickstart"),
    train: Train = 20000,
    test: Test = 1000,
    seed: Seed = 0,
    workers: Workers = None,
) -> None:
    """Compose scenes with questions and answers in LLaVA's format; a build that was stopped goes on."""
    with _in_one_line(OSError, ValueError):
        report = build_questions(root, out, train=train, test=test, seed=seed, workers=workers)
    for split in ("train", "test"):
        print(f"{split}: {report[split]['scenes']} scenes, {report[split]['questions']} questions in {out}")
    for kind, found in report["blind"].items():
        print(f"{kind}: {found['answers']} answers, right without looking: {found['blind']:.1f} %")


if __name__ == "__main__":
    app()
