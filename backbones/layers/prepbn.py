"""RepBN and PRepBN: batch norm that takes the place of layer norm in transformers, and vanishes at inference.

Guo, Chen, Tang, Wang: SLAB: Efficient Transformers with Simplified Linear Attention and Progressive Re-parameterized
Batch Normalization, ICML 2024, arXiv:2405.11582. All layers take tokens (..., C).
"""

from collections.abc import Callable
from functools import partial

import torch
from timm.layers import LayerNorm, LayerNormFp32
from torch import Tensor, nn


class ChannelAffine(nn.Module):
    """``weight * x + bias`` for each channel: what is left of a RepBN that no linear layer follows."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) to the same."""
        return x * self.weight + self.bias


class RepBN(nn.Module):
    """``BatchNorm(x) + alpha * x``, with one alpha for all channels (eq. 5): (..., C) to the same.

    Args:
        dim: C.
    """

    def __init__(self, dim: int, device: torch.device | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.empty(1, device=device, dtype=dtype))
        self.bn = nn.BatchNorm1d(dim, device=device, dtype=dtype)
        nn.init.ones_(self.alpha)

    def reset_parameters(self) -> None:
        """Alpha 1; the batch norm resets itself."""
        nn.init.ones_(self.alpha)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) to the same."""
        if not self.training:
            weight, bias = self.affine()
            return x * weight.to(x.dtype) + bias.to(x.dtype)
        return self.bn(x.reshape(-1, x.shape[-1])).view(x.shape) + self.alpha * x

    def affine(self) -> tuple[Tensor, Tensor]:
        """What the layer is at inference: factors and offsets (C,), float32 or better."""
        dtype = torch.promote_types(self.alpha.dtype, torch.float32)
        mean, variance, scale, offset = (
            self.bn.running_mean.to(dtype),
            self.bn.running_var.to(dtype),
            self.bn.weight.to(dtype),
            self.bn.bias.to(dtype),
        )
        scale = scale * torch.rsqrt(variance + self.bn.eps)
        return scale + self.alpha.to(dtype), offset - mean * scale

    @torch.jit.ignore
    def fuse(self) -> nn.Module:
        """The layer at inference as one multiplication and one addition, for ``timm.utils.reparameterize_model``."""
        return ChannelAffine(*(x.detach().to(self.alpha.dtype) for x in self.affine()))


class PRepBN(nn.Module):
    """``w * LayerNorm(x) + (1 - w) * RepBN(x)`` in training, RepBN at inference (eq. 4): (..., C) to the same.

    The weight w falls from 1 to 0 while ``set_prep_progress`` says so; until it is called, w is 0. Both branches are
    always computed in training, so that RepBN knows its statistics from the first step.

    Args:
        dim: C.
        eps: of the layer norm.
    """

    def __init__(
        self, dim: int, eps: float = 1e-5, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.layer_norm = nn.LayerNorm(dim, eps, device=device, dtype=dtype)
        self.rep_bn = RepBN(dim, device=device, dtype=dtype)
        self.register_buffer("progress", torch.ones(2, dtype=torch.int64, device=device))  # steps done, of how many

    def reset_parameters(self) -> None:
        """Progress as of a new layer; the branches reset themselves."""
        nn.init.ones_(self.progress)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) to the same."""
        if not self.training:
            return self.rep_bn(x)
        norm, rep = self.layer_norm(x), self.rep_bn(x)
        dtype = torch.promote_types(norm.dtype, rep.dtype)  # autocast gives them different ones
        share = (self.progress[0] / self.progress[1]).to(dtype)
        return torch.lerp(norm.to(dtype), rep.to(dtype), share)

    def affine(self) -> tuple[Tensor, Tensor]:
        """As of ``RepBN``."""
        return self.rep_bn.affine()

    @torch.jit.ignore
    def fuse(self) -> nn.Module:
        """As of ``RepBN``."""
        return self.rep_bn.fuse()


def norm_layer(kind: str, eps: float) -> Callable[..., nn.Module]:
    """What makes the norms of a body.

    Args:
        kind: "layernorm", "repbn" or "prepbn".
        eps: of the layer norms.

    Raises:
        ValueError: another kind.
    """
    kinds = {"layernorm": partial(nn.LayerNorm, eps=eps), "repbn": RepBN, "prepbn": partial(PRepBN, eps=eps)}
    if kind not in kinds:
        raise ValueError(f"norm is {kind!r}, expected one of {', '.join(kinds)}.")
    return kinds[kind]


def set_prep_progress(model: nn.Module, step: int, total: int) -> None:
    """Tell every PRepBN of a model how far the way from layer norm to RepBN is gone; call it before each step.

    Args:
        model: holds PRepBN layers.
        step: optimizer steps done; at ``total`` and beyond there is only RepBN.
        total: optimizer steps until then, at least 1. The paper's models take 60,000 to 300,000.

    Raises:
        ValueError: the model has no PRepBN, or a number is out of range.
    """
    layers = [module for module in model.modules() if isinstance(module, PRepBN)]
    if not layers:
        raise ValueError("The model has no PRepBN: make it with norm='prepbn', or call replace_layer_norms first.")
    if step < 0 or total < 1:
        raise ValueError(f"step is {step} of {total}, expected step >= 0 and total >= 1.")
    progress = torch.tensor([min(step, total), total], device=layers[0].progress.device)  # to a GPU once, not for each
    for layer in layers:
        layer.progress.copy_(progress)


# No other subclasses: some of timm's norm the channels of (B, C, H, W), or have an activation in them.
_LAYER_NORMS = (nn.LayerNorm, LayerNorm, LayerNormFp32)


def replace_layer_norms(model: nn.Module) -> nn.Module:
    """Put a PRepBN in the place of every layer norm over the last dimension, such as those of timm's ViTs.

    The layer norm goes on as a branch, so while the progress is 0 the model in training is what it was.

    Args:
        model: is changed.

    Returns:
        The model.

    Raises:
        ValueError: it has no such layer norm.
    """
    places = [
        (parent, name, child)
        for parent in model.modules()
        if not isinstance(parent, PRepBN)
        for name, child in parent.named_children()
        if type(child) in _LAYER_NORMS and len(child.normalized_shape) == 1
    ]
    if not places:
        raise ValueError(f"{type(model).__name__} has no layer norm over one dimension to replace.")
    for parent, name, norm in places:
        place = {"device": norm.weight.device, "dtype": norm.weight.dtype} if norm.elementwise_affine else {}
        prep = PRepBN(norm.normalized_shape[0], norm.eps, **place)
        prep.layer_norm = norm
        setattr(parent, name, prep.train(model.training))
    return model


@torch.no_grad()
def merge_into_readers(norm: nn.Module, *layers: nn.Module) -> bool:
    """Merge a RepBN or PRepBN into the linear layers and convolutions without padding that read it.

    Args:
        norm: is not changed.
        layers: ``nn.Linear`` or ``nn.Conv2d``, changed in place.

    Returns:
        Whether the norm was one that can be merged; if so the caller leaves it out.
    """
    if not isinstance(norm, RepBN | PRepBN):
        return False
    factor, offset = (x.double() for x in norm.affine())
    for layer in layers:
        shape = (1, -1) + (1,) * (layer.weight.ndim - 2)
        weight = layer.weight.double()
        bias = (weight * offset.view(shape)).flatten(1).sum(1)
        if layer.bias is not None:
            bias = bias + layer.bias.double()
        layer.bias = nn.Parameter(bias.to(layer.weight.dtype))
        layer.weight.copy_(weight * factor.view(shape))
    return True


@torch.no_grad()
def merge_into_writer(norm: nn.Module, layer: nn.Conv2d) -> bool:
    """Merge a RepBN or PRepBN into the convolution before it, as ``merge_into_readers``."""
    if not isinstance(norm, RepBN | PRepBN):
        return False
    factor, offset = (x.double() for x in norm.affine())
    layer.weight.copy_(layer.weight.double() * factor.view(-1, 1, 1, 1))
    layer.bias.copy_(layer.bias.double() * factor + offset)
    return True
