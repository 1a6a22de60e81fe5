"""The depthwise convolution through PyTorch's own convolutions, on channels-last memory."""

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.kernels.depthwise_conv.reference import ACTIVATIONS
from zoo.kernels.library import accumulation_dtype

aten = torch.ops.aten
_SLOPES = {"none": lambda grad, _: grad, "gelu": aten.gelu_backward, "silu": aten.silu_backward}


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    dilation: int,
    residual: bool,
    activation: str = "none",
    gate: Tensor | None = None,
) -> Tensor:
    """As ``depthwise_conv2d``."""
    bias = bias if bias is None else bias.to(x.dtype)
    phased = _Phases(x, dilation) if stride == 1 else None
    if phased:
        y = phased.join(_convolve(phased.split(x), weight.to(x.dtype), bias, 1, 1))
    else:
        y = _convolve(x, weight.to(x.dtype), bias, stride, dilation)
    y = ACTIVATIONS[activation](y.add_(x) if residual else y)
    return y if gate is None else y.mul_(gate)


def epilogue_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    dilation: int,
    residual: bool,
    activation: str,
    gate: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Gradients of what enters the activation, computed again, and of the gate; the latter is empty without a gate."""
    dtype = accumulation_dtype(x.dtype)
    total, grad = forward(x, weight, bias, stride, dilation, residual).to(dtype), grad.to(dtype)
    grad_gate = x.new_empty(0)
    if gate is not None:
        grad_gate = (ACTIVATIONS[activation](total) * grad).to(gate.dtype).contiguous()
        grad = grad * gate.to(dtype)
    return _SLOPES[activation](grad, total).to(x.dtype, memory_format=torch.contiguous_format, copy=True), grad_gate


def backward(
    grad: Tensor, x: Tensor, weight: Tensor, has_bias: bool, stride: int, dilation: int, residual: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias of the convolution alone; the last is empty without a bias."""
    phased = _Phases(x, dilation) if stride == 1 else None
    inputs = (phased.split(grad), phased.split(x), 1, 1) if phased else (grad, x, stride, dilation)
    grad_x, grad_weight = _convolve_backward(*inputs[:2], weight.to(x.dtype), *inputs[2:])
    if phased:
        grad_x = phased.join(grad_x)
    grad_x = grad_x + grad if residual else grad_x
    grad_bias = grad.sum((0, 1, 2), dtype=weight.dtype) if has_bias else grad.new_empty(0, dtype=weight.dtype)
    return grad_x, grad_weight.to(weight.dtype), grad_bias


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, dilation: int) -> Tensor:
    padding = dilation * (weight.shape[-1] // 2)
    y = F.conv2d(_channels_first(x), weight, bias, stride, padding, dilation, groups=weight.shape[0])
    return y.permute(0, 2, 3, 1).contiguous()


def _channels_first(x: Tensor) -> Tensor:
    """(B, H, W, C) to (B, C, H, W); on a GPU also in memory, where cuDNN is twice as fast."""
    x = x.permute(0, 3, 1, 2)
    return x.contiguous() if x.is_cuda else x


def _convolve_backward(grad: Tensor, x: Tensor, weight: Tensor, stride: int, dilation: int) -> tuple[Tensor, Tensor]:
    padding = dilation * (weight.shape[-1] // 2)
    grad_x, grad_weight, _ = aten.convolution_backward(
        _channels_first(grad),
        _channels_first(x),
        weight,
        None,
        [stride] * 2,
        [padding] * 2,
        [dilation] * 2,
        False,
        [0, 0],
        weight.shape[0],
        [True, True, False],
    )
    return grad_x.permute(0, 2, 3, 1).contiguous(), grad_weight


class _Phases:
    """A dilated convolution on a CPU as an undilated one.

    Taps that are ``dilation`` apart meet only tokens whose row and column have the same remainder, so a map falls apart
    into dilation^2 smaller maps. PyTorch has a fast depthwise kernel for the CPU only without dilation.
    """

    def __init__(self, x: Tensor, dilation: int) -> None:
        self.dilation, self.shape = dilation, x.shape
        self.rows, self.columns = (-(-side // dilation) for side in x.shape[1:3])
        self.needed = dilation > 1 and x.device.type == "cpu"

    def __bool__(self) -> bool:
        return self.needed

    def split(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B d d, ceil(H / d), ceil(W / d), C), zeros where the map ends."""
        d, (batch, height, width, channels) = self.dilation, self.shape
        x = F.pad(x, (0, 0, 0, self.columns * d - width, 0, self.rows * d - height))
        x = x.view(batch, self.rows, d, self.columns, d, channels).permute(0, 2, 4, 1, 3, 5)
        return x.reshape(-1, self.rows, self.columns, channels)

    def join(self, x: Tensor) -> Tensor:
        """The inverse of ``split``."""
        d, (batch, height, width, channels) = self.dilation, self.shape
        x = x.view(batch, d, d, self.rows, self.columns, channels).permute(0, 3, 1, 4, 2, 5)
        return x.reshape(batch, self.rows * d, self.columns * d, channels)[:, :height, :width].contiguous()
