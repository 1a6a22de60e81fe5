"""RepBN and PRepBN: training, progress, merging, and use in other models."""

import pytest
import timm
import torch
from timm.layers import LayerNorm2d
from timm.utils import reparameterize_model
from torch import nn
from torch.testing import assert_close

import zoo
from zoo.backbones.layers.prepbn import ChannelAffine, PRepBN, RepBN, replace_layer_norms, set_prep_progress


def awaken(model):
    """Weights and statistics under which no part of a norm is neutral."""
    generator = torch.Generator().manual_seed(0)
    for key, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            noise = torch.randn(tensor.shape, generator=generator)
            if key.endswith("running_var"):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
            elif key.endswith(".bn.weight"):
                tensor.copy_(0.3 + 0.1 * noise)
            elif key.endswith(("alpha", "bias", "running_mean", "table")) or "embed" in key:
                tensor.copy_(0.3 * noise)
    return model


def test_training_is_the_formula():
    x = 3 * torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(0)) + 1
    norm = PRepBN(6).train()
    torch.nn.init.constant_(norm.rep_bn.alpha, 0.7)
    rep = (x - x.mean((0, 1))) / (x.var((0, 1), unbiased=False) + 1e-5).sqrt() + 0.7 * x
    layer = nn.functional.layer_norm(x, (6,))
    for step, share in [(0, 0.0), (25, 0.25), (100, 1.0), (400, 1.0)]:
        set_prep_progress(norm, step, 100)
        assert_close(norm(x), (1 - share) * layer + share * rep)
    norm.eval()
    assert_close(norm(x), norm.rep_bn.bn(x.reshape(-1, 6)).view(x.shape) + 0.7 * x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_under_autocast(dtype):
    x = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    norm = PRepBN(6).train()
    set_prep_progress(norm, 1, 4)
    exact = norm(x.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(norm(x).float(), exact, atol=0.05, rtol=0.02)


def test_progress_is_checked():
    with pytest.raises(ValueError, match="has no PRepBN"):
        set_prep_progress(nn.Linear(2, 2), 0, 10)
    with pytest.raises(ValueError, match="step is -1 of 10"):
        set_prep_progress(PRepBN(4), -1, 10)


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("test_slab", {"norm": "prepbn"}),
        ("test_slab", {"norm": "repbn"}),
        ("test_slab_pvt", {"norm": "prepbn"}),
        ("test_slab_cswin", {"norm": "prepbn"}),
        ("slab_deit_tiny", {"embed_dim": 24, "depth": 2}),
        ("prepbn_deit_tiny", {"embed_dim": 24, "depth": 2}),
    ],
)
@torch.no_grad()
def test_merged_equals_unmerged(name, kwargs):
    """At sizes with and without padding, and also the features; no RepBN and no statistics are left."""
    model = awaken(timm.create_model(name, **kwargs)).eval()
    merged = reparameterize_model(model)
    assert any(isinstance(module, RepBN) for module in model.modules())
    assert not any(isinstance(module, RepBN | PRepBN | nn.BatchNorm1d) for module in merged.modules())
    for size in ((64, 96), (97, 131)):
        x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
        assert model(x).std() > 1e-3
        assert_close(merged(x), model(x), rtol=1e-4, atol=1e-4)
        assert_close(merged.forward_features(x), model.forward_features(x), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_replace_layer_norms_of_a_timm_model():
    model = timm.create_model("test_vit").train()
    x = torch.randn(2, 3, 160, 160, generator=torch.Generator().manual_seed(0))
    expected = model(x)
    assert replace_layer_norms(model) is model
    set_prep_progress(model, 0, 10)
    assert_close(model(x), expected)
    set_prep_progress(model, 10, 10)
    assert (model(x) - expected).abs().max() > 1e-3
    with pytest.raises(ValueError, match="has no layer norm"):
        replace_layer_norms(nn.Linear(2, 2))


def test_a_vit_of_timm_trains_from_layer_norm_to_batch_norm_and_fuses():
    """DeiT-T's layers, a few of them: it learns all the way, and at inference every norm is one affine map."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=3, num_classes=4)
    model = replace_layer_norms(model).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    x, labels = torch.randn(8, 3, 32, 32), torch.arange(8) % 4
    losses = []
    for step in range(12):
        set_prep_progress(model, step, 8)
        loss = nn.functional.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    model.eval()
    fused = zoo.fuse(model)
    norms = (nn.LayerNorm, nn.BatchNorm1d, RepBN, PRepBN)
    assert not any(isinstance(module, norms) for module in fused.modules())
    assert sum(isinstance(module, ChannelAffine) for module in fused.modules()) == 7
    with torch.no_grad():
        assert model(x).std() > 0.1
        assert_close(fused(x), model(x), rtol=1e-4, atol=1e-4)


def test_norms_of_other_dimensions_stay():
    """timm's layer norm of maps (B, C, H, W) is a subclass of torch's, but not over the last dimension."""
    model = replace_layer_norms(timm.create_model("test_convnext"))
    assert any(isinstance(module, PRepBN) for module in model.modules())
    assert any(isinstance(module, LayerNorm2d) for module in model.modules())
    assert model.train()(torch.randn(2, 3, 64, 64)).shape == (2, 1000)
