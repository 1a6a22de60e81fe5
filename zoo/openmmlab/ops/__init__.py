"""``mmcv.ops`` without compiled code: what its extension ``mmcv._ext`` has, on torchvision and PyTorch.

``install`` appends a finder to ``sys.meta_path`` that serves a module of that name. A compiled extension is found
first and wins. Nothing on disk is touched.
"""

import importlib
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from types import ModuleType
from typing import Any, Literal

from zoo.openmmlab.ops import (
    boxes,
    carafe,
    deform_attention,
    deform_conv,
    focal_loss,
    masked_conv,
    psa_mask,
    roi_align,
    roi_pool,
)
from zoo.openmmlab.ops.missing import stub

__all__ = ["OPS", "install"]

EXTENSION = "mmcv._ext"
MODELS = ("mmdet.structures", "mmdet.models", "mmseg.models")
MODULES = (boxes, carafe, deform_attention, deform_conv, focal_loss, masked_conv, psa_mask, roi_align, roi_pool)
OPS: dict[str, Callable] = {name: getattr(module, name) for module in MODULES for name in module.__all__}


def install() -> Literal["compiled", "torch"]:
    """Make ``import mmcv.ops`` work, and tell which ops it uses.

    Warns:
        UserWarning: there is a compiled extension, but it does not load.

    Raises:
        ImportError: mmcv is missing, or models were imported before, with what they put in the place of missing ops.
    """
    early = [name for name in MODELS if name in sys.modules]
    if early and "mmcv.ops" not in sys.modules:
        raise ImportError(f"{early[0]} was imported without the ops of mmcv: import zoo.openmmlab before it.")
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
    try:
        extension = importlib.import_module(EXTENSION)
    except ImportError as error:
        if importlib.util.find_spec("mmcv") is None:
            raise
        warnings.warn(f"The compiled ops of mmcv do not load, PyTorch's are used instead: {error}", stacklevel=2)
        sys.meta_path.insert(0, _Finder())
        extension = importlib.import_module(EXTENSION)
    return "torch" if isinstance(extension.__loader__, _Finder) else "compiled"


class _Finder(MetaPathFinder, Loader):
    """Finds, and fills, the stand-in for the extension."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        return spec_from_loader(name, self, origin=__name__) if name == EXTENSION else None

    def exec_module(self, module: ModuleType) -> None:
        vars(module).update(OPS)
        vars(module)["get_compiler_version"] = vars(module)["get_compiling_cuda_version"] = _version
        vars(module)["__getattr__"] = _without_replacement


def _version() -> str:
    return "none, the ops are PyTorch's"


def _without_replacement(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(f"{EXTENSION} has no {name}")
    return stub(name)
