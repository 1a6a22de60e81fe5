"""The bodies of DeiT, whose features are tokens: what timm's suite does not ask of them."""

import pytest
import timm
import torch
from timm.layers import DropPath
from timm.optim import create_optimizer_v2
from torch.testing import assert_close

from zoo.checkpoints import load_checkpoint, save_checkpoint
from zoo.tools.conformance import zoo_models

NAMES = zoo_models("test_*_deit")


@pytest.mark.parametrize("size", [(1, 1), (33, 333), (97, 131)])
@torch.inference_mode()
def test_any_size(make, pictures, size):
    """Every part of a picture counts, also at its end, and pictures do not see each other."""
    model = make()
    picture = pictures(2, *size)
    expected = model(picture)
    rows, columns = (-(-length // 16) for length in size)
    maps = model.forward_intermediates(picture, intermediates_only=True)
    assert [tuple(y.shape) for y in maps] == [(2, model.embed_dim, rows, columns)] * 4
    other = picture.clone()
    other[1, :, -1, -1] += 30
    found = model(other)
    assert_close(found[0], expected[0], rtol=1e-4, atol=1e-4)
    assert (found[1] - expected[1]).abs().max() > 1e-3
    assert model(picture[:0]).shape == (0, model.num_classes)


@torch.inference_mode()
def test_features_only(name, make, pictures):
    """The last four maps of stride 16, as of timm's plain models."""
    model, picture = make(), pictures(2, 64, 96)
    features = timm.create_model(name, features_only=True).eval()
    features.model.load_state_dict(model.state_dict(), strict=False)  # it has no head
    assert features.feature_info.reduction() == [16] * 4
    expected = model.forward_intermediates(picture, intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(features(picture), expected, strict=True))


@torch.inference_mode()
def test_one_graph_for_all_sizes(make, pictures):
    model = make(depth=1)
    anything = torch.export.Dim.DYNAMIC  # an error if the model makes it a constant
    exported = torch.export.export(
        model, (pictures(2, 64, 96),), dynamic_shapes=({0: anything, 2: anything, 3: anything},)
    ).module()
    for size in [(3, 97, 131), (2, 33, 160), (1, 224, 40)]:
        assert_close(exported(pictures(*size)), model(pictures(*size)), rtol=1e-4, atol=1e-4)


def test_grad_checkpointing(make, pictures):
    model = make().double()
    gradients, runs = {}, []
    model.blocks[0].register_forward_pre_hook(lambda *_: runs.append(1))
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(pictures(2, 48, 64).double()).square().mean().backward()
        gradients[enable] = {key: x.grad.clone() for key, x in model.named_parameters()}
    assert len(runs) == 1 + 2
    for key, expected in gradients[False].items():  # InLine's residual is none of the class token, the last one's
        assert expected.abs().max() > 0 or key.startswith("blocks.3.attn.residual")
        assert_close(gradients[True][key], expected, msg=lambda m, key=key: f"{key}: {m}")


def test_drop_path_grows_linearly(make):
    rates = [m.drop_prob for m in make(drop_path_rate=0.3).blocks.modules() if isinstance(m, DropPath)]
    assert rates == pytest.approx([0, 0, 0.1, 0.1, 0.2, 0.2, 0.3, 0.3])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.inference_mode()
def test_autocast(make, pictures, dtype):
    model, picture = make(), pictures(1, 224)
    with torch.autocast("cpu", dtype):
        logits = model(picture)
    expected = model(picture)
    assert (logits.float() - expected).norm() < (0.05 if dtype == torch.bfloat16 else 0.01) * expected.norm()


def test_layer_decay(make):
    """The learning rate rises with every block, and positions have no weight decay."""
    model = make()
    optimizer = create_optimizer_v2(model, "sgd", lr=1.0, weight_decay=0.05, layer_decay=0.5)
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    scales = [{groups[id(p)]["lr_scale"] for p in block.parameters()} for block in model.blocks]
    assert [len(s) for s in scales] == [1] * 4 and sorted(scales, key=min) == scales and len(set(map(min, scales))) == 4
    assert groups[id(model.pos_embed)]["weight_decay"] == 0


@torch.inference_mode()
def test_checkpoints(name, make, pictures, tmp_path):
    model, picture = make(), pictures(1, 64)
    save_checkpoint(model.state_dict(), tmp_path / "model.safetensors")
    loaded = timm.create_model(name).eval()
    load_checkpoint(loaded, tmp_path / "model.safetensors")
    assert torch.equal(loaded(picture), model(picture))
    fresh = timm.create_model(name, device="meta").to_empty(device="cpu")
    fresh.init_weights()
    assert all(tensor.isfinite().all() for tensor in fresh.state_dict().values())
