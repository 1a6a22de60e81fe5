"""What `import zoo` costs and touches, who imports whom, and that the folders are harmless under their bare names."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BASE = {"PIL", "filelock", "huggingface_hub", "numpy", "rich", "safetensors", "timm", "torch", "torchvision", "typer"}
# Folder: what of ours it may import, and which other packages; None for any, where it is used (not at import).
MAY_IMPORT = {
    "kernels": ({"zoo.kernels"}, {"torch", "triton"}),
    "backbones": ({"zoo.backbones", "zoo.kernels"}, {"torch", "timm"}),
    # What needs transformers is not imported with zoo: a test below.
    "mllm": ({"zoo.mllm"}, {"PIL", "lmms_eval", "numpy", "safetensors", "timm", "torch", "transformers"}),
    "zoo": ({"zoo"}, BASE),
    "tools": ({"zoo"}, None),
}
# zoo.openmmlab is imported only where these are, and says so where they are not.
OPENMMLAB = {"cv2", "mmcv", "mmdet", "mmengine", "mmseg"}
# So is zoo.serve.
SERVE = {"anyio", "fastapi", "fastapi_offline", "gradio", "pydantic", "starlette", "uvicorn"}
NEVER = {"zoo": {"zoo.tools"}}


def python(code, cwd=ROOT, **environment):
    """What a fresh Python that starts in a folder prints."""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_adds_little_to_that_of_timm(tmp_path):
    code = "from time import time; a = time(); import timm; b = time(); import zoo; print(time() - b)"
    assert min(float(python(code, tmp_path)) for _ in range(3)) < 1.5


def test_import_takes_nothing_that_only_some_users_have(tmp_path):
    code = "import sys, zoo; print({'accelerate', 'mmengine', 'peft', 'transformers'} & set(sys.modules))"
    assert python(code, tmp_path) == "set()\n"


WATCHED = """
import sys
touched = []
def watch(event, arguments):
    if event.startswith(("socket.", "urllib.")):
        touched.append(event)
        raise OSError("no network in this test")
sys.addaudithook(watch)
"""


def test_nothing_touches_the_network(tmp_path):
    use = "import timm, zoo; timm.create_model('ravlt_nano'); zoo.Classifier()"
    cache = {"HF_HOME": str(tmp_path), "TORCH_HOME": str(tmp_path)}
    assert python(f"{WATCHED}{use}; print(touched)", tmp_path, **cache) == "[]\n"
    assert "[]" not in python(
        f"{WATCHED}import socket\ntry: socket.create_connection(('localhost', 9))\nexcept OSError: print(touched)"
    )


def test_models_are_registered_and_replace_none_of_timms(tmp_path):
    code = """
import timm
from timm.models import model_entrypoint
before = {name: model_entrypoint(name) for name in timm.list_models()}
import zoo
ours = set(timm.list_models()) - set(before)
print(all(model_entrypoint(name) is function for name, function in before.items()))
print({"van_b0", "van_b6", "ravlt_tiny", "ravlt_large"} <= ours)
print({model_entrypoint(name).__module__.split(".")[0] for name in ours})
"""
    assert python(code, tmp_path).split("\n")[:3] == ["True", "True", "{'zoo'}"]


def test_bare_folders_are_harmless():
    code = """
import sys
import backbones, kernels, tools
print([name for name in ("torch", "timm", "numpy", "triton", "zoo") if name in sys.modules])
import timm, torch
print(timm.list_models("van_*") + timm.list_models("ravlt_*"), hasattr(torch.ops.zoo, "linear_attention"))
"""
    assert python(code) == "[]\n[] False\n"


def test_the_bare_folders_are_what_was_imported():
    code = "import backbones, kernels, tools; print(*(list(m.__path__)[0] for m in (backbones, kernels, tools)))"
    assert python(code).split() == [str(ROOT / name) for name in ("backbones", "kernels", "tools")]


def test_transformers_can_be_imported_from_the_root():
    pytest.importorskip("transformers")
    code = "import transformers; from transformers import BertConfig, BertModel; print(BertModel.__name__)"
    assert python(code) == "BertModel\n"


def imported(source, package):
    """(module, at import or later) of each import statement; `from a import b` counts as `a.b`."""
    tree = ast.parse(source)
    later = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) not in later) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            yield from ((f"{base}.{alias.name}", id(node) not in later) for alias in node.names)


def within(module, packages):
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def forbidden(source, folder, package):
    ours, others = MAY_IMPORT[folder]
    for module, at_import in imported(source, package):
        top = module.partition(".")[0]
        if top == "zoo":
            allowed = within(module, ours) and not within(module, NEVER.get(folder, ()))
        elif top in sys.stdlib_module_names:
            allowed = True
        else:  # what only some users need is imported where it is used, but never by kernels and backbones
            allowed = others is None or top in others or (folder in ("zoo", "mllm") and not at_import)
            allowed |= within(package, {"zoo.openmmlab"}) and top in OPENMMLAB
            allowed |= within(package, {"zoo.serve"}) and top in SERVE
        if not allowed:
            yield module


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_arrows_point_one_way(folder):
    found = {}
    for file in (ROOT / folder).rglob("*.py"):
        parts = file.relative_to(ROOT).parent.parts
        package = ".".join(parts if folder == "zoo" else ("zoo", *parts))
        found[str(file.relative_to(ROOT))] = list(forbidden(file.read_text(encoding="utf-8"), folder, package))
    assert len(found) > 2
    assert {file: modules for file, modules in found.items() if modules} == {}


@pytest.mark.parametrize(
    ("folder", "source", "module"),
    [
        ("kernels", "import timm", "timm"),
        ("kernels", "def f():\n    from zoo.backbones import van", "zoo.backbones.van"),
        ("kernels", "from ... import backbones", "zoo.backbones"),
        ("backbones", "from zoo.catalogue import CATALOGUE", "zoo.catalogue.CATALOGUE"),
        ("backbones", "import zoo", "zoo"),
        ("backbones", "import numpy as np", "numpy"),
        ("mllm", "from zoo.backbones import van", "zoo.backbones.van"),
        ("mllm", "import mmdet", "mmdet"),
        ("mllm", "def f():\n    from zoo import files", "zoo.files"),
        ("zoo", "from zoo import tools", "zoo.tools"),
        ("zoo", "def f():\n    import zoo.tools.sprites", "zoo.tools.sprites"),
        ("zoo", "import pyarrow", "pyarrow"),
        ("zoo", "from kernels import linear_attention", "kernels.linear_attention"),
    ],
)
def test_an_arrow_the_wrong_way_is_found(folder, source, module):
    assert list(forbidden(source, folder, f"zoo.{folder}.linear_attention" if folder != "zoo" else "zoo")) == [module]
