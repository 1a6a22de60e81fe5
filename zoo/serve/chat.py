"""Talk about a picture with part of its visual tokens, word by word."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from zoo.mllm import accelerate
from zoo.mllm.plots import grid_of
from zoo.mllm.prompts import encode, generate, message

SHADE = 0.75  # how dark what is not seen gets, as in zoo.mllm.plots


@dataclass(frozen=True)
class Reply:
    """What a model said about a picture.

    Attributes:
        text: the answer.
        visual_tokens: of the picture.
        kept_tokens: those that the last layer sees.
        overlay: the picture, dark where tokens were dropped; None if they form no grid.
    """

    text: str
    visual_tokens: int
    kept_tokens: int
    overlay: Image.Image | None


class Chat:
    """A multimodal model that answers one question at a time: what drops tokens is hooked into the model.

    Args:
        model: of ``zoo.mllm.load``, with at least two layers.
        processor: of the model.
        name: what it is called.
        trained: what it is run with besides, as ``zoo.mllm.trained.load_trained`` says it was trained.
    """

    def __init__(self, model: Any, processor: Any, name: str, trained: dict[str, Any] | None = None) -> None:
        self.model, self.processor, self.name, self._trained = model, processor, name, trained or {}
        self._layers = len(model.get_decoder().layers)

    def ask(
        self,
        picture: Image.Image,
        turns: Sequence[tuple[str, str]],
        question: str,
        *,
        keep: float = 1.0,
        max_new_tokens: int = 128,
        say: Callable[[str], None] = lambda text: None,
        stop: Callable[[], bool] = lambda: False,
    ) -> Reply:
        """Answer a question.

        Args:
            picture: RGB.
            turns: earlier questions with their answers.
            question: about the picture.
            keep: share of the visual tokens that layers from the third on see: the ones that the question attends to
                most (FastV, arXiv:2403.06764).
            max_new_tokens: of the answer.
            say: is handed the answer in pieces, as it is made.
            stop: is asked at each token whether to end here.

        Raises:
            ValueError: the model cannot be asked this.
        """
        asked = [question for question, _ in turns] + [question]
        talk = [message("user", asked[0], [picture])]
        for (_, answer), following in zip(turns, asked[1:]):
            talk += [message("assistant", answer), message("user", following)]
        reductions = [f"fastv:layer={min(2, self._layers - 1)},keep={keep}"] if keep < 1 else []
        with accelerate(self.model, reductions, **self._trained) as handle:
            (text,) = generate(
                self.model,
                self.processor,
                encode(self.model, self.processor, [talk]),
                max_new_tokens=max_new_tokens,
                streamer=_streamer(self.processor, say),
                stopping_criteria=_criteria(stop),
            )
            image = handle.last.layout.image[0].cpu()
            seen = handle.last.places(0, self._layers)[-1][image >= 0]
        return Reply(text.strip(), len(seen), int(seen.sum()), draw_seen(picture, seen))


def load_chat(path: str | None, device: str | None) -> Chat:
    """A model by its folder or hub id, or the packaged one.

    Raises:
        ImportError: the extra ``mllm`` is not installed.
        ValueError: there is no such model, or it is no multimodal one.
    """
    from zoo.chat import PACKAGED, load, options

    model, processor = load(path, device)
    return Chat(model, processor, path or PACKAGED.name, options(path, model, processor, mask=None))


def draw_seen(picture: Image.Image, seen: Tensor) -> Image.Image | None:
    """The picture, dark where its tokens are not seen.

    Args:
        picture: RGB.
        seen: (N,) bool, of its tokens row by row.

    Returns:
        A new picture of the same size; None if so many tokens form no grid of its aspect.
    """
    try:
        rows, columns = grid_of(len(seen), *picture.size)
    except ValueError:
        return None
    shade = np.where(seen.view(rows, columns).numpy(), 0, round(255 * SHADE)).astype(np.uint8)
    mask = Image.fromarray(shade).resize(picture.size, Image.Resampling.NEAREST)
    return Image.composite(Image.new("RGB", picture.size), picture, mask)


def _streamer(processor: Any, say: Callable[[str], None]) -> Any:
    from transformers import TextStreamer

    class Saying(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            if text:
                say(text)

    return Saying(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)


def _criteria(stop: Callable[[], bool]) -> list[Callable[..., Tensor]]:
    def ended(ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        return ids.new_full(ids.shape[:1], stop()).bool()

    return [ended]
