"""Operators over split rows: on every rank what one rank has of the whole map, values and gradients.

The loss of each rank is a product of its part with a cotangent, so that the sum of all losses is that of the whole.
"""

import importlib
import os
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent))
import ranks
from ranks import error
from torch import distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from zoo.kernels import depthwise_conv2d, large_kernel_attention
from zoo.kernels import linear_attention as whole_linear_attention
from zoo.kernels.distributed import Strips, gather, linear_attention, softmax_attention, strided, with_halo
from zoo.kernels.linear_attention.reference import linear_attention_reference

ring = importlib.import_module("zoo.kernels.distributed.softmax_attention")  # the package has a function of that name


class Collectives(TorchDispatchMode):
    """Counts them, and the numbers that this rank puts in."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            self.sizes.append(args[1].numel())
        return func(*args, **(kwargs or {}))


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def compare(group, run_split, run_whole, tensors, parameters, cut, cut_out=None):
    """Relative errors of a result and all gradients; the collectives forward and backward.

    Args:
        tensors: whole, of which each rank gets what ``cut`` leaves.
        parameters: every rank's, whose gradients are parts of a sum.
        cut_out: of the result, where it has other rows.
    """
    cut_out = cut_out or cut
    leaves = [x.clone().requires_grad_() for x in (*tensors, *parameters)]
    y = run_whole(*leaves)
    cotangent = random(*y.shape, seed=9)
    exact = torch.autograd.grad(y, leaves, cotangent)
    count = len(tensors)
    own = [x.float().detach().requires_grad_() for x in (*map(cut, tensors), *parameters)]
    with Collectives() as forward:
        part = run_split(*own)
    with Collectives() as backward:
        grads = torch.autograd.grad(part, own, cut_out(cotangent).float())
    grads = [*grads[:count], *(gather(grad, group).sum(0) for grad in grads[count:])]
    exact = [*map(cut, exact[:count]), *exact[count:]]
    errors = [error(a, b) for a, b in zip((part, *grads), (cut_out(y), *exact), strict=True)]
    return {"errors": errors, "forward": forward.sizes, "backward": backward.sizes}


def rows_of(strips):
    return lambda x: x[:, strips.start : strips.start + strips.height]


def halo(function, reach, heights, *shapes):
    """A case: a function of a map of 5 columns and 4 channels, and of parameters."""

    def case(group):
        strips = Strips.of(heights, group)

        def split(x, *parameters):
            return with_halo(lambda rows: function(rows, *parameters), x, reach, strips)

        parameters = [random(*shape, seed=i) for i, shape in enumerate(shapes)]
        cut = rows_of(strips)
        return compare(group, split, function, [random(2, sum(heights), 5, 4)], parameters, cut)

    return len(heights), case


def convolution(size, stride, padding, heights):
    def case(group):
        strips = Strips.of(heights, group)

        def convolve(x, weight, padding):
            return F.conv2d(x.permute(0, 3, 1, 2), weight, stride=stride, padding=(padding, padding)).permute(
                0, 2, 3, 1
            )

        def split(x, weight):
            x = F.pad(x, (0, 0, padding, padding))
            return strided(lambda rows: convolve(rows, weight, 0), x, size, stride, padding, strips)

        def whole(x, weight):
            read = (-(-sum(heights) // stride) - 1) * stride + size - 2 * padding
            return convolve(F.pad(x, (0, 0, 0, 0, 0, max(read - sum(heights), 0))), weight, padding)

        tensors, weights = [random(2, sum(heights), 9, 3)], [random(6, 3, size, size)]
        return compare(group, split, whole, tensors, weights, rows_of(strips), rows_of(strips.reduced(stride)))

    return len(heights), case


def depthwise(x, weight, bias):
    return depthwise_conv2d(x, weight, bias, residual=True, activation="gelu")


KERNELS = ((4, 1, 5, 5), (4,), (4, 1, 7, 7), (4,), (4, 4), (4,))
HEIGHTS = {"uneven": (7, 4), "three": (3, 9, 2), "tiny": (1, 1, 1), "gap": (6, 0, 5), "late": (0, 4), "one": (6,)}
FORMS = {
    "ravlt": {"token_weights": True, "grid": True},
    "division": {"feature_map": "relu", "grid": True, "rotary_across_heads": True},
    "inline": {"feature_map": "identity", "normalisation": "subtraction", "scale": 0.5},
    "lightnet": {"feature_map": "silu", "normalisation": "keys", "grid": True, "rotary_across_heads": True},
    "keys": {"feature_map": "silu", "normalisation": "keys"},
    "weights": {"feature_map": "exp", "token_weights": True},
}


def attention(form, heights, terms=True, width=3, dim=8):
    """A case: linear attention of a map whose columns are as many as ``width``."""
    options = dict(FORMS[form])
    rotated = options.pop("grid", False)

    def case(group):
        strips = Strips.of(heights, group)
        tokens = [width * height for height in heights]
        start = width * strips.start

        def run(function, height, *before):
            grid = (height, width) if rotated else None

            def call(q, k, v, *terms):
                local_and_gate = dict(zip(("local", "gate"), terms))
                return function(q, k, v, *before, grid=grid, **local_and_gate, **options)

            return call

        count = 5 if terms else 3
        tensors = [random(2, sum(tokens), 2, dim, seed=i) for i in range(count)]
        split, whole = (
            run(linear_attention, strips.height, group, tokens),
            run(linear_attention_reference, sum(heights)),
        )
        return compare(group, split, whole, tensors, [], lambda x: x[:, start : start + tokens[strips.rank]])

    return len(heights), case


def softmax(tokens):
    def case(group):
        start = sum(tokens[: dist.get_rank(group)])
        stop = start + tokens[dist.get_rank(group)]
        tensors = [random(2, 2, sum(tokens), 8, seed=i) for i in range(3)]

        def split(q, k, v):
            return softmax_attention(q, k, v, group, tokens)

        return compare(group, split, F.scaled_dot_product_attention, tensors, [], lambda x: x[:, :, start:stop])

    return len(tokens), case


def bad_calls(group):
    q = torch.zeros(1, 6, 2, 8)
    messages = []
    calls = (
        lambda: linear_attention(q, q, q, group, [6, 6], normalisation="subtraction", token_weights=True),
        lambda: linear_attention(q, q, q, group, [6, 6], grid=(4, 2)),
        lambda: linear_attention(q, q, q, group, [5, 5]),
        lambda: softmax_attention(q, q, q, group, [5, 5]),
        lambda: with_halo(depthwise_conv2d, q, 1, Strips.of((5, 5), group)),
    )
    for call in calls:
        with pytest.raises(ValueError) as caught:
            call()
        messages.append(str(caught.value))
    return messages


def under_autocast(group):
    """Sums are kept in float32 there too."""
    q, k, v = (random(1, 12, 2, 8, seed=i).bfloat16() for i in range(3))
    part = slice(6 * dist.get_rank(group), 6 * dist.get_rank(group) + 6)
    with torch.autocast("cpu", torch.bfloat16):
        y = linear_attention(q[:, part], k[:, part], v[:, part], group, [6, 6])
    return error(y.float(), whole_linear_attention(q, k, v)[:, part].float())


CASES = {f"attention {form} {name}": attention(form, HEIGHTS[name]) for form in FORMS for name in HEIGHTS}
TRITON_CASES = {f"attention {form} gap": attention(form, (2, 0, 3)) for form in FORMS}
CASES |= {f"depthwise {name}": halo(depthwise, 2, HEIGHTS[name], (4, 1, 5, 5), (4,)) for name in HEIGHTS}
CASES |= {f"large {name}": halo(large_kernel_attention, 11, HEIGHTS[name], *KERNELS) for name in HEIGHTS}
CASES["large of two"] = halo(large_kernel_attention, 11, (30, 25), *KERNELS)
CASES |= {
    f"conv {size} {stride} {name}": convolution(size, stride, padding, HEIGHTS[name])
    for size, stride, padding in ((3, 2, 1), (7, 4, 3), (4, 4, 0))
    for name in HEIGHTS
}
CASES |= {f"softmax {name}": softmax(HEIGHTS[name]) for name in HEIGHTS}
CASES |= {f"wide {width}": attention("ravlt", (4, 3), width=width) for width in (3, 12)}
CASES |= {"bad calls": (2, bad_calls), "autocast": (2, under_autocast)}


@pytest.fixture(scope="module")
def found():
    return ranks.results(__file__)


@pytest.fixture(scope="module")
def found_on_triton():
    """Triton decides at import whether it interprets; it does, because the ranks' tensors are on the CPU."""
    pytest.importorskip("triton")
    return ranks.results(__file__, {"ZOO_KERNELS": "triton", "TRITON_INTERPRET": "1"})


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("bad calls", "autocast")])
def test_values_and_gradients(found, name):
    assert len(found[name]) == CASES[name][0]
    assert max(max(result["errors"]) for result in found[name]) < 1e-5


@pytest.mark.parametrize("name", TRITON_CASES)
def test_values_and_gradients_on_triton(found_on_triton, name):
    assert max(max(result["errors"]) for result in found_on_triton[name]) < 1e-5


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("on_triton", [False, True])
def test_linear_attention_takes_one_collective(found, found_on_triton, form, on_triton):
    """Token weights take another one, of D numbers for each head, in either direction."""
    weights = FORMS[form].get("token_weights", False)
    for result in (found_on_triton if on_triton else found)[f"attention {form} gap"]:
        for direction in ("forward", "backward"):
            assert len(result[direction]) == 1 + weights
        if weights:
            mean, state = sorted(result["forward"])
            assert mean == 3 * 2 * 2 * 8 and state < 3 * 2 * 2 * (8 * 8 + 2 * 8 + 32)  # of 3 ranks, 2 pictures, 2 heads


def test_states_do_not_grow_with_the_map(found):
    narrow, wide = (found[f"wide {width}"][0] for width in (3, 12))
    assert narrow["forward"] == wide["forward"] and narrow["backward"] == wide["backward"]


def test_halos_are_the_rows_that_are_missing(found):
    """Two rows of 5 tokens of 4 channels of 2 pictures, in both directions; nothing if one rank has all rows."""
    for result in found["depthwise uneven"]:
        assert result["forward"] == [2 * 2 * 5 * 4] == result["backward"]
    for result in found["depthwise late"]:
        assert result["forward"] == [] == result["backward"]


def test_a_ring_passes_keys_and_values_on(found):
    """The first rank of three sends its own 3 tokens, then the 2 of the rank before."""
    of_a_token = 2 * 2 * 2 * 8  # keys and values, pictures, heads, channels
    first = found["softmax three"][0]
    assert first["forward"] == [3 * of_a_token, 2 * of_a_token]
    assert len(first["backward"]) == 2 + 3  # the gradients of a block go one step further, back to where it came from


def test_what_is_said_of_bad_arguments(found):
    for rank, (weights, grid, tokens, shape, rows) in enumerate(found["bad calls"]):
        assert "token_weights of split tokens" in weights
        assert "grid is 4 x 2, but q has 6 tokens" in grid
        assert "q has 6 tokens, expected 5" in tokens
        assert "expected (B, H, tokens of this rank, D) = (1, 6, 5, 8)" in shape
        assert f"The strip of rank {rank} has 6 rows, expected 5." in rows


def test_autocast_does_not_reach_the_sums(found):
    assert max(found["autocast"]) < 4e-3  # half a unit in the last place of bfloat16


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_gradients_of_blocks_of_keys(device, dtype, tolerance):
    """The kernels take the logarithms of all blocks with the keys of one, and their gradients add up."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    tensors = [random(2, 3, tokens, 16, seed=i) for i, tokens in enumerate((21, 40, 40, 21))]
    *leaves, cotangent = tensors
    leaves = [x.requires_grad_() for x in leaves]
    y = F.scaled_dot_product_attention(*leaves)
    d_q, d_k, d_v = torch.autograd.grad(y, leaves, cotangent)
    q, k, v, grad = (x.detach().to(device, dtype) for x in (*leaves, cotangent))
    out, log_sum = ring._attend(q, k, v)
    parts = [ring._attend_backward(grad, q, k[:, :, s], v[:, :, s], out, log_sum) for s in (slice(25), slice(25, 40))]
    assert error(out.cpu(), y) < tolerance
    assert error(sum(part[0] for part in parts).cpu(), d_q) < tolerance
    for index, exact in ((1, d_k), (2, d_v)):
        assert error(torch.cat([part[index] for part in parts], 2).cpu(), exact) < tolerance


@pytest.mark.parametrize(("dtype", "dim"), [(torch.bfloat16, 32), (torch.float16, 20), (torch.float32, 32)])
def test_the_kernels_for_gpus_take_these_arguments(dtype, dim):
    with FakeTensorMode():
        q = torch.empty(2, 70, 4, dim, device="cuda", dtype=dtype).transpose(1, 2)
        k = torch.empty(2, 4, 50, dim, device="cuda", dtype=dtype)
        out, log_sum = ring._attend(q, k, k)
        assert out.shape == q.shape and log_sum.shape == q.shape[:3]
        grads = ring._attend_backward(out, q, k, k, out, log_sum)
        assert [grad.shape for grad in grads] == [q.shape, k.shape, k.shape]


if __name__ == "__main__":
    ranks.main(TRITON_CASES if os.environ.get("ZOO_KERNELS") == "triton" else CASES)
