import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

pytest.importorskip("mmdet", reason="dense prediction needs the dense extra")
pytest.importorskip("mmseg", reason="dense prediction needs the dense extra")
pytest.importorskip("supervision", reason="drawing needs the dense extra")

import cv2
import torch
from pycocotools import mask as coco

import zoo
from zoo.checkpoints import save_checkpoint
from zoo.cli import app
from zoo.dense_cli import _name_segments
from zoo.detector import Detections, Detector
from zoo.drawing import draw_detections, draw_segmentation
from zoo.images import ImageError
from zoo.media import Video, find_media
from zoo.segmenter import Segmentation, Segmenter

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart"
BACKBONE = 'model["backbone"] = dict(_delete_=True, type="ZooBackbone", model_name="test_resnet")\n'
DETECTOR = """
model = dict(
    neck=dict(in_channels=[32, 48, 192, 96], out_channels=8),
    rpn_head=dict(in_channels=8, feat_channels=8),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=8),
        bbox_head=dict(in_channels=8, fc_out_channels=8),
        mask_roi_extractor=dict(out_channels=8),
        mask_head=dict(in_channels=8, conv_out_channels=8),
    ),
    test_cfg=dict(rcnn=dict(max_per_img=6)),
)
"""
SEGMENTER = """
model = dict(
    neck=dict(in_channels=[32, 48, 192, 96], out_channels=8), decode_head=dict(in_channels=[8] * 4, channels=8)
)
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Configs and random weights of tiny models, by task: what ``--config`` and ``--checkpoint`` take."""
    folder, found = tmp_path_factory.mktemp("tiny"), {}
    for task, changes, kind in (("detector", DETECTOR, Detector), ("segmenter", SEGMENTER, Segmenter)):
        config = folder / f"{task}.py"
        config.write_text(f'_base_ = "{QUICKSTART / f"{task}_van_nano.py"}"\n{changes}{BACKBONE}')
        torch.manual_seed(0)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("zoo.dense.load_checkpoint", lambda *_, **__: None)
            patch.setattr("zoo.dense._labels_of", lambda source: None)
            untrained = kind(config=config, checkpoint="none", device="cpu")
        state = untrained.model.state_dict()
        for key in state:
            if key.endswith(("fc_cls.weight", "conv_seg.weight")):
                state[key] *= 40  # sure of something, and not everywhere of the same
        weights = folder / f"{task}.safetensors"
        save_checkpoint(state, weights, metadata={"labels": json.dumps(untrained.labels)})
        found[task] = {"config": config, "checkpoint": str(weights)}
    return found


@pytest.fixture(scope="module")
def detector(tiny):
    return Detector(**tiny["detector"], score=0.0, device="cpu", batch_size=3)


@pytest.fixture(scope="module")
def segmenter(tiny):
    return Segmenter(**tiny["segmenter"], device="cpu", batch_size=3)


def noise(width, height, seed=0):
    random = np.random.default_rng(seed)
    small = random.integers(0, 255, (max(1, height // 16), max(1, width // 16), 3), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def test_detections_are_those_of_mmdet(detector):
    from mmdet.apis import inference_detector
    from mmengine.registry import DefaultScope

    picture = noise(250, 166)
    (found,) = detector.predict(picture)
    detector.model.cfg = detector.config
    with DefaultScope.overwrite_default_scope("mmdet"):
        theirs = inference_detector(detector.model, np.asarray(picture)[..., ::-1].copy()).pred_instances.numpy()
    assert len(found) == 6 and (np.diff(found.scores) <= 0).all()
    assert np.allclose(found.boxes, theirs.bboxes, atol=1e-4) and np.allclose(found.scores, theirs.scores, atol=1e-6)
    assert np.array_equal(found.labels, theirs.labels) and np.array_equal(found.masks, theirs.masks)
    assert found.masks.shape == (6, 166, 250) and found.masks.any()
    assert found.names == tuple(detector.labels[k] for k in found.labels) and detector.labels[14] == "elephant"


def test_segmentation_is_that_of_mmseg(segmenter):
    from mmengine.registry import DefaultScope
    from mmseg.apis import inference_model

    picture = noise(250, 166)
    (found,) = segmenter.predict([picture])
    segmenter.model.cfg = segmenter.config
    with DefaultScope.overwrite_default_scope("mmseg"):
        theirs = inference_model(segmenter.model, np.asarray(picture)[..., ::-1].copy()).pred_sem_seg.data[0]
    assert np.array_equal(found.labels, theirs.numpy()) and len(np.unique(found.labels)) > 1
    assert sum(found.shares().values()) == pytest.approx(1)
    assert list(found.shares().values()) == sorted(found.shares().values(), reverse=True)


SIZES = ((500, 333), (1, 1), (2000, 9), (3, 2000), (2000, 1500), (64, 48))


@pytest.mark.parametrize("task", ["detector", "segmenter"])
def test_any_size_alone_or_among_others(request, task):
    model = request.getfixturevalue(task)
    pictures = [noise(*size, seed) for seed, size in enumerate(SIZES)]
    broken = ImageError("frame 3", "cannot be decoded.")
    results = list(model.predict_all([*pictures[:3], broken, b"no picture", *pictures[3:]]))
    assert results[3].error is broken and "no picture" not in str(results[4].error) and results[4].error
    for size, result in zip(SIZES, results[:3] + results[5:]):
        (alone,) = model.predict(result.picture)
        assert result.picture.size == size
        if task == "segmenter":
            assert result.answer.labels.shape == size[::-1]
            assert (result.answer.labels == alone.labels).mean() > 0.999
        else:
            assert result.answer.masks.shape[1:] == size[::-1]
            assert np.allclose(result.answer.boxes, alone.boxes, atol=1e-2)
            assert (result.answer.boxes >= 0).all() and (result.answer.boxes <= [*size, *size]).all()
            assert (result.answer.boxes[:, 2:] > result.answer.boxes[:, :2]).all()
    with pytest.raises(ImageError):
        model.predict([pictures[0], b""])


def test_the_score_is_the_least_one(tiny, detector):
    picture = noise(200, 200)
    (everything,) = detector.predict(picture)
    score = float(np.median(everything.scores))
    (some,) = Detector(**tiny["detector"], score=score, device="cpu").predict(picture)
    assert 0 < len(some) < len(everything) and some.scores.min() >= score


def test_masks_without_boxes(detector):
    from mmdet.structures import DetDataSample
    from mmengine.structures import InstanceData

    masks = torch.zeros(1, 20, 30, dtype=torch.bool)
    masks[0, 4:9, 10:25] = True
    found = InstanceData(bboxes=torch.zeros(1, 4), scores=torch.ones(1), labels=torch.ones(1).long(), masks=masks)
    answer = detector._answer(DetDataSample(pred_instances=found), (30, 20))
    assert answer.boxes.tolist() == [[10, 4, 25, 9]] and answer.masks.sum() == 75
    with pytest.raises(ValueError, match="gives no instances"):
        detector._answer(DetDataSample(), (30, 20))


def test_classes_without_a_name(tiny):
    model = Segmenter(**tiny["segmenter"], labels=["background", "one"], device="cpu")
    (found,) = model.predict(noise(96, 64))
    last = int(found.labels.max())
    assert last > 1 and found.names[:2] == ("background", "one") and found.names[last] == f"class {last}"
    assert sum(found.shares().values()) == pytest.approx(1)


def test_the_pictures_are_prepared_as_for_the_evaluation(tiny, tmp_path):
    config = tmp_path / "config.py"
    steps = '[dict(type="Resize", scale=(96, 80)), dict(type="PackSegInputs")]'
    base = tiny["segmenter"]["config"]
    config.write_text(f'_base_ = "{base}"\ntest_dataloader = dict(dataset=dict(pipeline={steps}))\n')
    model = Segmenter(config=config, checkpoint=tiny["segmenter"]["checkpoint"], device="cpu")
    assert model._load(noise(64, 48))[1]["inputs"].shape == (3, 80, 96)


def test_refusals(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("zoo.checkpoints._lookalike", lambda *_: "")  # builds every model of the zoo
    with pytest.raises(FileNotFoundError, match="no quickstart detector on nothing"):
        zoo.Detector("nothing")
    with pytest.raises(FileNotFoundError, match="resnet18 has no packaged weights: give a checkpoint"):
        zoo.Segmenter("resnet18")
    with pytest.raises(FileNotFoundError, match="no config file"):
        zoo.Detector(config=tmp_path / "none.py")
    with pytest.raises(ValueError, match="is a config of mmseg, a detector needs one of mmdet"):
        zoo.Detector(**tiny["segmenter"])
    with pytest.raises(ValueError, match="missing"):
        zoo.Detector(config=tiny["detector"]["config"], checkpoint=tiny["segmenter"]["checkpoint"])
    with pytest.raises(ValueError, match="score must be between 0 and 1"):
        zoo.Detector(score=2)


def invoke(command, tiny, *arguments):
    files = tiny["detector" if command == "detect" else "segmenter"]
    options = ["--config", str(files["config"]), "--checkpoint", files["checkpoint"], "--device", "cpu"]
    return CliRunner().invoke(app, [command, *map(str, arguments), *options])


def write_video(path, frames=4, size=(64, 48)):
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 5, size)
    for number in range(frames):
        writer.write(np.full((size[1], size[0], 3), 40 * number, np.uint8))
    writer.release()
    return path


def test_detect_writes_coco_and_pictures(tiny, detector, tmp_path):
    (tmp_path / "in").mkdir()
    noise(120, 90).save(tmp_path / "in/a.png")
    (tmp_path / "in/b.jpg").write_bytes(b"damaged")
    write_video(tmp_path / "in/clip.mp4")
    result = invoke("detect", tiny, tmp_path / "in", "--json", "--score", "0", "--out", tmp_path / "out")
    assert result.exit_code == 1  # one of them was damaged
    document = json.loads(result.stdout)
    assert [Path(error["source"]).name for error in document["failed"]] == ["b.jpg"]
    names = [(Path(image["file_name"]).name, image.get("frame")) for image in document["images"]]
    assert names == [("a.png", None), *(("clip.mp4", number) for number in (1, 2, 3, 4))]
    assert document["categories"][0] == {"id": 1, "name": "airplane"}
    (found,) = detector.predict(str(tmp_path / "in/a.png"))
    first = [thing for thing in document["annotations"] if thing["image_id"] == 1]
    assert len(first) == len(found) > 0
    for row, thing in enumerate(first):
        left, top, width, height = thing["bbox"]
        assert np.allclose([left, top, left + width, top + height], found.boxes[row], atol=0.02)
        assert thing["category_id"] == found.labels[row] + 1 and thing["score"] == pytest.approx(
            found.scores[row], abs=1e-3
        )
        assert np.array_equal(coco.decode(thing["segmentation"]).astype(bool), found.masks[row])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.png", "clip.mp4"]
    drawn = np.asarray(Image.open(tmp_path / "out/a.png"))
    assert drawn.shape == (90, 120, 3) and (drawn != np.asarray(Image.open(tmp_path / "in/a.png"))).any()
    assert len(list(Video(str(tmp_path / "out/clip.mp4")))) == 4


def test_segment_writes_coco_and_pictures(tiny, segmenter, tmp_path):
    noise(120, 90).save(tmp_path / "a.png")
    result = invoke("segment", tiny, tmp_path / "a.png", "--json", "--out", tmp_path / "drawn.png")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    labels = np.zeros((90, 120), int)
    for thing in document["annotations"]:
        mask = coco.decode(thing["segmentation"]).astype(bool)
        labels[mask] = thing["category_id"]
        assert thing["area"] == mask.sum()
    assert np.array_equal(labels, segmenter.predict(str(tmp_path / "a.png"))[0].labels)
    assert document["categories"][0] == {"id": 0, "name": "background"}
    assert Image.open(tmp_path / "drawn.png").size == (120, 90)
    text = invoke("segment", tiny, tmp_path / "a.png", tmp_path / "none.png")
    assert text.exit_code == 1 and "%" in text.stdout and "none.png" in text.stderr
    wrong = invoke("segment", tiny, tmp_path / "a.png", "--out", tmp_path / "a.mp4")
    assert wrong.exit_code == 2 and "does not fit a picture" in wrong.stderr


def test_no_original_is_replaced(tiny, tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        noise(40, 30).save(tmp_path / folder / "a.png")
    files = [tmp_path / folder / "a.png" for folder in ("one", "two")]
    before = files[1].read_bytes()
    for arguments in ((files[1], "--out", files[1]), (*files, "--out", tmp_path / "two")):
        refused = invoke("segment", tiny, *arguments)
        assert refused.exit_code == 2 and "would replace" in refused.stderr
    assert files[1].read_bytes() == before
    result = invoke("segment", tiny, *files, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a-2.png", "a.png"]
    nothing = invoke("segment", tiny, tmp_path / "*.gif", "--out", tmp_path / "b.png")
    assert nothing.exit_code == 2 and "matches no picture" in nothing.stderr


def test_media_are_found(tmp_path):
    for folder in ("deep", ".hidden"):
        (tmp_path / "videos" / folder).mkdir(parents=True)
        clip = write_video(tmp_path / "videos" / folder / "clip.mp4")
    clip = tmp_path / "videos/deep/clip.mp4"
    noise(8, 8).save(tmp_path / "a.png")
    pictures, videos, failed = find_media([tmp_path / "videos", clip, tmp_path / "a.png", tmp_path / "*.gif"])
    assert pictures == [str(tmp_path / "a.png")] and videos == [str(clip)]
    assert [error.source for error in failed] == [str(tmp_path / "*.gif")]
    assert find_media([tmp_path / "videos/*/*.mp4"]) == ([], [str(clip)], [])
    assert find_media(["https://host/clip.mp4"]) == (["https://host/clip.mp4"], [], [])


def test_a_bad_frame_does_not_end_a_video(tmp_path, monkeypatch):
    path = str(write_video(tmp_path / "clip.mp4", frames=5))
    assert [int(frame.mean().round(-1)) for frame in Video(path)] == [0, 40, 80, 120, 160]

    class Failing:  # no subclass: freeing one of OpenCV's classes crashes Python
        original, number = cv2.VideoCapture, 0

        def __init__(self, source):
            self.capture = self.original(source)

        def __getattr__(self, name):
            return getattr(self.capture, name)

        def read(self):
            self.number += 1
            good, frame = self.capture.read()
            return (False, None) if self.number == 3 else (good, frame)

    video = Video(path)
    monkeypatch.setattr(cv2, "VideoCapture", Failing)
    frames = list(video)
    assert [isinstance(frame, ImageError) for frame in frames] == [False, False, True, False, False]
    assert "frame 3" in str(frames[2])
    monkeypatch.setattr(Failing, "read", lambda self: (False, None))
    (end,) = video
    assert "ends after 0 of 5 frames" in str(end)
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    with pytest.raises(ImageError, match="no video that can be read"):
        Video(str(tmp_path / "broken.mp4"))


@pytest.mark.parametrize("shade", [0, 255])
def test_drawings_are_seen_on_dark_and_light(shade):
    picture = Image.new("RGB", (200, 160), (shade,) * 3)
    mask = np.zeros((1, 160, 200), bool)
    mask[0, 60:120, 50:150] = True
    box = np.array([[50, 60, 150, 120]], np.float32)
    found = Detections(box, np.array([0.9], np.float32), np.array([3]), ("thing",), mask)
    drawn = np.asarray(draw_detections(picture, found)).astype(int)
    contrast = np.abs(drawn - shade).max(-1)
    assert contrast[90, 50] > 60 and contrast[90, 100] > 40 and contrast[140:, 160:].max() == 0
    nothing = Detections(box[:0], np.zeros(0, np.float32), np.zeros(0, int), (), None)
    assert np.array_equal(np.asarray(draw_detections(picture, nothing)), np.asarray(picture))
    drawn = np.asarray(draw_segmentation(picture, Segmentation(mask[0].astype(int), ("background", "thing"))))
    assert np.abs(drawn[70, 60].astype(int) - shade).max() > 60 and (drawn[10, 10] == shade).all()


def test_specks_of_a_class_are_coloured_but_not_named():
    picture = Image.new("RGB", (100, 100), "white")
    labels = np.zeros((100, 100), int)
    labels[20:22, 20:22] = 1  # 4 of 10,000 pixels
    speck = Segmentation(labels, ("background", "thing"))
    drawn = np.asarray(draw_segmentation(picture, speck)).astype(int)
    assert (drawn[20:22, 20:22] < 200).any() and (drawn != 255).any(-1).sum() == 4
    assert _name_segments(speck) == "nothing"
    labels[20:30, 20:30] = 1
    assert _name_segments(speck) == "thing 1.0%"
    assert (np.asarray(draw_segmentation(picture, speck)) != 255).any(-1).sum() > 100
