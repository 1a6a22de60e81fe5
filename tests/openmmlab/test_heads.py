"""Heads that are not ours to configure: the libraries' own configs, with another backbone and its channels alone."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from mmengine.config import Config

from zoo.openmmlab import check_channels

FOUR = [8, 16, 24, 32]
# A config of the library, where its channels are, and the strides that the backbone gives.
DETECTORS = {
    "atss/atss_r50_fpn_1x_coco.py": None,
    "fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py": None,
    "deformable_detr/deformable-detr_r50_16xb2-50e_coco.py": [8, 16, 32],
    "dino/dino-4scale_r50_8xb2-12e_coco.py": [8, 16, 32],
}
SEGMENTERS = {
    "deeplabv3plus/deeplabv3plus_r50-d8_4xb4-80k_ade20k-512x512.py": {
        "decode_head": {"in_channels": 32, "c1_in_channels": 8},
        "auxiliary_head": {"in_channels": 24},
    },
    "segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py": {"decode_head": {"in_channels": FOUR}},
}
FAMILIES = ["test_van", "test_ravlt", "test_vig", "test_vig_h", "test_slab", "test_inline", "test_lightnet"]


def read(library, file):
    config = Config.fromfile(Path(find_spec(library).origin).parent / ".mim/configs" / file)
    config.default_scope = library
    return config


@pytest.mark.parametrize(
    "file", [pytest.param(file, marks=pytest.mark.slow if "dino" in file else []) for file in DETECTORS]
)
def test_detectors_of_mmdet(file, dense):
    config = read("mmdet", file)
    strides = DETECTORS[file]
    config.model.backbone = dict(type="ZooBackbone", model_name="test_van", strides=strides)
    config.model.neck.in_channels = FOUR[1:] if strides else FOUR
    check_channels(config.model)
    config.model.test_cfg.score_thr = 0.0  # an untrained head's scores are low
    model = dense.build(config)
    size = 224 if file.startswith("dino") else 64  # its 900 queries are chosen among as many places
    dense.step(model, dense.pictures("mmdet", (size, size), (size - 14, size)))
    (result,) = dense.predict(model, dense.pictures("mmdet", (size, size)))
    boxes = result.pred_instances.bboxes
    assert len(boxes) and boxes.shape[1] == 4 and torch.isfinite(boxes).all()
    assert (boxes[:, 2:] > boxes[:, :2]).all(1).any() and result.pred_instances.scores.max() > 0


@pytest.mark.parametrize("file", SEGMENTERS)
def test_segmenters_of_mmseg(file, dense):
    config = read("mmseg", file)
    config.model.pretrained = None
    config.model.backbone = dict(type="ZooBackbone", model_name="test_ravlt")
    for head, widths in SEGMENTERS[file].items():
        config.model[head].update(widths)
    check_channels(config.model)
    config.model.data_preprocessor.size = (64, 64)
    model = dense.build(config)
    classes = config.model.decode_head.num_classes
    model.train()
    losses = model(
        **model.data_preprocessor(dense.pictures("mmseg", (64, 64), (64, 64), classes=classes), True), mode="loss"
    )
    loss, _ = model.parse_losses(losses)
    loss.backward()
    stem = [x.grad for name, x in model.backbone.named_parameters() if "stem" in name]
    assert torch.isfinite(loss) and all(grad is not None and torch.isfinite(grad).all() for grad in stem)
    assert any(grad.abs().max() > 0 for grad in stem)
    (result,) = dense.predict(model, dense.pictures("mmseg", (40, 56), classes=classes))
    assert result.pred_sem_seg.data.shape == (1, 40, 56) and result.pred_sem_seg.data.max() < classes
    assert result.seg_logits.data.std() > 1e-4


def retinanet(name, dense):
    """Our RetinaNet, narrow, on a tiny backbone."""
    from zoo.openmmlab import channels

    config = Config.fromfile(Path(__file__).parents[2] / "configs/detection/retinanet_1x_van_b2.py")
    config.model.backbone.update(model_name=name, pretrained=False, drop_path_rate=0.1)
    config.model.neck.update(in_channels=list(channels(name, strides=[8, 16, 32])), out_channels=16)
    config.model.bbox_head.update(in_channels=16, feat_channels=16, stacked_convs=1)
    return dense.build(config)


@pytest.mark.parametrize("name", FAMILIES)
def test_autocast_of_every_family(name, dense):
    """bfloat16 in a detector, pictures of two sizes: finite, all gradients there, near the loss in float32."""
    model = retinanet(name, dense)
    data = dense.pictures("mmdet", (64, 96), (50, 61))
    torch.manual_seed(1)
    exact = dense.step(model, data)
    model.zero_grad()
    torch.manual_seed(1)  # the same paths are dropped
    assert dense.step(model, data, torch.bfloat16).item() == pytest.approx(exact.item(), rel=0.05)


@pytest.mark.parametrize("shapes", [[(333, 500)], [(1, 1)], [(24, 2000)], [(70, 40), (33, 95), (1, 64)]])
def test_odd_sizes_in_a_detector(shapes, dense):
    """Boxes inside each picture of a batch of mixed sizes, also of a single pixel."""
    model = retinanet("test_van", dense)
    model.bbox_head.test_cfg.score_thr = 0.0  # an untrained head is sure of nothing
    results = dense.predict(model, dense.pictures("mmdet", *shapes))
    for result, (height, width) in zip(results, shapes, strict=True):
        boxes, (x_scale, y_scale) = result.pred_instances.bboxes, (1.1, 1.2)  # of the demo's pictures
        assert len(boxes) and torch.isfinite(boxes).all() and boxes.min() >= 0
        assert boxes[:, 2].max() <= width / x_scale + 1e-3 and boxes[:, 3].max() <= height / y_scale + 1e-3


def test_prediction_is_the_same_alone_and_in_a_batch(dense):
    model = retinanet("test_van", dense)
    model.bbox_head.test_cfg.score_thr = 0.0
    data = dense.pictures("mmdet", (64, 64), (64, 64))
    together = dense.predict(model, data)
    for i in range(2):
        (alone,) = dense.predict(model, {key: [value[i]] for key, value in data.items()})
        torch.testing.assert_close(alone.pred_instances.bboxes, together[i].pred_instances.bboxes, rtol=1e-3, atol=1e-2)
