"""zoo.labels: which names a model's outputs have."""

import json
from types import SimpleNamespace

import pytest
import timm

from zoo import labels
from zoo.labels import label_names


@pytest.mark.parametrize(
    ("num_classes", "index", "name"),
    [
        (1000, 281, "tabby, tabby cat"),
        (11821, 1, "cell"),
        (21841, 5, "animal, animate being, beast, brute, creature, fauna"),
        (21842, 0, "tench, Tinca tinca"),
    ],
)
def test_imagenet(num_classes, index, name):
    names = label_names(SimpleNamespace(num_classes=num_classes))
    assert len(names) == num_classes and names[index] == name


def test_unknown():
    assert label_names(timm.create_model("test_convnext", num_classes=7)) is None
    assert label_names(timm.create_model("test_convnext", num_classes=0)) is None


def test_names_in_the_pretrained_cfg():
    model = SimpleNamespace(num_classes=2, pretrained_cfg={"label_names": ["cat", "dog"]})
    assert label_names(model) == ["cat", "dog"]
    model.num_classes = 3  # another head
    assert label_names(model) is None


def test_quickstart_names(tmp_path, monkeypatch):
    (tmp_path / "weights").mkdir()
    entries = [{"slug": "cat", "name": "cat", "group": "animals-nature", "hexcode": "1F408"}, {"name": "red apple"}]
    (tmp_path / "weights/quickstart_classes.json").write_text(json.dumps(entries), encoding="utf-8")
    monkeypatch.setattr(labels, "files", lambda package: tmp_path)
    labels._quickstart.cache_clear()
    try:
        model = SimpleNamespace(num_classes=2, pretrained_cfg={"tag": "quickstart_128"})
        assert label_names(model) == ["cat", "red apple"]
        model.num_classes = 1000  # another head
        assert label_names(model)[281] == "tabby, tabby cat"
    finally:
        labels._quickstart.cache_clear()


def test_the_packaged_names():
    from zoo.catalogue import DEFAULT_MODEL

    names = label_names(timm.create_model(DEFAULT_MODEL))
    assert len(names) >= 1000 and len(set(names)) == len(names)
    assert {"red apple", "dog face", "bicycle"} <= set(names)
