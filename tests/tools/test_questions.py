import json
from collections import Counter
from random import Random

import numpy as np
import pytest
from PIL import Image, ImageDraw
from typer.testing import CliRunner

pytest.importorskip("resvg_py", reason="the quickstart data needs the train extra")

from zoo.tools.build_quickstart_data import app
from zoo.tools.quickstart import questions
from zoo.tools.quickstart.questions import (
    ALIKE,
    COLOURS,
    KINDS,
    MOST,
    PLACES,
    SIDE,
    SLUGS,
    Scene,
    Thing,
    ask,
    blind_accuracy,
    build_questions,
    caption,
    colour_groups,
    compose,
)

COUNTS = {"train": 7, "test": 5}
RGB = {"red": (220, 20, 20), "green": (30, 160, 40), "blue": (40, 80, 220), "yellow": (250, 230, 40)}


@pytest.fixture(autouse=True, scope="module")
def small(in_process):
    """Few classes and drawings, small chunks, and no worker processes."""
    changed = {"VERSIONS": {"train": 2, "test": 1}, "CHUNK": 3, "DRAWN": 48, "SLUGS": SLUGS[:12]}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in changed.items():
            patch.setattr(questions, name, value)
        yield


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A built data folder: training drawings are red boxes, those of the held-out style are blue discs."""
    folder = tmp_path_factory.mktemp("quickstart")
    for split, style, colour in (("train", "flat", RGB["red"]), ("test", "held-out", RGB["blue"])):
        for slug in SLUGS[:12]:
            (folder / split / slug).mkdir(parents=True)
            picture = Image.new("RGBA", (128, 128))
            draw = ImageDraw.Draw(picture)
            (draw.ellipse if split == "test" else draw.rectangle)((20, 30, 100, 90), fill=(*colour, 255))
            picture.save(folder / split / slug / f"{style}.png")
    entries = [{"slug": slug, "name": slug.replace("-", " "), "group": "things"} for slug in SLUGS]
    (folder / "classes.json").write_text(json.dumps(entries))
    return folder


@pytest.fixture(scope="module")
def built(small, root, tmp_path_factory):
    out = tmp_path_factory.mktemp("questions") / "out"
    build_questions(root, out, **COUNTS)
    return out


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def read(path):
    return json.loads(path.read_text("utf-8"))


def scenes(number, classes=12):
    """Scenes without their pictures' detail: squares, the k-th class in the k-th colour."""
    groups = list(RGB)
    drawings = np.zeros((classes, 1, 48, 48, 4), np.uint8)
    for k in range(classes):
        drawings[k, 0, 8:40, 8:40] = (*RGB[groups[k % 4]], 255)
    colours = np.array([[COLOURS.index(groups[k % 4])] for k in range(classes)])
    names = [f"thing {k}" for k in range(classes)]
    for seed in range(number):
        random = Random(seed)
        yield *compose(drawings, colours, names, np.full((SIDE, SIDE, 3), 128, np.uint8), random), random


def answered(scene, kind, question):
    """The answer, worked out from the things alone and in another way than the builder does."""
    at = {f"at the {t.place}" if t.place != "middle" else "in the middle": t for t in scene.things}
    mentioned = [t for t in scene.things if question.rstrip("?").endswith(f" {t.name}") or f" {t.name} " in question]
    if kind in ("what", "colour"):
        place = max((place for place in at if place in question), key=len)
        return at[place].name if kind == "what" else at[place].colour
    if kind == "where":
        (thing,) = mentioned
        return thing.place
    if kind == "count":
        return str(len(scene.things))
    if kind == "count of":
        return str(len(mentioned))
    if kind == "exists":
        return "yes" if mentioned else "no"
    middle = {t.name: t.box[0] + t.box[2] / 2 for t in mentioned}
    first, second = sorted(middle, key=question.index)
    return "yes" if (middle[first] < middle[second]) == ("to the left of" in question) else "no"


def test_every_answer_is_right_and_names_one_thing_only():
    seen = Counter()
    for _, scene, random in scenes(300):
        kinds, pairs = ask(scene, 7, random)
        assert len(kinds) == len(set(kinds))
        for kind, (question, answer) in zip(kinds, pairs):
            assert answer == answered(scene, kind, question), (question, scene.things)
            seen[kind] += 1
    assert set(seen) == set(KINDS) and min(seen.values()) > 50


def test_things_are_where_and_of_what_colour_the_scene_says():
    for picture, scene, _ in scenes(60):
        assert picture.shape == (SIDE, SIDE, 3) and 1 <= len(scene.things) <= MOST
        assert len({thing.place for thing in scene.things}) == len(scene.things)
        names = Counter(thing.name for thing in scene.things)
        assert all(count == 1 or name == scene.several for name, count in names.items())
        assert max(names.values()) <= ALIKE
        for thing in scene.things:
            left, top, width, height = thing.box
            row, column = divmod(PLACES.index(thing.place), 3)
            assert 64 * column <= left and left + width <= 64 * column + 64
            assert 64 * row <= top and top + height <= 64 * row + 64
            inner = picture[top + 6 : top + height - 6, left + 6 : left + width - 6].reshape(-1, 3)
            assert np.abs(np.median(inner, 0) - RGB[thing.colour]).max() < 12


def test_answers_are_balanced():
    given = {kind: Counter() for kind in KINDS}
    for _, scene, random in scenes(1500):
        for kind, (_, answer) in zip(*ask(scene, 3, random)):
            given[kind][answer] += 1
    sizes = {"what": 12, "where": 9, "count": MOST, "count of": ALIKE, "colour": 4, "left of": 2, "exists": 2}
    for kind, size in sizes.items():
        share = np.array(list(given[kind].values())) / given[kind].total()
        assert len(share) == size, kind
        # Four deviations of what chance leaves.
        assert np.abs(share - 1 / size).max() < 4 * (1 / size / given[kind].total()) ** 0.5, (kind, given[kind])


def test_colours():
    pixels = {"white": (250, 250, 250), "black": (20, 20, 20), "brown": (140, 90, 50), "orange": (240, 140, 30)}
    pixels |= {"pink": (255, 167, 192), "purple": (140, 80, 200), **RGB}
    groups = colour_groups(np.array(list(pixels.values()), np.uint8))
    assert [COLOURS[group] for group in groups] == list(pixels)
    assert colour_groups(np.array([(128, 128, 128)], np.uint8)) == -1


def test_the_caption_tells_all_in_reading_order():
    things = [Thing("dog", "middle", None, (70, 70, 40, 40)), Thing("bus", "top left", "red", (2, 2, 50, 40))]
    assert caption(Scene(things, None, "middle", ["bus", "dog"])) == (
        "Describe the picture.",
        "bus at the top left, dog in the middle",
    )


def test_the_blind_baseline():
    def record(kind, *pairs):
        turns = [{"from": who, "value": text} for pair in pairs for who, text in zip(("human", "gpt"), pair)]
        return {"conversations": turns, "kinds": [kind] * len(pairs)}

    pairs = ("<image>\nIs there a dog?", "no"), ("Is there a cat?", "yes"), ("Is there a bus?", "yes")
    train = [record("exists", *pairs)]
    test = [record("exists", ("<image>\nIs there a dog?", answer)) for answer in ("no", "no", "no", "yes")]
    test += [record("exists", ("<image>\nIs there an owl?", "yes"))]
    found = blind_accuracy(train, test)
    assert found == {"exists": {"questions": 5, "answers": 2, "majority": 40.0, "blind": 80.0}}


@pytest.mark.parametrize("split", COUNTS)
def test_files(built, split):
    records, objects = read(built / f"{split}.json"), read(built / f"{split}_objects.json")
    captions = read(built / f"{split}_captions.json")
    assert len(objects) == len(captions) == COUNTS[split] == len(list((built / split).glob("*.jpg")))
    assert {record["image"] for record in records} == set(objects)
    for record in records + captions:
        turns = record["conversations"]
        assert [turn["from"] for turn in turns] == ["human", "gpt"] * len(record["kinds"])
        assert [turn["value"].count("<image>") for turn in turns] == [1] + [0] * (len(turns) - 1)
        assert split == "train" or len(turns) == 2
        things = [Thing(**thing) for thing in objects[record["image"]]]
        several = next((name for name, n in Counter(t.name for t in things).items() if n > 1), None)
        scene = Scene(things, several, "", [])
        for kind, question, answer in zip(record["kinds"], turns[::2], turns[1::2]):
            text = question["value"].removeprefix("<image>\n")
            assert answer["value"] == (caption(scene)[1] if kind == "caption" else answered(scene, kind, text))
    hits = []
    for image, things in objects.items():
        picture = np.asarray(Image.open(built / image)).astype(int)
        for left, top, width, height in (thing["box"] for thing in things):
            middle = picture[top + height // 3 : top + 2 * height // 3, left + width // 3 : left + 2 * width // 3]
            hits.append(middle.mean((0, 1)).argmax())
    expected = "blue" if split == "test" else "red"  # the styles are kept apart
    assert np.mean(np.array(hits) == (2 if expected == "blue" else 0)) > (0.95 if split == "test" else 0.4)


def test_the_seed_decides_and_a_stopped_build_goes_on(root, built, tmp_path, monkeypatch):
    out, chunk = tmp_path / "out", questions._build_chunk

    def stops(job):
        if job[2]:
            raise KeyboardInterrupt
        chunk(job)

    monkeypatch.setattr(questions, "_build_chunk", stops)
    with pytest.raises(KeyboardInterrupt):
        build_questions(root, out, **COUNTS)
    made = (out / "train/000000.jpg").stat().st_mtime_ns
    monkeypatch.setattr(questions, "_build_chunk", chunk)
    build_questions(root, out, **COUNTS)
    assert (out / "train/000000.jpg").stat().st_mtime_ns == made
    assert files(out) == files(built)
    build_questions(root, tmp_path / "other", **COUNTS, seed=1)
    assert (tmp_path / "other/train.json").read_bytes() != (built / "train.json").read_bytes()


def test_refusals(root, built, tmp_path):
    with pytest.raises(ValueError, match="other settings"):
        build_questions(root, built, **COUNTS, seed=5)
    result = CliRunner().invoke(app, ["questions", str(tmp_path / "new"), "--root", str(tmp_path)])
    assert result.exit_code == 1 and "classes.json" in result.stderr and not (tmp_path / "new").exists()
    sizes = ["--root", str(root), "--train", "2", "--test", "1"]
    result = CliRunner().invoke(app, ["questions", str(tmp_path / "new"), *sizes])
    assert result.exit_code == 0 and "right without looking" in result.stdout
