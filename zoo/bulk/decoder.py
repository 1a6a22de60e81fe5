"""Processes that read and decode pictures, and are replaced where a picture ends one."""

import pickle
import signal
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing import Pipe, Process
from multiprocessing.connection import Connection
from threading import Lock

import torch

from zoo.bulk.sources import Item
from zoo.bulk.tasks import Loaded, Task
from zoo.images import ImageError

_one_start_at_a_time = Lock()  # else one process gets a copy of another's end of a pipe, and hides its death


class _Died(Exception):
    """The process ended instead of answering."""


class Decoder:
    """A process that prepares batches for a task, one after another.

    Where it dies, by a crash in a codec, for want of memory or by somebody's hand, another takes its place and gets the
    pictures of the batch one by one. The picture that it dies of again is an ImageError.

    A DataLoader does not tell which of its workers died, nor of what, and can wait for ever for the rest of a batch
    that one was sending.
    """

    def __init__(self, task: Task) -> None:
        self.task = task
        self._thread = ThreadPoolExecutor(1)  # waits for the process
        self._start()

    def submit(self, items: Sequence[Item]) -> Future[list[Loaded]]:
        """Prepare a batch after those that were submitted before."""
        return self._thread.submit(self._prepare, items)

    def close(self) -> None:
        """Finish the batch that is being prepared, forget the others and end the process."""
        self._thread.shutdown(cancel_futures=True)
        self._stop()

    def _prepare(self, items: Sequence[Item]) -> list[Loaded]:
        try:
            return self._ask(items)
        except _Died:
            return [self._prepare_alone(item) for item in items]

    def _prepare_alone(self, item: Item) -> Loaded:
        try:
            return self._ask([item])[0]
        except _Died:
            return item.key, ImageError(
                item.key, "ends the process that decodes it: it crashes, or has no memory left."
            )

    def _ask(self, items: Sequence[Item]) -> list[Loaded]:
        try:
            # Not Connection.send: for each tensor it would send a file handle.
            self._pipe.send_bytes(pickle.dumps(items, pickle.HIGHEST_PROTOCOL))
            return pickle.loads(self._pipe.recv_bytes())
        except (EOFError, OSError):
            self._stop()
            self._start()
            raise _Died from None

    def _start(self) -> None:
        with _one_start_at_a_time:
            self._pipe, theirs = Pipe()
            self._process = Process(target=_serve, args=(self.task, theirs, self._pipe), daemon=True)
            self._process.start()
            theirs.close()
        try:
            self._pipe.recv_bytes()
        except (EOFError, OSError):
            self._stop()
            code = self._process.exitcode
            raise RuntimeError(f"A process that decodes pictures ends with code {code} before it begins.") from None

    def _stop(self) -> None:
        self._pipe.close()
        self._process.kill()
        self._process.join()


def _serve(task: Task, pipe: Connection, theirs: Connection) -> None:
    """What the process does: answer until the other end of the pipe is closed, also by a kill."""
    theirs.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that writes
    torch.set_num_threads(1)
    try:
        pipe.send_bytes(b"ready")
        while True:
            items = pickle.loads(pipe.recv_bytes())
            pipe.send_bytes(pickle.dumps(task.prepare(items), pickle.HIGHEST_PROTOCOL))
    except (EOFError, OSError):
        return
