"""The configs of detectors and segmenters: as their table says, buildable, and one of each head runs."""

import re
from pathlib import Path

import pytest
from mmengine.config import Config

from zoo.openmmlab import check_channels
from zoo.tools import dense_table
from zoo.tools.dense_configs import HEADS, RECIPES, config_text, widths_of

CONFIGS = Path(__file__).parents[2] / "configs"
FIRST = {recipe.head: file for file, recipe in RECIPES.items()}  # one of each head


def test_the_files_are_those_of_the_table():
    """`python -m zoo.tools.dense_configs` was run, and the README has a row for each."""
    found = {path.relative_to(CONFIGS).as_posix() for path in CONFIGS.glob("*tion/*.py")}
    assert found >= set(RECIPES) and len(RECIPES) > 50 and set(FIRST) == set(HEADS)
    readme = (CONFIGS / "README.md").read_text(encoding="utf-8")
    for file, recipe in RECIPES.items():
        assert (CONFIGS / file).read_text(encoding="utf-8") == config_text(recipe), file
        (row,) = re.findall(rf"^\| \[{Path(file).stem}\]\({file}\) \| (.*) \|$", readme, re.MULTILINE)
        head, published, parameters, macs = row.split(" | ")
        assert head == f"{HEADS[recipe.head]} {recipe.schedule}" and recipe.published in published
        assert re.fullmatch(r"\d+\.\d M", parameters) and re.fullmatch(r"\d+ G", macs)


@pytest.mark.parametrize("file", RECIPES)
def test_every_config(file):
    """It reads with all its bases, its parts fit together, and it says how to train."""
    config = Config.fromfile(CONFIGS / file)
    backbone, widths = config.model.backbone, list(widths_of(RECIPES[file].model))
    if RECIPES[file].head == "retinanet":
        assert backbone.strides == [8, 16, 32]
        widths = widths[1:]
    assert backbone.type == "ZooBackbone" and backbone.model_name == RECIPES[file].model
    if "neck" in config.model:
        assert config.model.neck.in_channels == widths
    else:
        reader = config.model.get("decode_head") or config.model.panoptic_head
        assert reader.in_channels == widths
        assert config.model.get("auxiliary_head", {}).get("in_channels", widths[2]) == widths[2]
    assert config.custom_imports.imports == ["zoo.openmmlab"] and config.default_scope in ("mmdet", "mmseg")
    length = {"1x": 12, "3x": 36, "50e": 50, "40k": 40000, "80k": 80000, "160k": 160000}[RECIPES[file].schedule]
    assert length in (config.train_cfg.get("max_epochs"), config.train_cfg.get("max_iters"))
    assert config.optim_wrapper.optimizer.lr in (1e-4, 2e-4, 6e-5)
    for loader in ("train_dataloader", "val_dataloader", "test_dataloader"):
        assert config[loader].dataset.pipeline and config[loader].batch_size
    bases = re.findall(r'"(\.\./_base_/\w+\.py)"', (CONFIGS / file).read_text(encoding="utf-8"))
    assert len(bases) == 4 and not any(
        "_base_ =" in (CONFIGS / file).parent.joinpath(base).read_text() for base in bases
    )


@pytest.mark.parametrize("head", HEADS)
def test_one_config_of_each_head_trains_and_predicts(head, dense):
    """With a tiny backbone: the whole model, one step forward and backward, and what it predicts."""
    config = Config.fromfile(CONFIGS / FIRST[head])
    config.model.backbone.update(model_name="test_van", pretrained=False)
    widths = [8, 16, 24, 32][head == "retinanet" :]
    readers = [
        config.model[name]
        for name in ("neck", "decode_head", "auxiliary_head", "panoptic_head")
        if name in config.model
    ]
    if "neck" in config.model:
        readers = readers[:1]
    for reader in readers:
        reader.in_channels = widths if isinstance(reader.in_channels, list) else 24
    check_channels(config.model)
    model = dense.build(config)
    classes = 150 if config.default_scope == "mmseg" else 80
    shapes = [(64, 64), (64, 64)] if config.default_scope == "mmseg" else [(64, 64), (50, 70)]
    dense.step(model, dense.pictures(config.default_scope, *shapes, classes=classes))
    results = dense.predict(model, dense.pictures(config.default_scope, (40, 56), classes=classes))
    (result,) = results
    if config.default_scope == "mmseg":
        assert result.pred_sem_seg.data.shape == (1, 40, 56) and result.seg_logits.data.shape == (150, 40, 56)
        assert result.seg_logits.data.std() > 1e-4
    elif head in ("panoptic_fpn", "mask2former"):
        assert result.pred_panoptic_seg.sem_seg.shape[-2:] == (40, 56)
        assert result.pred_panoptic_seg.sem_seg.max() > 0
    else:
        assert len(result.pred_instances) <= 100 and result.pred_instances.bboxes.shape[1] == 4
        assert hasattr(result.pred_instances, "masks") == (head != "retinanet")


def test_counts_of_the_readme():
    """Parameters by hand: the backbone's and those of the head; and the row of the README."""
    file = "segmentation/semantic_fpn_80k_ravlt_tiny.py"
    *_, parameters, macs = dense_table.row(RECIPES[file], CONFIGS)
    readme = (CONFIGS / "README.md").read_text(encoding="utf-8")
    assert re.search(rf"\({file}\).*\| {parameters} \| {macs} \|$", readme, re.MULTILINE)
    lateral = sum(channels * 256 + 256 for channels in (64, 128, 256, 512)) + 4 * (256 * 256 * 9 + 256)
    scale_heads = 4 * (256 * 128 * 9 + 256) + 3 * (128 * 128 * 9 + 256)
    assert parameters == f"{(13_347_328 + lateral + scale_heads + 128 * 150 + 150) / 1e6:.1f} M"
