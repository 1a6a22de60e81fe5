"""The published recipes: each loads and names models that can be built, and together they are all that is published."""

import re
from pathlib import Path

import pytest
import timm

from zoo.backbones.layers.prepbn import PRepBN
from zoo.catalogue import CATALOGUE
from zoo.tools.train_classifier import load_config

FOLDER = Path(__file__).parents[2] / "configs" / "classification"
FILES = sorted(FOLDER.glob("imagenet_*.yaml"))
RUNS = [
    pytest.param(path, overrides.split(), id=f"{path.stem} {overrides}".strip())
    for path in FILES
    for overrides in ["", *re.findall(r"^#   (model=.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)]
]
NO_RECIPE = {"van_b4", "van_b5", "van_b6"}  # none is published for ImageNet-1k


@pytest.mark.parametrize(("path", "overrides"), RUNS)
def test_a_recipe_builds_its_model(path, overrides):
    config = load_config(path, overrides)
    model = timm.create_model(config.model, num_classes=1000, drop_path_rate=config.drop_path, device="meta")
    assert model.pretrained_cfg["input_size"] == (3, config.img_size, config.img_size)
    progressive = any(isinstance(module, PRepBN) for module in model.modules())
    assert bool(config.prep_steps) == progressive
    assert 0 < config.min_lr <= config.lr and config.warmup_lr <= config.lr and config.lr < 1e-2


def test_every_published_model_has_a_recipe():
    models = [load_config(run.values[0], run.values[1]).model for run in RUNS]
    published = {entry.name for entry in CATALOGUE.values() if not entry.name.endswith("_nano")}
    assert len(models) == len(set(models)) and set(models) == published - NO_RECIPE


def test_the_readme_lists_the_recipes():
    text = (FOLDER.parent / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(imagenet_\w+)\.yaml`", text))
    assert named == {path.stem for path in FILES}
