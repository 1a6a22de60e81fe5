"""2D linear attention: the operator against its definition, values and gradients, and how it is registered."""

import importlib
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from zoo.kernels import linear_attention
from zoo.kernels.linear_attention.reference import FEATURE_MAPS, linear_attention_reference
from zoo.kernels.linear_attention.settings import Settings, pack, unpack

op = importlib.import_module("zoo.kernels.linear_attention.op")  # the package has a function of the folder's name
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def inputs(B=2, grid=(3, 5), H=2, D=8, E=8, dtype=torch.float32, seed=0):
    """Random q, k, v, local term and gate, as strided views of two projections."""
    generator = torch.Generator().manual_seed(seed)
    N = grid[0] * grid[1]
    qk = torch.randn(B, N, 2, H, D, generator=generator, dtype=torch.float64).to(dtype)
    vlg = torch.randn(B, N, 3, H, E, generator=generator, dtype=torch.float64).to(dtype)
    return *qk.unbind(2), *vlg.unbind(2)


def both(options, *tensors):
    """The operator, and its definition in float64, on the same numbers."""
    q, k, v, local, gate = tensors
    exact = (x.double() for x in tensors)
    q64, k64, v64, local64, gate64 = exact
    return (
        linear_attention(q, k, v, local=local, gate=gate, **options),
        linear_attention_reference(q64, k64, v64, local=local64, gate=gate64, **options),
    )


def test_the_definition_by_hand():
    """One head, two tokens, no rotation: the formula written out in Python."""
    q, k, v = [[0.5, -1.0], [2.0, 0.25]], [[1.0, 0.5], [-0.5, 3.0]], [[1.0, 2.0], [-3.0, 4.0]]
    relu = [[[max(x, 0.0) for x in row] for row in rows] for rows in (q, k)]
    mean_k = [sum(row[d] for row in relu[1]) / 2 for d in range(2)]
    expected = []
    for row in relu[0]:
        state = [[sum(relu[1][n][d] * v[n][e] for n in range(2)) / 2 for e in range(2)] for d in range(2)]
        normaliser = sum(row[d] * mean_k[d] for d in range(2)) + 1e-6
        expected.append([sum(row[d] * state[d][e] for d in range(2)) / normaliser for e in range(2)])
    tensors = (torch.tensor(x, dtype=torch.float64)[None, :, None] for x in (q, k, v))
    result = linear_attention_reference(*tensors, feature_map="relu")
    torch.testing.assert_close(result[0, :, 0], torch.tensor(expected, dtype=torch.float64))


def test_linear_attention_is_attention():
    """Without rotation and weights it is an average of the values with weights q.k, quadratic or not."""
    q, k, v, *_ = inputs(dtype=torch.float64)
    scores = torch.einsum("bnhd,bmhd->bhnm", torch.exp(q), torch.exp(k))
    expected = torch.einsum("bhnm,bmhe->bnhe", scores / scores.sum(-1, keepdim=True), v)
    torch.testing.assert_close(linear_attention(q, k, v, "exp", eps=0.0), expected)


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
@pytest.mark.parametrize("token_weights", [False, True])
@pytest.mark.parametrize("rotated", [False, True])
def test_values_and_gradients(feature_map, token_weights, rotated, close, gradients):
    options = {"feature_map": feature_map, "token_weights": token_weights, "grid": (3, 5) if rotated else None}
    if feature_map in ("identity", "silu"):
        options["eps"] = 5.0  # keeps the normaliser away from zero
    tensors = inputs()

    def run(function):
        return lambda q, k, v, local, gate: function(q, k, v, local=local, gate=gate, **options)

    y, grads = gradients(run(linear_attention), *tensors)
    exact_y, exact_grads = gradients(run(linear_attention_reference), *(x.double() for x in tensors))
    close(y, exact_y)
    for grad, exact in zip(grads, exact_grads, strict=True):
        close(grad, exact)


def test_a_local_term_and_a_gate_of_a_finer_dtype(close, gradients):
    q, k, v, local, gate = inputs()
    tensors = (q, k, v, local.double(), gate.double())

    def run(function):
        return lambda q, k, v, local, gate: function(q, k, v, local=local, gate=gate)

    y, grads = gradients(run(linear_attention), *tensors)
    exact_y, exact_grads = gradients(run(linear_attention_reference), *(x.double() for x in tensors))
    close(y, exact_y)
    for grad, exact in zip(grads, exact_grads, strict=True):
        close(grad.float(), exact)


def test_subtraction_by_hand():
    """One head, two tokens: weights that are 1/N plus what is above the mean."""
    q, k, v = [[0.5, -1.0], [2.0, 0.25]], [[1.0, 0.5], [-0.5, 3.0]], [[1.0, 2.0], [-3.0, 4.0]]
    expected = []
    for row in q:
        scores = [0.3 * sum(row[d] * other[d] for d in range(2)) / 2 for other in k]
        weights = [score - sum(scores) / 2 + 0.5 for score in scores]
        expected.append([sum(weights[n] * v[n][e] for n in range(2)) for e in range(2)])
    tensors = [torch.tensor(x, dtype=torch.float64)[None, :, None] for x in (q, k, v)]
    options = {"feature_map": "identity", "normalisation": "subtraction", "scale": 0.3}
    for function in (linear_attention_reference, linear_attention):
        result = function(*tensors, **options)
        torch.testing.assert_close(result[0, :, 0], torch.tensor(expected, dtype=torch.float64))


def test_keys_by_hand():
    """One head, two tokens: a softmax of every channel of the keys over the tokens, and what SiLU leaves of queries."""
    q, k, v = [[0.5, -1.0], [2.0, 0.25]], [[1.0, 0.5], [-0.5, 3.0]], [[1.0, 2.0], [-3.0, 4.0]]
    sums = [sum(math.exp(row[d]) for row in k) for d in range(2)]
    expected = []
    for row in q:
        mapped = [x / (1 + math.exp(-x)) for x in row]
        weights = [sum(mapped[d] * math.exp(other[d]) / sums[d] for d in range(2)) for other in k]
        expected.append([sum(weights[n] * v[n][e] for n in range(2)) for e in range(2)])
    tensors = [torch.tensor(x, dtype=torch.float64)[None, :, None] for x in (q, k, v)]
    for function in (linear_attention_reference, linear_attention):
        result = function(*tensors, feature_map="silu", normalisation="keys")
        torch.testing.assert_close(result[0, :, 0], torch.tensor(expected, dtype=torch.float64))


FORMS = [
    # normalisation, token weights, grid, rotation across heads
    ("subtraction", False, None, False),
    ("subtraction", True, None, False),
    ("division", False, None, False),
    ("division", True, None, False),
    ("division", False, (3, 5), True),
    ("division", True, (3, 5), False),
    ("keys", False, None, False),
    ("keys", False, (3, 5), False),
    ("keys", False, (3, 5), True),
]


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
@pytest.mark.parametrize(("normalisation", "token_weights", "grid", "across"), FORMS)
def test_scaled_forms(feature_map, normalisation, token_weights, grid, across, close, gradients):
    options = {"feature_map": feature_map, "token_weights": token_weights, "grid": grid, "rotary_across_heads": across}
    options |= {"normalisation": normalisation, "scale": 0.6, "eps": 5.0}  # keeps the normaliser away from zero

    def run(function):
        return lambda q, k, v, local, gate: function(q, k, v, local=local, gate=gate, **options)

    y, grads = gradients(run(linear_attention), *inputs())
    exact_y, exact_grads = gradients(run(linear_attention_reference), *(x.double() for x in inputs()))
    close(y, exact_y)
    for grad, exact in zip(grads, exact_grads, strict=True):
        close(grad, exact)


def test_subtraction_survives_large_means(close):
    """Queries, keys and values far from zero: large terms cancel in the formula, and must not in what is computed."""
    q, k, v, *_ = inputs(grid=(16, 16), D=32)
    options = {"feature_map": "identity", "normalisation": "subtraction", "scale": 32**-0.5}
    result = linear_attention(q + 30, k + 30, v + 30, **options)
    exact = linear_attention_reference(*((x + 30).double() for x in (q, k, v)), **options)
    close(result, exact)


def test_a_rotation_across_heads_is_another_one():
    q, k, v, *_ = inputs(H=2)
    options = {"feature_map": "relu", "grid": (3, 5)}
    apart = linear_attention(q, k, v, **options) - linear_attention(q, k, v, rotary_across_heads=True, **options)
    assert apart.abs().max() > 0.01


def test_keys_of_any_size(close, gradients):
    """The exponentials of the keys neither overflow nor vanish, whatever their mean; all from one token at last."""
    tensors = inputs(grid=(16, 16))[:3]

    def run(function, shift, factor):
        options = {"normalisation": "keys", "grid": (16, 16)}
        return lambda q, k, v: function(q, factor * k + shift, v, "silu", **options)

    for shift, factor in ((300.0, 1.0), (-300.0, 1.0), (0.0, 200.0)):
        y, grads = gradients(run(linear_attention, shift, factor), *tensors)
        exact_y, exact = gradients(run(linear_attention_reference, shift, factor), *(x.double() for x in tensors))
        close(y, exact_y, 10)  # 300 is rounded to 3e-5
        for grad, expected in zip(grads, exact, strict=True):
            close(grad, expected, 10)


def test_triton_declines_what_it_has_no_kernels_for(monkeypatch):
    """It must not compute another form instead."""
    monkeypatch.setenv("ZOO_KERNELS", "triton")
    q, k, v, *_ = inputs()
    wide = inputs(D=136)
    for tensors, options in (((q, k, v), {"normalisation": "subtraction", "token_weights": True}), (wide[:3], {})):
        with pytest.raises(RuntimeError, match="it has no Triton"):
            linear_attention(*tensors, "relu", **options)


def test_triton_knows_the_forms_of_all_families():
    q, _, v, *_ = inputs()
    for chosen in (Settings("elu+1", True, 3, 5, 1e4, 1e-6), Settings("silu", False, 3, 5, 1e4, 1e-6, "keys")):
        assert set(op._backends(q, v, chosen, "forward")) == {"torch", "triton"}
        assert set(op._backends(q.double(), v.double(), chosen, "forward")) == {"torch"}


@pytest.mark.parametrize("feature_map", ["elu+1", "exp"])
@pytest.mark.parametrize(("local", "gate"), list(itertools.product([False, True], repeat=2)))
def test_gradcheck(feature_map, local, gate):
    q, k, v, *extra = inputs(B=1, grid=(2, 2), H=1, D=4, E=3, dtype=torch.float64)
    chosen = [x for x, wanted in zip(extra, (local, gate), strict=True) if wanted]
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v, *chosen)]

    def run(q, k, v, *chosen):
        rest = iter(chosen)
        terms = {"local": next(rest) if local else None, "gate": next(rest) if gate else None}
        return linear_attention(q, k, v, feature_map, True, (2, 2), **terms)

    assert torch.autograd.gradcheck(run, leaves)


@given(
    B=st.integers(1, 3),
    grid=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    H=st.integers(1, 3),
    D=st.sampled_from([4, 8, 12, 36, 64, 256]),
    E=st.sampled_from([1, 7, 32, 256]),
    dtype=st.sampled_from(DTYPES),
    token_weights=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_any_shape(B, grid, H, D, E, dtype, token_weights):
    result, exact = both({"token_weights": token_weights, "grid": grid}, *inputs(B, grid, H, D, E, dtype))
    assert result.is_contiguous() and result.dtype == dtype and result.shape == (B, grid[0] * grid[1], H, E)
    error = (result.double() - exact).norm() / exact.norm()
    assert error < (1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_tokens(dtype, close):
    tensors = inputs(B=1, grid=(64, 80), H=1, D=32, E=32, dtype=dtype)
    close(*both({"token_weights": True, "grid": (64, 80)}, *tensors))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_in_half_precision(dtype, close, gradients):
    tensors = inputs(dtype=dtype)

    def run(function):
        return lambda q, k, v, local, gate: function(q, k, v, "elu+1", True, (3, 5), local=local, gate=gate)

    _, grads = gradients(run(linear_attention), *tensors)
    _, exact = gradients(run(linear_attention_reference), *(x.double() for x in tensors))
    for grad, expected in zip(grads, exact, strict=True):
        assert grad.dtype == dtype
        close(grad, expected)


def test_large_numbers_stay_finite_in_half_precision():
    q, k, v, *_ = (1e4 * x.sign() for x in inputs(grid=(16, 16), dtype=torch.float16))
    for token_weights in (False, True):
        assert linear_attention(q, k, v, "elu+1", token_weights, (16, 16)).isfinite().all()


def test_no_pictures():
    tensors = [x.requires_grad_() for x in inputs(B=0)]
    y = linear_attention(*tensors[:3], "elu+1", True, (3, 5), local=tensors[3], gate=tensors[4])
    assert y.shape == (0, 15, 2, 8)
    y.sum().backward()
    assert all(x.grad.shape == x.shape for x in tensors)


def test_a_picture_does_not_depend_on_others():
    q, k, v, *_ = inputs(B=3)
    together = linear_attention(q, k, v, "elu+1", True, (3, 5))
    for i in range(3):
        alone = linear_attention(q[i : i + 1], k[i : i + 1], v[i : i + 1], "elu+1", True, (3, 5))
        torch.testing.assert_close(together[i : i + 1], alone)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 15, 2, 8, dtype=torch.int32)}, "q is torch.int32, expected one of torch.float32"),
        ({"q": torch.zeros(2, 15, 8)}, r"q has shape \(2, 15, 8\), expected \(B, N, heads, head_dim\)"),
        ({"k": torch.zeros(2, 14, 2, 8)}, r"k has shape \(2, 14, 2, 8\), expected the shape of q = \(2, 15, 2, 8\)"),
        ({"v": torch.zeros(2, 15, 1, 8)}, r"v has shape \(2, 15, 1, 8\)"),
        ({"gate": torch.zeros(2, 15, 2, 7)}, r"gate has shape"),
        ({"local": torch.zeros(15, 2, 8)}, r"local has shape"),
        ({"feature_map": "gelu"}, "feature_map is 'gelu', expected one of identity, relu"),
        ({"normalisation": "softmax"}, "normalisation is 'softmax', expected one of division, subtraction, keys"),
        (
            {"normalisation": "keys", "token_weights": True},
            "'keys' weighs every channel by itself: leave token_weights",
        ),
        ({"normalisation": "subtraction"}, "normalisation 'subtraction' has no rotated form: leave grid out"),
        ({"scale": 0.0}, "scale is 0, expected another number"),
        ({"grid": (3, 4)}, "grid is 3 x 4, but q has 15 tokens"),
        ({"q": torch.zeros(2, 15, 2, 6), "k": torch.zeros(2, 15, 2, 6)}, "multiple of 4, got 6"),
        ({"q": torch.zeros(1, 15, 1, 260), "k": torch.zeros(1, 15, 1, 260), "v": torch.zeros(1, 15, 1, 4)}, "260"),
    ],
)
def test_wrong_arguments(change, message):
    q, k, v, *_ = inputs()
    with pytest.raises(ValueError, match=message):
        linear_attention(**{"q": q, "k": k, "v": v, "grid": (3, 5), **change})


@pytest.mark.parametrize("with_terms", [False, True])
def test_opcheck(with_terms):
    q, k, v, local, gate = (x.detach().clone().requires_grad_() for x in inputs())
    terms = (local, gate) if with_terms else (None, None)
    arguments = (q, k, v, *terms, "elu+1", True, 3, 5, 1e4, 1e-6)
    torch.library.opcheck(torch.ops.zoo.linear_attention.default, arguments)
    arguments = (q, k, v, *terms, "identity", False, 0, 0, 1e4, 1e-6, "subtraction", 0.5)
    torch.library.opcheck(torch.ops.zoo.linear_attention.default, arguments)
    arguments = (q, k, v, *terms, "silu", False, 3, 5, 1e4, 1e-6, "keys", 1.0, True)
    torch.library.opcheck(torch.ops.zoo.linear_attention.default, arguments)


def test_what_is_saved_does_not_grow_with_the_tokens():
    rala, lightnet = Settings("elu+1", True, 3, 5, 1e4, 1e-6), Settings("silu", False, 3, 5, 1e4, 1e-6, "keys")
    for form in (rala, lightnet, Settings("identity", False, 0, 0, 1e4, 1e-6, "subtraction", 0.5)):
        shapes = form.saved(8, 4)
        fields = {name: torch.randn(2, 3, *shape) for name, shape in shapes.items()}
        saved = pack(fields, form)
        assert saved.shape == (2, 3, form.saved_size(8, 4)) and saved.shape[2] <= 2 * 8 * 4 + 2 * 8 + 2 + 16
        for name, field in unpack(saved, form, 8, 4).items():
            assert torch.equal(field, fields[name])
    q, k, v, *_ = (x.requires_grad_() for x in inputs(grid=(20, 20)))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        linear_attention(q, k, v, "elu+1", True, (20, 20))
    assert sorted(x.numel() for x in kept) == sorted([*(x.numel() for x in (q, k, v)), 2 * 2 * 96])


def test_compiles_and_exports_as_one_op():
    q, k, v, local, gate = inputs()

    class Module(torch.nn.Module):
        def forward(self, q, k, v, local, gate):
            H = q.shape[1] // 5
            return linear_attention(q, k, v, "elu+1", True, (H, 5), local=local, gate=gate) * 2

    expected = Module()(q, k, v, local, gate)
    compiled = torch.compile(Module(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v, local, gate), expected)
    exported = torch.export.export(Module(), (q, k, v, local, gate))
    assert [node for node in exported.graph.nodes if "zoo.linear_attention" in str(node.target)]
    torch.testing.assert_close(exported.module()(q, k, v, local, gate), expected)


def test_flops_equal_the_hand_formula():
    B, (height, width), H, D, E = 2, (3, 5), 2, 8, 4
    q, k, v, *_ = inputs(B, (height, width), H, D, E)
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    with FlopCounterMode(display=False) as counter:
        y = linear_attention(*leaves, "elu+1", True, (height, width))
    tokens = B * H * height * width
    forward = 2 * tokens * (D * E + D * E + D + D)
    assert counter.get_total_flops() == forward
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 2 * forward + 2 * tokens * D * E
    with FlopCounterMode(display=False) as counter:
        linear_attention(q, k, v, "silu", normalisation="keys")
    assert counter.get_total_flops() == 2 * tokens * 2 * D * E
