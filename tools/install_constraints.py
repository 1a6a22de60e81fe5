"""Prints which versions to install into this environment: the tested ones, but never in place of the torch it has."""

import re
import sys
from collections.abc import Mapping
from importlib.metadata import distributions
from pathlib import Path

OWN = "linear-vision-zoo"  # the prompt that the Makefile gives to an environment it makes
TORCH_FLOOR = (2, 9)


def constraints(pins: str, installed: Mapping[str, str], *, own: bool) -> str:
    """The pins that pip may apply.

    Args:
        pins: text of a constraints file with ``name==version`` lines.
        installed: versions by normalised name.
        own: the environment is ours, so that all but torch and torchvision may change. In any other one
            everything that is there stays, unless a requirement forbids it.

    Returns:
        Text of a constraints file. An installed torch is pinned to its own version; without its torchvision, pip
        is free to choose the one that goes with it.

    Raises:
        ValueError: the torch in the environment is too old.
    """
    torch = {name: installed[name] for name in ("torch", "torchvision") if name in installed}
    if "torch" in torch and tuple(map(int, re.findall(r"\d+", torch["torch"])[:2])) < TORCH_FLOOR:
        floor = ".".join(map(str, TORCH_FLOOR))
        raise ValueError(
            f"This environment has torch {torch['torch']}, but {floor} or newer is needed: "
            f"upgrade it there, or choose another environment (make VENV=path)."
        )
    kept = {*torch, *(["torchvision"] if torch else []), *([] if own else installed)}
    lines = [line for line in pins.splitlines() if "==" in line and _normal(line.partition("==")[0]) not in kept]
    return "\n".join([*lines, *(f"{name}=={version}" for name, version in torch.items())])


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower().strip()


def main() -> None:
    """Reads the file named on the command line and prints what applies to the environment of this Python."""
    config = Path(sys.prefix, "pyvenv.cfg")
    own = config.is_file() and f"prompt = {OWN!r}" in config.read_text(encoding="utf-8").splitlines()
    installed = {_normal(found.metadata["Name"]): found.version for found in distributions()}
    try:
        print(constraints(Path(sys.argv[1]).read_text(encoding="utf-8"), installed, own=own))
    except ValueError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
