"""The depthwise convolution: the operator against its definition, values and gradients, and how it is registered."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from zoo.kernels import depthwise_conv2d
from zoo.kernels.depthwise_conv.reference import depthwise_conv2d_reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# kernel size, stride, dilation, residual
SETTINGS = [
    (3, 1, 1, False),
    (3, 1, 1, True),
    (3, 2, 1, False),
    (5, 1, 1, False),
    (5, 2, 1, False),
    (7, 1, 3, False),
    (7, 2, 3, False),
    (7, 1, 1, True),
    (11, 1, 1, False),
    (21, 1, 1, False),
    (1, 1, 2, False),
]


def inputs(B=2, H=9, W=10, C=6, K=3, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (B, H, W, C), (C, 1, K, K), (C,)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


@pytest.mark.parametrize(("K", "stride", "dilation", "residual"), SETTINGS)
def test_the_definition_is_that_of_pytorch(K, stride, dilation, residual):
    x, weight, bias = inputs(K=K, dtype=torch.float64)
    padding = dilation * (K // 2)
    expected = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, stride, padding, dilation, 6).permute(0, 2, 3, 1)
    expected = expected + x if residual else expected
    result = depthwise_conv2d_reference(x, weight, bias, stride, dilation, residual)
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize(("K", "stride", "dilation", "residual"), SETTINGS)
def test_values_and_gradients(K, stride, dilation, residual, with_bias, close, gradients):
    tensors = inputs(K=K)[: 3 if with_bias else 2]

    def run(function):
        return lambda x, weight, bias=None: function(x, weight, bias, stride, dilation, residual)

    y, grads = gradients(run(depthwise_conv2d), *tensors)
    exact_y, exact_grads = gradients(run(depthwise_conv2d_reference), *(x.double() for x in tensors))
    assert y.is_contiguous()
    close(y, exact_y)
    for grad, exact in zip(grads, exact_grads, strict=True):
        close(grad, exact)


EPILOGUES = [("gelu", False), ("gelu", True), ("silu", True), ("none", True)]


def gate_of(B=2, H=9, W=10, C=6, dtype=torch.float32):
    """Not contiguous."""
    generator = torch.Generator().manual_seed(3)
    return torch.randn(B, H, W, 2 * C, generator=generator, dtype=torch.float64).to(dtype)[..., C:]


@pytest.mark.parametrize(("activation", "gated"), EPILOGUES)
def test_the_order_of_the_definition_is_bias_residual_activation_gate(activation, gated):
    x, weight, bias = inputs(dtype=torch.float64)
    gate = gate_of(dtype=torch.float64) if gated else None
    expected = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, 1, 1, 1, 6).permute(0, 2, 3, 1) + x
    expected = {"none": lambda y: y, "gelu": F.gelu, "silu": F.silu}[activation](expected)
    expected = expected * gate if gated else expected
    result = depthwise_conv2d_reference(x, weight, bias, 1, 1, True, activation, gate)
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("K", "stride", "dilation", "residual"), [(3, 1, 1, True), (3, 2, 1, False), (7, 1, 3, False)])
@pytest.mark.parametrize(("activation", "gated"), EPILOGUES)
def test_activation_and_gate(activation, gated, K, stride, dilation, residual, dtype, close, gradients):
    tensors = inputs(K=K, dtype=dtype)
    if gated:
        tensors.append(gate_of(H=-(-9 // stride), W=-(-10 // stride), dtype=dtype))

    def run(function):
        def of(x, weight, bias, gate=None):
            y = function(x, weight, bias, stride, dilation, residual, activation, gate)
            return y.to(dtype)  # so that the cotangents are the same numbers

        return of

    y, grads = gradients(run(depthwise_conv2d), *tensors)
    exact_y, exact_grads = gradients(run(depthwise_conv2d_reference), *(x.double() for x in tensors))
    assert y.is_contiguous() and y.dtype == dtype
    close(y, exact_y)
    for grad, exact, tensor in zip(grads, exact_grads, tensors, strict=True):
        assert grad.dtype == tensor.dtype
        close(grad, exact)


@pytest.mark.parametrize(("activation", "gated"), EPILOGUES)
def test_gradcheck_of_activation_and_gate(activation, gated):
    tensors = inputs(B=1, H=4, W=5, C=2, dtype=torch.float64)
    tensors += [gate_of(B=1, H=4, W=5, C=2, dtype=torch.float64)] if gated else []
    leaves = [x.requires_grad_() for x in tensors]
    assert torch.autograd.gradcheck(
        lambda x, w, b, gate=None: depthwise_conv2d(x, w, b, 1, 1, True, activation, gate), leaves
    )


def test_a_gate_of_another_dtype_and_without_a_gradient(close):
    """The result has the dtype of x; a float32 gate is not rounded before it multiplies."""
    x, weight, bias = (t.requires_grad_() for t in inputs(dtype=torch.bfloat16))
    gate = gate_of()
    y = depthwise_conv2d(x, weight, bias, activation="silu", gate=gate)
    assert y.dtype == torch.bfloat16 and y.is_contiguous()
    exact = depthwise_conv2d_reference(*(t.double() for t in (x, weight, bias)), activation="silu", gate=gate.double())
    close(y, exact.detach())
    (grad,) = torch.autograd.grad(y.float().sum(), x)
    (exact_grad,) = torch.autograd.grad(exact.sum(), x)
    close(grad, exact_grad)


def test_a_gate_of_a_finer_dtype(close, gradients):
    tensors = (*inputs(), gate_of().double())

    def run(function):
        return lambda x, weight, bias, gate: function(x, weight, bias, activation="gelu", gate=gate)

    y, grads = gradients(run(depthwise_conv2d), *tensors)
    exact_y, exact_grads = gradients(run(depthwise_conv2d_reference), *(x.double() for x in tensors))
    close(y, exact_y)
    for grad, exact in zip(grads[:3], exact_grads, strict=False):
        close(grad, exact)
    close(grads[3].float(), exact_grads[3])


@pytest.mark.parametrize(("K", "stride", "dilation", "residual"), [(3, 1, 1, True), (3, 2, 1, False), (5, 1, 3, False)])
def test_gradcheck(K, stride, dilation, residual):
    leaves = [x.requires_grad_() for x in inputs(B=1, H=4, W=5, C=2, K=K, dtype=torch.float64)]
    assert torch.autograd.gradcheck(lambda *x: depthwise_conv2d(*x, stride, dilation, residual), leaves)


@given(
    B=st.integers(1, 3),
    H=st.integers(1, 20),
    W=st.integers(1, 20),
    C=st.sampled_from([1, 2, 7, 16, 33]),
    K=st.sampled_from([1, 3, 5, 7]),
    stride=st.sampled_from([1, 2]),
    dilation=st.integers(1, 4),
    dtype=st.sampled_from(DTYPES),
)
@settings(max_examples=60, deadline=None)
def test_any_shape(B, H, W, C, K, stride, dilation, dtype):
    tensors = inputs(B, H, W, C, K, dtype)
    result = depthwise_conv2d(*tensors, stride, dilation)
    exact = depthwise_conv2d_reference(*(x.double() for x in tensors), stride, dilation)
    assert result.shape == (B, -(-H // stride), -(-W // stride), C) and result.dtype == dtype
    error = (result.double() - exact).norm() / exact.norm()
    assert error < (1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("dilation", [1, 3])
def test_strided_views(dilation, close):
    """The value map inside a wider projection, and a map cut out of a larger one."""
    _, weight, bias = inputs(C=6, K=5)
    wide = torch.randn(2, 12, 13, 24)
    for x in (wide[..., 12:18], wide[:, 1:-1, 2:-1, :6], wide[..., :6].transpose(1, 2), wide[:, ::2, ::3, :6]):
        exact = depthwise_conv2d_reference(x.double(), weight.double(), bias.double(), 1, dilation)
        close(depthwise_conv2d(x, weight, bias, 1, dilation), exact)


def test_half_precision_input_with_float32_weights():
    """As under autocast: the result has the dtype of the input, the gradients those of the parameters."""
    x, weight, bias = (t.requires_grad_() for t in inputs())
    y = depthwise_conv2d(x.bfloat16(), weight, bias)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert weight.grad.dtype == bias.grad.dtype == torch.float32
    exact = depthwise_conv2d_reference(x.detach().double(), weight.detach().double(), bias.detach().double())
    assert ((y.double() - exact).norm() / exact.norm()).item() < 1e-2
    torch.testing.assert_close(bias.grad, 2 * exact.sum((0, 1, 2)).float(), rtol=0.02, atol=0.5)


def test_no_pictures():
    x, weight, bias = (t.requires_grad_() for t in inputs(B=0))
    gate = torch.zeros(0, 5, 5, 6).requires_grad_()
    y = depthwise_conv2d(x, weight, bias, 2, activation="gelu", gate=gate)
    assert y.shape == (0, 5, 5, 6)
    y.sum().backward()
    assert x.grad.shape == x.shape and gate.grad.shape == gate.shape
    assert not weight.grad.any() and not bias.grad.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 9, 10, 6, dtype=torch.int64)}, "x is torch.int64"),
        ({"x": torch.zeros(9, 10, 6)}, r"x has shape \(9, 10, 6\), expected \(B, H, W, C\)"),
        ({"weight": torch.zeros(5, 1, 3, 3)}, r"weight has shape \(5, 1, 3, 3\), expected \(C, 1, K, K\)"),
        ({"weight": torch.zeros(6, 1, 3, 5)}, r"weight has shape"),
        ({"weight": torch.zeros(6, 1, 4, 4)}, "kernel is 4 x 4, expected an odd size"),
        ({"bias": torch.zeros(5)}, r"bias has shape \(5,\)"),
        ({"stride": 3}, "stride is 3"),
        ({"dilation": 0}, "dilation 0"),
        ({"stride": 2, "residual": True}, "residual needs stride 1"),
        ({"activation": "relu"}, "activation is 'relu', expected one of none, gelu, silu"),
        ({"gate": torch.zeros(2, 9, 10, 1)}, r"gate has shape \(2, 9, 10, 1\), expected \(B, ceil"),
        ({"gate": torch.zeros(2, 9, 10, 6), "stride": 2}, "gate has shape"),
    ],
)
def test_wrong_arguments(change, message):
    x, weight, bias = inputs()
    with pytest.raises(ValueError, match=message):
        depthwise_conv2d(**{"x": x, "weight": weight, "bias": bias, **change})


@pytest.mark.parametrize(("activation", "gated"), [("none", False), *EPILOGUES])
def test_opcheck(activation, gated):
    x, weight, bias = (t.requires_grad_() for t in inputs())
    gate = gate_of().requires_grad_() if gated else None
    arguments = (x, weight, None if gated else bias, 1, 3, True, activation, gate)
    torch.library.opcheck(torch.ops.zoo.depthwise_conv2d.default, arguments)
    arguments = [argument.detach() if isinstance(argument, torch.Tensor) else argument for argument in arguments]
    torch.library.opcheck(torch.ops.zoo.depthwise_conv2d_epilogue_backward.default, (gate_of(), *arguments))
    arguments = (gate_of(), x.detach(), weight.detach(), not gated, 1, 3, True)
    torch.library.opcheck(torch.ops.zoo.depthwise_conv2d_backward.default, arguments)


def test_flops_equal_the_hand_formula():
    x, weight, bias = (t.requires_grad_() for t in inputs(K=5))
    with FlopCounterMode(display=False) as counter:
        y = depthwise_conv2d(x, weight, bias, 2)
    assert counter.get_total_flops() == 2 * (2 * 5 * 5 * 6) * 25
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 4 * (2 * 5 * 5 * 6) * 25


def test_an_activation_costs_the_convolution_once_more_in_the_backward_pass():
    x, weight, bias = (t.requires_grad_() for t in inputs(K=5))
    with FlopCounterMode(display=False) as counter:
        depthwise_conv2d(x, weight, bias, activation="gelu").sum().backward()
    assert counter.get_total_flops() == 4 * 2 * (2 * 9 * 10 * 6) * 25
