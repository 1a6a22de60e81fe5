"""How well a picture matches a text, and by which of its parts: BLIP's image-text matching with Grad-CAM."""

from typing import Any

import torch
from torch import Tensor, nn

from zoo.mllm.look import frozen
from zoo.mllm.prompts import Picture


class BlipMatcher:
    """The matcher of AGLA (arXiv:2406.12718): relevance from cross-attention and its gradient, and a match score.

    Args:
        model: ``BlipForImageTextRetrieval`` of transformers, such as of Salesforce/blip-itm-base-coco.
        processor: of the model.
        layer: of the text encoder, whose cross-attention tells; the authors' is 6.

    Raises:
        ValueError: the model is another one, or has no such layer.
    """

    def __init__(self, model: nn.Module, processor: Any, layer: int = 6) -> None:
        if not hasattr(model, "itm_head"):
            raise ValueError(f"BlipMatcher: the model is a {type(model).__name__}, expected BlipForImageTextRetrieval.")
        layers = model.config.text_config.num_hidden_layers
        if not 0 <= layer < layers:
            raise ValueError(f"BlipMatcher: layer is {layer}, but the text encoder has {layers}, counted from 0.")
        self.model, self.processor, self.layer = model, processor, layer

    def __call__(self, picture: Picture, text: str) -> tuple[Tensor, float]:
        """How much each patch matters, (rows, columns) float32 and not negative, and how well they match, 0 to 1.

        Each head's attention of a word to a patch is weighted by the positive part of its gradient in the matching
        logit; the relevance is the mean over heads and words. The match is the embeddings' cosine, at least 0.

        Args:
            picture: PIL image of mode "RGB".
            text: what is asked.
        """
        seen: list[Tensor] = []

        def look(module: nn.Module, args: tuple, output: tuple[Tensor, Tensor]) -> None:
            seen.append(output[1])  # (1, heads, words, 1 + patches)

        attention = self.model.text_encoder.encoder.layer[self.layer].crossattention.self
        with frozen(self.model):
            inputs = self.processor(images=picture, text=text, return_tensors="pt", truncation=True)
            inputs = inputs.to(self.model.device, self.model.dtype)
            pixels = inputs["pixel_values"].requires_grad_()  # so that there is a graph at all
            handle = attention.register_forward_hook(look)
            try:
                matching = self.model(**{**inputs, "pixel_values": pixels}).itm_score[0, 1]
            finally:
                handle.remove()
            (slope,) = torch.autograd.grad(matching, seen[0])
            with torch.no_grad():
                cosine = self.model(**inputs, use_itm_head=False).itm_score
        relevance = (seen[0].detach() * slope.relu())[0].float().mean(0)
        words = relevance[1:-1, 1:].mean(0)  # without [CLS] and [SEP], without the picture's class token
        vision = self.model.config.vision_config
        return words.view((vision.image_size // vision.patch_size,) * 2), float(cosine.clamp(0, 1))
