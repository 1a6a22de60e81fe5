"""Large kernel attention as one PyTorch operator, ``zoo::large_kernel_attention``."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zoo.kernels.dispatch import planned, select_backend, triton_backend
from zoo.kernels.large_kernel_attention import torch_backend
from zoo.kernels.library import check_float, check_shape, register_op

NAME = "large_kernel_attention"


def large_kernel_attention(
    x: Tensor,
    local_weight: Tensor,
    local_bias: Tensor | None,
    dilated_weight: Tensor,
    dilated_bias: Tensor | None,
    mix_weight: Tensor,
    mix_bias: Tensor | None,
    dilation: int = 3,
) -> Tensor:
    """``x * mix(dilated(local(x)))`` over channels-last tokens; the formula is in ``reference.py``.

    Args:
        x: (B, H, W, C), any strides, any floating-point dtype. Sums are kept in float32 or better.
        local_weight: (C, 1, K, K), K odd, of the first depthwise convolution.
        local_bias: (C,).
        dilated_weight: (C, 1, L, L), L odd, of the second.
        dilated_bias: (C,).
        mix_weight: (C, C), output channels first, of the 1x1 convolution.
        mix_bias: (C,).
        dilation: of the second convolution.

    Returns:
        (B, H, W, C), contiguous, in the dtype of x.

    Raises:
        ValueError: an argument has another shape, dtype or value.
    """
    return torch.ops.zoo.large_kernel_attention(
        x, local_weight, local_bias, dilated_weight, dilated_bias, mix_weight, mix_bias, dilation
    )


def check(x: Tensor, *parameters: Any) -> None:
    """Raise a ValueError for arguments that the operator does not take."""
    names = ("local_weight", "local_bias", "dilated_weight", "dilated_bias", "mix_weight", "mix_bias")
    tensors = dict(zip(names, parameters[:6], strict=True))
    check_float(NAME, x=x, **tensors)
    if x.ndim != 4:
        raise ValueError(f"{NAME}: x has shape {tuple(x.shape)}, expected (B, H, W, C).")
    channels = x.shape[-1]
    for name in ("local_weight", "dilated_weight"):
        size = tensors[name].shape[-1]
        check_shape(NAME, name, tensors[name], (channels, 1, size, size), "(C, 1, K, K)")
        if size % 2 == 0:
            raise ValueError(f"{NAME}: {name} is {size} x {size}, expected an odd size.")
    check_shape(NAME, "mix_weight", tensors["mix_weight"], (channels, channels), "(C, C)")
    for name in ("local_bias", "dilated_bias", "mix_bias"):
        check_shape(NAME, name, tensors[name], (channels,), "(C,)")
    if parameters[6] < 1:
        raise ValueError(f"{NAME}: dilation is {parameters[6]}, expected at least 1.")


@planned
def compute(x: Tensor, *parameters: Any) -> Callable:
    """The forward pass on the backend for the device of x."""
    check(x, *parameters)
    return _fake if x.numel() == 0 else _backend(x, "forward")


@planned
def compute_backward(grad: Tensor, x: Tensor, *_: Any) -> Callable:
    """The backward pass on the backend for the device of x."""
    if grad.numel() == 0:
        return lambda *arguments: tuple(tensor.zero_() for tensor in _fake_backward(*arguments))
    return _backend(x, "backward")


def _backend(x: Tensor, function: str) -> Callable:
    backends = {"torch": getattr(torch_backend, function)}
    if x.dtype != torch.float64:
        backends["triton"] = triton_backend(
            "zoo.kernels.large_kernel_attention.triton", f"plan_{function}", backends["torch"]
        )
    return select_backend(NAME, backends, x.device)


def flops(x: Any, local_weight: Any, _: Any, dilated_weight: Any, *__: Any, **___: Any) -> int:
    """Two per tap of either convolution, two per weight of the 1x1 convolution, for every result."""
    return 2 * math.prod(x) * (local_weight[-1] ** 2 + dilated_weight[-1] ** 2 + x[-1])


def _fake(x: Tensor, *parameters: Any) -> Tensor:
    check(x, *parameters)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _fake_backward(grad: Tensor, x: Tensor, *parameters: Any) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(0) if t is None else t.new_empty(t.shape) for t in (x, *parameters[:6]))


def _flops_backward(grad: Any, *inputs: Any, **__: Any) -> int:
    """The forward pass again, and two products for each of its."""
    return 3 * flops(*inputs)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.dilation = inputs[7]
    ctx.save_for_backward(*inputs[:7])


def _backward(ctx: Any, grad: Tensor) -> tuple:
    tensors = ctx.saved_tensors
    grads = torch.ops.zoo.large_kernel_attention_backward(grad, *tensors, ctx.dilation)
    return *(None if x is None else d for x, d in zip(tensors, grads, strict=True)), None


_ARGUMENTS = (
    "Tensor x, Tensor local_weight, Tensor? local_bias, Tensor dilated_weight, Tensor? dilated_bias, "
    "Tensor mix_weight, Tensor? mix_bias, int dilation"
)
register_op(f"{NAME}({_ARGUMENTS}) -> Tensor", compute, _fake, flops, _backward, _setup_context)
register_op(
    f"{NAME}_backward(Tensor grad, {_ARGUMENTS}) -> ({', '.join(['Tensor'] * 7)})",
    compute_backward,
    _fake_backward,
    _flops_backward,
)
