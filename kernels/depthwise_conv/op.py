"""The depthwise convolution as one PyTorch operator, ``zoo::depthwise_conv2d``."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zoo.kernels.depthwise_conv import torch_backend
from zoo.kernels.dispatch import select_backend, triton_asked_for, triton_backend
from zoo.kernels.library import check_float, check_shape, register_op

NAME = "depthwise_conv2d"
TRITON_MAX_SIZE = 7  # the taps of a larger kernel do not fit into registers


def depthwise_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: int = 1, dilation: int = 1, residual: bool = False
) -> Tensor:
    """Depthwise 2D convolution with "same" padding over channels-last tokens; the formula is in ``reference.py``.

    Args:
        x: (B, H, W, C), any strides; float32, bfloat16, float16 or float64. Sums are kept in float32 or better.
        weight: (C, 1, K, K), K odd, as of ``torch.nn.Conv2d``; any floating-point dtype.
        bias: (C,).
        stride: 1 or 2.
        dilation: distance between taps, in tokens.
        residual: add the input to the result; needs stride 1.

    Returns:
        (B, ceil(H / stride), ceil(W / stride), C), contiguous, in the dtype of x.

    Raises:
        ValueError: an argument has another shape, dtype or value.
    """
    return torch.ops.zoo.depthwise_conv2d(x, weight, bias, stride, dilation, residual)


def check(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, dilation: int, residual: bool) -> None:
    """Raise a ValueError for arguments that the operator does not take."""
    check_float(NAME, x=x, weight=weight, bias=bias)
    if x.ndim != 4:
        raise ValueError(f"{NAME}: x has shape {tuple(x.shape)}, expected (B, H, W, C).")
    size = weight.shape[-1]
    check_shape(NAME, "weight", weight, (x.shape[-1], 1, size, size), "(C, 1, K, K)")
    check_shape(NAME, "bias", bias, (x.shape[-1],), "(C,)")
    if size % 2 == 0:
        raise ValueError(f"{NAME}: the kernel is {size} x {size}, expected an odd size.")
    if stride not in (1, 2) or dilation < 1:
        raise ValueError(
            f"{NAME}: stride is {stride} and dilation {dilation}, expected stride 1 or 2 and dilation >= 1."
        )
    if residual and stride != 1:
        raise ValueError(f"{NAME}: residual needs stride 1, got stride {stride}.")


def compute(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, dilation: int, residual: bool) -> Tensor:
    """The forward pass on the backend for the device of x."""
    check(x, weight, bias, stride, dilation, residual)
    if x.numel() == 0:
        return _fake(x, weight, bias, stride, dilation, residual)
    return select_backend(NAME, _backends(x, weight, stride, dilation, "forward"), x.device)(
        x, weight, bias, stride, dilation, residual
    )


def compute_backward(
    grad: Tensor, x: Tensor, weight: Tensor, has_bias: bool, stride: int, dilation: int, residual: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The backward pass on the backend for the device of x."""
    if x.numel() == 0:
        return tuple(tensor.zero_() for tensor in _fake_backward(grad, x, weight, has_bias, stride, dilation, residual))
    return select_backend(NAME, _backends(x, weight, stride, dilation, "backward"), x.device)(
        grad, x, weight, has_bias, stride, dilation, residual
    )


def _backends(x: Tensor, weight: Tensor, stride: int, dilation: int, direction: str) -> dict[str, Callable]:
    backends = {"torch": getattr(torch_backend, direction)}
    strided = stride > 1 and (dilation > 1 or direction == "backward")
    if triton_asked_for() and x.dtype != torch.float64 and weight.shape[-1] <= TRITON_MAX_SIZE and not strided:
        backends["triton"] = triton_backend("zoo.kernels.depthwise_conv.triton", direction, backends["torch"])
    return backends


def flops(x: Any, weight: Any, *_: Any, out_shape: Any, **__: Any) -> int:
    """Two per tap and result."""
    batch, height, width, channels = out_shape
    return 2 * batch * height * width * channels * weight[-1] ** 2


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, dilation: int, residual: bool) -> Tensor:
    check(x, weight, bias, stride, dilation, residual)
    batch, height, width, channels = x.shape
    return x.new_empty(batch, (height + stride - 1) // stride, (width + stride - 1) // stride, channels)


def _fake_backward(
    grad: Tensor, x: Tensor, weight: Tensor, has_bias: bool, stride: int, dilation: int, residual: bool
) -> tuple[Tensor, Tensor, Tensor]:
    contiguous = torch.contiguous_format
    return (
        torch.empty_like(x, memory_format=contiguous),
        torch.empty_like(weight, memory_format=contiguous),
        weight.new_empty(weight.shape[0] if has_bias else 0),
    )


def _flops_backward(grad: Any, x: Any, weight: Any, *_: Any, **__: Any) -> int:
    return 2 * flops(x, weight, out_shape=grad)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weight, bias, *ctx.settings = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, grad: Tensor) -> tuple:
    x, weight = ctx.saved_tensors
    has_bias = ctx.bias_dtype is not None
    grads = torch.ops.zoo.depthwise_conv2d_backward(grad, x, weight, has_bias, *ctx.settings)
    grad_bias = grads[2].to(ctx.bias_dtype) if has_bias else None
    return grads[0], grads[1], grad_bias, None, None, None


_SETTINGS = "int stride, int dilation, bool residual"
_name = register_op(f"{NAME}(Tensor x, Tensor weight, Tensor? bias, {_SETTINGS}) -> Tensor", compute, _fake, flops)
register_op(
    f"{NAME}_backward(Tensor grad, Tensor x, Tensor weight, bool has_bias, {_SETTINGS}) -> (Tensor, Tensor, Tensor)",
    compute_backward,
    _fake_backward,
    _flops_backward,
)
torch.library.register_autograd(_name, _backward, setup_context=_setup_context)
