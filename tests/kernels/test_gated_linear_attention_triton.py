"""Gated linear attention on Triton against its definition, in Triton's interpreter on a CPU or on a GPU.

Triton decides at import whether it interprets, so the cases run in a process of their own.
"""

import json
import os
import subprocess
import sys

import pytest
import torch

from zoo.kernels.gated_linear_attention import op

pytest.importorskip("triton")
GPU = torch.cuda.is_available()
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 1e-2}

PROGRAM = """
import importlib, json, math, sys
import torch
from zoo.kernels import bidirectional_gated_linear_attention, gated_linear_attention
from zoo.kernels.dispatch import PLANS
from zoo.kernels.gated_linear_attention.reference import (
    bidirectional_gated_linear_attention_reference,
    gated_linear_attention_reference,
)

kernels = importlib.import_module("zoo.kernels.gated_linear_attention.triton")
device = "cuda" if torch.cuda.is_available() else "cpu"


def run(function, tensors):
    leaves = [x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in tensors]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(y.shape, generator=generator).to(device, y.dtype) for y in outputs]
    return [*outputs, *torch.autograd.grad(outputs, leaves, cotangents)]


def errors(function, reference, tensors):
    pairs = zip(run(function, tensors), run(reference, [x.double() for x in tensors]))
    return [((a.double() - b).norm() / b.norm().clamp_min(1e-30)).item() for a, b in pairs]


for line in sys.stdin:
    form, dtype, B, N, H, D, E, decay, forgotten, programs = json.loads(line)
    # Segments of one chunk each, joined two at a time, or one segment.
    kernels.PROGRAMS, kernels.AT_ONCE = programs, 2
    PLANS.clear()
    dtype, generator = getattr(torch, dtype), torch.Generator().manual_seed(0)
    qkv = torch.randn(B, N, H * (2 * D + E), generator=generator).to(device, dtype)
    q, k, v = (x.unflatten(-1, (H, -1)) for x in qkv.split((H * D, H * D, H * E), -1))
    decays = -decay * torch.rand(B, N, 2, H, D, generator=generator)
    decays[torch.rand(decays.shape, generator=generator) < forgotten] = -math.inf
    ahead, back = decays.to(device, dtype).unbind(2)
    state = torch.randn(B, H, E, D, generator=generator).to(device, dtype).mT
    if form == "both":
        pair = bidirectional_gated_linear_attention, bidirectional_gated_linear_attention_reference
        found = errors(*pair, (q, k, v, ahead, back))
    else:
        found = errors(gated_linear_attention, gated_linear_attention_reference, (q, k, v, ahead, state))
    print(json.dumps(found), flush=True)
"""

CASES = [
    # form, dtype, B, N, heads, head dim, value dim, decay, share of decays that are -inf, programs wanted
    ["both", "float32", 2, 1, 1, 8, 6, 0.1, 0.0, 1],
    ["causal", "float32", 1, 1, 2, 8, 6, 0.1, 0.0, 1],
    ["both", "float32", 1, 49, 2, 8, 24, 0.05, 0.0, 1],
    ["causal", "float32", 1, 49, 1, 16, 8, 0.05, 0.0, 1],
    ["both", "float32", 1, 7, 1, 20, 40, 0.3, 0.0, 1],
    ["causal", "float32", 1, 7, 1, 20, 40, 0.3, 0.0, 1],
    ["both", "float32", 1, 40, 1, 8, 6, 10.0, 0.1, 1],
    ["causal", "float32", 1, 40, 1, 8, 6, 300.0, 0.1, 1],
    ["both", "float32", 1, 70, 1, 8, 6, 0.1, 0.0, 100],
    ["causal", "float32", 1, 70, 1, 8, 6, 0.1, 0.0, 100],
    ["both", "bfloat16", 1, 40, 1, 16, 16, 0.2, 0.0, 1],
    ["causal", "float16", 1, 20, 1, 16, 16, 5.0, 0.0, 1],
]


def test_values_and_gradients_against_the_definition():
    environment = {**os.environ, "ZOO_KERNELS": "triton"} | ({} if GPU else {"TRITON_INTERPRET": "1"})
    lines = "\n".join(json.dumps(case) for case in CASES)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], input=lines, capture_output=True, text=True, env=environment, timeout=600
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    for case, errors in zip(CASES, found, strict=True):
        assert max(errors) < TOLERANCE[case[1]], (case, errors)


def test_triton_knows_all_but_float64():
    single, double = torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    for function in ("forward", "backward", "forward_both", "backward_both"):
        assert set(op._backends(single, function)) == {"torch", "triton"}
        assert set(op._backends(double, function)) == {"torch"}
