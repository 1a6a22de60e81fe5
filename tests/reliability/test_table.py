"""docs/RELIABILITY.md: a table of at least 60 kinds of bad input, each with a test that exists."""

import ast
import re
from functools import lru_cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "RELIABILITY.md").read_text(encoding="utf-8")
ROWS = [
    tuple(cell.strip() for cell in line.strip("|").split("|")) for line in TEXT.splitlines() if line.startswith("|")
]
ROWS = [row for row in ROWS if row[0] != "Input" and not set(row[0]) <= {"-"}]


@lru_cache
def functions_of(file):
    """The names of the test functions of a file."""
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_there_are_sixty_kinds():
    assert len({row[:2] for row in ROWS}) >= 60
    assert all(len(row) == 3 and all(row) for row in ROWS)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0][:60])
def test_the_test_beside_a_row_exists(row):
    file, name = re.fullmatch(r"`(tests/[\w/]+\.py)::(test_\w+)`", row[2]).groups()
    assert name in functions_of(file)


def test_every_test_of_this_folder_that_reads_bad_input_is_in_the_table():
    named = {row[2].strip("`") for row in ROWS}
    sound = {"test_printable", "test_sound_files_are_read", "test_an_error_that_is_not_documented_is_found"}
    sound |= {"test_later_batches_begin_with_what_fitted", "test_other_errors_are_not_taken_for_it"}
    sound |= {"test_an_error_names_the_file_and_not_its_temporary_name", "test_fuzzing_tells_its_use"}
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        file = path.relative_to(ROOT).as_posix()
        if path != Path(__file__):
            missing = {name for name in functions_of(file) if name.startswith("test_")} - sound
            assert {f"{file}::{name}" for name in missing} <= named
