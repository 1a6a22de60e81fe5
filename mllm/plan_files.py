"""Files that are there as a whole or not at all, and plans as JSON in such files.

The zoo has such files of its own; this package imports nothing of it.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """A name to write to in the same folder, which is made, that takes the place of `path` when all is written."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_plan(path: str | os.PathLike, plan: Mapping[str, Any]) -> None:
    """Write a plan."""
    with replacing(path) as part:
        part.write_text(json.dumps(plan), encoding="utf-8")
