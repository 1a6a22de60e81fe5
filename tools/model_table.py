"""Writes the table of models into a Markdown file, from the catalogue, between two markers."""

import re
from pathlib import Path
from typing import Annotated

import typer

from zoo.catalogue import CATALOGUE, Entry
from zoo.files import write_text

BEGIN, END = "<!-- models: written by zoo.tools.model_table -->", "<!-- end of models -->"
HEADINGS = ("Model", "Paper", "Parameters", "MACs", "Top-1", "Golden", "Weights", "Their licence")
ALIGNMENT = ("---", "---", "--:", "--:", "--:", ":-:", "---", "---")
ARXIV = re.compile(r"arXiv:(\S+)$")
HUB = "hf-hub:"


def model_table() -> str:
    """The catalogue as a Markdown table, a row for each model."""
    rows = [HEADINGS, ALIGNMENT, *map(_row, CATALOGUE.values())]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def with_table(text: str) -> str:
    """A text with the table of models between its markers.

    Args:
        text: Markdown that holds the two markers once, each on a line of its own.

    Raises:
        ValueError: it does not.
    """
    before, begin, rest = text.partition(f"{BEGIN}\n")
    _, end, after = rest.partition(f"{END}\n")
    if not (begin and end):
        raise ValueError(f"There is no place for the table: expected the lines {BEGIN} and {END}.")
    return f"{before}{begin}{model_table()}\n{end}{after}"


def _row(entry: Entry) -> tuple[str, ...]:
    paper = ARXIV.search(entry.paper)
    family = f"[{entry.family}](https://arxiv.org/abs/{paper[1]})" if paper else entry.family
    family += " (reconstruction)" if entry.reconstruction else ""
    counts = f"{entry.params / 1e6:.1f} M", f"{entry.macs / 1e9:.2f} G"
    top1 = "" if entry.top1 is None else f"{entry.top1:.1f}"
    weights = entry.weights
    if weights.startswith(HUB):
        owner, repository, *file = weights.removeprefix(HUB).split("/", 2)
        weights = f"[{file[0] if file else repository}](https://huggingface.co/{owner}/{repository})"
    return f"`{entry.name}`", family, *counts, top1, "yes" if entry.golden else "", weights, weights and entry.licence


def main(path: Annotated[Path, typer.Argument(help="The Markdown file.")] = Path("README.md")) -> None:
    """Write the table of models into a Markdown file, between its markers."""
    write_text(path, with_table(path.read_text(encoding="utf-8")))


if __name__ == "__main__":
    typer.run(main)
