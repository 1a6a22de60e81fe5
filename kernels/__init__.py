"""Operators of linear-complexity vision backbones, each with a reference, a PyTorch and a Triton backend.

The repository's folder ``kernels`` is the package ``zoo.kernels``. Imported under its bare name, as other packages may
do that look for one called so, it does nothing.
"""

if __name__ == "zoo.kernels":
    from zoo.kernels.depthwise_conv import depthwise_conv2d
    from zoo.kernels.gated_linear_attention import bidirectional_gated_linear_attention, gated_linear_attention
    from zoo.kernels.large_kernel_attention import large_kernel_attention
    from zoo.kernels.linear_attention import linear_attention

    __all__ = [
        "bidirectional_gated_linear_attention",
        "depthwise_conv2d",
        "gated_linear_attention",
        "large_kernel_attention",
        "linear_attention",
    ]
