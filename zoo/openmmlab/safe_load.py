"""Load checkpoints of mmengine's Runner, of which no code can run: ``torch.load`` with a list of what they may name.

Beside weights and optimizer states they hold plain containers, numbers of numpy and the log buffers of the training.
"""

import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from torch.serialization import safe_globals

from zoo.restricted_reader import CheckpointError

__all__ = ["load_from_local", "load_url"]

# What the message of torch.load names.
STRANGER = re.compile(r"(?:GLOBAL|function) (.+?)(?: which| was|$)", re.MULTILINE)


def load_from_local(filename: str, map_location: Any = None) -> Any:
    """Read a checkpoint of mmengine, of which no code can run.

    Args:
        filename: the file.
        map_location: as of ``torch.load``.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is damaged, or holds more than tensors, plain containers, numbers and log buffers.
    """
    path = Path(filename).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"There is no checkpoint {path}.")
    return _load(str(path), lambda: torch.load(path, map_location=map_location))


def load_url(url: str, *args: Any, **kwargs: Any) -> Any:
    """``torch.hub.load_state_dict_from_url`` under the same restrictions."""
    return _load(url, lambda: torch.hub.load_state_dict_from_url(url, *args, **{"weights_only": None, **kwargs}))


def _load(name: str, load: Callable[[], Any]) -> Any:
    with safe_globals(_allowed()):
        try:
            return load()
        except pickle.UnpicklingError as error:
            if not (stranger := STRANGER.search(str(error))):
                raise CheckpointError(f"{name} is damaged, or was not written by torch.save: get it again.") from error
            raise CheckpointError(
                f"{name} holds {stranger[1]}, which is more than weights, plain values and mmengine's log buffers: "
                f"loading it could run code. If you trust it, set TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1."
            ) from error


def _allowed() -> list[Any]:
    """What a checkpoint may name, in the spelling of numpy 1 and 2."""
    allowed: list[Any] = [
        HistoryBuffer,
        (_history_method, "builtins.getattr"),
        (_no_bytes, "builtins.bytes"),
        np.ndarray,
        np.dtype,
        *{type(np.dtype(code)) for code in np.typecodes["All"] if code not in "OV"},
    ]
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        allowed += [(_array, f"{module}._reconstruct"), (_scalar, f"{module}.scalar")]
    return allowed


def _history_method(owner: Any, name: str) -> Any:
    """The one use of getattr in a log buffer: its statistics (mean, max, ...) by name."""
    if owner is not HistoryBuffer or name not in HistoryBuffer()._statistics_methods:  # the first one made names them
        raise pickle.UnpicklingError(f"function getattr of {name!r}")
    return getattr(owner, name)


def _no_bytes(*content: Any) -> bytes:
    """The bytes of an empty array; with an argument, ``bytes`` could fill the memory."""
    if content:
        raise pickle.UnpicklingError("function bytes")
    return b""


def _array(kind: Any, shape: Any, code: Any) -> np.ndarray:
    """The empty array that numpy then fills."""
    return np.ndarray((0,), np.uint8)


def _scalar(dtype: np.dtype, data: bytes | str) -> Any:
    """A number of numpy; frombuffer makes no objects."""
    return np.frombuffer(data.encode("latin1") if isinstance(data, str) else data, dtype)[0]
