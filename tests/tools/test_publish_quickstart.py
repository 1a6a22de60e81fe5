"""The packaging of the trained weights, and the model card."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

pytest.importorskip("resvg_py", reason="the quickstart data needs the train extra")

from zoo import create_model
from zoo.checkpoints import save_checkpoint
from zoo.tools import publish_quickstart as P
from zoo.tools.quickstart.card import weights_file
from zoo.tools.quickstart.packages import PACKAGES
from zoo.tools.train_classifier import Config

CLASSES = [
    {"slug": "dog-face", "name": "dog face", "group": "animals-nature", "hexcode": "1F436"},
    {"slug": "pinata", "name": "piñata", "group": "activities", "hexcode": "1FA85"},
    {"slug": "wolf", "name": "wolf face", "group": "animals-nature", "hexcode": "1F43A"},
]
TOP1 = {"ravlt_nano": 61.37, "van_nano": 58.2, "convnext_atto": 70.5}


def part(top1, confusions=()):
    groups = {
        "activities": {"top1": top1 - 3, "top5": 90.04, "count": 1},
        "animals-nature": {"top1": top1 + 3, "top5": 80.0, "count": 2},
    }
    return {"top1": top1, "top5": top1 + 20, "count": 3, "groups": groups, "confusions": list(confusions)}


@pytest.fixture
def runs(tmp_path):
    """Three finished runs, as the trainer leaves them."""
    data = tmp_path / "data"
    data.mkdir()
    (data / "classes.json").write_text(json.dumps(CLASSES), encoding="utf-8")
    pictures = {package.style: 100 + i for i, package in enumerate(PACKAGES) if package.style}
    (data / "report.json").write_text(json.dumps({"pictures": pictures}))
    folders = []
    for name, top1 in TOP1.items():
        folder = tmp_path / name
        folder.mkdir()
        config = Config(name, "data/test", "data/train", steps=6000, warmup=400, lr=2e-3, smoothing=0.1, clip_grad=1.0,
                        drop_path=0.05, ema_decay=0.999, precision="bf16", img_size=96, output=str(folder))  # fmt: skip
        measured = {
            "white": part(top1, [["dog-face", "wolf", 1], ["wolf", "dog-face", 1], ["pinata", "wolf", 1]]),
            "grey": part(top1 - 1, [["wolf", "dog-face", 1]]),
            "varied": part(top1 - 2),
        }
        facts = {"model": name, "parameters": 2_900_000, "step": 6000, "minutes": 8.4, "device": "1 x a GPU"}
        (folder / "metrics.json").write_text(json.dumps(facts | measured | {"config": dataclasses.asdict(config)}))
        torch.manual_seed(0)
        state = create_model(name, num_classes=3).state_dict()
        labels = json.dumps([entry["slug"] for entry in CLASSES])
        save_checkpoint(state, folder / "model.safetensors", metadata={"labels": labels})
        folders.append(folder)
    return folders, data, tmp_path / "weights"


def change(folder, **changes):
    metrics = json.loads((folder / "metrics.json").read_text())
    metrics["config"] |= changes
    (folder / "metrics.json").write_text(json.dumps(metrics))


def test_the_better_zoo_model_is_packaged(runs):
    folders, data, out = runs
    out.mkdir()
    (out / weights_file("van_nano")).touch()  # an earlier winner
    assert P.publish(folders, data, out)["model"] == "ravlt_nano"  # the peer is better, but it is not ours
    assert {path.name for path in out.iterdir()} == {
        "ravlt_nano_quickstart.safetensors", "quickstart_classes.json", "README.md",
    }  # fmt: skip
    packaged, trained = load_file(out / weights_file("ravlt_nano")), load_file(folders[0] / "model.safetensors")
    assert packaged.keys() == trained.keys()
    for key, value in trained.items():
        assert torch.equal(packaged[key], value.half() if value.is_floating_point() else value), key
    create_model("ravlt_nano", checkpoint=out / weights_file("ravlt_nano"), num_classes=3)
    entries = json.loads((out / "quickstart_classes.json").read_text("utf-8"))
    assert entries == [{key: entry[key] for key in ("slug", "name", "group")} for entry in CLASSES]


def test_the_card_says_what_was_measured(runs):
    folders, data, out = runs
    P.publish(folders, data, out)
    card = (out / "README.md").read_text("utf-8")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in card.splitlines() if line[:1] == "|"]
    for row in (
        ["ravlt_nano (packaged)", "2.90 M", "61.4 / 81.4", "60.4 / 80.4", "59.4 / 79.4", "6,000", "8"],
        ["convnext_atto (of timm, to compare)", "2.90 M", "70.5 / 90.5", "69.5 / 89.5", "68.5 / 88.5", "6,000", "8"],
        ["van_nano", "2.90 M", "58.2 / 78.2", "57.2 / 77.2", "56.2 / 76.2", "6,000", "8"],
        ["animals-nature", "2", "64.4 / 80.0", "63.4 / 80.0", "62.4 / 80.0"],
        ["activities", "1", "58.4 / 90.0", "57.4 / 90.0", "56.4 / 90.0"],
        ["dog face", "wolf face", "3"],  # both ways
        ["piñata", "wolf face", "1"],
    ):
        assert row in rows
    for package in PACKAGES:
        (row,) = (row for row in rows if row[0] == f"{package.name} {package.version}")
        assert row[1] == package.author and package.licence in row[2]
        assert ("to measure" in row[3]) == package.held_out
    said = ["6.1 million pictures of 96 x 96", "6,000 steps of 1,024", "learning rate 0.002", "8 minutes on 1 x a GPU"]
    for text in [*said, "names 3 things", weights_file("ravlt_nano"), "in 9 drawing styles"]:
        assert text in " ".join(card.split())
    assert "{" not in card and max(len(line) for line in card.splitlines() if line[:1] != "|") <= 120


def other_recipe(folders, data):
    change(folders[2], lr=0.1, steps=9)


def other_classes(folders, data):
    (data / "classes.json").write_text(json.dumps(CLASSES[:2]))


def unfinished(folders, data):
    (folders[1] / "metrics.json").unlink()


def not_ours(folders, data):
    del folders[:2]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (other_recipe, "convnext_atto was not trained as ravlt_nano was, they differ in lr, steps."),
        (other_classes, r"ravlt_nano was trained on other classes than .* has \(3 and 2\)"),
        (unfinished, "metrics.json"),
        (not_ours, "none of the runs is of a model of the zoo"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_sentence(runs, spoil, message):
    folders, data, out = runs
    spoil(folders, data)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        P.publish(folders, data, out)
    assert not out.exists()
    result = CliRunner().invoke(P.app, [*map(str, folders), "--data", str(data), "--out", str(out)])
    assert result.exit_code == 1 and result.output.startswith("error: ") and result.output.count("\n") == 1


@pytest.mark.parametrize(
    ("value", "message"), [(1e6, "do not fit into float16: head.fc.bias"), (None, "bytes in float16")]
)
def test_weights_that_are_too_large_are_refused(runs, value, message, monkeypatch):
    folders, data, out = runs
    if value is None:
        monkeypatch.setattr(P, "MAX_BYTES", 100_000)
    else:
        state = load_file(folders[0] / "model.safetensors")
        state["head.fc.bias"][0] = value
        labels = json.dumps([entry["slug"] for entry in CLASSES])
        save_checkpoint(state, folders[0] / "model.safetensors", metadata={"labels": labels}, overwrite=True)
    with pytest.raises(ValueError, match=message):
        P.publish(folders, data, out)
    assert not list(out.iterdir())
