"""`zoo doctor`: what it finds, what it advises, and what it calls broken."""

import importlib
import importlib.util
import json
import sys
from importlib.metadata import PackageNotFoundError, version

import pytest
import torch
from typer.testing import CliRunner

from zoo import cli, doctor


def zoo(*arguments, code=0):
    result = CliRunner().invoke(cli.app, ["doctor", *arguments])
    assert result.exit_code == code, result.output
    return result.stdout


@pytest.fixture
def installed(monkeypatch):
    """Versions that replace or hide those of this environment, by distribution; None hides one."""
    others = {}

    def found(name):
        if name in others:
            if others[name] is None:
                raise PackageNotFoundError(name)
            return others[name]
        return version(name)

    monkeypatch.setattr(doctor, "version", found)
    return others


@pytest.fixture
def without_openmmlab(monkeypatch):
    monkeypatch.setattr(doctor, "MODULES", {})


def rows(output):
    """Version by package, from the table."""
    lines = output[output.index("Package ") :].splitlines()
    return {line.split()[0]: line.split()[1] for line in lines[1:] if line.strip()}


def test_this_environment_is_whole(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    document = json.loads(zoo("--json"))
    assert document["problems"] == []
    packages = {package["name"]: package for package in document["packages"]}
    assert packages["torch"] == {"name": "torch", "version": version("torch"), "use": "everything", "extra": ""}
    assert packages["pyarrow"]["extra"] == "export"
    assert len(packages) == len(document["packages"])
    assert document["toolkit"] == (torch.version.cuda or torch.version.hip)
    assert (document["triton"] == "runs") == torch.cuda.is_available()
    if importlib.util.find_spec("mmcv"):
        assert document["mmcv_ops"] in ("torch", "compiled")
        assert ("nms" in document["torch_ops"]) == (document["mmcv_ops"] == "torch")


def test_the_table_has_the_same(monkeypatch, without_openmmlab):
    monkeypatch.setenv("COLUMNS", "200")
    output = zoo()
    assert rows(output)["torch"] == version("torch") and rows(output)["timm"] == version("timm")
    assert f"Triton    {doctor.diagnose().triton}" in output
    assert "mmcv.ops  no mmcv" in output


def test_what_is_missing_comes_with_its_command(installed, without_openmmlab):
    installed["pyarrow"] = None
    diagnosis = doctor.diagnose()
    assert next(package for package in diagnosis.packages if package.name == "pyarrow").version is None
    assert diagnosis.advice["ONNX and Parquet files"] == "pip install 'linear-vision-zoo[export]'"
    assert diagnosis.problems == ()  # missing is not broken
    output = zoo()
    assert rows(output)["pyarrow"] == "not"  # installed
    assert "For ONNX and Parquet files: pip install 'linear-vision-zoo[export]'\n" in output


def test_a_missing_core_package_needs_no_extra(installed, without_openmmlab):
    installed["rich"] = None
    assert doctor.diagnose().advice["everything"] == "pip install linear-vision-zoo"


def test_a_version_that_is_refused_is_broken(installed, without_openmmlab):
    installed["timm"] = "0.9.2"
    (problem,) = json.loads(zoo("--json", code=1))["problems"]
    assert problem == "timm 0.9.2 is installed, but everything needs >=1.0.29: pip install 'timm>=1.0.29'"
    assert f"Broken: {problem}." in zoo(code=1)


@pytest.fixture
def dense_extra(monkeypatch):
    """The metadata of this package, as far as boxes and masks go."""
    needs = ["torch>=2.9", *(f'{name}; extra == "dense"' for name in ("mmengine", "mmcv-lite", "mmdet", "ftfy"))]
    monkeypatch.setattr(doctor, "requires", lambda name: needs)


def test_the_forks_are_taken_for_what_they_replace(installed, dense_extra, without_openmmlab):
    installed |= {"mmengine": None, "mmcv-lite": None, "mmdet": None, "ftfy": "6.3"}
    installed |= {"onedl-mmengine": "0.10.12", "onedl-mmcv": "2.3.6", "onedl-mmdetection": "3.5.1", "mmcv": None}
    names = [(package.name, package.version) for package in doctor.diagnose().packages if package.extra == "dense"]
    assert names == [
        ("onedl-mmengine", "0.10.12"),
        ("onedl-mmcv", "2.3.6"),
        ("onedl-mmdetection", "3.5.1"),
        ("ftfy", "6.3"),
    ]
    assert doctor.diagnose().advice == {}


def test_the_two_families_are_never_advised_together(installed, dense_extra, without_openmmlab):
    installed |= {"mmengine": None, "mmcv-lite": None, "mmcv": None, "mmdet": None, "ftfy": None}
    installed |= {"onedl-mmengine": "0.10.12", "onedl-mmcv": None, "onedl-mmdetection": None}
    assert doctor.diagnose().advice == {"boxes and masks": "pip install onedl-mmcv onedl-mmdetection ftfy"}


def test_two_distributions_of_one_module_are_broken(installed, monkeypatch):
    installed |= {"mmcv-lite": "2.1.0", "onedl-mmcv": "2.3.6", "mmcv": None}
    monkeypatch.setattr(doctor, "MODULES", {"no_such_module": "mmcv-lite"})
    (problem,) = doctor.diagnose().problems
    assert problem.startswith("mmcv-lite and onedl-mmcv overwrite each other's files: uninstall")


@pytest.mark.parametrize("broken", ["zoo.openmmlab", "mmdet"])
def test_an_import_that_fails_is_broken(monkeypatch, broken):
    pytest.importorskip("mmdet")
    imported = importlib.import_module

    def fail(name, package=None):
        if name == broken:
            raise ImportError("libGL.so.1: cannot open shared object file\nand more")
        return imported(name, package)

    monkeypatch.setattr(importlib, "import_module", fail)
    diagnosis = doctor.diagnose()
    assert diagnosis.problems == (f"import {broken} fails: libGL.so.1: cannot open shared object file",)
    assert (diagnosis.mmcv_ops is None) == (broken == "zoo.openmmlab")


def test_a_gpu_without_working_triton_is_broken(monkeypatch, without_openmmlab):
    def fails(*tensors):
        raise RuntimeError("no compiler\nhere")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "randn", lambda *shape, **options: torch.zeros(3))
    monkeypatch.setattr(doctor.kernels, "linear_attention", fails)
    monkeypatch.delenv("ZOO_KERNELS", raising=False)
    diagnosis = doctor.diagnose()
    assert diagnosis.triton == "RuntimeError: no compiler"
    assert diagnosis.problems == ("Triton does not run: RuntimeError: no compiler",)
    assert "ZOO_KERNELS" not in doctor.os.environ


def test_why_triton_does_not_run(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert doctor._triton() == "PyTorch sees no GPU"
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    assert doctor._triton() == "this PyTorch is built without CUDA"
    monkeypatch.setitem(sys.modules, "triton", None)
    assert doctor._triton() == "the package triton is not installed"
