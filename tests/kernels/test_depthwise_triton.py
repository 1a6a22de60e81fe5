"""The Triton kernels of the depthwise convolution and of large kernel attention, in Triton's interpreter or on a GPU.

Triton decides at import whether it interprets, so the cases run in a process of their own. Its interpreter cuts numbers
off when it rounds to bfloat16, which doubles the error.
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
from zoo.kernels import depthwise_conv2d, large_kernel_attention
from zoo.kernels.depthwise_conv import triton as kernels
from zoo.kernels.depthwise_conv.reference import depthwise_conv2d_reference
from zoo.kernels.large_kernel_attention.reference import large_kernel_attention_reference

device = "cuda" if torch.cuda.is_available() else "cpu"
kernels.PARTS = 2  # so that a program of the weight gradient gets several tiles


def errors(function, reference, tensors):
    def run(function, tensors):
        leaves = [x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in tensors]
        y = function(*leaves).to(dtype)  # so that the cotangents are the same numbers
        cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(device, y.dtype)
        return [y, *torch.autograd.grad(y, leaves, cotangent)]

    dtype = tensors[0].dtype
    pairs = zip(run(function, tensors), run(reference, [x.double() for x in tensors]))
    return [((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30)).item() for a, b in pairs]


def random(*shape, dtype):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(device, dtype)


def depthwise(dtype, shape, size, stride, dilation, residual, activation, gated):
    batch, height, width, channels = shape
    x = random(batch, height, width, channels + 5, dtype=dtype)[..., 1 : channels + 1]
    tensors = [x, random(channels, 1, size, size, dtype=dtype), random(channels, dtype=dtype)]
    if gated:  # its channels are not next to each other
        height, width = -(-height // stride), -(-width // stride)
        tensors.append(random(batch, channels, height, width, dtype=dtype).permute(0, 2, 3, 1))

    def of(function):
        return lambda x, weight, bias, gate=None: function(
            x, weight, bias, stride, dilation, residual, activation, gate
        )

    return errors(of(depthwise_conv2d), of(depthwise_conv2d_reference), tensors)


def large_kernel(dtype, shape):
    channels = shape[-1]
    shapes = ((channels, 1, 5, 5), (channels,), (channels, 1, 7, 7), (channels,), (channels, channels), (channels,))
    tensors = [random(*shape, dtype=dtype), *(random(*shape, dtype=dtype) for shape in shapes)]
    return errors(large_kernel_attention, large_kernel_attention_reference, tensors)


def large_kernel_of_views(dtype, shape):
    # Neighbouring channels are not neighbours in memory, in the input and in the gradient of the result.
    batch, height, width, channels = shape
    shapes = ((channels, 1, 3, 3), (channels,), (channels, 1, 3, 3), (channels,), (channels, channels), (channels,))
    x = random(batch, channels, height, width, dtype=dtype).permute(0, 2, 3, 1)
    tensors = [x, *(random(*shape, dtype=dtype) for shape in shapes)]
    total = lambda function: lambda *tensors: function(*tensors).sum().view(1)
    return errors(total(large_kernel_attention), total(large_kernel_attention_reference), tensors)


for line in sys.stdin:
    name, dtype, *arguments = json.loads(line)
    print(json.dumps(globals()[name](getattr(torch, dtype), *arguments)), flush=True)
"""

CASES = [
    # shape, kernel size, stride, dilation, residual, activation, gate
    ["depthwise", "float32", [1, 17, 3, 3], 3, 1, 1, True, "none", False],  # several strips of rows
    ["depthwise", "float32", [2, 4, 9, 3], 3, 1, 1, True, "gelu", True],
    ["depthwise", "bfloat16", [1, 5, 6, 3], 3, 1, 1, False, "gelu", False],
    ["depthwise", "float32", [1, 5, 4, 3], 3, 2, 1, False, "silu", True],
    ["depthwise", "float32", [1, 3, 2, 33], 5, 1, 1, False, "none", False],  # several blocks of channels
    ["depthwise", "float16", [1, 4, 5, 3], 5, 1, 1, False, "none", True],
    ["depthwise", "float32", [1, 6, 5, 3], 5, 2, 1, False, "none", False],
    ["depthwise", "float32", [1, 7, 8, 3], 7, 1, 3, False, "silu", False],
    ["depthwise", "bfloat16", [1, 5, 4, 3], 7, 2, 1, False, "none", False],
    ["depthwise", "float32", [1, 7, 5, 2], 3, 2, 3, False, "none", False],
    ["depthwise", "float32", [1, 1, 1, 3], 7, 1, 1, True, "gelu", True],
    ["depthwise", "float32", [1, 3, 3, 2], 1, 1, 2, False, "gelu", False],
    ["depthwise", "float32", [1, 3, 4, 3], 11, 1, 1, True, "gelu", True],
    ["depthwise", "float16", [1, 5, 3, 2], 11, 2, 1, False, "none", False],
    ["depthwise", "float32", [1, 3, 2, 2], 21, 1, 1, False, "none", False],
    ["large_kernel", "float32", [1, 4, 5, 6]],
    ["large_kernel", "float16", [2, 2, 3, 48]],
    ["large_kernel_of_views", "float16", [1, 2, 3, 16]],
]


def test_values_and_gradients_against_the_definitions():
    environment = {**os.environ, "ZOO_KERNELS": "triton"} | ({} if GPU else {"TRITON_INTERPRET": "1"})
    lines = "\n".join(json.dumps(case) for case in CASES)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], input=lines, capture_output=True, text=True, env=environment, timeout=900
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    for case, errors in zip(CASES, found, strict=True):
        assert len(errors) > 3 and max(errors) < TOLERANCE[case[1]], (case, errors)


def test_a_new_resolution_does_not_compile_again():
    """Of the numbers that a kernel gets, it may be compiled for those of the model alone: the channels."""
    program = """
from zoo.kernels.depthwise_conv import triton as depthwise
from zoo.kernels.large_kernel_attention import triton as large
for kernel in (depthwise._conv, depthwise._conv_large, depthwise._conv_weight, large._gated_linear):
    print(*(p.name for p in kernel.params if not p.is_constexpr and not p.do_not_specialize))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    specialised = [set(line.split()) for line in done.stdout.splitlines()]
    pointers = {"x", "taps", "bias", "gate", "grad", "y", "d_gate", "weight", "add", "part"}
    assert len(specialised) == 4 and all(names - pointers == {"C"} for names in specialised), specialised
