"""Files that were made to do harm, given to the commands that read them."""

import gzip
import io
import json
import os
import pickle
import struct
import zipfile
import zlib

import numpy as np
import pytest
import timm
import torch
from PIL import Image, PngImagePlugin

from zoo.checkpoints import CheckpointError, load_checkpoint, save_checkpoint
from zoo.images import ImageError, read_image

NAME = "test_convnext"


class Runs:
    """Pickled, what touches a file when it is loaded."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


# ---- checkpoints


@pytest.mark.parametrize("form", ["zip", "old", "pickle"])
@pytest.mark.parametrize("command", ["classify", "convert", "detect"])
def test_a_hostile_pickle_does_not_run(folder, zoo, form, command, monkeypatch):
    if command == "detect":
        pytest.importorskip("mmdet", reason="detectors need the dense extra")
    marker, path = folder / "marker", folder / "hostile.pth"
    content = {"state_dict": {"w": torch.ones(2)}, "meta": Runs(marker)}
    if form == "pickle":
        path.write_bytes(pickle.dumps(Runs(marker)))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    monkeypatch.setattr("zoo.checkpoints._lookalike", lambda *_: "it is of another model")  # builds them all
    arguments = {
        "classify": ["classify", "a.png", "--model", NAME, "--checkpoint", path],
        "convert": ["convert", path, "out.safetensors", "--model", NAME],
        "detect": ["detect", "a.png", "--checkpoint", path],
    }[command]
    result = zoo(*arguments, *([] if command == "convert" else ["--device", "cpu"]), code=2)
    assert not marker.exists() and result.stderr.count("\n") == 1 and "hostile.pth" in result.stderr
    (pickle.loads if form == "pickle" else lambda data: torch.load(io.BytesIO(data), weights_only=False))(
        path.read_bytes()
    )
    assert marker.exists()  # else the file was harmless


def test_names_in_a_checkpoint_are_not_obeyed(tmp_path, monkeypatch):
    monkeypatch.setattr("zoo.checkpoints._lookalike", lambda *_: "it is of another model")  # builds them all
    torch.save({"\x1b[2J\nevil": torch.ones(2)}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(torch.nn.Linear(2, 2), tmp_path / "x.pth")
    assert r"\x1b[2J\nevil" in str(caught.value) and "\x1b" not in str(caught.value)


def safetensors_file(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize(
    "data",
    [
        struct.pack("<Q", 2**63) + b"{}",
        safetensors_file({"w": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}),
        safetensors_file({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, bytes(4)),
        safetensors_file({"w": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, bytes(4)),
        safetensors_file({key: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for key in ("a", "b")}, bytes(4)),
        safetensors_file(b'{"w":' * 20_000),
        safetensors_file(b"{"),
    ],
    ids=["header", "size", "span", "negative", "overlap", "deep", "no json"],
)
def test_safetensors_that_claim_what_they_have_not(tmp_path, data):
    (tmp_path / "x.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match="damaged"):
        load_checkpoint(torch.nn.Linear(2, 2), tmp_path / "x.safetensors")


@pytest.mark.parametrize("labels", ["{", "5", '{"a": 1}', "null"])
def test_labels_in_a_checkpoint_that_are_no_list(tmp_path, labels):
    from zoo.dense import _labels_of

    save_checkpoint({"w": torch.ones(1)}, tmp_path / "x.safetensors", metadata={"labels": labels})
    assert _labels_of(str(tmp_path / "x.safetensors")) == []
    save_checkpoint({"w": torch.ones(1)}, tmp_path / "y.safetensors", metadata={"labels": '["a", 5, "b"]'})
    assert _labels_of(str(tmp_path / "y.safetensors")) == ["a", "b"]


def test_a_folder_as_a_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no file"):
        load_checkpoint(torch.nn.Linear(2, 2), tmp_path)


def test_weights_that_are_not_numbers_say_nothing_else(tmp_path, draw):
    """NaN in a checkpoint: the probabilities are NaN, and nothing is made up."""
    from zoo import Classifier

    state = {key: torch.full_like(value, float("nan")) for key, value in timm.create_model(NAME).state_dict().items()}
    save_checkpoint(state, tmp_path / "x.safetensors")
    draw(tmp_path / "a.png")
    (found,) = Classifier(NAME, checkpoint=str(tmp_path / "x.safetensors"), device="cpu").predict(
        str(tmp_path / "a.png")
    )
    assert np.isnan(found.probabilities).all()


# ---- pictures


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(*chunks, size=(8, 8), pixels=None):
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0))
    pixels = zlib.compress((b"\0" + bytes(24)) * 8) if pixels is None else pixels
    return b"".join([b"\x89PNG\r\n\x1a\n", header, *chunks, chunk(b"IDAT", pixels), chunk(b"IEND", b"")])


BOMB = zlib.compress(bytes(2**25), 9)  # of 32 KiB


@pytest.mark.parametrize(
    "bomb",
    [chunk(b"zTXt", b"a\0\0" + BOMB), chunk(b"iTXt", b"a\0\1\0\0\0" + BOMB), chunk(b"iCCP", b"a\0\0" + BOMB)],
    ids=["text", "international text", "colour profile"],
)
def test_bombs_beside_the_pixels(bomb):
    assert read_image(png()).size == (8, 8)
    with pytest.raises(ImageError, match=r"(?i)too large"):
        read_image(png(bomb))


def test_more_pixels_than_the_header_says():
    assert read_image(png(pixels=BOMB)).size == (8, 8)  # the rest is not even decompressed


@pytest.mark.filterwarnings("ignore")  # Pillow's own, of what is refused
def test_an_icon_that_holds_a_larger_picture(monkeypatch):
    Image.new("RGB", (140, 140)).save(inner := io.BytesIO(), "PNG")
    icon = struct.pack("<HHHBBBBHHII", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(inner.getvalue()), 22) + inner.getvalue()
    assert read_image(icon).size == (140, 140)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 19_000)
    with pytest.raises(ImageError, match="more than 19,000 pixels"):
        read_image(icon)


def test_no_memory_for_a_picture(monkeypatch):
    def no_memory(self):
        raise MemoryError

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", no_memory)
    with pytest.raises(ImageError, match="does not fit into the memory"):
        read_image(png())


def test_archives_and_programs_are_no_pictures(tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a.png", bytes(10**7))
    contents = {
        "bomb.png": (tmp_path / "bomb.zip").read_bytes(),
        "gzip.png": gzip.compress(bytes(10**6)),
        "program.png": b"\x7fELF" + bytes(100),
        "script.png": b"#!/bin/sh\ntouch /tmp/x\n",
        "pdf.png": b"%PDF-1.7\n",
    }
    for name, data in contents.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ImageError, match="is not a picture of a kind read here"):
            read_image(tmp_path / name)


def test_devices_are_not_read():
    for path in ("/dev/zero", "/dev/null"):
        with pytest.raises(ImageError, match="is not a regular file"):
            read_image(path)
