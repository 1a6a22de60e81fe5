import json
from pathlib import Path

import pytest

pytest.importorskip("mmdet", reason="dense prediction needs the dense extra")

import torch
import typer
from typer.testing import CliRunner

from zoo.measure import Dtype
from zoo.tools import benchmark_dense

CONFIGS = Path(__file__).parents[2] / "configs"
CONFIG = CONFIGS / "detection" / "retinanet_1x_van_b2.py"
app = typer.Typer()
app.command()(benchmark_dense.main)


def run(*arguments):
    return CliRunner().invoke(app, [*map(str, arguments), "--batch", "1", "--steps", "1"])


def test_two_backbones_side_by_side(tmp_path):
    file = tmp_path / "speed.json"
    names = ["test_van@torch", "test_vit"]  # the second is made for one size of picture
    found = run(*names, "--config", CONFIG, "--size", 48, 60, "--json", file)
    assert found.exit_code == 0, found.output
    rows = json.loads(file.read_text())["rows"]
    assert [row["name"] for row in rows] == names and all(row["images_per_second"] > 0 for row in rows)
    assert rows[0]["parameters"] != rows[1]["parameters"]


def test_a_step_trains():
    torch.manual_seed(0)
    model = benchmark_dense.build_detector(CONFIG, "test_van", (64, 64))
    before = {name: x.clone() for name, x in model.named_parameters()}
    benchmark_dense.make_step(model, benchmark_dense.make_data(2, (64, 64), 80), "cpu", Dtype.bf16)()
    assert all(not torch.equal(before[name], x) for name, x in model.named_parameters() if name.startswith("bbox_head"))


def test_what_cannot_be_measured_is_named(tmp_path):
    for arguments, message in (
        (["no_such_model", "--config", CONFIG], "no_such_model"),
        (["van_b0", "--config", tmp_path / "none.py"], "There is no config file"),
        (
            ["van_b0", "--config", CONFIGS / "segmentation" / "semantic_fpn_40k_van_b0.py"],
            "needs one of mmdet",
        ),
    ):
        found = run(*arguments)
        assert found.exit_code == 1 and message in " ".join(found.output.split()), found.output
