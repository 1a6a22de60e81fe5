"""Damaged files and arguments give the documented errors: mutations of sound ones, and what fuzzing has found."""

from functools import lru_cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from zoo.tools import fuzz

CRASHERS = sorted(path for path in (Path(__file__).parent / "crashers").glob("*/*") if path.is_file())
PLACES = st.floats(0, 1, exclude_max=True)
EDITS = st.one_of(
    st.tuples(st.just("set"), PLACES, st.binary(min_size=1, max_size=4)),
    st.tuples(st.just("insert"), PLACES, st.binary(min_size=1, max_size=16)),
    st.tuples(st.just("repeat"), PLACES, st.integers(1, 64)),
    st.tuples(st.just("delete"), PLACES, st.integers(1, 64)),
    st.tuples(st.just("cut"), PLACES, st.none()),
)
SEEDS = lru_cache(fuzz.seeds)


def mutated(data, edits):
    for kind, place, what in edits:
        at = int(place * len(data))
        if kind == "set":
            data = data[:at] + what + data[at + len(what) :]
        elif kind == "insert":
            data = data[:at] + what + data[at:]
        elif kind == "repeat":
            data = data[: at + what] + data[at:]
        elif kind == "delete":
            data = data[:at] + data[at + what :]
        else:
            data = data[:at]
    return data


def check(target):
    """A test of a target with mutations of its sound files."""

    @settings(
        max_examples={"command": 100}.get(target, 250),
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(st.data())
    def run(data):
        seed = data.draw(st.sampled_from(range(len(SEEDS(target)))))
        fuzz.TARGETS[target](mutated(SEEDS(target)[seed], data.draw(st.lists(EDITS, min_size=1, max_size=6))))

    run()


@pytest.mark.filterwarnings("ignore")  # of Pillow, about what is damaged
def test_pictures():
    check("picture")


def test_checkpoints():
    check("checkpoint")


def test_settings():
    check("settings")


def test_command_lines():
    check("command")


@pytest.mark.parametrize("target", fuzz.TARGETS)
def test_sound_files_are_read(target, monkeypatch):
    """Else the tests above would try nothing but errors."""
    monkeypatch.setattr(fuzz, "_check_line", lambda error: pytest.fail(f"a sound file gives {error}"))
    for data in fuzz.seeds(target):
        fuzz.TARGETS[target](data)


@pytest.mark.parametrize("target", ["picture", "checkpoint", "settings"])
def test_an_error_that_is_not_documented_is_found(target, monkeypatch):
    reader = {
        "picture": "zoo.images.read_image",
        "checkpoint": "zoo.checkpoints.read_weights",
        "settings": "zoo.tools.train_classifier.load_config",
    }[target]

    def broken(*_):
        raise KeyError("a bug")

    monkeypatch.setattr(reader, broken)
    with pytest.raises(KeyError):
        fuzz.TARGETS[target](b"x")


@pytest.mark.parametrize("path", CRASHERS, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_what_fuzzing_found(path):
    fuzz.TARGETS[path.parent.name](path.read_bytes())


def test_fuzzing_tells_its_use(monkeypatch):
    monkeypatch.setattr("sys.argv", ["fuzz.py", "nothing", "corpus"])
    with pytest.raises(SystemExit, match=r"picture\|checkpoint\|settings\|command CORPUS"):
        fuzz.main()
