"""The pictures of a source, one after another: folders, lists, WebDataset tars and Parquet, here or behind a URL."""

import glob
import os
import re
import tarfile
from collections.abc import Iterator
from functools import lru_cache
from typing import IO, Any, NamedTuple

from zoo.images import URL, URL_MAX_BYTES, ImageError, RemoteImage, has_picture_suffix, walk_files

ANY_URL = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)
LISTS = (".txt", ".lst", ".list")
ARCHIVES = (".tar", ".parquet")
KEY, PATH = "key", "path"  # columns of Parquet with a meaning


class Item(NamedTuple):
    """Where one picture of a source is.

    Attributes:
        key: what it is called in the results; no two pictures of a source have the same.
        file: path or URL of the file that holds it.
        start: in a tar its first byte, in Parquet its row group.
        stop: in a tar the byte after its last, in Parquet its row in that group; 0 for a whole file.
        cells: in Parquet the column with the bytes; else empty.
        error: why it cannot be read, where that is known from the start.
    """

    key: str
    file: str = ""
    start: int = 0
    stop: int = 0
    cells: str = ""
    error: str = ""


def find_items(source: str, column: str | None = None, allow_urls: bool = False) -> Iterator[Item]:
    """List the pictures of a source, of which any number may not fit into memory.

    Args:
        source: a folder, a file, a pattern with ``*``, or the same behind a URL of fsspec such as ``s3://bucket/folder``.
            A file that ends in ``.txt``, ``.lst`` or ``.list`` names one file on each line, beside the list or by a
            full path. Of each file so found, a ``.tar`` gives its pictures (WebDataset), a ``.parquet`` its rows, and
            any other is a picture.
        column: of Parquet, with the bytes of the pictures (also as a struct with the field ``bytes``) or with paths
            as in a list; by default the first one with bytes, else "path".
        allow_urls: take URLs that a list or a table names; the source itself may always be one.

    Yields:
        One item per picture, in an order that stays the same. Keys are the path below the folder or as the list or the
        pattern has it, with ``/NAME`` of the member of a tar; in Parquet the value of the column "key", else the path,
        else ``FILE#ROW``.

    Raises:
        FileNotFoundError: there is no such source.
        ImportError: Parquet without pyarrow, or a URL whose protocol needs another package.
        ValueError: there is no such column, or a list names a URL and ``allow_urls`` is false.
    """
    if source.lower().endswith(LISTS) and not os.path.isdir(source):
        with _open(source) as lines:
            for line in filter(None, (raw.decode(errors="backslashreplace").strip("\r\n") for raw in lines)):
                yield from _items_of(line, _beside(source, line, allow_urls), column, allow_urls)
        return
    for key, file in _files(source):
        yield from _items_of(key, file, column, allow_urls)


def fetch(item: Item) -> str | bytes:
    """What `zoo.images.read_image` takes of one item.

    Raises:
        ImageError: it cannot be read.
    """
    if item.error:
        raise ImageError(item.key, item.error)
    try:
        if item.cells:
            return _cell(item)
        if URL.match(item.file):
            return RemoteImage(item.file)
        if ANY_URL.match(item.file):
            return _download(item)
        if item.stop:
            with open(item.file, "rb") as file:
                file.seek(item.start)
                return file.read(item.stop - item.start)
    except FileNotFoundError:
        raise ImageError(item.key, "does not exist.") from None
    except OSError as error:
        raise ImageError(item.key, f"cannot be read: {error.strerror or error}.") from error
    return item.file


def _files(source: str) -> Iterator[tuple[str, str]]:
    """(key, file) of each file."""
    if ANY_URL.match(source):
        yield from _remote_files(source)
    elif os.path.isdir(source):
        for file in walk_files(source, _is_wanted):
            yield os.path.relpath(file, source).replace(os.sep, "/"), file
    elif os.path.lexists(source):
        yield os.path.basename(source), source
    elif glob.has_magic(source):
        yield from ((file, file) for file in sorted(glob.iglob(source, recursive=True)) if not os.path.isdir(file))
    else:
        raise FileNotFoundError(f"There is no file or folder {source}.")


def _remote_files(source: str) -> Iterator[tuple[str, str]]:
    import fsspec

    files, root = fsspec.core.url_to_fs(source)
    if glob.has_magic(source):
        yield from ((files.unstrip_protocol(path),) * 2 for path in sorted(files.glob(root)))
    elif files.isdir(root):
        for folder, _, names in files.walk(root):
            for path in (f"{folder}/{name}" for name in sorted(names) if _is_wanted(name)):
                yield path.removeprefix(root).lstrip("/"), files.unstrip_protocol(path)
    elif files.exists(root):
        yield root.rpartition("/")[2], source
    else:
        raise FileNotFoundError(f"There is no file or folder {source}.")


def _is_wanted(name: str) -> bool:
    return has_picture_suffix(name) or (name.lower().endswith(ARCHIVES) and not name.startswith("."))


def _items_of(key: str, file: str, column: str | None, allow_urls: bool) -> Iterator[Item]:
    try:
        key.encode()
    except UnicodeEncodeError:
        key = os.fsencode(key).decode(errors="backslashreplace")
        yield Item(key, error="has a name that is not UTF-8: rename it.")
        return
    kind = next((suffix for suffix in ARCHIVES if file.lower().endswith(suffix)), None)
    if kind is None:
        yield Item(key, file)
        return
    try:
        yield from _members(key, file) if kind == ".tar" else _rows(key, file, column, allow_urls)
    except FileNotFoundError:
        yield Item(key, error="does not exist.")
    except (tarfile.TarError, OSError) as error:  # pyarrow's errors of damaged files are among them
        yield Item(key, error=f"is no {kind} file, or damaged: {str(error).rstrip('.')}.")


def _members(key: str, file: str) -> Iterator[Item]:
    with _open(file) as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
        while member := tar.next():
            tar.members.clear()  # else all of them stay in memory
            if member.isreg() and has_picture_suffix(member.name.rpartition("/")[2]):
                name = member.name.encode(errors="surrogateescape").decode(errors="backslashreplace")
                yield Item(f"{key}/{name}", file, member.offset_data, member.offset_data + member.size)


def _rows(key: str, file: str, column: str | None, allow_urls: bool) -> Iterator[Item]:
    with _open(file) as stream:
        table = _parquet_file(stream)
        column, has_bytes = _picture_column(table.schema_arrow, key, column)
        names = [name for name in (KEY, None if has_bytes else column) if name in table.schema_arrow.names]
        number = 0
        for group in range(table.num_row_groups):
            columns = table.read_row_group(group, names).to_pydict() if names else {}
            for row in range(table.metadata.row_group(group).num_rows):
                path = "" if has_bytes else columns[column][row]
                name = columns[KEY][row] if KEY in names else path
                name = f"{key}#{number}" if name in (None, "") else str(name)
                if has_bytes:
                    yield Item(name, file, group, row, column)
                elif path:
                    yield Item(name, _beside(file, path, allow_urls))
                else:
                    yield Item(name, error="has no path in its row.")
                number += 1


def _picture_column(schema: Any, key: str, column: str | None) -> tuple[str, bool]:
    """The column with the pictures, and whether it has their bytes, not their paths."""
    from pyarrow import types

    def has_bytes(kind: Any) -> bool:
        if types.is_struct(kind):
            place = kind.get_field_index("bytes")
            return place >= 0 and has_bytes(kind.field(place).type)
        return types.is_binary(kind) or types.is_large_binary(kind)

    names = [name for name in ([column] if column else schema.names) if name in schema.names]
    for name in names:
        if has_bytes(schema.field(name).type):
            return name, True
    name = column or PATH
    if name not in schema.names or not (
        types.is_string(schema.field(name).type) or types.is_large_string(schema.field(name).type)
    ):
        wanted = (
            f"column {column!r} with bytes or paths" if column else "column with bytes, nor one of paths called 'path'"
        )
        raise ValueError(f"{key} has no {wanted}: its columns are {', '.join(schema.names)}.")
    return name, False


def _beside(file: str, name: str, allow_urls: bool) -> str:
    """The file that a list or a table names."""
    if ANY_URL.match(name):
        if not allow_urls:
            raise ValueError(f"{file} names {name}, and URLs are off: pass --allow-urls to fetch what a file names.")
        return name
    if ANY_URL.match(file):  # what lies elsewhere has no say in which files are read here
        return f"{file.rpartition('/')[0]}/{name.lstrip('/')}"
    return os.path.join(os.path.dirname(file), name)


def _open(file: str) -> IO[bytes]:
    if not ANY_URL.match(file):
        return open(file, "rb")
    import fsspec

    return fsspec.open(file, "rb").open()


def _download(item: Item) -> bytes:
    import fsspec

    files, path = fsspec.core.url_to_fs(item.file)
    data = files.cat_file(path, item.start, item.stop or URL_MAX_BYTES + 1)
    if len(data) > URL_MAX_BYTES:
        raise ImageError(item.key, f"is larger than {URL_MAX_BYTES // 2**20} MiB.")
    return data


def _cell(item: Item) -> bytes:
    value = _row_group(item.file, item.start, item.cells)[item.stop].as_py()
    value = value["bytes"] if isinstance(value, dict) else value
    if value is None:
        raise ImageError(item.key, "is empty.")
    return value


@lru_cache(maxsize=1)
def _row_group(file: str, group: int, column: str) -> Any:
    with _open(file) as stream:
        return _parquet_file(stream).read_row_group(group, [column]).column(0)


def _parquet_file(stream: IO[bytes]) -> Any:
    parquet = pyarrow_parquet()
    from pyarrow import ArrowException

    try:
        return parquet.ParquetFile(stream)
    except ArrowException as error:
        raise OSError(str(error)) from error


def pyarrow_parquet() -> Any:
    """The module ``pyarrow.parquet``, or an ImportError that says what to install."""
    try:
        from pyarrow import parquet
    except ImportError:
        raise ImportError("Bulk inference needs pyarrow: pip install 'linear-vision-zoo[bulk]'.") from None
    return parquet
