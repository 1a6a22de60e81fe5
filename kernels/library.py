"""Registration of the operators with PyTorch, so that autograd, ``torch.compile`` and ``torch.export`` see ONE op."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

NAMESPACE = "zoo"
_library = torch.library.Library(NAMESPACE, "FRAGMENT")


def register_op(signature: str, compute: Callable, fake: Callable, flops: Callable[..., int]) -> str:
    """Define ``zoo::<signature>``.

    Args:
        signature: name and schema, such as ``"double(Tensor x) -> Tensor"``.
        compute: the computation, on any device, without autocast; its first argument is a tensor.
        fake: shapes and dtypes of the results, without data.
        flops: floating-point operations, from the shapes of the tensors and the other arguments.

    Returns:
        The qualified name.
    """
    name = signature.partition("(")[0]

    def without_autocast(first: Tensor, *rest: Any) -> Any:
        """An operator's dtypes are those of its inputs; autocast has had its say before them."""
        with torch.autocast(first.device.type, enabled=False):
            return compute(first, *rest)

    _library.define(signature, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, without_autocast, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake)
    register_flop_formula(getattr(torch.ops.zoo, name))(flops)
    return f"{NAMESPACE}::{name}"


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
