"""The engine of one machine: other processes read and decode, this one computes."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from itertools import islice
from typing import Any

from zoo.bulk.decoder import Decoder
from zoo.bulk.plan import Chunk
from zoo.bulk.shards import Row, Shard, count_failed, encode
from zoo.bulk.sources import Item
from zoo.bulk.tasks import Loaded, Task

Advance = Callable[[int, int], None]
AHEAD = 2  # batches that each process prepares before they are needed


def run_local(task: Task, chunks: Iterator[Chunk], workers: int, schema: Any, advance: Advance) -> Iterator[Shard]:
    """The shard of each chunk, as they get done.

    Args:
        task: what is done.
        chunks: taken from as needed.
        workers: processes that read and decode.
        schema: of the shards.
        advance: is told the number of pictures of each batch, and of failures among them.
    """
    decoders = [Decoder(task) for _ in range(workers)]
    batches = in_lanes(chunks, task.recipe.batch_size, workers)
    waiting: deque[tuple[Chunk, Future[list[Loaded]]]] = deque()
    rows: dict[int, list[Row]] = {}
    try:
        while True:
            for lane, chunk, batch in islice(batches, AHEAD * workers - len(waiting)):
                waiting.append((chunk, decoders[lane].submit(batch)))
            if not waiting:
                return
            chunk, loaded = waiting.popleft()
            done = rows.setdefault(chunk.number, [])
            done += (found := task.predict(loaded.result()))
            advance(len(found), count_failed(found))
            if len(done) == len(chunk.items):
                yield encode(chunk.number, rows.pop(chunk.number), schema)
    finally:
        for decoder in decoders:
            decoder.close()


def in_lanes(chunks: Iterator[Chunk], batch_size: int, lanes: int) -> Iterator[tuple[int, Chunk, Sequence[Item]]]:
    """(lane, chunk, batch): batches of as many chunks as there are lanes, in turn.

    A lane takes a chunk from its start to its end, so that a tar or a row group of Parquet is not read by all. The
    batches of a chunk are the same in every run, because the last digits of the results depend on them.
    """

    def lane(number: int) -> Iterator[tuple[int, Chunk, Sequence[Item]]]:
        for chunk in chunks:
            for start in range(0, len(chunk.items), batch_size):
                yield number, chunk, chunk.items[start : start + batch_size]

    running = [lane(number) for number in range(lanes)]
    while running:
        for one in list(running):
            if (batch := next(one, None)) is None:
                running.remove(one)
            else:
                yield batch
