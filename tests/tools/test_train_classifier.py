"""The trainer: settings, learning, resuming to the same weights, stopping in time, evaluating."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from timm.utils import ModelEmaV3

from zoo.tools import train_classifier as T

CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "classification").glob("*.yaml"))
COLOURS = {"blue": (40, 60, 220), "green": (30, 200, 60), "red": (220, 40, 40)}


@pytest.fixture(autouse=True)
def one_thread():
    """Two threads on two busy cores wait for each other most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Noisy pictures of three colours to train on and others to test on; sprites of the same classes."""
    root = tmp_path_factory.mktemp("data")
    noise = np.random.default_rng(0)
    for name, colour in COLOURS.items():
        for kind, count in (("train", 10), ("val", 4)):
            (root / "pictures" / kind / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(np.array(colour) + noise.normal(0, 40, (40, 40, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(root / "pictures" / kind / name / f"{i}.png")
        for kind, style in (("train", "one"), ("train", "two"), ("val", "three")):
            sprite = np.zeros((32, 32, 4), np.uint8)
            sprite[4:28, 4:28] = (*colour, 255)
            sprite[10:20, 10 if style == "one" else 12 : 20] = (250, 240, 200, 255)
            (root / "sprites" / kind / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(sprite).save(root / "sprites" / kind / name / f"{style}.png")
    slugs = [{"slug": name, "group": "warm" if name == "red" else "cold"} for name in COLOURS]
    (root / "classes.json").write_text(json.dumps(slugs))
    return root


def settings(folders, output, kind="pictures", **changes):
    return T.Config(
        **{
            "model": "test_resnet",
            "train_data": str(folders / kind / "train"),
            "val_data": str(folders / kind / "val"),
            "data": {"pictures": "folder"}.get(kind, kind),
            "output": str(output),
            "img_size": 32,
            "workers": 0,
            "batch_size": 8,
            "steps": 6,
            "lr": 2e-3,
            "warmup": 2,
            "ema_decay": 0.9,
            "log_every": 2,
            "cpu": True,
        }
        | changes
    )


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_are_valid(path):
    config = T.load_config(path)
    assert path.stem.endswith(config.model)
    assert config.output.endswith(path.stem)


def test_quickstart_configs_differ_in_the_model_alone():
    configs = [T.load_config(path) for path in CONFIGS if path.stem.startswith("quickstart")]
    assert len({config.model for config in configs}) == 3
    assert len({dataclasses.replace(config, model="", output="") for config in configs}) == 1


def test_config_overrides_and_numbers(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("model: test_resnet\ntrain_data: a\nval_data: b\nsteps: 3\nlr: 1e-3\n")
    config = T.load_config(file, ["lr=5e-4", "batch_size=12", "drop_path=0.1", "train_data=7"])
    assert (config.lr, config.batch_size, config.drop_path, config.steps) == (5e-4, 12, 0.1, 3)
    assert config.train_data == "7"
    assert T.load_config(file).lr == 1e-3


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("learning_rte=1", "unknown key 'learning_rte'"),
        ("batch_sise=1", "did you mean 'batch_size'"),
        ("batch_size=big", "batch_size must be int, not 'big'"),
        ("batch_size=true", "batch_size must be int, not True"),
        ("lr=fast", "lr must be float, not 'fast'"),
        ("compile=1", "compile must be bool, not 1"),
        ("precision=fp8", "precision must be one of fp32, bf16, fp16"),
        ("steps=0", "either epochs or steps"),
        ("epochs=3", "either epochs or steps"),
        ("mode=eval", "needs a checkpoint"),
        ("data=sprites", "sprites"),
        ("val_data=''", "must set 'val_data'"),
        ("steps", "must look like key=value"),
    ],
)
def test_wrong_settings_are_one_sentence(tmp_path, capsys, override, message):
    file = tmp_path / "a.yaml"
    file.write_text("model: test_resnet\ntrain_data: a\nval_data: b\nsteps: 3\nmixup: 0.1\n")
    assert T.main([str(file), override]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_missing_config_and_data_are_one_sentence(tmp_path, capsys):
    assert T.main([str(tmp_path / "no.yaml")]) == 2
    file = tmp_path / "a.yaml"
    file.write_text(yaml.safe_dump({"model": "test_resnet", "train_data": "/nowhere", "val_data": "b", "steps": 3}))
    assert T.main([str(file), "cpu=true"]) == 2
    assert "no folder at /nowhere" in capsys.readouterr().err


def test_learns_and_reports(folders, tmp_path):
    config = settings(folders, tmp_path / "o", steps=40, eval_every=20, classes=str(folders / "classes.json"))
    result = T.run(config)
    assert result["val"]["top1"] >= 75  # chance is 33
    assert result["val"]["count"] == 12
    assert {name: group["count"] for name, group in result["val"]["groups"].items()} == {"cold": 8, "warm": 4}
    assert json.loads((tmp_path / "o" / "metrics.json").read_text())["val"] == result["val"]
    with safe_open(tmp_path / "o" / "model.safetensors", "pt") as file:
        assert json.loads(file.metadata()["labels"]) == ["blue", "green", "red"]
        assert file.metadata()["model"] == "test_resnet"
    assert (tmp_path / "o" / "best.safetensors").exists()
    assert list((tmp_path / "o" / "tensorboard").iterdir())
    assert not list((tmp_path / "o").glob("*.part"))

    measured = T.run(
        dataclasses.replace(
            config, mode="eval", checkpoint=str(tmp_path / "o" / "model.safetensors"), output=str(tmp_path / "e")
        )
    )
    assert measured["val"] == result["val"]


def test_two_processes(folders, tmp_path):
    """They share the pictures of a step and of the evaluation, and keep the same weights."""
    config = settings(folders, tmp_path / "o", steps=20)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(dataclasses.asdict(config)))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, "-m", "zoo.tools.train_classifier", str(tmp_path / "c.yaml")],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step 20/20") == 1  # the main process alone reports
    result = json.loads((tmp_path / "o" / "metrics.json").read_text())
    assert result["step"] == 20 and result["device"] == "2 x CPU"
    assert result["val"]["count"] == 12 and result["val"]["top1"] >= 60


def test_learns_from_sprites(folders, tmp_path):
    result = T.run(settings(folders, tmp_path, "sprites", steps=40, batch_size=24, smoothing=0.1, export_half=True))
    assert set(result) >= {"white", "grey", "varied"}
    assert result["white"]["top1"] == 100
    weights = load_file(tmp_path / "model.safetensors")
    assert {value.dtype for value in weights.values() if value.is_floating_point()} == {torch.float16}


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("sprites", {"grad_accum": 2, "drop_path": 0.2, "smoothing": 0.1}),
        ("pictures", {"mixup": 0.4, "cutmix": 0.5, "auto_augment": "rand-m9-mstd0.5", "re_prob": 0.5, "grad_accum": 2}),
        ("pictures", {"steps": 0, "epochs": 3, "warmup": 1, "aug_repeats": 2, "clip_grad": 1.0, "layer_decay": 0.9}),
        ("pictures", {"model": "slab_nano", "prep_steps": 5}),  # PRepBN, of which each step has its own share
    ],
)
def test_a_killed_run_goes_on_to_the_same_weights(folders, tmp_path, monkeypatch, kind, changes):
    """Killed in step 5 after a checkpoint at step 4: the continued run ends bit for bit as the uninterrupted one."""
    changes = {"model": "test_convnext", "checkpoint_every": 2} | changes
    T.run(settings(folders, tmp_path / "straight", kind, **changes))

    class Killed(BaseException):
        pass

    update = ModelEmaV3.update

    def dies(self, model, step=None):
        if step == 5:
            raise Killed
        update(self, model, step)

    config = settings(folders, tmp_path / "killed", kind, **changes)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(ModelEmaV3, "update", dies)
        T.run(config)
    assert torch.load(tmp_path / "killed" / "last.pt", weights_only=True)["step"] == 4
    assert not (tmp_path / "killed" / "model.safetensors").exists()
    T.run(config)

    straight, resumed = (torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("straight", "killed"))
    assert straight["step"] == resumed["step"] >= 6
    for part in ("model", "model_ema"):
        for key, value in straight[part].items():
            assert torch.equal(value, resumed[part][key]), (part, key)
    for index, state in straight["optimizer"]["state"].items():
        for key, value in state.items():
            assert torch.equal(value, resumed["optimizer"]["state"][index][key])
    assert not torch.equal(straight["model"]["head.fc.weight"], straight["model_ema"]["head.fc.weight"])


def test_prepbn_goes_from_layer_norm_to_batch_norm(folders, tmp_path):
    """Over all steps, or over as many as the recipe says; of a model that has none, that is an error."""
    weights = {}
    for prep_steps, expected in [(0, [2, 3]), (2, [2, 2])]:  # of the last step: done before it, of how many
        output = tmp_path / str(prep_steps)
        T.run(settings(folders, output, model="slab_nano", steps=3, warmup=0, prep_steps=prep_steps))
        weights[prep_steps] = torch.load(output / "last.pt", weights_only=True)["model"]
        found = [value.tolist() for key, value in weights[prep_steps].items() if key.endswith("progress")]
        assert len(found) > 20 and all(value == expected for value in found)
    assert not torch.equal(weights[0]["head.fc.weight"], weights[2]["head.fc.weight"])
    with pytest.raises(ValueError, match="has no PRepBN"):
        T.run(settings(folders, tmp_path / "none", prep_steps=2))


def test_time_budget_stops_with_a_checkpoint_and_goes_on(folders, tmp_path, capsys):
    config = settings(folders, tmp_path, "sprites", max_minutes=1e-6)
    assert T.run(config) is None
    assert "run the same command to go on" in capsys.readouterr().out
    assert torch.load(tmp_path / "last.pt", weights_only=True)["step"] == 0
    assert not (tmp_path / "model.safetensors").exists()
    assert T.run(dataclasses.replace(config, max_minutes=0.0))["step"] == 6


@pytest.mark.parametrize(("kind", "name"), [("sprites", "white"), ("pictures", "val")])
def test_a_finished_run_is_measured_again_at_another_size(folders, tmp_path, monkeypatch, kind, name):
    config = settings(folders, tmp_path, kind, crop_pct=1.0)
    trained = T.run(config)
    assert trained["device"] == "1 x CPU" and 0 < trained["minutes"] < 5
    seen = []
    evaluate = T.evaluate

    def spy(model, batches, accelerator):
        batches = list(batches)
        seen.extend(images.shape[-1] for images, _ in batches)
        return evaluate(model, iter(batches), accelerator)

    monkeypatch.setattr(T, "evaluate", spy)
    again = T.run(dataclasses.replace(config, eval_size=48))
    assert set(seen) == {48}
    assert (again["step"], again["device"]) == (trained["step"], trained["device"])
    assert again["minutes"] == pytest.approx(trained["minutes"], abs=0.01) and again[name]["count"] > 0
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        preprocessing = json.loads(file.metadata()["preprocessing"])
    assert (preprocessing["input_size"], preprocessing["crop_pct"]) == ([3, 48, 48], 1.0)


def test_another_run_in_the_same_output_is_refused(folders, tmp_path):
    T.run(settings(folders, tmp_path, steps=2))
    with pytest.raises(ValueError, match=r"other settings \(lr, steps\): set another output"):
        T.run(settings(folders, tmp_path, steps=4, lr=1.0))


def test_fine_tuning_starts_from_the_checkpoint_and_replaces_its_head(folders, tmp_path):
    first = T.build_model(settings(folders, tmp_path), 7)
    weights = {key: value.clone() for key, value in first.state_dict().items()}
    T.save_checkpoint(weights, tmp_path / "seven.safetensors")
    config = settings(folders, tmp_path, checkpoint=str(tmp_path / "seven.safetensors"))
    with pytest.raises(ValueError, match="head has 7 classes, the model 3"):
        T.build_model(config, 3)
    model = T.build_model(dataclasses.replace(config, new_head=True), 3)
    state = model.state_dict()
    assert state["fc.weight"].shape[0] == 3
    assert all(torch.equal(value, weights[key]) for key, value in state.items() if not key.startswith("fc"))


def test_metrics_count_by_hand():
    labels = np.array([0, 0, 1, 2])
    guesses = np.array([[0, 1, 2], [1, 0, 2], [1, 0, 2], [1, 0, 2]])
    result = T.metrics(labels, guesses, ["a", "b", "c"], {"a": "x", "b": "x", "c": "y"})
    assert (result["top1"], result["top5"], result["count"]) == (50.0, 100.0, 4)
    assert result["groups"] == {
        "x": {"top1": 66.67, "top5": 100.0, "count": 3},
        "y": {"top1": 0.0, "top5": 100.0, "count": 1},
    }
    assert sorted(map(tuple, result["confusions"])) == [("a", "b", 1), ("c", "b", 1)]
