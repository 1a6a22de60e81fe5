"""A tiny random language model with a tokenizer of bytes and two pairs, a narrow tower, and models composed of them."""

import numpy as np
import tokenizers
import torch
import transformers
from PIL import Image

from zoo.mllm import VisionLanguageModel

BEGIN, END = "<|im_start|>", "<|im_end|>"
TEMPLATE = (
    "{% for turn in messages %}<|im_start|>{{ turn['role'] }}\n{{ turn['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SIZE = 32  # of a tile
VIT = {"tower": "vit_tiny_patch16_224", "tower_options": {"embed_dim": 16, "depth": 3, "num_heads": 2}}
GREEDY = {"do_sample": False, "eos_token_id": None}


def tokenizer(chat_template=TEMPLATE):
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([BEGIN, END, *alphabet, "qu", "zz"])}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [("q", "u"), ("z", "z")]))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token=BEGIN, eos_token=END, pad_token=END, chat_template=chat_template
    )


def language_model(attention="sdpa", seed=0):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=260,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        tie_word_embeddings=True,
    )
    made = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    with torch.no_grad():  # the default of 0.02 leaves such small models flat
        for parameter in made.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.3)
    return made.eval()


def compose(language_model=None, **options):
    """A composed model with a projector that says something, and its processor."""
    language_model = language_model or globals()["language_model"]()
    options = {"image_size": SIZE, "pretrained": False, "tokenizer": tokenizer(), **VIT, **options}
    torch.manual_seed(0)
    model, processor = VisionLanguageModel.compose(options.pop("tower"), language_model, **options)
    with torch.no_grad():
        for parameter in model.projector.parameters():
            parameter.mul_(3)
    return model, processor


def picture(seed=0, width=SIZE, height=SIZE):
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST)


def message(role, *parts):
    """A message of pictures and texts."""
    kinds = [("text" if isinstance(part, str) else "image", part) for part in parts]
    return {"role": role, "content": [{"type": kind, kind: part} for kind, part in kinds]}
