"""Which tokens of a prompt are text, which are an image's, and where the prompt ends."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenLayout:
    """What stands at each position of a batch of token sequences.

    Attributes:
        valid: (B, L) bool, False for padding, which may be on either side.
        image: (B, L) int64, the number of the image (or video frame) in its row, counted from 0; -1 for all else.
        prompt_end: (B,) int64, position of the last token of the first assistant marker; -1 without one.
    """

    valid: Tensor
    image: Tensor
    prompt_end: Tensor

    def __post_init__(self) -> None:
        shape = self.valid.shape
        if len(shape) != 2 or self.image.shape != shape or self.prompt_end.shape != shape[:1]:
            raise ValueError(
                f"TokenLayout: valid is {tuple(self.valid.shape)}, image {tuple(self.image.shape)} and prompt_end "
                f"{tuple(self.prompt_end.shape)}, expected (B, L), (B, L) and (B,)."
            )

    @classmethod
    def from_ids(
        cls,
        input_ids: Tensor,
        image_tokens: Collection[int],
        attention_mask: Tensor | None = None,
        prompt_end: Sequence[int] = (),
    ) -> "TokenLayout":
        """Read the layout from the ids of a processor, in which each token of an image is a placeholder.

        Args:
            input_ids: (B, L) int64.
            image_tokens: the ids of the placeholders of images and videos. Neighbouring ones are one image.
            attention_mask: (B, L), 0 for padding; None for no padding.
            prompt_end: ids of the assistant marker, after which the answer starts; empty for none.
        """
        valid = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        is_image = torch.isin(input_ids, torch.tensor(sorted(image_tokens), device=input_ids.device)) & valid
        first = is_image & ~is_image.roll(1, 1)
        first[:, 0] = is_image[:, 0]
        image = torch.where(is_image, first.cumsum(1) - 1, -1)
        end = input_ids.new_full((len(input_ids),), -1)
        size = len(prompt_end)
        if size and size <= input_ids.shape[1]:
            marker = torch.tensor(prompt_end, device=input_ids.device)
            found = (input_ids.unfold(1, size, 1) == marker).all(-1) & valid[:, size - 1 :]
            end = torch.where(found.any(1), found.int().argmax(1) + size - 1, -1)
        return cls(valid, image, end)

    @property
    def is_image(self) -> Tensor:
        """(B, L) bool: whether a token is an image's."""
        return self.image >= 0

    @property
    def last(self) -> Tensor:
        """(B,) int64: position of the last token that is no padding."""
        return self.valid.shape[1] - 1 - self.valid.flip(1).int().argmax(1)

    @property
    def query(self) -> Tensor:
        """(B,) int64: position of the last token of the prompt: the marker's end, or without one the row's last."""
        return torch.where(self.prompt_end >= 0, self.prompt_end, self.last)
