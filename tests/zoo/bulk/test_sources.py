"""What a source is made of: the same pictures, whichever way they are named or packed."""

import io
import tarfile
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from zoo.bulk import sources
from zoo.bulk.sources import fetch, find_items
from zoo.images import ImageError, read_image

PICTURES = {f"{index}.png": bytes([index, 255]) * 350 for index in range(5)}  # sources do not look into them


def contents(source, **options):
    """Bytes by key."""
    found = {}
    for item in find_items(str(source), **options):
        assert item.key not in found
        value = fetch(item)
        found[item.key] = value if isinstance(value, bytes) else Path(value).read_bytes()
    return found


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "in"
    (root / "sub").mkdir(parents=True)
    for name, data in PICTURES.items():
        (root / name).write_bytes(data)
    (root / "sub/0.png").write_bytes(PICTURES["1.png"])
    (root / ".hidden.png").write_bytes(PICTURES["0.png"])
    (root / "notes.md").write_text("no picture")
    return root


def write_tar(path, files):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_a_folder(folder):
    assert contents(folder) == PICTURES | {"sub/0.png": PICTURES["1.png"]}
    assert list(contents(folder)) == [*PICTURES, "sub/0.png"]  # in the same order each time


def test_a_pattern_and_a_file(folder):
    assert contents(f"{folder}/[12].png") == {f"{folder}/{k}.png": PICTURES[f"{k}.png"] for k in (1, 2)}
    assert contents(folder / "3.png") == {"3.png": PICTURES["3.png"]}


def test_links_that_lead_back_end(folder):
    (folder / "sub/up").symlink_to(folder)
    assert len(contents(folder)) == 6


def test_a_list_names_files_beside_it_and_elsewhere(folder, tmp_path):
    elsewhere = tmp_path / "x.png"
    elsewhere.write_bytes(PICTURES["2.png"])
    (folder / "list.txt").write_text(f"1.png\n\nsub/0.png\r\n{elsewhere}\nmissing.png\n")
    items = list(find_items(str(folder / "list.txt")))
    assert [item.key for item in items] == ["1.png", "sub/0.png", str(elsewhere), "missing.png"]
    with open(fetch(items[1]), "rb") as file:
        assert file.read() == PICTURES["1.png"]
    with pytest.raises(ImageError, match="does not exist"):
        read_image(fetch(items[3]))


def test_a_list_of_tars(tmp_path):
    write_tar(tmp_path / "a.tar", {"0.png": PICTURES["0.png"]})
    write_tar(tmp_path / "b.tar", {"0.png": PICTURES["1.png"]})
    (tmp_path / "shards.lst").write_text("b.tar\na.tar\n")
    assert contents(tmp_path / "shards.lst") == {"b.tar/0.png": PICTURES["1.png"], "a.tar/0.png": PICTURES["0.png"]}


def test_tars_of_webdataset(tmp_path):
    files = {f"x/{name}": data for name, data in PICTURES.items()} | {"x/0.cls": b"7", "x/0.json": b"{}"}
    write_tar(tmp_path / "in/000.tar", files)
    write_tar(tmp_path / "in/001.tar", {"../up.jpg": PICTURES["0.png"]})
    found = contents(tmp_path / "in")
    assert found == {f"000.tar/x/{k}": v for k, v in PICTURES.items()} | {"001.tar/../up.jpg": PICTURES["0.png"]}


def test_a_tar_cut_short_gives_what_it_has(tmp_path):
    path = tmp_path / "cut.tar"
    write_tar(path, PICTURES)
    path.write_bytes(path.read_bytes()[:4000])
    *good, last = find_items(str(path))
    assert len(good) >= 1 and fetch(good[0]) == PICTURES["0.png"]
    with pytest.raises(ImageError, match=r"cut\.tar is no \.tar file, or damaged"):
        fetch(last)


@pytest.mark.parametrize("name", ["x.tar", "x.parquet"])
def test_what_is_no_archive(tmp_path, name):
    (tmp_path / name).write_bytes(b"hello, this is neither" * 100)
    (item,) = find_items(str(tmp_path))
    with pytest.raises(ImageError, match=r"is no \.\w+ file, or damaged"):
        fetch(item)


@pytest.mark.parametrize("form", ["bytes", "struct", "large"])
def test_parquet_with_bytes(tmp_path, form):
    rows = list(PICTURES.values())
    if form == "struct":  # as Hugging Face datasets have it
        column = pa.array([{"bytes": row, "path": None} for row in rows])
    else:
        column = pa.array(rows, pa.large_binary() if form == "large" else pa.binary())
    table = pa.table({"label": range(5), "image": column})
    parquet.write_table(table, tmp_path / "x.parquet", row_group_size=2)
    assert contents(tmp_path / "x.parquet") == dict(zip([f"x.parquet#{k}" for k in range(5)], rows))
    parquet.write_table(table.append_column("key", [list("abcde")]), tmp_path / "x.parquet", row_group_size=2)
    assert contents(tmp_path / "x.parquet") == dict(zip("abcde", rows))


def test_parquet_with_paths(folder):
    table = pa.table({"path": ["1.png", None, "sub/0.png"], "other": ["2.png", "3.png", "4.png"]})
    parquet.write_table(table, folder / "sub.parquet", row_group_size=2)
    first, second, third = find_items(str(folder / "sub.parquet"))
    assert fetch(first) == str(folder / "1.png") and fetch(third) == str(folder / "sub/0.png")
    with pytest.raises(ImageError, match=r"sub\.parquet#1 has no path"):
        fetch(second)
    assert list(contents(folder / "sub.parquet", column="other")) == ["2.png", "3.png", "4.png"]


def test_parquet_rows_without_a_picture(tmp_path):
    parquet.write_table(pa.table({"image": [b"x", None]}), tmp_path / "x.parquet")
    with pytest.raises(ImageError, match="is empty"):
        fetch(list(find_items(str(tmp_path)))[1])


@pytest.mark.parametrize(("column", "message"), [(None, "no column with bytes"), ("b", "'b' with bytes or paths")])
def test_parquet_without_such_a_column(tmp_path, column, message):
    parquet.write_table(pa.table({"a": ["x"], "b": [1]}), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=rf"{message}.*: its columns are a, b\."):
        list(find_items(str(tmp_path), column))


def test_a_row_group_is_read_once(tmp_path, monkeypatch):
    parquet.write_table(pa.table({"image": list(PICTURES.values())}), tmp_path / "x.parquet", row_group_size=3)
    items = list(find_items(str(tmp_path)))
    opened = []
    real = sources._open
    monkeypatch.setattr(sources, "_open", lambda file: opened.append(file) or real(file))
    assert [fetch(item) for item in items] == list(PICTURES.values())
    assert len(opened) == 2


@pytest.fixture
def bucket():
    """A file system of fsspec that is not the disk."""
    import fsspec

    files = fsspec.filesystem("memory")
    for name, data in PICTURES.items():
        files.pipe(f"/bucket/in/{name}", data)
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as archive:
        info = tarfile.TarInfo("t.png")
        info.size = len(PICTURES["4.png"])
        archive.addfile(info, io.BytesIO(PICTURES["4.png"]))
    files.pipe("/bucket/in/sub/x.tar", tar.getvalue())
    table = io.BytesIO()
    parquet.write_table(pa.table({"bytes": list(PICTURES.values())}), table)
    files.pipe("/bucket/t.parquet", table.getvalue())
    files.pipe("/bucket/list.txt", b"in/2.png\n/in/3.png\n")
    yield files
    files.rm("/bucket", recursive=True)


def test_urls(bucket):
    assert contents("memory://bucket/in") == PICTURES | {"sub/x.tar/t.png": PICTURES["4.png"]}
    assert contents("memory://bucket/t.parquet") == {f"t.parquet#{k}": data for k, data in enumerate(PICTURES.values())}
    assert contents("memory://bucket/in/[01].png") == {
        f"memory:///bucket/in/{k}.png": PICTURES[f"{k}.png"] for k in (0, 1)
    }
    with pytest.raises(FileNotFoundError, match="memory://bucket/nothing"):
        list(find_items("memory://bucket/nothing"))


def test_a_list_elsewhere_names_no_file_here(bucket):
    assert list(contents("memory://bucket/list.txt").values()) == [PICTURES["2.png"], PICTURES["3.png"]]


def test_urls_in_a_list_need_a_word(bucket, tmp_path):
    (tmp_path / "list.txt").write_text("memory://bucket/in/2.png\nmemory://bucket/in/9.png\n")
    with pytest.raises(ValueError, match="URLs are off: pass --allow-urls"):
        list(find_items(str(tmp_path / "list.txt")))
    good, missing = find_items(str(tmp_path / "list.txt"), allow_urls=True)
    assert fetch(good) == PICTURES["2.png"]
    with pytest.raises(ImageError, match="does not exist"):
        fetch(missing)


def test_what_is_too_large_is_not_kept(bucket, monkeypatch):
    monkeypatch.setattr(sources, "URL_MAX_BYTES", 100)
    with pytest.raises(ImageError, match="is larger than"):
        fetch(next(find_items("memory://bucket/in/2.png")))


def test_no_such_source(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no file or folder"):
        list(find_items(str(tmp_path / "nothing")))


def test_a_name_that_is_not_utf8(tmp_path):
    (tmp_path / "in").mkdir()
    with open(str(tmp_path / "in").encode() + b"/\xff.png", "wb") as file:
        file.write(PICTURES["0.png"])
    (item,) = find_items(str(tmp_path / "in"))
    assert item.key == "\\xff.png"
    with pytest.raises(ImageError, match="not UTF-8"):
        fetch(item)
