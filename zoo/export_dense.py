"""Detectors of mmdet and segmenters of mmseg as modules from pictures to answers, without a branch on what they see."""

import copy
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.dense import DenseModel
from zoo.detector import Detector

PREPARATION = "RGB, 0 to 255, resized as the config's test pipeline does; normalised and padded inside"

MOST_GROWTH = 62.5  # of the sides of an anchor, and of their shrinking; what mmdet takes where it is not told


def end_to_end(model: DenseModel) -> nn.Module:
    """The network of a `zoo.Detector` or `zoo.Segmenter` with all that follows it.

    Raises:
        ValueError: it is of a kind that is not written here.
    """
    return DetectorGraph(model) if isinstance(model, Detector) else SegmenterGraph(model)


class Prepare(nn.Module):
    """Pictures as a model's data preprocessor makes them: normalised, then padded to a multiple of its divisor.

    Args:
        preprocessor: of mmdet or mmseg.
        divisor: of height and width.
    """

    def __init__(self, preprocessor: nn.Module, divisor: int) -> None:
        super().__init__()
        self.divisor = divisor
        # They swap the channels of what OpenCV reads, which is BGR, or else the model wants BGR.
        swaps = getattr(preprocessor, "_channel_conversion", getattr(preprocessor, "channel_conversion", False))
        self.bgr = not swaps
        self.register_buffer("mean", getattr(preprocessor, "mean", torch.zeros(3, 1, 1)))
        self.register_buffer("std", getattr(preprocessor, "std", torch.ones(3, 1, 1)))

    def forward(self, pictures: Tensor) -> Tensor:
        """float32 (B, 3, H, W), RGB, 0 to 255, to (B, 3, H', W')."""
        x = (pictures.flip(1) if self.bgr else pictures) - self.mean
        height, width = pictures.shape[2:]
        wide, high = ((edge + self.divisor - 1) // self.divisor * self.divisor for edge in (width, height))
        return F.pad(x / self.std, (0, wide - width, 0, high - height))


class SegmenterGraph(nn.Module):
    """float32 (B, 3, H, W) to the class of each pixel, int64 (B, H, W); see ``EncoderDecoder.predict`` of mmseg."""

    names = ("labels",)

    def __init__(self, segmenter: DenseModel) -> None:
        super().__init__()
        model = segmenter.model
        mode = model.test_cfg.get("mode", "whole")
        if type(model).__name__ != "EncoderDecoder" or mode != "whole" or model.out_channels == 1:
            raise ValueError(
                f"Export takes segmenters of the type EncoderDecoder that see the whole picture and have several "
                f"classes, got {type(model).__name__} of mode {mode!r} with {model.out_channels} outputs."
            )
        test_cfg = model.data_preprocessor.test_cfg or {}
        self.prepare = Prepare(model.data_preprocessor, test_cfg.get("size_divisor", 1))
        self.model = _with_dynamic_sizes(copy.deepcopy(model))

    def forward(self, pictures: Tensor) -> Tensor:
        """Pictures to labels."""
        x = self.prepare(pictures)
        head = self.model.decode_head
        logits = head(self.model.extract_feat(x))
        logits = F.interpolate(logits, x.shape[2:], mode="bilinear", align_corners=head.align_corners)
        labels = logits.argmax(1)
        for axis, edge in enumerate(pictures.shape[2:], 1):  # slices would be for padded pictures only, or for others
            labels = labels.index_select(axis, torch.arange(edge, device=labels.device))
        return labels


def _with_dynamic_sizes(module: nn.Module) -> nn.Module:
    """The module with upsampling that does not take the ``int`` of a size, which would fix it."""
    from mmseg.models.utils import Upsample

    for name, child in module.named_children():
        if isinstance(child, Upsample):
            scale, corners = child.scale_factor, child.align_corners
            setattr(module, name, nn.Upsample(child.size, scale, child.mode, corners))
        else:
            _with_dynamic_sizes(child)
    return module


class DetectorGraph(nn.Module):
    """float32 (1, 3, H, W) to what is in the picture, the surest first; see ``TwoStageDetector.predict`` of mmdet.

    The answer has boxes float32 (N, 4), left, top, right and bottom in pixels; scores float32 (N,); labels int64 (N,);
    and masks bool (N, H, W) from a detector with masks.
    """

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.model = model = detector.model
        rpn, heads = getattr(model, "rpn_head", None), getattr(model, "roi_head", None)
        kinds = [type(part).__name__ for part in (rpn, heads)]
        if kinds != ["RPNHead", "StandardRoIHead"]:
            raise ValueError(f"Export takes detectors with RPNHead and StandardRoIHead, got {type(model).__name__}.")
        parts = (rpn.bbox_coder, model.test_cfg.rpn), (heads.bbox_head.bbox_coder, model.test_cfg.rcnn)
        for coder, cfg in parts:
            kind, suppression = type(coder).__name__, cfg.nms.get("type", "nms")
            if (kind, suppression, coder.add_ctr_clamp) != ("DeltaXYWHBBoxCoder", "nms", False):
                raise ValueError(
                    f"Export takes detectors with DeltaXYWHBBoxCoder without add_ctr_clamp and with the suppression "
                    f"'nms', got {kind} and {suppression!r}."
                )
        self.prepare = Prepare(model.data_preprocessor, model.data_preprocessor.pad_size_divisor)
        self.names = ("boxes", "scores", "labels", *(["masks"] if heads.with_mask else []))

    def forward(self, pictures: Tensor) -> tuple[Tensor, ...]:
        """One picture to its answer."""
        size = tuple(pictures.shape[2:])
        maps = self.model.extract_feat(self.prepare(pictures))
        boxes, scores, labels = self._classify(maps, self._propose(maps, size), size)
        if not self.model.roi_head.with_mask:
            return boxes, scores, labels
        return boxes, scores, labels, self._masks(maps, boxes, labels, size)

    def _propose(self, maps: tuple[Tensor, ...], size: tuple[int, int]) -> Tensor:
        """Boxes (N, 4) where something may be."""
        rpn, cfg = self.model.rpn_head, self.model.test_cfg.rpn
        found = []
        for level, (logits, deltas) in enumerate(zip(*rpn(maps))):
            anchors = rpn.prior_generator.single_level_grid_priors(logits.shape[2:], level, logits.dtype, logits.device)
            logits = logits[0].permute(1, 2, 0).reshape(-1, rpn.cls_out_channels)
            scores = logits.sigmoid() if rpn.use_sigmoid_cls else logits.softmax(-1)[:, :1]
            scores, best = scores[:, 0].topk(torch.sym_min(cfg.nms_pre, scores.shape[0]))
            deltas = deltas[0].permute(1, 2, 0).reshape(-1, 4)[best]
            boxes = _decode(rpn.bbox_coder, anchors[best], deltas, size)
            found.append((boxes, scores, torch.full_like(best, level)))
        boxes, scores, levels = map(torch.cat, zip(*found))
        wide = ((boxes[:, 2:] - boxes[:, :2]) > cfg.get("min_bbox_size", -1)).all(1).nonzero()[:, 0]
        boxes, scores, levels = boxes[wide], scores[wide], levels[wide]
        return boxes[_suppress(boxes, scores, levels, cfg.nms.iou_threshold, size)[: cfg.max_per_img]]

    def _classify(self, maps: tuple[Tensor, ...], proposals: Tensor, size: tuple[int, int]) -> tuple[Tensor, ...]:
        """Boxes (N, 4), scores and labels (N,)."""
        roi_head, cfg = self.model.roi_head, self.model.test_cfg.rcnn
        head = roi_head.bbox_head
        logits, deltas = head(_align(roi_head.bbox_roi_extractor, maps, proposals))
        scores = logits.softmax(-1)[:, : head.num_classes]
        rows, labels = (scores > cfg.score_thr).nonzero().unbind(1)
        deltas = deltas[rows] if head.reg_class_agnostic else deltas.unflatten(1, (-1, 4))[rows, labels]
        boxes, scores = _decode(head.bbox_coder, proposals[rows], deltas, size), scores[rows, labels]
        best = _suppress(boxes, scores, labels, cfg.nms.iou_threshold, size)[: cfg.max_per_img]
        return boxes[best], scores[best], labels[best]

    def _masks(self, maps: tuple[Tensor, ...], boxes: Tensor, labels: Tensor, size: tuple[int, int]) -> Tensor:
        """Masks (N, H, W)."""
        roi_head = self.model.roi_head
        logits = roi_head.mask_head(_align(roi_head.mask_roi_extractor, maps, boxes))
        if not roi_head.mask_head.class_agnostic:
            logits = logits.gather(1, labels[:, None, None, None].expand(-1, 1, *logits.shape[2:]))
        start, extent = boxes[:, :2], (boxes[:, 2:] - boxes[:, :2]).clamp(min=1e-6)
        x, y = (
            (torch.arange(edge, device=boxes.device) + 0.5 - start[:, axis, None]) / extent[:, axis, None] * 2 - 1
            for axis, edge in enumerate(reversed(size))
        )  # (N, W) and (N, H), from -1 to 1 inside a box
        height, width = size
        grid = torch.stack([x[:, None].expand(-1, height, -1), y[:, :, None].expand(-1, -1, width)], -1)
        masks = F.grid_sample(logits.sigmoid(), grid, align_corners=False)[:, 0]
        return masks >= self.model.test_cfg.rcnn.mask_thr_binary


def _decode(coder: Any, anchors: Tensor, deltas: Tensor, size: tuple[int, int]) -> Tensor:
    """Boxes within a picture of that height and width; see mmdet's ``delta2bbox``, which branches on their number."""
    deltas = deltas * deltas.new_tensor(coder.stds) + deltas.new_tensor(coder.means)
    most = math.log(MOST_GROWTH)
    extent = anchors[:, 2:] - anchors[:, :2]
    centre = (anchors[:, :2] + anchors[:, 2:]) / 2 + deltas[:, :2] * extent
    half = extent * deltas[:, 2:].clamp(-most, most).exp() / 2
    height, width = size
    left_right, top_bottom = torch.stack([centre - half, centre + half], 1).unbind(2)
    return torch.stack([left_right.clamp(0, width), top_bottom.clamp(0, height)], 2).flatten(1)


def _suppress(boxes: Tensor, scores: Tensor, groups: Tensor, threshold: float, size: tuple[int, int]) -> Tensor:
    """Indices of boxes that no better one of their group covers, the surest first: groups are taken far apart."""
    apart = boxes + (groups * sum(size)).to(boxes.dtype)[:, None]
    return torch.ops.torchvision.nms(apart, scores, threshold)


def _align(extractor: nn.Module, maps: tuple[Tensor, ...], boxes: Tensor) -> Tensor:
    """Features (N, C, h, w) of each box, from the map that its size asks for; see mmdet's SingleRoIExtractor."""
    rois = F.pad(boxes, (1, 0))  # of picture 0
    levels = extractor.map_roi_levels(rois, len(extractor.roi_layers))
    found, order = [], []
    for level, (layer, map_) in enumerate(zip(extractor.roi_layers, maps)):
        here = (levels == level).nonzero()[:, 0]
        found.append(
            torch.ops.torchvision.roi_align(
                map_, rois[here], layer.spatial_scale, *layer.output_size, layer.sampling_ratio, layer.aligned
            )
        )
        order.append(here)
    return torch.cat(found)[torch.cat(order).argsort()]
