"""Feature pyramids for plain backbones, whose maps all have one resolution.

Li, Mao, Girshick, He: Exploring Plain Vision Transformer Backbones for Object Detection, ECCV 2022, arXiv:2203.16527.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import LayerNorm2d, get_device_dtype
from timm.models._features import FeatureGetterNet, FeatureInfo, feature_take_indices
from torch import Tensor, nn


class SimpleFeaturePyramid(nn.Module):
    """Maps of several strides from the last map of a plain backbone alone (section 3, figure 2).

    Finer levels begin with transposed convolutions of 2 x 2, each halving the channels, coarser ones with max pooling.
    Every level ends with a 1x1 and a 3x3 convolution, each with a layer norm.

    Args:
        in_channels: channels of the backbone's map.
        out_channels: channels of every level.
        strides: pixels of the picture for one of a level's map, along each side: ``in_stride`` times powers of two.
        in_stride: the same of the backbone's map.

    Raises:
        ValueError: a stride cannot be reached.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int = 256,
        strides: Sequence[int] = (4, 8, 16, 32),
        in_stride: int = 16,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.levels = nn.ModuleDict()
        for stride in strides:
            halvings = math.log2(in_stride / stride)
            if halvings % 1 or (halvings > 0 and in_channels % 2**halvings):
                raise ValueError(
                    f"A stride of {stride} cannot be made of {in_channels} channels at stride {in_stride}: expected a "
                    f"power of two times {in_stride}, or {in_stride} over one that divides the channels."
                )
            width = in_channels >> max(round(halvings), 0)
            self.levels[str(stride)] = nn.Sequential(
                *_resample(in_channels, round(halvings), dd),
                nn.Conv2d(width, out_channels, 1, bias=False, **dd),
                LayerNorm2d(out_channels, **dd),
                nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False, **dd),
                LayerNorm2d(out_channels, **dd),
            )

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, in_channels, H, W) to (B, out_channels, H', W') of each stride; coarser maps round up."""
        return [level(x) for level in self.levels.values()]


def _resample(dim: int, halvings: int, place: dict[str, Any]) -> list[nn.Module]:
    """What divides the stride by two so many times, or if negative multiplies it."""
    if halvings < 0:
        return [nn.MaxPool2d(2**-halvings, ceil_mode=True)]
    layers: list[nn.Module] = []
    for i in range(halvings):
        if i:
            layers += [LayerNorm2d(dim >> i, **place), nn.GELU()]
        layers.append(nn.ConvTranspose2d(dim >> i, dim >> (i + 1), 2, 2, **place))
    return layers


class PyramidFeatures(FeatureGetterNet):
    """A plain backbone and a ``SimpleFeaturePyramid`` on its last map, as timm's ``features_only`` gives backbones.

    For ``timm.create_model(name, features_only=True, feature_cls=PyramidFeatures)``, also of timm's own ViTs. Without
    ``feature_cls`` the maps are those of the blocks, all of one stride, as of timm's plain models. The pyramid has
    weights of its own, which are to be trained.

    Args:
        model: has ``feature_info``, ``forward_intermediates`` and ``prune_intermediate_layers`` as timm's models do.
        out_indices: levels, or the last so many; of the strides 4, 8, 16 and 32.
        out_channels: channels of every level.
        norm: apply the model's final norm to its last map.

    Raises:
        ValueError: the model's own maps have several strides.
    """

    strides = (4, 8, 16, 32)

    def __init__(
        self, model: nn.Module, out_indices: int | Sequence[int] = 4, out_channels: int = 256, norm: bool = False
    ) -> None:
        found = sorted({info["reduction"] for info in model.feature_info})
        if len(found) > 1:
            raise ValueError(f"{type(model).__name__} has maps of strides {found}: leave feature_cls out.")
        super().__init__(model, out_indices=1, norm=norm)
        place = get_device_dtype(model)
        dim, stride = self.feature_info.channels()[0], found[0]
        take, _ = feature_take_indices(len(self.strides), out_indices)
        self.pyramid = SimpleFeaturePyramid(dim, out_channels, [self.strides[i] for i in take], stride, **place)
        levels = [{"num_chs": out_channels, "reduction": s, "module": f"pyramid.levels.{s}"} for s in self.strides]
        self.feature_info = FeatureInfo(levels, tuple(take))

    def forward(self, x: Tensor) -> list[Tensor]:
        """Pictures (B, in_chans, H, W) to maps (B, out_channels, H', W'); H and W should be multiples of the stride."""
        return self.pyramid(super().forward(x)[-1])
