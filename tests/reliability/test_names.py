"""Names that a user did not choose: they are printed as one line, obeyed by no terminal, and lead out of no folder."""

import json
import os

import numpy as np
import pytest
import typer
from PIL import Image
from pyarrow import parquet

from zoo.bulk.command import _tell
from zoo.bulk.run import Summary
from zoo.images import ImageError, find_images, read_image
from zoo.labels import read_labels
from zoo.printable import printable

HOSTILE = "\x1b[2Jno\nline.png"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\nb\r\x1b[31m\x85", r"a\nb\r\x1b[31m\x85"),
        (os.fsdecode(b"\xff.png"), r"\udcff.png"),
        ("ä 日本 \N{FAMILY} \u202f.png", "ä 日本 \N{FAMILY} \u202f.png"),
    ],
)
def test_printable(text, shown):
    assert printable(text) == shown


def test_names_with_control_characters(folder, weights, zoo, draw):
    draw(folder / "in" / HOSTILE)
    (folder / "in" / f"bad{HOSTILE}").write_bytes(b"hello")
    result = zoo("classify", "in", *weights, code=1)
    assert "\x1b" not in result.output and r"\x1b[2Jno\nline.png" in result.stdout
    assert len(result.stderr.splitlines()) == 2
    found = json.loads(zoo("classify", "in", "--json", *weights, code=1).stdout)
    assert [os.path.basename(entry["source"]) for entry in found["results"]] == [HOSTILE, "b.png"]
    assert found["failed"][0]["source"].endswith(f"bad{HOSTILE}")


def test_names_with_control_characters_in_bulk(tmp_path, capsys):
    with pytest.raises(typer.Exit):
        _tell(Summary(done=2, failed=1, errors=[f"{HOSTILE} is no picture"]), tmp_path)
    said = capsys.readouterr().err
    assert r"\x1b[2Jno\nline.png is no picture" in said and len(said.splitlines()) == 2


def test_class_names_with_control_characters(folder, weights, zoo):
    (folder / "names.txt").write_text("".join(f"\x1b[31mclass {number}\n" for number in range(1000)))
    shown = zoo("classify", "a.png", "--labels", "names.txt", *weights).stdout
    assert r"\x1b[31mclass " in shown and "\x1b" not in shown


def test_class_names_of_boxes_and_maps_with_control_characters(folder, capsys):
    pytest.importorskip("cv2", reason="drawn videos need the dense extra")
    from zoo.dense import DenseResult
    from zoo.dense_cli import _run

    class Finds:
        def predict_all(self, pictures):
            return (DenseResult(path, Image.new("RGB", (4, 3)), HOSTILE) for path in pictures)

    _run(Finds(), ["a.png"], False, None, False, draw=None, objects=None, names=str)
    shown = capsys.readouterr().out
    assert r"\x1b[2Jno\nline.png" in shown and "\x1b" not in shown


def test_names_that_are_not_utf8(folder, weights, zoo, draw):
    name = os.fsdecode(b"in/\xff.png")
    draw(name)
    assert r"\udcff.png" in zoo("classify", "in", *weights).stdout
    entries = json.loads(zoo("classify", "in", "--json", *weights).stdout)["results"]
    assert entries[1]["source"] == name  # opens the file
    zoo("embed", "in", "--out", "e.npy", *weights)
    assert json.loads((folder / "e.json").read_text()) == ["in/b.png", name] and np.load("e.npy").shape[0] == 2
    zoo("embed", "in", "--out", "e.parquet", *weights)
    assert parquet.read_table("e.parquet")["path"].to_pylist() == ["in/b.png", r"in/\udcff.png"]


def test_names_that_no_file_can_have(tmp_path):
    for name in ("a\0b.png", "a\ud800.png"):
        found, failed = find_images([name])
        assert found == [name] and not failed
        with pytest.raises(ImageError, match="is no name that a file can have"):
            read_image(name)


def test_the_longest_name_is_written(folder, weights, zoo):
    name = "n" * 247 + ".parquet"
    zoo("embed", "a.png", "--out", name, *weights)
    assert len(name) == 255 and parquet.read_table(name).num_rows == 1
    assert "File name too long" in zoo("embed", "a.png", "--out", f"n{name}", *weights, code=2).stderr


def test_a_url_that_names_a_folder_above(tmp_path):
    from zoo.dense_cli import _names_in

    sources = ["http://host/..", "http://host/../../x.png", "http://host/", "../../y.jpg", "in/.."]
    for path in _names_in(tmp_path / "out", sources).values():
        assert path.parent == tmp_path / "out" and path.name not in ("", ".", "..")


def test_labels_that_are_none(folder, weights, zoo):
    (folder / "empty.txt").write_text("")
    (folder / "binary.txt").write_bytes(b"\xff\xfe\0")
    for name, message in [
        ("empty.txt", "is empty: expected"),
        ("binary.txt", "is no text in UTF-8"),
        ("in", "Is a dir"),
    ]:
        assert message in zoo("classify", "a.png", "--labels", name, *weights, code=2).stderr
    (folder / "two.txt").write_text("\ufeffcat\r\ndög\r\n", encoding="utf-8", newline="")
    assert read_labels("two.txt") == ["cat", "dög"]
    default = ("--device", "cpu")  # the packaged model, whose classes are not two
    assert "but 2 labels were given" in zoo("classify", "a.png", "--labels", "two.txt", *default, code=2).stderr
