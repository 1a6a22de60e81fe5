"""The backbone of mmdet and mmseg configs: every model of the zoo, and every timm model with feature maps."""

import re
import sys
from collections.abc import Sequence
from typing import Any

import timm
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from timm.layers import LayerNorm2d
from timm.models import group_parameters
from timm.models._features import FeatureGetterNet
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from zoo import checkpoints
from zoo.backbones.layers.pyramid import PyramidFeatures
from zoo.backbones.model import Backbone

__all__ = ["ZooBackbone", "checkpoint_filter_fn"]

STRIDES = (4, 8, 16, 32)
# What the authors' dense backbones have otherwise than their classifiers, by the beginning of the name.
_DENSE = {"van_": {"norm_eps": 1e-5}, "slab_swin_": {"dense": True}, "prepbn_swin_": {"dense": True}}
# What the authors of RAVLT, ViG and SLAB call the norms of a detector's maps, and we.
_OUTPUT_NORM = re.compile(r"^(?:extra_norms\.|outnorm|norm)(?P<index>\d)(?:\.norm)?\.(?P<kind>weight|bias)$")


@MODELS.register_module()  # the root registry, which those of mmdet and mmseg fall back to
class ZooBackbone(BaseModule):
    """Feature maps of a model of the zoo or of timm, for necks and heads of mmdet and mmseg.

    As in the authors' detectors, models whose stages do not end with a norm get a layer norm for each map, VAN's norms
    have an eps of 1e-5, and SLAB's Swin attends in windows. Plain models, whose maps all have one stride, get a simple
    feature pyramid (``SimpleFeaturePyramid``), whose levels the indices then count.

    Weights of whole detectors load, ours and the authors', through ``checkpoint``, ``load_from`` or any
    ``load_state_dict``.

    Args:
        model_name: as of ``timm.create_model``.
        out_indices: maps to give, counted as timm does; None for those of ``strides``.
        strides: of the maps to give; None for those of 4, 8, 16 and 32 that the model has.
        pretrained: begin with the published weights.
        checkpoint: begin with these weights, as of ``zoo.load_checkpoint``: of a classifier, of the authors' dense
            backbones or of a detector, of which only the backbone is taken.
        frozen_stages: stages to hold fixed; 0 for the stem alone, -1 for nothing. Of plain models it counts blocks.
        norm_eval: hold the statistics of batch norms.
        drop_path_rate: stochastic depth.
        grad_checkpointing: keep less for the backward pass and compute it again.
        output_norms: layer norms for the maps; None for models of the zoo that need them.
        pyramid_channels: of every level of a simple feature pyramid.
        init_cfg: as of ``mmengine.model.BaseModule``.
        **model_kwargs: of ``timm.create_model``.

    Attributes:
        out_channels: channels of the maps.
        strides: pixels of the picture for one of each map, along each side.

    Raises:
        ValueError: the model is unknown, gives no maps, or has no such strides or stages.
        CheckpointError, OSError: as ``zoo.load_checkpoint``.
    """

    def __init__(
        self,
        model_name: str,
        out_indices: Sequence[int] | None = None,
        strides: Sequence[int] | None = None,
        pretrained: bool = False,
        checkpoint: checkpoints.Source | None = None,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        drop_path_rate: float = 0.0,
        grad_checkpointing: bool = False,
        output_norms: bool | None = None,
        pyramid_channels: int = 256,
        init_cfg: dict[str, Any] | None = None,
        **model_kwargs: Any,
    ) -> None:
        super().__init__(init_cfg)
        if isinstance(pretrained, str):  # mmseg passes on what its configs say for their own backbones
            raise ValueError(
                f"pretrained is {pretrained!r}, weights of another backbone: set model.pretrained=None in the config, "
                f"and pretrained=True or checkpoint= of the backbone."
            )
        if drop_path_rate:
            model_kwargs["drop_path_rate"] = drop_path_rate
        model = _create(model_name, pretrained, model_kwargs)
        classifier = model.state_dict().keys()
        own = [info["reduction"] for info in model.feature_info]
        plain = len(own) > 1 and len(set(own)) == 1
        if out_indices is None:
            out_indices = _levels(STRIDES if plain else own, strides)
        if plain:
            self.body = PyramidFeatures(model, tuple(out_indices), pyramid_channels)
        else:
            self.body = FeatureGetterNet(model, tuple(out_indices))
        self.pruned = classifier - model.state_dict().keys()  # names that checkpoints of the whole model have
        info = self.body.feature_info
        self.out_channels, self.strides = tuple(info.channels()), tuple(info.reduction())
        if output_norms is None:
            output_norms = isinstance(model, Backbone) and not isinstance(self.body, PyramidFeatures)
            output_norms = output_norms and isinstance(model.stages[0].norm, nn.Identity)
        eps = next((module.eps for module in model.modules() if isinstance(module, nn.LayerNorm)), 1e-5)
        levels = zip(info.out_indices, self.out_channels, strict=True) if output_norms else ()
        self.output_norms = nn.ModuleDict({str(index): LayerNorm2d(dim, eps) for index, dim in levels})
        self.register_load_state_dict_pre_hook(_rename_authors_weights)
        if checkpoint is not None:
            checkpoints.load_checkpoint(self, checkpoint)
        if grad_checkpointing:
            model.set_grad_checkpointing(True)
        self.norm_eval = norm_eval
        self.frozen = _stages_before(model, frozen_stages)
        for module in self.frozen:
            module.requires_grad_(False)
        self.train()

    @property
    def model(self) -> nn.Module:
        """The model that the maps come from, without what they do not need."""
        return self.body.model

    def train(self, mode: bool = True) -> "ZooBackbone":
        """Training mode, but for what is frozen."""
        super().train(mode)
        for module in self.frozen:
            module.eval()
        if self.norm_eval:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Pictures (B, 3, H, W) to maps (B, out_channels[i], H', W'), each with H / strides[i] rows, rounded up."""
        maps = self.body(x)
        return tuple(norm(y) for norm, y in zip(self.output_norms.values(), maps)) or tuple(maps)


def _create(model_name: str, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    """The whole model, if it has feature maps."""
    if not (model_name.startswith(("hf-hub:", "local-dir:")) or timm.is_model(model_name)):
        raise ValueError(
            f"There is no model {model_name!r} in the zoo or in timm: `import zoo, timm; timm.list_models()` lists all."
        )
    dense = next((args for start, args in _DENSE.items() if model_name.startswith(start)), {})
    model = checkpoints.create_model(model_name, pretrained=pretrained, **{**dense, **kwargs})
    if not (getattr(model, "feature_info", None) and hasattr(model, "forward_intermediates")):
        raise ValueError(f"{model_name} gives no feature maps: take a model with timm's forward_intermediates.")
    return model


def _levels(own: Sequence[int], wanted: Sequence[int] | None) -> list[int]:
    """The last of the maps of each wanted stride."""
    last = {stride: index for index, stride in enumerate(own)}
    if not set(wanted or ()) <= last.keys():
        raise ValueError(f"strides is {list(wanted)}, but the model has maps of strides {sorted(last)}.")
    return [last[stride] for stride in wanted or STRIDES if stride in last]


def _stages_before(model: nn.Module, frozen_stages: int) -> list[nn.Module]:
    """The modules of the stem and of the first so many stages, by the model's own grouping of its parameters."""
    if frozen_stages < 0:
        return []
    if not hasattr(model, "group_matcher"):
        raise ValueError(f"{type(model).__name__} does not tell its stages apart: set frozen_stages=-1.")
    stage_of = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    if frozen_stages > max(stage_of.values()):
        raise ValueError(f"frozen_stages is {frozen_stages}, but the model has {max(stage_of.values())} stages.")
    return [
        module
        for prefix, module in model.named_modules()
        for names in [[f"{prefix}.{name}".lstrip(".") for name, _ in module.named_parameters()]]
        if names and all(stage_of[name] <= frozen_stages for name in names)
    ]


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: ZooBackbone) -> dict[str, Tensor]:
    """Weights of a classifier, of the authors' dense backbones or of a detector in the names of a ``ZooBackbone``.

    What a classifier lacks, norms of maps and pyramids, stays as it is in the model.
    """
    if any(key.startswith("backbone.") for key in state_dict):
        state_dict = {key.removeprefix("backbone."): x for key, x in state_dict.items() if key.startswith("backbone.")}
    own = model.state_dict()
    if any(key in own for key in state_dict):
        return state_dict
    named = {key: x for key, x in own.items() if not key.startswith("body.model.")}
    rest = {}
    for key, tensor in state_dict.items():
        match = _OUTPUT_NORM.match(key) if model.output_norms else None
        if match is None:
            rest[key] = tensor
        elif match["index"] in model.output_norms:
            named[f"output_norms.{match['index']}.{match['kind']}"] = tensor
    family = getattr(sys.modules[type(model.model).__module__], "checkpoint_filter_fn", None)
    if family is not None:
        rest = family(rest, model.model)
    return named | {f"body.model.{key}": tensor for key, tensor in rest.items() if key not in model.pruned}


def _rename_authors_weights(module: ZooBackbone, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Before any ``load_state_dict``: the same in place, so that mmengine loads the authors' detectors."""
    mine = {key.removeprefix(prefix): state_dict.pop(key) for key in list(state_dict) if key.startswith(prefix)}
    renamed = checkpoint_filter_fn(mine, module) if mine else {}
    state_dict.update({f"{prefix}{key}": tensor for key, tensor in renamed.items()})
