import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw
from typer.testing import CliRunner

pytest.importorskip("resvg_py", reason="the quickstart data needs the train extra")
pytest.importorskip("pycocotools", reason="masks need the dense extra")

from pycocotools import mask as coco

from zoo.tools.build_quickstart_data import app
from zoo.tools.quickstart import scenes
from zoo.tools.quickstart.scenes import CATEGORIES, FEWEST, build_scenes

STYLES = {"train": ("flat", "line"), "test": ("held-out",)}
COUNTS = {"train": 7, "test": 5}


@pytest.fixture(autouse=True, scope="module")
def small(in_process):
    """Few drawings, small chunks, and no worker processes."""
    sizes = {"VERSIONS": 2, "CHUNK": 4, "DRAWN": 64, "EMPTY": 0.0}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in sizes.items():
            patch.setattr(scenes, name, value)
        yield


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A built data folder: training drawings are boxes, those of the held-out style are blue discs."""
    folder = tmp_path_factory.mktemp("quickstart")
    for split, styles in STYLES.items():
        for slug in CATEGORIES:
            (folder / split / slug).mkdir(parents=True)
            for style in styles:
                picture = Image.new("RGBA", (128, 128))
                draw = ImageDraw.Draw(picture)
                shape = draw.ellipse if split == "test" else draw.rectangle
                shape((20, 30, 100, 90), fill=(0, 0, 255, 255) if split == "test" else (200, 40, 0, 255))
                picture.save(folder / split / slug / f"{style}.png")
    entries = [{"slug": slug, "name": slug.replace("-", " "), "group": "things"} for slug in CATEGORIES]
    (folder / "classes.json").write_text(json.dumps(entries))
    return folder


@pytest.fixture(scope="module")
def built(small, root, tmp_path_factory):
    """One build with the small settings, for the tests that only look."""
    out = tmp_path_factory.mktemp("scenes") / "out"
    assert build_scenes(root, out, **COUNTS)["train"]["scenes"] == 7
    return out


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def read(built, kind, split):
    return json.loads((built / "annotations" / f"{kind}_{split}.json").read_text())


@pytest.mark.parametrize("split", COUNTS)
def test_boxes_masks_and_maps_tell_the_same(built, split):
    instances, panoptic = read(built, "instances", split), read(built, "panoptic", split)
    assert len(instances["images"]) == len(panoptic["annotations"]) == COUNTS[split]
    assert len(instances["annotations"]) > COUNTS[split]
    assert len({a["id"] for a in instances["annotations"]}) == len(instances["annotations"])
    assert [c["name"] for c in instances["categories"]] == [slug.replace("-", " ") for slug in CATEGORIES]
    assert [c["isthing"] for c in panoptic["categories"]] == [1] * len(CATEGORIES) + [0]
    for image, segments in zip(instances["images"], panoptic["annotations"]):
        name = Path(image["file_name"]).stem
        with Image.open(built / "images" / split / image["file_name"]) as picture:
            assert picture.size == (image["width"], image["height"])
        labels = np.asarray(Image.open(built / "labels" / split / f"{name}.png"))
        coded = np.asarray(Image.open(built / "panoptic" / split / f"{name}.png")).astype(int) @ [1, 256, 65536]
        expected, identities = np.zeros_like(labels), np.zeros_like(coded)
        things = [a for a in instances["annotations"] if a["image_id"] == image["id"]]
        for number, thing in enumerate(things, 1):
            mask = coco.decode(thing["segmentation"]).astype(bool)
            assert not expected[mask].any()  # only the visible parts
            expected[mask], identities[mask] = thing["category_id"], number
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            box = [columns[0], rows[0], np.ptp(columns) + 1, np.ptp(rows) + 1]
            assert thing["bbox"] == box and thing["area"] == mask.sum() >= FEWEST
        assert np.array_equal(labels, expected)
        assert segments["image_id"] == image["id"] and segments["file_name"] == f"{name}.png"
        identities[identities == 0] = len(things) + 1
        assert np.array_equal(coded, identities)
        found = {s["id"]: (s["category_id"], s["area"]) for s in segments["segments_info"]}
        wanted = {k: (thing["category_id"], thing["area"]) for k, thing in enumerate(things, 1)}
        assert found == {**wanted, len(things) + 1: (len(CATEGORIES) + 1, (labels == 0).sum())}


def test_the_masks_lie_on_the_drawings(built):
    hits = []
    for image in read(built, "instances", "test")["images"]:
        picture = np.asarray(Image.open(built / "images/test" / image["file_name"])).astype(int)
        drawn = np.asarray(Image.open(built / "labels/test" / f"{Path(image['file_name']).stem}.png")) > 0
        blue = (picture[..., 2] > 150) & (picture[..., :2].max(-1) < 110)
        hits.append(blue[drawn].mean())
    assert np.mean(hits) > 0.9  # grain, blur and JPEG take some


def test_edges_are_as_bright_as_the_drawing():
    rows, columns = np.mgrid[:96, :96] - 48
    drawing = np.zeros((96, 96, 4), np.uint8)
    drawing[rows**2 + columns**2 < 40**2] = (200, 100, 50, 255)
    small = scenes.scaled(drawing, 40).astype(int)
    edge = (small[..., 3] > 20) & (small[..., 3] < 235)
    assert edge.sum() > 10 and np.allclose(small[edge][:, 0], small[edge][:, 3] * 200 / 255, atol=10)


def test_the_styles_are_kept_apart(root, tmp_path, monkeypatch):
    seen = []
    load = scenes.load_sprites

    def recorded(folder, classes):
        sprites = load(folder, classes=classes)
        seen.append((folder, tuple(sprites.styles)))
        return sprites

    monkeypatch.setattr(scenes, "load_sprites", recorded)
    build_scenes(root, tmp_path / "out", train=1, test=1)
    assert seen == [(root / split, styles) for split, styles in STYLES.items()]


def test_the_seed_decides_and_a_stopped_build_goes_on(root, built, tmp_path, monkeypatch):
    out = tmp_path / "out"
    chunk = scenes._build_chunk

    def stops(job):
        if job[3]:
            raise KeyboardInterrupt
        chunk(job)

    monkeypatch.setattr(scenes, "_build_chunk", stops)
    with pytest.raises(KeyboardInterrupt):
        build_scenes(root, out, **COUNTS)
    assert not (out / "annotations").exists()
    first = out / "images/train/000000.jpg"
    made = first.stat().st_mtime_ns
    monkeypatch.setattr(scenes, "_build_chunk", chunk)
    build_scenes(root, out, **COUNTS)
    assert first.stat().st_mtime_ns == made
    assert files(out) == files(built)
    build_scenes(root, tmp_path / "other", **COUNTS, seed=1)
    name = "images/train/000000.jpg"
    assert (tmp_path / "other" / name).read_bytes() != (built / name).read_bytes()


def test_chunks_have_drawings_of_their_own(root):
    def draw(seed):
        return scenes.draw_versions(root / "train", CATEGORIES, scenes.RECIPES["train"], 2, 32, seed)

    first = draw(0)
    assert np.array_equal(first, draw(0))
    differ = (first != draw(1)).any(axis=(2, 3, 4))
    assert differ.mean() > 0.9 and (first[:, 0] != first[:, 1]).any(axis=(1, 2, 3)).mean() > 0.9


def test_refusals(root, built, tmp_path):
    with pytest.raises(ValueError, match="other settings"):
        build_scenes(root, built, **COUNTS, seed=5)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="other files"):
        build_scenes(root, tmp_path, **COUNTS)
    result = CliRunner().invoke(app, ["scenes", str(tmp_path / "new"), "--root", str(tmp_path)])
    assert result.exit_code == 1 and "classes.json" in result.stderr
    less = tmp_path / "less"
    shutil.copytree(root / "train", less / "train", ignore=shutil.ignore_patterns("owl"))
    (less / "classes.json").write_bytes((root / "classes.json").read_bytes())
    with pytest.raises(FileNotFoundError, match="owl"):
        build_scenes(less, tmp_path / "new", train=1, test=0)
