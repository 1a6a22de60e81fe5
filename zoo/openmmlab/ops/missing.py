"""What happens when an op is called that has no replacement."""

from collections.abc import Callable
from typing import Any, NoReturn


def missing(op: str) -> NoReturn:
    """Raise the NotImplementedError for an op of mmcv that only its compiled extension has."""
    raise NotImplementedError(
        f"{op} has no replacement in PyTorch here: "
        f"install mmcv with its compiled ops in place of mmcv-lite (docs/OPENMMLAB.md)."
    )


def stub(name: str) -> Callable[..., NoReturn]:
    """A function that raises when it is called: ``mmcv.ops`` looks all its symbols up at import."""

    def raises(*arguments: Any, **options: Any) -> NoReturn:
        missing(f"The mmcv op {name}")

    raises.__name__ = name
    return raises
