"""What is ViG's own: names of its checkpoints, and what its mixer sees."""

import pytest
import timm
import torch

from zoo.backbones.vig import GatedLinearMixer, checkpoint_filter_fn
from zoo.checkpoints import CheckpointError, create_model

# Our names back to those of the authors' hierarchical model in its oldest form.
OLD_NAMES = (
    ("stem.0.conv.", "patch_embed.0."),
    ("stem.0.norm.", "patch_embed.2."),
    ("stem.2.conv.", "patch_embed.5."),
    ("stem.2.norm.", "patch_embed.7."),
    (".downsample.conv.", ".downsample.1."),
    (".downsample.norm.", ".downsample.3."),
    (".norm1.", ".ln_1."),
    (".mixer.local.", ".self_attention.in_proj.0."),
    (".mixer.qkv.", ".self_attention.qkv_proj."),
    (".mixer.decay.", ".self_attention.gk_proj."),
    (".mixer.gate.", ".self_attention.g_proj."),
    (".mixer.norm_global.", ".self_attention.g_norm."),
    (".mixer.norm_local.", ".self_attention.l_norm."),
    (".mixer.proj.", ".self_attention.o_proj."),
    ("head.fc.", "head."),
)


def in_old_names(state):
    """A state dict as old checkpoints have it, with matrices as 1x1 convolutions."""
    renamed = {}
    for key, tensor in state.items():
        if key.startswith("stages."):
            _, stage, rest = key.split(".", 2)
            key = f"layers.{int(stage) - rest.startswith('downsample')}.{rest}"
        for ours, theirs in OLD_NAMES:
            key = key.replace(ours, theirs)
        linear = tensor.ndim == 2 and key.startswith("layers.")
        renamed[key] = tensor[:, :, None, None] if linear else tensor
    return renamed


def test_old_names_of_the_hierarchical_model():
    model = timm.create_model("test_vig_h")
    old = in_old_names(model.state_dict())
    assert not set(old) & set(model.state_dict()) - {"norm.weight", "norm.bias"}
    found = checkpoint_filter_fn(old, model)
    assert found.keys() == model.state_dict().keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in model.state_dict().items())


def test_blocks_beyond_the_depth_are_reported():
    state = {"patch_embed.proj.0.weight": torch.zeros(16, 3, 9, 9), "blocks.5.attn_norm.weight": torch.ones(32)}
    with pytest.raises(CheckpointError, match=r"blocks\.5"):
        create_model("test_vig", checkpoint=state)


@torch.inference_mode()
def test_a_token_sees_those_before_and_after_it():
    """Beyond the convolution's reach, by the decays of the direction: without them in one, that side goes dark."""
    torch.manual_seed(0)
    mixer = GatedLinearMixer(32, 2, 0.5, act=False)
    x = torch.randn(1, 1, 40, 32)
    first, last = x.clone(), x.clone()
    first[:, :, 0] += 1
    last[:, :, -1] += 1

    def change(other):
        return (mixer(other) - mixer(x))[0, 0, 20].abs().max().item()

    assert change(first) > 1e-5 and change(last) > 1e-5
    mixer.decay[1].bias[:16] = -1e6  # in order
    assert change(first) < 1e-7 and change(last) > 1e-5
    mixer.decay[1].bias[16:] = -1e6
    assert change(first) < 1e-7 and change(last) < 1e-7


def test_dims_that_the_heads_cannot_share():
    with pytest.raises(ValueError, match="dim is 20, expected a multiple of 2 x 3 heads"):
        GatedLinearMixer(20, 3, 0.5, act=False)
