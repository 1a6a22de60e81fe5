"""Models made ready for inference."""

import copy

from timm.utils import reparameterize_model
from torch import nn


def fuse(model: nn.Module) -> nn.Module:
    """A copy of a model for inference, with norms and scales folded into the layers next to them.

    Batch norms and layer scales of the zoo's models disappear, and so does whatever else has a ``fuse`` method, as in
    ``timm.utils.reparameterize_model``. The outputs are the same up to rounding. The copy cannot be trained.

    Args:
        model: a zoo or timm model; left as it is.

    Returns:
        The copy, in evaluation mode.
    """
    return reparameterize_model(copy.deepcopy(model).eval(), inplace=True)
