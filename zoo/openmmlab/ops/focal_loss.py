"""Focal losses (https://arxiv.org/abs/1708.02002), as ``mmcv.ops.focal_loss`` calls them.

With p the probability of the true class: ``-alpha (1 - p)^gamma log(p)``. ``weight`` is empty or has one factor per
class. Logarithms start at the smallest normal float32.
"""

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from zoo.openmmlab.ops.precision import at_least_float32

__all__ = [
    "sigmoid_focal_loss_backward",
    "sigmoid_focal_loss_forward",
    "softmax_focal_loss_backward",
    "softmax_focal_loss_forward",
]

TINY = torch.finfo(torch.float32).tiny


def sigmoid_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """One binary focal loss per class; negatives have the factor ``1 - alpha``.

    Args:
        input: logits, (N, C).
        target: classes, (N,) int64; C is background.
        weight: empty or (C,).
        output: receives the losses, (N, C).
        gamma: focus on hard examples.
        alpha: factor of the positives.
    """
    true, false, factor, _ = _binary(input, target, weight, alpha)
    output.copy_(-factor * false**gamma * _log(true))


def sigmoid_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """The derivative of each loss with respect to its logit, into ``grad_input``."""
    true, false, factor, sign = _binary(input, target, weight, alpha)
    grad_input.copy_(sign * factor * false**gamma * (gamma * true * _log(true) - false))


def softmax_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """The focal loss of the true class of a softmax.

    Args:
        input: probabilities, (N, C).
        target: classes, (N,) int64; negative ones count nothing.
        weight: empty or (C,).
        output: receives the losses, (N,).
        gamma: focus on hard examples.
        alpha: factor of all.
    """
    true, factor, _ = _true_class(input, target, weight, alpha)
    output.copy_(-factor * (1 - true) ** gamma * _log(true))


def softmax_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, buff: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """The gradient with respect to the logits, into ``grad_input`` (N, C); ``buff`` (N,) gets ``p dloss/dp``."""
    true, factor, classes = _true_class(input, target, weight, alpha)
    false = 1 - true
    buff.copy_(factor * (gamma * false ** (gamma - 1) * true * _log(true) - false**gamma))
    grad_input.copy_(buff[:, None] * (one_hot(classes, input.shape[1]) - at_least_float32(input)))


def _binary(input: Tensor, target: Tensor, weight: Tensor, alpha: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Probabilities of the true and of the false answer, factors and signs of the labels, all (N, C)."""
    probability = at_least_float32(input).sigmoid()
    positive = one_hot(target, input.shape[1] + 1)[:, :-1].bool()
    true = torch.where(positive, probability, 1 - probability)  # not sigmoid(-x): mmcv's 1 - p is 0 from x = 17 on
    sign = positive.to(true.dtype) * 2 - 1
    factor = torch.where(positive, alpha, 1 - alpha).to(true.dtype)
    if weight.numel():
        factor = factor * at_least_float32(weight)[target.clamp(max=len(weight) - 1), None]
    return true, torch.where(positive, 1 - probability, probability), factor, sign


def _true_class(input: Tensor, target: Tensor, weight: Tensor, alpha: float) -> tuple[Tensor, Tensor, Tensor]:
    """Probability of the true class, factor and class, all (N,)."""
    classes = target.clamp(min=0)
    true = at_least_float32(input).gather(1, classes[:, None])[:, 0]
    factor = alpha * (target >= 0).to(true.dtype)
    if weight.numel():
        factor = factor * at_least_float32(weight)[classes]
    return true, factor, classes


def _log(probability: Tensor) -> Tensor:
    return probability.clamp(min=TINY).log()
