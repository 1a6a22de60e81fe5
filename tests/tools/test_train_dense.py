import copy
import json
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

pytest.importorskip("mmdet", reason="dense prediction needs the dense extra")
pytest.importorskip("mmseg", reason="dense prediction needs the dense extra")

import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from pycocotools import mask as coco
from safetensors import safe_open
from safetensors.torch import load_file

from zoo.tools import test_dense, train_detector, train_segmenter
from zoo.tools.coco import clean_annotations
from zoo.tools.dense_runs import CheckLabels, SeededDataset, SeededSampler, check_data, prepare, read_config
from zoo.tools.quickstart.scenes import CATEGORIES

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart"
NAMES = ("square", "disc")
COMMON = """
model["backbone"] = dict(_delete_=True, type="ZooBackbone", model_name="test_resnet")
train_dataloader.update(batch_size=2, num_workers=0, persistent_workers=False)
val_dataloader = dict(batch_size=2, num_workers=0)
train_cfg = dict(max_epochs=2, val_interval=2)
param_scheduler = [dict(type="ConstantLR", factor=1.0)]
optim_wrapper = dict(optimizer=dict(lr=2e-3))
"""
DETECTOR = """
model = dict(
    neck=dict(in_channels=[32, 48, 192, 96], out_channels=8),
    rpn_head=dict(in_channels=8, feat_channels=8),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=8),
        bbox_head=dict(in_channels=8, fc_out_channels=8, num_classes=2),
        mask_roi_extractor=dict(out_channels=8),
        mask_head=dict(in_channels=8, conv_out_channels=8, num_classes=2),
    ),
)
train_dataloader = dict(dataset=dict(metainfo=dict(_delete_=True, classes=("square", "disc"))))
"""
SEGMENTER = """
model = dict(
    data_preprocessor=dict(size=(64, 64)),
    neck=dict(in_channels=[32, 48, 192, 96], out_channels=8),
    decode_head=dict(in_channels=[8] * 4, channels=8, num_classes=3),
)
train_dataloader = dict(dataset=dict(metainfo=dict(_delete_=True, classes=("background", "square", "disc"))))
"""


def scene(random, size=(72, 64)):
    """A picture with a square and a disc, and their masks."""
    picture = Image.fromarray(random.integers(90, 130, (size[1], size[0], 3), np.uint8))
    draw, masks = ImageDraw.Draw(picture), []
    for number, shape in enumerate(("rectangle", "ellipse")):
        x, y = int(random.integers(2, 12)) + 32 * number, int(random.integers(2, 36))
        mask = Image.new("1", size)
        for canvas, fill in ((draw, ["red", "yellow"][number]), (ImageDraw.Draw(mask), 1)):
            getattr(canvas, shape)((x, y, x + 22, y + 22), fill=fill)
        masks.append(np.asarray(mask))
    return picture, masks


def annotation(number, image, category, mask):
    code = coco.encode(np.asfortranarray(mask, np.uint8))
    return {
        "id": number,
        "image_id": image,
        "category_id": category,
        "bbox": coco.toBbox(code).tolist(),
        "area": int(mask.sum()),
        "iscrowd": 0,
        "segmentation": {"size": code["size"], "counts": code["counts"].decode()},
    }


@pytest.fixture
def data(tmp_path):
    """Scenes in the layouts that the quickstart configs read."""
    random = np.random.default_rng(0)
    for split, count in (("train", 6), ("test", 2)):
        images, annotations = [], []
        for folder in ("images", "labels"):
            (tmp_path / "scenes" / folder / split).mkdir(parents=True)
        for number in range(count):
            picture, masks = scene(random)
            picture.save(tmp_path / f"scenes/images/{split}/{number:06d}.jpg")
            labels = np.zeros(masks[0].shape, np.uint8)
            for category, mask in enumerate(masks, 1):
                labels[mask] = category
                annotations.append(annotation(len(annotations) + 1, number + 1, category, mask))
            Image.fromarray(labels).save(tmp_path / f"scenes/labels/{split}/{number:06d}.png")
            images.append({"id": number + 1, "file_name": f"{number:06d}.jpg", "height": 64, "width": 72})
        categories = [{"id": number, "name": name} for number, name in enumerate(NAMES, 1)]
        document = {"images": images, "annotations": annotations, "categories": categories}
        (tmp_path / "scenes/annotations").mkdir(exist_ok=True)
        (tmp_path / f"scenes/annotations/instances_{split}.json").write_text(json.dumps(document))
    return tmp_path / "scenes"


def write_config(data, task):
    """The quickstart config with a tiny model, on the data of this test."""
    base = (QUICKSTART / f"{task}_van_nano.py").read_text()
    base = base.replace('_base_ = "scenes.py"', "")
    shared = (QUICKSTART / "scenes.py").read_text().replace('"data/scenes/"', f"{str(data) + '/'!r}")
    base = base.replace("_base_.", "").replace("(384, 384)", "(64, 64)").replace("(448, 448)", "(64, 64)")
    whole = data.parent / f"{task}_base.py"
    whole.write_text(shared + base)
    changes = DETECTOR if task == "detector" else SEGMENTER
    path = data.parent / f"{task}.py"
    text = f'_base_ = "{whole.name}"\n{changes}{COMMON}'
    metainfo = 'val_dataloader["dataset"] = dict(train_dataloader["dataset"])\n'
    path.write_text(text + metainfo + "test_dataloader = val_dataloader\n")
    return str(path)


COMMANDS = {"detector": train_detector.main, "segmenter": train_segmenter.main}


@HOOKS.register_module()
class KilledInSecondEpoch(Hook):
    """Ends the process, as far as the run can tell, in the middle of its second epoch."""

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.epoch == 1 and batch_idx == 1:
            raise KeyboardInterrupt


@pytest.mark.parametrize("task", COMMANDS)
def test_a_killed_run_ends_as_an_uninterrupted_one(data, tmp_path, task, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(test_dense, "TIMED", 0.1)
    config, run = write_config(data, task), COMMANDS[task]
    assert run([config, "--work-dir", str(tmp_path / "whole")]) == 0
    killed = Path(config).with_name(f"{task}_killed.py")
    hooks = "custom_hooks = [*_base_.custom_hooks, dict(type='KilledInSecondEpoch')]"
    killed.write_text(f"{Path(config).read_text()}{hooks}\n")
    with pytest.raises(KeyboardInterrupt):
        run([str(killed), "--work-dir", str(tmp_path / "parts")])
    assert not (tmp_path / "parts/model.safetensors").exists()
    assert run([config, "--work-dir", str(tmp_path / "parts")]) == 0
    whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys() and all(torch.equal(whole[key], parts[key]) for key in whole)
    metrics = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("whole", "parts")]
    assert metrics[0] == metrics[1] and len(metrics[0]) >= 3
    assert run([config, "--work-dir", str(tmp_path / "parts")]) == 0  # nothing is left to do, and nothing is lost
    assert json.loads((tmp_path / "parts/metrics.json").read_text()) == metrics[0]
    assert list((tmp_path / "whole").rglob("events.out.tfevents*"))
    with safe_open(tmp_path / "whole/model.safetensors", "pt") as file:
        assert json.loads(file.metadata()["labels"])[-2:] == list(NAMES)
    unused = {"model.backbone.checkpoint": "not loaded, as all weights are given"}
    again = test_dense.evaluate(config, str(tmp_path / "whole/epoch_2.pth"), unused)
    assert again.pop("images_per_second") > 0
    assert {key: again[key] for key in metrics[0]} == pytest.approx(metrics[0], abs=1e-6)


def test_training_learns(data, tmp_path):
    config = write_config(data, "segmenter")
    options = ["train_cfg.max_epochs=8", "optim_wrapper.optimizer.lr=1e-2", "default_hooks.logger.interval=1"]
    assert train_segmenter.main([config, "--work-dir", str(tmp_path / "run"), "--cfg-options", *options]) == 0
    (log,) = (tmp_path / "run").rglob("scalars.json")
    losses = [record["loss"] for record in map(json.loads, log.read_text().splitlines()) if "loss" in record]
    assert len(losses) == 24 and np.mean(losses[-6:]) < 0.6 * np.mean(losses[:3])


def test_a_run_begins_with_given_weights_and_goes_on_from_its_own(data, tmp_path):
    options = {"load_from": "detector.pth", "val_dataloader.persistent_workers": True}
    config = read_config(write_config(data, "detector"), options)
    fresh = prepare(copy.deepcopy(config), tmp_path / "run")
    assert not fresh.resume and fresh.load_from == "detector.pth"
    assert not fresh.val_dataloader.persistent_workers  # PyTorch refuses it where there are no workers
    (tmp_path / "run").mkdir()
    (tmp_path / "run/last_checkpoint").write_text("epoch_1.pth")
    again = prepare(copy.deepcopy(config), tmp_path / "run")
    assert again.resume and again.load_from is None


def test_panoptic_annotations_are_taken_as_they_are(data, tmp_path):
    config = read_config(write_config(data, "detector"))
    (data / "annotations/panoptic.json").write_text('{"images": [], "annotations": [], "categories": []}')
    config.train_dataloader.dataset.update(type="CocoPanopticDataset", ann_file="annotations/panoptic.json")
    assert prepare(config, tmp_path / "run").train_dataloader.dataset.dataset.ann_file == "annotations/panoptic.json"


def test_missing_data_are_named(data, tmp_path, capsys):
    config = write_config(data, "detector")
    (data / "annotations/instances_train.json").unlink()
    assert train_detector.main([config, "--work-dir", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert "instances_train.json" in error and "build_quickstart_data scenes" in error
    assert train_segmenter.main([config, "--work-dir", str(tmp_path / "run")]) == 2
    assert "a config of mmdet, not of mmseg" in capsys.readouterr().err
    assert train_detector.main([str(tmp_path / "none.py")]) == 2
    assert "There is no config file" in capsys.readouterr().err
    config = read_config(config)
    config.train_dataloader.dataset = {
        "type": "RepeatDataset",
        "dataset": {"type": "CocoDataset", "ann_file": "a.json"},
    }
    with pytest.raises(FileNotFoundError, match=r"cocodataset\.org"):
        check_data(config, ("train_dataloader",))


def test_training_goes_on_without_what_is_broken(data, tmp_path):
    file = data / "annotations/instances_train.json"
    document = json.loads(file.read_text())
    document["annotations"][0]["category_id"] = 99
    document["annotations"][1]["segmentation"] = {"size": [8, 8], "counts": "P2"}
    empty = document["images"][1]["id"]
    document["annotations"] = [a for a in document["annotations"] if a["image_id"] != empty]
    file.write_text(json.dumps(document))
    (data / "images/train/000003.jpg").write_bytes(b"no picture")
    config = write_config(data, "detector")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert train_detector.main([config, "--work-dir", str(tmp_path / "run")]) == 0
    said = "\n".join(str(warning.message) for warning in caught)
    assert re.search(r"2 annotations of .* are left out: annotation 1 has the category 99", said)
    assert "annotation 2 has a mask of [8, 8], its picture is [64, 72]" in said
    assert re.search(r"000003\.jpg is left out", said)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("{", "is no JSON"),
        ("[]", "no list of images, annotations, categories"),
        ('{"images": [], "annotations": [], "categories": []}', "no pictures"),
        ('{"images": [{"id": 1}], "annotations": [], "categories": []}', "without 'height'"),
    ],
)
def test_useless_annotation_files(tmp_path, text, message):
    file = tmp_path / "a.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        clean_annotations(file)


def test_annotations_are_kept_or_left_out(data):
    file = data / "annotations/instances_train.json"
    document, problems = clean_annotations(file, NAMES)
    assert document == json.loads(file.read_text()) and not problems
    bad = json.loads(file.read_text())
    for place, change in enumerate(({"image_id": 77}, {"bbox": [0, 0, 0, 5]}, {"segmentation": [[1, 2, 3, 4]]})):
        bad["annotations"][place].update(change)
    file.write_text(json.dumps(bad))
    document, problems = clean_annotations(file)
    assert document["annotations"] == bad["annotations"][3:] and len(document["images"]) == 6
    assert [problem.split(" ", 2)[2][:9] for problem in problems] == ["is of pic", "has the b", "has a pol"]
    with pytest.raises(ValueError, match="no category cat"):
        clean_annotations(file, ("square", "cat"))


def test_labels_are_checked():
    check = CheckLabels(3)
    good = {"img": np.zeros((4, 5, 3)), "gt_seg_map": np.array([[0, 1, 2, 255, 1]] * 4)}
    assert check(good) is good
    with pytest.raises(ValueError, match="holds 3, 7, but the classes are 0 to 2"):
        check({**good, "gt_seg_map": np.array([[0, 3, 7, 1, 1]] * 4)})
    with pytest.raises(ValueError, match="is 5 x 3, the picture is 5 x 4"):
        check({**good, "gt_seg_map": np.zeros((3, 5))})


def test_the_quickstart_models_fit_their_backbones_the_scenes_and_the_package():
    from mmdet.utils import register_all_modules as register_detection
    from mmengine.registry import MODELS, DefaultScope
    from mmseg.utils import register_all_modules as register_segmentation

    register_detection(init_default_scope=False)
    register_segmentation(init_default_scope=False)
    sizes = {}
    for path in sorted(QUICKSTART.glob("*_*.py")):
        config = read_config(path)
        config.model.backbone.pretrained = False
        with DefaultScope.overwrite_default_scope(config.default_scope):
            model = MODELS.build(config.model)
        assert tuple(config.model.neck.in_channels) == model.backbone.out_channels
        assert list(config.classes) == [slug.replace("-", " ") for slug in CATEGORIES]
        classes = config.test_dataloader.dataset.metainfo.classes
        head = config.model.get("decode_head") or config.model.roi_head.bbox_head
        assert len(classes) == head.num_classes and classes == config.train_dataloader.dataset.metainfo.classes
        sizes[path.stem] = 2 * sum(parameter.numel() for parameter in model.state_dict().values())
    assert sorted(sizes) == [f"{task}_{name}" for task in COMMANDS for name in ("resnet18", "van_nano")]
    assert sizes["detector_van_nano"] + sizes["segmenter_van_nano"] < 16e6


class Noise(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return int(index), np.random.rand(), torch.rand(()).item()


def test_randomness_belongs_to_place_and_epoch():
    from mmengine.registry import DATASETS

    DATASETS.register_module(module=Noise, force=True)
    dataset = SeededDataset({"type": "Noise"})

    def epoch(number, seed=0):
        sampler = SeededSampler({"type": "DefaultSampler", "shuffle": True}, dataset, seed)
        sampler.set_epoch(number)
        return [dataset[place] for place in sampler]

    assert epoch(0) == epoch(0) and epoch(0) != epoch(1) and epoch(0) != epoch(0, seed=1)
    assert sorted(index for index, *_ in epoch(0)) == [0, 1, 2, 3]
    assert len({noise for _, noise, _ in epoch(0)}) == 4
