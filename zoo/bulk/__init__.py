"""Bulk inference: any number of pictures from files, archives, tables and object stores, to shards of Parquet."""

from zoo.bulk.recipe import Recipe
from zoo.bulk.run import Summary, run

__all__ = ["Recipe", "Summary", "run"]
