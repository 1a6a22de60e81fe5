"""RoIAlign (https://arxiv.org/abs/1703.06870), as ``mmcv.ops.roi_align`` calls it.

Regions are rows ``(image, x1, y1, x2, y2)`` in pixels of the picture; ``spatial_scale`` takes them to the feature map.
"""

import torch
import torchvision  # noqa: F401  (registers torch.ops.torchvision)
from torch import Tensor

from zoo.openmmlab.ops.missing import missing
from zoo.openmmlab.ops.precision import at_least_float32

__all__ = ["roi_align_backward", "roi_align_forward"]

MAX = 0  # pool_mode; 1 is the average


def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """The mean of bilinear samples in every bin.

    Args:
        input: (B, C, H, W).
        rois: (N, 5).
        output: receives the result, (N, C, aligned_height, aligned_width).
        argmax_y: for max pooling, which is not here.
        argmax_x: likewise.
        aligned_height: bins of a region.
        aligned_width: likewise.
        spatial_scale: feature map pixels per picture pixel.
        sampling_ratio: samples per bin and side; 0 for as many as the bin has pixels.
        pool_mode: 1, average.
        aligned: pixel centres are at half-integers.
    """
    if pool_mode == MAX:
        missing("roi_align with pool_mode='max'")
    features = at_least_float32(input)
    output.copy_(
        torch.ops.torchvision.roi_align(
            features,
            rois.to(features.dtype),
            spatial_scale,
            aligned_height,
            aligned_width,
            sampling_ratio,
            aligned,
        )
    )


def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """The gradient of :func:`roi_align_forward` with respect to its input, into ``grad_input``."""
    if pool_mode == MAX:
        missing("roi_align with pool_mode='max'")
    grad = at_least_float32(grad_output)
    grad_input.copy_(
        torch.ops.torchvision._roi_align_backward(
            grad,
            rois.to(grad.dtype),
            spatial_scale,
            aligned_height,
            aligned_width,
            *grad_input.shape,
            sampling_ratio,
            aligned,
        )
    )
