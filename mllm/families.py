"""Where the parts of a Hugging Face multimodal model are."""

from typing import Any

from torch import nn

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


def image_tokens(config: Any) -> list[int]:
    """Ids of the placeholders of images and videos."""
    ids = (getattr(config, name, None) for name in ("image_token_id", "image_token_index", "video_token_id"))
    return sorted({token for token in ids if token is not None})
