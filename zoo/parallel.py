"""Pictures larger than a GPU: every rank holds a strip of rows of the picture and of each map of the model."""

import copy
from collections.abc import Callable, Mapping
from itertools import chain

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed, SelectAdaptivePool2d, resample_abs_pos_embed
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.modules.batchnorm import _BatchNorm

from zoo.backbones.inline import InLineDeiT, TokenInjectiveAttention, convolve_each
from zoo.backbones.layers.conv import DepthwiseConv2d
from zoo.backbones.lightnet import AdditiveAttention, LightNet, Stem
from zoo.backbones.ravlt import RAVLT, RankAugmentedAttention, RotarySoftmaxAttention
from zoo.backbones.van import VAN, LargeKernelAttention
from zoo.kernels.distributed import Strips, gather, linear_attention, softmax_attention, strided, with_halo
from zoo.kernels.library import accumulation_dtype
from zoo.kernels.rotary import rotary_angles, rotate

__all__ = ["split_rows"]


def split_rows(model: nn.Module, process_group: dist.ProcessGroup | None = None) -> nn.Module:
    """A model for strips: every rank calls it with some rows of the same pictures, from the top in the order of ranks.

    Strips may have any heights, also 0. The logits of the whole pictures come out on every rank. Features and maps come
    out as strips: row i of a map of stride s is on the rank that has row ``s * i`` of the picture. All ranks call the
    model, and the backward pass, in the same order.

    Gradients are those of the sum of the ranks' losses. With one loss of the logits on all ranks, their mean over the
    ranks, as ``torch.nn.parallel.DistributedDataParallel`` takes it, is the gradient of one rank with whole pictures.

    Args:
        model: RAVLT, InLineDeiT, LightNet or VAN, fused or not, with pooling "avg" (InLineDeiT: or "token") or none;
            the same on all ranks. Batch norms must be in evaluation mode when it runs. Stochastic depth and dropout
            need the same random seed on all ranks.
        process_group: the ranks; None for all.

    Returns:
        A copy that shares the parameters and buffers of the model, under the same names.

    Raises:
        ValueError: the model is another one, or ``torch.distributed`` has not been initialised.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError("There are no ranks to split rows over: call torch.distributed.init_process_group first.")
    group = dist.group.WORLD if process_group is None else process_group
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError("This process is not in the group: split the model on the ranks of the group only.")
    _check(model)
    shared = {id(x): x for x in chain(model.parameters(), model.buffers())}
    split = copy.deepcopy(model, shared)
    layout, reduction = Layout(group), 1
    for module in split.modules():  # in the order in which they run
        if type(module) in _SPLIT:
            module.__class__ = _SPLIT[type(module)]
            module.layout, module.reduction = layout, reduction
        if isinstance(module, nn.Conv2d):
            reduction *= module.stride[0]
    if isinstance(split, InLineDeiT):
        entry, rows = split.patch_embed, 2
        split.num_prefix_tokens = 0 if rank else split.num_prefix_tokens
    else:
        entry, rows = split.stem, 1
    norms = [module for module in split.modules() if isinstance(module, _BatchNorm)]
    entry.register_forward_pre_hook(lambda _, inputs: layout.begin(inputs[0], rows, norms))
    return split


def _check(model: nn.Module) -> None:
    families = (RAVLT, InLineDeiT, LightNet, VAN)
    name = type(model).__name__
    if type(model) not in families:
        raise ValueError(f"{name} cannot be split into rows, only {', '.join(x.__name__ for x in families)} can.")
    if isinstance(model, InLineDeiT):
        if any(type(block.attn) is not TokenInjectiveAttention for block in model.blocks):
            raise ValueError(f"{name} can be split into rows with attention='inline' only.")
        pooling, known = model.global_pool, ("token", "avg", "")
    else:
        pooling, known = model.head.global_pool.pool_type, ("avg", "")
    if pooling not in known:
        raise ValueError(f"{name} has the pooling {pooling!r}, expected one of {known} to be split into rows.")


class Layout:
    """The strips of the pictures that are being computed, which all layers of a split model look up.

    Args:
        group: the ranks.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    @torch.no_grad()
    def begin(self, pictures: Tensor, rows: int, norms: list[nn.Module]) -> None:
        """Tell all ranks how many rows each has.

        Args:
            pictures: the strip.
            rows: its dimension of rows; that of columns is the next one.
            norms: the batch norms of the model.

        Raises:
            ValueError: a batch norm is in training mode, the strips do not fit together, or there are no rows.
        """
        if any(norm.training for norm in norms):
            raise ValueError("Batch norms of split rows would each see a strip only: call eval() on the model first.")
        shapes = gather(torch.tensor(pictures.shape, device=pictures.device), self.group).tolist()
        heights = [shape[rows] for shape in shapes]
        if any(shape[:rows] + shape[rows + 1 :] != shapes[0][:rows] + shapes[0][rows + 1 :] for shape in shapes):
            raise ValueError(f"The ranks' strips are of shapes {shapes}, expected the same but for the rows.")
        if not any(heights):
            raise ValueError("The strips of all ranks are empty, expected pictures of at least one row.")
        self.picture, self.width = Strips.of(heights, self.group), pictures.shape[rows + 1]

    def at(self, reduction: int) -> Strips:
        """The strips of a map of which one row stands for so many of the picture."""
        return self.picture.reduced(reduction)

    def mean(self, sums: Tensor, count: int, dtype: torch.dtype) -> Tensor:
        """The sum over the ranks, divided by a number."""
        return (gather(sums, self.group).sum(0) / count).to(dtype)


class _OfLayout(nn.Module):
    """What all layers here have: the layout, and the reduction of the map that they read."""

    layout: Layout
    reduction: int

    @property
    def strips(self) -> Strips:
        return self.layout.at(self.reduction)

    def tokens(self, width: int) -> list[int]:
        """Tokens of the map of every rank."""
        return [height * width for height in self.strips.heights]


class SplitConv2d(_OfLayout, nn.Conv2d):
    """A convolution of strips (B, C, H, W); with a stride its result has ceil(H / stride) rows of the whole."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, W) to (B, C', h', W')."""
        padding = self.padding if self.stride[0] == 1 else (0, self.padding[1])

        def convolve(rows: Tensor) -> Tensor:
            y = F.conv2d(
                rows.permute(0, 3, 1, 2), self.weight, self.bias, self.stride, padding, self.dilation, self.groups
            )
            return y.permute(0, 2, 3, 1)

        rows = x.permute(0, 2, 3, 1)
        if self.stride[0] == 1:
            y = with_halo(convolve, rows, self.padding[0], self.strips)
        else:
            y = strided(convolve, rows, self.kernel_size[0], self.stride[0], self.padding[0], self.strips)
        return y.permute(0, 3, 1, 2)


class SplitDepthwiseConv2d(_OfLayout, DepthwiseConv2d):
    """A depthwise convolution of strips."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, h, W, C) to the same."""
        return with_halo(super().forward, x, self.padding[0], self.strips)


class SplitLargeKernelAttention(_OfLayout, LargeKernelAttention):
    """Large kernel attention of strips."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, h, W, C) to the same."""
        return with_halo(super().forward, x, self.local.padding[0] + self.dilated.padding[0], self.strips)


class SplitRankAugmentedAttention(_OfLayout, RankAugmentedAttention):
    """RALA of strips."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, local: Tensor, gate: Tensor, height: int, width: int) -> Tensor:
        """(B, N, heads, head_dim) each, to the same."""
        where = (self.layout.group, self.tokens(width))
        return linear_attention(q, k, v, *where, "elu+1", True, (height, width), self.rotary_base, local, gate)


class SplitRotarySoftmaxAttention(_OfLayout, RotarySoftmaxAttention):
    """Softmax attention of strips."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, local: Tensor, gate: Tensor, height: int, width: int) -> Tensor:
        """(B, N, heads, head_dim) each, to the same."""
        settings = (self.head_dim, self.rotary_base, q.device)
        by_row = rotary_angles(self.strips.start + height, 1, *settings)[self.strips.start :]
        by_column = rotary_angles(1, width, *settings)
        angles = (by_row[:, None] + by_column).flatten(0, 1)  # each is 0 where the other is not
        cos, sin = angles.cos(), angles.sin()
        q, k = (rotate(x.transpose(1, 2), cos, sin).to(v.dtype) for x in (q, k))
        out = softmax_attention(q, k, v.transpose(1, 2), self.layout.group, self.tokens(width)).transpose(1, 2)
        return (out + local) * gate


class SplitTokenInjectiveAttention(_OfLayout, TokenInjectiveAttention):
    """InLine's attention of strips; rank 0 also has the prefix tokens."""

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        """(B, N, C) to the same."""
        B, N, C = x.shape
        prefix, tokens = N - height * width, self.tokens(width)
        tokens[0] += self.prefix_tokens
        q, k, v = self.qkv(x).view(B, N, 3, self.num_heads, self.head_dim).unbind(2)
        mean = self.layout.mean(x.sum(1, dtype=accumulation_dtype(x.dtype)), sum(tokens), x.dtype)
        kernels = self.residual(mean.unsqueeze(-1)).flatten(1)
        values = v[:, prefix:].reshape(B, height, width, C)
        local = with_halo(lambda rows: convolve_each(rows, kernels), values, 1, self.strips)
        local = F.pad(local.flatten(1, 2), (0, 0, prefix, 0)).reshape(v.shape).to(v.dtype)
        form = {"local": local, "normalisation": "subtraction", "scale": self.head_dim**-0.5}
        out = linear_attention(q, k, v, self.layout.group, tokens, "identity", **form)
        return self.proj(out.reshape(B, N, C))


class SplitAdditiveAttention(_OfLayout, AdditiveAttention):
    """LightNet's attention of strips."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, h, W, C) to the same."""
        B, H, W, C = x.shape
        q, k, v = self.qkv(x).view(B, H * W, 3, self.num_heads, self.head_dim).unbind(2)
        form = {"grid": (H, W), "normalisation": "keys", "rotary_across_heads": True}
        out = linear_attention(q, k, v, self.layout.group, self.tokens(W), "silu", **form)
        return self.proj(self.norm(out.reshape(B, H, W, C)) * F.silu(self.gate(x)))


class SplitStem(_OfLayout, Stem):
    """LightNet's patch embedding and MD-TPE of strips."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, h, W, in_chans) to (B, h', W', dim)."""
        x = F.pad(x.permute(0, 3, 1, 2), (0, -x.shape[2] % self.patch_size))
        x = self.conv(x).permute(0, 2, 3, 1)
        columns = x.transpose(1, 2)
        columns = self.along_columns(torch.cat((self.rows_above(columns), columns), 2))[:, :, 1:]
        return self.along_rows(x) + columns.transpose(1, 2)

    def rows_above(self, x: Tensor) -> Tensor:
        """One token before each column of the strip that stands for all above: (B, W, h, C) to (B, W, 1, C).

        The recurrence ``sum_{s <= t} lambda ** (t - s) x_s`` needs no more than its last value of every rank.
        """
        encoding, strips = self.along_columns, self.layout.at(self.patch_size)
        dtype = accumulation_dtype(x.dtype)
        log_lambda = F.logsigmoid(encoding.log_decay.to(dtype))
        left = torch.arange(x.shape[2] - 1, -1, -1, device=x.device, dtype=dtype)  # tokens after each of the strip
        heads = x.to(dtype).unflatten(3, (encoding.num_heads, -1))
        last = torch.einsum("hs,bmshd->bmhd", (log_lambda[:, None] * left).exp(), heads)
        since = torch.tensor([strips.start - stop for _, stop in strips.spans[: strips.rank]], device=x.device)
        decay = F.pad((log_lambda * since[:, None]).exp(), (0, 0, 0, len(strips.spans) - strips.rank))  # (ranks, heads)
        above = torch.einsum("rh,rbmhd->bmhd", decay, gather(last, strips.group))
        return above.flatten(2).unsqueeze(2).to(x.dtype)


class SplitPatchEmbed(_OfLayout, PatchEmbed):
    """DeiT's patch embedding of strips; what is no multiple of the patch is padded."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, h, W) to (B, h', W', C)."""
        x = self.proj(F.pad(x, (0, -x.shape[3] % self.patch_size[1])))
        return self.norm(x.permute(0, 2, 3, 1))


class SplitInLineDeiT(_OfLayout, InLineDeiT):
    """InLine-DeiT of strips; rank 0 also has the class token."""

    def _pos_embed(self, x: Tensor) -> Tensor:
        """(B, h, W, C) to tokens with positions: a table resized along rows, cut, then resized along columns."""
        height, width = x.shape[1:3]
        strips, grid = self.layout.at(self.patch_embed.patch_size[0]), self.patch_embed.grid_size
        prefix = 0 if self.cls_token is None else 1
        table = resample_abs_pos_embed(self.pos_embed, [strips.total, grid[1]], grid, prefix)
        first, count = min(strips.start, strips.total - 1), max(height, 1)  # a row at least: no size can be 0 there
        rows = table[:, prefix:].unflatten(1, (-1, grid[1]))[:, first : first + count].flatten(1, 2)
        rows = resample_abs_pos_embed(rows, [count, width], [count, grid[1]], 0)
        x = x.flatten(1, 2) + rows[:, : height * width]
        if prefix:
            x = torch.cat(((self.cls_token + table[:, :1]).expand(x.shape[0], -1, -1), x), 1)
        return x[:, prefix - self.num_prefix_tokens :]

    def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        """(B, N, C) to (B, C), the same on every rank; without pooling tokens as they are."""
        pooling, prefix = self.global_pool if pool_type is None else pool_type, self.num_prefix_tokens
        if not pooling:
            return x
        rows, columns = self.patch_embed.patch_size
        count = 1 if pooling == "token" else self.layout.at(rows).total * -(-self.layout.width // columns)
        tokens = x[:, :prefix] if pooling == "token" else x[:, prefix:]
        return self.layout.mean(tokens.sum(1, dtype=accumulation_dtype(x.dtype)), count, x.dtype)


class SplitPool(_OfLayout, SelectAdaptivePool2d):
    """Average pooling of strips: the mean of the whole map on every rank."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, W) to (B, C)."""
        if self.is_identity():
            return x
        sums = x.sum((2, 3), dtype=accumulation_dtype(x.dtype))
        return self.layout.mean(sums, self.strips.total * x.shape[3], x.dtype)


_SPLIT: Mapping[type[nn.Module], Callable[..., nn.Module]] = {
    nn.Conv2d: SplitConv2d,
    DepthwiseConv2d: SplitDepthwiseConv2d,
    LargeKernelAttention: SplitLargeKernelAttention,
    RankAugmentedAttention: SplitRankAugmentedAttention,
    RotarySoftmaxAttention: SplitRotarySoftmaxAttention,
    TokenInjectiveAttention: SplitTokenInjectiveAttention,
    AdditiveAttention: SplitAdditiveAttention,
    Stem: SplitStem,
    PatchEmbed: SplitPatchEmbed,
    InLineDeiT: SplitInLineDeiT,
    SelectAdaptivePool2d: SplitPool,
}
