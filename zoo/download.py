"""Turn what a user names as the source of a file into a local path: a path, a URL or a file on the Hugging Face Hub."""

import hashlib
import http.client
import json
import os
import re
import ssl
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

HUB_PATTERN = re.compile(r"hf[-_]hub:(?P<repo>[^/@:]+/[^/@:]+)(@(?P<revision>[^/]+))?(/(?P<file>.+))?")
HUB_DEFAULT_FILES = ("model.safetensors", "pytorch_model.bin")
HASH_IN_NAME = re.compile(r"-([0-9a-f]{8,64})\.[^-]*$")  # the convention of torch.hub: name-<sha256>.pth
TRANSIENT = (urllib.error.URLError, ConnectionError, TimeoutError, ssl.SSLError, http.client.HTTPException)
ATTEMPTS = 5  # in a row without a new byte
TIMEOUT = 30.0  # seconds without a byte
CHUNK = 2**20


def resolve(source: str | os.PathLike[str], sha256: str | None = None) -> Path:
    """Find a file, downloading it if it is not on this machine.

    Args:
        source: a path, an ``http(s)://`` URL, or ``hf-hub:owner/repo[@revision][/file]``. A revision is a branch,
            tag or commit (a slash in it is written ``%2F``); without a file, the one that timm and transformers
            publish (``model.safetensors``, else ``pytorch_model.bin``). All may end in ``#sha256=<hex digits>``.
        sha256: the expected hash of the contents, or its first 8 or more hex digits.

    Returns:
        The file: the path itself, or a file in the cache of torch.hub (``TORCH_HOME``) or of the Hub (``HF_HOME``).

    Raises:
        FileNotFoundError: the file does not exist, here or there.
        ConnectionError: it cannot be downloaded now.
        ValueError: the source is malformed, or the contents do not have the expected hash.
    """
    text, _, in_source = os.fspath(source).partition("#sha256=")
    sha256 = _expected(sha256 or in_source)
    if text.startswith(("http://", "https://")):
        return download(text, sha256=sha256)
    if text.startswith(("hf-hub:", "hf_hub:")):
        path = _from_hub(text)
    else:
        path = Path(text).expanduser()
        if not path.is_file():
            raise FileNotFoundError(
                f"There is no file {text}: give the path of a file, an http(s) URL or hf-hub:owner/repo[/file]."
            )
    _check(path, sha256, text)
    return path


def download(url: str, *, sha256: str | None = None, folder: Path | None = None) -> Path:
    """Download a URL into a cache, once.

    A download that was cut off goes on where it stopped, if the server still has the same file (by ETag, date and
    size). Several processes may ask for the same file: one downloads, the others wait for it.

    Args:
        url: ``http(s)://...``; its last path component names the file.
        sha256: expected hash, or its first 8 or more hex digits; else the digits in a name like ``van-1a2b3c4d.pth``.
        folder: the cache; the ``checkpoints`` folder of torch.hub, as timm uses, unless given.

    Returns:
        The file in the cache. Its sidecar ``<file>.origin`` remembers the URL, so that another URL with the same file
        name gets its own file; one without a sidecar (put there by timm) is taken as it is.

    Raises:
        FileNotFoundError: the server has no such file.
        ConnectionError: it cannot be downloaded now; what has arrived is kept for the next call.
        OSError: it cannot be written, such as on a full disk; what was written is kept too.
        ValueError: the contents do not have the expected hash, or the URL names no file.
    """
    name = urllib.parse.unquote(urllib.parse.urlsplit(url).path).replace("\\", "/").rpartition("/")[2]
    if not name.strip(". ") or "\0" in name:
        raise ValueError(f"The URL {url} does not end in a file name.")
    in_name = HASH_IN_NAME.search(name)
    sha256 = _expected(sha256 or (in_name and in_name[1]))
    folder = folder or Path(torch.hub.get_dir(), "checkpoints")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    if _origin(path).get("url", url) != url:
        path = folder / f"{hashlib.sha256(url.encode()).hexdigest()[:8]}-{name}"
    if _is_cached(path, sha256):  # without the lock: the cache may be read-only
        return path
    with FileLock(f"{path}.lock"):
        if _origin(path).get("url", url) != url:  # another process gave the name to another URL meanwhile
            return download(url, sha256=sha256, folder=folder)
        if not _is_cached(path, sha256):
            part = Path(f"{path}.part")
            _fetch(url, part, path)
            try:
                _check(part, sha256, url)
            except ValueError:
                part.unlink()
                raise
            os.replace(part, path)
    return path


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's contents, as 64 hex digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _expected(sha256: str | None) -> str:
    if sha256 and not re.fullmatch(r"[0-9a-fA-F]{8,64}", sha256):
        raise ValueError(f"The expected SHA-256 {sha256!r} is not 8 to 64 hex digits.")
    return (sha256 or "").lower()


def _check(path: Path, sha256: str, source: str) -> None:
    if sha256 and not (found := file_sha256(path)).startswith(sha256):
        raise ValueError(f"{source} has the SHA-256 {found}, not {sha256}: it is damaged or was replaced.")


def _is_cached(path: Path, sha256: str) -> bool:
    return path.is_file() and (not sha256 or file_sha256(path).startswith(sha256))


def _origin(path: Path) -> dict[str, Any]:
    """Where the file at ``path``, or what there is of it, came from: url, version and size."""
    try:
        return json.loads(Path(f"{path}.origin").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}


def _fetch(url: str, part: Path, path: Path) -> None:
    """Bring the whole of ``url`` into ``part``, in as many requests as bring something new."""
    attempt = 0
    while True:
        before = _size(part)
        try:
            return _fetch_rest(url, part, path)
        except TRANSIENT as error:
            code = getattr(error, "code", 500)
            if code in (404, 410):
                raise FileNotFoundError(f"There is nothing at {url} (HTTP {code}).") from error
            attempt = 1 if _size(part) > before else attempt + 1
            if attempt == ATTEMPTS or (400 <= code < 500 and code not in (408, 416, 429)):
                raise ConnectionError(f"Cannot download {url} now: {error}.") from error
        time.sleep(min(2.0 ** (attempt - 2), 10.0))


def _fetch_rest(url: str, part: Path, path: Path) -> None:
    """Make one request for what ``part`` lacks of ``url``."""
    known = _origin(path)
    have = 0 if known.get("size") is None else _size(part)  # of a length never told, we could not tell the end
    if have and have == known["size"]:
        return
    headers = {"User-Agent": "linear-vision-zoo", "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    request = urllib.request.Request(urllib.parse.quote(url, safe="/:?&=%#+,;@!$'()*~[]"), headers=headers)
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # there is nothing after what we have, so that is of another version
            part.unlink(missing_ok=True)
        raise
    with response:
        version = response.headers["ETag"] or response.headers["Last-Modified"]
        resumed = response.status == 206
        if resumed:
            size = known["size"]
            if (response.headers["Content-Range"], version) != (f"bytes {have}-{size - 1}/{size}", known["version"]):
                part.unlink()
                raise ConnectionError("the file changed during the download")
        else:
            length = response.headers["Content-Length"]
            size = int(length) if length else None
            part.unlink(missing_ok=True)  # before the sidecar changes: it may be of another version
            Path(f"{path}.origin").write_text(json.dumps({"url": url, "version": version, "size": size}))
        _save(response, part, size)
    if size is not None and _size(part) != size:
        raise ConnectionError(f"it stopped after {_size(part)} of {size} bytes")


def _save(response: http.client.HTTPResponse, part: Path, size: int | None) -> None:
    """Append a response to ``part``, with a progress bar on a terminal."""
    from rich import progress
    from rich.console import Console

    columns = progress.TextColumn("{task.description}"), progress.BarColumn(), progress.DownloadColumn()
    speed = progress.TransferSpeedColumn(), progress.TimeRemainingColumn()
    with (
        part.open("ab") as file,
        progress.Progress(*columns, *speed, console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar,
    ):
        task = bar.add_task(part.stem, total=size, completed=_size(part))
        while chunk := response.read1(CHUNK):  # what has arrived, so that little is lost to a kill
            try:
                file.write(chunk)
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(part)) from error
            bar.advance(task, len(chunk))


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _from_hub(source: str) -> Path:
    match = HUB_PATTERN.fullmatch(source)
    if match is None:
        raise ValueError(f"{source} is not of the form hf-hub:owner/repo[@revision][/file].")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    revision = match["revision"] and urllib.parse.unquote(match["revision"])
    files = [match["file"]] if match["file"] else HUB_DEFAULT_FILES
    for file in files:
        try:
            return Path(hf_hub_download(match["repo"], file, revision=revision))
        except EntryNotFoundError as error:
            missing = error
        except Exception as error:  # the client's classes of error differ between its versions
            raise ConnectionError(f"Cannot get {source} from the Hub: {_first_line(error)}") from error
    raise FileNotFoundError(
        f"There is no {' or '.join(files)} in {match['repo']}, or none can be reached: {_first_line(missing)}"
    ) from missing


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
