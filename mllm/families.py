"""Where the parts of a Hugging Face multimodal model are."""

import re
import warnings
from functools import cache
from typing import Any

from torch import nn

ACCELERATED = "zoo_accelerated"  # attribute of a decoder while it is
TESTED = ((5, 17), (5, 24))  # versions of transformers, the oldest and the newest

# These name their decoder, its layers and their image tokens alike; the others are refused until someone has looked.
FAMILIES = {"llava", "llava_next", "qwen2_vl", "qwen2_5_vl", "internvl", "smolvlm", "idefics3", "zoo_vlm"}


def register_family(model_type: str) -> None:
    """Let ``accelerate`` take another family: the ``model_type`` of its config.

    Its decoder must be what ``get_decoder()`` returns, with ``layers`` whose attention is ``self_attn``, that goes
    through transformers' attention interface and numbers itself in ``layer_idx``.
    """
    FAMILIES.add(model_type)


def check_family(model: nn.Module) -> None:
    """Raise a ValueError for a model of a family that was not tried."""
    family = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if family not in FAMILIES:
        raise ValueError(
            f"The model is of the family {family!r}, expected one of {', '.join(sorted(FAMILIES))}: if its decoder is "
            f"built as theirs, call zoo.mllm.register_family({family!r}) first."
        )


@cache
def warn_of_version() -> None:
    """Warn, once, of a version of transformers with which nothing of this was tested."""
    import transformers

    found = tuple(map(int, re.findall(r"\d+", transformers.__version__)[:2]))
    if not TESTED[0] <= found <= TESTED[1]:
        oldest, newest = (".".join(map(str, version)) for version in TESTED)
        warnings.warn(
            f"transformers {transformers.__version__} was not tested with zoo.mllm, {oldest} to {newest} were: install "
            f"'transformers>={oldest},<={newest}.*' if something fails.",
            stacklevel=3,
        )


def image_tokens(config: Any) -> list[int]:
    """Ids of the placeholders of images and videos."""
    ids = (getattr(config, name, None) for name in ("image_token_id", "image_token_index", "video_token_id"))
    return sorted({token for token in ids if token is not None})
