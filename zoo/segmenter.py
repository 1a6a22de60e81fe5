"""From pictures to maps of classes, with any segmenter of mmseg."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from zoo.dense import DenseModel


@dataclass(frozen=True)
class Segmentation:
    """The class of every pixel of one picture.

    Attributes:
        labels: places in the model's list of classes, int64 (H, W).
        names: the whole list; where the model has no name for a class, "class K".
    """

    labels: np.ndarray
    names: tuple[str, ...]

    def shares(self) -> dict[str, float]:
        """The share of the picture that each class has, those that are there, the largest first."""
        counts = np.bincount(self.labels.ravel())
        order = sorted(np.flatnonzero(counts), key=lambda k: -counts[k])
        return {self.names[k]: float(counts[k] / self.labels.size) for k in order}


class Segmenter(DenseModel[Segmentation]):
    """Names the class of every pixel with any segmenter of mmseg, by default the packaged one.

    The arguments are those of `zoo.dense.DenseModel`; ``config`` is a config of mmseg.
    """

    task, scope = "segmenter", "mmseg"

    def _answer(self, sample: Any, size: tuple[int, int]) -> Segmentation:
        width, height = size
        labels = sample.pred_sem_seg.data[0, :height, :width].cpu().numpy().astype(np.int64)
        unnamed = range(len(self.labels), int(labels.max()) + 1)
        return Segmentation(labels, (*self.labels, *(f"class {k}" for k in unnamed)))
