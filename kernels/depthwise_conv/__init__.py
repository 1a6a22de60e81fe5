"""Depthwise 2D convolution over channels-last tokens."""

from zoo.kernels.depthwise_conv.op import depthwise_conv2d

__all__ = ["depthwise_conv2d"]
