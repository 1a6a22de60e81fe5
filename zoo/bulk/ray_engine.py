"""The engine of many machines: Ray Data with a pool of actors, each with a model of its own."""

import logging
import os
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from zoo.bulk.local import Advance, run_local
from zoo.bulk.plan import Chunk
from zoo.bulk.recipe import Recipe
from zoo.bulk.shards import Shard
from zoo.bulk.sources import Item
from zoo.bulk.tasks import TASKS

RETRIES = 3  # of a chunk whose actor died, before the run stops


class _Actor:
    """A model in a process of its own, which turns the items of a chunk into a shard."""

    def __init__(self, recipe: Recipe, schema: Any) -> None:
        self.task, self.schema = TASKS[recipe.task](recipe), schema

    def __call__(self, table: Any) -> Any:
        """A table with one chunk as its row, to a table with the fields of its `Shard`."""
        import pyarrow as pa

        (row,) = table.to_pylist()
        chunk = Chunk(row["number"], [Item(**item) for item in row["items"]])
        (shard,) = run_local(self.task, iter([chunk]), 1, self.schema, lambda rows, failed: None)
        return pa.table({name: [value] for name, value in shard._asdict().items()})


def run_ray(recipe: Recipe, chunks: Iterator[Chunk], workers: int, schema: Any, advance: Advance) -> Iterator[Shard]:
    """The shard of each chunk, as they get done.

    Args:
        recipe: what is done.
        chunks: all of them go to Ray's object store at once, as places of pictures and not as pictures.
        workers: actors; each takes a GPU, or a CPU where the cluster has none or ``recipe.device`` is the CPU.
        schema: of the shards.
        advance: is told the number of pictures of each chunk, and of failures among them.

    Raises:
        RuntimeError: a chunk could not be done.
        ValueError: the cluster has fewer GPUs or CPUs than there are to be actors.
    """
    import ray.data

    ours = not ray.is_initialized()
    if ours:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray would report to its makers
        try:
            ray.init(log_to_driver=False, include_dashboard=False, logging_level=logging.ERROR)
        except Exception as error:  # Ray raises just that where a machine is too busy to start it in time
            raise RuntimeError(f"Ray does not start: {error}") from error
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", "`ray_remote_args` is deprecated")  # and has no other way to bound retries
    ray.data.DataContext.get_current().enable_progress_bars = False
    try:
        recipe, place = _place(ray.cluster_resources(), recipe, workers)
        tables = [ray.put(_table(chunk)) for chunk in chunks]
        dataset = ray.data.from_arrow_refs(tables).map_batches(
            _Actor,
            fn_constructor_args=(recipe, schema),
            batch_size=1,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=2),
            max_task_retries=RETRIES,  # Ray's own are without end
            **place,
        )
        for found in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
            for shard in (Shard(**row) for row in found.to_pylist()):
                advance(shard.rows, shard.failed)
                yield shard
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None) or error
        raise RuntimeError(f"Ray stopped: {str(cause).strip().splitlines()[-1]}") from error
    finally:
        if ours:
            ray.shutdown()


def _table(chunk: Chunk) -> Any:
    """A chunk as a table of one row, because Ray Data would join tables of fewer rows than a batch."""
    import pyarrow as pa

    return pa.table({"number": [chunk.number], "items": [[item._asdict() for item in chunk.items]]})


def _place(cluster: dict[str, float], recipe: Recipe, workers: int) -> tuple[Recipe, dict[str, int]]:
    """The recipe of an actor, and what that asks of the cluster."""
    on_gpu = cluster.get("GPU") and (recipe.device is None or torch.device(recipe.device).type == "cuda")
    kind = "GPU" if on_gpu else "CPU"
    if workers > cluster.get(kind, 0):  # Ray would wait for more
        raise ValueError(f"{workers} workers need {workers} {kind}s, and the cluster has {cluster.get(kind, 0):g}.")
    # An actor sees only the GPU that it is given.
    return (replace(recipe, device="cuda"), {"num_gpus": 1}) if on_gpu else (recipe, {"num_cpus": 1})
