"""Files are replaced whole, or stay as they were."""

import os

import pytest

from zoo.files import replacing, write_text


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "new" / "a.txt"
    write_text(path, "ä")
    assert path.read_bytes() == "ä".encode()
    with replacing(str(path)) as part:
        part.write_text("b")
        assert path.read_text(encoding="utf-8") == "ä" and part.parent == path.parent
    assert path.read_text() == "b" and os.listdir(path.parent) == ["a.txt"]


def test_an_error_leaves_the_old_one(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(OSError, match="no space"), replacing(path) as part:
        part.write_text("half")
        raise OSError("no space")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]
