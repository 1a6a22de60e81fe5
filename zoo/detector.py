"""From pictures to boxes and masks, with any detector of mmdet."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from zoo.dense import DenseModel


@dataclass(frozen=True)
class Detections:
    """The things in one picture, the surest first.

    Attributes:
        boxes: left, top, right and bottom in pixels, float32 (N, 4).
        scores: 0..1, float32 (N,).
        labels: places in the model's list of classes, int64 (N,).
        names: what they are called, N of them.
        masks: bool (N, H, W), or None from a detector without masks.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    names: tuple[str, ...]
    masks: np.ndarray | None

    def __len__(self) -> int:
        return len(self.scores)


class Detector(DenseModel[Detections]):
    """Finds things in pictures with any detector of mmdet, by default the packaged one.

    Args:
        model: see `zoo.dense.DenseModel`, as are the others.
        score: the least score of a detection, 0..1.
        config: a config of mmdet.
        checkpoint: its weights.
        labels: the names of the classes.
        device: where to compute.
        batch_size: pictures that are read ahead.
        workers: threads that decode and prepare pictures.
    """

    task, scope = "detector", "mmdet"

    def __init__(
        self,
        model: str = "van_nano",
        *,
        score: float = 0.3,
        config: str | Path | None = None,
        checkpoint: str | None = None,
        labels: Sequence[str] | None = None,
        device: str | torch.device | None = None,
        batch_size: int = 8,
        workers: int = 2,
    ) -> None:
        if not 0 <= score <= 1:
            raise ValueError(f"score must be between 0 and 1, got {score}.")
        self.score = score
        super().__init__(
            model,
            config=config,
            checkpoint=checkpoint,
            labels=labels,
            device=device,
            batch_size=batch_size,
            workers=workers,
        )

    def _build(self) -> torch.nn.Module:
        _raise_threshold(self.config.model.get("test_cfg") or {}, self.score)
        return super()._build()

    def _answer(self, sample: Any, size: tuple[int, int]) -> Detections:
        from mmdet.structures.mask import mask2bbox

        if "pred_instances" not in sample:
            raise ValueError("The model gives no instances: expected a detector, not a model of panoptic maps alone.")
        found = sample.pred_instances.cpu()
        if "masks" in found and not found.bboxes.any():  # SOLO gives masks alone
            found.bboxes = mask2bbox(found.masks)
        found = found.numpy()
        width, height = size
        boxes = found.bboxes.astype(np.float32).clip(0, [width, height, width, height])
        inside = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])  # not only in the border of a padded picture
        order = np.argsort(-found.scores, kind="stable")
        order = order[(inside & (found.scores >= self.score))[order]]
        labels = found.labels[order].astype(np.int64)
        names = tuple(self.labels[k] if k < len(self.labels) else f"class {k}" for k in labels)
        masks = found.masks[order, :height, :width].astype(bool) if "masks" in found else None
        return Detections(boxes[order], found.scores[order].astype(np.float32), labels, names, masks)


def _raise_threshold(test_cfg: dict[str, Any], score: float) -> None:
    """Let a config's thresholds leave out what is not asked for, before its masks are drawn at full size."""
    for key, value in test_cfg.items():
        if isinstance(value, dict):
            _raise_threshold(value, score)
        elif key == "score_thr":
            test_cfg[key] = score
