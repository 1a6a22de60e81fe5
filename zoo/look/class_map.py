"""Where a model sees a class: class-activation maps.

Zhou et al.: Learning Deep Features for Discriminative Localization, CVPR 2016, arXiv:1512.04150 (CAM), and Selvaraju et
al.: Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization, ICCV 2017, arXiv:1610.02391.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class ClassMap:
    """A class-activation map.

    Attributes:
        map: (H, W), of the last features.
        exact: whether the map is CAM: its mean and the bias make the logit, so that negative values count against the
            class. Else it is Grad-CAM, which is not negative.
    """

    map: Tensor
    exact: bool


def class_map(model: nn.Module, pixels: Tensor, label: int) -> ClassMap:
    """CAM where the head is average pooling and a linear layer, which is found out by computing both, else Grad-CAM.

    Both weigh the channels of the last features by the gradient of the logit. Where a class token alone is pooled the
    last block's result has no gradient anywhere else, and its input is taken.

    Args:
        model: of timm or the zoo, in evaluation mode.
        pixels: what it is given, (1, 3, H, W).
        label: place of the class in the model's output.

    Raises:
        ValueError: the model has no map of features.
    """
    features, head = _split(model, pixels)
    with torch.enable_grad():
        logit = head(features)[0, label]
    (gradient,) = torch.autograd.grad(logit, features)
    maps, slopes = (_as_maps(model, x, pixels) for x in (features.detach(), gradient))
    weights = slopes.sum((1, 2))
    activation = torch.einsum("c,chw->hw", weights, maps)
    with torch.no_grad():
        rest = logit - head(torch.zeros_like(features))[0, label]
    exact = torch.isclose(activation.mean(), rest, rtol=1e-3, atol=1e-3 * activation.abs().mean().item())
    return ClassMap(activation, True) if exact else ClassMap(activation.relu(), False)


def _split(model: nn.Module, pixels: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The features of which there is a map, as a leaf of autograd, and what comes after them."""
    if getattr(model, "global_pool", None) != "token" or not hasattr(model, "blocks"):
        if not hasattr(model, "forward_head"):
            raise ValueError(f"{type(model).__name__} is not a timm model: it has no forward_head to look before.")
        with torch.no_grad():
            return model.forward_features(pixels).requires_grad_(), model.forward_head
    inputs: list[Tensor] = []
    with torch.no_grad(), model.blocks[-1].register_forward_pre_hook(lambda _, args: inputs.append(args[0])):
        model(pixels)

    def after(features: Tensor) -> Tensor:
        with model.blocks[-1].register_forward_pre_hook(lambda _, args: (features, *args[1:])):
            return model(pixels)

    return inputs[0].requires_grad_(), after


def _as_maps(model: nn.Module, features: Tensor, pixels: Tensor) -> Tensor:
    """Features of one picture as (C, H, W)."""
    if features.ndim == 4:
        return features[0].movedim(-1, 0) if getattr(model, "output_fmt", "NCHW") == "NHWC" else features[0]
    if features.ndim == 3 and hasattr(getattr(model, "patch_embed", None), "dynamic_feat_size"):
        grid = model.patch_embed.dynamic_feat_size(tuple(pixels.shape[2:]))
        return features[0, getattr(model, "num_prefix_tokens", 0) :].T.unflatten(1, grid)
    raise ValueError(
        f"{type(model).__name__} has features of shape {tuple(features.shape)}, which are no map: expected "
        "(B, C, H, W), (B, H, W, C) or tokens of a grid."
    )
