"""From pictures, text and conversations to what a ``VisionLanguageModel`` takes."""

import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from transformers import BatchFeature
from transformers.image_utils import load_image
from transformers.processing_utils import ProcessorMixin

from zoo.mllm.conversations import IGNORED

IMAGE = "<image>"
IMAGE_TOKEN_ID = 2**31 - 1  # outside of any vocabulary: no text contains it and no model answers with it
# For tokenizers of base models, which have none.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].capitalize() + ': ' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}"
)

URL = re.compile(r"https?://|data:image/", re.IGNORECASE)
Picture = Image.Image | np.ndarray | str | os.PathLike
Message = Mapping[str, Any]


class VisionLanguageProcessor(ProcessorMixin):
    r"""The tokenizer of the language model, and what the tower needs to know of pictures.

    A picture becomes one tile, or several: the grid of tiles with the nearest aspect ratio, and before them the whole
    picture as one tile. Pictures keep their aspect ratio; the rest of a tile has the mean colour. In the ids, each tile
    is ``tokens_per_tile`` placeholders, and a line break follows the whole picture and each row of tiles but the last.

    In text, ``<image>`` stands for a picture, and ``<\image>`` for the characters ``<image>``. In the text parts of
    conversations, ``<image>`` is just text. The placeholders' id is outside of the vocabulary, so no text can make one.

    Args:
        tokenizer: of the language model.
        image_size: height and width of a tile, in pixels.
        tokens_per_tile: what the projector makes of a tile.
        mean: of the pictures' channels, in [0, 1].
        std: of the same.
        interpolation: "bilinear" or "bicubic".
        max_tiles: tiles of a picture, without the whole one; 1 for the whole one only.
        image_token_id: the placeholder.
        chat_template: None for the tokenizer's own, or if it has none for a plain one.
    """

    def __init__(
        self,
        tokenizer: Any,
        image_size: int = 224,
        tokens_per_tile: int = 1,
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
        interpolation: str = "bicubic",
        max_tiles: int = 1,
        image_token_id: int = IMAGE_TOKEN_ID,
        chat_template: str | None = None,
    ) -> None:
        self.image_size, self.tokens_per_tile, self.max_tiles = image_size, tokens_per_tile, max_tiles
        self.mean, self.std, self.interpolation = list(mean), list(std), interpolation
        self.image_token_id = image_token_id
        super().__init__(tokenizer, chat_template=chat_template or (None if tokenizer.chat_template else CHAT_TEMPLATE))

    @property
    def model_input_names(self) -> list[str]:
        """What the model takes."""
        return ["input_ids", "attention_mask", "pixel_values"]

    def __call__(
        self,
        images: Picture | Sequence[Picture] | Sequence[Sequence[Picture]] | None = None,
        text: str | Sequence[str] | None = None,
        *,
        padding: bool | str = True,
        truncation: bool = False,
        max_length: int | None = None,
        add_special_tokens: bool = True,
        padding_side: str = "left",
        return_tensors: str = "pt",
    ) -> BatchFeature:
        """Text with ``<image>`` in it, and the pictures, to the arguments of the model.

        Args:
            images: one, a list in the order of the rows, or a list for each row; paths and URLs are read.
            text: one row or several.
            padding: as of tokenizers.
            truncation: cut rows to ``max_length`` tokens.
            max_length: in tokens, those of the pictures too.
            add_special_tokens: put the token that begins sequences before each row, where the tokenizer has one.
            padding_side: "left", which is needed to generate, or "right".
            return_tensors: only "pt".

        Returns:
            ``input_ids`` and ``attention_mask`` (B, L) int64 and, unless there are no pictures, ``pixel_values``
            (tiles of all rows, 3, S, S) float32.

        Raises:
            ValueError: pictures and ``<image>`` do not match, a picture cannot be read, or ``max_length`` would cut
                into a picture.
        """
        if text is None:
            raise ValueError(f"The processor needs text, with {IMAGE} where a picture belongs.")
        if return_tensors != "pt":
            raise ValueError(f"return_tensors is {return_tensors!r}, but the processor makes tensors of PyTorch: 'pt'.")
        rows = [text] if isinstance(text, str) else list(text)
        tiles, grids = self._tiles(_by_row(images, [len(_pieces(row)) - 1 for row in rows]))
        begin = self._begin() if add_special_tokens else []
        remaining = iter(grids)
        ids = [begin + self._encode(row, remaining) for row in rows]
        if truncation and max_length:
            ids = [self._truncate(row, max_length) for row in ids]
        return self._batch(ids, tiles, padding, max_length, padding_side)

    def apply_chat_template(
        self,
        conversation: Sequence[Message] | Sequence[Sequence[Message]],
        chat_template: str | None = None,
        *,
        tokenize: bool = False,
        return_dict: bool = True,
        return_tensors: str = "pt",
        processor_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> str | list[str] | BatchFeature:
        """Conversations as the language model was taught to read them.

        Args:
            conversation: messages, ``{"role": "user", "content": ...}``, or a list of conversations. Content is text,
                or a list of ``{"type": "text", "text": ...}`` and ``{"type": "image", "image": picture}``; the picture
                may also be given as "path" or "url", or left out and be given as "images" in ``processor_kwargs``.
            chat_template: None for the processor's or the tokenizer's own.
            tokenize: give the arguments of the model, not text.
            return_dict: only true; as other processors have it.
            return_tensors: only "pt".
            processor_kwargs: of ``__call__``.
            **kwargs: of the tokenizer's, such as ``add_generation_prompt``, to end with the marker after which the
                model answers, and variables of the template.

        Returns:
            The text, in which ``<image>`` stands for pictures, or a list of texts, or the arguments of the model.
        """
        if not return_dict:
            raise ValueError("apply_chat_template gives a dict of tensors: leave return_dict true.")
        several = bool(conversation) and not isinstance(conversation[0], Mapping)
        flat, found = zip(*(flatten(one) for one in (conversation if several else [conversation])))
        texts = [self._render(messages, chat_template, **kwargs) for messages in flat]
        if not tokenize:
            return texts if several else texts[0]
        # The template has what begins a sequence.
        options = {"images": found, "add_special_tokens": False, **(processor_kwargs or {})}
        return self(text=texts, return_tensors=return_tensors, **options)

    def with_labels(
        self,
        conversations: Sequence[Sequence[Message]],
        *,
        max_length: int | None = None,
        padding: bool | str = True,
        padding_side: str = "right",
    ) -> BatchFeature:
        """A batch to train with: the labels are what the assistant says, and what ends its turns.

        Prompt and answer are tokenised apart, as they are when the model answers. What follows the last answer is left
        out.

        Args:
            conversations: as of ``apply_chat_template``, each with an answer.
            max_length: rows are cut to so many tokens.
            padding: as of tokenizers.
            padding_side: "left" or "right".

        Returns:
            As ``__call__``, and ``labels`` (B, L) int64, -100 for what is not learned.

        Raises:
            ValueError: as ``__call__``; no answer in a conversation, or none within ``max_length``; or a chat template
                that writes a message differently once others follow.
        """
        flat, found = zip(*(flatten(_answered(one)) for one in conversations))
        counts = [sum(message["content"].count(IMAGE) for message in messages) for messages in flat]
        tiles, grids = self._tiles(_by_row(found, counts))
        remaining = iter(grids)
        ids, labels = zip(*(self._learn(messages, remaining) for messages in flat))
        if max_length:
            ids = [self._truncate(row, max_length) for row in ids]
            labels = [row[:max_length] for row in labels]
        if not all(any(label != IGNORED for label in row) for row in labels):
            raise ValueError(
                f"The prompt of a conversation fills max_length, {max_length} tokens, so that there is no answer to "
                "learn: give a larger max_length, or leave the conversation out."
            )
        batch = self._batch(ids, tiles, padding, max_length, padding_side)
        filled = torch.full_like(batch["input_ids"], IGNORED)
        filled[batch["attention_mask"].bool()] = torch.tensor([label for row in labels for label in row])
        batch["labels"] = filled
        return batch

    def _learn(self, messages: list[dict[str, str]], grids: Any) -> tuple[list[int], list[int]]:
        """Ids and labels of a conversation."""
        ids: list[int] = []
        labels: list[int] = []
        done = ""
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = self._render(messages[:number], None, add_generation_prompt=True)
            whole = self._render(messages[: number + 1], None)
            if not (prompt.startswith(done) and whole.startswith(prompt)):
                raise ValueError(
                    "The chat template writes a message differently once an answer follows, so that answers cannot be "
                    "told from prompts: give the tokenizer another chat_template."
                )
            asked = self._encode(prompt[len(done) :], grids)
            answer = self._encode(whole[len(prompt) :], grids)
            ids += asked + answer
            labels += [IGNORED] * len(asked) + answer
            done = whole
        return ids, [IGNORED if label == self.image_token_id else label for label in labels]

    def _render(self, messages: list[dict[str, str]], chat_template: str | None, **options: Any) -> str:
        template = chat_template or self.chat_template
        return self.tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, **options)

    def _encode(self, text: str, grids: Any) -> list[int]:
        """Ids of a row, with the placeholders of its pictures, whose grids are taken one by one."""
        first, *others = _pieces(text)
        ids = self._ids(first)
        for piece in others:
            ids += self._placeholders(*next(grids)) + self._ids(piece)
        return ids

    def _placeholders(self, rows: int, columns: int) -> list[int]:
        tile = [self.image_token_id] * self.tokens_per_tile
        if rows * columns == 1:
            return tile
        line_break = self._ids("\n")
        return tile + (line_break + tile * columns) * rows

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []

    def _begin(self) -> list[int]:
        token = self.tokenizer.bos_token_id
        return [token] if token is not None and self.tokenizer("")["input_ids"][:1] == [token] else []

    def _truncate(self, ids: list[int], max_length: int) -> list[int]:
        if self.image_token_id in ids[max_length:]:
            raise ValueError(
                f"A row has {len(ids)} tokens, and cutting it to max_length {max_length} would cut into a picture: "
                "give a larger max_length, fewer pictures or a smaller max_tiles."
            )
        return ids[:max_length]

    def _batch(
        self,
        ids: Sequence[list[int]],
        tiles: list[Image.Image],
        padding: bool | str,
        max_length: int | None,
        padding_side: str,
    ) -> BatchFeature:
        batch = self.tokenizer.pad(
            {"input_ids": list(ids)},
            padding=padding,
            max_length=max_length if padding == "max_length" else None,
            padding_side=padding_side,
            return_tensors="pt",
        )
        data = {name: batch[name].long() for name in ("input_ids", "attention_mask")}
        if tiles:
            data["pixel_values"] = self._pixels(tiles)
        return BatchFeature(data)

    def _pixels(self, tiles: list[Image.Image]) -> Tensor:
        pixels = torch.from_numpy(np.stack([np.asarray(tile) for tile in tiles])).permute(0, 3, 1, 2) / 255
        mean, std = (torch.tensor(x)[:, None, None] for x in (self.mean, self.std))
        return (pixels - mean) / std

    def _tiles(self, images: Sequence[Picture]) -> tuple[list[Image.Image], list[tuple[int, int]]]:
        """The tiles of all pictures, and the grid (rows, columns) of each."""
        tiles: list[Image.Image] = []
        grids = []
        for image in map(read_picture, images):
            rows, columns = tile_grid(image.width, image.height, self.image_size, self.max_tiles)
            grids.append((rows, columns))
            tiles.append(self._fit(image, 1, 1))
            if rows * columns > 1:
                size, whole = self.image_size, self._fit(image, rows, columns)
                corners = ((column * size, row * size) for row in range(rows) for column in range(columns))
                tiles += [whole.crop((x, y, x + size, y + size)) for x, y in corners]
        return tiles, grids

    def _fit(self, image: Image.Image, rows: int, columns: int) -> Image.Image:
        """The picture on so many tiles, in the middle, as large as it fits, and at least a pixel high and wide."""
        width, height = columns * self.image_size, rows * self.image_size
        scale = min(width / image.width, height / image.height)
        size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
        canvas = Image.new("RGB", (width, height), tuple(round(255 * channel) for channel in self.mean))
        scaled = image.resize(size, Image.Resampling[self.interpolation.upper()])
        canvas.paste(scaled, ((width - size[0]) // 2, (height - size[1]) // 2))
        return canvas


def tile_grid(width: int, height: int, size: int, max_tiles: int) -> tuple[int, int]:
    """Rows and columns, at most `max_tiles` tiles, of the aspect ratio that is nearest to a picture's.

    Of grids alike, the largest that the picture fills at least half of without being enlarged.
    """
    grids = [(rows, columns) for rows in range(1, max_tiles + 1) for columns in range(1, max_tiles // rows + 1)]

    def mismatch(grid: tuple[int, int]) -> float:
        return abs(math.log(grid[1] / grid[0] * height / width))

    least = min(map(mismatch, grids))
    alike = [grid for grid in grids if mismatch(grid) <= least + 1e-9]
    filled = [grid for grid in alike if 2 * width * height > grid[0] * grid[1] * size**2]
    return max(filled, default=min(alike))


def read_picture(image: Picture) -> Image.Image:
    """A picture as RGB, turned as its camera says, on white where it is transparent.

    Args:
        image: a PIL image, an array (H, W), (H, W, 3) or (H, W, 4) uint8, a path or a URL.

    Raises:
        ValueError: it cannot be read, also because the file is cut off.
    """
    name = image if isinstance(image, str | os.PathLike) else f"of the type {type(image).__name__}"
    try:
        if isinstance(image, np.ndarray):
            image = Image.fromarray(image)
        elif isinstance(image, str) and URL.match(image):
            image = load_image(image)
        elif isinstance(image, str | os.PathLike):
            image = Image.open(image)
        image.load()
        image = ImageOps.exif_transpose(image)
    except Exception as error:  # Pillow and the network have many kinds
        raise ValueError(f"The picture {name} cannot be read: {error}.") from None
    if image.mode.startswith("I;16"):  # Pillow would make all from 256 on white
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def flatten(conversation: Sequence[Message]) -> tuple[list[dict[str, str]], list[Picture]]:
    """Messages whose content is text, with ``<image>`` and a line break for pictures, and the pictures they hold."""
    messages, images = [], []
    for message in conversation:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        texts = [""]  # of what stands between pictures
        for part in parts:
            if part.get("type") == "text":
                texts[-1] += part["text"]
            elif part.get("type") == "image":
                texts.append("")
                images += [part[key] for key in ("image", "path", "url") if key in part][:1]
            else:
                raise ValueError(f"A message has a part of the type {part.get('type')!r}, expected 'text' or 'image'.")
        messages.append({**message, "content": f"{IMAGE}\n".join(map(escape, texts))})
    return messages, images


def _answered(conversation: Sequence[Message]) -> Sequence[Message]:
    """A conversation up to its last answer."""
    last = max((n for n, message in enumerate(conversation, 1) if message["role"] == "assistant"), default=0)
    if not last:
        raise ValueError("A conversation to train with has no message of the role 'assistant': there is no answer.")
    return conversation[:last]


def escape(text: str) -> str:
    r"""Text in which ``<image>`` is no picture: ``<\image>``."""
    return re.sub(r"<(\\*)image>", r"<\\\1image>", text)


def _pieces(text: str) -> list[str]:
    """What stands between the pictures."""
    return [re.sub(r"<\\(\\*)image>", r"<\1image>", piece) for piece in text.split(IMAGE)]


def _by_row(images: Any, counts: list[int]) -> list[Picture]:
    """All pictures in the order of the rows, of which each has so many places for them."""
    if images is None:
        images = []
    elif not isinstance(images, Sequence) or isinstance(images, str):
        images = [images]
    nested = bool(images) and all(isinstance(row, Sequence) and not isinstance(row, str) for row in images)
    if nested and len(images) != len(counts):
        raise ValueError(f"There are pictures for {len(images)} rows, but {len(counts)} rows of text.")
    given = [len(row) for row in images] if nested else [len(images)]
    for number, (have, want) in enumerate(zip(given, counts if nested else [sum(counts)])):
        if have != want:
            where = f"Row {number}" if nested else "The text"
            raise ValueError(f"{where} has {want} times {IMAGE}, but {have} pictures: give one for each.")
    return [image for row in images for image in row] if nested else list(images)
