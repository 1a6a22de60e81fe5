"""What `zoo embed`, `classify`, `detect` and `segment` do with `--engine`: a bulk run with a bar and a summary."""

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from zoo.bulk.recipe import Recipe
from zoo.bulk.run import Summary, Watcher, run
from zoo.printable import printable

WINDOW = 300.0  # seconds over which the rate is measured; Ray reports whole shards


def run_command(
    recipe: Recipe,
    paths: Sequence[str],
    out: Path | None,
    engine: str,
    workers: int,
    shard_rows: int,
    column: str | None,
    allow_urls: bool,
    as_json: bool = False,
) -> None:
    """Run, say on stdout what was written and on stderr what failed, and end with the exit code that tells.

    Args:
        recipe: what is done with each picture.
        paths: what the user typed, of which there must be one.
        out: the folder.
        engine: as of `zoo.bulk.run`, as are the others.
        workers: as there.
        shard_rows: as there.
        column: as there.
        allow_urls: as there.
        as_json: refused, because the results are in the folder.

    Raises:
        ValueError: the options do not go together; and what `zoo.bulk.run` raises.
    """
    if len(paths) != 1:
        raise ValueError(f"--engine takes one source, got {len(paths)}: name a folder, a list or a pattern in quotes.")
    if out is None or as_json:
        raise ValueError("--engine writes Parquet files: give their folder with --out, and leave --json out.")
    with _Bar() as bar:
        summary = run(
            recipe,
            paths[0],
            out,
            engine=engine,
            workers=workers,
            shard_rows=shard_rows,
            column=column,
            allow_urls=allow_urls,
            watcher=bar,
        )
    _tell(summary, out)


def _tell(summary: Summary, out: Path) -> None:
    rows, failed = summary.done + summary.before, summary.failed + summary.failed_before
    duplicates = f"; {summary.duplicates:,} duplicates were left out" if summary.duplicates else ""
    typer.echo(f"{out} holds {rows:,} pictures, {summary.done:,} of them new{duplicates}")
    if failed:
        typer.echo(f"{failed:,} of {rows:,} failed{', among them:' if summary.errors else '.'}", err=True)
        for error in summary.errors:
            typer.echo(f"  {printable(error)}", err=True)
        raise typer.Exit(1 if failed < rows else 2)


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:,.1f}/s" if task.speed else "")


class _Bar(Watcher):
    """On a terminal: how many are done, how fast, how many failed, and the time left."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        columns = (BarColumn(), MofNCompleteColumn(), _Rate(), TextColumn("{task.description}"), TimeRemainingColumn())
        self.progress = Progress(
            *columns,
            console=console,
            transient=True,
            disable=not console.is_terminal,
            speed_estimate_period=WINDOW,
        )
        self.failed = 0

    def __enter__(self) -> "_Bar":
        self.task = self.progress.add_task("listing", total=None)
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()

    def begin(self, summary: Summary) -> None:
        self.progress.update(self.task, total=summary.missing, description="0 failed")

    def advance(self, rows: int, failed: int) -> None:
        self.failed += failed
        self.progress.update(self.task, advance=rows, description=f"{self.failed:,} failed")
