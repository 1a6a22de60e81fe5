"""A bulk run: what it writes, and that nothing written is lost or done twice, whatever stops it."""

import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet
from typer.testing import CliRunner

from zoo import Classifier
from zoo.bulk import Recipe, run, tasks
from zoo.bulk.local import in_lanes
from zoo.bulk.plan import Chunk
from zoo.bulk.run import Watcher
from zoo.cli import app

NAME = "test_convnext"
BAD = {"a/05.png", "b/cut.jpg"}


@pytest.fixture
def recipe(weights):
    return Recipe("classify", NAME, weights, device="cpu", top_k=3, batch_size=2)


def table(out):
    return parquet.read_table(out).to_pylist()


def files(out):
    return {path.name: path.read_bytes() for path in out.iterdir() if path.name != ".lock"}


def keys(out):
    return [row["key"] for row in table(out)]


def all_keys(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.suffix in (".png", ".jpg")}


def test_names_are_those_of_the_classifier(folder, recipe, tmp_path):
    summary = run(recipe, str(folder), tmp_path / "out", shard_rows=8)
    assert (summary.missing, summary.done, summary.failed, summary.before) == (21, 21, 2, 0)
    assert sorted(files(tmp_path / "out")) == [f"part-{k:06}.parquet" for k in range(3)]
    rows = table(tmp_path / "out")
    assert [row["key"] for row in rows] == sorted(all_keys(folder))
    good = [row for row in rows if row["status"] == "ok"]
    expected = Classifier(NAME, checkpoint=recipe.checkpoint, device="cpu").predict_all(
        [str(folder / row["key"]) for row in good], top_k=3
    )
    for row, result in zip(good, expected, strict=True):
        assert row["error"] is None
        assert row["result"]["indices"] == list(result.prediction.indices)
        assert row["result"]["names"] == list(result.prediction.names)
        np.testing.assert_allclose(row["result"]["probabilities"], result.prediction.probabilities, rtol=1e-4)
    assert len({tuple(row["result"]["probabilities"]) for row in good}) == 19


def test_bad_files_are_rows_that_say_why(folder, recipe, tmp_path):
    summary = run(recipe, str(folder), tmp_path / "out")
    failed = {row["key"]: row for row in table(tmp_path / "out") if row["status"] == "failed"}
    assert set(failed) == BAD and all(row["result"] is None for row in failed.values())
    assert "is not a picture of a kind read here" in failed["a/05.png"]["error"]
    assert "is damaged or cut short" in failed["b/cut.jpg"]["error"]
    assert [error.split()[0] for error in summary.errors] == sorted(BAD)


def test_vectors_are_those_of_the_classifier(folder, recipe, tmp_path):
    run(Recipe("embed", NAME, recipe.checkpoint, device="cpu"), str(folder), tmp_path / "out", workers=1)
    rows = [row for row in table(tmp_path / "out") if row["status"] == "ok"]
    expected = Classifier(NAME, checkpoint=recipe.checkpoint, device="cpu").embed(
        [str(folder / r["key"]) for r in rows]
    )
    np.testing.assert_allclose([row["result"] for row in rows], expected, rtol=1e-4, atol=1e-5)
    assert np.std([row["result"] for row in rows], axis=0).max() > 0.01


def test_any_error_of_a_picture_is_its_own(folder, recipe, tmp_path, monkeypatch):
    load = tasks.ClassifyTask.load

    def failing(self, source):
        if source.endswith("07.png"):
            raise ZeroDivisionError("by a picture")
        return load(self, source)

    monkeypatch.setattr(tasks.ClassifyTask, "load", failing)
    assert run(recipe, str(folder), tmp_path / "out").failed == 3
    errors = {row["key"]: row["error"] for row in table(tmp_path / "out")}
    assert errors["a/07.png"] == "cannot be prepared (ZeroDivisionError: by a picture)."


# ---- again


def test_the_same_call_does_what_is_missing(folder, recipe, tmp_path):
    out = tmp_path / "out"
    run(recipe, str(folder), out, shard_rows=6)
    before = files(out)
    again = run(recipe, str(folder), out, shard_rows=6)
    assert (again.missing, again.done, again.before, again.failed_before) == (0, 0, 21, 2)
    assert files(out) == before

    (folder / "a/00b.png").write_bytes((folder / "a/01.png").read_bytes())  # in the middle of the order
    (out / "part-000001.parquet").unlink()
    again = run(recipe, str(folder), out, shard_rows=6)
    assert (again.done, again.before) == (7, 15)
    after = files(out)
    assert {name: after[name] for name in before if name != "part-000001.parquet"} == {
        name: data for name, data in before.items() if name != "part-000001.parquet"
    }
    assert Counter(keys(out)) == Counter(all_keys(folder))


def test_what_is_missing_gets_its_old_place(folder, recipe, tmp_path):
    out = tmp_path / "out"
    run(recipe, str(folder), out, shard_rows=4)
    before = files(out)
    for number in (0, 3):
        (out / f"part-{number:06}.parquet").unlink()
    run(recipe, str(folder), out, shard_rows=4)
    assert files(out) == before


def test_duplicates_are_done_once(folder, recipe, tmp_path):
    source = folder / "list.lst"
    source.write_text("a/00.png\na/01.png\na/00.png\nb/15.png\na/00.png\n")
    summary = run(recipe, str(source), tmp_path / "out")
    assert (summary.done, summary.duplicates) == (3, 2)
    assert keys(tmp_path / "out") == ["a/00.png", "a/01.png", "b/15.png"]
    assert run(recipe, str(source), tmp_path / "out").duplicates == 2  # also where all is done


SLOW = """
import json, sys, time
from zoo.bulk import Recipe, run, tasks

prepare = tasks.Task.prepare

def slowly(self, items):
    time.sleep(0.3)
    return prepare(self, items)

tasks.Task.prepare = slowly
recipe, source, out = sys.argv[1:]
run(Recipe(**json.loads(recipe)), source, out, shard_rows=2)
"""


def test_a_killed_run_goes_on_and_no_other_runs_beside_it(folder, recipe, tmp_path):
    out, reference = tmp_path / "out", tmp_path / "reference"
    run(recipe, str(folder), reference, shard_rows=2)
    command = [sys.executable, "-c", SLOW, json.dumps(vars(recipe)), str(folder), str(out)]
    with subprocess.Popen(command) as process:
        try:
            while len(list(out.glob("part-*"))) < 2:
                assert process.poll() is None
                time.sleep(0.02)
            with pytest.raises(ValueError, match="Another run writes to"):
                run(recipe, str(folder), out, shard_rows=2)
        finally:
            process.send_signal(signal.SIGKILL)
    (out / ".part-000099.parquet.1.part").write_bytes(b"half")  # as a kill while writing leaves it
    before = {path: path.stat().st_mtime_ns for path in out.glob("part-*")}
    assert 2 <= len(before) < 11
    summary = run(recipe, str(folder), out, shard_rows=2)
    assert summary.before >= 4 and summary.done + summary.before == 21
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert files(out) == files(reference)  # to the byte, and no other files


def dying(marker, always):
    """A `fetch` that ends its process where it comes to a certain picture, once or always."""
    fetch = tasks.fetch

    def changed(item):
        if item.key == "b/15.png" and (always or not marker.exists()):
            marker.touch()
            os._exit(1)
        return fetch(item)

    return changed


def test_a_process_that_dies_once_costs_nothing(folder, recipe, tmp_path, monkeypatch):
    run(recipe, str(folder), tmp_path / "reference", shard_rows=4)
    monkeypatch.setattr(tasks, "fetch", dying(tmp_path / "marker", always=False))
    summary = run(recipe, str(folder), tmp_path / "out", shard_rows=4)
    assert (tmp_path / "marker").exists() and summary.done == 21
    assert files(tmp_path / "out") == files(tmp_path / "reference")


def test_a_picture_that_ends_its_process_is_a_row_that_says_so(folder, recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "fetch", dying(tmp_path / "marker", always=True))
    assert run(recipe, str(folder), tmp_path / "out", shard_rows=4).failed == 3
    rows = table(tmp_path / "out")
    assert [row["key"] for row in rows] == sorted(all_keys(folder))
    (dead,) = (row for row in rows if row["status"] == "failed" and row["key"] not in BAD)
    assert dead["key"] == "b/15.png" and dead["error"].startswith("ends the process that decodes it")


class Killer(Watcher):
    """Kills a process that decodes when the second and when the seventh batch is done."""

    batches = killed = 0

    def advance(self, rows, failed):
        self.batches += 1
        if self.batches in (2, 7):
            os.kill(multiprocessing.active_children()[self.killed].pid, signal.SIGKILL)
            self.killed += 1


def test_killed_processes_cost_nothing(folder, recipe, tmp_path):
    run(recipe, str(folder), tmp_path / "reference", shard_rows=4)
    killer = Killer()
    assert run(recipe, str(folder), tmp_path / "out", shard_rows=4, watcher=killer).done == 21
    assert killer.killed == 2
    assert files(tmp_path / "out") == files(tmp_path / "reference")


def test_processes_that_do_not_start_stop_the_run(folder, recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("zoo.bulk.decoder.torch.set_num_threads", lambda count: os._exit(3))
    with pytest.raises(RuntimeError, match="ends with code 3 before it begins"):
        run(recipe, str(folder), tmp_path / "out")
    assert files(tmp_path / "out") == {}


@contextmanager
def small_files(limit):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_loses_nothing(folder, recipe, tmp_path):
    wide = Recipe("classify", NAME, recipe.checkpoint, device="cpu", top_k=900)
    source, out = folder / "list.lst", tmp_path / "out"
    source.write_text("x.png\ny.png\na/00.png\na/01.png\n")  # a small shard of failures, a large one of results
    with (
        small_files(8192),
        pytest.raises(OSError, match=r"part-000001\.parquet cannot be written .* repeat the command"),
    ):
        run(wide, str(source), out, shard_rows=2, workers=1)
    kept = files(out)
    assert list(kept) == ["part-000000.parquet"]  # and no half file
    assert run(wide, str(source), out, shard_rows=2, workers=1).done == 2
    assert keys(out) == ["x.png", "y.png", "a/00.png", "a/01.png"] and kept.items() <= files(out).items()
    assert len(files(out)["part-000001.parquet"]) > 8192


# ---- what is refused


def test_other_settings_need_another_folder(folder, recipe, tmp_path):
    out = tmp_path / "out"
    run(recipe, str(folder), out)
    with pytest.raises(ValueError, match=r"results made with another top_k: give another folder"):
        run(Recipe("classify", NAME, recipe.checkpoint, device="cpu", top_k=2), str(folder), out)
    with pytest.raises(ValueError, match=r"another source"):
        run(recipe, str(folder / "a"), out)
    assert len(keys(out)) == 21


def test_a_damaged_or_foreign_file_is_not_passed_over(folder, recipe, tmp_path):
    out = tmp_path / "out"
    run(recipe, str(folder), out)
    path = out / "part-000000.parquet"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"part-000000\.parquet is damaged .* delete it"):
        run(recipe, str(folder), out)
    parquet.write_table(pa.table({"key": ["a"]}), path)
    with pytest.raises(ValueError, match="was not written by zoo"):
        run(recipe, str(folder), out)


def test_places_and_numbers_that_do_not_work(folder, recipe, tmp_path):
    (tmp_path / "empty").mkdir()
    for source, out, options, error in [
        (folder, folder / "out", {}, "is inside"),
        (tmp_path / "empty", tmp_path / "out", {}, "has no pictures"),
        (folder, tmp_path / "out", {"engine": "spark"}, "The engine is 'spark', expected local or ray"),
        (folder, tmp_path / "out", {"workers": 0}, "at least 1"),
    ]:
        with pytest.raises(ValueError, match=error):
            run(recipe, str(source), out, **options)
    with pytest.raises(ValueError, match="The task is 'name', expected one of embed"):
        Recipe("name", NAME)


def test_without_ray_the_engine_says_what_to_install(folder, recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"linear-vision-zoo\[bulk\]"):
        run(recipe, str(folder), tmp_path / "out", engine="ray")


# ---- order


def test_a_worker_gets_one_chunk_from_its_start_to_its_end():
    chunks = iter([Chunk(number, [f"{number}{letter}" for letter in "abcd"]) for number in range(5)])
    order = [(lane, chunk.number, batch) for lane, chunk, batch in in_lanes(chunks, 2, lanes=2)]
    assert [number for _, number, _ in order] == [0, 1, 0, 1, 2, 3, 2, 3, 4, 4]
    assert [lane for lane, _, _ in order] == [0, 1, 0, 1, 0, 1, 0, 1, 0, 0]
    assert [batch for _, number, batch in order if number == 3] == [["3a", "3b"], ["3c", "3d"]]


# ---- the command


def zoo(*arguments, code=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result


def test_the_command(folder, weights, tmp_path):
    model = ["--model", NAME, "--checkpoint", weights, "--device", "cpu"]
    bulk = [*model, "--engine", "local", "--out", tmp_path / "out", "--shard-rows", 10]
    result = zoo("embed", folder, *bulk, code=1)
    assert result.stdout == f"{tmp_path / 'out'} holds 21 pictures, 21 of them new\n"
    assert result.stderr.splitlines()[0] == "2 of 21 failed, among them:"
    assert result.stderr.splitlines()[1].startswith("  a/05.png is not a picture")
    result = zoo("embed", folder, *bulk, code=1)  # the same exit code for the same state
    assert "0 of them new" in result.stdout and result.stderr == "2 of 21 failed.\n"
    assert len(files(tmp_path / "out")) == 3
    labels = tmp_path / "labels.txt"
    labels.write_text("\n".join(f"thing {k}" for k in range(1000)))
    names = [*model, "--engine", "local", "--out", tmp_path / "names", "--labels", labels, "--top-k", 2]
    zoo("classify", folder / "b", *names, code=1)
    (row, *_) = table(tmp_path / "names")
    assert len(row["result"]["names"]) == 2 and row["result"]["names"][0].startswith("thing ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["classify", "a", "b", "--out", "out"], "takes one source, got 2"),
        (["classify", "a"], "give their folder with --out"),
        (["classify", "a", "--out", "out", "--json"], "leave --json out"),
        (["embed", "nothing", "--out", "out", "--device", "cpu"], "There is no file or folder nothing"),
        (["detect", "a", "b", "--out", "out"], "takes one source, got 2"),
        (["segment", "a"], "give their folder with --out"),
    ],
)
def test_options_that_do_not_go_together(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in zoo(*arguments, "--engine", "local", code=2).stderr
