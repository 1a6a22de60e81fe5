"""Layer-wise learning rates and no-decay lists of mmengine's optimizers, from what the models say."""

import pytest
import torch
from mmengine.optim import build_optim_wrapper
from torch import nn

from zoo.openmmlab import ZooBackbone


class Detector(nn.Module):
    """A backbone of ours or of timm, and a neck."""

    def __init__(self, **kwargs):
        super().__init__()
        self.backbone = ZooBackbone(**kwargs)
        self.neck = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))


def groups(model, **paramwise_cfg):
    """(lr, weight decay) of every parameter of a model by its name."""
    optimizer = {"type": "AdamW", "lr": 0.1, "weight_decay": 0.05}
    config = {"constructor": "LayerDecayConstructor", "optimizer": optimizer, "paramwise_cfg": paramwise_cfg}
    wrapper = build_optim_wrapper(model, config)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = [
        (names[id(parameter)], (group["lr"], group["weight_decay"]))
        for group in wrapper.optimizer.param_groups
        for parameter in group["params"]
    ]
    assert len(found) == len(dict(found))  # each once
    assert len(wrapper.optimizer.param_groups) == len({settings for _, settings in found})  # not one per parameter
    return dict(found)


def test_layers_of_a_model_of_the_zoo():
    """test_ravlt has blocks 1, 1, 2, 1: five steps from the stem to the last, the stem one before."""
    found = groups(Detector(model_name="test_ravlt"), layer_decay=0.5, norm_decay_mult=0.0)
    places = {
        "stem.0.conv": 5,
        "stages.0.blocks.0.mlp.fc1": 4,
        "stages.2.blocks.0.mlp.fc1": 2,
        "stages.3.blocks.0.mlp.fc1": 0,
    }
    for place, steps in places.items():
        lr, decay = found[f"backbone.body.model.{place}.weight"]
        assert (lr, decay) == (pytest.approx(0.1 * 0.5**steps), 0.05), place
        assert found[f"backbone.body.model.{place}.bias"] == (lr, 0.0)
    assert found["backbone.output_norms.0.weight"] == (0.1, 0.0)  # norm_decay_mult: the pyramid is no part of the model
    assert found["neck.0.weight"] == (0.1, 0.05) == found["neck.0.bias"] and found["neck.1.weight"] == (0.1, 0.0)


@pytest.mark.parametrize(
    ("name", "listed", "first"),
    [
        ("test_slab", "relative_position_bias_table", "stem.conv.weight"),
        ("test_vig", "stem.3.table", "stem.0.conv.weight"),
        ("test_vit", "pos_embed", "patch_embed.proj.weight"),  # timm's
    ],
)
def test_no_weight_decay_as_the_model_says(name, listed, first):
    found = groups(Detector(model_name=name))
    tables = [pair for key, pair in found.items() if key.endswith(listed)]
    assert tables and all(pair == (0.1, 0.0) for pair in tables)
    assert found[f"backbone.body.model.{first}"] == (0.1, 0.05)  # layer_decay is 1 unless given


def test_frozen_parameters_are_left_out_and_rates_act():
    model = Detector(model_name="resnet18", frozen_stages=1)
    found = groups(model, layer_decay=0.8)
    assert set(found) == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert "backbone.body.model.layer1.0.conv1.weight" not in found
    rates = [found[f"backbone.body.model.layer{i}.0.conv1.weight"][0] for i in (2, 3, 4)]
    assert rates == sorted(rates) and rates[0] < rates[2] <= 0.1

    config = {"constructor": "LayerDecayConstructor", "optimizer": {"type": "SGD", "lr": 0.1}}
    wrapper = build_optim_wrapper(model, {**config, "paramwise_cfg": {"layer_decay": 0.8}})
    before = {name: x.detach().clone() for name, x in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    wrapper.step()
    for name, parameter in model.named_parameters():
        step = (before[name] - parameter).mean().item()
        assert step == pytest.approx(found[name][0] if name in found else 0.0, rel=1e-3), name


@pytest.mark.parametrize("layer_decay", [0, -1, 1.5])
def test_layer_decay_is_checked(layer_decay):
    with pytest.raises(ValueError, match=f"layer_decay is {layer_decay}, expected"):
        groups(Detector(model_name="test_van"), layer_decay=layer_decay)


def test_a_rate_is_needed():
    config = {"constructor": "LayerDecayConstructor", "optimizer": {"type": "AdamW"}}
    with pytest.raises(ValueError, match="no lr"):
        build_optim_wrapper(Detector(model_name="test_van"), config)
