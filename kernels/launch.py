"""Launches of Triton kernels that cost the host little."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from triton.runtime import driver


class Launch:
    """A kernel with all of its arguments but the tensors.

    Triton looks at each argument of each call to find what it has compiled: 15 microseconds for 25 arguments. Here the
    first launch does that, and later ones go straight to Triton's launcher, in 3. So the tensors of all launches must
    be alike, as the arguments of a plan are (``dispatch.planned``) and new tensors, which PyTorch aligns. Hooks on
    launches, which Triton's own profiler sets, see the first only.

    Args:
        kernel: whose parameters are tensors, then numbers, then constants.
        grid: programs, along up to three axes.
        numbers: between the tensors and the constants, in the order of the parameters.
        constants: by name, with options such as ``num_warps``.
        device: of the tensors.
        strided: how many tensors, the first ones, have all strides but their last before the numbers.
        unit: what these strides are divided by.
    """

    def __init__(
        self,
        kernel: Any,
        grid: Sequence[int],
        numbers: Sequence[float],
        constants: Mapping[str, Any],
        device: torch.device,
        strided: int = 0,
        unit: int = 1,
    ) -> None:
        self.kernel, self.numbers, self.constants, self.index = kernel, numbers, constants, device.index
        self.grid, self.strided, self.unit = (*grid, 1, 1)[:3], strided, unit
        self.run = None

    def __call__(self, *tensors: Tensor) -> None:
        """Launch on the current stream of the current device, which has the tensors."""
        if self.run is None:
            self._launch_through_triton(tensors)
        else:
            self.run(*self.grid, self.stream(self.index), *self.how, *tensors, *self.others)

    def _launch_through_triton(self, tensors: Sequence[Tensor]) -> None:
        strides = [step // self.unit for x in tensors[: self.strided] for step in x.stride()[:-1]]
        numbers = (*strides, *self.numbers)
        self.compiled = self.kernel[self.grid](*tensors, *numbers, **self.constants)
        if self.compiled is not None:  # as it is in Triton's interpreter
            names = self.kernel.arg_names[len(tensors) + len(numbers) :]
            self.others = (*numbers, *(self.constants[name] for name in names))
            hooks = None, None, None
            self.how = self.compiled.function, self.compiled.packed_metadata, *hooks
            self.stream = driver.active.get_current_stream
            self.run = self.compiled.run  # last: another thread may look


def with_unit_channels(plan: Callable[..., Callable]) -> Callable[..., Callable]:
    """Plans for tensors whose neighbouring channels are neighbours in memory, as the kernels need: others are copied.

    Args:
        plan: from arguments to a function of arguments like them.
    """

    def plan_any(*arguments: Any) -> Callable:
        copied = [unit_channels(x) for x in arguments]
        run = plan(*copied)
        if all(x is y for x, y in zip(arguments, copied, strict=True)):
            return run
        return lambda *arguments: run(*map(unit_channels, arguments))

    return plan_any


def unit_channels(x: Any) -> Any:
    """The argument, or if it is a tensor without unit channels, a copy that has them."""
    return x.contiguous() if isinstance(x, Tensor) and x.ndim and x.stride(-1) != 1 else x
