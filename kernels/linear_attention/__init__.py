"""Non-causal 2D linear attention over all tokens of a map."""

from zoo.kernels.linear_attention.op import linear_attention

__all__ = ["linear_attention"]
