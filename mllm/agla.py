"""AGLA: tokens are chosen by the whole picture and by the part that matters to the question together."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.mllm.families import check_family
from zoo.mllm.prompts import Picture, encode, generate, message

# A picture and a question to how much each part matters, (rows, columns), and how well they match, 0 to 1.
Matcher = Callable[[Picture, str], tuple[Tensor, float]]
OURS = ("do_sample", "temperature", "top_k", "top_p", "num_beams", "num_return_sequences", "logits_processor")


class AGLA:
    """Answers with fewer invented things: global and local attention assembled (AGLA, arXiv:2406.12718); no training.

    Beside the picture the model sees a copy in which all is black that does not matter to the question. Both go through
    it as rows of one batch, each with its own cache: every token costs twice as much. The logits are **added**,
    ``original + alpha * local``, and only tokens that the original finds plausible may be chosen.

    What matters is told by another model, the matcher. The authors' is BLIP's image-text matching, ``BlipMatcher``;
    with any other one this is not the method that they measured.

    Args:
        model: one of the families that ``accelerate`` knows, accelerated or not.
        processor: of the model, with a chat template.
        matcher: called with a PIL image and a question, gives the importance of its parts, (rows, columns) float, and
            how well they match, 0 to 1: the better, the less is kept.
        alpha: weight of the local view.
        beta: least probability of a token relative to the likeliest, in the original; more than 0 and at most 1.
        temperature: at which tokens are drawn, as the authors do at 1; None takes the best.

    Raises:
        ValueError: the family of the model or an option is not supported.
    """

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        matcher: Matcher,
        alpha: float = 2.0,
        beta: float = 0.5,
        temperature: float | None = None,
    ) -> None:
        check_family(model)
        if alpha < 0:
            raise ValueError(f"AGLA: alpha is {alpha}, expected 0 or more.")
        if not 0 < beta <= 1:
            raise ValueError(f"AGLA: beta is {beta}, expected more than 0 and at most 1.")
        if temperature is not None and temperature <= 0:
            raise ValueError(f"AGLA: temperature is {temperature}, expected more than 0, or None for the best token.")
        self.model, self.processor, self.matcher = model, processor, matcher
        self.alpha, self.beta, self.temperature = alpha, beta, temperature

    def generate(self, pictures: Sequence[Picture], questions: Sequence[str], **options: Any) -> list[str]:
        """Answers, in one batch.

        Args:
            pictures: PIL images of mode "RGB".
            questions: one for each.
            options: of ``model.generate``, such as ``max_new_tokens``; not those that choose tokens.

        Raises:
            ValueError: as many questions as pictures were expected, or an option is not supported.
        """
        if isinstance(questions, str) or len(pictures) != len(questions):
            raise ValueError("AGLA: expected lists of as many questions as pictures.")
        if refused := [name for name in OURS if name in options]:
            raise ValueError(
                f"AGLA chooses tokens itself: leave out {', '.join(refused)}, and give AGLA a temperature."
            )
        local = [local_view(picture, *self.matcher(picture, text)) for picture, text in zip(pictures, questions)]
        views = zip([*pictures, *local], [*questions, *questions])
        inputs = encode(self.model, self.processor, [[message("user", text, [picture])] for picture, text in views])
        return generate(self.model, self.processor, inputs, logits_processor=[self._choose], **options)[: len(pictures)]

    def _choose(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Logits (2 B, V), the originals' before the local views', to the same logits for both of a pair."""
        logits = assemble(*scores.float().chunk(2), self.alpha, self.beta)
        if self.temperature is not None:  # both of a pair must go on with the same token, so it is drawn here
            drawn = (logits / self.temperature).softmax(-1).multinomial(1)
            logits = torch.full_like(logits, -math.inf).scatter(1, drawn, 0.0)
        return torch.cat([logits, logits])


def assemble(original: Tensor, local: Tensor, alpha: float, beta: float) -> Tensor:
    """``original + alpha * local`` where ``original >= log(beta) + max(original)``, else minus infinity.

    Args:
        original: (B, V) float, logits with the picture.
        local: (B, V) float, logits with the local view.
        alpha: weight of the local view.
        beta: least probability relative to the likeliest token's.
    """
    plausible = original >= original.amax(-1, keepdim=True) + math.log(beta)
    return torch.where(plausible, original + alpha * local, -math.inf)


def local_view(picture: Picture, importance: Tensor, match: float) -> Picture:
    """The picture with its most important ``1 - match / 2`` of pixels, the rest in black.

    Args:
        picture: PIL image of mode "RGB".
        importance: (rows, columns) float, stretched to the picture bilinearly.
        match: 0 to 1.

    Raises:
        ValueError: the match is not in 0 to 1, or the importance has another shape.
    """
    from PIL import Image

    if importance.ndim != 2 or not 0 <= match <= 1:
        raise ValueError(
            f"The matcher gave importance of shape {tuple(importance.shape)} and the match {match}, expected "
            "(rows, columns) and a number from 0 to 1."
        )
    size = (picture.height, picture.width)
    pixels = F.interpolate(importance[None, None].float().cpu(), size, mode="bilinear")[0, 0]
    kept = max(round(pixels.numel() * (1 - match / 2)), 1)
    least = pixels.flatten().kthvalue(pixels.numel() - kept + 1).values
    mask = Image.fromarray(((pixels >= least) * 255).byte().numpy())
    return Image.composite(picture, Image.new("RGB", picture.size), mask)
