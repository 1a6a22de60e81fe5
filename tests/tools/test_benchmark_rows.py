"""What the benchmark of split rows counts and searches; what it times needs GPUs."""

import json
import math
import time

import pytest
from typer import Typer
from typer.testing import CliRunner

from zoo.measure import Dtype
from zoo.tools import benchmark_rows
from zoo.tools.benchmark_rows import Case, Row, heights, hidden_share, largest, measure

CASE = Case("test_van", 2048, 2, "cuda", Dtype.bf16, 0)


def test_strips_are_even_whole_blocks():
    assert heights(8192, 2) == [4096, 4096]
    assert heights(200, 3) == [64, 64, 72]
    assert heights(40, 3) == [0, 32, 8]


def test_the_hidden_share_counts_nothing_twice():
    assert hidden_share([(0, 4), (2, 6), (10, 12)], [(1, 3), (2, 5), (11, 20)]) == pytest.approx((4 + 1) / 8)
    assert math.isnan(hidden_share([], [(0, 1)]))


@pytest.mark.parametrize("overhead", [0, 20, 400])
def test_the_largest_picture(monkeypatch, overhead):
    """A GPU of 5000 MB, of which a picture takes 10 MB for each 1000 x 1000 pixels and something for itself."""
    tried = []

    def measure(case, deadline):
        tried.append(case.size)
        peak = 10 * (case.size / 1000) ** 2
        return "out of memory" if peak + overhead > 5000 else Row(case, peak=peak, budget=5000)

    monkeypatch.setattr(benchmark_rows, "measure", measure)
    found = largest(CASE, 256, time.monotonic() + 60)
    exact = math.sqrt((5000 - overhead) / 10) * 1000
    assert exact - 256 < found <= exact
    assert len(tried) < 12


def test_no_picture_fits(monkeypatch):
    monkeypatch.setattr(benchmark_rows, "measure", lambda case, deadline: "out of memory")
    assert largest(CASE, 256, time.monotonic() + 60) == 0


def test_two_processes_on_a_cpu():
    row = measure(Case("test_lightnet", 64, 2, "cpu", Dtype.fp32, 0.01), time.monotonic() + 300)
    assert len(row.times) >= 3 and min(row.times) > 0 and row.rate > 0
    assert (row.gathers, row.rows, row.peak, row.hidden) == (1 + 1 + 5 + 1, 0, None, None)
    assert row.ring == 5 * 2 * (2 * 4) * 32 * 4  # in 5 blocks keys and values, float32, of 2 x 4 tokens of 32 channels


def test_command_line(monkeypatch, tmp_path):
    def measure(case, deadline):
        assert case.device == "cpu" and case.size == 64
        return Row(case, times=[0.5, 0.25, 4.0], gathers=2, gathered=2048) if case.ranks == 2 else "it is broken"

    monkeypatch.setattr(benchmark_rows, "measure", measure)
    app = Typer()
    app.command()(benchmark_rows.main)
    path = tmp_path / "rows.json"
    arguments = ["test_van", "--device", "cpu", "--size", "64", "--json", str(path)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "left out: test_van, 1 ranks: it is broken" in done.output
    one, two = json.loads(path.read_text())["rows"]
    assert (one["case"]["ranks"], one["images_per_second"], two["case"]["ranks"]) == (1, None, 2)
    assert two["images_per_second"] == 2 and two["gathered"] == 2048
