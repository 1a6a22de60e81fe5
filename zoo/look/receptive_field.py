"""What of a picture a layer without tokens sees from a point: its effective receptive field.

Luo, Li, Urtasun, Zemel: Understanding the Effective Receptive Field in Deep Convolutional Neural Networks,
NeurIPS 2016, arXiv:1701.04128.
"""

import torch
from torch import Tensor, nn

from zoo.look.place import token_at


def receptive_field(
    model: nn.Module, layer: nn.Module, pixels: Tensor, point: tuple[int, int], size: tuple[int, int]
) -> Tensor:
    """How much each pixel moves the result of a layer at a point.

    That is the absolute value of the gradient, in the pixel, of the sum of the result's channels there; summed over the
    colours of the pixel.

    Args:
        model: in evaluation mode.
        layer: of the model, with a result (B, H', W', C).
        pixels: what the model is given, (1, 3, H, W), for the whole picture.
        point: column and row of a pixel of the picture.
        size: width and height of the picture in pixels.

    Returns:
        (H, W).

    Raises:
        ValueError: the point is outside the picture.
    """
    results: list[Tensor] = []
    pixels = pixels.detach().requires_grad_()
    with torch.enable_grad(), layer.register_forward_hook(lambda _, inputs, result: results.append(result)):
        model(pixels)
    row, column = token_at(point, size, results[0].shape[1:3])
    (gradient,) = torch.autograd.grad(results[0][0, row, column].sum(), pixels)
    return gradient[0].abs().sum(0)
