"""Feature pyramids for plain backbones: levels, names, gradients; of our models and of timm's."""

import pytest
import timm
import torch
from torch import nn
from torch.testing import assert_close

import zoo
from zoo.backbones.layers.pyramid import PyramidFeatures, SimpleFeaturePyramid

PLAIN = [
    ("test_vig", {}),
    ("test_lightnet", {}),
    ("inline_deit_tiny", {"embed_dim": 24, "num_heads": 6, "depth": 4}),
    ("slab_deit_tiny", {"embed_dim": 24, "depth": 4, "norm": "repbn"}),
    ("test_vit", {}),  # timm's own
]


def picture(height, width, channels=3, seed=0):
    return torch.randn(2, channels, height, width, generator=torch.Generator().manual_seed(seed))


def test_levels_are_those_of_the_paper():
    """Figure 2 of the paper, level by level."""
    torch.manual_seed(0)
    pyramid = SimpleFeaturePyramid(8, 6).double()
    x = picture(3, 5, 8).double()

    def norm(y):
        return nn.functional.layer_norm(y.movedim(1, -1), y.shape[1:2], eps=1e-6).movedim(-1, 1)

    def tail(level, y):
        first, last = (layer for layer in level if isinstance(layer, nn.Conv2d))
        assert (first.kernel_size, last.kernel_size) == ((1, 1), (3, 3))
        return norm(nn.functional.conv2d(norm(nn.functional.conv2d(y, first.weight)), last.weight, padding=1))

    def double(y, layer):
        assert layer.weight.shape[1] == y.shape[1] // 2
        return nn.functional.conv_transpose2d(y, layer.weight, layer.bias, stride=2)

    fine, half, same, coarse = pyramid.levels.values()
    maps = pyramid(x)
    assert [tuple(y.shape[2:]) for y in maps] == [(12, 20), (6, 10), (3, 5), (2, 3)]
    assert_close(maps[0], tail(fine, double(nn.functional.gelu(norm(double(x, fine[0]))), fine[3])))
    assert_close(maps[1], tail(half, double(x, half[0])))
    assert_close(maps[2], tail(same, x))
    assert_close(maps[3], tail(coarse, nn.functional.max_pool2d(nn.functional.pad(x, (0, 1, 0, 1), value=-99), 2)))


@pytest.mark.parametrize(
    ("strides", "in_stride", "sizes"),
    [((8, 64), 16, [12, 2]), ((32,), 8, [2]), ((16,), 16, [6]), ((1, 2), 4, [24, 12])],
)
def test_other_strides(strides, in_stride, sizes):
    maps = SimpleFeaturePyramid(8, 4, strides, in_stride)(picture(6, 6, 8))
    assert [y.shape for y in maps] == [(2, 4, size, size) for size in sizes]


@pytest.mark.parametrize(("channels", "stride", "in_stride"), [(8, 4, 14), (6, 4, 16), (8, 24, 16)])
def test_strides_are_checked(channels, stride, in_stride):
    message = f"stride of {stride} cannot be made of {channels} channels at stride {in_stride}"
    with pytest.raises(ValueError, match=message):
        SimpleFeaturePyramid(channels, 4, (stride,), in_stride)


@pytest.mark.parametrize(("name", "kwargs"), PLAIN)
def test_features_of_a_plain_model(name, kwargs):
    """Maps of the strides that are published, from the last map of the model, with a gradient for every weight."""
    torch.manual_seed(0)
    model = timm.create_model(name, features_only=True, feature_cls=PyramidFeatures, out_indices=(0, 1, 2, 3), **kwargs)
    assert model.feature_info.reduction() == [4, 8, 16, 32] and model.feature_info.channels() == [256] * 4
    maps = model.train()(picture(64, 96))
    assert [tuple(y.shape) for y in maps] == [(2, 256, size, size * 3 // 2) for size in (16, 8, 4, 2)]
    sum(y.square().mean() + y.mean() for y in maps).backward()
    assert not [key for key, x in model.named_parameters() if x.grad is None]
    assert all(isinstance(model.get_submodule(name), nn.Sequential) for name in model.feature_info.module_name())

    plain = timm.create_model(name, features_only=True, out_indices=(-1,), **kwargs)
    plain.model.load_state_dict(model.model.state_dict())
    with torch.no_grad():
        last = plain.eval()(picture(64, 96))[0]
        assert_close(model.eval().pyramid(last)[1], model(picture(64, 96))[1])


def test_some_levels_and_the_own_place():
    model = timm.create_model("test_vig", num_classes=0, device="meta", dtype=torch.bfloat16)
    features = PyramidFeatures(model, out_indices=2, out_channels=12)
    assert features.feature_info.reduction() == [16, 32] and list(features.pyramid.levels) == ["16", "32"]
    assert {(x.device.type, x.dtype) for x in features.parameters()} == {("meta", torch.bfloat16)}
    maps = features(torch.empty(1, 3, 64, 96, device="meta", dtype=torch.bfloat16))
    assert [tuple(y.shape) for y in maps] == [(1, 12, 4, 6), (1, 12, 2, 3)]


def test_a_checkpoint_is_that_of_the_model():
    whole = timm.create_model("test_vig")
    kwargs = {"features_only": True, "feature_cls": PyramidFeatures}
    features = zoo.create_model("test_vig", checkpoint=whole.state_dict(), **kwargs)
    assert all(torch.equal(x, whole.state_dict()[key]) for key, x in features.model.state_dict().items())


def test_a_model_with_a_pyramid_of_its_own_is_refused():
    with pytest.raises(ValueError, match=r"VAN has maps of strides \[4, 8, 16, 32\]: leave feature_cls out"):
        timm.create_model("test_van", features_only=True, feature_cls=PyramidFeatures)
