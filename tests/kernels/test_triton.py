"""The Triton kernels: values and gradients against the definitions, in Triton's interpreter on a CPU or on a GPU.

Triton decides at import whether it interprets, so the cases run in a process of their own.
"""

import json
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")
GPU = torch.cuda.is_available()
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 1e-2}

PROGRAM = """
import importlib, json, sys
import torch
from zoo.kernels import linear_attention
from zoo.kernels.dispatch import PLANS
from zoo.kernels.linear_attention.reference import linear_attention_reference
from zoo.kernels.linear_attention.settings import Settings, unpack

device = "cuda" if torch.cuda.is_available() else "cpu"


def errors(function, reference, tensors):
    def run(function, tensors):
        leaves = [x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in tensors]
        y = function(*leaves)
        cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(device, y.dtype)
        return [y, *torch.autograd.grad(y, leaves, cotangent)]

    exact = run(reference, [x.double() for x in tensors])
    pairs = zip(run(function, tensors), exact)
    return [((a.double() - b).norm() / b.norm().clamp_min(1e-30)).item() for a, b in pairs]


def random(*shape, dtype):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(device, dtype)


attention_kernels = importlib.import_module("zoo.kernels.linear_attention.triton")
attention_torch = importlib.import_module("zoo.kernels.linear_attention.torch_backend")


def take_short(tokens):
    # Up to how many tokens one kernel computes everything.
    attention_kernels.SHORT_TOKENS = attention_kernels.SHORT_TOKENS_OF_MANY = tokens
    attention_kernels._plan.cache_clear()
    PLANS.clear()


def attention_inputs(dtype, grid, heads, dim, values, batch=2):
    tokens = grid[0] * grid[1]
    q, k = random(batch, tokens, 2, heads, dim, dtype=dtype).unbind(2)
    return q, k, *random(batch, tokens, 3, heads, values, dtype=dtype).unbind(2)


def attention(dtype, grid, heads, dim, values, names, rotate, options, short):
    take_short(short)
    q, k, v, local, gate = attention_inputs(dtype, grid, heads, dim, values)
    k = k.transpose(2, 3).contiguous().transpose(2, 3)  # neighbouring channels are not neighbours
    terms = [{"local": local, "gate": gate}[name] for name in names]
    options |= {"grid": tuple(grid) if rotate else None}
    if options["feature_map"] in ("identity", "silu"):
        options["eps"] = 30.0  # keeps the normaliser away from zero

    def of(function):
        return lambda q, k, v, *terms: function(q, k, v, **dict(zip(names, terms)), **options)

    return errors(of(linear_attention), of(linear_attention_reference), [q, k, v, *terms])


def attention_far_from_zero(dtype, short):
    take_short(short)
    tensors = [x + 30 for x in attention_inputs(dtype, (16, 16), 1, 32, 32)[:3]]
    options = {"feature_map": "identity", "normalisation": "subtraction", "scale": 32**-0.5}
    exact = linear_attention_reference(*(x.double() for x in tensors), **options)
    return [((linear_attention(*tensors, **options).double() - exact).norm() / exact.norm()).item()]


def attention_extremes(dtype, options, large, short):
    take_short(short)
    options = {"grid": (9, 20), **options}
    tensors = zip("qkv", attention_inputs(dtype, (9, 20), 1, 16, 16))
    q, k, v = (1e4 * x.sign() if name in large else x for name, x in tensors)
    exact = linear_attention_reference(q.double(), k.double(), v.double(), **options)
    assert linear_attention_reference(q, k, v, **options).isfinite().all()
    return [((linear_attention(q, k, v, **options).double() - exact).norm() / exact.norm()).item()]


def attention_twice(dtype, short):
    take_short(short)
    tensors = [x.clone().requires_grad_() for x in attention_inputs(dtype, (9, 20), 1, 16, 16, batch=1)]

    def run():
        y = linear_attention(*tensors[:3], "elu+1", True, (9, 20), 1e4, *tensors[3:])
        return y, *torch.autograd.grad(y, tensors, y.detach())

    return [float(not torch.equal(a, b)) for a, b in zip(run(), run())]


def attention_of_nothing(dtype):
    tensors = [x.clone().requires_grad_() for x in attention_inputs(dtype, (3, 5), 2, 8, 8, batch=0)]
    y = linear_attention(*tensors[:3], "silu", False, (3, 5), normalisation="keys")
    y.sum().backward()
    return [float(y.shape != (0, 15, 2, 8)), *(float(x.grad.shape != x.shape) for x in tensors[:3])]


def attention_across_backends(dtype, form, short):
    # Either backend's backward pass from what the other's forward pass saved.
    take_short(short)
    settings = Settings(*form)
    arguments = *attention_inputs(dtype, (9, 20), 2, 16, 24), settings
    ours = attention_kernels.plan_forward(*arguments)(*arguments)
    theirs = attention_torch.forward(*arguments)
    mixed = ours[0], theirs[1], *arguments
    grads = attention_kernels.plan_backward(*mixed)(*mixed)
    exact = attention_torch.backward(*ours, *arguments)
    fields = [unpack(saved, settings, 16, 24) for _, saved in (ours, theirs)]
    pairs = [(fields[0][name], fields[1][name]) for name in fields[0]] + [*zip(grads, exact)]
    return [((a - b).norm() / b.norm()).item() for a, b in pairs]


for line in sys.stdin:
    name, dtype, *arguments = json.loads(line)
    print(json.dumps(globals()[name](getattr(torch, dtype), *arguments)), flush=True)
"""

RALA = {"feature_map": "elu+1", "token_weights": True}
SLAB = {"feature_map": "relu"}
INLINE = {"feature_map": "identity", "normalisation": "subtraction", "scale": 0.3}
LIGHTNET = {"feature_map": "silu", "normalisation": "keys", "rotary_across_heads": True}
BOTH, NO_LOCAL, NO_GATE = ["local", "gate"], ["gate"], ["local"]

CASES = [
    # grid, heads, dim, value dim, terms, rotation, form, tokens that count as short
    ["attention", "float32", [3, 5], 2, 8, 8, BOTH, True, RALA, 0],
    ["attention", "float32", [9, 20], 2, 16, 24, NO_LOCAL, True, RALA, 0],
    ["attention", "float32", [9, 20], 2, 12, 7, NO_GATE, True, RALA, 1000],
    ["attention", "float32", [9, 20], 1, 24, 32, NO_GATE, True, {"feature_map": "exp", "scale": 0.7}, 0],
    ["attention", "float32", [7, 7], 1, 32, 32, [], False, SLAB, 0],
    ["attention", "float32", [7, 7], 1, 32, 33, NO_GATE, False, {**SLAB, "eps": 0.1, "scale": 1.3}, 1000],
    ["attention", "float32", [2, 2], 1, 128, 100, BOTH, False, {"feature_map": "identity"}, 0],
    ["attention", "float32", [1, 1], 2, 8, 8, BOTH, True, {**RALA, "eps": 0.5}, 1000],
    ["attention", "float32", [1, 1], 2, 8, 8, NO_GATE, False, {**SLAB, "eps": 0.5}, 0],
    ["attention", "float32", [9, 20], 2, 24, 20, NO_GATE, False, INLINE, 0],
    ["attention", "float32", [14, 14], 2, 32, 32, BOTH, False, {**INLINE, "feature_map": "elu+1"}, 1000],
    ["attention", "float32", [14, 14], 3, 32, 24, BOTH, True, LIGHTNET, 0],
    ["attention", "float32", [9, 20], 3, 20, 9, [], True, {**LIGHTNET, "scale": 1.5}, 1000],
    ["attention", "float32", [7, 7], 1, 13, 16, NO_LOCAL, False, LIGHTNET | {"rotary_across_heads": False}, 0],
    ["attention", "float32", [7, 7], 2, 16, 16, NO_LOCAL, False, LIGHTNET, 1000],
    ["attention", "bfloat16", [16, 17], 1, 64, 64, BOTH, True, RALA, 0],
    ["attention", "bfloat16", [14, 14], 1, 64, 64, BOTH, True, RALA, 1000],
    ["attention", "bfloat16", [14, 14], 2, 32, 32, NO_GATE, False, INLINE, 0],
    ["attention", "bfloat16", [14, 14], 1, 64, 64, [], True, LIGHTNET, 1000],
    ["attention", "float16", [16, 17], 1, 64, 64, BOTH, True, RALA, 0],
    ["attention", "float16", [14, 14], 2, 32, 32, [], True, LIGHTNET, 0],
    ["attention", "float32", [7, 7], 2, 16, 16, BOTH, True, RALA, 0],
    ["attention", "float32", [7, 7], 2, 16, 16, NO_LOCAL, False, {**SLAB, "eps": 0.1}, 0],
    ["attention_far_from_zero", "float32", 0],
    ["attention_far_from_zero", "float32", 1000],
    ["attention_extremes", "float16", RALA, "qkv", 0],
    ["attention_extremes", "float16", SLAB, "qkv", 1000],
    ["attention_extremes", "float16", LIGHTNET, "k", 0],
    ["attention_twice", "float32", 0],
    ["attention_twice", "float32", 1000],
    ["attention_of_nothing", "float32"],
    ["attention_across_backends", "float32", ["elu+1", True, 9, 20, 1e4, 1e-6], 0],
    ["attention_across_backends", "float32", ["identity", False, 0, 0, 1e4, 1e-6, "subtraction", 0.3], 1000],
    ["attention_across_backends", "float32", ["silu", False, 9, 20, 1e4, 1e-6, "keys", 1.0, True], 0],
]


def test_values_and_gradients_against_the_definitions():
    environment = {**os.environ, "ZOO_KERNELS": "triton"} | ({} if GPU else {"TRITON_INTERPRET": "1"})
    lines = "\n".join(json.dumps(case) for case in CASES)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], input=lines, capture_output=True, text=True, env=environment, timeout=600
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    for case, errors in zip(CASES, found, strict=True):
        assert max(errors) < TOLERANCE[case[1]], (case, errors)
