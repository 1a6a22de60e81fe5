"""Pictures from anywhere as 8-bit RGB: safe decoding, and the expansion of folders, globs and URLs into files."""

import glob
import http.client
import io
import os
import re
import stat
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from zoo.printable import printable

# Left out on purpose: formats that start another program or interpreter to decode (EPS, PDF, WMF).
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000", "ICO", "TGA")
URL = re.compile(r"https?://", re.IGNORECASE)
URL_MAX_BYTES = 64 * 2**20
URL_TIMEOUT = 30  # seconds, for the connection, each read and the whole transfer

Source = str | os.PathLike | bytes | IO[bytes] | Image.Image | np.ndarray


class ImageError(ValueError):
    """A picture that cannot be read: ``source`` names it, ``reason`` says why; the message is one sentence of both."""

    def __init__(self, source: str, reason: str) -> None:
        super().__init__(source, reason)
        self.source, self.reason = source, reason

    def __str__(self) -> str:
        return printable(f"{self.source} {self.reason}")


class RemoteImage(str):
    """A URL that the user allowed to be fetched; a plain string with a URL is refused by `read_image`."""


def describe(source: Source) -> str:
    """What to call a source in a message: its path or URL if it has one, else its kind."""
    if isinstance(source, str | os.PathLike):
        return os.fspath(source)
    name = getattr(source, "filename", None) or getattr(source, "name", None)
    return name if isinstance(name, str) else f"the {type(source).__name__} given as a picture"


def read_image(source: Source) -> Image.Image:
    """Decode a picture to 8-bit RGB, upright (EXIF orientation) and on white where it is transparent.

    Of an animation or a multi-page file the first frame is taken. 16-bit values are scaled to 8 bits; float and 32-bit
    integer pictures are taken as 0..1 or 0..255 when they fit and are otherwise stretched from their minimum to their
    maximum. Pictures of more pixels than ``PIL.Image.MAX_IMAGE_PIXELS`` are refused before they are decoded.

    Args:
        source: a path, the bytes of a file, a binary file object, a PIL image (left as it is), a `RemoteImage`, or an
            array (H, W) or (H, W, 1..4) of bool, uint8, uint16, of other integers in 0..255, or of floats in 0..1.

    Returns:
        A new image of mode "RGB".

    Raises:
        ImageError: the source is missing, empty, no picture, damaged or too large; one sentence starting with its name.
    """
    name = describe(source)
    if isinstance(source, Image.Image):
        with _decoding(name):
            return _to_rgb(source.copy())
    if isinstance(source, np.ndarray):
        return _to_rgb(_from_array(source, name))
    if isinstance(source, RemoteImage):
        source = _download(source)
    elif isinstance(source, str) and URL.match(source):
        raise ImageError(name, "was not fetched: URLs are off, pass --allow-urls to fetch pictures from the network.")
    with _open(source, name) as file, _decoding(name), Image.open(file, formats=_formats()) as image:
        if Image.MAX_IMAGE_PIXELS and image.width * image.height > Image.MAX_IMAGE_PIXELS:
            raise Image.DecompressionBombError  # where Pillow only warns
        image.load()
        return _to_rgb(image)


def find_images(paths: Sequence[str | os.PathLike], allow_urls: bool = False) -> tuple[list[str], list[ImageError]]:
    """Expand files, folders, globs and URLs into the pictures they name.

    A named file is kept whatever its suffix. Folders are searched recursively, in sorted order, for the suffixes of the
    formats that are read; hidden files and folders are skipped. A pattern may hold ``*``, ``?``, ``[...]`` and ``**``.
    The same file is listed once, however often and through whichever link it is named.

    Args:
        paths: what the user typed.
        allow_urls: keep ``http(s)://`` sources (as `RemoteImage`, fetched when read) instead of refusing them.

    Returns:
        The sources for `read_image`, and one error for each entry of `paths` that leads to no picture.
    """
    found: dict[str, str] = {}  # real path -> the name it was first given
    failed: list[ImageError] = []
    for path in map(os.fspath, paths):
        if URL.match(path):
            found.setdefault(path, RemoteImage(path) if allow_urls else path)
            continue
        literal = os.path.lexists(path) or not glob.has_magic(path)
        files = [
            file for match in ([path] if literal else _glob(path)) for file in walk_files(match, has_picture_suffix)
        ]
        if not files:
            reason = "is a folder without pictures." if os.path.isdir(path) else "matches no picture."
            failed.append(ImageError(path, reason))
        for file in files:
            found.setdefault(_real_path(file), file)
    return list(found.values()), failed


def _real_path(file: str) -> str:
    try:
        return os.path.realpath(file)
    except ValueError:  # no name that a file can have, which is said when it is read
        return file


def walk_files(path: str, wanted: Callable[[str], bool]) -> Iterator[str]:
    """The path itself, or the files under it if it is a folder, one after another, in sorted order.

    Hidden files and folders are left out, and links that lead back into the tree end there.

    Args:
        path: of a file or a folder.
        wanted: tells by its name whether a file under the folder is taken.
    """
    if not os.path.isdir(path):
        yield path
        return
    seen: set[str] = set()
    for folder, subfolders, files in os.walk(path, followlinks=True):
        real = os.path.realpath(folder)
        subfolders[:] = [] if real in seen else sorted(name for name in subfolders if not name.startswith("."))
        if real not in seen:
            yield from (os.path.join(folder, name) for name in sorted(files) if wanted(name))
        seen.add(real)


def _glob(pattern: str) -> list[str]:
    """Matches of a pattern; pathlib, because the `**` of glob.glob follows links in circles."""
    path = Path(pattern)
    try:
        matches = sorted(Path(path.anchor).glob(str(path.relative_to(path.anchor))))
    except ValueError:  # such as "**.png" before Python 3.13
        return []
    # as in a shell, hidden names are not matched; a final "**" means folders, in Python 3.13 as before
    shown = (m for m in matches if not any(part[0] == "." and part not in path.parts for part in m.parts))
    return [str(match) for match in shown if path.name != "**" or match.is_dir()]


def has_picture_suffix(name: str) -> bool:
    """Whether the name of a file, without its folder, is not hidden and ends as one of the formats that are read."""
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in _suffixes()


@lru_cache
def _suffixes() -> frozenset[str]:
    return frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in FORMATS)


@lru_cache
def _formats() -> list[str]:
    Image.init()
    return [kind for kind in FORMATS if kind in Image.OPEN]


def _open(source: str | os.PathLike | bytes | IO[bytes], name: str) -> IO[bytes]:
    """The source as a binary file that is known to hold something."""
    if isinstance(source, str | os.PathLike):
        try:
            mode = os.stat(source).st_mode
            if stat.S_ISDIR(mode):
                raise ImageError(name, "is a folder, not a picture.")
            if not stat.S_ISREG(mode):  # opening a pipe would wait for its other end
                raise ImageError(name, "is not a regular file.")
            file = open(source, "rb")  # noqa: SIM115 (the caller closes it)
        except ImageError:
            raise
        except FileNotFoundError:
            raise ImageError(name, "does not exist.") from None
        except OSError as error:
            raise ImageError(name, f"cannot be opened: {error.strerror}.") from None
        except ValueError:  # with a NUL, or half a character
            raise ImageError(name, "is no name that a file can have.") from None
    else:
        data = source.read() if hasattr(source, "read") else source
        if not isinstance(data, bytes | bytearray):
            raise TypeError(f"{name} is no picture: expected a path, bytes, a binary file, a PIL image or an array.")
        file = io.BytesIO(data)
    if file.seek(0, os.SEEK_END) == 0:
        file.close()
        raise ImageError(name, "is empty.")
    file.seek(0)
    return file


@contextmanager
def _decoding(name: str) -> Iterator[None]:
    """Whatever Pillow raises on a hostile or broken file, as one sentence."""
    try:
        yield
    except ImageError:
        raise
    except UnidentifiedImageError:
        kinds = ", ".join(_formats())
        raise ImageError(name, f"is not a picture of a kind read here ({kinds}), or its start is damaged.") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        limit = f"{Image.MAX_IMAGE_PIXELS:,}"
        raise ImageError(name, f"has more than {limit} pixels (PIL.Image.MAX_IMAGE_PIXELS) and was refused.") from None
    except MemoryError:
        raise ImageError(name, "does not fit into the memory.") from None
    except Exception as error:
        reason = str(error).rstrip(".") or type(error).__name__
        raise ImageError(name, f"is damaged or cut short ({reason}).") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    """Turn a loaded image upright, in place, and convert it to RGB on white."""
    with suppress(Exception):  # a broken EXIF block must not cost the picture
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode[0] in "IF":  # I;16 and its byte orders, I and F: Pillow's own conversion clips them at 255
        image = Image.fromarray(_to_uint8(np.asarray(image)))
    if image.has_transparency_data:
        picture = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return image.convert("RGB")


def _from_array(array: np.ndarray, name: str) -> Image.Image:
    if array.ndim not in (2, 3) or array.size == 0 or (array.ndim == 3 and array.shape[2] > 4):
        raise ImageError(name, f"has shape {array.shape}, expected (H, W) or (H, W, 1 to 4).")
    kind, width = array.dtype.kind, array.dtype.itemsize
    top = 1 if kind in "bf" else 65535 if (kind, width) == ("u", 2) else 255
    if kind not in "buif":
        raise ImageError(name, f"has the dtype {array.dtype}, expected bool, integers or floats.")
    if not (array.min() >= 0 and array.max() <= top):
        have = f"{array.dtype} values from {array.min():g} to {array.max():g}"
        raise ImageError(name, f"has {have}, expected floats in 0..1 or integers in 0..255 (uint16: 0..65535).")
    if kind in "iu" and width != 2:
        array = array.astype(np.uint8)
    pixels = _to_uint8(array)
    return Image.fromarray(pixels[..., 0] if pixels.shape[2:] == (1,) else pixels)


def _to_uint8(values: np.ndarray) -> np.ndarray:
    """Scale to 0..255: the whole range of bool and uint16; of wider types 0..1 or 0..255, else what is there."""
    kind, width = values.dtype.kind, values.dtype.itemsize
    if (kind, width) == ("u", 1):
        return values
    if (kind, width) == ("u", 2):
        low, high = 0.0, 65535.0
    else:
        known = values[np.isfinite(values)]
        low, high = (float(known.min()), float(known.max())) if known.size else (0.0, 1.0)
        if low >= 0 and high <= 255:
            low, high = 0.0, 1.0 if kind in "bf" and high <= 1 else 255.0
    scaled = (values.astype(np.float32) - low) * (255 / max(high - low, 1e-12))
    return np.nan_to_num(scaled, posinf=255, neginf=0).clip(0, 255).round().astype(np.uint8)


def _download(url: str) -> bytes:
    """The body of a URL, with a limit on its size and on the time it takes."""
    deadline = time.monotonic() + URL_TIMEOUT
    body = bytearray()
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "linear-vision-zoo"})
        with urllib.request.urlopen(request, timeout=URL_TIMEOUT) as response:
            while chunk := response.read1(2**16):
                body += chunk
                if len(body) > URL_MAX_BYTES:
                    raise ImageError(url, f"is larger than {URL_MAX_BYTES // 2**20} MiB.")
                if time.monotonic() > deadline:
                    raise ImageError(url, f"took longer than {URL_TIMEOUT} seconds to arrive.")
    except (OSError, http.client.HTTPException) as error:
        raise ImageError(url, f"could not be fetched ({error}).") from error
    return bytes(body)
