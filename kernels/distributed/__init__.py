"""Operators over a map whose rows are split over the ranks of a process group.

Every collective is a linear map, and its backward pass is the transposed one. So gradients are those of the sum of the
losses of all ranks; where each rank computes the same loss, that is the loss times their number, and the mean of the
ranks' gradients, which ``DistributedDataParallel`` takes, is the gradient of the loss.
"""

from zoo.kernels.distributed.exchange import gather
from zoo.kernels.distributed.halo import strided, with_halo
from zoo.kernels.distributed.linear_attention import linear_attention
from zoo.kernels.distributed.softmax_attention import softmax_attention
from zoo.kernels.distributed.strips import Strips

__all__ = ["Strips", "gather", "linear_attention", "softmax_attention", "strided", "with_halo"]
