"""Batches that do not fit into the memory of a GPU are computed in parts."""

import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch

R = TypeVar("R")


class PartsThatFit:
    """Computes batches, and in parts once the memory of the GPU did not do for a whole one.

    Attributes:
        limit: pictures of a part; None as long as every batch fitted.
    """

    def __init__(self) -> None:
        self.limit: int | None = None

    def __call__(self, compute: Callable[[Any], R], batch: Any) -> list[R]:
        """The results of the parts of a batch, in order.

        A part that does not fit is halved with a warning, and so are all that follow.

        Args:
            compute: takes a batch, and any part of it.
            batch: a tensor whose rows are pictures, or a list of them.

        Raises:
            torch.OutOfMemoryError: there is no memory for a single picture.
        """
        results: list[R] = []
        start = 0
        while start < len(batch):
            part = batch[start : start + (self.limit or len(batch))]
            try:
                results.append(compute(part))
                start += len(part)
                continue
            except torch.OutOfMemoryError as error:
                if len(part) == 1:
                    raise torch.OutOfMemoryError(
                        "The GPU has no memory left for a single picture: take a smaller model, half precision or the "
                        "CPU, or end what else runs there."
                    ) from error
            # Outside of the handler, whose traceback keeps the tensors of the pass that failed.
            torch.cuda.empty_cache()
            self.limit = len(part) // 2
            warnings.warn(
                f"The GPU has no memory for {len(part)} pictures at once: going on with {self.limit}.", stacklevel=2
            )
        return results
