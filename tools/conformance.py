"""Run timm's own model tests, of the installed version, on the models of the zoo.

    python -m zoo.tools.conformance [GLOB]... [--workers N]

Wheels of timm carry no tests, its source archives do: the archive is downloaded with pip into a cache folder, checked,
and only its ``tests/`` is unpacked. ``conformance_plugin.py`` then points those tests at our models.
"""

import fnmatch
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import timm
import typer
from rich.console import Console
from rich.table import Table

# Hashes of timm-<version>.tar.gz. Another version is used unchecked, and said so.
SHA256 = {
    "1.0.29": "1af8d12bb7e15c5f96e98d60b7b8319cd7f31730778bf1af58e912a7ce171576",
    "1.0.30": "1444a3af7e17fdba5440ac2bcf6e4b728da96dd62289ed9e1bcba31a545f5935",
    "1.0.31": "baa0b333339c46d3d6d4965d99b69f5053afed71210e8f433d7ea5ee6a18f0ec",
}
CACHE = Path(".conformance")

console = Console(stderr=True)


@dataclass(frozen=True)
class Result:
    """One test of timm's suite on one model.

    Attributes:
        model: name of the model.
        test: name of the test function.
        outcome: "passed", "failed" or "skipped".
        seconds: how long it ran.
        reason: start of the error, or why it was skipped.
    """

    model: str
    test: str
    outcome: str
    seconds: float
    reason: str


def zoo_models(*globs: str) -> list[str]:
    """Names of the zoo's models, sorted; of those that match one of the globs, if any are given.

    Raises:
        ValueError: a glob matches none.
    """
    names = [name for name in timm.list_models() if timm.models.model_entrypoint(name).__module__.startswith("zoo.")]
    for glob in globs:
        if not fnmatch.filter(names, glob):
            raise ValueError(f"No model of the zoo is named {glob}: the names are {', '.join(names)}.")
    return [name for name in names if not globs or any(fnmatch.fnmatch(name, glob) for glob in globs)]


def timm_tests(cache: Path = CACHE) -> Path:
    """The folder that holds the ``tests/`` of the installed timm version, downloaded once.

    Raises:
        ConnectionError: the source archive cannot be downloaded, or is not the one that was published.
    """
    version = timm.__version__
    folder = cache.absolute() / f"timm-{version}"
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as name:
        scratch = Path(name)
        # pip builds an archive's metadata, which runs code from it: so pip has to check the hash, before that.
        pinned = f" --hash=sha256:{SHA256[version]}" if version in SHA256 else ""
        if not pinned:
            console.print(f"No hash of timm {version} is known: its tests are used unchecked.", style="yellow")
        (scratch / "requirements.txt").write_text(f"timm=={version}{pinned}\n", encoding="utf-8")
        command = ["-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "timm", "-r", "requirements.txt"]
        done = subprocess.run([sys.executable, *command], cwd=scratch, capture_output=True, text=True)
        archive = scratch / f"timm-{version}.tar.gz"
        if done.returncode or not archive.is_file():
            errors = [line.removeprefix("ERROR: ") for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
            said = " ".join(errors) or done.stderr.strip() or f"it made no {archive.name}"
            raise ConnectionError(f"pip could not download the source archive of timm {version}: {said}")
        with tarfile.open(archive) as tar:
            tests = [member for member in tar if Path(member.name).parts[1:2] == ("tests",)]
            tar.extractall(scratch, members=tests, filter="data")
        try:
            os.replace(scratch / f"timm-{version}", folder)
        except OSError:
            if not folder.is_dir():  # unless another process was faster
                raise
    return folder


def run_suite(models: Sequence[str], *, cache: Path = CACHE, workers: int = 0) -> list[Result]:
    """Run the tests in a process of its own, whose output goes to this one's.

    Args:
        models: names of registered models.
        cache: where timm's tests are kept.
        workers: processes of pytest-xdist; 0 for none.

    Returns:
        One result for each model and each test that was run on it.

    Raises:
        ConnectionError: as of ``timm_tests``.
        RuntimeError: pytest did not get to the tests.
    """
    folder = timm_tests(cache)
    parallel = ["-n", str(workers)] if workers else []
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.json"
        command = [sys.executable, "-m", "pytest", "tests/test_models.py", "-q", "-c", os.devnull, "--rootdir", "."]
        environment = {
            **os.environ,
            "ZOO_CONFORMANCE_MODELS": ",".join(models),
            "ZOO_CONFORMANCE_REPORT": str(report),
            "HF_HUB_OFFLINE": "1",
        }
        if workers:
            environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // workers))
        plugin = ["-p", "zoo.tools.conformance_plugin", "-p", "no:cacheprovider"]
        done = subprocess.run([*command, *plugin, *parallel], cwd=folder, env=environment)
        if not report.is_file():
            raise RuntimeError(f"pytest stopped with code {done.returncode} before the tests: see its output above.")
        return [Result(**result) for result in json.loads(report.read_text(encoding="utf-8"))]


def main(
    globs: Annotated[list[str] | None, typer.Argument(help="Names of zoo models, with * and ?.")] = None,
    workers: Annotated[int, typer.Option(help="Processes (pytest-xdist); 0 runs the tests in one.")] = 0,
    cache: Annotated[Path, typer.Option(help="Folder for timm's tests.")] = CACHE,
) -> None:
    """Run timm's own model tests on the models of the zoo (the tiny ones, unless GLOBS are given)."""
    try:
        if workers and not find_spec("xdist"):
            raise ValueError(
                "Several processes need pytest-xdist: run `pip install pytest-xdist`, or give --workers 0."
            )
        models = zoo_models(*(globs or ["test_*"]))
        results = run_suite(models, cache=cache, workers=workers)
    except (ConnectionError, RuntimeError, ValueError) as error:
        console.print(f"error: {error}", style="red", markup=False)
        raise typer.Exit(1) from None
    by_model: defaultdict[str, list[Result]] = defaultdict(list)
    for result in results:
        by_model[result.model].append(result)
    table = Table("model", "passed", "failed", "skipped", "seconds", title=f"tests of timm {timm.__version__}")
    for model in models:
        counts = [sum(r.outcome == outcome for r in by_model[model]) for outcome in ("passed", "failed", "skipped")]
        table.add_row(model, *map(str, counts), f"{sum(r.seconds for r in by_model[model]):.1f}")
    Console().print(table)
    failed = [result for result in results if result.outcome == "failed"]
    untested = [model for model in models if not any(r.outcome == "passed" for r in by_model[model])]
    for result in failed:
        console.print(f"{result.model} {result.test}: {result.reason}", style="red", markup=False)
    if untested:
        console.print(f"error: no test passed on {', '.join(untested)}.", style="red", markup=False)
    raise typer.Exit(bool(failed or untested))


if __name__ == "__main__":
    typer.run(main)
