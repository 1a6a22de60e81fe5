"""Learning rates that fall towards the stem, and no weight decay where a model says so, for mmengine's optimizers."""

from typing import Any

from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from timm.optim import param_groups_layer_decay
from torch import nn

__all__ = ["LayerDecayConstructor"]


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayConstructor(DefaultOptimWrapperConstructor):
    """Layer-wise learning rates for models of the zoo and of timm, in a detector or segmenter.

    Clark, Luong, Le, Manning: ELECTRA, ICLR 2020, arXiv:2003.10555. Every such model tells by its ``group_matcher``
    which parameters are of one layer: the last block learns at the full rate, each before it at ``layer_decay`` times
    that of the next. Its ``no_weight_decay`` and its parameters of one dimension have no weight decay. Everything else
    (output norms, pyramids, necks, heads) follows the other options of ``paramwise_cfg``. In a config::

        optim_wrapper = dict(
            constructor="LayerDecayConstructor", paramwise_cfg=dict(layer_decay=0.9), optimizer=dict(type="AdamW", ...)
        )

    Args:
        optim_wrapper_cfg: config of the optimizer, with ``lr``.
        paramwise_cfg: ``layer_decay`` in (0, 1], 1 if it is not given, and what
            ``mmengine.optim.DefaultOptimWrapperConstructor`` takes.

    Raises:
        ValueError: ``layer_decay`` is out of range, or the optimizer has no ``lr``.
    """

    def __init__(self, optim_wrapper_cfg: dict[str, Any], paramwise_cfg: dict[str, Any] | None = None) -> None:
        super().__init__(optim_wrapper_cfg, {"layer_decay": 1.0, **(paramwise_cfg or {})})
        self.layer_decay = self.paramwise_cfg["layer_decay"]
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay is {self.layer_decay}, expected a number above 0 and up to 1.")
        if self.base_lr is None:
            raise ValueError("The optimizer has no lr, of which layer_decay would be a share: set optimizer=dict(lr=).")

    def add_params(self, params: list[dict[str, Any]], module: nn.Module, *args: Any, **kwargs: Any) -> None:
        """Appends the groups of parameters of a module and of what it is made of."""
        if not hasattr(module, "group_matcher"):
            super().add_params(params, module, *args, **kwargs)
            if not args and not kwargs:  # the whole detector or segmenter
                params[:] = self._merged(params)
            return
        groups = param_groups_layer_decay(
            module,
            weight_decay=self.base_wd or 0.0,
            no_weight_decay_list=getattr(module, "no_weight_decay", set)(),
            layer_decay=self.layer_decay,
        )
        for group in groups:
            group["lr"] = self.base_lr * group.pop("lr_scale")
        params += groups

    def _merged(self, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """One group for all parameters of the same settings: an optimizer has kernels to launch for every group."""
        found: dict[str, dict[str, Any]] = {}
        usual = {"lr": self.base_lr} | ({} if self.base_wd is None else {"weight_decay": self.base_wd})
        for group in groups:
            settings = {**usual, **group, "params": []}
            found.setdefault(repr(sorted(settings.items())), settings)["params"] += group["params"]
        return list(found.values())
