"""docs/ENVIRONMENT.md names every environment variable that our code reads, and no other."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ("zoo", "backbones", "kernels", "mllm")


def variables(source):
    """Names of the environment variables that a module reads or compares; `?` for a name that cannot be told."""
    tree = ast.parse(source)
    texts = {
        target.id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        for target in node.targets
        if isinstance(target, ast.Name)
    }

    def named(node):
        return texts.get(node.id, "?") if isinstance(node, ast.Name) else getattr(node, "value", "?")

    def is_environ(node):
        return (isinstance(node, ast.Attribute) and node.attr == "environ") or (
            isinstance(node, ast.Name) and node.id == "environ"
        )

    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and is_environ(node.value):
            yield named(node.slice)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and is_environ(node.func.value):
            yield from [named(node.args[0])] if node.args and node.func.attr != "update" else []  # that one sets
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) == "getenv":
            yield named(node.args[0])
        elif isinstance(node, ast.Compare) and any(map(is_environ, node.comparators)):
            yield named(node.left)
        elif isinstance(node, ast.keyword) and node.arg == "envvar":  # of a typer option
            yield named(node.value)


def read_in(*folders):
    files = [file for folder in folders for file in (ROOT / folder).rglob("*.py")]
    return {name for file in files for name in variables(file.read_text(encoding="utf-8"))}


def documented(heading):
    section = (ROOT / "docs/ENVIRONMENT.md").read_text(encoding="utf-8").split(f"## {heading}\n")[1].split("\n## ")[0]
    return {row.split("`")[1] for row in section.splitlines() if row.startswith("| `")}


def test_the_page_names_what_the_package_reads():
    assert read_in(*PACKAGE) == documented("Read by the package")


def test_the_page_names_what_the_tools_and_the_tests_read():
    found = read_in("tools", "tests") - documented("Read by the package")
    assert found == documented("Read by the development tools and the tests")


def test_every_way_to_read_one_is_seen():
    source = """
import os
from os import environ, getenv
KEY = "A"
os.environ[KEY], os.environ.get("B", ""), os.getenv("C"), getenv("D"), environ["E"], "F" in os.environ
os.environ.setdefault("G", ""), os.environ.pop("H"), dict(os.environ), typer.Option(envvar="I"), os.environ[key()]
"""
    assert sorted(variables(source)) == ["?", *"ABCDEFGHI"]
