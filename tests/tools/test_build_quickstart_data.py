import hashlib
import io
import json
import os
import random
import stat
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from rich.console import Console
from typer.testing import CliRunner

pytest.importorskip("resvg_py", reason="the quickstart data needs the train extra")

from zoo.tools.build_quickstart_data import app, build
from zoo.tools.quickstart import packages as npm
from zoo.tools.quickstart.attribution import LICENCE_TEXTS
from zoo.tools.quickstart.backgrounds import BACKGROUNDS
from zoo.tools.quickstart.classes import GENDERED, LETTERS, choose, key, slug
from zoo.tools.quickstart.packages import PACKAGES, Package, integrity, read_members
from zoo.tools.quickstart.pictures import MARGIN, SIZE, close_pairs, decode, encode, normalise, thumbprint
from zoo.tools.quickstart.samples import SAMPLES, SIDE, compose, write_samples

PACKAGED_SAMPLES = Path(__file__).parents[2] / "zoo" / "samples"
NAMED_BY_CODE = ("noto", "twemoji", "fluent-3d", "fluent-modern")
ICON_SETS = ("noto-v1", "emojione", "fxemoji", "emojione-monotone", "fluent-high-contrast")
TRAINING = (*NAMED_BY_CODE, *ICON_SETS)

GROUPS = ("people-body", "component", "animals-nature", "flags", "symbols")
SUBGROUPS = ("person", "animal-mammal", "keycap", "alphanum", "geometric")
MESSAGES = {
    "groups": [{"order": order, "key": name} for order, name in enumerate(GROUPS)],
    "subgroups": [{"order": order, "key": name} for order, name in enumerate(SUBGROUPS)],
}
# hexcode: label, group, subgroup
EMOJI = {
    "1F436": ("dog face", 2, 1),
    "1F408-200D-2B1B": ("black cat", 2, 1),
    "1F9D1-200D-2695-FE0F": ("health worker", 0, 0),
    "2648-FE0F": ("Aries", 4, 4),
    "1F315": ("full moon", 2, 1),
    "1F7E1": ("yellow circle", 4, 4),
    # none of these may become a class
    "1F468-200D-2695-FE0F": ("man health worker", 0, 0),
    "1F3C4-200D-2640-FE0F": ("woman surfing", 0, 0),
    "1F9D1-1F3FB-200D-2695-FE0F": (None, None, None),  # a skin tone: drawn, but no record of its own
    "1F478": ("princess", 0, 0),
    "1F3FB": ("light skin tone", 1, 0),
    "1F1E8-1F1ED": ("flag: Switzerland", 3, 0),
    "0031-FE0F-20E3": ("keycap: 1", 4, 2),
    "1F17F-FE0F": ("P button", 4, 3),
    "1F51E": ("no one under eighteen", 4, 4),
    "25AA-FE0F": ("black small square", 4, 4),
}
KEPT = ["aries", "black-cat", "dog-face", "full-moon", "health-worker"]  # and no yellow circle: see ``same_moon``


def drawing(seed, side=64):
    """A picture of its own for every seed."""
    numbers = random.Random(seed)
    picture = Image.new("RGBA", (side, side))
    draw = ImageDraw.Draw(picture)
    for _ in range(4):
        x, y = sorted(numbers.sample(range(4, side - 4), 2)), sorted(numbers.sample(range(4, side - 4), 2))
        draw.rectangle((x[0], y[0], x[1], y[1]), fill=(*numbers.choices(range(256), k=3), 255))
    return picture


def marks(seed):
    numbers = random.Random(seed)
    return "".join(
        f'<circle cx="{numbers.randint(16, 56)}" cy="{numbers.randint(16, 56)}" r="{numbers.randint(4, 14)}"'
        f' fill="#{numbers.randrange(16**6):06x}"/>'
        for _ in range(4)
    )


def svg(seed, width=72):
    return f'<svg viewBox="0 0 {width} 72" xmlns="http://www.w3.org/2000/svg">{marks(seed)}</svg>'.encode()


def picture_file(style, hexcode):
    same_moon = "moon" if hexcode in ("1F315", "1F7E1") and style == "openmoji" else hexcode
    name = hexcode.replace("-FE0F", "") if style == "openmoji" else hexcode.lower()
    if style in ("fluent-modern", "openmoji"):
        return f"{name}.svg", svg(style + same_moon)
    buffer = io.BytesIO()
    picture = drawing(style + hexcode)
    picture.save(buffer, "WEBP" if style == "fluent-3d" else "PNG", lossless=True)
    return f"{name}.{'webp' if style == 'fluent-3d' else 'png'}", buffer.getvalue()


def icon_set(style):
    """One Iconify file; its names are those of emoji, written as the set likes, and of other things."""
    icons = {
        "health-worker": {"body": marks(style + "worker")},
        "full-moon": {"body": marks(style + "moon"), "width": 144},
    }
    icons["company-logo"] = {"body": marks(style + "logo")}
    aliases = {"blackcat": {"parent": "health-worker"}, "aries": {"parent": "full-moon", "hFlip": True}}
    content = {"icons": icons, "aliases": aliases if style == "fxemoji" else {}, "width": 72, "height": 72}
    return json.dumps(content).encode()


@pytest.fixture(scope="module")
def fake(tmp_path_factory):
    """A tiny set of packages: the pinned ones with our own pictures in them."""
    folder = tmp_path_factory.mktemp("tarballs")
    made = []
    for package in PACKAGES:
        if package.icons:
            files = {"icons.json": icon_set(package.style)}
        elif package.style:
            files = dict(picture_file(package.style, hexcode) for hexcode in EMOJI)
            files.pop("1f436.webp", None)  # three training styles are enough for the dog
        else:
            records = [
                {"hexcode": hexcode, "label": label, "group": group, "subgroup": subgroup}
                for hexcode, (label, group, subgroup) in EMOJI.items()
                if label
            ]
            files = {"data.json": json.dumps(records).encode(), "messages.json": json.dumps(MESSAGES).encode()}
        files["deeper/not-a-picture.png"] = b"must not be read"
        with tarfile.open(folder / package.tarball, "w:gz") as tar:
            for name, data in files.items():
                info = tarfile.TarInfo(f"{package.folder}/{name}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        made.append(replace(package, integrity=integrity(folder / package.tarball)))
    return tuple(made), folder


@pytest.fixture(scope="module")
def built(fake, tmp_path_factory):
    root = tmp_path_factory.mktemp("quickstart")
    return root, build(root, packages=fake[0], tarballs=fake[1])


def tree(root):
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def test_layout_and_classes(built):
    root, report = built
    classes = json.loads((root / "classes.json").read_text("utf-8"))
    assert [c["slug"] for c in classes] == KEPT == sorted(p.name for p in (root / "train").iterdir())
    assert classes[1] == {
        "slug": "black-cat", "name": "black cat", "group": "animals-nature", "hexcode": "1F408-200D-2B1B",
    }  # fmt: skip
    for chosen in KEPT:
        styles = {p.stem for p in (root / "train" / chosen).iterdir()}
        by_name = {"health-worker": set(ICON_SETS) - {"fxemoji"}, "full-moon": set(ICON_SETS)}.get(chosen, set())
        assert styles == {*NAMED_BY_CODE, *by_name} - ({"fluent-3d"} if chosen == "dog-face" else set())
        assert [p.name for p in (root / "test" / chosen).iterdir()] == ["openmoji.png"]
    assert report["classes"] == 5
    by_code = {"noto": 5, "twemoji": 5, "fluent-3d": 4, "fluent-modern": 5, "openmoji": 5}
    assert report["pictures"] == by_code | dict.fromkeys(ICON_SETS, 2) | {"fxemoji": 1}
    assert report["shared_pictures"] == [  # two names of one icon, and two moons
        ["fxemoji", "black-cat", "health-worker"],
        ["openmoji", "full-moon", "yellow-circle"],
    ]
    assert report["left_out_classes"] == ["yellow-circle"]
    assert not (root / ".building").exists()


def test_every_picture_is_a_centred_drawing(built):
    root, _ = built
    seen = set()
    for path in root.rglob("*.png"):
        with Image.open(path) as picture:
            assert (picture.mode, picture.size) == ("RGBA", (SIZE, SIZE))
            left, top, right, bottom = picture.getchannel("A").getbbox()
            seen.add(picture.tobytes())
        assert max(right - left, bottom - top) == SIZE - 2 * MARGIN
        assert abs(left + right - SIZE) <= 1 and abs(top + bottom - SIZE) <= 1
    assert len(seen) == 33  # all differ


def test_pictures_are_those_of_their_emoji(built):
    root, _ = built
    with Image.open(root / "train" / "health-worker" / "noto.png") as picture:
        expected = normalise(drawing("noto" + "1F9D1-200D-2695-FE0F"))
        assert picture.tobytes() == expected.tobytes()
    with Image.open(root / "test" / "aries" / "openmoji.png") as picture:
        assert picture.tobytes() == normalise(decode(svg("openmoji" + "2648-FE0F"))).tobytes()
    with Image.open(root / "train" / "full-moon" / "noto-v1.png") as picture:
        assert picture.tobytes() == normalise(decode(svg("noto-v1" + "moon", width=144))).tobytes()


def test_held_out_style_is_never_trained_on(built):
    root, _ = built
    assert not list((root / "train").rglob("*openmoji*"))
    held_out = {hashlib.sha256(p.read_bytes()).digest() for p in (root / "test").rglob("*.png")}
    trained = {hashlib.sha256(p.read_bytes()).digest() for p in (root / "train").rglob("*.png")}
    assert len(held_out) == 5 and not held_out & trained
    assert {p.stem for p in (root / "test").rglob("*.png")} == {"openmoji"}


def test_two_builds_are_byte_identical(built, fake, tmp_path):
    build(tmp_path, packages=fake[0], tarballs=fake[1])
    assert tree(tmp_path) == tree(built[0])


def test_rebuild_replaces_what_was_there(built, fake, tmp_path):
    build(tmp_path, packages=fake[0], tarballs=fake[1])
    stale = tmp_path / "train" / "stale"
    stale.mkdir()
    (tmp_path / ".building" / "train").mkdir(parents=True)  # a killed build
    build(tmp_path, packages=fake[0], tarballs=fake[1])
    assert tree(tmp_path) == tree(built[0]) and not stale.exists()


def test_foreign_train_folder_is_left_alone(fake, tmp_path):
    (tmp_path / "train" / "n01440764").mkdir(parents=True)
    with pytest.raises(ValueError, match="was not built by this tool"):
        build(tmp_path, packages=fake[0], tarballs=fake[1])
    assert (tmp_path / "train" / "n01440764").is_dir()


def test_picture_shared_by_two_classes_is_used_for_neither(fake, tmp_path):
    packages, folder = fake
    (noto,) = (p for p in packages if p.style == "noto")
    files = read_members(folder / noto.tarball, noto.folder)
    files["1f408-200d-2b1b.png"] = files["1f436.png"]  # the cat now looks like the dog, who had three styles
    for package in packages:
        os.link(folder / package.tarball, tmp_path / package.tarball)
    (tmp_path / noto.tarball).unlink()
    with tarfile.open(tmp_path / noto.tarball, "w:gz") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(f"{noto.folder}/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    changed = replace(noto, integrity=integrity(tmp_path / noto.tarball))
    report = build(tmp_path / "out", packages=[changed if p is noto else p for p in packages], tarballs=tmp_path)
    assert ["noto", "dog-face", "black-cat"] in report["shared_pictures"]
    assert report["left_out_classes"] == ["dog-face", "yellow-circle"]
    assert not (tmp_path / "out" / "train" / "black-cat" / "noto.png").exists()
    assert not (tmp_path / "out" / "test" / "dog-face").exists()


def test_wrong_and_missing_tarballs(fake, tmp_path):
    packages, folder = fake
    with pytest.raises(FileNotFoundError, match=r"emoji-datasource-google-16.0.0.tgz is missing"):
        build(tmp_path / "a", packages=packages, tarballs=tmp_path)
    for package in packages:
        (tmp_path / package.tarball).write_bytes((folder / package.tarball).read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"has integrity sha512-.* was expected"):
        build(tmp_path / "a", packages=packages, tarballs=tmp_path)
    assert not (tmp_path / "a").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="the stand-in for npm is a shell script")
def test_download_is_checked_cached_and_resumed(fake, tmp_path, monkeypatch):
    packages, folder = fake
    log = tmp_path / "log"
    script = tmp_path / "bin" / "npm"
    script.parent.mkdir()
    # $1 pack, $2 NAME@VERSION, $3 --json, $4 --pack-destination, $5 folder
    script.write_text(
        f'#!/bin/sh\necho "$1 $2 $3" >> {log}\nfile=$(echo "$2" | sed "s/^@//; s#/#-#; s/@/-/").tgz\n'
        f'[ -f {tmp_path}/broken ] && [ "$file" = openmoji-17.0.0.tgz ] && echo truncated > "$5/$file" && exit 0\n'
        f'cp {folder}/"$file" "$5"\n'
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(script.parent), prepend=os.pathsep)
    cache = tmp_path / "root" / "cache"
    (tmp_path / "broken").touch()
    with pytest.raises(ValueError, match="openmoji"):
        build(tmp_path / "root", packages=packages)
    assert sorted(p.name for p in cache.iterdir()) == sorted(p.tarball for p in packages[:-2])
    (tmp_path / "broken").unlink()
    log.unlink()
    assert build(tmp_path / "root", packages=packages)["classes"] == 5
    assert log.read_text().splitlines() == ["pack openmoji@17.0.0 --json", "pack emojibase-data@17.0.0 --json"]


def test_npm_missing_or_failing_is_one_sentence(fake, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"npm is needed to get emoji-datasource-google@16\.0\.0: install Node"):
        npm.obtain(fake[0], tmp_path / "cache", Console(quiet=True))
    script = tmp_path / "npm"
    script.write_text("#!/bin/sh\necho no such version >&2\nexit 1\n")
    script.chmod(0o755)
    with pytest.raises(RuntimeError, match=r"npm could not get emoji-datasource-google@16.0.0: no such version"):
        npm.obtain(fake[0], tmp_path / "cache", Console(quiet=True))


def test_pinned_packages():
    assert [p.style for p in PACKAGES if p.held_out] == ["openmoji"]
    assert [p.style for p in PACKAGES if p.style and not p.held_out] == list(TRAINING)
    for package in PACKAGES:
        assert package.integrity.startswith("sha512-") and len(package.integrity) == 95
        assert package.licence in LICENCE_TEXTS
    assert Package("@a/b", "1.2.3", *"......").tarball == "a-b-1.2.3.tgz"


def test_attribution_names_every_package(built):
    text = (built[0] / "ATTRIBUTION.md").read_text("utf-8")
    for package in PACKAGES:
        assert f"## {package.name} {package.version}" in text and package.author in text
    assert text.count("CC-BY-SA-4.0") == 1 and "evaluation only: never trained on" in text


def record(hexcode, label, group=0, subgroup=0):
    return {"hexcode": hexcode, "label": label, "group": group, "subgroup": subgroup}


def chosen_names(*records):
    everything = {key(r["hexcode"]) for r in records}
    return [c.name for c in choose(records, MESSAGES, dict.fromkeys((*TRAINING, "openmoji"), everything), "openmoji")]


@pytest.mark.parametrize("hexcode", [*GENDERED, *LETTERS])
def test_gendered_pairs_and_letters_are_no_classes(hexcode):
    assert chosen_names(record(hexcode, "x"), record("1F436", "dog face")) == ["dog face"]


@pytest.mark.parametrize(
    "hexcode",
    [
        "1F468-200D-1F680",  # man astronaut
        "1F9D4-200D-2642-FE0F",  # man: beard
        "1F469-200D-2764-FE0F-200D-1F48B-200D-1F468",  # kiss: woman, man
        "1F9D1-200D-1F9AF-200D-27A1-FE0F",  # person with white cane: facing right
    ],
)
def test_gendered_and_mirrored_sequences_are_no_classes(hexcode):
    assert chosen_names(record(hexcode, "x")) == []


def test_a_class_needs_three_training_styles_and_the_held_out_one():
    dog = [record("1F436", "dog face")]
    three = {style: {"1F436"} for style in TRAINING[:3]}
    assert len(choose(dog, MESSAGES, {**three, "openmoji": {"1F436"}}, "openmoji")) == 1
    assert choose(dog, MESSAGES, {**three, "openmoji": set()}, "openmoji") == []
    two = {style: {"1F436"} for style in TRAINING[:2]}
    assert choose(dog, MESSAGES, {**two, "openmoji": {"1F436"}}, "openmoji") == []


def test_names_and_slugs():
    assert chosen_names(record("1F483", "woman dancing")) == ["dancer"]
    assert slug("eight o\u2019clock") == "eight-oclock"
    assert slug("person: red hair") == "person-red-hair"
    assert slug("piñata") == "pinata"
    assert key("1f9d1-200d-2695-fe0f") == "1F9D1-200D-2695"
    with pytest.raises(ValueError, match="share a folder name"):
        chosen_names(record("1F436", "dog face"), record("1F415", "dog: face"))


LENGTHS, OFFSETS, BYTES = st.integers(1, 300), st.integers(0, 40), st.integers(0, 255)


@given(LENGTHS, LENGTHS, OFFSETS, OFFSETS, st.tuples(BYTES, BYTES, BYTES))
def test_normalise_crops_scales_and_centres(width, height, left, top, colour):
    picture = Image.new("RGBA", (left + width + 7, top + height + 3), (9, 9, 9, 0))
    picture.paste((*colour, 255), (left, top, left + width, top + height))
    pixels = np.asarray(normalise(picture))
    assert pixels.shape == (SIZE, SIZE, 4)
    rows, columns = np.nonzero(pixels[..., 3])
    tall, wide = np.ptp(rows) + 1, np.ptp(columns) + 1
    assert max(tall, wide) == SIZE - 2 * MARGIN
    shorter = max(1, round((SIZE - 2 * MARGIN) * min(width, height) / max(width, height)))
    assert min(tall, wide) == shorter
    assert abs(rows.min() + rows.max() - SIZE + 1) <= 1 and abs(columns.min() + columns.max() - SIZE + 1) <= 1
    inside = pixels[rows[0] : rows[-1] + 1, columns.min() : columns.max() + 1]
    assert (inside[..., 3] == 255).all() and np.abs(inside[..., :3].astype(int) - colour).max() <= 2
    assert not pixels[pixels[..., 3] == 0].any()


def test_normalise_refuses_an_empty_picture():
    with pytest.raises(ValueError, match="picture of 30x20 pixels is empty"):
        normalise(Image.new("RGBA", (30, 20), (255, 0, 0, 3)))


def test_decode_formats_and_encode():
    circle = decode(b'<?xml version="1.0"?><svg viewBox="0 0 10 10" xmlns="http://www.w3.org/2000/svg">'
                    b'<circle cx="5" cy="5" r="5" fill="#f00"/></svg>', 100)  # fmt: skip
    assert circle.size == (100, 100) and circle.getpixel((50, 50)) == (255, 0, 0, 255)
    assert circle.getpixel((2, 2))[3] == 0
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 10, 200, 30])
    buffer = io.BytesIO()
    palette.save(buffer, "PNG", transparency=0)
    assert decode(buffer.getvalue()).getpixel((1, 1)) == (10, 200, 30, 255)
    picture = normalise(drawing(1))
    assert Image.open(io.BytesIO(encode(picture))).tobytes() == picture.tobytes()


def test_close_pairs():
    white, black = (Image.new("RGBA", (SIZE, SIZE), colour) for colour in ("white", "black"))
    nearly = Image.new("RGBA", (SIZE, SIZE), (250, 255, 255))
    prints = {name: thumbprint(p) for name, p in (("white", white), ("black", black), ("nearly", nearly))}
    assert close_pairs(prints, 0.5) == [("white", "nearly", round(5 / 255 / 2, 4))]
    assert [pair[2] for pair in close_pairs(prints, 1.01)][1:] == pytest.approx([0.8604, 0.8660], abs=1e-3)
    hidden = Image.new("RGBA", (SIZE, SIZE), (0, 255, 0, 0))
    assert not thumbprint(hidden).any()  # an invisible colour does not count


def test_samples_are_reproducible_and_complete(built, fake, tmp_path, monkeypatch):
    monkeypatch.setattr("zoo.tools.quickstart.samples.SAMPLES", (("dog-face", "night"), ("aries", "checks")))
    (tmp_path / "old.jpg").touch()
    written = write_samples(built[0], tmp_path, fake[1], fake[0])
    first = tree(tmp_path)
    assert sorted(first) == ["ATTRIBUTION.md", "aries.jpg", "dog-face.jpg"]
    assert b"`dog-face.jpg`: OpenMoji 1F436" in first["ATTRIBUTION.md"]
    assert write_samples(built[0], tmp_path, fake[1], fake[0]) == written and tree(tmp_path) == first
    monkeypatch.setattr("zoo.tools.quickstart.samples.SAMPLES", (("unicorns", "night"),))
    with pytest.raises(ValueError, match="unicorns in SAMPLES is no class"):
        write_samples(built[0], tmp_path, fake[1], fake[0])


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_compose_shows_the_drawing_on_a_varied_background(background):
    square = Image.new("RGBA", (400, 400), (255, 0, 255, 255))
    scene = np.asarray(compose(square, background, random.Random(3)))
    assert scene.shape == (SIDE, SIDE, 3)
    covered = (np.abs(scene.astype(int) - (255, 0, 255)).max(2) < 10).mean()
    assert 0.3 < covered < 0.62
    border = np.concatenate([scene[:, :8].reshape(-1, 3), scene[:, -8:].reshape(-1, 3)])
    assert len(np.unique(border, axis=0)) > 30
    assert (np.asarray(compose(square, background, random.Random(3))) == scene).all()


def test_packaged_samples():
    pictures = sorted(path.name for path in PACKAGED_SAMPLES.iterdir())
    assert pictures == sorted(["ATTRIBUTION.md", *(f"{name}.jpg" for name, _ in SAMPLES)])
    assert len(SAMPLES) == 12
    text = (PACKAGED_SAMPLES / "ATTRIBUTION.md").read_text("utf-8")
    for name, _ in SAMPLES:
        path = PACKAGED_SAMPLES / f"{name}.jpg"
        assert path.stat().st_size < 40_000 and f"`{name}.jpg`" in text
        with Image.open(path) as picture:
            assert picture.size == (SIDE, SIDE) and np.asarray(picture).std() > 25
    assert "CC-BY-SA-4.0" in text


def test_command_reports_errors_in_one_line(tmp_path):
    result = CliRunner().invoke(app, ["build", str(tmp_path / "root"), "--tarballs", str(tmp_path)])
    assert result.exit_code == 1 and not (tmp_path / "root").exists()
    result = CliRunner().invoke(app, ["samples", str(tmp_path / "root"), str(tmp_path / "out")])
    assert result.exit_code == 1 and not (tmp_path / "out").exists()
