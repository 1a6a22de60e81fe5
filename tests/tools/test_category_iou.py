import pytest

pytest.importorskip("mmseg", reason="dense prediction needs the dense extra")

import torch

from zoo.tools.category_iou import CategoryIoUMetric


def test_the_background_does_not_count_and_nor_does_a_class_that_is_nowhere():
    metric = CategoryIoUMetric(iou_metrics=["mIoU"])
    metric.dataset_meta = {"classes": ("background", "cat", "dog", "owl")}
    truth = torch.tensor([[0, 0, 0, 0, 1, 1, 2, 2], [0, 0, 0, 0, 0, 0, 1, 1]])
    found = torch.tensor([[0, 0, 0, 1, 1, 1, 2, 0], [0, 0, 0, 0, 0, 0, 1, 0]])
    results = [metric.intersect_and_union(f, t, 4, 255) for f, t in zip(found, truth)]
    metrics = metric.compute_metrics(results)
    assert metrics["IoU/background"] == pytest.approx(100 * 9 / 12)
    assert metrics["IoU/cat"] == pytest.approx(100 * 3 / 5)
    assert metrics["IoU/dog"] == pytest.approx(100 * 1 / 2)
    assert metrics["category_mIoU"] == pytest.approx((60 + 50) / 2)
    assert metrics["mIoU"] == pytest.approx((75 + 60 + 50) / 3, abs=0.01)
