"""Libraries that take timm models by name take ours; skipped where they are not installed."""

import math

import pytest
import torch

from zoo.checkpoints import create_model


def test_transformers(name, pictures):
    transformers = pytest.importorskip("transformers")
    config = transformers.TimmBackboneConfig(backbone=name, out_indices=[1, 3])
    backbone = transformers.TimmBackbone(config).eval()
    with torch.inference_mode():
        maps = backbone(pictures(1, 64, 96)).feature_maps
    expected = [
        (1, info["num_chs"], math.ceil(64 / info["reduction"]), math.ceil(96 / info["reduction"]))
        for info in create_model(name).feature_info[1::2]
    ]
    assert [tuple(feature.shape) for feature in maps] == expected


@pytest.mark.parametrize("decoder", ["FPN", "Unet", "UPerNet"])
def test_segmentation_models(name, pictures, decoder):
    smp = pytest.importorskip("segmentation_models_pytorch")
    model = getattr(smp, decoder)(f"tu-{name}", encoder_weights=None, classes=4).eval()
    with torch.inference_mode():
        assert model(pictures(1, 64, 96)).shape == (1, 4, 64, 96)
