"""Training: stochastic depth, gradient checkpointing, weight decay, layer decay, several processes."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from timm.layers import DropPath
from timm.optim import create_optimizer_v2
from torch.testing import assert_close

WORKER = Path(__file__).with_name("ddp_worker.py")


def gradients(model, picture):
    model.zero_grad()
    model(picture).square().mean().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def blocks_of(model):
    return [block for stage in model.stages for block in stage.blocks]


def test_drop_path_grows_linearly(make):
    blocks = blocks_of(make(drop_path_rate=0.3))
    for block, rate in zip(blocks, torch.linspace(0, 0.3, len(blocks)).tolist(), strict=True):
        rates = [module.drop_prob for module in block.modules() if isinstance(module, DropPath)]
        assert rates == pytest.approx([rate] * len(rates)) and (rates or rate == 0)


def test_drop_path_drops_whole_branches_of_single_pictures(make, pictures):
    model = make(drop_path_rate=0.5)
    batch = pictures(1, 64).repeat(16, 1, 1, 1)
    with torch.inference_mode():
        kept = model(batch)
        assert_close(kept, kept[:1].expand_as(kept), rtol=1e-4, atol=1e-4)
        for module in model.modules():
            module.training = isinstance(module, DropPath)  # batch norm would also differ in training mode
        torch.manual_seed(0)
        dropped = model(batch)
    assert len(dropped.mul(1e3).round().unique(dim=0)) > 4
    assert (dropped - kept).abs().max() > 1e-2


def test_without_drop_path_training_is_deterministic(make, pictures):
    model = make(drop_path_rate=0.0).train()
    batch = pictures(2, 64)
    assert torch.equal(model(batch), model(batch))


def test_grad_checkpointing(make, pictures):
    """It runs the blocks twice, and the gradients are the same."""
    model = make()
    picture = pictures(2, 97, 131)
    expected = gradients(model, picture)
    runs = []
    for block in blocks_of(model):
        block.register_forward_pre_hook(lambda *_: runs.append(1))
    for enable, times in [(True, 2), (False, 1)]:
        model.set_grad_checkpointing(enable)
        runs.clear()
        found = gradients(model, picture)
        assert len(runs) == times * len(blocks_of(model))
        for name in expected:
            assert expected[name].abs().max() > 0
            assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


def test_features_with_grad_checkpointing(make, pictures):
    model = make(features_only=True)
    picture = pictures(2, 64).requires_grad_()
    runs = []
    model.model.stages[0].blocks[0].register_forward_pre_hook(lambda *_: runs.append(1))

    def gradient():
        picture.grad = None
        sum(feature.square().mean() for feature in model(picture)).backward()
        return picture.grad

    expected = gradient()
    model.model.set_grad_checkpointing(True)
    assert expected.abs().max() > 0
    assert_close(gradient(), expected, rtol=1e-4, atol=1e-7)
    assert len(runs) == 1 + 2


def test_no_weight_decay_names_parameters(make):
    model = make()
    assert set(model.no_weight_decay()) <= {name for name, _ in model.named_parameters()}


def test_weight_decay_groups(make):
    """timm's factory decays every matrix and nothing of one dimension."""
    model = make()
    optimizer = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for key, parameter in model.named_parameters():
        exempt = parameter.ndim <= 1 or key in model.no_weight_decay()
        assert decay[id(parameter)] == (0 if exempt else 0.05), key


def test_layer_decay(make):
    """The learning rate never falls from the stem to the head, and rises with every block."""
    model = make()
    optimizer = create_optimizer_v2(model, "sgd", lr=1.0, weight_decay=0.05, layer_decay=0.5)
    scales = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    in_order = [scales[id(parameter)] for parameter in model.parameters()]
    assert in_order == sorted(in_order) and in_order[-1] == 1.0
    blocks = [{scales[id(parameter)] for parameter in block.parameters()} for block in blocks_of(model)]
    assert all(len(block) == 1 for block in blocks)
    assert all(max(earlier) < min(later) for earlier, later in itertools.pairwise(blocks))
    assert in_order[0] < min(blocks[0])


def test_one_optimizer_step_lowers_the_loss(name, pictures):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=4).train()
    optimizer = create_optimizer_v2(model, "adamw", lr=3e-3)
    batch, labels = pictures(8, 64), torch.arange(8) % 4
    losses = []
    for _ in range(12):
        loss = torch.nn.functional.cross_entropy(model(batch), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_distributed_data_parallel(name, make, pictures, tmp_path):
    """Two processes with half of the batch each get the gradients of one with all of it, and find none unused."""
    model = make(num_classes=7)
    torch.save({"state": model.state_dict(), "pictures": pictures(4, 64)}, tmp_path / "job.pt")
    processes = [
        subprocess.Popen(
            [sys.executable, str(WORKER), name, str(rank), str(tmp_path)], env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        for rank in range(2)
    ]
    assert [process.wait(timeout=240) for process in processes] == [0, 0]
    expected = gradients(model, pictures(4, 64))
    for rank in range(2):
        found = torch.load(tmp_path / f"gradients_{rank}.pt")
        assert found.keys() == expected.keys()
        for key in expected:
            assert_close(found[key], expected[key], rtol=1e-4, atol=1e-6, msg=lambda m, key=key: f"{key}: {m}")
