"""Threads that decode and threads that compute: what is no picture never waits for a model."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from zoo.serve.limits import Limits

Arguments = ParamSpec("Arguments")
Answer = TypeVar("Answer")

DECODERS = 2


class Workers:
    """The threads of a server.

    A request that is cancelled leaves its line at once. One that is being computed keeps its thread to the end, since a
    thread cannot be stopped: no more than ``limits.concurrency`` ever compute, beside one that answers in words.

    Args:
        limits: of the server.
    """

    def __init__(self, limits: Limits) -> None:
        self._decoding = ThreadPoolExecutor(DECODERS, "decode")
        self._computing = ThreadPoolExecutor(limits.concurrency, "compute")
        self._talking = ThreadPoolExecutor(1, "talk")  # an answer is long, and comes from one model that has hooks

    async def decode(self, work: Callable[[bytes], Answer], data: bytes) -> Answer:
        """What a function makes of an upload."""
        return await asyncio.get_running_loop().run_in_executor(self._decoding, work, data)

    async def compute(
        self, work: Callable[Arguments, Answer], *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> Answer:
        """What a model answers."""
        return await asyncio.get_running_loop().run_in_executor(self._computing, lambda: work(*args, **kwargs))

    async def talk(self, work: Callable[[], Answer]) -> Answer:
        """What a chat model answers, one question after another."""
        return await asyncio.get_running_loop().run_in_executor(self._talking, work)

    def close(self) -> None:
        """Forget what waits, without waiting for what runs."""
        for pool in (self._decoding, self._computing, self._talking):
            pool.shutdown(wait=False, cancel_futures=True)
