"""Files that are there as a whole or not at all, also after a kill."""

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SHOWN = 40  # characters of a name that its temporary name begins with, which may not be longer than 255 bytes


@contextmanager
def replacing(path: str | os.PathLike, suffix: str = "") -> Iterator[Path]:
    """A name to write to in the same folder, which is made, that takes the place of `path` when all is written.

    The temporary name is hidden, ends in ``.part`` and cannot be guessed, so that several processes may write the same
    file, and nobody can put a link in its place. A link at `path` is replaced, and what it leads to is left alone.

    Args:
        path: the file.
        suffix: what follows ``.part``, for writers that tell the format by the name.

    Raises:
        OSError: the file cannot be written; the error names `path`, and what was there stays.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:  # a file of that name
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path.parent)) from error
    part = path.with_name(f".{path.name[:SHOWN]}.{secrets.token_hex(8)}.part{suffix}")
    try:
        yield part
        os.replace(part, path)
    except OSError as error:
        if error.filename not in (None, part, str(part)):  # of another file
            raise
        reason = error.strerror or str(error)
        raise OSError(error.errno or errno.EIO, reason, str(path)) from error
    finally:
        part.unlink(missing_ok=True)


def write_bytes(path: str | os.PathLike, data: bytes) -> None:
    """Write bytes."""
    with replacing(path) as part:
        part.write_bytes(data)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write text in UTF-8."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")
