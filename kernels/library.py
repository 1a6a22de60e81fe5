"""Registration of the operators with PyTorch, so that autograd, ``torch.compile`` and ``torch.export`` see ONE op."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

NAMESPACE = "zoo"
_library = torch.library.Library(NAMESPACE, "FRAGMENT")
_PLAIN = {torch._C.DispatchKeySet(key).raw_repr() for key in (torch._C.DispatchKey.CPU, torch._C.DispatchKey.CUDA)}


def register_op(
    signature: str,
    compute: Callable,
    fake: Callable,
    flops: Callable[..., int],
    backward: Callable | None = None,
    setup_context: Callable | None = None,
) -> None:
    """Define ``zoo::<signature>``.

    Args:
        signature: name and schema, such as ``"double(Tensor x) -> Tensor"``.
        compute: the computation, on any device, without autocast; its first argument is a tensor.
        fake: shapes and dtypes of the results, without data.
        flops: floating-point operations, from the shapes of the tensors and the other arguments.
        backward: from the context and the gradients of the results to those of all arguments, which are positional
            then; None for an operator without gradients. A second derivative is a RuntimeError.
        setup_context: keeps in the context what ``backward`` needs, from all arguments and the results.
    """
    name = signature.partition("(")[0]

    def without_autocast(first: Tensor, *rest: Any) -> Any:
        """An operator's dtypes are those of its inputs; autocast has had its say before them."""
        if not torch.is_autocast_enabled(first.device.type):  # to ask is cheaper than to switch off
            return compute(first, *rest)
        with torch.autocast(first.device.type, enabled=False):
            return compute(first, *rest)

    _library.define(signature, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, without_autocast, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake)
    op = getattr(torch.ops.zoo, name)
    register_flop_formula(op)(flops)
    if backward is not None:
        with_gradient = _with_gradient(op.default, without_autocast, backward, setup_context)
        _library.impl(name, with_gradient, "Autograd", with_keyset=True)


def _with_gradient(
    op: torch._ops.OpOverload, compute: Callable, backward: Callable, setup_context: Callable
) -> Callable:
    """As ``torch.library.register_autograd``, at a third of the cost of a call.

    That one looks the whole schema up in every call to fill in defaults: 35 microseconds for 13 arguments. And where
    the dispatcher has only the computation left to call, with plain tensors and no mode that wants to see them, going
    through it once more would cost 8.
    """
    defaults = [argument.default_value for argument in op._schema.arguments]
    after_autograd = torch._C._after_autograd_keyset

    def below_autograd(keyset: Any, inputs: Sequence[Any]) -> Any:
        keyset = keyset & after_autograd
        if keyset.raw_repr() in _PLAIN:
            return compute(*inputs)
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset, *inputs)

    class Gradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            *inputs, keyset = inputs
            output = below_autograd(keyset, inputs)
            setup_context(ctx, inputs, output)
            return output

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, *grads: Any) -> tuple:
            return *backward(ctx, *grads), None

    def with_gradient(keyset: Any, *inputs: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs):
            return Gradient.apply(*inputs, *defaults[len(inputs) :], keyset)  # the dispatcher left out the defaults
        return below_autograd(keyset, inputs)

    return with_gradient


def check_float(op: str, **tensors: Tensor | None) -> None:
    """Raise a ValueError that names the tensor which is not of a floating-point dtype the operators take."""
    allowed = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in allowed:
            raise ValueError(f"{op}: {name} is {tensor.dtype}, expected one of {', '.join(map(str, allowed))}.")


def check_shape(op: str, name: str, tensor: Tensor | None, expected: Sequence[Any], meaning: str) -> None:
    """Raise a ValueError unless a tensor is None or has the expected shape."""
    if tensor is not None and tuple(tensor.shape) != tuple(expected):
        raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}, expected {meaning} = {tuple(expected)}.")


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Where sums are kept: float32, or float64 for float64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32
