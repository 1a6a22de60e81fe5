"""Configs that do not work are one sentence: programs of mmdet and mmseg, and YAML of the trainers."""

import pytest

pytest.importorskip("mmdet", reason="configs of detectors need the dense extra")
pytest.importorskip("mmseg", reason="configs of segmenters need the dense extra")

import zoo as package
from zoo.tools.train_classifier import load_config

DETECTOR = 'default_scope = "mmdet"\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model = dict(", "cannot be read as a config: SyntaxError"),
        ("model = nothing", "cannot be read as a config: NameError"),
        ('_base_ = "none.py"', "cannot be read as a config: "),
        ("", "has no dict called model"),
        ("model = dict()", "is a config of None, a detector needs one of mmdet"),
        (f'{DETECTOR}model = dict(type="NoSuchDetector")', "cannot be built: KeyError: NoSuchDetector is not in"),
        (f'{DETECTOR}model = dict(backbone=dict(type="ResNet"))', "cannot be built: "),
        (f'{DETECTOR}model = dict(type="ATSS")', "cannot be built: "),
    ],
    ids=["syntax", "name", "base", "empty", "no scope", "type", "half", "no arguments"],
)
def test_configs_of_detectors(folder, zoo, text, message):
    (folder / "c.py").write_text(text)
    result = zoo("detect", "a.png", "--config", "c.py", "--checkpoint", "w.pth", "--device", "cpu", code=2)
    assert message in result.stderr and result.stderr.count("\n") == 1


def test_a_config_of_another_kind_of_file(folder):
    (folder / "c.txt").write_text("model")
    with pytest.raises(ValueError, match="cannot be read as a config"):
        package.Detector(config="c.txt", checkpoint="w.pth", device="cpu")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [a", "c.yaml is no YAML: .* in line 1"),
        ("- a\n- b\n", "must hold `key: value` lines"),
        ("", "must hold `key: value` lines"),
        ("model: !!python/object/apply:os.system ['touch marker']\n", "is no YAML: could not determine a constructor"),
        ("model: \x07\n", "is no YAML: "),
        ("[" * 1200, "nested too deeply"),
        (f"model: a\nval_data: b\nlr: 1{'0' * 400}\n", "lr must be float"),
    ],
    ids=["unclosed", "list", "empty", "object", "control", "deep", "huge"],
)
def test_settings_of_the_trainer(folder, text, message):
    (folder / "c.yaml").write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        load_config("c.yaml")
    assert len(str(caught.value).splitlines()) == 1 and not (folder / "marker").exists()


def test_an_override_that_is_no_yaml(folder):
    (folder / "c.yaml").write_text("model: a\nval_data: b\ntrain_data: c\nsteps: 1\n")
    assert load_config("c.yaml", ["lr=0.5"]).lr == 0.5
    with pytest.raises(ValueError, match=r"override 'lr=\[1' is no YAML"):
        load_config("c.yaml", ["lr=[1"])
