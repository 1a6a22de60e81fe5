"""Norms over the channels of channels-last tokens."""

import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.RMSNorm):
    """``nn.RMSNorm`` whose weight follows the dtype of its input, so that autocast does not lose the fused kernel."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) to the same."""
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)
