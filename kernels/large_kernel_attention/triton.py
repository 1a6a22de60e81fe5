"""Large kernel attention with the Triton kernels of the depthwise convolution."""

from functools import partial

from zoo.kernels.depthwise_conv import triton as depthwise
from zoo.kernels.large_kernel_attention import torch_backend

forward = partial(torch_backend.forward, depthwise=depthwise)
backward = partial(torch_backend.backward, depthwise=depthwise)
