"""The sizes that models are used at, and checkpoints of one size for models of another."""

import math

import pytest
import timm
import torch
from torch.testing import assert_close

from zoo.checkpoints import create_model
from zoo.tools.conformance import zoo_models

NAMES = zoo_models("test_*")
WITH_TABLES = ["test_vig", "test_slab", "test_slab_pvt", "test_slab_cswin", "test_slab_deit"]
WITH_TABLES += ["test_inline_pvt", "test_inline_deit"]


@pytest.mark.parametrize("size", [(224, 224), (384, 384), (512, 768), (1024, 1024)], ids=lambda size: f"{size[0]}")
@torch.inference_mode()
def test_sizes(make, pictures, size):
    """Maps of the right size from one end of the picture to the other, and no two places alike."""
    model = make()
    maps = model.forward_intermediates(pictures(1, *size), intermediates_only=True)
    for info, y in zip(model.feature_info, maps, strict=True):
        assert y.shape == (1, info["num_chs"], *(math.ceil(length / info["reduction"]) for length in size))
        assert y.isfinite().all() and y.std((2, 3)).min() > 1e-5


@pytest.mark.parametrize("tiny", WITH_TABLES)
@torch.inference_mode()
def test_a_checkpoint_of_another_size(tiny, pictures):
    """Loaded for 384 it gives what the model for 224 gives at 384: its tables are interpolated once, either way."""
    torch.manual_seed(0)
    small = timm.create_model(tiny, img_size=224).eval()
    for key, tensor in small.state_dict().items():
        if key.endswith(("table", "pos_embed")):
            tensor.normal_()
    large = create_model(tiny, checkpoint=small.state_dict(), img_size=384).eval()
    other = {key for key, tensor in large.state_dict().items() if tensor.shape != small.state_dict()[key].shape}
    assert other and all(key.endswith(("table", "pos_embed")) for key in other)
    picture = pictures(1, 384)
    expected = small.forward_features(picture)
    assert_close(large.forward_features(picture), expected, rtol=1e-4, atol=1e-4)
    for key, tensor in small.state_dict().items():
        if key in other:
            tensor.zero_()
    assert (small.forward_features(picture) - expected).norm() > 1e-3 * expected.norm()  # they count


@torch.inference_mode()
def test_the_384_models_take_checkpoints_of_224(pictures):
    """Swin's tables of relative positions are for its window, which is larger at 384; CSwin's stripes have none."""
    tiny = {"dim": 8, "depths": (1, 1, 3, 1), "num_heads": (1, 2, 2, 4)}
    kinds = ("inline", "inline", ("inline", "inline", "softmax"), "softmax")
    state = timm.create_model("inline_swin_base", attention=kinds, **tiny).state_dict()
    bias = "stages.2.blocks.2.mixer.relative_position_bias_table"
    ramp = torch.arange(13.0).expand(13, 13)  # by the distance of columns
    state[bias].copy_(ramp.reshape(-1, 1))
    large = create_model("inline_swin_base_384", checkpoint=state, attention=kinds, **tiny)
    resized = large.state_dict()[bias][:, 0].view(23, 23)
    assert_close(resized, resized[:1].expand(23, 23))
    assert (resized[0].diff() > 0).all() and abs(resized[0, 11] - 6) < 1e-4
    state = timm.create_model("inline_cswin_base", **tiny).state_dict()
    large = create_model("inline_cswin_base_384", checkpoint=state, **tiny).eval()
    logits = large(pictures(1, 384))
    assert logits.isfinite().all() and logits.std() > 1e-5
