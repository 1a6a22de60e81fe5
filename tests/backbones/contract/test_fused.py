"""``zoo.fuse``, and timm's ``reparameterize_model``, of every family and body."""

import timm
import torch
from timm.layers import LayerScale
from timm.models import reparameterize_model
from torch import nn
from torch.testing import assert_close

import zoo
from zoo.backbones.layers.prepbn import PRepBN, RepBN
from zoo.tools.conformance import zoo_models

NAMES = zoo_models("test_*")


@torch.inference_mode()
def test_fused_equals_unfused(name, make, pictures):
    """Also at a size that is padded, and the maps; what can be folded is gone, of SLAB's models every norm."""
    model = make()
    slab = "slab" in name
    for fused in (zoo.fuse(model), reparameterize_model(model)):
        left = {type(module) for module in fused.modules()}
        assert not left & {nn.BatchNorm1d, nn.BatchNorm2d, RepBN, PRepBN, LayerScale}
        assert not slab or nn.LayerNorm not in left
        for picture in (pictures(2, 64, 96), pictures(1, 97, 131)):
            expected = model(picture)
            assert expected.std() > 1e-2
            assert_close(fused(picture), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
            for ours, theirs in zip(
                fused.forward_intermediates(picture, intermediates_only=True),
                model.forward_intermediates(picture, intermediates_only=True),
                strict=True,
            ):
                assert (ours - theirs).norm() < 1e-4 * theirs.norm()


@torch.no_grad()
def test_the_merge_of_the_patch_embedding_drops_no_term():
    """``y = BN(x + b) + alpha (x + b)``: the authors' own merge forgets alpha b."""
    model = timm.create_model("test_slab", dtype=torch.float64).eval()
    model.stem.conv.bias.normal_(3, 1)
    model.stem.norm.alpha.fill_(0.7)
    model.stem.norm.bn.running_mean.normal_()
    model.stem.norm.bn.weight.normal_(1, 0.3)
    model.stem.norm.bn.bias.normal_()
    x = torch.randn(2, 16, 24, 3, dtype=torch.float64)
    y = model.stem.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    expected = model.stem.norm.bn(y.flatten(0, 2)).view(y.shape) + 0.7 * y
    fused = zoo.fuse(model)
    assert isinstance(fused.stem.norm, nn.Identity)
    assert_close(fused.stem(x), expected, rtol=1e-12, atol=1e-12)
