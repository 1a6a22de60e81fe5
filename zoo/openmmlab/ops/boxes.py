"""Suppression and overlap of boxes ``(x1, y1, x2, y2)``, as ``mmcv.ops.nms`` and ``mmcv.ops.bbox`` call them.

``offset`` is 0 or 1: what is added to the width ``x2 - x1`` and the height of every box.
"""

from typing import TypeVar

import numpy as np
import torch
import torchvision
from torch import Tensor

from zoo.openmmlab.ops.precision import at_least_float32

__all__ = ["bbox_overlaps", "nms", "nms_match", "softnms"]

Boxes = TypeVar("Boxes", np.ndarray, Tensor)

NAIVE, LINEAR = 0, 1  # the third method of soft-NMS is gaussian


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Greedy non-maximum suppression; equal scores keep their order.

    Args:
        boxes: (N, 4).
        scores: (N,).
        iou_threshold: a box goes if it overlaps a kept one of a higher score by more.
        offset: 0 or 1.

    Returns:
        Indices of the kept boxes, best first, (M,) int64.
    """
    boxes = at_least_float32(boxes)
    boxes = torch.cat([boxes[:, :2], boxes[:, 2:] + offset], dim=1) if offset else boxes
    iou_threshold = torch.tensor(iou_threshold, dtype=torch.float32).item()  # mmcv's has this precision
    return torchvision.ops.nms(boxes, scores.to(boxes.dtype), iou_threshold)


def softnms(
    boxes: Tensor,
    scores: Tensor,
    dets: Tensor,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: int,
    offset: int,
) -> Tensor:
    """Soft-NMS (https://arxiv.org/abs/1704.04503): overlapping boxes lose score instead of being dropped.

    A score is multiplied by 0 (naive) or 1 - IoU (linear) where the IoU reaches the threshold, or by
    exp(-IoU² / sigma) everywhere (gaussian). What falls below ``min_score`` is dropped.

    Args:
        boxes: (N, 4) on the CPU.
        scores: (N,) on the CPU.
        dets: (N, 5), whose first M rows become the kept boxes with their new scores.
        iou_threshold: for the naive and the linear method.
        sigma: for the gaussian method.
        min_score: scores below it are dropped.
        method: 0 naive, 1 linear, 2 gaussian.
        offset: 0 or 1.

    Returns:
        Indices of the kept boxes in the order of ``dets``, (M,) int64.
    """
    corners, points = boxes.float().numpy(), scores.float().numpy().copy()
    areas = _area(corners, offset)
    left = np.arange(len(corners))
    keep = []
    with np.errstate(divide="ignore", invalid="ignore"):  # boxes without area
        while len(left):
            best = points[left].argmax()
            index = left[best]
            keep.append(index)
            left[best] = left[0]  # not the next one in its place, so that equal scores come out in mmcv's order
            left = left[1:]
            shared = _intersection(corners[index], corners[left], offset)
            overlap = shared / (areas[index] + areas[left] - shared)
            if method == NAIVE:
                factor = overlap < iou_threshold
            elif method == LINEAR:
                factor = np.where(overlap >= iou_threshold, 1 - overlap, 1)
            else:
                factor = np.exp(-(overlap**2) / sigma)
            points[left] *= factor
            left = _fill_gaps(left, points[left] >= min_score)
    dets[: len(keep)] = torch.from_numpy(np.column_stack([corners[keep], points[keep]]))
    return torch.tensor(keep, dtype=torch.long)


def nms_match(dets: Tensor, iou_threshold: float) -> list[list[int]]:
    """Non-maximum suppression that tells which box suppressed which.

    Args:
        dets: (N, 5), boxes and scores, on the CPU.
        iou_threshold: a box joins the group of a kept one if it overlaps it by this or more.

    Returns:
        For each kept box its index, then those of the boxes it suppressed, by falling score.
    """
    left = dets[:, 4].float().argsort(descending=True, stable=True).numpy()
    corners = dets[:, :4].float().numpy()
    areas = _area(corners, 0)
    groups = []
    with np.errstate(divide="ignore", invalid="ignore"):
        while len(left):
            shared = _intersection(corners[left[0]], corners[left], 0)
            hit = shared / (areas[left[0]] + areas[left] - shared) >= iou_threshold
            hit[0] = True  # a box without area overlaps nothing, itself included
            groups.append(left[hit].tolist())
            left = left[~hit]
    return groups


def bbox_overlaps(bboxes1: Tensor, bboxes2: Tensor, ious: Tensor, mode: int, aligned: bool, offset: int) -> None:
    """Overlap of boxes with boxes.

    Args:
        bboxes1: (M, 4).
        bboxes2: (N, 4).
        ious: receives the overlaps, (M, N), or (M,) if aligned.
        mode: 0 for intersection over union, 1 for intersection over the area of the first box.
        aligned: only the i-th box with the i-th box.
        offset: 0 or 1.
    """
    first, second = (bboxes1, bboxes2) if aligned else (bboxes1[:, None], bboxes2[None])
    shared = _intersection(first, second, offset)
    area = _area(first, offset)
    ious.copy_(shared / (area if mode else area + _area(second, offset) - shared))


def _fill_gaps(values: np.ndarray, stay: np.ndarray) -> np.ndarray:
    """The values that stay, those from the end in the places of the ones that go: mmcv's order."""
    count = np.count_nonzero(stay)
    front, gaps = values[:count], ~stay[:count]
    front[gaps] = values[count:][stay[count:]][::-1]
    return front


def _intersection(first: Boxes, second: Boxes, offset: int) -> Boxes:
    bottom_right = first[..., 2:4].clip(max=second[..., 2:4])
    top_left = first[..., :2].clip(min=second[..., :2])
    size = (bottom_right - top_left + offset).clip(min=0)
    return size[..., 0] * size[..., 1]


def _area(boxes: Boxes, offset: int) -> Boxes:
    size = boxes[..., 2:4] - boxes[..., :2] + offset
    return size[..., 0] * size[..., 1]
