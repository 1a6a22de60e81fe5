"""What may come in: any size, batch, memory layout, number of channels and floating-point dtype."""

import math

import pytest
import torch
from torch.testing import assert_close

SIZES = [(1, 1), (33, 333), (97, 131), (224, 96)]


@pytest.mark.parametrize("size", SIZES)
@torch.inference_mode()
def test_any_size(make, pictures, size):
    model = make()
    first, second = pictures(1, *size), pictures(1, *size, seed=1)
    for info, feature in zip(model.feature_info, model.forward_intermediates(first, intermediates_only=True)):
        expected = tuple(math.ceil(length / info["reduction"]) for length in size)
        assert feature.shape == (1, info["num_chs"], *expected)
    assert model.forward_features(first).shape == (1, model.num_features, *expected)
    logits = model(first)
    assert logits.shape == (1, model.num_classes) and logits.isfinite().all()
    assert (logits - model(second)).abs().max() > 1e-3


@torch.inference_mode()
def test_nothing_is_kept_of_another_size(make, pictures):
    model = make()
    small, large = pictures(2, 64), pictures(1, 97, 131)
    for picture in (small, large, small):
        assert torch.equal(model(picture), make()(picture))


@torch.inference_mode()
def test_every_corner_counts(make, pictures):
    """No part of an odd-sized picture is cut off, and rows are not taken for columns."""
    model = make()
    picture = pictures(1, 97, 163)
    expected = model(picture)
    for rows, columns in [(slice(0, 4), slice(0, 4)), (slice(93, 97), slice(0, 4)), (slice(0, 97), slice(161, 163))]:
        other = picture.clone()
        other[:, :, rows, columns] += 3
        assert (model(other) - expected).abs().max() > 1e-4
    assert (model(picture.transpose(2, 3)) - expected).abs().max() > 1e-3


@torch.inference_mode()
def test_pictures_do_not_see_each_other(make, pictures):
    """Statistics over the batch would let the second picture, which is far brighter, change the first."""
    model = make()
    batch = pictures(3, 64, 96)
    batch[1] *= 100
    alone = torch.cat([model(batch[i : i + 1]) for i in range(3)])
    assert_close(model(batch), alone, rtol=1e-4, atol=1e-4)
    assert_close(model(batch.flip(0)).flip(0), alone, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_an_empty_batch(make, pictures):
    model = make()
    assert model(pictures(0, 64)).shape == (0, model.num_classes)


@torch.inference_mode()
def test_eval_is_deterministic(make, pictures):
    model = make(drop_rate=0.5, drop_path_rate=0.5)
    picture = pictures(2, 64)
    assert torch.equal(model(picture), model(picture))


@torch.inference_mode()
def test_maps_are_channels_last(make, pictures):
    model = make()
    picture = pictures(2, 97, 131)
    last = picture.to(memory_format=torch.channels_last)
    for source in (picture, last):
        for feature in [model.forward_features(source), *model.forward_intermediates(source, intermediates_only=True)]:
            assert feature.is_contiguous(memory_format=torch.channels_last)
    assert_close(model(last), model(picture), rtol=1e-5, atol=1e-5)
    expected = model(picture)
    assert_close(model.to(memory_format=torch.channels_last)(last), expected, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_strided_pictures(make, pictures):
    """A crop is a view whose rows lie further apart."""
    model = make()
    crop = pictures(2, 100)[:, :, 10:74, 20:84]
    assert_close(model(crop), model(crop.clone()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 6])
@torch.inference_mode()
def test_channels(make, pictures, channels):
    model = make(in_chans=channels)
    picture = pictures(1, 64, channels=channels)
    assert model.in_chans == channels
    for channel in range(channels):  # every one counts
        other = picture.clone()
        other[:, channel] += 1
        assert (model(other) - model(picture)).abs().max() > 1e-4


@pytest.mark.parametrize("size", [224, 1024])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.inference_mode()
def test_autocast(make, pictures, dtype, size):
    model = make()
    picture = pictures(1, size)
    with torch.autocast("cpu", dtype):
        logits = model(picture)
    expected = model(picture)
    assert logits.isfinite().all()
    error = (logits.float() - expected).norm() / expected.norm()
    assert error < (0.05 if dtype == torch.bfloat16 else 0.01)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@torch.inference_mode()
def test_other_dtypes(make, pictures, dtype):
    model = make()
    picture = pictures(2, 64)
    expected = model(picture)
    logits = model.to(dtype)(picture.to(dtype))
    assert logits.dtype == dtype
    error = (logits.float() - expected).norm() / expected.norm()
    assert error < {torch.bfloat16: 0.05, torch.float16: 0.01, torch.float64: 1e-5}[dtype]


@pytest.mark.parametrize("level", [0.0, 1.0, -100.0, 100.0])
@torch.inference_mode()
def test_half_precision_of_flat_pictures(make, level):
    """A flat picture has no variance, and an epsilon below 6e-8 is 0 in float16."""
    logits = make().half()(torch.full((1, 3, 64, 64), level, dtype=torch.float16))
    assert logits.isfinite().all()


@pytest.mark.parametrize("autocast", [True, False])
@torch.inference_mode()
def test_half_precision_of_dead_and_of_large_activations(make, pictures, autocast):
    """Normalisers must survive branches whose activations are all far below zero, and large ones."""
    for shift in (-30.0, 30.0):
        model = make()
        for key, parameter in model.named_parameters():
            if key.endswith(("qkvo.bias", "qkv.bias")):
                parameter += shift
        expected = model(pictures(1, 64))
        if autocast:
            with torch.autocast("cpu", torch.float16):
                logits = model(pictures(1, 64))
        else:
            logits = model.half()(pictures(1, 64).half())
        assert logits.isfinite().all()
        assert (logits.float() - expected).norm() < 0.05 * expected.norm()
