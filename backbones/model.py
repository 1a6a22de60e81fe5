"""What every family of the zoo shares: stages, head and the rest of timm's contract for a backbone."""

from collections.abc import Iterable, Sequence
from importlib.resources import files
from typing import Any, TypeVar

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import ClassifierHead, get_device_dtype
from timm.models import build_model_with_cfg, checkpoint_seq
from timm.models._features import feature_take_indices
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)

# The pretrained cfg of models trained on the quickstart data (tools/build_quickstart_data.py).
QUICKSTART = {
    "num_classes": 1332,
    "input_size": (3, 96, 96),
    "pool_size": (3, 3),
    "crop_pct": 1.0,
    "mean": IMAGENET_DEFAULT_MEAN,
    "std": IMAGENET_DEFAULT_STD,
    "license": "apache-2.0",
}


def imagenet_cfg(size: int = 224, **kwargs: Any) -> dict[str, Any]:
    """The pretrained cfg of a model for ImageNet-1k pictures of so many pixels, with what of it is different."""
    return {
        "num_classes": 1000,
        "input_size": (3, size, size),
        "pool_size": (size // 32, size // 32),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.conv",
        "classifier": "head.fc",
        **kwargs,
    }


def packaged(name: str) -> str:
    """The file of the weights that come with the package for a model."""
    return str(files("zoo") / "weights" / f"{name}_quickstart.safetensors")


class Stage(nn.Module):
    """Downsampling, blocks at one resolution, norm: (B, H, W, C) to (B, H', W', dim).

    Args:
        dim: channels of the result.
        blocks: modules that keep the shape.
        downsample: what comes before; None for nothing.
        norm: what comes after; None for nothing.
    """

    def __init__(
        self,
        dim: int,
        blocks: Iterable[nn.Module],
        downsample: nn.Module | None = None,
        norm: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.grad_checkpointing = False
        self.downsample = downsample or nn.Identity()
        self.blocks = nn.Sequential(*blocks)
        self.norm = norm or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to (B, H', W', dim)."""
        x = self.downsample(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq(self.blocks, x)
        else:
            x = self.blocks(x)
        return self.norm(x)


class Backbone(nn.Module):
    """A backbone: stem, stages, final norm, classifier.

    Pictures and feature maps are (B, C, H, W), in channels-last memory; inside, tokens are (B, H, W, C). Any height and
    width will do; every stride rounds up.

    Args:
        stem: pictures as (B, H, W, in_chans) to tokens (B, H', W', C).
        stages: blocks at one resolution each; in a plain backbone all at the same.
        norm: what follows the last stage: (B, H, W, C) to (B, H, W, num_features).
        num_features: channels that the classifier gets.
        in_chans: channels of the pictures.
        num_classes: outputs; 0 for pooled features instead.
        global_pool: pooling before the classifier, a name of timm's; "" for none.
        drop_rate: dropout before the classifier.
        reductions: pixels of the picture for one of each stage's map, along each side.
    """

    def __init__(
        self,
        stem: nn.Module,
        stages: Iterable[Stage],
        norm: nn.Module,
        num_features: int,
        in_chans: int,
        num_classes: int,
        global_pool: str,
        drop_rate: float,
        reductions: Sequence[int] = (4, 8, 16, 32),
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.num_features = num_features
        self.drop_rate = drop_rate
        self.stem = stem
        self.stages = nn.Sequential(*stages)
        self.norm = norm
        self.feature_info = [
            {"num_chs": stage.dim, "reduction": reduction, "module": f"stages.{i}"}
            for i, (stage, reduction) in enumerate(zip(self.stages, reductions, strict=True))
        ]
        self.head = ClassifierHead(num_features, num_classes, global_pool, drop_rate, device=device, dtype=dtype)
        self.head_hidden_size = self._pooled_size()
        self.init_weights(needs_reset=False)

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Draw the weights anew, also of a model that was on the meta device before ``to_empty``.

        Args:
            needs_reset: reset all layers first; not needed where they were just made.
        """
        for module in self.modules():
            if needs_reset and hasattr(module, "reset_parameters"):
                module.reset_parameters()
            self.init_module(module)
        if self.num_classes:
            nn.init.trunc_normal_(self.head.fc.weight, std=0.02)
            nn.init.zeros_(self.head.fc.bias)

    @staticmethod
    def init_module(module: nn.Module) -> None:
        """Draw the weights of one layer as the authors of the family do."""
        raise NotImplementedError

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay beyond those of one dimension, which timm leaves out by itself."""
        return set()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that sort the parameters into stem and blocks (or stages), for layer-wise learning rates."""
        final = (r"^norm", (99999,))
        if coarse:
            return {"stem": r"^stem", "blocks": [(r"^stages\.(\d+)", None), final]}
        blocks = [(r"^stages\.(\d+)\.downsample", (0,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None)]
        norms = [(rf"^stages\.{i}\.norm", (i, len(stage.blocks) - 1)) for i, stage in enumerate(self.stages)]
        return {"stem": r"^stem", "blocks": [*blocks, *norms, final]}  # a stage's norm goes with its last block

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only what enters the blocks for the backward pass, and compute the rest again."""
        for stage in self.stages:
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return self.head.fc

    @torch.jit.ignore
    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put a new head in place, for so many classes (0: none); the pooling stays unless given."""
        pool = self.head.global_pool.pool_type if global_pool is None else global_pool
        place = get_device_dtype(self)
        self.num_classes = num_classes
        self.head = ClassifierHead(self.num_features, num_classes, pool, self.drop_rate, **place).train(self.training)
        self.head_hidden_size = self._pooled_size()

    def _pooled_size(self) -> int:
        return self.num_features * self.head.global_pool.feat_mult()

    @torch.jit.ignore
    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The feature maps of the stages.

        Args:
            x: pictures (B, in_chans, H, W).
            indices: the last n stages, these stages, or all if None.
            norm: no effect: the maps are those of the authors' dense models, with the norm of a stage that has one.
            stop_early: do not run stages that are not asked for.
            output_fmt: "NCHW" or "NHWC".
            intermediates_only: leave out the final features.

        Returns:
            Maps, or final features (as ``forward_features``) and maps.

        Raises:
            ValueError: another output format.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt is {output_fmt!r}, expected 'NCHW' or 'NHWC'.")
        take, last = feature_take_indices(len(self.stages), indices)
        x = self.stem(_tokens(x))
        maps = []
        for index, stage in enumerate(self.stages[: last + 1] if stop_early else self.stages):
            x = stage(x)
            if index in take:
                maps.append(x if output_fmt == "NHWC" else x.permute(0, 3, 1, 2))
        if intermediates_only:
            return maps
        if not stop_early or last == len(self.stages) - 1:
            x = self.norm(x)
        return x.permute(0, 3, 1, 2), maps

    @torch.jit.ignore
    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what these stages' maps do not need.

        Args:
            indices: as of ``forward_intermediates``.
            prune_norm: remove the final norm, so that the features are the last map.
            prune_head: remove the classifier.

        Returns:
            The indices of the stages.
        """
        take, last = feature_take_indices(len(self.stages), indices)
        ends = last < len(self.stages) - 1
        self.stages = self.stages[: last + 1]
        if prune_norm or ends:
            self.norm = nn.Identity()
            self.num_features = self.feature_info[last]["num_chs"]
        if prune_head or self.num_features != self.head.in_features or ends:
            self.reset_classifier(0, "")
        return take

    def forward_features(self, x: Tensor) -> Tensor:
        """Pictures (B, in_chans, H, W) to features (B, num_features, H', W') of the last stage's resolution."""
        x = self.norm(self.stages(self.stem(_tokens(x))))
        return x.permute(0, 3, 1, 2)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features to logits, or with ``pre_logits`` to what the classifier would get."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        """Pictures (B, in_chans, H, W) to logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))


def _tokens(x: Tensor) -> Tensor:
    """(B, C, H, W) to (B, H, W, C), which is also how it lies in memory, so that every layer after it does the same."""
    return x.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)


def build(model_class: type[Model], variant: str, pretrained: bool, **kwargs: Any) -> Model:
    """timm's builder with the settings that all families share: features are the last four maps."""
    return build_model_with_cfg(
        model_class, variant, pretrained, feature_cfg={"out_indices": 4, "feature_cls": "getter"}, **kwargs
    )
