"""The precision the stand-in ops compute in."""

import torch
from torch import Tensor


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor in float32 if it is in half precision, which torchvision's kernels partly lack."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
