"""The depthwise convolution as one PyTorch operator, ``zoo::depthwise_conv2d``."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zoo.kernels.depthwise_conv import torch_backend
from zoo.kernels.depthwise_conv.reference import ACTIVATIONS
from zoo.kernels.dispatch import planned, select_backend, triton_backend
from zoo.kernels.library import check_float, check_shape, register_op

NAME = "depthwise_conv2d"


def depthwise_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int = 1,
    dilation: int = 1,
    residual: bool = False,
    activation: str = "none",
    gate: Tensor | None = None,
) -> Tensor:
    """``activation(conv(x) + bias + x) * gate`` over channels-last tokens; the formula is in ``reference.py``.

    The backward pass computes what enters the activation again. Up to 7x7 that costs less than to keep it: the forward
    pass would write, and the backward pass read, 4 bytes per result in bfloat16, and x is read for the gradients of the
    weight anyway. For 11x11 and 21x21 keeping it would save a tenth to a fifth of a training step of the operator, for
    one more tensor in memory: `torch.nn.functional.gelu` after the operator does that.

    Args:
        x: (B, H, W, C), any strides; float32, bfloat16, float16 or float64. Sums are kept in float32 or better.
        weight: (C, 1, K, K), K odd, as of ``torch.nn.Conv2d``; any floating-point dtype.
        bias: (C,).
        stride: 1 or 2.
        dilation: distance between taps, in tokens.
        residual: add the input before the activation; needs stride 1.
        activation: "none", "gelu" (with the error function) or "silu".
        gate: of the shape of the result, any strides, any floating-point dtype; multiplies the result.

    Returns:
        (B, ceil(H / stride), ceil(W / stride), C), contiguous, in the dtype of x.

    Raises:
        ValueError: an argument has another shape, dtype or value.
    """
    return torch.ops.zoo.depthwise_conv2d(x, weight, bias, stride, dilation, residual, activation, gate)


def check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    dilation: int,
    residual: bool,
    activation: str = "none",
    gate: Tensor | None = None,
) -> None:
    """Raise a ValueError for arguments that the operator does not take."""
    check_float(NAME, x=x, weight=weight, bias=bias, gate=gate)
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
    if activation not in ACTIVATIONS:
        raise ValueError(f"{NAME}: activation is {activation!r}, expected one of {', '.join(ACTIVATIONS)}.")
    check_shape(NAME, "gate", gate, _out_shape(x, stride), "(B, ceil(H / stride), ceil(W / stride), C)")


@planned
def compute(x: Tensor, *arguments: Any) -> Callable:
    """The forward pass on the backend for the device of x."""
    check(x, *arguments)
    return _fake if x.numel() == 0 else _backend(x, "forward")


@planned
def compute_epilogue_backward(grad: Tensor, x: Tensor, *_: Any) -> Callable:
    """Gradients of what enters the activation and of the gate, on the backend for the device of x."""
    return _fake_epilogue_backward if x.numel() == 0 else _backend(x, "epilogue_backward")


@planned
def compute_backward(grad: Tensor, x: Tensor, *_: Any) -> Callable:
    """The backward pass of the convolution alone, on the backend for the device of x."""
    if x.numel() == 0:
        return lambda *arguments: tuple(tensor.zero_() for tensor in _fake_backward(*arguments))
    return _backend(x, "backward")


def _backend(x: Tensor, function: str) -> Callable:
    backends = {"torch": getattr(torch_backend, function)}
    if x.dtype != torch.float64:
        backends["triton"] = triton_backend("zoo.kernels.depthwise_conv.triton", f"plan_{function}", backends["torch"])
    return select_backend(NAME, backends, x.device)


def _out_shape(x: Tensor, stride: int) -> tuple[int, int, int, int]:
    batch, height, width, channels = x.shape
    return batch, (height + stride - 1) // stride, (width + stride - 1) // stride, channels


def flops(x: Any, weight: Any, *_: Any, out_shape: Any, **__: Any) -> int:
    """Two per tap and result."""
    batch, height, width, channels = out_shape
    return 2 * batch * height * width * channels * weight[-1] ** 2


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, *settings: Any) -> Tensor:
    check(x, weight, bias, stride, *settings)
    return x.new_empty(_out_shape(x, stride))


def _fake_epilogue_backward(grad: Tensor, x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    gate = arguments[-1]
    return x.new_empty(grad.shape), x.new_empty(0) if gate is None else gate.new_empty(grad.shape)


def _fake_backward(
    grad: Tensor, x: Tensor, weight: Tensor, has_bias: bool, stride: int, dilation: int, residual: bool
) -> tuple[Tensor, Tensor, Tensor]:
    contiguous = torch.contiguous_format
    return (
        torch.empty_like(x, memory_format=contiguous),
        torch.empty_like(weight, memory_format=contiguous),
        weight.new_empty(weight.shape[0] if has_bias else 0),
    )


def _flops_epilogue_backward(grad: Any, x: Any, weight: Any, *_: Any, **__: Any) -> int:
    """The convolution again."""
    return flops(x, weight, out_shape=grad)


def _flops_backward(grad: Any, x: Any, weight: Any, *_: Any, **__: Any) -> int:
    return 2 * flops(x, weight, out_shape=grad)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weight, bias, *ctx.settings, gate = inputs
    ctx.save_for_backward(x, weight, bias, gate)


def _backward(ctx: Any, grad: Tensor) -> tuple:
    x, weight, bias, gate = ctx.saved_tensors
    *convolution, activation = ctx.settings
    grad_gate = None
    if gate is not None or activation != "none":
        grad, grad_gate = torch.ops.zoo.depthwise_conv2d_epilogue_backward(grad, x, weight, bias, *ctx.settings, gate)
    grads = torch.ops.zoo.depthwise_conv2d_backward(grad, x, weight, bias is not None, *convolution)
    grad_bias = None if bias is None else grads[2].to(bias.dtype)
    return grads[0], grads[1], grad_bias, None, None, None, None, None if gate is None else grad_gate


_CONVOLUTION = "int stride, int dilation, bool residual"
_ARGUMENTS = f"Tensor x, Tensor weight, Tensor? bias, {_CONVOLUTION}, str activation, Tensor? gate"
register_op(f"{NAME}({_ARGUMENTS}) -> Tensor", compute, _fake, flops, _backward, _setup_context)
register_op(
    f"{NAME}_epilogue_backward(Tensor grad, {_ARGUMENTS}) -> (Tensor, Tensor)",
    compute_epilogue_backward,
    _fake_epilogue_backward,
    _flops_epilogue_backward,
)
register_op(
    f"{NAME}_backward(Tensor grad, Tensor x, Tensor weight, bool has_bias, {_CONVOLUTION}) -> (Tensor, Tensor, Tensor)",
    compute_backward,
    _fake_backward,
    _flops_backward,
)
