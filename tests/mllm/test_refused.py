"""What would be computed wrongly, or as if nothing was accelerated, is refused in one sentence; FlashAttention goes."""

import warnings

import pytest
import torch
import transformers
from against_plain import GREEDY, MARKER, continued, generated, logits, masked, seen_by_layers
from transformers.integrations.flash_attention import flash_attention_forward

from zoo.mllm import MoD, accelerate, families

CHANGES = [
    {"reduce": "uniform"},
    {"reduce": "fastv:layer=2,keep=0.5"},
    {"reduce": "zipvl:tau=0.8"},
    {"depth": (2, 4)},
    {"mask": "mma", "prompt_end": [MARKER]},
]


def start(model, change):
    depth = {"depth": MoD(0.5, change["depth"])} if "depth" in change else {}
    return accelerate(model, **{**change, **depth})


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_assisted_decoding_is_refused(llava, llava_batch, change):
    """Candidates come with the prompt, and would be taken for its end."""
    inputs, assistant = llava_batch(1), llava.model.language_model
    options = {"max_new_tokens": 6, **GREEDY}
    assert llava.generate(**inputs, **options, prompt_lookup_num_tokens=2).shape[1] > inputs["input_ids"].shape[1]
    with start(llava, change), pytest.raises(ValueError, match="cannot be cut back: generate without an assistant"):
        llava.generate(**inputs, **options, prompt_lookup_num_tokens=2)
    assert assistant is llava.get_decoder()


@pytest.mark.parametrize("reduce", ["random:keep=0.5", "fastv:layer=2,keep=0.5", "sparsevlm:layers=2,keep=0.5"])
def test_all_beams_see_the_same(llava, llava_batch, reduce):
    """What beam search says of its answers is what the plain model does, with what was dropped masked."""
    inputs = llava_batch(3)
    inputs = {name: inputs[name][:2] for name in ("input_ids", "attention_mask", "pixel_values")}
    reduce += ",recycle=false" if "sparse" in reduce else ""
    with accelerate(llava, reduce) as handle:
        out = llava.generate(
            **inputs, num_beams=3, max_new_tokens=4, **GREEDY,
            return_dict_in_generate=True, output_scores=True, length_penalty=0.0,
        )  # fmt: skip
        seen = seen_by_layers(handle)
    for beam in range(1, 3):
        assert torch.equal(seen[:, ::3], seen[:, beam::3])
    last = inputs["input_ids"].shape[1] - 1
    want = masked(llava, continued(inputs, out.sequences), seen[:, ::3])[:, last:-1]
    chosen = want.log_softmax(-1).gather(2, out.sequences[:, last + 1 :, None])
    torch.testing.assert_close(out.sequences_scores, chosen.sum((1, 2)), atol=1e-4, rtol=1e-4)


def test_versions_that_were_not_tested_warn_once(llava, monkeypatch):
    families.warn_of_version.cache_clear()
    monkeypatch.setattr("transformers.__version__", "5.16.2")
    with pytest.warns(UserWarning, match=r"transformers 5\.16\.2 was not tested with zoo\.mllm, 5\.17 to 5\.24 were"):
        accelerate(llava).remove()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        accelerate(llava).remove()
        for version in ("5.17.0", "5.24.3.dev0"):
            families.warn_of_version.cache_clear()
            monkeypatch.setattr("transformers.__version__", version)
            accelerate(llava).remove()
    families.warn_of_version.cache_clear()
    monkeypatch.setattr("transformers.__version__", "6.0.0")
    with pytest.warns(UserWarning, match="was not tested"):
        accelerate(llava).remove()
    families.warn_of_version.cache_clear()


# ---- FlashAttention


def flash_attention(module, query, key, value, attention_mask, scaling=None, position_ids=None, **kwargs):
    """What transformers' FlashAttention does, by SDPA: flat masks, and positions with gaps are packed sequences."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    assert attention_mask is None or attention_mask.shape == (len(key), key.shape[2])
    if position_ids is not None and len(query) == 1:
        assert (position_ids.diff(dim=-1) == 1).all(), "packed sequences"
    count = query.shape[2]
    mask = torch.ones(count, key.shape[2], dtype=torch.bool).tril(key.shape[2] - count)[None, None]
    if attention_mask is not None:
        mask = mask & attention_mask[:, None, None].bool()
    return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, is_causal=False)


@pytest.fixture
def flash(build):
    """A model whose decoder believes that it has FlashAttention."""
    model = build("llava")
    transformers.AttentionInterface.register("flash_attention_2", flash_attention)
    model.get_decoder().config._attn_implementation = "flash_attention_2"
    yield model
    transformers.AttentionInterface.register("flash_attention_2", flash_attention_forward)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"reduce": "uniform:keep=0.5"},
        {"reduce": "random:layer=2,keep=0.5"},
        {"reduce": "visionzip:keep=0.5"},
        {"reduce": ["divprune:keep=0.7", "pyramiddrop:layers=1/3,keep=0.5"]},
        {"depth": (2, 4)},
        {"reduce": "uniform:layer=1,keep=0.6", "depth": (2, 4)},
    ],
    ids=str,
)
def test_flash_attention_where_no_custom_mask_is_needed(flash, llava, llava_batch, rows, change):
    found, inputs = [], llava_batch(rows)
    for model in (flash, llava):
        torch.manual_seed(0)
        with start(model, change):
            found.append(generated(model, inputs)[1])
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)
    assert flash.get_decoder().config._attn_implementation == "flash_attention_2"


@pytest.mark.parametrize(
    ("change", "who"),
    [
        ({"mask": "mma", "prompt_end": [MARKER]}, "The mask mma"),
        ({"mask": "framewise"}, "The mask framewise"),
        ({"reduce": "fastv:layer=2,keep=0.5"}, "FastV"),
        ({"reduce": "sparsevlm:layers=2,keep=0.5"}, "SparseVLM"),
        ({"reduce": "zipvl:tau=0.9"}, "ZipVL"),
        ({"reduce": "yopo:window=3"}, "YOPO"),
    ],
)
def test_flash_attention_with_custom_masks_is_refused(flash, change, who):
    message = f"{who} needs an attention that takes custom masks and shows its scores, but the model uses 'flash_att"
    with pytest.raises(ValueError, match=message):
        accelerate(flash, **change)
    accelerate(flash, "uniform").remove()
    with accelerate(flash, "uniform"), pytest.raises(ValueError, match="accelerated already"):
        accelerate(flash, "uniform")


def test_other_attentions_are_refused(build, llava_batch):
    model = build("llava")
    plain = logits(model, llava_batch(1))
    model.model.vision_tower.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="The vision tower uses the attention 'flex_attention', which shows no scores"):
        accelerate(model, "visionzip")
    model.model.vision_tower.config._attn_implementation = "sdpa"
    assert torch.equal(logits(model, llava_batch(1)), plain)
    model.get_decoder().config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="uses the attention 'flex_attention', expected SDPA, eager or FlashAttention"):
        accelerate(model)


def test_a_decoder_on_several_devices_is_refused(build):
    model = build("llava")
    model.get_decoder().layers[4].to("meta")
    with pytest.raises(ValueError, match="The decoder is spread over cpu, meta: load it on one device"):
        accelerate(model)
