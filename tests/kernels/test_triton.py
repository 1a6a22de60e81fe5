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
import json, sys
import torch
from zoo.kernels import depthwise_conv2d, large_kernel_attention, linear_attention
from zoo.kernels.depthwise_conv.reference import depthwise_conv2d_reference
from zoo.kernels.large_kernel_attention.reference import large_kernel_attention_reference
from zoo.kernels.linear_attention.reference import linear_attention_reference

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


def attention(dtype, grid, heads, dim, values, feature_map, token_weights, rotate, local, gate):
    tokens = grid[0] * grid[1]
    q, k = random(2, tokens, 2, heads, dim, dtype=dtype).unbind(2)
    v, *terms = random(2, tokens, 3, heads, values, dtype=dtype).unbind(2)
    names = [name for name, wanted in (("local", local), ("gate", gate)) if wanted]
    options = {"feature_map": feature_map, "token_weights": token_weights, "grid": tuple(grid) if rotate else None}
    if feature_map == "identity":
        options["eps"] = 30.0  # keeps the normaliser away from zero

    def of(function):
        return lambda q, k, v, *terms: function(q, k, v, **dict(zip(names, terms)), **options)

    return errors(of(linear_attention), of(linear_attention_reference), [q, k, v, *terms[: len(names)]])


def depthwise(dtype, height, width, channels, size, dilation, residual):
    x = random(2, height, width, 2 * channels, dtype=dtype)[..., :channels]
    tensors = [x, random(channels, 1, size, size, dtype=dtype), random(channels, dtype=dtype)]

    def of(function):
        return lambda x, weight, bias: function(x, weight, bias, 1, dilation, residual)

    return errors(of(depthwise_conv2d), of(depthwise_conv2d_reference), tensors)


def strided(dtype, height, width, channels, size):
    x, weight = random(2, height, width, channels, dtype=dtype), random(channels, 1, size, size, dtype=dtype)
    exact = depthwise_conv2d_reference(x.double(), weight.double(), stride=2)
    return [((depthwise_conv2d(x, weight, stride=2).double() - exact).norm() / exact.norm()).item()]


def large_kernel(dtype, height, width, channels):
    shapes = ((channels, 1, 5, 5), (channels,), (channels, 1, 7, 7), (channels,), (channels, channels), (channels,))
    tensors = [random(2, height, width, channels, dtype=dtype), *(random(*shape, dtype=dtype) for shape in shapes)]
    return errors(large_kernel_attention, large_kernel_attention_reference, tensors)


for line in sys.stdin:
    name, dtype, *arguments = json.loads(line)
    print(json.dumps(globals()[name](getattr(torch, dtype), *arguments)), flush=True)
"""

CASES = [
    # grid, heads, dim, value dim, feature map, token weights, rotation, local term, gate
    ["attention", "float32", [3, 5], 2, 8, 8, "elu+1", True, True, True, True],
    ["attention", "float32", [9, 20], 2, 16, 24, "elu+1", True, True, False, True],
    ["attention", "float32", [9, 20], 1, 24, 32, "exp", False, True, True, False],
    ["attention", "float32", [9, 20], 1, 32, 32, "relu", False, False, False, False],
    ["attention", "float32", [2, 2], 1, 128, 100, "identity", False, False, True, True],
    ["attention", "bfloat16", [16, 17], 1, 64, 64, "elu+1", True, True, True, True],
    ["attention", "float16", [16, 17], 1, 64, 64, "elu+1", True, True, True, True],
    # height, width, channels, kernel size, dilation, residual
    ["depthwise", "float32", 9, 10, 6, 3, 1, True],
    ["depthwise", "float32", 20, 5, 70, 5, 1, False],
    ["depthwise", "float32", 20, 13, 6, 7, 3, False],
    ["depthwise", "bfloat16", 9, 9, 6, 5, 1, False],
    ["strided", "float32", 11, 13, 6, 5],
    ["strided", "float16", 8, 8, 6, 3],
    ["large_kernel", "float32", 8, 7, 6],
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
