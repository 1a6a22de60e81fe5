"""A model, data and settings small enough to train in a test: squares are red or blue, left or right."""

import json

import numpy as np
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

from zoo.mllm import VisionLanguageModel

_WORDS = "<pad> <unk> <end> <user> <assistant> what colour is it ? where red blue left right"
WORDS = _WORDS.split()
TEMPLATE = (
    "{% for turn in messages %}<{{ turn['role'] }}> {{ turn['content'] }}{{ ' <end> ' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
COLOURS = {"red": (230, 30, 30), "blue": (30, 60, 230)}


def language_model(folder):
    """A LLaMA of three layers and its tokenizer, one token for each word."""
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<end>", unk_token="<unk>", chat_template=TEMPLATE
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=2,
        initializer_range=0.3,  # so that a frozen head can say something with certainty
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)


def data(folder, count=16):
    """Pictures and a file in LLaVA's format with two questions about each."""
    random = np.random.default_rng(0)
    records = []
    for number in range(count):
        colour, side = ("red", "blue")[number % 2], ("left", "right")[number // 2 % 2]
        picture = np.full((32, 32, 3), random.integers(80, 180), np.uint8)
        left, top = (2 if side == "left" else 18) + random.integers(0, 3), random.integers(2, 18)
        picture[top : top + 10, left : left + 10] = COLOURS[colour]
        Image.fromarray(picture).save(folder / f"{number}.png")
        texts = ["<image>\nwhat colour is it ?", colour, "where is it ?", side]
        turns = [{"from": ("human", "gpt")[place % 2], "value": text} for place, text in enumerate(texts)]
        record = {"id": str(number), "image": f"{number}.png", "conversations": turns, "kinds": ["colour", "where"]}
        records.append(record)
    (folder / "train.json").write_text(json.dumps(records))


def model(folder):
    """In ``folder / "model"`` a model with fresh weights that sees 16 tokens of a picture; after the other two."""
    torch.manual_seed(0)
    made, processor = VisionLanguageModel.compose(
        "test_resnet", folder / "lm", stages=(2,), image_size=32, pretrained=False
    )
    pictures = [Image.open(folder / f"{number}.png") for number in range(4)]
    inputs = processor(text="<image>" * 4, images=pictures)
    with torch.no_grad():  # tokens that differ, so that answers depend on the picture
        tokens = made.get_image_features(inputs["pixel_values"]).pooler_output.flatten(0, 1)
        last = made.projector.layers[-1]
        last.weight /= tokens.std(0)[:, None]
        last.bias.sub_(tokens.mean(0)).div_(tokens.std(0))
    made.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")


def settings(folder, output, **changes):
    """Values of a configuration of the stage align; see ``instruct``."""
    return {
        "data": str(folder / "train.json"),
        "stage": "align",
        "output": str(output),
        "tower": "test_resnet",
        "tower_checkpoint": str(folder / "tower.safetensors"),
        "stages": [2],
        "image_size": 32,
        "language_model": str(folder / "lm"),
        "batch_size": 4,
        "steps": 6,
        "lr": 5e-3,
        "warmup": 2,
        "workers": 0,
        "cpu": True,
        "log_every": 1,
        "checkpoint_every": 2,
        "export_half": True,
    } | changes
