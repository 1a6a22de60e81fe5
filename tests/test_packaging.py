"""The wheel is complete, holds nothing but `zoo` and works without a checkout; the pins fit setup.py."""

import json
import os
import re
import subprocess
import sys
from importlib.metadata import distributions, requires, version
from pathlib import Path
from zipfile import ZipFile

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
FOLDERS = {"zoo": "zoo"} | {name: f"zoo/{name}" for name in ("backbones", "configs", "kernels", "mllm", "tools")}


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    """Built from links to the sources, so that the build's own files do not land in the checkout."""
    source = tmp_path_factory.mktemp("source")
    for path in ROOT.iterdir():
        if not path.name.startswith(".") and path.name not in ("build", "dist") and path.suffix != ".egg-info":
            (source / path.name).symlink_to(path)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", source / "dist", source]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = (source / "dist").glob("*.whl")
    return path


@pytest.fixture(scope="session")
def installed(wheel, tmp_path_factory):
    target = tmp_path_factory.mktemp("installed")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", target, wheel]
    subprocess.run(command, check=True)
    return target


def run(installed, folder, *arguments):
    """Python in an empty folder, with the installed wheel before the checkout's editable install and without caches."""
    environment = os.environ | {
        "PYTHONPATH": str(installed),
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder),
        "TORCH_HOME": str(folder),
    }
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_holds_zoo_and_nothing_else(wheel):
    names = ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {
        "zoo",
        f"linear_vision_zoo-{version('linear-vision-zoo')}.dist-info",
    }
    assert any(name.endswith("/licenses/LICENSE") for name in names)


def test_the_wheel_holds_every_source_file_and_all_data(wheel):
    expected = {
        f"{inside}/{file.relative_to(ROOT / folder).as_posix()}"
        for folder, inside in FOLDERS.items()
        for file in (ROOT / folder).rglob("*.py")
    }
    data = [file for name in ("weights", "samples", "scenes") for file in (ROOT / "zoo" / name).rglob("*")]
    expected |= {file.relative_to(ROOT).as_posix() for file in data if file.is_file()}
    expected |= {f"zoo/{file.relative_to(ROOT).as_posix()}" for file in (ROOT / "configs").rglob("*.yaml")}
    expected |= {"zoo/serve/page.css", "zoo/serve/page.js"}
    for kind in (".safetensors", ".jpg", ".yaml", "quickstart_classes.json"):
        assert any(name.endswith(kind) for name in expected), kind
    assert {name for name in ZipFile(wheel).namelist() if name.startswith("zoo/")} == expected


def test_it_lists_and_predicts_without_the_checkout(installed, tmp_path):
    assert "ravlt_small" in run(installed, tmp_path, "-m", "zoo", "list")
    picture = installed / "zoo/samples/rocket.jpg"
    answer = json.loads(run(installed, tmp_path, "-m", "zoo", "classify", picture, "--json", "--device", "cpu"))
    (result,) = answer["results"]
    assert "rocket" in result["names"]
    assert result["probabilities"][0] > 0.05  # of a thousand classes


def test_every_module_comes_from_the_wheel(installed, tmp_path):
    code = """
import sys, zoo, zoo.cli, zoo.kernels, zoo.backbones.van, zoo.tools.model_table
from importlib.resources import files
modules = [module.__file__ for name, module in sys.modules.items() if name.split(".")[0] == "zoo" and module.__file__]
print("\\n".join([*modules, str(files("zoo") / "weights"), str(files("zoo.configs") / "classification")]))
"""
    paths = run(installed, tmp_path, "-c", code).splitlines()
    assert len(paths) > 20
    assert [path for path in paths if not Path(path).resolve().is_relative_to(installed.resolve())] == []
    assert all(Path(path).exists() for path in paths)


def pins():
    """Requirements of constraints.txt by normalised name, for this Python."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    found = [Requirement(line) for line in lines if not line.startswith("#")]
    return {normal(pin.name): pin for pin in found if pin.marker is None or pin.marker.evaluate()}


def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_dependency_has_a_pin_that_fits():
    here = default_environment() | {"extra": "dev"}
    needed = [Requirement(text) for text in requires("linear-vision-zoo")]
    needed = [need for need in needed if need.marker is None or need.marker.evaluate(here)]
    assert {"torch", "timm", "pytest"} <= {need.name for need in needed}
    for need in needed:
        (pin,) = pins()[normal(need.name)].specifier
        assert pin.operator == "==" and need.specifier.contains(pin.version), f"{need}, but {pin} is pinned"


def test_pins_cover_what_the_dependencies_need():
    here = default_environment() | {"extra": ""}
    tested = [
        found
        for found in distributions()
        if f"=={found.version}" == str(getattr(pins().get(normal(found.name)), "specifier", ""))
    ]
    assert len(tested) > 5
    for found in tested:
        for need in map(Requirement, found.requires or ()):
            if (need.marker is None or need.marker.evaluate(here)) and not re.match("nvidia-|cuda-|triton", need.name):
                assert normal(need.name) in pins(), f"{found.name} needs {need.name}, which has no pin"
