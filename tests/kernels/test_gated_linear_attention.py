"""Gated linear attention, in order and in both directions: the operators against their definitions."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from zoo.kernels import bidirectional_gated_linear_attention, gated_linear_attention
from zoo.kernels.gated_linear_attention.reference import (
    bidirectional_gated_linear_attention_reference,
    gated_linear_attention_reference,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def inputs(B=2, N=37, H=2, D=8, E=6, dtype=torch.float32, decay=1.0, seed=0):
    """Random q, k, v and two decays, as strided views of projections, and an initial state."""
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(B, N, H * (2 * D + E), generator=generator, dtype=torch.float64).to(dtype)
    q, k, v = (x.unflatten(-1, (H, -1)) for x in qkv.split((H * D, H * D, H * E), -1))
    decays = -decay * torch.rand(B, N, 2, H, D, generator=generator, dtype=torch.float64).to(dtype)
    state = torch.randn(B, H, E, D, generator=generator, dtype=torch.float64).to(dtype).mT
    return q, k, v, *decays.unbind(2), state


def joined(function):
    """A form of the operator as a function of (q, k, v, decay, decay in reverse, state) to one flat tensor."""

    def run(q, k, v, ahead, back, state):
        if "bidirectional" in function.__name__:
            return function(q, k, v, ahead, back).flatten()
        return torch.cat([x.flatten() for x in function(q, k, v, ahead, state)])

    return run


FORMS = {
    "causal": (joined(gated_linear_attention), joined(gated_linear_attention_reference), (0, 1, 2, 3, 5)),
    "both": (
        joined(bidirectional_gated_linear_attention),
        joined(bidirectional_gated_linear_attention_reference),
        (0, 1, 2, 3, 4),
    ),
}
form = pytest.mark.parametrize("form", FORMS)


def chosen(form, tensors, gradients, function):
    """Values of a form, and gradients of the tensors that it takes."""
    taken = FORMS[form][2]

    def run(*leaves):
        full = list(tensors)
        for i, leaf in zip(taken, leaves, strict=True):
            full[i] = leaf
        return function(*full)

    return gradients(run, *(tensors[i] for i in taken))


def test_the_definition_by_hand():
    """One channel: the sum over pairs of tokens, with the decays between them, written out in Python."""
    q, k, v, g = [0.5, -1.0, 2.0], [1.0, 3.0, -0.5], [2.0, 1.0, -1.0], [-0.3, -0.7, -0.1]
    r, start = [-0.2, -0.9, -0.4], 1.5
    ahead = [[k[j] * v[j] * math.exp(sum(g[j + 1 : t + 1])) for j in range(t + 1)] for t in range(3)]
    back = [[k[j] * v[j] * math.exp(sum(r[t:j])) for j in range(t, 3)] for t in range(3)]
    tensors = [torch.tensor(x, dtype=torch.float64).view(1, 3, 1, 1) for x in (q, k, v, g, r)]
    state = torch.full((1, 1, 1, 1), start, dtype=torch.float64)
    out, last = gated_linear_attention_reference(*tensors[:4], state, scale=0.5)
    from_start = [start * math.exp(sum(g[: t + 1])) for t in range(3)]
    expected = [0.5 * q[t] * (sum(ahead[t]) + from_start[t]) for t in range(3)]
    assert out.flatten().tolist() == pytest.approx(expected)
    assert last.item() == pytest.approx(sum(ahead[2]) + from_start[2])
    out = bidirectional_gated_linear_attention_reference(*tensors)
    assert out.flatten().tolist() == pytest.approx([q[t] * (sum(ahead[t]) + sum(back[t])) for t in range(3)])


def test_without_decay_it_is_linear_attention():
    q, k, v, *_ = inputs(dtype=torch.float64)
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k)
    zeros = torch.zeros_like(q)
    expected = torch.einsum("bhnm,bmhe->bnhe", scores.tril(), v)
    torch.testing.assert_close(gated_linear_attention(q, k, v, zeros, scale=1.0)[0], expected)
    expected = torch.einsum("bhnm,bmhe->bnhe", scores + torch.diag_embed(scores.diagonal(dim1=2, dim2=3)), v)
    torch.testing.assert_close(bidirectional_gated_linear_attention(q, k, v, zeros, zeros, scale=1.0), expected)


@form
@pytest.mark.parametrize("decay", [0.02, 1.0, 30.0, 3000.0])
def test_values_and_gradients(form, decay, close, gradients):
    """Also where the decay of a chunk is far below the smallest number: nothing overflows, no gradient is noise."""
    tensors = inputs(N=150, decay=decay)
    ours, definition, _ = FORMS[form]
    y, grads = chosen(form, tensors, gradients, ours)
    exact_y, exact_grads = chosen(form, [x.double() for x in tensors], gradients, definition)
    close(y, exact_y)
    for grad, exact in zip(grads, exact_grads, strict=True):
        close(grad, exact)


@form
def test_gradcheck(form):
    tensors = inputs(B=1, N=5, H=1, D=3, E=2, dtype=torch.float64)
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    assert torch.autograd.gradcheck(FORMS[form][0], leaves)


@form
@given(
    B=st.integers(1, 3),
    N=st.integers(1, 100),
    H=st.integers(1, 3),
    D=st.sampled_from([1, 8, 12, 32, 256]),
    E=st.sampled_from([1, 7, 64, 512]),
    dtype=st.sampled_from(DTYPES),
    decay=st.sampled_from([0.0, 0.1, 10.0]),
)
@settings(max_examples=30, deadline=None)
def test_any_shape(form, B, N, H, D, E, dtype, decay):
    tensors = inputs(B, N, H, D, E, dtype, decay)
    ours, definition, _ = FORMS[form]
    result, exact = ours(*tensors), definition(*(x.double() for x in tensors))
    error = (result.double() - exact).norm() / exact.norm()
    assert error < (1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_results_are_contiguous_and_of_the_right_dtype(dtype):
    q, k, v, ahead, back, state = inputs(dtype=dtype)
    out, last = gated_linear_attention(q, k, v, ahead.double(), state)
    assert out.dtype == dtype and out.is_contiguous() and out.shape == v.shape
    assert last.dtype == torch.float32 and last.shape == state.shape
    out = bidirectional_gated_linear_attention(q, k, v, ahead.float(), back)
    assert out.dtype == dtype and out.is_contiguous() and out.shape == v.shape


@form
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_in_half_precision(form, dtype, close, gradients):
    tensors = inputs(N=70, dtype=dtype, decay=0.3)
    ours, definition, _ = FORMS[form]
    _, grads = chosen(form, tensors, gradients, ours)
    _, exact = chosen(form, [x.double() for x in tensors], gradients, definition)
    for grad, expected in zip(grads, exact, strict=True):
        assert grad.dtype == dtype
        close(grad, expected)


@form
def test_many_tokens(form, close):
    tensors = inputs(B=1, N=5000, H=1, D=16, E=16, decay=0.01)
    ours, definition, _ = FORMS[form]
    close(ours(*tensors), definition(*(x.double() for x in tensors)))


def test_forgetting_everything():
    """A decay of minus infinity leaves a token alone with itself."""
    q, k, v, *_ = inputs(dtype=torch.float64)
    never = torch.full_like(q, -math.inf).requires_grad_()
    alone = (q * k).sum(-1, keepdim=True) * v
    out, _ = gated_linear_attention(q, k, v, never, scale=1.0)
    torch.testing.assert_close(out, alone)
    torch.testing.assert_close(bidirectional_gated_linear_attention(q, k, v, never, never, scale=1.0), 2 * alone)
    out.sum().backward()
    assert torch.equal(never.grad, torch.zeros_like(q))


def test_a_sequence_in_pieces_equals_the_whole():
    q, k, v, decay, _, state = inputs(N=100, dtype=torch.float64, decay=0.1)
    expected, expected_state = gated_linear_attention(q, k, v, decay, state)
    outputs = []
    for piece in (slice(0, 1), slice(1, 40), slice(40, 100)):
        out, state = gated_linear_attention(q[:, piece], k[:, piece], v[:, piece], decay[:, piece], state)
        outputs.append(out)
    torch.testing.assert_close(torch.cat(outputs, 1), expected)
    torch.testing.assert_close(state, expected_state)


def test_the_future_is_not_seen():
    q, k, v, decay, *_ = inputs()
    expected, _ = gated_linear_attention(q, k, v, decay)
    v = v.clone()
    v[:, 20:] += 1
    out, _ = gated_linear_attention(q, k, v, decay)
    assert torch.equal(out[:, :20], expected[:, :20])
    assert (out[:, 20:] - expected[:, 20:]).abs().amax((0, 2, 3)).min() > 1e-4


@pytest.mark.parametrize(("B", "N"), [(0, 5), (2, 0)])
def test_no_pictures_or_no_tokens(B, N):
    q, k, v, ahead, back, state = (x.detach().clone().requires_grad_() for x in inputs(B=B, N=N))
    out, last = gated_linear_attention(q, k, v, ahead, state)
    assert out.shape == v.shape and torch.equal(last, state)
    (out.sum() + 3 * last.sum()).backward()
    assert torch.equal(state.grad, torch.full_like(state, 3))
    assert bidirectional_gated_linear_attention(q, k, v, ahead, back).shape == v.shape
    bidirectional_gated_linear_attention(q, k, v, ahead, back).sum().backward()
    assert back.grad.shape == back.shape
    assert torch.equal(gated_linear_attention(q, k, v, ahead)[1], torch.zeros_like(state))


@form
def test_a_picture_does_not_depend_on_others(form):
    tensors = inputs(B=3)

    def run(part):
        q, k, v, ahead, back, state = (x[part] for x in tensors)
        if form == "both":
            return bidirectional_gated_linear_attention(q, k, v, ahead, back)
        return gated_linear_attention(q, k, v, ahead, state)[0]

    together = run(slice(0, 3))
    for i in range(3):
        torch.testing.assert_close(together[i : i + 1], run(slice(i, i + 1)))


Z = torch.zeros


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": Z(2, 37, 2, 8, dtype=torch.int32)}, "q is torch.int32, expected one of torch.float32"),
        ({"q": Z(2, 37, 8)}, r"q has shape \(2, 37, 8\), expected \(B, N, heads, head_dim\)"),
        ({"k": Z(2, 36, 2, 8)}, r"k has shape \(2, 36, 2, 8\), expected the shape of q = \(2, 37, 2, 8\)"),
        ({"v": Z(2, 37, 1, 6)}, r"v has shape \(2, 37, 1, 6\), expected \(B, N, heads, value_dim\)"),
        ({"log_decay": Z(2, 37, 2, 1)}, r"log_decay has shape \(2, 37, 2, 1\), expected the shape of q"),
        ({"log_decay": Z(2, 37, 2, 8).long()}, "log_decay is torch.int64"),
        ({"v": Z(2, 37, 2, 513)}, "are 8 and 513, expected 1 to 256 and 1 to 512"),
    ],
)
@form
def test_wrong_arguments(form, change, message):
    q, k, v, ahead, back, _ = inputs()
    function, rest = gated_linear_attention, {}
    if form == "both":
        function, rest = bidirectional_gated_linear_attention, {"log_decay_reverse": back}
    with pytest.raises(ValueError, match=message):
        function(**{"q": q, "k": k, "v": v, "log_decay": ahead, **rest, **change})


def test_wrong_state_or_reverse_decay():
    q, k, v, ahead, back, state = inputs()
    with pytest.raises(ValueError, match=r"initial_state has shape .* expected \(B, heads, head_dim, value_dim\)"):
        gated_linear_attention(q, k, v, ahead, state.mT)
    with pytest.raises(ValueError, match="log_decay_reverse has shape"):
        bidirectional_gated_linear_attention(q, k, v, ahead, back[:, 1:])


@pytest.mark.parametrize("with_state", [False, True])
def test_opcheck_in_order(with_state):
    q, k, v, ahead, _, state = (x.detach().clone().requires_grad_() for x in inputs())
    arguments = (q, k, v, ahead, state if with_state else None, None)
    torch.library.opcheck(torch.ops.zoo.gated_linear_attention.default, arguments)


def test_opcheck_in_both_directions():
    q, k, v, ahead, back, _ = (x.detach().clone().requires_grad_() for x in inputs())
    torch.library.opcheck(torch.ops.zoo.bidirectional_gated_linear_attention.default, (q, k, v, ahead, back, 0.5))


@form
def test_compiles_and_exports_as_one_op(form):
    tensors = inputs()

    class Module(torch.nn.Module):
        def forward(self, *tensors):
            return FORMS[form][0](*tensors) * 2

    expected = Module()(*tensors)
    compiled = torch.compile(Module(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*tensors), expected)
    exported = torch.export.export(Module(), tensors)
    assert len([node for node in exported.graph.nodes if "gated_linear_attention" in str(node.target)]) == 1
    torch.testing.assert_close(exported.module()(*tensors), expected)


@form
def test_flops_equal_the_hand_formula(form):
    B, N, H, D, E = 2, 37, 2, 8, 4
    tensors = [x.detach().clone().requires_grad_() for x in inputs(B, N, H, D, E)]
    directions = 2 if form == "both" else 1
    with FlopCounterMode(display=False) as counter:
        y = FORMS[form][0](*tensors)
    assert counter.get_total_flops() == directions * 2 * (2 * B * N * H * D * E)
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == directions * 5 * (2 * B * N * H * D * E)
