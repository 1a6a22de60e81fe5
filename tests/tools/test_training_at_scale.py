"""Training on two processes (gloo, CPUs): the losses of one process, and going on after a kill -9 at a random step."""

import importlib.util
import json
import multiprocessing
import random
import re
import runpy
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

pytest.importorskip("accelerate", reason="training needs the train extra")

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

PRELOAD = ["zoo.tools.train_classifier", "zoo.tools.train_mllm", "zoo.tools.train_detector"]
PRELOAD += [f"{library}.{part}" for library in ("mmdet", "mmseg") for part in ("datasets", "models", "evaluation")]
QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart"
STEPS, SAVED = 6, 2  # of a run; between its checkpoints
# Sums of float32 in another order: 1e-6 in the first step, and Adam makes more of it with each.
CURVE, WEIGHTS = 1e-5, 1e-5


@pytest.fixture(scope="module")
def launch(tmp_path_factory):
    """Runs a tool of training on so many processes, and gives what they said.

    They are forked from a Python that has imported it and begun nothing. The last one is killed after so many steps.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    logs = tmp_path_factory.mktemp("logs")

    def run(tool, arguments, world=1, kill_after=None, **more):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        files = [logs / f"{rank}.txt" for rank in range(world)]
        processes = []
        for rank, file in enumerate(files):
            job = {"tool": tool, "arguments": arguments, "rank": rank, "world": world, "port": port, "log": file}
            if rank == world - 1:
                job["kill_after"] = kill_after
            place = str(Path(__file__).with_name("rank.py"))
            processes.append(context.Process(target=runpy.run_path, args=(place, {"JOB": job | more}), daemon=True))
            processes[-1].start()
        processes[-1].join(200)
        for process in processes:
            if kill_after:
                process.kill()  # what torchrun does when one has died
            process.join(200)
        said = [file.read_text() for file in files]
        ends = [process.exitcode for process in processes]
        assert ends[-1] == -9 if kill_after else not any(ends), "\n".join(text[-3000:] for text in said)
        return said[0]

    return run


def losses(output):
    """What TensorBoard shows; mmengine has a folder for each start."""
    found = {}
    for folder in sorted({file.parent for file in output.rglob("events.out.tfevents*")}):
        found |= {event.step: event.value for event in EventAccumulator(str(folder)).Reload().Scalars("loss")}
    return np.array([found[step] for step in sorted(found)])


def random_step():
    """Of those between the first checkpoint and the last step."""
    step = random.SystemRandom().randrange(SAVED + 1, STEPS)
    print(f"kill -9 after step {step}")
    return step


def assert_like(run, other):
    """The losses of each step, relative; and all weights, by the norm of their difference, relative."""
    (curve, weights), (expected, others) = run, other
    assert len(curve) == len(expected) == STEPS and weights.keys() == others.keys()
    flat, flat_others = (torch.cat([w[name].double().flatten() for name in weights]) for w in (weights, others))
    found = np.abs(curve / expected - 1).max(), ((flat - flat_others).norm() / flat_others.norm()).item()
    print("losses and weights differ by", *found)
    assert found[0] < CURVE and found[1] < WEIGHTS


def assert_same(run, other):
    """Bit for bit."""
    (curve, weights), (expected, others) = run, other
    assert curve.tolist() == expected.tolist() and weights.keys() == others.keys()
    assert all(torch.equal(weights[name], others[name]) for name in weights)


# --- classifiers


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Noisy ones of three colours."""
    root, noise = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for kind, count in (("train", 9), ("val", 3)):
        for name, colour in {"blue": (40, 60, 220), "green": (30, 200, 60), "red": (220, 40, 40)}.items():
            (root / kind / name).mkdir(parents=True)
            for number in range(count):
                pixels = np.clip(np.array(colour) + noise.normal(0, 40, (40, 40, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(root / kind / name / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def classify(launch, pictures):
    """Trains one without batch norm, whose SyncBatchNorm torch has on GPUs only; gives its losses and last weights."""

    def run(output, world=1, kill_after=None, compiler=None, **changes):
        values = {"model": "test_convnext", "train_data": pictures / "train", "val_data": pictures / "val"}
        values |= {"output": output, "img_size": 32, "crop_min": 0.5, "auto_augment": "rand-m5", "batch_size": 8}
        values |= {"steps": STEPS, "checkpoint_every": SAVED, "log_every": 1, "warmup": 2, "lr": 3e-3, "clip_grad": 1.0}
        values |= {"workers": 0, "cpu": True} | changes
        output.mkdir(exist_ok=True)
        file = output / "config.yaml"
        file.write_text(json.dumps(values, default=str))
        run.said = launch("train_classifier", [str(file)], world, kill_after, compiler=compiler)
        weights = torch.load(output / "last.pt", weights_only=True)["model"]
        return (losses(output), weights) if not kill_after else None

    return run


@pytest.fixture(scope="module")
def classifier(classify, tmp_path_factory):
    """A run on one process, and how many blocks it ran."""
    run = classify(tmp_path_factory.mktemp("one"))
    assert run[0][-1] < 0.8 * run[0][0]
    return run, int(re.search(r"(\d+) blocks", classify.said)[1])


def test_a_classifier_killed_under_ddp_goes_on_there(classify, classifier, tmp_path):
    options = {"ema_decay": 0.9, "grad_accum": 2}
    whole = classify(tmp_path / "whole", 2, **options)
    assert_like(whole, classifier[0])
    classify(tmp_path / "parts", 2, random_step(), **options)
    assert_same(classify(tmp_path / "parts", 2, **options), whole)
    averages = [load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts")]
    for name, expected in averages[0].items():
        assert torch.equal(averages[1][name], expected) and not torch.equal(whole[1][name], expected)


def test_a_classifier_killed_under_fsdp_goes_on_there_and_on_one_process(classify, classifier, tmp_path):
    classify(tmp_path / "two", 2, random_step(), fsdp=True)
    shutil.copytree(tmp_path / "two", tmp_path / "one")
    assert_like(classify(tmp_path / "one"), classifier[0])
    run = classify(tmp_path / "two", 2, fsdp=True, grad_checkpointing=True)
    assert_like(run, classifier[0])
    exported = load_file(tmp_path / "two" / "model.safetensors")
    assert all(torch.equal(exported[name], run[1][name]) for name in exported)


def test_activation_checkpointing_changes_nothing(classify, classifier, tmp_path):
    run = classify(tmp_path, grad_checkpointing=True)
    assert int(re.search(r"(\d+) blocks", classify.said)[1]) == 2 * classifier[1] > 0
    assert_same(run, classifier[0])


@pytest.mark.parametrize("fsdp", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_compilation_changes_nothing(classify, classifier, tmp_path, fsdp):
    assert_like(classify(tmp_path, 1 + fsdp, compile=True, fsdp=fsdp, compiler="aot_eager"), classifier[0])
    assert int(re.search(r"(\d+) graphs", classify.said)[1]) > 0


@pytest.mark.parametrize(
    ("override", "variable", "message"),
    [("precision=fp16", "", "precision fp32 or bf16, not fp16"), ("lr=1e-3", "true", "leave --use_fsdp out")],
)
def test_what_fsdp_does_not_go_with_is_one_sentence(
    pictures, tmp_path, monkeypatch, capsys, override, variable, message
):
    from zoo.tools.train_classifier import main

    monkeypatch.setenv("ACCELERATE_USE_FSDP", variable)
    values = {"model": "test_convnext", "train_data": pictures / "train", "val_data": pictures / "val", "steps": 1}
    (tmp_path / "a.yaml").write_text(json.dumps(values, default=str))
    assert main([str(tmp_path / "a.yaml"), "cpu=true", "fsdp=true", override]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


# --- detectors and segmenters

DENSE = """
_base_ = "{config}"
default_hooks = dict(logger=dict(interval=1), checkpoint=dict(interval=1))
log_processor = dict(window_size=1)
model = dict(
    backbone=dict(_delete_=True, type="ZooBackbone", model_name="test_convnext"),
    neck=dict(in_channels=[24, 32, 48, 64], out_channels=8, norm_cfg=dict(_delete_=True, type="GN", num_groups=2)),
)
train_dataloader = dict(
    batch_size={batch}, num_workers=0, persistent_workers=False, dataset=dict(data_root="{data}/")
)
val_dataloader = dict(batch_size=1, num_workers=0, dataset=dict(data_root="{data}/"))
train_cfg = dict(max_epochs=3, val_interval=3)
param_scheduler = [dict(type="ConstantLR", factor=1.0)]
export_half = False
load = [dict(type="LoadImageFromFile")]
augment = [dict(type="RandomFlip", prob=0.5), dict(type="RandomCrop", crop_size=(64, 64))]
"""
SEGMENTER = """
model["data_preprocessor"] = dict(size=(64, 64))
model["decode_head"] = dict(
    in_channels=[8] * 4, channels=8, dropout_ratio=0.0, norm_cfg=dict(_delete_=True, type="GN", num_groups=2)
)
load = [*load, dict(type="LoadAnnotations")]
train_dataloader["dataset"]["pipeline"] = [*load, *augment, dict(type="PackSegInputs")]
val_dataloader["dataset"]["pipeline"] = [*load, dict(type="PackSegInputs")]
"""
DETECTOR = """
model.update(
    rpn_head=dict(in_channels=8, feat_channels=8),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=8),
        bbox_head=dict(in_channels=8, fc_out_channels=8),
        mask_roi_extractor=dict(out_channels=8),
        mask_head=dict(in_channels=8, conv_out_channels=8),
    ),
)
load = [*load, dict(type="LoadAnnotations", with_bbox=True, with_mask=True)]
train_dataloader["dataset"]["pipeline"] = [*load, augment[0], dict(type="PackDetInputs")]
told = ("img_id", "ori_shape", "img_shape", "scale_factor")
val_dataloader["dataset"]["pipeline"] = [*load, dict(type="PackDetInputs", meta_keys=told)]
val_evaluator = dict(ann_file="{data}/annotations/instances_test.json")
"""


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """A square of one of two categories in each picture, with its box and its label map."""
    root, noise = tmp_path_factory.mktemp("scenes"), np.random.default_rng(0)
    (root / "annotations").mkdir()
    for split, count in (("train", 8), ("test", 2)):
        for folder in ("images", "labels"):
            (root / folder / split).mkdir(parents=True)
        images, annotations = [], []
        for number in range(count):
            pixels, labels = noise.integers(90, 130, (64, 64, 3), np.uint8), np.zeros((64, 64), np.uint8)
            left, top = (int(place) for place in noise.integers(0, 30, 2))
            pixels[top : top + 30, left : left + 30] = ((200, 40, 30), (30, 60, 210))[number % 2]
            labels[top : top + 30, left : left + 30] = 1 + number % 2
            Image.fromarray(pixels).save(root / f"images/{split}/{number}.jpg")
            Image.fromarray(labels).save(root / f"labels/{split}/{number}.png")
            images.append({"id": number, "file_name": f"{number}.jpg", "height": 64, "width": 64})
            sides = [left, top, left + 30, top, left + 30, top + 30, left, top + 30]
            box = {"bbox": [left, top, 30, 30], "area": 900, "segmentation": [sides], "iscrowd": 0}
            annotations.append({"id": number + 1, "image_id": number, "category_id": 1 + number % 2, **box})
        names = re.findall(r'^    "(.+)",$', (QUICKSTART / "scenes.py").read_text(), re.MULTILINE)
        categories = [{"id": number, "name": name} for number, name in enumerate(names, 1)]
        document = {"images": images, "annotations": annotations, "categories": categories}
        (root / f"annotations/instances_{split}.json").write_text(json.dumps(document))
    return root


@pytest.fixture(scope="module")
def dense(launch, scenes):
    """Trains a model without batch norm; gives its losses and weights."""
    pytest.importorskip("mmdet", reason="dense prediction needs the dense extra")
    pytest.importorskip("mmseg", reason="dense prediction needs the dense extra")

    def run(task, output, world=1, kill_after=None, *options):
        text = DENSE + (SEGMENTER if task == "segmenter" else DETECTOR) + "test_dataloader = val_dataloader\n"
        file = output.with_name(f"{output.name}_{task}.py")
        values = {"config": QUICKSTART / f"{task}_van_nano.py", "data": scenes, "batch": 4 // world}
        for name, value in values.items():
            text = text.replace(f"{{{name}}}", str(value))
        file.write_text(text + "test_evaluator = val_evaluator\n" * (task == "detector"))
        launch(f"train_{task}", [str(file), "--work-dir", str(output), *options], world, kill_after)
        return (losses(output), load_file(output / "model.safetensors")) if not kill_after else None

    return run


def test_a_segmenter_on_two_processes_is_that_of_one(dense, tmp_path):
    one = dense("segmenter", tmp_path / "one")
    assert one[0][-1] < 0.9 * one[0][0]
    assert_like(dense("segmenter", tmp_path / "two", 2), one)


def test_a_detector_killed_under_fsdp_goes_on_to_that_of_ddp(dense, tmp_path):
    one = dense("detector", tmp_path / "one")
    copies = dense("detector", tmp_path / "ddp", 2)
    difference = np.abs(copies[0] / one[0] - 1).max()
    print("losses differ by", difference)
    assert difference < 0.02  # boxes to learn from are drawn at random
    dense("detector", tmp_path / "fsdp", 2, random_step(), "--fsdp")
    assert_like(dense("detector", tmp_path / "fsdp", 2, None, "--fsdp"), copies)


# --- multimodal models


@pytest.fixture(scope="module")
def talk(launch, tmp_path_factory):
    """Trains LoRA and projector of a tiny multimodal model; gives its losses and what was trained."""
    pytest.importorskip("peft", reason="LoRA needs the mllm extra")
    folder = tmp_path_factory.mktemp("talk")
    spec = importlib.util.spec_from_file_location("tiny_vlm", Path(__file__).with_name("tiny_vlm.py"))
    tiny = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tiny)
    tiny.language_model(folder / "lm")
    tiny.data(folder)
    tiny.model(folder)
    records = json.loads((folder / "train.json").read_text())
    for record in records[::3]:  # so that the answers of processes have different lengths
        del record["conversations"][2:], record["kinds"][1:]
    (folder / "train.json").write_text(json.dumps(records))

    def run(output, world=1, kill_after=None, accelerate_fsdp=False, **changes):
        values = tiny.settings(folder, output) | {"stage": "instruct", "model": str(folder / "model"), "lora_rank": 4}
        values |= {"steps": STEPS, "checkpoint_every": SAVED, "export_half": False} | changes
        for key in ("tower", "tower_checkpoint", "stages", "image_size", "language_model"):
            del values[key]
        output.mkdir(exist_ok=True)
        file = output / "config.yaml"
        file.write_text(json.dumps(values))
        launch("train_mllm", [str(file)], world, kill_after, accelerate_fsdp=accelerate_fsdp)
        if kill_after:
            return None
        history = json.loads((output / "metrics.json").read_text())["history"]
        weights = load_file(output / "model" / "model.safetensors")
        trained = {name: weights[name] for name in weights if "lora_" in name or name.startswith("projector")}
        return np.array([entry["loss"] for entry in history if "loss" in entry]), trained

    return run


def test_a_multimodal_model_killed_under_ddp_or_fsdp_goes_on_there(talk, tmp_path):
    one = talk(tmp_path / "one")
    assert one[0][-1] < 0.9 * one[0][0] and len(one[1]) > 20
    whole = talk(tmp_path / "whole", 2)
    assert_like(whole, one)
    talk(tmp_path / "parts", 2, random_step())
    assert_same(talk(tmp_path / "parts", 2), whole)
    talk(tmp_path / "sharded", 2, random_step(), accelerate_fsdp=True)
    assert_like(talk(tmp_path / "sharded", 2, accelerate_fsdp=True, gradient_checkpointing=True), one)
