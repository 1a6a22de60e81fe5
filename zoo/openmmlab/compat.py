"""What mmengine 0.10 needs on a current Python, setuptools and PyTorch; nothing on disk is touched."""

import importlib.metadata
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import NoReturn

from mmengine.config import utils as config_utils
from mmengine.runner import checkpoint
from mmengine.utils import package_utils

from zoo.openmmlab.safe_load import load_from_local, load_url

__all__ = ["apply"]

IMGAUG = (
    "imgaug",
    "imgaug.augmenters",
    "imgaug.augmentables",
    "imgaug.augmentables.lines",
    "imgaug.augmentables.segmaps",
)


def apply() -> None:
    """Mend what is broken; may be repeated."""
    _find_packages_without_pkg_resources()
    _find_configs_of_renamed_packages()
    _do_without_imgaug()
    _load_checkpoints_safely()


def _find_packages_without_pkg_resources() -> None:
    """mmengine asks ``pkg_resources``, which setuptools 82 dropped, what is installed and where."""
    needed = "pkg_resources" in package_utils.is_installed.__code__.co_names
    if not needed or importlib.util.find_spec("pkg_resources"):
        return
    for replacement in (is_installed, get_installed_path):
        name = replacement.__name__
        original = getattr(package_utils, name)
        for module in [module for key, module in sys.modules.items() if key.partition(".")[0] == "mmengine"]:
            if vars(module).get(name) is original:
                setattr(module, name, replacement)


def is_installed(package: str) -> bool:
    """Whether there is a distribution or a module of that name."""
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return importlib.util.find_spec(package) is not None
    return True


def get_installed_path(package: str) -> str:
    """The folder of the module that a distribution, or else a module, of that name has.

    Raises:
        PackageNotFoundError: there is neither.
    """
    module = package
    if not importlib.util.find_spec(package):  # the distribution is named otherwise; this takes a second
        providers = importlib.metadata.packages_distributions()
        module = next((name for name, owners in providers.items() if package in owners and name[0] != "_"), package)
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise importlib.metadata.PackageNotFoundError(package)
    return str(Path(spec.origin).parent)


def _find_configs_of_renamed_packages() -> None:
    """``_base_ = "mmseg::..."`` looks for the distribution mmsegmentation, which a fork calls onedl-mmsegmentation."""
    for module, distribution in config_utils.MODULE2PACKAGE.items():
        if importlib.util.find_spec(module) and not is_installed(distribution):
            config_utils.MODULE2PACKAGE[module] = module


def _do_without_imgaug() -> None:
    """onedl-mmdetection imports it for lane data sets alone, and its heir imaug asks for old OpenCV and numpy."""
    if is_installed("onedl-mmdetection") and importlib.util.find_spec("imgaug") is None:
        for name in IMGAUG:
            sys.modules[name] = _Imgaug(name)


class _Imgaug(ModuleType):
    """A module whose names are its submodules and, all others, classes that cannot be instantiated."""

    __path__ = ()

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None)

    def __getattr__(self, name: str) -> type | ModuleType:
        if name.startswith("__"):
            raise AttributeError(f"{self.__name__} has no {name}")
        if submodule := sys.modules.get(f"{self.__name__}.{name}"):
            return submodule
        return type(name, (), {"__init__": _without_imgaug})


def _without_imgaug(self: object, *arguments: object, **options: object) -> NoReturn:
    raise ImportError(f"imgaug.{type(self).__name__} is needed: pip install imaug.")


def _load_checkpoints_safely() -> None:
    """Checkpoints of mmengine's Runner hold log buffers, which ``torch.load`` refuses; from a URL anything may run."""
    checkpoint.CheckpointLoader.register_scheme(prefixes="", loader=load_from_local, force=True)
    checkpoint.load_url = load_url
