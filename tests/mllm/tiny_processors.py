"""Processors for the tiny models of conftest.py: words of one token each, pictures of few tokens."""

import importlib.util
from pathlib import Path

import numpy as np
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

_spec = importlib.util.spec_from_file_location("tiny_models", Path(__file__).with_name("conftest.py"))
tiny = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tiny)

SPECIAL = {
    "<pad>": tiny.PAD,
    "<s>": 1,
    "<unk>": 2,
    "<end_of_utterance>": 87,
    "<global-img>": 88,
    "<fake_token_around_image>": 89,
    "<image>": tiny.IMAGE,
    "<video>": tiny.VIDEO,
    "<img>": tiny.START,
    "</img>": tiny.END,
    "<assistant>": tiny.MARKER,
    "</s>": tiny.TEXT["eos_token_id"],
}
WORDS = "user what where is the rocket a how many left of are there yes no red blue write general description image ."
TEMPLATE = """{% for turn in messages %}{{ 'user ' if turn.role == 'user' else '<assistant> ' }}\
{% for part in turn.content %}{{ IMAGE if part.type == 'image' else part.text }} {% endfor %}{% endfor %}\
{% if add_generation_prompt %}<assistant>{% endif %}"""
SIDE = {"height": 16, "width": 16}


def tokenizer():
    words = [*WORDS.split(), *(f"w{number}" for number in range(96))]
    free = [number for number in range(96) if number not in SPECIAL.values()]
    words = Tokenizer(models.WordLevel(SPECIAL | dict(zip(words, free)), unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<assistant>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"],
        extra_special_tokens={
            "image_token": "<image>",
            "video_token": "<video>",
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<image>",
        },
    )


def processor(family):
    """The processor of a family."""
    words, kinds = tokenizer(), transformers
    image = "'<img> <image> </img>'" if family.startswith("qwen") else "'<image>'"
    talk = {"chat_template": TEMPLATE.replace("IMAGE", image)}
    if family.startswith("llava"):
        patches = {"patch_size": 4, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
        size = {"size": {"shortest_edge": 16}, "crop_size": SIDE}
        if family == "llava":
            return kinds.LlavaProcessor(kinds.CLIPImageProcessor(**size), words, **patches, **talk)
        pictures = kinds.LlavaNextImageProcessor(**size, image_grid_pinpoints=[[16, 32], [32, 16]])
        return kinds.LlavaNextProcessor(pictures, words, **patches, **talk)
    if family.startswith("qwen"):
        kind = kinds.Qwen2VLProcessor if family == "qwen2_vl" else kinds.Qwen2_5_VLProcessor
        pictures = kinds.Qwen2VLImageProcessor(patch_size=4, merge_size=2, min_pixels=64, max_pixels=32 * 48)
        return kind(pictures, words, kinds.Qwen2VLVideoProcessor(), **talk)
    if family == "internvl":
        pictures = kinds.GotOcr2ImageProcessor(size=SIDE, crop_to_patches=True, max_patches=4)
        return kinds.InternVLProcessor(pictures, words, kinds.InternVLVideoProcessor(), image_seq_length=4, **talk)
    tiles = {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 16}}
    if family == "idefics3":
        return kinds.Idefics3Processor(kinds.Idefics3ImageProcessor(**tiles), words, image_seq_len=4, **talk)
    pictures = kinds.SmolVLMImageProcessor(**tiles)
    return kinds.SmolVLMProcessor(pictures, words, kinds.SmolVLMVideoProcessor(), image_seq_len=4, **talk)


def picture(seed=0, width=96, height=64):
    """Coarse noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
