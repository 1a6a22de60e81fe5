"""Large kernel attention: the operator against its definition, values and gradients, and how it is registered."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from zoo.kernels import large_kernel_attention
from zoo.kernels.large_kernel_attention.reference import large_kernel_attention_reference

NAMES = ("x", "local_weight", "local_bias", "dilated_weight", "dilated_bias", "mix_weight", "mix_bias")


def inputs(B=2, H=8, W=7, C=6, K=5, L=7, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = ((B, H, W, C), (C, 1, K, K), (C,), (C, 1, L, L), (C,), (C, C), (C,))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def test_the_receptive_field_is_21_tokens():
    """A 5x5 and a 7x7 convolution of dilation 3 reach 2 + 9 tokens to each side and no further."""
    x, *parameters = inputs(B=1, H=31, W=31, C=1, dtype=torch.float64)
    moved = x.clone()
    moved[0, 15, 15] += 1.0
    changed = (large_kernel_attention(x, *parameters) != large_kernel_attention(moved, *parameters))[0, :, :, 0]
    rows, columns = changed.nonzero(as_tuple=True)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (4, 26, 4, 26)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(2, 8, 7, 6), (1, 1, 1, 3), (3, 5, 20, 16)])
def test_values_and_gradients(shape, dtype, close, gradients):
    tensors = inputs(*shape, dtype=dtype)
    y, grads = gradients(large_kernel_attention, *tensors)
    exact_y, exact_grads = gradients(large_kernel_attention_reference, *(x.double() for x in tensors))
    assert y.dtype == dtype and y.is_contiguous()
    close(y, exact_y)
    for name, grad, exact in zip(NAMES, grads, exact_grads, strict=True):
        assert grad.dtype == dtype, name
        # Each half-precision stage rounds what it puts out; three of them add up.
        close(grad, exact, 1.0 if dtype == torch.float32 else 2.0)


def test_gradcheck():
    leaves = [x.requires_grad_() for x in inputs(B=1, H=3, W=4, C=2, K=3, L=3, dtype=torch.float64)]
    assert torch.autograd.gradcheck(large_kernel_attention, leaves)


def test_without_biases(close, gradients):
    chosen = [x for name, x in zip(NAMES, inputs(), strict=True) if "bias" not in name]

    def run(function):
        return lambda x, local, dilated, mix: function(x, local, None, dilated, None, mix, None)

    y, grads = gradients(run(large_kernel_attention), *chosen)
    exact_y, exact_grads = gradients(run(large_kernel_attention_reference), *(x.double() for x in chosen))
    close(y, exact_y)
    for grad, exact in zip(grads, exact_grads, strict=True):
        close(grad, exact)


def test_no_pictures():
    leaves = [x.requires_grad_() for x in inputs(B=0)]
    y = large_kernel_attention(*leaves)
    assert y.shape == leaves[0].shape
    y.sum().backward()
    assert all(x.grad.shape == x.shape and not x.grad.any() for x in leaves)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 8, 7, 6, dtype=torch.uint8)}, "x is torch.uint8"),
        ({"x": torch.zeros(8, 7, 6)}, r"expected \(B, H, W, C\)"),
        ({"local_weight": torch.zeros(6, 6, 5, 5)}, "local_weight has shape"),
        ({"dilated_weight": torch.zeros(6, 1, 6, 6)}, "dilated_weight is 6 x 6, expected an odd size"),
        ({"mix_weight": torch.zeros(6, 6, 1, 1)}, r"mix_weight has shape \(6, 6, 1, 1\), expected \(C, C\)"),
        ({"mix_bias": torch.zeros(1)}, "mix_bias has shape"),
        ({"dilation": 0}, "dilation is 0"),
    ],
)
def test_wrong_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        large_kernel_attention(**{**dict(zip(NAMES, inputs(), strict=True)), **change})


def test_opcheck():
    leaves = [x.requires_grad_() for x in inputs()]
    torch.library.opcheck(torch.ops.zoo.large_kernel_attention.default, (*leaves, 3))
    tensors = [x.detach() for x in leaves]
    grad = torch.randn(tensors[0].shape)
    torch.library.opcheck(torch.ops.zoo.large_kernel_attention_backward.default, (grad, *tensors, 3))


def test_flops_equal_the_hand_formula():
    leaves = [x.requires_grad_() for x in inputs()]
    with FlopCounterMode(display=False) as counter:
        y = large_kernel_attention(*leaves)
    forward = 2 * (2 * 8 * 7 * 6) * (25 + 49 + 6)
    assert counter.get_total_flops() == forward
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 3 * forward
