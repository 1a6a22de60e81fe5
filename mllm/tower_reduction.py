"""Reductions that work on the vision tower: tokens are merged as the projector takes them in, the rest is dropped."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from zoo.mllm.attention import watch
from zoo.mllm.base import Choice, Scene, Step, check_share, share_of
from zoo.mllm.vision_attention import Picture, Tower, tower_of

DROPPED = -(2.0**15)  # exact in all dtypes, and finite because what only fills up a batch is computed with


@dataclass(frozen=True)
class TowerReduction(Step):
    """A method that keeps some visual tokens of each picture, chosen and merged by what the vision tower attends to.

    What the projector makes of a dropped token is ``DROPPED`` in all channels, also in what ``get_image_features``
    gives. So features that were computed before can be given to the model, and its own order of tokens, of tiles and of
    separators holds. Before the decoder these tokens leave the prompt; the others keep their places.

    Attributes:
        keep: share of the visual tokens of each picture, rounded up. In LLaVA-NeXT a picture is a crop, whose padding
            is cut off afterwards; its separators all stay.
    """

    keep: float = 0.5
    layer: ClassVar[int] = 0
    needs_tower: ClassVar[bool] = True
    last_block: ClassVar[bool] = False  # look at the last block, not at the one whose output the projector takes
    one_head: ClassVar[bool] = False  # take the heads as one

    def __post_init__(self) -> None:
        check_share(self, self.keep)

    @property
    def is_identity(self) -> bool:
        """Whether all stay."""
        return self.keep == 1

    @abstractmethod
    def merge(self, picture: Picture, features: Tensor) -> tuple[Tensor, Tensor]:
        """Choose and merge.

        Args:
            picture: what the tower attends to.
            features: (N, C), what the projector is given.

        Returns:
            Which tokens stay, (N,) bool, and the features with what was merged into them.
        """

    def attach(self, model: nn.Module, memory: dict[str, Any]) -> list[Any]:
        """Put the hooks on the tower and on its projector."""
        tower, name = tower_of(model, self.last_block), type(self).__name__

        def start(module: nn.Module, args: tuple) -> None:
            memory["pictures"] = []  # also of a pass that an error ended, or that was computed again for gradients

        def see(query: Tensor, key: Tensor, mask: Tensor | None, scaling: float) -> None:
            memory["pictures"] += tower.look(query, key, mask, scaling, self.one_head)

        def project(module: nn.Module, args: tuple) -> tuple:
            features, memory["keep"] = self._reduce(args[0], memory.pop("pictures"), tower, name)
            return (features, *args[1:])

        def mark(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            keep = memory.pop("keep").view(*output.shape[:-1], 1)
            return output.masked_fill(~keep, DROPPED)

        return [
            tower.module.register_forward_pre_hook(start),
            watch(tower.attention, see),
            tower.projector.register_forward_pre_hook(project),
            tower.projector.register_forward_hook(mark),
        ]

    def _reduce(self, features: Tensor, pictures: list[Picture], tower: Tower, name: str) -> tuple[Tensor, Tensor]:
        rows, sizes = features.flatten(0, -2), [len(picture.attention) for picture in pictures]
        if sum(sizes) != len(rows):
            raise ValueError(
                f"{name}: the projector is given {len(rows)} tokens, but the tower has seen {sum(sizes)} without "
                "CLS: expected a model whose vision_feature_select_strategy leaves out CLS and nothing else."
            )
        merged = [self.merge(picture, part) for picture, part in zip(pictures, rows.split(sizes))]
        keep, rows = (torch.cat(x) for x in zip(*merged))
        return rows.view_as(features), keep

    def select(self, scene: Scene) -> Choice:
        """Drop what was marked.

        Raises:
            ValueError: the last token of a row was.
        """
        dropped = scene.layout.is_image & (scene.hidden == DROPPED).all(-1)
        if dropped.gather(1, scene.layout.last[:, None]).any():
            raise ValueError(
                f"{type(self).__name__} drops the last token of a prompt, from which the answer starts: put text "
                "behind its last picture."
            )
        return Choice(~dropped)

    def visual_tokens(self, visual: float, entered: float, text: float) -> float:
        """The share, rounded up."""
        return share_of(visual, self.keep)


def chosen(index: Tensor, tokens: int) -> Tensor:
    """(N,) bool, True at the index."""
    return torch.zeros(tokens, dtype=torch.bool, device=index.device).index_fill(0, index, True)
