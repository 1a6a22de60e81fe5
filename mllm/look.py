"""What the last token of a prompt attends to in one layer, per head, and how the answer depends on that."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

ATTENTION = "zoo_look"


@dataclass
class Look:
    """What was seen in a forward pass over one prompt.

    Attributes:
        gradient: whether ``output`` starts a graph, so that a gradient can be taken in it.
        attention: (heads, L) float32, of the last token.
        value: (heads, L, D).
        output: (1, L, heads, D), of the attention.
    """

    gradient: bool
    attention: Tensor | None = None
    value: Tensor | None = None
    output: Tensor | None = None

    def slope(self, slope: Tensor) -> Tensor:
        """The gradient in the attention, (heads, L), from that in the output: output = attention @ value."""
        return torch.einsum("hd,hld->hl", slope[0, -1].float(), self.value.float())


LOOKS: WeakKeyDictionary[nn.Module, Look] = WeakKeyDictionary()


@contextmanager
def looking(model: nn.Module, layer: int, gradient: bool) -> Iterator[Look]:
    """While it lasts, a model computes with SDPA and without gradients of its parameters, and a layer is looked at.

    Args:
        model: of a family that ``accelerate`` knows, not accelerated.
        layer: number of the layer.
        gradient: whether gradients will be asked for.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(ATTENTION, _attention_that_shows)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    decoder = model.get_decoder()
    attention, module = decoder.config._attn_implementation, decoder.layers[layer].self_attn
    look = LOOKS[module] = Look(gradient)
    decoder.set_attn_implementation(ATTENTION)
    try:
        with frozen(model):
            yield look
    finally:
        decoder.set_attn_implementation(attention)
        del LOOKS[module]


def _attention_that_shows(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    look = LOOKS.get(module)
    if look:
        groups = query.shape[1] // key.shape[1]
        keys, look.value = (x.detach()[0].repeat_interleave(groups, 0) for x in (key, value))  # (heads, L, D)
        logits = kwargs["scaling"] * torch.einsum("hd,hld->hl", query.detach()[0, :, -1].float(), keys.float())
        look.attention = logits.softmax(-1)
        if look.gradient:  # the gradient starts here: nothing below is kept for it
            output = look.output = output.detach().requires_grad_()
    return output, None


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """While it lasts, gradients are computed, but none of the parameters."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
