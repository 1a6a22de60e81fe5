"""Tiny random models of the seven families, and batches for them."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # for what the tests share

transformers = pytest.importorskip("transformers")

IMAGE, VIDEO, START, END, PAD, MARKER = 90, 91, 92, 93, 0, 94
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 95,
    "max_position_embeddings": 512,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
FAMILIES = ["llava", "llava_next", "qwen2_vl", "qwen2_5_vl", "internvl", "smolvlm", "idefics3"]


def config(family):
    llama, clip = {**TEXT, "model_type": "llama"}, {**VISION, "model_type": "clip_vision_model", "projection_dim": 16}
    if family == "llava":
        return transformers.LlavaConfig(text_config=llama, vision_config=clip, image_token_id=IMAGE)
    if family == "llava_next":
        return transformers.LlavaNextConfig(
            text_config=llama, vision_config=clip, image_token_id=IMAGE, image_grid_pinpoints=[[16, 32], [32, 16]]
        )
    if family in ("qwen2_vl", "qwen2_5_vl"):
        text = {**TEXT, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
        tokens = {
            "image_token_id": IMAGE,
            "video_token_id": VIDEO,
            "vision_start_token_id": START,
            "vision_end_token_id": END,
        }
        if family == "qwen2_vl":
            vision = {"depth": 2, "embed_dim": 16, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4, "hidden_size": 32}
            return transformers.Qwen2VLConfig(text_config=text, vision_config=vision, **tokens)
        vision = {"depth": 2, "hidden_size": 16, "num_heads": 2, "intermediate_size": 24, "patch_size": 4}
        vision |= {"out_hidden_size": 32, "window_size": 16, "fullatt_block_indexes": [1]}
        return transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **tokens)
    if family == "internvl":
        vision = {**VISION, "image_size": [16, 16], "patch_size": [4, 4]}
        qwen = {**TEXT, "model_type": "qwen2"}
        return transformers.InternVLConfig(
            text_config=qwen, vision_config=vision, image_token_id=IMAGE, downsample_ratio=0.5
        )
    kind = transformers.SmolVLMConfig if family == "smolvlm" else transformers.Idefics3Config
    return kind(text_config=llama, vision_config=VISION, image_token_id=IMAGE, scale_factor=2, pad_token_id=PAD)


def make(family, attention="sdpa"):
    torch.manual_seed(0)
    made = transformers.AutoModelForImageTextToText.from_config(config(family), attn_implementation=attention)
    with torch.no_grad():  # the default of 0.02 leaves the attention of such small models flat
        for name, parameter in made.get_decoder().named_parameters():
            if "_proj" in name:
                parameter.normal_(std=0.4)
    return made.eval()


def pictures(family, count):
    """The pixel inputs of some pictures."""
    generator = torch.Generator().manual_seed(1)
    if family.startswith("qwen"):
        pixels = torch.randn(count * 48, 3 * 2 * 4 * 4, generator=generator)
        return {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 6, 8]] * count)}
    if family == "llava_next":
        pixels = torch.randn(count, 3, 3, 16, 16, generator=generator)
        return {"pixel_values": pixels, "image_sizes": torch.tensor([[16, 32]] * count)}
    pixels = torch.randn(count, 3, 16, 16, generator=generator)
    return {"pixel_values": pixels[None] if family in ("smolvlm", "idefics3") else pixels}


def tokens_per_picture(model, family):
    with torch.no_grad():
        features = model.model.get_image_features(**pictures(family, 1), return_dict=True).pooler_output
    return sum(len(x) for x in features)


def batch_of(model, family, rows=1):
    """A left-padded batch: one picture, then a longer question, then (third row) text alone."""
    size = tokens_per_picture(model, family)
    picture = [START, *[IMAGE] * size, END]
    texts = [[1, 5, *picture, 7, 8, 9, MARKER], [1, *picture, 11, 12, 13, 14, 15, MARKER], [1, 21, 22, 23, MARKER]][
        :rows
    ]
    length = max(map(len, texts))
    ids = torch.tensor([[PAD] * (length - len(text)) + text for text in texts])
    inputs = {"input_ids": ids, "attention_mask": (ids != PAD).long(), **pictures(family, min(rows, 2))}
    if family.startswith("qwen"):
        inputs["mm_token_type_ids"] = (ids == IMAGE).long()
    if family in ("smolvlm", "idefics3") and rows > 1:  # one picture a row; a row without has one of zeros
        pixels = inputs["pixel_values"][0][:, None]
        inputs["pixel_values"] = torch.cat([pixels, torch.zeros(rows - 2, 1, *pixels.shape[2:])])
    return inputs


@pytest.fixture(scope="session")
def build():
    return make


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def model(family):
    return make(family)


@pytest.fixture(scope="module")
def batch(model, family):
    return lambda rows: batch_of(model, family, rows)


@pytest.fixture(scope="module")
def llava():
    return make("llava")


@pytest.fixture(scope="module")
def llava_batch(llava):
    return lambda rows: batch_of(llava, "llava", rows)
