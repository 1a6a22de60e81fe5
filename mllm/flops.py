"""What a decoder costs for a given number of tokens in each layer, before anything is run."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class DecoderShape:
    """Sizes of a decoder with gated MLPs (LLaMA, Qwen2 and their like).

    Attributes:
        layers: number of layers.
        dim: width of the hidden states.
        mlp_dim: width inside the MLP.
        num_heads: of the queries.
        num_kv_heads: of keys and values.
        head_dim: width of a head.
    """

    layers: int
    dim: int
    mlp_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int

    @classmethod
    def from_config(cls, config: Any) -> "DecoderShape":
        """From a transformers config, of a text model or of a multimodal one."""
        text = config.get_text_config()
        heads = text.num_attention_heads
        return cls(
            layers=text.num_hidden_layers,
            dim=text.hidden_size,
            mlp_dim=text.intermediate_size,
            num_heads=heads,
            num_kv_heads=getattr(text, "num_key_value_heads", None) or heads,
            head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        )


def prefill_flops(shape: DecoderShape, tokens: int | Sequence[float]) -> float:
    """FLOPs of the layers for one prompt: two for each multiply-accumulate, without embeddings and head.

    For ``s`` tokens a layer costs ``4 s d (q + kv) + 4 s^2 q + 6 s d m``, with ``q`` and ``kv`` the widths of all heads
    of queries and of keys: the projections, the attention (all s x s pairs, as the papers count) and the MLP. With as
    many key heads as query heads this is the papers' ``8 s d^2 + 4 s^2 d + 6 s d m``.

    Args:
        shape: of the decoder.
        tokens: in each layer, or one number for all.
    """
    q, kv = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    return sum(
        4 * s * shape.dim * (q + kv) + 4 * s * s * q + 6 * s * shape.dim * shape.mlp_dim
        for s in _per_layer(shape, tokens)
    )


def kv_bytes(shape: DecoderShape, tokens: int | Sequence[float], bytes_per_number: float = 2) -> float:
    """Bytes of the keys and values that a prompt leaves in the cache; tokens as of ``prefill_flops``."""
    return sum(2 * s * shape.num_kv_heads * shape.head_dim * bytes_per_number for s in _per_layer(shape, tokens))


def _per_layer(shape: DecoderShape, tokens: int | Sequence[float]) -> Sequence[float]:
    if not isinstance(tokens, Sequence):
        return [tokens] * shape.layers
    if len(tokens) != shape.layers:
        raise ValueError(f"There are {len(tokens)} numbers of tokens, expected one for each of {shape.layers} layers.")
    return tokens
