"""The `zoo` command: what it prints, what it writes, and how it fails."""

import json
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from zoo import cli
from zoo.catalogue import CATALOGUE, DEFAULT_MODEL
from zoo.classifier import Classifier

NAME = "test_convnext"  # of timm, 0.3 M parameters, 160 x 160


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    model = timm.create_model(NAME)
    with torch.no_grad():
        model.head.fc.weight.mul_(30)
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_file(model.state_dict(), path)
    return ["--model", NAME, "--checkpoint", str(path), "--device", "cpu"]


@pytest.fixture(scope="module")
def classifier(weights):
    return Classifier(NAME, checkpoint=weights[3], device="cpu")


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    generator = np.random.default_rng(0)
    for name in ("a.png", "b.jpg", "sub/c.png"):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(generator.integers(0, 256, (5, 6, 3), dtype=np.uint8))
        coarse.resize((200, 160), Image.Resampling.BICUBIC).save(path)
    return ["in/a.png", "in/b.jpg", "in/sub/c.png"]


def zoo(*arguments, code=0):
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result


def error(*arguments):
    """The one sentence on stderr of a usage error."""
    result = zoo(*arguments, code=2)
    assert result.stdout == "" and result.stderr.startswith("zoo: ") and result.stderr.count("\n") == 1
    return result.stderr


# ---- classify


def test_classify_prints_names_and_probabilities(pictures, weights, classifier):
    lines = zoo("classify", "in", *weights, "--top-k", 2).stdout.splitlines()
    for path, prediction in zip(pictures, classifier.predict(pictures, top_k=2), strict=True):
        index = next(index for index, line in enumerate(lines) if line.startswith(path))
        for line, name, probability in zip(lines[index:], prediction.names, prediction.probabilities, strict=False):
            assert name in line and line.rstrip().endswith(f"{probability:.1%}")
    assert len(lines) == 1 + 2 * len(pictures)


def test_classify_json(pictures, weights, classifier):
    result = zoo("classify", *pictures, *weights, "--json", "--batch-size", 2)
    document = json.loads(result.stdout)  # nothing else on stdout
    assert document["model"] == NAME and document["failed"] == []
    assert [entry["source"] for entry in document["results"]] == pictures
    for entry, prediction in zip(document["results"], classifier.predict(pictures), strict=True):
        assert entry["names"] == list(prediction.names) and entry["indices"] == list(prediction.indices)
        assert entry["probabilities"] == pytest.approx(prediction.probabilities, rel=1e-4)


def test_classify_draws_a_sheet(pictures, weights, tmp_path):
    result = zoo("classify", "in", *weights, "--out", "new/sheet.png", "--json")
    json.loads(result.stdout)
    assert "Wrote new/sheet.png" in result.stderr
    sheet = Image.open("new/sheet.png")
    assert sheet.format == "PNG" and sheet.width > 3 * 280 and np.asarray(sheet).std() > 30
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["sheet.png"]  # no partial file is left


def test_failures_are_reported_and_do_not_stop_the_rest(pictures, weights, tmp_path):
    (tmp_path / "in/text.png").write_text("hello")
    result = zoo("classify", "in", "missing.png", "http://127.0.0.1:9/x.png", *weights, "--json", code=1)
    document = json.loads(result.stdout)
    assert [entry["source"] for entry in document["results"]] == pictures
    failed = {entry["source"]: entry["reason"] for entry in document["failed"]}
    assert failed["missing.png"] == "does not exist." and "URLs are off" in failed["http://127.0.0.1:9/x.png"]
    lines = result.stderr.splitlines()
    assert lines[0] == "3 of 6 failed:" and any(line.startswith("  in/text.png is not a picture") for line in lines)


def test_when_all_fail(pictures, weights, tmp_path):
    (tmp_path / "empty").mkdir()
    result = zoo("classify", "missing.png", "empty", "*.nothing", *weights, "--out", "sheet.png", code=2)
    assert result.stdout == "" and not (tmp_path / "sheet.png").exists()
    assert "empty is a folder without pictures." in result.stderr and "*.nothing matches no picture." in result.stderr
    assert json.loads(zoo("classify", "missing.png", *weights, "--json", code=2).stdout)["results"] == []


def test_labels_for_a_checkpoint_of_ones_own(pictures, tmp_path):
    torch.manual_seed(0)
    save_file(timm.create_model(NAME, num_classes=3).state_dict(), tmp_path / "own.safetensors")
    (tmp_path / "names.txt").write_text("cat\ndog\npiñata\n", encoding="utf-8")
    own = ["--model", NAME, "--checkpoint", "own.safetensors", "--device", "cpu", "--labels", "names.txt"]
    entry = json.loads(zoo("classify", pictures[0], *own, "--json").stdout)["results"][0]
    assert sorted(entry["names"]) == ["cat", "dog", "piñata"] and sum(entry["probabilities"]) == pytest.approx(1)


def test_names_with_markup_are_printed_as_they_are(pictures, weights, tmp_path):
    folder = tmp_path / "[red]in"
    folder.mkdir()
    (tmp_path / "in/a.png").rename(folder / "x[bold].png")
    lines = zoo("classify", "[red]in/x[bold].png", *weights).stdout.splitlines()
    assert lines[0].strip() == "[red]in" and any(line.startswith("x[bold].png ") for line in lines)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "reznet18"], "no model 'reznet18'; the nearest names are resnet18"),
        (["--device", "nonsense"], "'nonsense' cannot be used here"),
        (["--out", "sheet.jpg"], "--out sheet.jpg does not end in .png."),
        (["--labels", "missing.txt"], "missing.txt: No such file"),
        (["--model", NAME, "--checkpoint", "in/a.png"], "in/a.png"),
        (["--model", NAME, "--checkpoint", "missing.pth"], "missing.pth"),
    ],
)
def test_usage_errors(pictures, arguments, message):
    assert message in error("classify", pictures[0], *arguments)


def test_a_bug_is_not_hidden(pictures, monkeypatch):
    def broken(*_arguments, **_options):
        raise AttributeError("a bug")

    monkeypatch.setattr(cli, "Classifier", broken)
    assert isinstance(CliRunner().invoke(cli.app, ["classify", pictures[0]]).exception, AttributeError)


def test_no_paths():
    assert "PATH" in zoo("classify", code=2).stderr
    assert "No such command" in zoo("nonsense", code=2).stderr


# ---- embed


def test_embed_npy(pictures, weights, classifier, tmp_path):
    (tmp_path / "in/text.png").write_text("hello")
    result = zoo("embed", "in", "--out", "out/f.npy", *weights, code=1)
    features = np.load("out/f.npy")
    assert features.dtype == np.float32
    np.testing.assert_allclose(features, classifier.embed(pictures), rtol=1e-4, atol=1e-5)
    assert json.loads((tmp_path / "out/f.json").read_text()) == pictures
    assert "1 of 4 failed" in result.stderr and "Wrote 3 vectors of 64 numbers to out/f.npy" in result.stdout
    zoo("embed", "missing.png", "--out", "out/g.npy", *weights, code=2)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["f.json", "f.npy"]


def test_embed_parquet(pictures, weights, classifier):
    parquet = pytest.importorskip("pyarrow.parquet")
    zoo("embed", "in", "--out", "f.parquet", *weights)
    table = parquet.read_table("f.parquet")
    assert table["path"].to_pylist() == pictures
    assert str(table.schema.field("embedding").type).startswith("fixed_size_list<") and table.num_columns == 2
    got = np.array(table["embedding"].to_pylist(), np.float32)
    np.testing.assert_allclose(got, classifier.embed(pictures), rtol=1e-4, atol=1e-5)


def test_embed_errors(pictures, weights, monkeypatch):
    assert "does not end in .npy or .parquet" in error("embed", "in", "--out", "f.csv", *weights)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pip install 'linear-vision-zoo[export]'" in error("embed", "in", "--out", "f.parquet", *weights)


# ---- the catalogue


def test_list():
    lines = zoo("list").stdout.splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(CATALOGUE)
    entry = next(iter(CATALOGUE.values()))
    assert f"{entry.params / 1e6:.2f} M" in lines[1] and entry.family in lines[1]
    document = json.loads(zoo("list", "--json").stdout)
    assert [entry["name"] for entry in document] == list(CATALOGUE)
    assert document[0]["params"] == entry.params
    assert [entry["name"] for entry in json.loads(zoo("list", f"{entry.name[:-1]}?", "--json").stdout)]
    assert "zzz*" in error("list", "zzz*")


def test_info():
    model = timm.create_model(NAME)
    document = json.loads(zoo("info", NAME, "--size", 160, "--json").stdout)
    stages = document["stages"]
    assert document["name"] == NAME and document["size"] == 160
    assert [stage["name"] for stage in stages] == ["stem", *(f"stages.{i}" for i in range(4)), "head", "total"]
    assert stages[-1]["params"] == sum(parameter.numel() for parameter in model.parameters())
    assert stages[-1]["macs"] == sum(stage["macs"] for stage in stages[:-1])
    assert stages[3]["shape"] == [48, 10, 10]
    text = zoo("info", NAME, "--size", 160).stdout
    assert "48 x 10 x 10" in text and f"{stages[-1]['params']:,}" in text
    assert "nearest names" in error("info", "reznet18")
    assert "does not take 3x225x225 pictures" in error("info", "vit_tiny_patch16_224", "--size", 225)


def test_info_of_a_zoo_model():
    entry = CATALOGUE[DEFAULT_MODEL]
    document = json.loads(zoo("info", DEFAULT_MODEL, "--json").stdout)
    assert document["family"] == entry.family and document["licence"] == entry.licence
    assert entry.family in zoo("info", DEFAULT_MODEL).stdout


def test_convert(weights, tmp_path):
    source, destination = weights[3], tmp_path / "out.safetensors"
    assert "Wrote" in zoo("convert", source, destination, "--model", NAME).stdout
    before, after = load_file(source), load_file(destination)
    assert before.keys() == after.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert "exists" in error("convert", source, destination, "--model", NAME)
    zoo("convert", source, destination, "--model", NAME, "--overwrite")
    assert "nearest names" in error("convert", source, destination, "--model", "reznet18")


# ---- the packaged model


def test_demo(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = zoo("demo")
    assert "Wrote demo/sheet.png" in result.stdout
    assert np.asarray(Image.open("demo/sheet.png")).std() > 30


def test_as_a_program(pictures, weights):
    command = [sys.executable, "-m", "zoo", "classify", *pictures, "missing.png", *weights, "--json", "--out", "s.png"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1
    assert len(json.loads(result.stdout)["results"]) == 3
    assert result.stderr.splitlines() == ["Wrote s.png", "1 of 4 failed:", "  missing.png does not exist."]
    assert zoo("--version").stdout.split()[0] == "zoo"
