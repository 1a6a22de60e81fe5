"""Questions about pictures as a processor of transformers takes them, and answers as text."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from zoo.mllm.families import image_tokens

Picture = Any  # PIL.Image.Image, mode "RGB"
Message = dict[str, Any]
# What a checkpoint's generation_config may say of sampling, unsaid, so that transformers does not warn of it.
GREEDY = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}


def message(role: str, text: str, pictures: Sequence[Picture] = ()) -> Message:
    """A turn of a conversation: pictures, then text.

    Args:
        role: "user" or "assistant".
        text: what is said.
        pictures: PIL images.
    """
    images = [{"type": "image", "image": picture} for picture in pictures]
    return {"role": role, "content": [*images, {"type": "text", "text": text}]}


def encode(model: nn.Module, processor: Any, conversations: Sequence[Sequence[Message]]) -> Any:
    """The inputs of a model for conversations that wait for an answer, on its device and in its dtype.

    Args:
        model: of transformers.
        processor: of the model.
        conversations: B lists of ``message``.

    Returns:
        A mapping with ``input_ids`` and ``attention_mask`` (B, L), padded on the left, and the pictures.

    Raises:
        ValueError: the processor has no chat template, or a text holds the placeholder of a picture.
    """
    if not (getattr(processor, "chat_template", None) or getattr(processor.tokenizer, "chat_template", None)):
        raise ValueError("The processor has no chat template, so it cannot ask: use the checkpoint of a chat model.")
    parts = [[part for turn in talk for part in turn["content"]] for talk in conversations]
    placeholder = getattr(processor, "image_token", None)
    if placeholder and any(placeholder in part.get("text", "") for row in parts for part in row):
        raise ValueError(f"The text holds {placeholder}, which stands for a picture to this model: leave it out.")
    texts = processor.apply_chat_template(list(conversations), add_generation_prompt=True, tokenize=False)
    pictures = [[part["image"] for part in row if part["type"] == "image"] for row in parts]
    begin = processor.tokenizer.bos_token
    inputs = processor(
        text=texts,
        images=pictures if any(pictures) else None,
        return_tensors="pt",
        add_special_tokens=not (begin and texts[0].startswith(begin)),  # templates may have what begins a sequence
        **({"padding": True, "padding_side": "left"} if len(texts) > 1 else {}),
    )
    return inputs.to(model.device, model.dtype)


def generate(model: nn.Module, processor: Any, inputs: Mapping[str, Any], **options: Any) -> list[str]:
    """Answers to what ``encode`` made, one for each row; greedy unless the options say otherwise.

    Args:
        model: of transformers.
        processor: of the model.
        inputs: of ``encode``.
        options: of ``model.generate``.
    """
    # A placeholder in an answer would be counted as a part of a picture from then on.
    options = {"suppress_tokens": image_tokens(model.config), **GREEDY, **options}
    found = model.generate(**inputs, **options)
    return processor.tokenizer.batch_decode(found[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
