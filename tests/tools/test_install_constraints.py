"""Which versions `make demo` and `make test` let pip install, and what they refuse."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from zoo.tools.install_constraints import constraints

ROOT = Path(__file__).parents[2]
PINS = """# tested
numpy==2.2.6; python_version < "3.11"
numpy==2.4.6; python_version >= "3.11"
pyyaml==6.0
torch==2.14.1
torchvision==0.29.1
typing-extensions==4.16.0
"""
LINES = PINS.splitlines()[1:]
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}  # of an outer make


def lines(installed, own):
    return constraints(PINS, installed, own=own).splitlines()


@pytest.mark.parametrize("own", [True, False])
def test_an_empty_environment_gets_what_was_tested(own):
    assert lines({"pip": "25.0"}, own) == LINES


def test_ours_follows_the_pins_but_keeps_its_torch():
    kept = lines({"numpy": "2.3.0", "torch": "2.10.0+cpu", "torchvision": "0.25.0+cpu"}, own=True)
    assert kept == [*LINES[:3], LINES[5], "torch==2.10.0+cpu", "torchvision==0.25.0+cpu"]


def test_another_one_keeps_all_it_has():
    kept = lines({"numpy": "2.3.0", "torch": "2.10.0", "typing-extensions": "4.1", "torchvision": "0.25.0"}, own=False)
    assert kept == ["pyyaml==6.0", "torch==2.10.0", "torchvision==0.25.0"]


@pytest.mark.parametrize("own", [True, False])
def test_pip_chooses_the_torchvision_that_goes_with_a_torch(own):
    kept = lines({"torch": "2.10.0"}, own)
    assert kept[-1] == "torch==2.10.0"
    assert not any(line.startswith("torchvision") for line in kept)


@pytest.mark.parametrize(
    ("version", "fits"), [("2.8.0", False), ("1.13.1+cu117", False), ("2.9.0", True), ("3.0", True)]
)
def test_a_torch_that_is_too_old_is_refused(version, fits):
    if fits:
        assert lines({"torch": version}, own=False)[-1] == f"torch=={version}"
    else:
        with pytest.raises(ValueError, match=r"has torch .*, but 2\.9 or newer is needed"):
            constraints(PINS, {"torch": version}, own=False)


@pytest.mark.skipif(not shutil.which("make"), reason="there is no make")
@pytest.mark.parametrize(
    ("script", "found"), [("[ $1 = -V ] && echo Python 3.9.2", "Python 3.9.2"), (None, "not found")]
)
def test_make_refuses_an_old_or_missing_python_in_one_line(tmp_path, script, found):
    python = tmp_path / "python"
    if script:
        python.write_text(f"#!/bin/sh\n{script}\n")
        python.chmod(0o755)
    venv = tmp_path / "venv"
    command = ["make", "--silent", "demo", f"PYTHON={python}", f"VENV={venv}"]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 2
    said = f"Python 3.10 to 3.13 is needed, but {python} is {found}: try make PYTHON=python3.12"
    assert [line for line in done.stderr.splitlines() if not line.startswith("make")] == [said]
    assert not venv.exists()


@pytest.mark.skipif(not shutil.which("make"), reason="there is no make")
def test_make_installs_again_only_if_something_changed(tmp_path):
    """What make would do in an environment that is up to date, and in one that another checkout installed into."""
    venv = tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin/python").symlink_to(sys.executable)
    for root, installs in ((ROOT, False), (tmp_path, True)):
        (venv / ".zoo-base").touch()
        (venv / ".zoo-root").write_text(f"{root}\n")
        command = ["make", "--dry-run", "demo", f"VENV={venv}"]
        done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=True)
        assert ("pip install" in done.stdout) == installs
        assert f"{venv}/bin/python -m zoo demo" in done.stdout
