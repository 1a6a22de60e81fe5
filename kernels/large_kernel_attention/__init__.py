"""VAN's large kernel attention."""

from zoo.kernels.large_kernel_attention.op import large_kernel_attention

__all__ = ["large_kernel_attention"]
