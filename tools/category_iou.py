"""The mean IoU of mmseg, and beside it that of the categories alone: most of a picture is background."""

from typing import Any

import torch
from mmseg.evaluation import IoUMetric
from mmseg.registry import METRICS


@METRICS.register_module()
class CategoryIoUMetric(IoUMetric):
    """mmseg's ``IoUMetric``, with ``category_mIoU``, which leaves class 0 out, and every class's IoU, in percent."""

    def compute_metrics(self, results: list[Any]) -> dict[str, float]:
        """From intersections and unions (first two items of each result), float (classes,), of all pictures."""
        intersections, unions = (sum(result[place] for result in results) for place in (0, 1))
        iou = 100 * intersections / unions
        each = {f"IoU/{name}": float(value) for name, value in zip(self.dataset_meta["classes"], iou)}
        return {**super().compute_metrics(results), "category_mIoU": float(torch.nanmean(iou[1:])), **each}
