"""The README: its examples run, offline, and its table is that of the catalogue."""

import functools
import re
import shlex
import shutil
from pathlib import Path

import pytest
import timm
import torch
from typer.testing import CliRunner

from zoo.catalogue import CATALOGUE
from zoo.cli import app
from zoo.tools.model_table import model_table, with_table

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


COMMANDS = [line.removeprefix("$ ") for block in blocks("console") for line in block.splitlines()]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with what the README says it has: pictures, and a checkpoint of VAN-B0."""
    folder = tmp_path_factory.mktemp("readme")
    shutil.copytree(ROOT / "zoo/samples", folder / "pictures")
    torch.save({"state_dict": timm.create_model("van_b0").state_dict()}, folder / "van_b0.pth")
    return folder


@pytest.fixture
def folder(prepared, monkeypatch):
    monkeypatch.chdir(prepared)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    # Machine code and fresh processes would take minutes, and have tests of their own.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    monkeypatch.setattr("zoo.measure._cpu_peak", lambda *_: None)
    return prepared


def test_there_are_examples():
    assert {command.split()[1] for command in COMMANDS} == {"classify", "embed", "list", "info", "compare", "convert"}
    assert len(blocks("python")) == 4


@pytest.mark.parametrize("command", COMMANDS)
def test_command(command, folder):
    program, *arguments = shlex.split(command)
    assert program == "zoo"
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert result.stdout.strip()
    for name in arguments:
        if name.endswith((".npy", ".safetensors", "sheet.png", "compare.png")):
            assert (folder / name).stat().st_size > 1000


@pytest.mark.parametrize("code", blocks("python"), ids=lambda code: code.splitlines()[-1][:40])
def test_python(code, folder, capsys):
    namespace = {}
    exec(compile(code, "example of the README", "exec"), namespace)
    comments = dict(re.findall(r"^(\w+) = .*# .*?(\([\d, D]+\)|4 maps)", code, re.MULTILINE))
    for name, said in comments.items():
        value = namespace[name]
        real = "4 maps" if said == "4 maps" and len(value) == 4 else str(tuple(value.shape))
        assert re.fullmatch(re.escape(said).replace("D", r"\d+"), real), f"{name} is {real}, the README says {said}"
    assert ("print(" in code) == bool(capsys.readouterr().out)


def test_only_make_and_pip_are_not_run():
    """What this file cannot run: installing, which continuous integration does."""
    for block in blocks("sh"):
        assert all(line.split()[0] in ("make", "pip") for line in block.splitlines())
    assert set(re.findall(r"^```(\w+)$", TEXT, re.MULTILINE)) == {"sh", "console", "python"}


def test_the_table_is_that_of_the_catalogue():
    assert with_table(TEXT) == TEXT, "run python -m zoo.tools.model_table"
    assert len(model_table().splitlines()) == len(CATALOGUE) + 2
    assert all(f"| `{name}` |" in TEXT for name in CATALOGUE)


def test_a_text_without_markers_is_refused():
    with pytest.raises(ValueError, match="no place for the table"):
        with_table("# Models\n")


def test_links_lead_somewhere():
    targets = re.findall(r"\]\(([^)#]+)", TEXT)
    local = [target for target in targets if not target.startswith("http")]
    assert {"CONTRIBUTING.md", "LICENSE"} <= set(local)
    assert [target for target in local if not (ROOT / target).exists()] == []
