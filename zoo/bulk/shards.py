"""The files of results: Parquet with key, result, status and error, each there as a whole or not at all."""

import io
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

OK, FAILED = "ok", "failed"
METADATA = b"zoo.bulk"
NAME = re.compile(r"part-(\d{6,})\.parquet")
SHOWN = 10  # errors of a shard that are told

Row = tuple[str, Any, str, str | None]  # key, result, status, error


class Shard(NamedTuple):
    """One file of results.

    Attributes:
        number: its place among the files.
        data: Parquet.
        rows: how many pictures.
        failed: how many of these have no result.
        errors: what is said of the first of these.
    """

    number: int
    data: bytes
    rows: int
    failed: int
    errors: list[str]


def schema_of(result: Any, settings: dict[str, Any]) -> Any:
    """The schema of a shard with results of an Arrow type, made with these settings."""
    import pyarrow as pa

    fields = [("key", pa.string()), ("result", result), ("status", pa.string()), ("error", pa.string())]
    return pa.schema(fields, {METADATA: json.dumps(settings, sort_keys=True).encode()})


def encode(number: int, rows: Sequence[Row], schema: Any) -> Shard:
    """Rows as the shard of that number."""
    import pyarrow as pa
    from pyarrow import parquet

    columns = [pa.array(column, field.type) for column, field in zip(zip(*rows), schema)]
    data = io.BytesIO()
    parquet.write_table(pa.Table.from_arrays(columns, schema=schema), data)
    errors = [f"{key} {error}" for key, _, status, error in rows if status == FAILED]
    return Shard(number, data.getvalue(), len(rows), len(errors), errors[:SHOWN])


def count_failed(rows: Sequence[Row]) -> int:
    """How many of the rows have no result."""
    return sum(status == FAILED for _, _, status, _ in rows)


def path_of(folder: Path, number: int) -> Path:
    """Where the shard of that number is."""
    return folder / f"part-{number:06}.parquet"


def read_shards(folder: Path, settings: dict[str, Any]) -> Iterator[tuple[int, list[str], int]]:
    """(number, keys, failures) of each shard in a folder.

    Raises:
        ValueError: a shard is damaged or was made with other settings.
    """
    import pyarrow as pa
    from pyarrow import parquet

    for path in sorted(folder.iterdir()):
        if not (name := NAME.fullmatch(path.name)):
            continue
        try:
            with parquet.ParquetFile(path) as file:
                found = json.loads((file.schema_arrow.metadata or {}).get(METADATA, b"{}"))
                if not found:
                    raise ValueError(f"{path} was not written by zoo: give another folder.")
                if others := [key for key in settings if found.get(key) != settings[key]]:
                    raise ValueError(
                        f"{folder} holds results made with another {', '.join(others)}: give another folder, or the "
                        f"same command as before."
                    )
                columns = file.read(["key", "status"]).to_pydict()
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{path} is damaged ({error}): delete it, and its pictures are done again.") from error
        yield int(name[1]), columns["key"], columns["status"].count(FAILED)
