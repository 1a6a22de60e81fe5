"""Questions and answers about pictures in LLaVA's format, and what of a conversation a model is to learn."""

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from zoo.mllm.prompts import Message, message

PLACEHOLDER = "<image>"
IGNORED = -100  # label of what is not to be learned, as of torch's cross entropy


@dataclass(frozen=True)
class Conversation:
    """One record of a file.

    Attributes:
        images: pictures, in the order of their placeholders; all belong to the first question.
        turns: question and answer of each, without placeholders.
        kinds: of the questions; empty strings where the file does not say.
    """

    images: tuple[Path, ...]
    turns: tuple[tuple[str, str], ...]
    kinds: tuple[str, ...]

    def messages(self, ending: str = "") -> list[Message]:
        """All turns, with the pictures, as a processor of transformers takes them; an ending is added to answers."""
        found = []
        for number, (question, answer) in enumerate(self.turns):
            pictures = [read_picture(path) for path in self.images] if number == 0 else []
            found += [message("user", question, pictures), message("assistant", answer + ending)]
        return found


def read_picture(path: Path) -> Image.Image:
    """A picture, RGB.

    Raises:
        ValueError: the file is no picture, or not a whole one.
    """
    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except OSError as error:
        raise ValueError(f"{path} is not a readable picture ({error}): replace it, or remove its record.") from error


def read_conversations(file: str | os.PathLike, images: str | os.PathLike | None = None) -> list[Conversation]:
    """Read a file in LLaVA's format.

    It is a JSON list of records such as ``{"image": "a.jpg", "conversations": [{"from": "human", "value": "<image> What
    is it?"}, {"from": "gpt", "value": "a dog"}]}``. A record may have several images, as a list, or none; "kinds", a
    list with the kind of each question, is an addition of ours.

    Args:
        file: the JSON file.
        images: folder that the names of the pictures start from; None for the file's own.

    Raises:
        FileNotFoundError: there is no such file, or pictures are missing.
        ValueError: the file is no such list, or a record is incomplete.
    """
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"There is no file {file}: give a JSON file in LLaVA's format.")
    try:
        records = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error}): expected a list of records in LLaVA's format.") from None
    if not isinstance(records, list) or not records:
        raise ValueError(f"{file} holds no list of records: expected LLaVA's format.")
    folder = file.parent if images is None else Path(images)
    found = []
    for number, record in enumerate(records):
        try:
            found.append(_conversation(record, folder))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            reason = f"it lacks {error}" if isinstance(error, KeyError) else error
            raise ValueError(f"Record {number} of {file} is not in LLaVA's format: {reason}.") from None
    _check_images(found, file)
    return found


def _conversation(record: dict[str, Any], folder: Path) -> Conversation:
    images = record.get("image") or []
    images = [images] if isinstance(images, str) else images
    turns = record["conversations"]
    speakers = [turn["from"] for turn in turns]
    if not turns or speakers != ["human", "gpt"] * (len(turns) // 2):
        raise ValueError(f"its turns are from {speakers}, expected human and gpt by turns")
    texts = [turn["value"] for turn in turns]
    if (marked := sum(text.count(PLACEHOLDER) for text in texts)) != len(images):
        raise ValueError(f"it has {len(images)} images, but {PLACEHOLDER} occurs {marked} times")
    if any(PLACEHOLDER in text for text in texts[1:]):
        raise ValueError(f"{PLACEHOLDER} stands in a later turn, expected all in the first question")
    texts = [text.replace(PLACEHOLDER, "").strip() for text in texts]
    kinds = record.get("kinds") or [""] * (len(texts) // 2)
    if len(kinds) != len(texts) // 2:
        raise ValueError(f"it has {len(kinds)} kinds for {len(texts) // 2} questions")
    return Conversation(tuple(folder / name for name in images), tuple(zip(texts[::2], texts[1::2])), tuple(kinds))


def _check_images(conversations: Iterable[Conversation], file: Path) -> None:
    """Look for the pictures before hours of work are lost to a missing one; each folder is listed once."""
    names: dict[Path, set[str]] = {}
    missing = []
    for conversation in conversations:
        for path in conversation.images:
            if path.parent not in names:
                names[path.parent] = set(os.listdir(path.parent)) if path.parent.is_dir() else set()
            if path.name not in names[path.parent]:
                missing.append(path)
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} pictures of {file} are missing, the first is {missing[0]}: give the folder that their "
            "names start from."
        )


def assistant_marker(processor: Any) -> list[int]:
    """Ids of what a chat template puts before an answer.

    Args:
        processor: of transformers, with a chat template.

    Raises:
        ValueError: the template has no such mark.
    """
    asked = [message("user", "a")]
    plain = processor.apply_chat_template(asked, tokenize=False)
    waiting = processor.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    ids = processor.tokenizer(waiting.removeprefix(plain), add_special_tokens=False)["input_ids"]
    if not waiting.startswith(plain) or not ids:
        raise ValueError("The chat template does not mark where answers begin: give the processor another one.")
    return ids


def answer_end(processor: Any) -> tuple[int, str]:
    """The token that ends an answer, and what is to be added to answers so that it is there.

    A chat template such as Qwen's puts it after an answer. Where it does not, as LLaVA-1.5's, it is the tokenizer's
    end of a sequence, which has to be added.

    Args:
        processor: of transformers, with a chat template.
    """
    tokenizer, talk = processor.tokenizer, [message("user", "a"), message("assistant", "zebra")]
    after = processor.apply_chat_template(talk, tokenize=False).partition("zebra")[2]
    if not after.strip():
        return tokenizer.eos_token_id, tokenizer.eos_token
    return tokenizer(after, add_special_tokens=False)["input_ids"][0], ""


def answer_labels(input_ids: Tensor, begin: Sequence[int], end: int, answers: Sequence[int]) -> Tensor:
    """What of conversations is to be learned: the answers, each with the token that ends it.

    Args:
        input_ids: (B, L) int64.
        begin: of ``assistant_marker``.
        end: of ``answer_end``.
        answers: how many answers there are in each row.

    Returns:
        Labels (B, L) int64, ``IGNORED`` elsewhere.

    Raises:
        ValueError: a row has another number of answers, as when a text holds the marker itself.
    """
    size = len(begin)
    starts = (input_ids.unfold(1, size, 1) == torch.tensor(begin, device=input_ids.device)).all(-1)
    labels = torch.full_like(input_ids, IGNORED)
    for row, expected in enumerate(answers):
        places = (starts[row].nonzero()[:, 0] + size).tolist()
        ends = (input_ids[row] == end).nonzero()[:, 0].tolist()
        stops = [next((stop for stop in ends if stop >= place), None) for place in places]
        if len(places) != expected or None in stops:
            raise ValueError(
                f"A conversation has {expected} answers, but its tokens mark {len(places)}: it is cut off, or a text "
                "holds the template's own marks."
            )
        for place, stop in zip(places, stops):
            labels[row, place : stop + 1] = input_ids[row, place : stop + 1]
    return labels
