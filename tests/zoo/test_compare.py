"""`zoo compare`: what is known, counted and measured of models, as a table, a document and a plot."""

import json

import pytest
from PIL import Image
from typer.testing import CliRunner

import zoo.compare as C
from zoo.catalogue import CATALOGUE
from zoo.cli import app
from zoo.measure import Mode, Row, Settings

NAMES = ["van_nano", "van_b0", "resnet18"]


def run(*arguments):
    return CliRunner().invoke(app, ["compare", *map(str, arguments)])


@pytest.fixture
def measured(monkeypatch):
    """Speeds and memory without measuring; gives the settings that were asked for."""
    asked = []

    def measure(names, settings):
        asked.append(settings)
        rates = {"van_nano": (40.0, 10.0, 20.0), "van_b0": (8.0,), "resnet18": (30.0,)}
        return [
            Row(name, Mode.eager, settings.size, settings.batch, 1000, rates[name.partition("@")[0]], 100.0)
            for name in names
        ]

    monkeypatch.setattr(C, "measure", measure)
    return asked


def test_facts_counts_and_measurements(measured):
    nano, b0, resnet = C.compare(NAMES, Settings(size=224, batch=2))
    assert (b0.name, b0.top1, b0.macs) == ("van_b0", 75.4, CATALOGUE["van_b0"].macs)
    assert (nano.top1, nano.images_per_second, nano.spread, nano.peak_mib) == (None, 20.0, 0.75, 100.0)
    assert resnet.top1 is None and resnet.macs == pytest.approx(1.8e9, rel=0.02)
    (on_torch,) = C.compare(["van_b0@torch"], Settings(size=112))
    assert on_torch.top1 == 75.4 and on_torch.macs < b0.macs / 3


def test_table(measured):
    result = run(*NAMES, "--device", "cpu", "--batch-size", 2, "--size", 64)
    assert result.exit_code == 0, result.output
    heading, *lines = result.stdout.splitlines()
    assert "MACs at 64" in heading and [line.split()[0] for line in lines] == NAMES
    assert lines[1].split()[1:4] == ["75.4", "1.00", "k"] and lines[0].split()[-3:] == ["20", "+-75%", "100"]
    assert (measured[0].size, measured[0].batch, measured[0].amp) == (64, 2, False)


def test_document_and_plot(measured, tmp_path):
    out = tmp_path / "compared.png"
    result = run(*NAMES, "--device", "cpu", "--json", "--out", out, "--size", 64, "--amp")
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)
    assert [row["images_per_second"] for row in rows] == [20.0, 8.0, 30.0]
    assert measured[0].dtype.value == "bf16" and measured[0].amp
    with Image.open(out) as image:
        assert image.format == "PNG" and image.width > image.height
        blue = sum(image.convert("RGB").resize((300, 100)).histogram()[256 + 119 - 8 : 256 + 119 + 9])
    assert blue > 300  # the bars
    assert [path.name for path in tmp_path.iterdir()] == ["compared.png"]


def test_measured(monkeypatch):
    monkeypatch.setattr("zoo.measure._cpu_peak", lambda *_: 2**20)  # a process of its own, which has its own test
    result = run("test_van", "--device", "cpu", "--size", 32, "--batch-size", 1, "--json")
    assert result.exit_code == 0, result.output
    (row,) = json.loads(result.stdout)
    assert row["images_per_second"] > 0 and row["params"] > 1000 and row["macs"] > 1e5 and row["peak_mib"] == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["reznet18"], "There is no model 'reznet18'; the nearest names are"),
        (["test_van", "--out", "plot.jpg"], "--out plot.jpg does not end in .png"),
        (["test_van@cuda"], "asks for the kernels 'cuda'"),
    ],
)
def test_one_sentence_for_bad_input(arguments, said):
    result = run(*arguments, "--device", "cpu")
    assert result.exit_code == 2 and said in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_what_to_install_is_said_before_measuring(measured, monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    result = run("test_van", "--device", "cpu", "--out", tmp_path / "plot.png")
    assert result.exit_code == 2 and "pip install 'linear-vision-zoo[bench]'" in result.stderr and not measured
