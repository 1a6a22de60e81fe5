"""A bulk run from its source to its shards; repeated, it does what is missing."""

import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from filelock import FileLock, Timeout

from zoo.bulk.local import run_local
from zoo.bulk.plan import Plan
from zoo.bulk.ray_engine import run_ray
from zoo.bulk.recipe import Recipe
from zoo.bulk.shards import SHOWN, Shard, path_of, read_shards, schema_of
from zoo.bulk.sources import ANY_URL, find_items, pyarrow_parquet
from zoo.bulk.tasks import TASKS
from zoo.files import write_bytes


@dataclass
class Summary:
    """What a run did, so far.

    Attributes:
        missing: pictures that had no row when it began.
        done: rows written by this run.
        failed: those of them without a result.
        before: rows that were there.
        failed_before: those of them without a result.
        duplicates: pictures left out because another one has their key.
        errors: what is said of the first failures.
    """

    missing: int = 0
    done: int = 0
    failed: int = 0
    before: int = 0
    failed_before: int = 0
    duplicates: int = 0
    errors: list[str] = field(default_factory=list)

    def add(self, shard: Shard) -> None:
        """Count a shard that was written."""
        self.done += shard.rows
        self.failed += shard.failed
        self.errors += shard.errors[: SHOWN - len(self.errors)]


class Watcher:
    """Is told how far a run is; this one does nothing with it."""

    def begin(self, summary: Summary) -> None:
        """The source is listed: the summary says what is missing."""

    def advance(self, rows: int, failed: int) -> None:
        """So many more pictures are done, and so many of these without a result."""


def run(
    recipe: Recipe,
    source: str,
    out: str | Path,
    *,
    engine: str = "local",
    workers: int = 2,
    shard_rows: int = 512,
    column: str | None = None,
    allow_urls: bool = False,
    watcher: Watcher | None = None,
) -> Summary:
    """Write one row for each picture of a source to Parquet files in a folder.

    Each file is written under another name and renamed when it is whole. Whatever stops a run, the same call goes on:
    pictures with a row, also one that says why there is no result, are not done again.

    Args:
        recipe: what is done with each picture.
        source: as of `zoo.bulk.sources.find_items`, as are ``column`` and ``allow_urls``.
        out: the folder, which is made. It takes the results of one recipe and one source.
        engine: "local" or "ray".
        workers: processes that decode, or actors of Ray with a model each.
        shard_rows: pictures per file; one worker takes them all.
        column: of Parquet.
        allow_urls: take URLs that a list or a table names.
        watcher: is told how far the run is.

    Returns:
        The counts of this run.

    Raises:
        FileNotFoundError: there is no such source.
        ImportError: pyarrow, Ray or a package for the protocol of the source is missing.
        OSError: a file cannot be written; the files that are there stay.
        RuntimeError: a process cannot be started, or Ray stopped.
        ValueError: another run writes to the folder, it holds other results, or a setting is wrong.
    """
    if workers < 1 or shard_rows < 1:
        raise ValueError(f"workers and shard_rows must be at least 1, got {workers} and {shard_rows}.")
    pyarrow_parquet()  # before the work
    out, place = Path(out), source
    if not ANY_URL.match(source):
        place = os.path.realpath(source)
        if out.resolve().is_relative_to(place):
            raise ValueError(f"{out} is inside {source}, whose pictures it would be among: give another folder.")
    compute = _engine(engine, recipe)
    settings = {**recipe.settings(), "source": place, "column": column}
    summary, watcher = Summary(), watcher or Watcher()
    with _alone(out):
        plan, numbers = Plan(), []
        for number, keys, failed in read_shards(out, settings):
            plan.exclude(keys)
            numbers.append(number)
            summary.before += len(keys)
            summary.failed_before += failed
        for item in find_items(source, column, allow_urls):
            plan.add(item)
        summary.missing, summary.duplicates = plan.missing, plan.duplicates
        if not summary.missing + summary.before:
            raise ValueError(f"{source} has no pictures.")
        watcher.begin(summary)
        if not summary.missing:
            return summary
        schema = schema_of(TASKS[recipe.task].result_type(), settings)
        for shard in compute(plan.chunks(shard_rows, numbers), workers, schema, watcher.advance):
            _write(out, shard)
            summary.add(shard)
    return summary


def _engine(name: str, recipe: Recipe) -> Callable[..., Iterator[Shard]]:
    """The engine with its task, whose errors are told before the work."""
    if name == "local":
        return partial(run_local, TASKS[recipe.task](recipe))
    if name != "ray":
        raise ValueError(f"The engine is {name!r}, expected local or ray.")
    if importlib.util.find_spec("ray") is None:
        raise ImportError("The engine ray needs Ray: pip install 'linear-vision-zoo[bulk]'.")
    TASKS[recipe.task](replace(recipe, device="cpu"))
    return partial(run_ray, recipe)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """The folder, made and locked; the lock goes with the process, however that ends."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            for part in folder.glob(".part-*.part"):  # of a run that was killed
                part.unlink()
            yield
    except Timeout:
        raise ValueError(f"Another run writes to {folder}: wait for its end, or give another folder.") from None


def _write(folder: Path, shard: Shard) -> None:
    path = path_of(folder, shard.number)
    try:
        write_bytes(path, shard.data)
    except OSError as error:
        raise OSError(
            f"{path} cannot be written ({error.strerror}): make room and repeat the command, which goes on from "
            f"the files that are there."
        ) from error
