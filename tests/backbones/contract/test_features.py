"""Feature maps and heads: subsets of stages, their formats, pooling, no classes."""

import pytest
import timm
import torch
from torch.testing import assert_close


@torch.inference_mode()
def test_features_only_equals_intermediates(make, pictures):
    """What detectors take is what the whole model computes on the way, and the last map is what it goes on with."""
    picture = pictures(2, 97, 131)
    model, features = make(), make(features_only=True)
    final, maps = model.forward_intermediates(picture)
    assert torch.equal(final, model.forward_features(picture))
    found = features(picture)
    assert len(found) == 4 and all(torch.equal(ours, theirs) for ours, theirs in zip(found, maps, strict=True))
    assert [feature.shape[1] for feature in found] == features.feature_info.channels()
    reductions = [info["reduction"] for info in model.feature_info]
    assert reductions in ([4, 8, 16, 32], [16] * 4) and features.feature_info.reduction() == reductions
    assert_close(model.forward_head(final), model(picture))


@pytest.mark.parametrize("indices", [(0,), (1, 3), (2,), (-1,), (0, 1, 2)])
@torch.inference_mode()
def test_out_indices(make, pictures, indices):
    picture = pictures(1, 64)
    every = make(features_only=True)(picture)
    subset = make(features_only=True, out_indices=indices)
    found = subset(picture)
    assert len(found) == len(indices)
    for feature, index in zip(found, indices):
        assert torch.equal(feature, every[index])
    if max(indices) == 0:
        assert len(subset.model.stages) == 1  # stages that are not needed are gone


@torch.inference_mode()
def test_output_formats(make, pictures):
    model, picture = make(), pictures(1, 64, 96)
    nchw = model.forward_intermediates(picture, intermediates_only=True)
    nhwc = model.forward_intermediates(picture, intermediates_only=True, output_fmt="NHWC")
    for first, last in zip(nchw, nhwc, strict=True):
        assert torch.equal(first, last.permute(0, 3, 1, 2))
    with pytest.raises(ValueError, match="output_fmt is 'NLC', expected 'NCHW' or 'NHWC'"):
        model.forward_intermediates(picture, output_fmt="NLC")


@torch.inference_mode()
def test_global_pool(make, pictures):
    picture = pictures(2, 64, 96)
    features = make().forward_features(picture)
    heads = {pool: make(num_classes=0, global_pool=pool)(picture) for pool in ("avg", "max", "")}
    assert_close(heads["avg"], features.mean((2, 3)))
    assert_close(heads["max"], features.amax((2, 3)))
    assert_close(heads[""], features)
    classified = make(global_pool="max", num_classes=7)
    assert_close(classified(picture), classified.get_classifier()(heads["max"]), rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_no_classes(make, pictures):
    model, headless, picture = make(), make(num_classes=0), pictures(2, 64)
    assert headless(picture).shape == (2, headless.num_features) == (2, headless.head_hidden_size)
    assert_close(headless(picture), model.forward_head(model.forward_features(picture), pre_logits=True))
    model.reset_classifier(0)
    assert torch.equal(model(picture), headless(picture)) and model.num_classes == 0


def test_sizes_of_the_pretrained_cfg(make):
    """What timm's tools read: sizes, names of the first convolution and the classifier."""
    model = make()
    cfg = model.pretrained_cfg
    assert timm.data.resolve_model_data_config(model)["input_size"] == cfg["input_size"]
    assert model.get_classifier() is model.get_submodule(cfg["classifier"])
    assert model.get_submodule(cfg["first_conv"]).in_channels == 3
