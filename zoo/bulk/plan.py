"""What is still to be done, on disk: a source of any size takes no more memory than a small one."""

import sqlite3
from collections.abc import Collection, Iterable, Iterator
from itertools import count
from typing import NamedTuple

from zoo.bulk.sources import Item

_MISSING, _DONE, _SEEN = range(3)  # seen: done, and found again in the source


class Chunk(NamedTuple):
    """The pictures whose results become one shard."""

    number: int
    items: list[Item]


class Plan:
    """The pictures without a result, each key once, in the order of the source.

    Attributes:
        missing: how many there are.
        duplicates: pictures of the source whose key another one had before.
    """

    def __init__(self) -> None:
        self.missing = self.duplicates = 0
        self._database = sqlite3.connect("")  # a temporary file, which SQLite removes
        self._database.execute(
            "CREATE TABLE items (id INTEGER PRIMARY KEY, key TEXT UNIQUE, file TEXT, start INTEGER, stop INTEGER, "
            "cells TEXT, error TEXT, state INTEGER)"
        )

    def exclude(self, keys: Iterable[str]) -> None:
        """Keys that have a row of results."""
        values = f"INSERT OR IGNORE INTO items (key, state) VALUES (?, {_DONE})"
        self._database.executemany(values, ((key,) for key in keys))

    def add(self, item: Item) -> None:
        """A picture of the source, to be done if its key is new."""
        values = f"INSERT OR IGNORE INTO items VALUES (NULL, ?, ?, ?, ?, ?, ?, {_MISSING})"
        if self._database.execute(values, item).rowcount:
            self.missing += 1
            return
        seen = f"UPDATE items SET state = {_SEEN} WHERE key = ? AND state = {_DONE}"
        self.duplicates += not self._database.execute(seen, (item.key,)).rowcount

    def chunks(self, rows: int, taken: Collection[int]) -> Iterator[Chunk]:
        """Cut what is missing into chunks of that many pictures, with the lowest numbers that are not taken.

        A run that is cut off leaves out whole chunks of its plan. So the next one makes the same chunks of what is
        missing, with the same numbers and batches.
        """
        query = f"SELECT * FROM items WHERE state = {_MISSING} AND id > ? ORDER BY id LIMIT ?"
        numbers = (number for number in count() if number not in taken)
        last = 0
        while found := self._database.execute(query, (last, rows)).fetchall():
            last = found[-1][0]
            yield Chunk(next(numbers), [Item(*row[1:-1]) for row in found])
