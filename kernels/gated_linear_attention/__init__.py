"""Gated linear attention: a linear recurrence over the tokens, in one direction or in both."""

from zoo.kernels.gated_linear_attention.op import bidirectional_gated_linear_attention, gated_linear_attention

__all__ = ["bidirectional_gated_linear_attention", "gated_linear_attention"]
