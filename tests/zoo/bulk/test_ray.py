"""The engine of Ray writes the same bytes as the local one, also where an actor is killed."""

import os
import signal
from pathlib import Path

import pytest
import torch

from zoo.bulk import Recipe, ray_engine, run, sources, tasks
from zoo.bulk.ray_engine import _place
from zoo.bulk.run import Watcher

ray = pytest.importorskip("ray", reason="the engine ray needs the bulk extra")

NAME = "test_convnext"


@pytest.fixture(scope="module")
def cluster():
    """Two CPUs, so that the test needs no more than there are, and can have two actors anywhere."""
    ray.init(
        num_cpus=2, log_to_driver=False, include_dashboard=False, _system_config={"enable_metrics_collection": False}
    )
    yield
    ray.shutdown()


def files(out):
    return {path.name: path.read_bytes() for path in out.iterdir() if path.name != ".lock"}


def actors():
    """Process ids of the actors of this machine that hold models."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes()
        except OSError:  # it has ended
            continue
        if command.startswith(b"ray::MapWorker(MapBatches(_Actor"):
            found.append(int(process.name))
    return found


class Killer(Watcher):
    """Kills an actor when the first chunk is done."""

    killed = 0

    def advance(self, rows, failed):
        if not self.killed:
            self.killed = actors()[0]
            os.kill(self.killed, signal.SIGKILL)


@pytest.fixture
def one_thread():
    """As actors have: the last digits depend on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def deadly_picture(monkeypatch):
    """A picture that ends whatever process fetches it, here and in actors, which get a copy of what is defined here."""

    def fetch(item):
        return os._exit(1) if item.key == "b/15.png" else sources.fetch(item)

    class _Actor(ray_engine._Actor):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            tasks.fetch = fetch

    monkeypatch.setattr(ray_engine, "_Actor", _Actor)
    monkeypatch.setattr(tasks, "fetch", fetch)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the actors in /proc")
def test_ray_writes_the_bytes_of_the_local_engine(cluster, one_thread, deadly_picture, folder, weights, tmp_path):
    recipe = Recipe("classify", NAME, weights, device="cpu", batch_size=2)
    expected = run(recipe, str(folder), tmp_path / "local", shard_rows=2)
    killer = Killer()
    summary = run(recipe, str(folder), tmp_path / "ray", shard_rows=2, engine="ray", watcher=killer)
    assert killer.killed and summary.done == expected.done == 21 and summary.failed == expected.failed == 3
    assert set(summary.errors) == set(expected.errors)
    assert any(error.startswith("b/15.png ends the process that decodes it") for error in summary.errors)
    assert len(files(tmp_path / "ray")) == 11 and files(tmp_path / "ray") == files(tmp_path / "local")

    (tmp_path / "ray/part-000003.parquet").unlink()  # what is missing is done by either
    assert run(recipe, str(folder), tmp_path / "ray", shard_rows=2).done == 2
    assert files(tmp_path / "ray") == files(tmp_path / "local")


def test_an_actor_takes_a_gpu_where_there_is_one():
    def place(cluster, device, workers):
        recipe, asked = _place(cluster, Recipe("embed", NAME, device=device), workers)
        return recipe.device, asked

    assert place({"CPU": 4.0}, None, 4) == (None, {"num_cpus": 1})
    assert place({"CPU": 4.0, "GPU": 2.0}, None, 2) == ("cuda", {"num_gpus": 1})
    assert place({"CPU": 4.0, "GPU": 2.0}, "cuda:1", 2) == ("cuda", {"num_gpus": 1})
    assert place({"CPU": 4.0, "GPU": 2.0}, "cpu", 3) == ("cpu", {"num_cpus": 1})
    with pytest.raises(ValueError, match="3 workers need 3 GPUs, and the cluster has 2"):
        place({"CPU": 4.0, "GPU": 2.0}, "cuda", 3)
