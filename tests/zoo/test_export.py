"""Exported files give what the models give, at sizes that they were not exported with."""

import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from timm.layers import LayerScale
from torch import nn
from typer.testing import CliRunner

import zoo
from zoo.backbones.inline import convolve_each
from zoo.cli import app
from zoo.export import export
from zoo.kernels import bidirectional_gated_linear_attention
from zoo.kernels.decompositions import decompositions

onnxruntime = pytest.importorskip("onnxruntime", reason="needs the export extra")
pytest.importorskip("onnxscript", reason="needs the export extra")

SIZES = [(1, 97, 143), (3, 160, 224)]


def lively(model):
    """The model with layers and norms that all do something."""
    torch.manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 2)
            if isinstance(module, LayerScale):
                module.gamma.normal_(0, 0.5)
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.weight.normal_(0, module.weight[0].numel() ** -0.5)
    return model.eval()


def session(path):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


@pytest.fixture
def quick(monkeypatch):
    """Without the exporter's optimiser, which takes a third of the time."""
    monkeypatch.setattr(torch.onnx, "export", partial(torch.onnx.export, optimize=False))


def check(run, model, sizes):
    """That ``run`` and the model agree within 1e-4 of the largest number, for pictures that differ."""
    for batch, height, width in sizes:
        pictures = torch.randn(batch, 3, height, width)
        with torch.inference_mode():
            expected = model(pictures)
        expected = expected[0] if isinstance(expected, list) else expected
        found = torch.as_tensor(run(pictures))
        assert expected.std() > 0.05 and (batch == 1 or expected.std(0).max() > 0.05)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * expected.abs().max().item())


def test_a_classifier_for_any_number_and_size_of_pictures(tmp_path, quick):
    model = lively(timm.create_model("test_van", depths=(1, 1, 1, 1)))
    export(model, tmp_path / "van.onnx", dynamic=True)
    runs = session(tmp_path / "van.onnx")
    check(lambda x: runs.run(None, {"pictures": x.numpy()})[0], model, SIZES)
    assert [value.name for value in runs.get_outputs()] == ["outputs"]
    assert runs.get_inputs()[0].shape == ["batch", 3, "height", "width"]
    assert json.loads(runs.get_modelmeta().custom_metadata_map["preprocessing"])["input_size"] == [3, 160, 160]
    assert [path.name for path in tmp_path.iterdir()] == ["van.onnx"]


@pytest.mark.parametrize("name", ["test_ravlt", "test_lightnet", "test_slab", "test_inline", "test_vig"])
def test_the_first_stage_of_each_other_family(name, tmp_path, quick):
    """Whole models take minutes; docs/EXPORT.md has what they gave."""
    model = lively(timm.create_model(name, features_only=True, out_indices=(0,)))
    export(model, tmp_path / "model.onnx", dynamic=True)
    runs = session(tmp_path / "model.onnx")
    check(lambda x: runs.run(None, {"pictures": x.numpy()})[0], model, SIZES)


def test_a_classifier_for_one_size(tmp_path):
    model = lively(timm.create_model("test_inline_pvt", depths=(1, 1, 1, 1)))
    export(model, tmp_path / "model.onnx", (97, 143), 2)
    runs = session(tmp_path / "model.onnx")
    check(lambda x: runs.run(None, {"pictures": x.numpy()})[0], model, [(2, 97, 143)])


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("c++"), reason="needs a C++ compiler")
def test_a_package_of_aotinductor(tmp_path):
    model = lively(timm.create_model("test_van", features_only=True, out_indices=(0,)))
    export(model, tmp_path / "model.pt2", dynamic=True)
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt2"]
    run = torch._inductor.aoti_load_package(str(tmp_path / "model.pt2"))
    check(lambda x: run(x)[0], model, SIZES)


def test_gated_linear_attention_in_plain_operators():
    torch.manual_seed(0)
    plain = decompositions()[torch.ops.zoo.bidirectional_gated_linear_attention.default]
    for tokens in (1, 16, 255, 256, 700):
        q, k, v = torch.randn(3, 2, tokens, 2, 8)
        decays = -torch.rand(2, 2, tokens, 2, 8) * 3
        expected = bidirectional_gated_linear_attention(q, k, v, *decays)
        assert expected.std() > 0.1
        torch.testing.assert_close(plain(q, k, v, *decays), expected, rtol=1e-4, atol=1e-4)


class Convolver(nn.Module):
    """A kernel for each picture, which is a number of groups that depends on the batch; and a roll by the size."""

    def forward(self, x):
        kernels = x.mean((2, 3)).view(-1, 3, 1).expand(-1, 3, 9) * torch.arange(9.0)
        return convolve_each(x.permute(0, 2, 3, 1), kernels.flatten(1)).roll((x.shape[2] // 3, -1), (1, 2))


def test_groups_and_shifts_that_depend_on_the_input(tmp_path):
    network = nn.Sequential(nn.Conv2d(3, 3, 1), Convolver())
    export(network, tmp_path / "model.onnx", dynamic=True)
    runs = session(tmp_path / "model.onnx")
    check(lambda x: runs.run(None, {"pictures": x.numpy()})[0], network, [(1, 9, 11), (4, 20, 13)])


class Rigid(nn.Module):
    """As many heads of mmseg: ``int`` of a size fixes it."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, 2)

    def forward(self, x):
        x = self.conv(x)
        return nn.functional.interpolate(x, [int(edge) * 2 for edge in x.shape[2:]])


def test_what_cannot_be_exported_is_said_in_one_sentence(tmp_path):
    with pytest.raises(ValueError, match=r"model\.pb does not end in \.onnx or \.pt2"):
        export(nn.Identity(), tmp_path / "model.pb")
    with pytest.raises((ValueError, RuntimeError), match=r"one size of picture|cannot be made into a graph") as raised:
        export(Rigid(), tmp_path / "model.onnx", dynamic=True)
    assert "\n" not in str(raised.value)

    class Branching(Rigid):
        def forward(self, x):
            return self.conv(x) if x.sum() > 0 else x

    with pytest.raises(RuntimeError, match=r"^Branching cannot be made into a graph: .+\.$") as raised:
        export(Branching(), tmp_path / "model.onnx")
    assert "\n" not in str(raised.value) and not list(tmp_path.iterdir())


def test_the_command(tmp_path):
    result = CliRunner().invoke(app, ["export", "van_nano", str(tmp_path / "van.txt")])
    assert result.exit_code == 2 and result.stderr == f"zoo: {tmp_path / 'van.txt'} does not end in .onnx or .pt2.\n"
    result = CliRunner().invoke(app, ["export", "van_nano", "van.onnx", "--config", "x.py"])
    assert result.exit_code == 2 and "A classifier has no --config" in result.stderr


@pytest.mark.parametrize(
    ("options", "size", "batch", "dynamic"),
    [(["--size", "64", "--batch-size", "3"], 64, 3, False), (["--dynamic"], 224, 1, True)],
)
def test_the_command_exports_what_it_is_told(options, size, batch, dynamic, tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr("zoo.export.export", lambda *args, **chosen: written.append((*args, chosen)))
    for kind in ("Detector", "Segmenter"):
        monkeypatch.setattr(f"zoo.export_cli.{kind}", lambda *args, kind=kind, **chosen: (kind, *args, chosen))
    out, given = tmp_path / "model.onnx", {"config": Path("a.py"), "checkpoint": "a.pth", "device": "cpu"}
    dense = ["--config", "a.py", "--checkpoint", "a.pth"]
    for task, more in (("classify", []), ("detect", dense), ("segment", dense)):
        result = CliRunner().invoke(app, ["export", "van_nano", str(out), "--task", task, *options, *more])
        assert result.exit_code == 0 and result.stdout == f"Wrote {out}\n"
    (classifier, *_), (detector, *_), (segmenter, *_) = written
    assert isinstance(classifier, type(timm.create_model("van_nano")))
    assert detector == ("Detector", "van_nano", {**given, "score": 0}) and segmenter == ("Segmenter", "van_nano", given)
    assert [rest for _, *rest in written] == [[out, (size, size), batch, {"dynamic": dynamic}]] * 3


QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart"
BACKBONE = 'model["backbone"] = dict(_delete_=True, type="ZooBackbone", model_name="test_resnet", strides=[4, 8])\n'
CHANGES = {  # two levels, because each takes seconds to translate
    "detector": """
model = dict(
    neck=dict(in_channels=[32, 48], out_channels=8, num_outs=2),
    rpn_head=dict(in_channels=8, feat_channels=8, anchor_generator=dict(strides=[4, 8])),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=8, featmap_strides=[4, 8], finest_scale=5),
        bbox_head=dict(in_channels=8, fc_out_channels=8),
        mask_roi_extractor=dict(out_channels=8, featmap_strides=[4, 8], finest_scale=5),
        mask_head=dict(in_channels=8, conv_out_channels=8, num_convs=1),
    ),
    test_cfg=dict(rcnn=dict(max_per_img=60)),
)
""",
    "segmenter": """
model = dict(
    neck=dict(in_channels=[32, 48], out_channels=8, num_outs=2),
    decode_head=dict(in_channels=[8] * 2, in_index=[0, 1], feature_strides=[4, 8], channels=8),
)
""",
}


def untrained(task, folder, monkeypatch):
    """A tiny detector or segmenter that is sure of something."""
    config = folder / f"{task}.py"
    config.write_text(f'_base_ = "{QUICKSTART / f"{task}_van_nano.py"}"\n{CHANGES[task]}{BACKBONE}')
    torch.manual_seed(0)
    monkeypatch.setattr("zoo.dense.load_checkpoint", lambda *_, **__: None)
    monkeypatch.setattr("zoo.dense._labels_of", lambda source: None)
    kind = {"detector": zoo.Detector, "segmenter": zoo.Segmenter}[task]
    model = kind(config=config, checkpoint="none", device="cpu", **({"score": 0} if task == "detector" else {}))
    with torch.no_grad():
        for name, parameter in model.model.named_parameters():
            if name.endswith(("conv_seg.weight", "conv_logits.weight")):
                parameter.mul_(40)
            elif name.endswith("fc_cls.weight"):
                parameter.mul_(8)  # boxes have more than one class
    return model


def answers(model, task, picture):
    """What mmdet or mmseg make of a uint8 picture (3, H, W), RGB, at its own size."""
    from mmdet.structures import DetDataSample
    from mmseg.structures import SegDataSample

    size = tuple(picture.shape[1:])
    sample = (DetDataSample if task == "detector" else SegDataSample)(
        metainfo={"img_shape": size, "ori_shape": size, "scale_factor": (1.0, 1.0)}
    )
    with torch.inference_mode():
        (found,) = model.model.test_step({"inputs": [picture.flip(0)], "data_samples": [sample]})
    if task == "segmenter":
        return [found.pred_sem_seg.data.numpy()]
    found = found.pred_instances
    return [found.bboxes.numpy(), found.scores.numpy(), found.labels.numpy(), found.masks.numpy()]


@pytest.mark.parametrize("task", ["detector", "segmenter"])
def test_detectors_and_segmenters_with_all_that_follows_the_network(task, tmp_path, monkeypatch, quick):
    pytest.importorskip("mmdet", reason="dense prediction needs the dense extra")
    model = untrained(task, tmp_path, monkeypatch)
    export(model, tmp_path / "model.onnx", dynamic=True)
    runs = session(tmp_path / "model.onnx")
    edges = []  # of boxes
    for height, width in ((97, 160), (224, 130)):
        coarse = torch.rand(1, 3, 5, 7)
        picture = nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1).mul(255).byte()
        expected = answers(model, task, picture[0])
        found = runs.run(None, {"pictures": picture.float().numpy()})
        assert len(found) == len(expected) and len(expected[-1]) > 0 and len(np.unique(expected[-1])) > 1
        if task == "segmenter":
            (both,) = runs.run(None, {"pictures": torch.cat([picture.flip(1), picture]).float().numpy()})
            assert (both[1:] != found[0]).mean() < 1e-3 and (both[0] != both[1]).any()
        else:
            edges.extend((expected[0][:, 2:] - expected[0][:, :2]).prod(1) ** 0.5)
        for ours, theirs in zip(found, expected):
            assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
            if theirs.dtype == np.float32:
                np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-3)
            else:  # ties are broken as rounding has it
                assert (ours != theirs).mean() < 1e-3
    assert len(json.loads(runs.get_modelmeta().custom_metadata_map["labels"])) == (40 if task == "detector" else 41)
    if task == "detector":
        assert min(edges) < 10 < max(edges)  # features of both levels
        with pytest.raises(ValueError, match="one picture at a time, got a batch of 2"):
            export(model, tmp_path / "model.onnx", batch=2)
    else:
        model.model.test_cfg["mode"] = "slide"
        with pytest.raises(ValueError, match=r"see the whole picture .* got EncoderDecoder of mode 'slide'"):
            export(model, tmp_path / "model.onnx")
