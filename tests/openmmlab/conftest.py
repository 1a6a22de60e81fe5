"""Detectors and segmenters of configs, one training step and one prediction of them, on small random pictures."""

from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope

import zoo.openmmlab  # noqa: F401 (before mmdet and mmseg)


@pytest.fixture(autouse=True)
def one_thread():
    """Two threads on two busy cores wait for each other most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def dense():
    """What the tests of heads have in common."""
    return SimpleNamespace(build=build, pictures=pictures, step=step, predict=predict)


def build(config: Config):
    """The model of a config."""
    scope = config.default_scope
    if scope == "mmdet":
        from mmdet.utils import register_all_modules
    else:
        from mmseg.utils import register_all_modules
    register_all_modules(init_default_scope=False)
    _shrink(config.model)
    with DefaultScope.overwrite_default_scope(scope):
        model = MODELS.build(config.model)
        model.init_weights()  # before, some parameters of mmdet's detectors are memory as it was found
    return model


# What makes heads wide and slow, and what the tests take instead; by key.
SMALL = {"fc_out_channels": 32, "num_points": 64, "max_per_img": 20, "nms_pre": 50}


def _shrink(part):
    """Fewer boxes and points, narrower linear layers: the parts and how they fit stay as the config has them."""
    for child in part if isinstance(part, list) else part.values():
        if isinstance(child, dict | list):
            _shrink(child)
    if isinstance(part, dict):
        part.update({key: SMALL[key] for key in SMALL if isinstance(part.get(key), int) and part[key] > SMALL[key]})
        if part.get("type") == "SyncBN":  # needs a GPU
            part["type"] = "BN"
        if part.get("type") == "RandomSampler":
            part["num"] = 16
        if part.get("type") in ("UPerHead", "FCNHead"):
            part["channels"] = 16


def pictures(scope, *shapes, classes=80, annotated=True):
    """A batch as a dataloader gives it."""
    if scope == "mmdet":
        from mmdet.testing import demo_mm_inputs

        return demo_mm_inputs(
            len(shapes),
            [(3, *shape) for shape in shapes],
            num_items=[3] * len(shapes),
            num_classes=classes,
            with_mask=True,
            with_semantic=True,
        )
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    samples = []
    for shape in shapes:
        sample = SegDataSample(metainfo={"ori_shape": shape, "img_shape": shape, "pad_shape": shape})
        if annotated:
            sample.gt_sem_seg = PixelData(data=torch.randint(classes, (1, *shape)))
        samples.append(sample)
    return {"inputs": [torch.randint(256, (3, *shape), dtype=torch.uint8) for shape in shapes], "data_samples": samples}


def step(model, data, autocast=None):
    """One training step without an optimizer: finite losses, and gradients for all of the backbone."""
    model.train()
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        losses = model(**model.data_preprocessor(data, True), mode="loss")
    loss, _ = model.parse_losses(losses)
    loss.backward()
    assert torch.isfinite(loss) and loss > 0
    missing, total = [], 0.0
    for name, parameter in model.backbone.named_parameters():
        if parameter.grad is None:
            missing.append(name)
        else:
            assert torch.isfinite(parameter.grad).all(), name
            total += parameter.grad.abs().sum()
    assert not missing and total > 0
    return loss


@torch.no_grad()
def predict(model, data):
    """The predictions for a batch."""
    model.eval()
    return model(**model.data_preprocessor(data, False), mode="predict")
