"""Fuzz what reads bytes from elsewhere: pictures, checkpoints, settings and command lines.

    pip install atheris
    python tools/fuzz.py picture corpus -max_total_time=600

A target takes any bytes. An error that its reader is not documented to raise ends the run, and leaves a file
``crash-...`` for ``tests/reliability/crashers/TARGET``, where a test reads it from then on. The corpus is a folder; an
empty one begins with sound files. Further options are those of libFuzzer.
"""

import io
import sys
import tempfile
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from pathlib import Path
from typing import Any

SETTINGS = b"model: test_resnet\ntrain_data: a\nval_data: b\nsteps: 3\nlr: 1e-3\nmixup: 0.1\ncrop_pct: null\n"


def picture(data: bytes) -> None:
    """`zoo.images.read_image`: RGB, or an ImageError of one line."""
    from zoo.images import ImageError, read_image

    try:
        image = read_image(data)
    except ImageError as error:
        _check_line(error)
    else:
        if image.mode != "RGB" or not all(image.size):
            raise RuntimeError(f"A picture of mode {image.mode} and size {image.size}.")


def checkpoint(data: bytes) -> None:
    """The reader of checkpoints: tensors by name, or a CheckpointError of one line."""
    import torch

    from zoo.checkpoints import CheckpointError, read_weights

    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        try:
            state, _, _ = read_weights(file.name, "auto")
        except CheckpointError as error:
            _check_line(error)
        else:
            if not all(isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items()):
                raise RuntimeError("A state dict with something else than tensors by name.")


def settings(data: bytes) -> None:
    """The YAML of a training run: its settings, or a ValueError of one line."""
    from zoo.tools.train_classifier import Config, load_config

    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        try:
            config = load_config(file.name)
        except ValueError as error:
            _check_line(error)
        else:
            if not isinstance(config, Config):
                raise RuntimeError("No settings.")


def command(data: bytes) -> None:
    """The arguments of `zoo`, one per line: parsed, or an error of usage. Nothing is run."""
    arguments = [line.decode(errors="surrogateescape") for line in data.split(b"\n")]
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        try:
            _parser().main(arguments, prog_name="zoo")
        except SystemExit as end:
            if end.code not in (0, 2):
                raise RuntimeError(f"The exit code {end.code}.") from end


@cache
def _parser() -> Any:
    """The command `zoo` with nothing behind its commands."""
    from typer.main import get_command

    from zoo.cli import app

    group = get_command(app)
    for one in group.commands.values():
        one.callback = lambda **_: None
    return group


TARGETS: dict[str, Callable[[bytes], None]] = {
    target.__name__: target for target in (picture, checkpoint, settings, command)
}


def seeds(target: str) -> list[bytes]:
    """Sound files to begin with."""
    import safetensors.torch
    import torch
    from PIL import Image

    if target == "settings":
        return [SETTINGS]
    if target == "command":
        return [b"classify\na.png\n--top-k\n3\n--json", b"info\nvan_b0\n--size\n64", b"embed\na\n--out\nb.npy\n--amp"]
    if target == "checkpoint":
        state = {"a.weight": torch.arange(12.0).reshape(3, 4), "b": torch.ones(2, dtype=torch.bfloat16)}
        files = [io.BytesIO(safetensors.torch.save(state)), io.BytesIO(), io.BytesIO()]
        for file, zipped in zip(files[1:], (True, False)):
            torch.save({"model": state, "epoch": 3}, file, _use_new_zipfile_serialization=zipped)
        return [file.getvalue() for file in files]
    ramp = Image.linear_gradient("L").resize((23, 17))
    image = Image.merge("RGB", (ramp, ramp.rotate(180), ramp.transpose(Image.Transpose.FLIP_LEFT_RIGHT)))
    found = []
    Image.init()
    for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "ICO", "TGA", "JPEG2000", "AVIF"):
        if kind in Image.SAVE:  # AVIF from Pillow 11.3
            image.save(file := io.BytesIO(), kind)
            found.append(file.getvalue())
    return found


def _check_line(error: Exception) -> None:
    if len(str(error).splitlines()) != 1:
        raise RuntimeError(f"A message that is not one line: {error}") from error


def main() -> None:
    """Command line: a target, a corpus and options of libFuzzer."""
    if len(sys.argv) < 3 or sys.argv[1] not in TARGETS:
        sys.exit(f"usage: {sys.argv[0]} {'|'.join(TARGETS)} CORPUS [-max_total_time=SECONDS ...]")
    target, corpus = sys.argv.pop(1), Path(sys.argv[1])
    import atheris

    # Without the libraries below all sound inputs would look alike, and libFuzzer would keep the smallest one alone.
    with atheris.instrument_imports(include=["zoo", "yaml", "pickletools", "PIL", "typer", "click"]):
        from PIL import Image

        import zoo.cli
        import zoo.tools.train_classifier  # noqa: F401

        Image.init()
    corpus.mkdir(parents=True, exist_ok=True)
    if not any(corpus.iterdir()):
        for number, data in enumerate(seeds(target)):
            (corpus / f"seed-{number}").write_bytes(data)
    atheris.Setup(sys.argv, TARGETS[target])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
