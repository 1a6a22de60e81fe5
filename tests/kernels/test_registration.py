"""What holds for every operator registered with PyTorch, those of the backward passes too."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from zoo.kernels import (
    bidirectional_gated_linear_attention,
    depthwise_conv2d,
    gated_linear_attention,
    large_kernel_attention,
    linear_attention,
)

NAMES = sorted(name for name in torch._C._dispatch_get_all_op_names() if name.startswith("zoo::"))


class Calls(TorchDispatchMode):
    """Keeps the arguments of the last call of each operator of the zoo."""

    def __init__(self):
        super().__init__()
        self.found = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "zoo":
            detached = [x.detach() if isinstance(x, torch.Tensor) else x for x in args]
            self.found[function.name()] = (function, detached)
        return function(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def calls():
    """Forward and backward passes of every public function, with all that is optional."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator).requires_grad_()

    def decays():
        return (-torch.rand(1, 6, 2, 4, generator=generator)).requires_grad_()

    q, k, v, local, gate = (random(1, 6, 2, 4) for _ in range(5))
    x, w3, w5, mix, bias = random(1, 5, 6, 4), random(4, 1, 3, 3), random(4, 1, 5, 5), random(4, 4), random(4)
    mode = Calls()
    with mode:
        results = [
            linear_attention(q, k, v, "elu+1", True, (2, 3), local=local, gate=gate),
            depthwise_conv2d(x, w3, bias, residual=True, activation="gelu", gate=random(1, 5, 6, 4)),
            large_kernel_attention(x, w5, bias, w3, bias, mix, bias, 3),
            *gated_linear_attention(q, k, v, decays(), random(1, 2, 4, 4)),
            bidirectional_gated_linear_attention(q, k, v, decays(), decays()),
        ]
        sum(result.square().sum() for result in results).backward()
    return mode.found


def test_the_calls_reach_every_operator(calls):
    assert len(NAMES) >= 10 and sorted(calls) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(calls, name):
    function, arguments = calls[name]
    torch.library.opcheck(function, arguments)
    has_gradient = torch._C._dispatch_has_kernel_for_dispatch_key(name, "Autograd")
    assert has_gradient != ("backward" in name)
    if has_gradient:
        leaves = [x.requires_grad_() if isinstance(x, torch.Tensor) else x for x in arguments]
        torch.library.opcheck(function, leaves)


@pytest.mark.parametrize("name", NAMES)
def test_flops_are_registered(name):
    """The formulas themselves are checked in the operators' own tests."""
    assert getattr(torch.ops.zoo, name.removeprefix("zoo::")) in flop_registry


def test_a_call_without_gradients_builds_no_graph(calls):
    function, arguments = calls["zoo::linear_attention"]
    leaves = [x.detach().requires_grad_() if isinstance(x, torch.Tensor) else x for x in arguments]
    assert function(*leaves)[0].grad_fn is not None
    with torch.no_grad():
        assert function(*leaves)[0].grad_fn is None
    assert function(*(x.detach() if isinstance(x, torch.Tensor) else x for x in leaves))[0].grad_fn is None


def test_a_second_derivative_is_refused():
    q, k, v = (torch.randn(1, 6, 2, 4, generator=torch.Generator().manual_seed(0)).requires_grad_() for _ in range(3))
    (grad,) = torch.autograd.grad(linear_attention(q, k, v).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()
