"""What is written is there as a whole or not at all, and nowhere else, whatever happens meanwhile."""

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from PIL import Image

from zoo import files
from zoo.checkpoints import save_checkpoint
from zoo.download import download
from zoo.files import replacing, write_bytes, write_text


@contextmanager
def full_disk(limit=100):
    """Writing fails after so many bytes of a file, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("command", "name"), [("embed", "e.npy"), ("embed", "e.parquet"), ("classify", "sheet.png"), ("convert", "w")]
)
def test_a_full_disk_leaves_what_was_there(folder, weights, zoo, command, name):
    out = folder / f"{name}.safetensors" if command == "convert" else folder / name
    out.write_bytes(b"old")
    before = sorted(os.listdir(folder))
    with full_disk():
        if command == "convert":
            result = zoo("convert", weights[3], out, "--model", weights[1], "--overwrite", code=2)
        else:
            result = zoo(command, "a.png", "--out", out, *weights, code=2)
    assert result.stderr.startswith(f"zoo: {out}: ") and result.stderr.count("\n") == 1
    assert out.read_bytes() == b"old" and sorted(os.listdir(folder)) == before


@pytest.fixture
def server(tmp_path, monkeypatch):
    """The address of a file of 3 MB."""
    (tmp_path / "served").mkdir()
    (tmp_path / "served/w.pth").write_bytes(bytes(range(250)) * 12_000)
    monkeypatch.setenv("no_proxy", "*")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=tmp_path / "served")) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}/w.pth"
        httpd.shutdown()


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def test_a_full_disk_while_weights_arrive(tmp_path, server):
    with full_disk(1_000_000), pytest.raises(OSError, match="File too large") as caught:
        download(server, folder=tmp_path / "cache")
    assert caught.value.filename == str(tmp_path / "cache/w.pth.part")
    assert not (tmp_path / "cache/w.pth").exists()
    path = download(server, folder=tmp_path / "cache")
    assert path.read_bytes() == (tmp_path / "served/w.pth").read_bytes()


def test_an_error_names_the_file_and_not_its_temporary_name(tmp_path):
    with full_disk(), pytest.raises(OSError, match="File too large") as caught:
        write_bytes(tmp_path / "a.bin", bytes(1000))
    assert caught.value.filename == str(tmp_path / "a.bin")
    with pytest.raises(FileNotFoundError) as caught, replacing(tmp_path / "b.txt") as part:
        part.write_text((tmp_path / "other.txt").read_text())
    assert caught.value.filename == str(tmp_path / "other.txt")


def test_a_file_where_a_folder_is_needed(folder, weights, zoo):
    (folder / "file").write_text("x")
    for out in ("file/e.npy", "file/sub/e.npy"):
        assert "Not a directory." in zoo("embed", "a.png", "--out", out, *weights, code=2).stderr
    assert (folder / "file").read_text() == "x"
    (folder / "folder.png").mkdir()
    assert "is a folder" in zoo("classify", "a.png", "--out", "folder.png", *weights, code=2).stderr


def test_a_video_is_there_as_a_whole_or_not_at_all(tmp_path):
    cv2 = pytest.importorskip("cv2", reason="drawn videos need the dense extra")
    from zoo.dense_cli import _video_sink

    out, names = tmp_path / ("n" * 251 + ".mp4"), set()
    out.write_bytes(b"old")
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt), _video_sink(out, 5) as write:
            write(Image.new("RGB", (64, 48)))
            names |= set(os.listdir(tmp_path))
            raise KeyboardInterrupt
        assert os.listdir(tmp_path) == [out.name] and out.read_bytes() == b"old"
    assert len(names) == 3  # that of the video, and a temporary one of each time
    with _video_sink(out, 5):
        pass
    assert out.read_bytes() == b"old"  # of no frame there is no video
    with _video_sink(out, 5) as write:
        for _ in range(3):
            write(Image.new("RGB", (64, 48)))
    assert os.listdir(tmp_path) == [out.name] and cv2.VideoCapture(str(out)).get(cv2.CAP_PROP_FRAME_COUNT) == 3


# ---- links


def test_a_link_in_the_place_of_a_file_is_replaced(tmp_path):
    secret, out = tmp_path / "secret", tmp_path / "out"
    secret.write_text("secret")
    out.mkdir()
    (out / "a.txt").symlink_to(secret)
    (out / "b.safetensors").symlink_to(secret)
    write_text(out / "a.txt", "new")
    save_checkpoint({"w": torch.ones(2)}, out / "b.safetensors", overwrite=True)
    assert secret.read_text() == "secret"
    assert not any(path.is_symlink() for path in out.iterdir()) and (out / "a.txt").read_text() == "new"


def test_temporary_names_cannot_be_guessed(tmp_path):
    names = set()
    for _ in range(3):
        with replacing(tmp_path / "a.txt") as part:
            names.add(part.name)
            part.write_text("x")
    assert len(names) == 3 and all(len(name) > len("a.txt") + 16 for name in names)


def test_drawings_leave_what_a_link_in_their_folder_leads_to(tmp_path, draw):
    """`zoo detect --out FOLDER` with a link in the folder that has the name of a drawing."""
    from zoo.dense_cli import _places

    draw(tmp_path / "a.png")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/a.png").symlink_to(tmp_path / "a.png")
    with pytest.raises(ValueError, match="would replace"):  # it leads to the original: better to ask
        _places(tmp_path / "out", [str(tmp_path / "a.png")], [])
    other = tmp_path / "other.png"
    other.write_bytes(b"other")
    (tmp_path / "out/a.png").unlink()
    (tmp_path / "out/a.png").symlink_to(other)
    (place,) = _places(tmp_path / "out", [str(tmp_path / "a.png")], []).values()
    write_bytes(place, b"drawing")
    assert other.read_bytes() == b"other" and place.read_bytes() == b"drawing"


# ---- several at once


def test_writers_of_one_file_do_not_mix(tmp_path):
    path, contents = tmp_path / "a.txt", [letter * 300_000 for letter in "abcd"]
    seen, done = set(), threading.Event()

    def write(text):
        for _ in range(10):
            write_text(path, text)

    def read():
        while not done.is_set():
            if path.exists():
                seen.add(path.read_text())

    threads = [threading.Thread(target=write, args=(text,)) for text in contents]
    reader = threading.Thread(target=read)
    for thread in [*threads, reader]:
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    reader.join()
    assert seen and seen <= set(contents) and path.read_text() in contents
    assert os.listdir(tmp_path) == ["a.txt"]


WRITER = """
import runpy, sys

write_text = runpy.run_path(sys.argv[3])["write_text"]  # without the seconds that PyTorch takes
for _ in range(200):
    write_text(sys.argv[1], sys.argv[2] * 100_000)
"""


def test_processes_that_write_one_file_do_not_mix(tmp_path):
    command = [sys.executable, "-c", WRITER, str(tmp_path / "a.txt")]
    processes = [subprocess.Popen([*command, letter, files.__file__]) for letter in "ab"]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    assert (tmp_path / "a.txt").read_text() in ("a" * 100_000, "b" * 100_000)
    assert os.listdir(tmp_path) == ["a.txt"]


# ---- Ctrl-C

SLOW = """
import sys, time, pathlib
import numpy as np
from zoo import cli

def slowly(file, array):
    file.write(b"half")
    file.flush()
    pathlib.Path("writing").touch()
    time.sleep(60)

np.save = slowly
cli.app(sys.argv[1:])
"""


def test_ctrl_c_leaves_whole_files(folder, weights):
    """While the vectors are written, the worst moment."""
    np.save("e.npy", np.ones(3))
    (folder / "e.json").write_text("[]")
    command = [sys.executable, "-c", SLOW, "embed", "a.png", "--out", "e.npy", *weights]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 120
        while not (folder / "writing").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        assert any(name.endswith(".part") for name in os.listdir(folder))
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode not in (0, 2) and "Traceback" not in said
    assert np.load("e.npy").tolist() == [1, 1, 1] and (folder / "e.json").read_text() == "[]"
    assert sorted(os.listdir(folder)) == ["a.png", "e.json", "e.npy", "in", "writing"]
