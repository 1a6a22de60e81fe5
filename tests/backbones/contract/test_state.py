"""Weights in and out: copies, state dicts, initialisation, factories, files."""

import copy
import pickle
import sys

import pytest
import timm
import torch
from torch import nn

from zoo.checkpoints import load_checkpoint, save_checkpoint


@pytest.fixture
def logits(pictures):
    def run(model):
        with torch.inference_mode():
            return model.eval()(pictures(2, 64))

    return run


def poison(model):
    """NaN everywhere, so that a tensor that is forgotten cannot pass by chance."""
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.fill_(float("nan"))
    return model


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies(make, logits, clone):
    model = make()
    twin, expected = clone(model), logits(model)
    assert torch.equal(logits(twin), expected)
    poison(twin)
    assert torch.equal(logits(model), expected)


def test_state_dict_round_trip(name, make, logits):
    model, other = make(), timm.create_model(name)
    assert not torch.equal(logits(other), logits(model))
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other), logits(model))


def test_state_dict_holds_all_tensors(make):
    """A buffer that a checkpoint leaves out would have to be made again after ``to_empty``."""
    model = make()
    tensors = {key for key, _ in [*model.named_parameters(), *model.named_buffers()]}
    assert set(model.state_dict()) == tensors


def test_init_weights_after_to_empty(name, logits):
    torch.manual_seed(0)
    model = poison(timm.create_model(name, device="meta").to_empty(device="cpu"))
    model.init_weights()
    fresh = timm.create_model(name).state_dict()
    for key, tensor in model.state_dict().items():
        assert tensor.isfinite().all(), key
        if tensor.is_floating_point() and tensor.numel() > 1000:  # drawn: alike in distribution
            assert tensor.std().item() == pytest.approx(fresh[key].std().item(), rel=0.2), key
        elif tensor.is_floating_point() and len(fresh[key].unique()) == 1:  # constant
            assert torch.equal(tensor, fresh[key]), key
    assert logits(model).isfinite().all()
    drawn = {key for key, tensor in fresh.items() if len(tensor.unique()) > 1}
    assert drawn and all(not torch.equal(model.state_dict()[key], fresh[key]) for key in drawn)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_factories(name, pictures, dtype):
    model = timm.create_model(name, device="cpu", dtype=dtype).eval()
    assert {tensor.dtype for tensor in model.state_dict().values() if tensor.is_floating_point()} == {dtype}
    assert model(pictures(1, 64).to(dtype)).dtype == dtype
    assert all(tensor.is_meta for tensor in timm.create_model(name, device="meta").state_dict().values())


def test_filter_keeps_our_names(make):
    """``checkpoint_filter_fn`` must exist, and not take a checkpoint of ours for one of the authors'."""
    for kwargs in ({}, {"num_classes": 0}):
        model = make(**kwargs)
        state = dict(sorted(model.state_dict().items()))  # safetensors does not keep the order
        filtered = sys.modules[type(model).__module__].checkpoint_filter_fn(state, model)
        assert filtered.keys() == state.keys()
        assert all(torch.equal(filtered[key], state[key]) for key in state)


@pytest.mark.parametrize("classes", [0, 5])
def test_headless_checkpoint(name, make, logits, tmp_path, classes):
    """What was saved without a head, or with another one, is fine for a model without a head, or with a new one."""
    model = make(num_classes=classes)
    save_checkpoint(model.state_dict(), tmp_path / "model.safetensors")
    headless = timm.create_model(name, num_classes=0)
    load_checkpoint(headless, tmp_path / "model.safetensors")
    model.reset_classifier(0)
    assert torch.equal(logits(headless), logits(model))


def test_timms_pretrained_file(name, make, logits, tmp_path):
    """timm loads our file itself, and adapts the head and the first convolution."""
    model = make()
    save_checkpoint(model.state_dict(), tmp_path / "model.safetensors")
    source = {"file": str(tmp_path / "model.safetensors")}
    loaded = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=source)
    assert torch.equal(logits(loaded), logits(model))
    other = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=source, num_classes=7, in_chans=1).eval()
    assert other(torch.randn(1, 1, 64, 64)).shape == (1, 7)
    block, expected = other.stages[1].blocks[0].state_dict(), model.stages[1].blocks[0].state_dict()
    assert all(torch.equal(block[key], expected[key]) for key in expected)


def test_save_for_hf(make, logits, tmp_path):
    """The folder that would be pushed to the Hub gives the model back, by timm alone."""
    model = make(num_classes=5)
    timm.models.save_for_hf(model, tmp_path, model_args={"drop_path_rate": 0.1})
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert loaded.num_classes == 5 and torch.equal(logits(loaded), logits(model))


def test_a_frozen_model_stays_frozen(make):
    model = make().requires_grad_(False)
    model.reset_classifier(3)
    assert not any(parameter.requires_grad for parameter in model.stages.parameters())
    assert isinstance(model.get_classifier(), nn.Linear) and model.get_classifier().out_features == 3
