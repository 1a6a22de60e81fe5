"""Questions about scenes of a few emoji in known places, in LLaVA's format, to train and test small multimodal models.

A folder of questions holds, for the splits ``train`` (training styles) and ``test`` (the held-out style)::

    train/000000.jpg                the scene
    train.json                      conversations of several turns; in test.json one question each
    train_captions.json             what is where, in one sentence
    train_objects.json              name, box, place and colour of everything in each scene
    report.json                     what a model scores that does not look at the pictures
    ATTRIBUTION.md

Answers are a word or two, so that an exact match tells whether they are right, and each kind of question has all its
answers equally often. A scene is a pure function of the seed, its split and its number.
"""

import json
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from PIL import Image

from zoo.files import write_bytes, write_text
from zoo.tools.quickstart.attribution import attribution
from zoo.tools.quickstart.backgrounds import BACKGROUNDS
from zoo.tools.quickstart.packages import PACKAGES
from zoo.tools.quickstart.scenes import (
    OPAQUE,
    PAINTED,
    RECIPES,
    SPLITS,
    cast_shadow,
    claim,
    draw_versions,
    encoded,
    entries,
    npy,
    over,
    painted,
    run_jobs,
    scaled,
    soften,
    write_json,
)
from zoo.tools.sprites import seed_of

# Clear things with short names; slugs of the quickstart classes, sorted.
_SLUGS = """
airplane anchor avocado axe backpack balloon banana basketball bear bell bicycle birthday-cake broccoli bus butterfly
cactus camera candle carrot cat-face cherries chicken cookie cow-face crab croissant crown dog-face doughnut drum duck
ear-of-corn eggplant elephant envelope fire-engine fish flamingo four-leaf-clover fox french-fries frog game-die
gem-stone ghost giraffe grapes guitar hamburger hammer helicopter honeybee hot-dog key kite lady-beetle lemon light-bulb
lion lobster locomotive lollipop magnet maple-leaf monkey-face mushroom octopus owl palm-tree panda parrot penguin
pig-face pineapple pizza popcorn pretzel rainbow robot rocket rose sailboat scissors shark snail snake snowman
soccer-ball spider strawberry sunflower sunglasses teapot teddy-bear telephone tent tiger-face top-hat tractor trophy
trumpet tulip turtle umbrella unicorn violin volcano watermelon whale zebra
"""
SLUGS = tuple(_SLUGS.split())
COLOURS = ("black", "blue", "brown", "green", "orange", "pink", "purple", "red", "white", "yellow")
PLACES = ("top left", "top", "top right", "left", "middle", "right", "bottom left", "bottom", "bottom right")

SIDE = 192  # pixels, of scenes
CELL = SIDE // 3  # one thing at most stands in each
LENGTHS = (40, 62)  # pixels, the longer side of a drawing
MOST = 6  # things in a scene
ALIKE = 4  # things of one kind
DRAWN = 96  # pixels, side of a drawing before it is scaled into a scene
VERSIONS = {"train": 64, "test": 16}  # drawings per class
TURNS = {"train": 4, "test": 3}  # questions about a scene
CHUNK = 100  # scenes that are made, kept or lost together
CLEAR = 0.6  # share of a drawing's pixels that one colour needs to be its colour


@dataclass(frozen=True)
class Thing:
    """What stands in one cell of a scene.

    Attributes:
        name: of its class.
        place: one of ``PLACES``.
        colour: one of ``COLOURS``; None if no colour prevails.
        box: left, top, width and height in pixels.
    """

    name: str
    place: str
    colour: str | None
    box: tuple[int, int, int, int]

    @property
    def column(self) -> int:
        """0 to 2 from left to right."""
        return PLACES.index(self.place) % 3


@dataclass(frozen=True)
class Scene:
    """What can be asked about.

    Attributes:
        things: all of them; names differ, but for those of ``several``.
        several: the name that may occur up to ``ALIKE`` times, each number equally often; None where few things are.
        painted: the place whose colour was drawn first of all, each colour equally often.
        names: of all classes.
    """

    things: Sequence[Thing]
    several: str | None
    painted: str
    names: Sequence[str]

    @property
    def single(self) -> list[Thing]:
        """Things that a name alone tells from the others."""
        return [thing for thing in self.things if thing.name != self.several and thing.place != self.painted]


Asked = tuple[str, str] | None  # question and answer


def _at(place: str) -> str:
    return "in the middle" if place == "middle" else f"at the {place}"


def _what(scene: Scene, random: Random) -> Asked:
    others = [thing for thing in scene.things if thing.place != scene.painted]
    if not others:
        return None
    thing = random.choice(others)
    texts = "What is {}?", "Which thing is {}?"
    return random.choice(texts).format(_at(thing.place)), thing.name


def _where(scene: Scene, random: Random) -> Asked:
    if not scene.single:
        return None
    thing = random.choice(scene.single)
    texts = "Where is the {}?", "In which part of the picture is the {}?"
    return random.choice(texts).format(thing.name), thing.place


def _count(scene: Scene, random: Random) -> Asked:
    texts = "How many things are there?", "How many emoji are in the picture?"
    return random.choice(texts), str(len(scene.things))


def _count_of(scene: Scene, random: Random) -> Asked:
    if not scene.several:
        return None
    texts = "How many {} emoji are there?", "How many times does the picture show the {}?"
    number = sum(thing.name == scene.several for thing in scene.things)
    return random.choice(texts).format(scene.several), str(number)


def _colour(scene: Scene, random: Random) -> Asked:
    (thing,) = (thing for thing in scene.things if thing.place == scene.painted)
    texts = "What colour is the thing {}?", "Which colour does the thing {} have?"
    return random.choice(texts).format(_at(thing.place)), thing.colour


def _left_of(scene: Scene, random: Random) -> Asked:
    pairs = [(a, b) for a in scene.single for b in scene.single if a.column < b.column]
    if not pairs:
        return None
    left, right = random.choice(pairs)
    side, answer = random.choice(("left", "right")), random.choice(("yes", "no"))
    first, second = (left, right) if (side == "left") == (answer == "yes") else (right, left)
    return f"Is the {first.name} to the {side} of the {second.name}?", answer


def _exists(scene: Scene, random: Random) -> Asked:
    there = {thing.name for thing in scene.things}
    answer = random.choice(("yes", "no"))
    names = [thing.name for thing in scene.single] if answer == "yes" else [n for n in scene.names if n not in there]
    if not scene.single:  # for both answers, or "no" would be the better guess
        return None
    name = random.choice(names)
    article = "an" if name[0] in "aeiou" and not name.startswith("uni") else "a"
    return random.choice(("Is there {} {}?", "Does the picture show {} {}?")).format(article, name), answer


KINDS: dict[str, Callable[[Scene, Random], Asked]] = {
    "what": _what,
    "where": _where,
    "count": _count,
    "count of": _count_of,
    "colour": _colour,
    "left of": _left_of,
    "exists": _exists,
}


def build_questions(
    root: Path, out: Path, *, train: int = 20000, test: int = 1000, seed: int = 0, workers: int | None = None
) -> dict[str, Any]:
    """Builds a folder of scenes and questions from the quickstart sprites.

    Args:
        root: Folder with ``train``, ``test`` and ``classes.json``, as ``build`` makes it.
        out: Where to build. What an interrupted build with the same settings completed there is kept.
        train: Scenes of the training styles.
        test: Scenes of the held-out style.
        seed: Of all randomness.
        workers: Processes; None for one per core.

    Returns:
        The report: for each split the numbers of scenes and questions, and what is right without looking: see
        ``blind_accuracy``.

    Raises:
        FileNotFoundError: ``root`` was not built.
        ValueError: ``out`` holds questions of other settings, or other files.
    """
    names = [entry["name"] for entry in entries(root, SLUGS)]
    sizes = {"train": train, "test": test}
    claim(out / "questions.json", {"classes": list(SLUGS), "sizes": sizes, "seed": seed})
    for split, scenes in sizes.items():
        if not (out / f"{split}.json").exists():
            _build_split(root, out, split, scenes, seed, workers, names)
    asked = {split: json.loads((out / f"{split}.json").read_text("utf-8")) for split in SPLITS}
    report: dict[str, Any] = {
        split: {"scenes": sizes[split], "questions": sum(len(record["kinds"]) for record in records)}
        for split, records in asked.items()
    }
    report["blind"] = blind_accuracy(asked["train"], asked["test"])
    write_text(out / "report.json", json.dumps(report, indent=1))
    write_text(out / "ATTRIBUTION.md", attribution(PACKAGES))
    shutil.rmtree(out / ".building", ignore_errors=True)
    return report


def _build_split(
    root: Path, out: Path, split: str, scenes: int, seed: int, workers: int | None, names: list[str]
) -> None:
    scratch = out / ".building"
    for folder in (scratch, out / split):
        folder.mkdir(exist_ok=True)
    parts = [scratch / f"{split}-{start:06d}.json" for start in range(0, scenes, CHUNK)]
    if missing := [number for number, part in enumerate(parts) if not part.exists()]:
        drawings = scratch / f"{split}.npy"
        if not drawings.exists():
            draw = draw_versions(root / split, SLUGS, RECIPES[split], VERSIONS[split], DRAWN, seed)
            write_bytes(drawings, npy(draw))
            write_bytes(scratch / f"{split}-colours.npy", npy(_colours(draw)))
        jobs = [(out, split, number * CHUNK, min(scenes, (number + 1) * CHUNK), seed, names) for number in missing]
        run_jobs(_build_chunk, jobs, split, workers)
    made = [record for part in parts for record in json.loads(part.read_text("utf-8"))]
    write_json(out / f"{split}_objects.json", {record["image"]: record["things"] for record in made})
    write_json(out / f"{split}_captions.json", [_record(scene, [scene["caption"]], ["caption"]) for scene in made])
    if split == "train":
        records = [_record(scene, scene["pairs"], scene["kinds"]) for scene in made]
    else:
        records = [
            _record(scene, [pair], [kind]) for scene in made for pair, kind in zip(scene["pairs"], scene["kinds"])
        ]
    write_json(out / f"{split}.json", records)


def _record(scene: dict[str, Any], pairs: Sequence[tuple[str, str]], kinds: Sequence[str]) -> dict[str, Any]:
    """LLaVA's format, and the kind of each question."""
    turns = []
    for question, answer in pairs:
        turns.append({"from": "human", "value": question if turns else f"<image>\n{question}"})
        turns.append({"from": "gpt", "value": answer})
    return {"id": Path(scene["image"]).stem, "image": scene["image"], "conversations": turns, "kinds": kinds}


def _colours(drawings: np.ndarray) -> np.ndarray:
    """Place in ``COLOURS`` of what prevails in each drawing, (classes, versions) int64; -1 where none does."""
    return np.array([[_prevailing(version) for version in versions] for versions in drawings])


def _prevailing(drawing: np.ndarray) -> int:
    """Of the pixels that are no dark outline; of all, if most are dark."""
    colour = drawing[drawing[..., 3] >= OPAQUE]
    straight = (colour[:, :3].astype(np.uint16) * 255 // colour[:, 3:]).clip(0, 255).astype(np.uint8)
    groups = colour_groups(straight)
    dark = groups == COLOURS.index("black")
    if dark.mean() < CLEAR:
        groups = groups[~dark]
    share = np.bincount(groups + 1, minlength=len(COLOURS) + 1)[1:] / max(len(groups), 1)
    return int(share.argmax()) if share.max() >= CLEAR else -1


def colour_groups(pixels: np.ndarray) -> np.ndarray:
    """Place in ``COLOURS`` of pixels (N, 3) uint8 as (N,) int64; -1 for greys and what lies between two colours."""
    hue, saturation, value = np.asarray(Image.fromarray(pixels[None]).convert("HSV"), np.float32)[0].T
    hue, saturation, value = hue * (360 / 255), saturation / 255, value / 255
    reddish = (hue < 12) | (hue >= 345)
    warm = (hue >= 12) & (hue < 42)
    rules = {  # the first that fits
        "black": value < 0.25,
        "white": (saturation < 0.12) & (value > 0.85),
        "": saturation < 0.18,
        "pink": ((hue >= 300) | reddish) & (saturation < 0.6) & (value > 0.75),
        "brown": (warm | reddish) & (value < 0.7) & ((value < 0.5) | warm),
        "red": reddish,
        "orange": (hue >= 16) & (hue < 42),
        "yellow": (hue >= 45) & (hue < 66),
        "green": (hue >= 72) & (hue < 165),
        "blue": (hue >= 185) & (hue < 245),
        "purple": (hue >= 255) & (hue < 300),
    }
    places = [COLOURS.index(name) if name else -1 for name in rules]
    return np.select(list(rules.values()), places, -1)


def _build_chunk(job: tuple[Path, str, int, int, int, list[str]]) -> None:
    """In a worker process: some scenes, and last of all what is asked about them."""
    out, split, start, stop, seed, names = job
    torch.set_num_threads(1)
    drawings = np.load(out / ".building" / f"{split}.npy", mmap_mode="r")
    colours = np.load(out / ".building" / f"{split}-colours.npy")
    backdrops = painted(seed_of(seed, SPLITS.index(split), start, 2), stop - start, SIDE)
    made = []
    for number, backdrop in zip(range(start, stop), backdrops):
        random = Random(seed_of(seed, SPLITS.index(split), number, 3))
        if random.random() >= PAINTED:
            backdrop = np.asarray(BACKGROUNDS[random.choice(list(BACKGROUNDS))](SIDE, random))
        picture, scene = compose(drawings, colours, names, backdrop, random)
        image = f"{split}/{number:06d}.jpg"
        write_bytes(out / image, encoded(picture, "JPEG", quality=random.randint(80, 95)))
        kinds, pairs = ask(scene, TURNS[split], random)
        things = [asdict(thing) for thing in scene.things]
        made.append({"image": image, "things": things, "caption": caption(scene), "kinds": kinds, "pairs": pairs})
    write_json(out / ".building" / f"{split}-{start:06d}.json", made)


def compose(
    drawings: np.ndarray, colours: np.ndarray, names: Sequence[str], backdrop: np.ndarray, random: Random
) -> tuple[np.ndarray, Scene]:
    """Puts things into cells of a 3 x 3 grid, each somewhere in its cell.

    Args:
        drawings: (classes, versions, side, side, 4) uint8, colour premultiplied by alpha.
        colours: (classes, versions) int64, places in ``COLOURS``, or -1.
        names: of the classes.
        backdrop: (SIDE, SIDE, 3) uint8.
        random: Where everything comes from.

    Returns:
        The picture, RGB (SIDE, SIDE, 3) uint8, and the scene.
    """
    count = random.randint(1, MOST)
    places = random.sample(range(9), count)
    # First one thing of a colour, so that rare colours are asked for as often as others.
    colour = random.choice(sorted(set(colours[colours >= 0].tolist())))
    chosen = [tuple(map(int, random.choice(np.argwhere(colours == colour))))]
    others = random.sample([number for number in range(len(names)) if number != chosen[0][0]], count)
    several = None
    if count > ALIKE:
        several = others[0]
        others = [several] * random.randint(1, ALIKE) + others[1:]
    chosen += [(number, random.randrange(drawings.shape[1])) for number in others[: count - 1]]
    picture = backdrop.copy()
    shadow = random.uniform(0.15, 0.5) if random.random() < 0.3 else 0.0
    things = []
    for place, (number, version) in zip(places, chosen):
        drawing = scaled(drawings[number, version], random.uniform(*LENGTHS))
        height, width = drawing.shape[:2]
        top = place // 3 * CELL + random.randint(0, CELL - height)
        left = place % 3 * CELL + random.randint(0, CELL - width)
        if shadow:
            cast_shadow(picture, drawing[..., 3], top, left, shadow)
        there = slice(top, top + height), slice(left, left + width)
        picture[there] = over(drawing, picture[there])
        group = int(colours[number, version])
        found = COLOURS[group] if group >= 0 else None
        things.append(Thing(names[number], PLACES[place], found, (left, top, width, height)))
    scene = Scene(things, None if several is None else names[several], PLACES[places[0]], names)
    return soften(picture, random), scene


def ask(scene: Scene, turns: int, random: Random) -> tuple[list[str], list[tuple[str, str]]]:
    """Different kinds of questions about a scene.

    Returns:
        The kinds, at most ``turns``, and question and answer of each.
    """
    asked = {}
    order = random.sample(list(KINDS), len(KINDS))
    # Not "count" in place of another kind: it would be asked more often where few things are.
    for kind in order[:turns] + [kind for kind in order[turns:] if kind != "count"]:
        if len(asked) < turns and (pair := KINDS[kind](scene, random)):
            asked[kind] = pair
    return list(asked), list(asked.values())


def caption(scene: Scene) -> tuple[str, str]:
    """A request to describe the scene, and what is where, in reading order."""
    things = sorted(scene.things, key=lambda thing: PLACES.index(thing.place))
    return "Describe the picture.", ", ".join(f"{thing.name} {_at(thing.place)}" for thing in things)


def blind_accuracy(train: Iterable[dict[str, Any]], test: Iterable[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """What a model scores that sees no picture.

    Args:
        train: records of LLaVA's format, with the kind of each question.
        test: likewise.

    Returns:
        For each kind of question, the number of ``questions``, how many ``answers`` there are, and the percentages that
        the commonest answer of the kind (``majority``) and, of each question by itself (``blind``), get right.
    """
    of_kind: dict[str, Counter] = defaultdict(Counter)
    of_question: dict[str, Counter] = defaultdict(Counter)
    for kind, question, answer in _pairs(train):
        of_kind[kind][answer] += 1
        of_question[question][answer] += 1
    asked: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for kind, question, answer in _pairs(test):
        asked[kind].append((question, answer))
    found = {}
    for kind, pairs in sorted(asked.items()):
        usual = _commonest(of_kind[kind])
        guesses = [_commonest(of_question[question]) or usual for question, _ in pairs]
        answers = [answer for _, answer in pairs]
        found[kind] = {
            "questions": len(pairs),
            "answers": len(set(answers)),
            "majority": round(100 * answers.count(usual) / len(pairs), 1),
            "blind": round(100 * sum(map(str.__eq__, guesses, answers)) / len(pairs), 1),
        }
    return found


def _pairs(records: Iterable[dict[str, Any]]) -> Iterable[tuple[str, str, str]]:
    for record in records:
        texts = [turn["value"].removeprefix("<image>\n") for turn in record["conversations"]]
        yield from zip(record["kinds"], texts[::2], texts[1::2])


def _commonest(answers: Counter) -> str:
    """Of equally common ones, the first in the alphabet."""
    return min(answers, key=lambda answer: (-answers[answer], answer), default="")
