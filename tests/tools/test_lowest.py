"""constraints-lowest.txt, with which `make test-lowest` tests, has the floors that setup.py names."""

import ast
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[2]


def base_install():
    """The requirements of the base install, as setup.py has them."""
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    (texts,) = (
        node.value for node in ast.walk(tree) if isinstance(node, ast.keyword) and node.arg == "install_requires"
    )
    return {need.name: need.specifier for need in map(Requirement, ast.literal_eval(texts))}


def test_the_oldest_versions_are_the_floors():
    lines = (ROOT / "constraints-lowest.txt").read_text(encoding="utf-8").splitlines()
    pins = {
        need.name: need.specifier for need in map(Requirement, (line for line in lines if not line.startswith("#")))
    }
    needs = base_install()
    assert needs.keys() <= pins.keys()
    for name, floor in needs.items():
        (pin,) = pins[name]
        assert pin.operator == "=="
        if name == "torchvision":  # that of this torch: 0.N goes with 2.(N - 15)
            (torch,) = pins["torch"]
            assert Version(pin.version).minor == Version(torch.version).minor + 15
        else:
            (lowest,) = floor
            fixed = Version(pin.version).release[: len(Version(lowest.version).release)]
            assert lowest.operator == ">=" and fixed == Version(lowest.version).release, f"{name}: {pin}, but {lowest}"
