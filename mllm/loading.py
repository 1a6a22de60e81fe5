"""Load a multimodal model and its processor: ours, or any that transformers knows."""

import os
from typing import Any

from transformers import AutoModelForImageTextToText, AutoProcessor

from zoo.mllm.compose import HUB, VisionLanguageModel  # the import registers ours


def load(path: str | os.PathLike, *, language_model: str | os.PathLike | None = None, **kwargs: Any) -> tuple[Any, Any]:
    """The model and the processor of a folder or a hub id, ready to answer.

    Args:
        path: what ``VisionLanguageModel.save_pretrained`` and its processor wrote, with or without the language model;
            or a checkpoint of transformers, such as LLaVA's or Qwen2.5-VL's.
        language_model: of a checkpoint of ours without it: where it is now; None for where it came from.
        **kwargs: of ``from_pretrained`` of the model, such as ``dtype``, ``device_map``, ``attn_implementation`` and
            ``revision``.

    Returns:
        The model, in evaluation mode, and its processor.
    """
    if language_model is not None:  # the Auto classes would take it for a field of the config
        model = VisionLanguageModel.from_pretrained(path, language_model=language_model, **kwargs)
    else:
        model = AutoModelForImageTextToText.from_pretrained(path, **kwargs)
    shared = {name: kwargs[name] for name in (*HUB, "trust_remote_code") if name in kwargs}
    return model.eval(), AutoProcessor.from_pretrained(path, **shared)
