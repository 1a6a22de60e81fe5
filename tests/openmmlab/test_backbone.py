"""ZooBackbone: maps, weights of the authors' detectors, freezing, odd sizes, errors."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from mmengine.registry import MODELS
from mmengine.runner.checkpoint import load_state_dict
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.testing import assert_close

import zoo
from zoo.checkpoints import CheckpointError
from zoo.openmmlab import ZooBackbone, channels, check_channels

GOLDEN = Path(__file__).parents[1] / "golden"
_spec = importlib.util.spec_from_file_location("golden_state", GOLDEN / "state.py")
golden = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(golden)

# What makes a detector's backbone of the authors of a model of ours, where it is none of ours.
ARGUMENTS = {
    "prepbn_swin_tiny": {"norm": "prepbn"},
    "prepbn_swin_small": {"model_name": "prepbn_swin_tiny", "norm": "prepbn", "depths": (2, 2, 18, 2)},
}
FAMILIES = ["test_van", "test_ravlt", "test_vig_h", "test_slab", "test_inline", "test_vig", "test_lightnet"]


def picture(seed, shape):
    normal = np.random.Generator(np.random.PCG64(seed)).standard_normal(shape)
    return torch.from_numpy(normal.astype(np.float32))


def noise(name):
    """How far rounding may take features from the authors', as in the tests of the classifiers."""
    files = {"ravlt_tiny": "RAVLT_T", "ravlt_base": "RAVLT_L", "ravlt_large": "RAVLT_L"}
    files |= {"prepbn_swin_small": "prepbn_swin_tiny"}
    (path,) = GOLDEN.glob(f"[!d]*/{files.get(name, name)}.json")
    checks = golden.read_meta(path)["checks"]
    return max(2e-5, 5 * checks["fp32_vs_fp64_max_abs"] / checks["logits_std"])


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(path.stem, marks=[] if path.stem.endswith("tiny") else pytest.mark.slow)
        for path in sorted((GOLDEN / "dense").glob("*.json"))
    ],
)
def test_the_authors_detectors(name):
    """The backbone of a whole detector's checkpoint loads strictly, and gives the authors' maps."""
    path = GOLDEN / f"dense/{name}.json"
    meta = golden.read_meta(path)
    state = {f"backbone.{key}": torch.from_numpy(array) for key, array in golden.make_state(meta).items()}
    detector = {"state_dict": {**state, "neck.fpn_convs.0.conv.weight": torch.zeros(1)}, "meta": {"epoch": 12}}
    args = {"model_name": name, "checkpoint": detector, **ARGUMENTS.get(name, {})}
    backbone = ZooBackbone(**args).eval()
    assert sum(parameter.numel() for parameter in backbone.parameters()) == meta["params"]
    assert list(backbone.out_channels) == [shape[1] for shape in meta["features"]["shapes"]]
    if not path.with_suffix(".npz").exists():
        return
    answers = np.load(path.with_suffix(".npz"))
    inputs = {"": picture(0, meta["input"]["shape"])}
    if name.endswith("tiny"):
        inputs["second_"] = picture(1, (1, 3, 256, 320))
    for which, x in inputs.items():
        with torch.inference_mode():
            maps = backbone(x)
        for i, features in enumerate(maps):
            flat = features.contiguous().numpy().ravel()
            sample, std = flat[np.linspace(0, flat.size - 1, 64).astype(np.int64)], answers[f"{which}feat{i}_std"]
            np.testing.assert_allclose(sample, answers[f"{which}feat{i}_sample"], rtol=0, atol=noise(name) * std)
            np.testing.assert_allclose(flat.mean(dtype=np.float64), answers[f"{which}feat{i}_mean"], atol=1e-5)
            np.testing.assert_allclose(flat.std(dtype=np.float64), std, rtol=1e-5)


def test_load_from_takes_the_authors_detectors():
    """mmengine's own loading, of a detector whose backbone is ours."""

    class Detector(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = ZooBackbone("ravlt_tiny")
            self.neck = nn.Linear(2, 2)

    meta = golden.read_meta(GOLDEN / "dense/ravlt_tiny.json")
    state = {key: torch.from_numpy(array) for key, array in golden.make_state(meta).items()}
    detector, neck = Detector(), {"neck.weight": torch.ones(2, 2), "neck.bias": torch.ones(2)}
    load_state_dict(detector, {f"backbone.{key}": x for key, x in state.items()} | neck, strict=True)
    expected = ZooBackbone("ravlt_tiny", checkpoint=state)
    for key, tensor in expected.state_dict().items():
        assert torch.equal(detector.backbone.state_dict()[key], tensor), key
    own = {key: tensor.clone() for key, tensor in detector.state_dict().items()}
    fresh = Detector()
    assert fresh.load_state_dict(own) == ([], [])  # in our names too
    with pytest.raises(RuntimeError, match=r"backbone\.output_norms\.3\.bias"):
        fresh.load_state_dict({key: x for key, x in own.items() if key != "backbone.output_norms.3.bias"})


@pytest.mark.parametrize("name", [*FAMILIES, "resnet18", "test_vit"])
def test_a_classifier_becomes_a_backbone(name, tmp_path):
    """The weights of a whole model, in a file, are those of the backbone; the maps are its own, normed or pyramids."""
    model = timm.create_model(name, num_classes=7).eval()
    torch.save({"model": model.state_dict()}, tmp_path / "model.pth")
    backbone = ZooBackbone(name, checkpoint=tmp_path / "model.pth").eval()
    x = picture(0, (2, 3, 64, 96))
    with torch.inference_mode():
        maps = backbone(x)
        own = model.forward_intermediates(x, intermediates_only=True, output_fmt="NCHW")
    assert backbone.strides == (4, 8, 16, 32) and channels(name) == backbone.out_channels
    for stride, dim, features in zip(backbone.strides, backbone.out_channels, maps, strict=True):
        assert features.shape == (2, dim, 64 // stride, 96 // stride)
    if name in ("resnet18", "test_van"):
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(maps, own[-4:], strict=True))
    if backbone.output_norms:
        eps = 1e-6 if name == "test_ravlt" else 1e-5
        for ours, theirs in zip(maps, own, strict=True):
            assert_close(
                ours.movedim(1, -1), nn.functional.layer_norm(theirs.movedim(1, -1), theirs.shape[1:2], eps=eps)
            )
    assert bool(backbone.output_norms) == (name in ("test_ravlt", "test_vig_h", "test_slab", "test_inline"))


def test_van_has_the_eps_of_its_authors_detectors():
    found = {module.eps for module in ZooBackbone("van_b0").modules() if isinstance(module, nn.LayerNorm)}
    assert found == {1e-5}


@pytest.mark.parametrize("name", ["test_van", "test_slab"])
def test_fused(name):
    """With norms merged the maps are the same, also where SLAB's detectors pad their windows."""
    args = {"dense": True} if name == "test_slab" else {}
    backbone = ZooBackbone(name, **args).train()
    for seed in range(3):  # statistics
        backbone(picture(seed, (2, 3, 72, 56)))
    fused, x = zoo.fuse(backbone.eval()), picture(5, (1, 3, 90, 61))
    assert sum(isinstance(module, _BatchNorm) for module in fused.modules()) == 0
    with torch.inference_mode():
        for ours, theirs in zip(fused(x), backbone(x), strict=True):
            assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_out_indices():
    x = picture(0, (1, 3, 64, 64))
    whole = ZooBackbone("test_ravlt").eval()
    some = ZooBackbone("test_ravlt", out_indices=(1, 2)).eval()
    state = {key: x for key, x in whole.state_dict().items() if key in some.state_dict()}
    some.load_state_dict(state)
    assert (some.out_channels, some.strides) == ((16, 24), (8, 16))
    assert not any("stages.3" in key for key in some.state_dict())
    with torch.inference_mode():
        assert all(torch.equal(a, b) for a, b in zip(some(x), whole(x)[1:3], strict=True))
    classifier = timm.create_model("test_ravlt").state_dict()
    ZooBackbone("test_ravlt", out_indices=(1, 2), checkpoint=classifier)  # stage 3 and the head are left out
    assert ZooBackbone("resnet18", out_indices=(0, 4)).strides == (2, 32)  # as timm counts
    assert ZooBackbone("resnet18", strides=(8, 32)).out_channels == (128, 512)
    assert ZooBackbone("test_vig", strides=(8, 32)).strides == (8, 32)
    assert ZooBackbone("test_vig", out_indices=(1, 3), pyramid_channels=8).out_channels == (8, 8)


@pytest.mark.parametrize("name", ["test_van", "test_vig", "resnet18"])
def test_frozen_stages(name):
    """Frozen are the stem and the first stages, gradients and statistics; the others learn."""
    backbone = ZooBackbone(name, frozen_stages=2, drop_path_rate=0.5).train()
    stages = {"resnet18": ["conv1", "bn1", "layer1", "layer2"]}.get(name, ["stem", "stages.0", "stages.1"])
    frozen = tuple(f"body.model.{stage}." for stage in stages)
    before = {key: x.clone() for key, x in backbone.state_dict().items() if key.startswith(frozen)}
    for key, parameter in backbone.named_parameters():
        assert parameter.requires_grad != key.startswith(frozen), key
    for key, module in backbone.named_modules():
        if f"{key}.".startswith(frozen):
            assert not module.training, key
    assert backbone.model.training
    sum(y.square().mean() for y in backbone(picture(0, (2, 3, 64, 64)))).backward()
    assert all(torch.equal(before[key], x) for key, x in backbone.state_dict().items() if key in before)
    assert [parameter.requires_grad for parameter in ZooBackbone(name).parameters()].count(False) == 0


def test_frozen_stem_alone():
    held = {
        key.split(".")[2]
        for key, x in ZooBackbone("test_van", frozen_stages=0).named_parameters()
        if not x.requires_grad
    }
    assert held == {"stem"}


def test_norm_eval():
    """Statistics stay, everything learns; of SLAB's norms too."""
    for name in ("test_van", "test_slab"):
        backbone = ZooBackbone(name, norm_eval=True).train()
        before = {key: x.clone() for key, x in backbone.named_buffers()}
        sum(y.square().mean() for y in backbone(picture(0, (2, 3, 64, 64)))).backward()
        assert all(torch.equal(before[key], x) for key, x in backbone.named_buffers())
        assert all(parameter.grad is not None for parameter in backbone.parameters())
        moving = ZooBackbone(name).train()
        moving(picture(0, (2, 3, 64, 64)))
        assert any(not torch.equal(x, y) for x, y in zip(moving.buffers(), before.values()))


def test_grad_checkpointing_and_drop_path():
    plain = ZooBackbone("test_ravlt").train()
    saving = ZooBackbone("test_ravlt", grad_checkpointing=True).train()
    saving.load_state_dict(plain.state_dict())
    assert all(stage.grad_checkpointing for stage in saving.model.stages)
    gradients = []
    for backbone in (plain, saving):
        sum(y.square().mean() for y in backbone(picture(0, (2, 3, 64, 64)))).backward()
        gradients.append([parameter.grad for parameter in backbone.parameters()])
    assert_close(*gradients)
    rates = [
        module.drop_prob
        for key, module in ZooBackbone("test_ravlt", drop_path_rate=0.3).named_modules()
        if key.endswith("drop_path1")
    ]
    assert max(rates) == pytest.approx(0.3)


def test_it_is_in_the_root_registry_and_keeps_its_weights():
    """Found from both libraries without a prefix; a Runner's init_weights leaves pretrained weights alone."""
    import mmdet.registry
    import mmseg.registry

    for registry in (MODELS, mmdet.registry.MODELS, mmseg.registry.MODELS):
        assert isinstance(registry.build({"type": "ZooBackbone", "model_name": "test_van"}), ZooBackbone)
    backbone = ZooBackbone("van_nano", pretrained=True)
    backbone.init_weights()
    expected = zoo.create_model("van_nano", pretrained=True).state_dict()
    assert all(torch.equal(x, expected[key]) for key, x in backbone.model.state_dict().items())


@pytest.mark.parametrize("name", [*FAMILIES, "resnet18"])
@pytest.mark.parametrize("shape", [(333, 500), (1, 1), (32, 2000)])
def test_odd_sizes(name, shape):
    """Maps of a size that rounds up, or for the pyramid of plain models of whole patches, and never NaN."""
    backbone = ZooBackbone(name).eval()
    with torch.inference_mode():
        maps = backbone(picture(0, (1, 3, *shape)))
    for stride, features in zip(backbone.strides, maps, strict=True):
        assert torch.isfinite(features).all() and features.std() > 1e-5
        expected = tuple(-(-side // stride) for side in shape)
        if name in ("test_vig", "test_lightnet"):
            expected = tuple(-(-side // 16) * 16 // stride if stride < 32 else -(-side // 32) for side in shape)
        assert tuple(features.shape[2:]) == expected


def test_errors(monkeypatch):
    with pytest.raises(ValueError, match=r"strides is \[8, 64\], but the model has maps of strides \[4, 8, 16, 32\]"):
        ZooBackbone("test_van", strides=(8, 64))
    monkeypatch.setattr("zoo.catalogue.CATALOGUE", {})  # which model a file looks made for has tests of its own
    with pytest.raises(ValueError, match=r"pretrained is 'open-mmlab://resnet50_v1c'.*set model.pretrained=None"):
        ZooBackbone("test_van", pretrained="open-mmlab://resnet50_v1c")
    with pytest.raises(ValueError, match=r"no model 'ravlt_smal'.*timm.list_models"):
        ZooBackbone("ravlt_smal")
    with pytest.raises(ValueError, match="frozen_stages is 5, but the model has 4 stages"):
        ZooBackbone("test_van", frozen_stages=5)
    with pytest.raises(CheckpointError, match=r"does not fit the model: .*missing"):
        ZooBackbone("test_van", checkpoint=timm.create_model("test_ravlt").state_dict())


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"neck": {"in_channels": [256, 512, 1024, 2048]}}, r"neck.in_channels is \[256, 512, 1024, 2048\], but"),
        ({"neck": [{"in_channels": [8, 16, 24]}, {"in_channels": 256}]}, r"neck.in_channels is \[8, 16, 24\]"),
        ({"decode_head": {"in_channels": [8, 16, 32], "in_index": [0, 1, 3]}}, None),
        ({"decode_head": {"in_channels": [8, 16, 24], "in_index": [0, 1, 3]}}, r"test_van puts out \[8, 16, 32\]"),
        ({"decode_head": {"in_channels": 32}, "auxiliary_head": [{"in_channels": 24, "in_index": 2}]}, None),
        (
            {"decode_head": {"in_channels": 32}, "auxiliary_head": {"in_channels": 23, "in_index": 2}},
            "set in_channels=24",
        ),
        ({"panoptic_head": {"in_channels": [8, 16, 24, 31]}}, "panoptic_head.in_channels"),
        ({"neck": {"in_channels": [8, 16, 24, 32]}, "decode_head": {"in_channels": [256] * 4}}, None),
    ],
)
def test_channels_are_checked(model, message):
    model = {"backbone": {"type": "ZooBackbone", "model_name": "test_van", "pretrained": True}, **model}
    if message is None:
        check_channels(model)
        return
    with pytest.raises(ValueError, match=message):
        check_channels(model)
    check_channels({**model, "backbone": {"type": "ResNet"}})  # not ours
