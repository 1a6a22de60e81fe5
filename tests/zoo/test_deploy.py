"""Models made ready for inference give the same outputs without norms and scales."""

import copy

import pytest
import timm
import torch
from timm.layers import LayerScale
from torch import nn

import zoo


def lively(name):
    """A model whose norms and scales do something."""
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 1.5)
                module.weight.normal_(1, 0.2)
                module.bias.normal_(0, 0.2)
            if isinstance(module, LayerScale):
                module.gamma.normal_(0, 0.5)
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.bias.normal_(0, 0.1)
    return model


@pytest.mark.parametrize("name", ["test_van", "test_ravlt"])
def test_the_same_outputs_without_norms_and_scales(name):
    model = lively(name)
    before = copy.deepcopy(model.state_dict())
    fused = zoo.fuse(model.train())
    assert not fused.training and model.training
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    left = [type(module) for module in fused.modules()]
    assert nn.BatchNorm2d not in left and LayerScale not in left
    assert sum(p.numel() for p in fused.parameters()) < sum(p.numel() for p in model.parameters())
    x = torch.randn(2, 3, 97, 131)
    with torch.inference_mode():
        expected = model.eval()(x)
        assert expected.std() > 1e-3
        torch.testing.assert_close(fused(x), expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())
        for ours, theirs in zip(
            fused.forward_intermediates(x, intermediates_only=True),
            model.forward_intermediates(x, intermediates_only=True),
            strict=True,
        ):
            assert (ours - theirs).norm() < 1e-5 * theirs.norm()


def test_a_fused_model_compiles_and_exports():
    fused, x = zoo.fuse(lively("test_van")), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = fused(x)
        compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), expected)
        torch.testing.assert_close(torch.export.export(fused, (x,)).module()(x), expected)


def test_models_of_timm_too():
    model = timm.create_model("repvgg_a0", num_classes=5).eval()
    with torch.inference_mode():
        x = torch.randn(1, 3, 64, 64)
        torch.testing.assert_close(zoo.fuse(model)(x), model(x), rtol=1e-3, atol=1e-4)
