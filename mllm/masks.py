"""Attention masks of multimodal prompts: each rule says which keys a query may attend to.

A rule takes a ``TokenLayout`` and gives a bool mask (B, L, L), queries first, True where attention is allowed. Padding
keys are never allowed; a padding query may end up with no key at all.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from zoo.mllm.layout import TokenLayout


def causal(layout: TokenLayout) -> Tensor:
    """``k <= q``."""
    position = torch.arange(layout.valid.shape[1], device=layout.valid.device)
    return (position <= position[:, None]) & layout.valid[:, None, :]


def mma(layout: TokenLayout) -> Tensor:
    """Modality-mutual attention as the authors' code has it (AKI, arXiv:2503.02597).

    Causal, and an image's tokens also see every text token of the prompt, up to the end of the assistant marker.
    Several images each see all text of the prompt. A row without a marker stays causal.
    """
    position = torch.arange(layout.valid.shape[1], device=layout.valid.device)
    prompt_text = ~layout.is_image & (position <= layout.prompt_end[:, None]) & layout.valid
    return causal(layout) | (layout.is_image[:, :, None] & prompt_text[:, None, :])


def mma_mutual(layout: TokenLayout) -> Tensor:
    """Modality-mutual attention as the paper writes it for interleaved prompts.

    Causal, and any two tokens of the prompt that are of different modality see each other.
    """
    position = torch.arange(layout.valid.shape[1], device=layout.valid.device)
    prompt = (position <= layout.prompt_end[:, None]) & layout.valid
    differ = layout.is_image[:, :, None] != layout.is_image[:, None, :]
    return causal(layout) | (differ & prompt[:, :, None] & prompt[:, None, :])


def framewise(layout: TokenLayout) -> Tensor:
    """Frame-wise block causal attention (TC-LLaVA, arXiv:2409.03206): causal, and a frame's tokens see each other."""
    same = layout.image[:, :, None] == layout.image[:, None, :]
    return causal(layout) | (same & layout.is_image[:, :, None])


def composite(layout: TokenLayout) -> Tensor:
    """Composite attention (EE-MLLM, arXiv:2408.11795): text is causal, a token of an image sees itself only."""
    itself = torch.eye(layout.valid.shape[1], dtype=torch.bool, device=layout.valid.device)
    return causal(layout) & (~layout.is_image[:, :, None] | itself)


def neighbour(layout: TokenLayout, grid: tuple[int, int], radius: int) -> Tensor:
    """Neighbour-aware visual attention (YOPO, arXiv:2410.06169).

    Causal, but among the tokens of one image the window decides: up to ``radius`` rows and columns apart, either way.

    Args:
        layout: of the prompt.
        grid: rows and columns of every image's tokens, which are in row-major order.
        radius: of the window; a window of 5 x 5 has radius 2.

    Raises:
        ValueError: an image has not rows x columns tokens.
    """
    same = (layout.image[:, :, None] == layout.image[:, None, :]) & layout.is_image[:, :, None]
    sizes = same.sum(-1)[layout.is_image]
    if (sizes != grid[0] * grid[1]).any():
        raise ValueError(f"An image has {int(sizes[sizes != grid[0] * grid[1]][0])} tokens, the grid {grid} expects "
                         f"{grid[0] * grid[1]}: give the grid of the images.")  # fmt: skip
    rank = (same & causal(layout)).sum(-1) - 1  # of a token in its image
    row, column = rank // grid[1], rank % grid[1]
    near = ((row[:, :, None] - row[:, None, :]).abs() <= radius) & (
        (column[:, :, None] - column[:, None, :]).abs() <= radius
    )
    return torch.where(same, near, causal(layout))


RULES: dict[str, Callable[[TokenLayout], Tensor]] = {
    "causal": causal,
    "mma": mma,
    "mma_mutual": mma_mutual,
    "framewise": framewise,
    "composite": composite,
}
