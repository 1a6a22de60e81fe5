"""AGLA: what is blacked out, how logits are assembled, and that both views go on with the same tokens."""

import math

import numpy as np
import pytest
import tiny_processors as tiny
import torch
from PIL import Image

from zoo.mllm import AGLA, BlipMatcher, FastV, accelerate
from zoo.mllm.agla import assemble, local_view
from zoo.mllm.prompts import encode, message

transformers = pytest.importorskip("transformers")

QUESTION = "where is the rocket"
LENGTH = {"min_new_tokens": 4, "max_new_tokens": 5}


@pytest.fixture(scope="module")
def processor(family):
    return tiny.processor(family)


def left_half(picture, question):
    """A matcher: the left matters, and half of what may go goes."""
    return torch.tensor([[1.0, 0.0]]), 1.0


# ---- the formulas


def test_logits_are_added_and_only_the_plausible_stay():
    """By hand: exp(1.0 - 2.0) is below 0.5, exp(1.4 - 2.0) is above."""
    original = torch.tensor([[2.0, 1.4, 1.0, -math.inf], [0.0, 5.0, 4.9, 0.0]])
    local = torch.tensor([[0.5, 3.0, 90.0, -math.inf], [9.0, -1.0, 1.0, 9.0]])
    want = torch.tensor([[3.0, 7.4, -math.inf, -math.inf], [-math.inf, 3.0, 6.9, -math.inf]])
    torch.testing.assert_close(assemble(original, local, 2.0, 0.5), want)


def test_without_weight_and_constraint_the_original_is_left():
    original = torch.tensor([[2.0, 1.0, -3.0, -math.inf]])
    local = torch.tensor([[0.0, 4.0, 1.0, -math.inf]])
    assert torch.equal(assemble(original, local, 0.0, 1e-9), original)
    assert assemble(original, local, 1.0, 1.0).argmax() == 0  # the likeliest alone is plausible


@pytest.mark.parametrize("match", [0.0, 0.4, 1.0])
def test_the_most_important_pixels_stay(match):
    picture = Image.fromarray(np.random.default_rng(0).integers(1, 256, (40, 60, 3), dtype=np.uint8))
    importance = torch.rand(8, 12, generator=torch.Generator().manual_seed(0))
    view = local_view(picture, importance, match)
    before, after = np.asarray(picture), np.asarray(view)
    kept = (after == before).all(2)
    assert (after[~kept] == 0).all()
    assert kept.sum() == round(2400 * (1 - match / 2))
    smooth = torch.nn.functional.interpolate(importance[None, None], (40, 60), mode="bilinear")[0, 0].numpy()
    assert match == 0 or smooth[kept].min() >= smooth[~kept].max()


def test_the_half_that_matters_stays():
    picture = Image.new("RGB", (100, 50), "white")
    after = np.asarray(local_view(picture, torch.tensor([[1.0, 0.0]]), 1.0)).mean((0, 2))
    assert (after[:50] == 255).all() and (after[50:] == 0).all()


@pytest.mark.parametrize(("size", "match"), [((4,), 0.5), ((2, 2), 1.5), ((2, 2), -0.1)])
def test_a_wrong_match_is_named(size, match):
    with pytest.raises(ValueError, match="The matcher gave importance of shape"):
        local_view(Image.new("RGB", (8, 8)), torch.ones(size), match)


# ---- answers


def two_caches(model, processor, picture, question, alpha, beta):
    """The method written out: each view with a forward pass and a full sequence of its own; token by token."""
    local = local_view(picture, *left_half(picture, question))
    views = [encode(model, processor, [[message("user", question, [one])]]) for one in (picture, local)]
    tokens = []
    for step in range(5):
        logits = []
        for inputs in views:
            more = torch.tensor([tokens], dtype=torch.long)
            whole = {**inputs, "input_ids": torch.cat([inputs["input_ids"], more], 1)}
            whole["attention_mask"] = torch.ones_like(whole["input_ids"])
            if "mm_token_type_ids" in whole:
                whole["mm_token_type_ids"] = (whole["input_ids"] == tiny.tiny.IMAGE).long()
            with torch.no_grad():
                last = model(**whole).logits[:, -1].clone()
            last[:, tiny.tiny.IMAGE] = -math.inf
            last[:, tiny.tiny.VIDEO] = -math.inf if "mm_token_type_ids" in whole else last[:, tiny.tiny.VIDEO]
            if step < 4:
                last[:, tiny.tiny.TEXT["eos_token_id"]] = -math.inf
            logits.append(last)
        tokens.append(int(assemble(*logits, alpha, beta).argmax()))
    return processor.tokenizer.decode(tokens, skip_special_tokens=True)


def test_the_answer_is_that_of_two_models_side_by_side(model, family, processor):
    pictures, questions = [tiny.picture(), tiny.picture(1, 80, 64)], [QUESTION, "how many are there"]
    helper = AGLA(model, processor, left_half, alpha=4.0, beta=1e-3)
    answers = helper.generate(pictures, questions, **LENGTH)
    want = [two_caches(model, processor, *pair, 4.0, 1e-3) for pair in zip(pictures, questions)]
    assert answers == want
    plain = AGLA(model, processor, left_half, alpha=0.0).generate(pictures, questions, **LENGTH)
    assert plain != answers
    assert plain == [two_caches(model, processor, *pair, 0.0, 0.5) for pair in zip(pictures, questions)]


def test_drawn_tokens_are_the_same_for_both_views_and_plausible(build):
    model, processor = build("llava"), tiny.processor("llava")
    helper, seen = AGLA(model, processor, left_half, beta=0.2, temperature=3.0), []
    choose = helper._choose

    def watch(input_ids, scores):
        found = choose(input_ids, scores)
        assert torch.equal(*input_ids[:, -len(seen) :].chunk(2)) if seen else True
        assert torch.equal(*found.chunk(2)) and (found == 0).sum() == len(found)
        plausible = scores[:1] >= scores[:1].max() + math.log(0.2)
        assert plausible[found[:1] == 0].all()
        seen.append(int(found[0].argmax()))
        return found

    helper._choose = watch
    answers = set()
    for seed in range(4):
        torch.manual_seed(seed)
        seen.clear()
        answers.add(*helper.generate([tiny.picture()], [QUESTION], **LENGTH))
    assert len(answers) > 1


def test_drawing_follows_the_assembled_distribution(build):
    helper = AGLA(build("llava"), tiny.processor("llava"), left_half, alpha=1.0, beta=0.1, temperature=2.0)
    original, local = torch.tensor([[1.0, 0.5, 0.0, -9.0]]), torch.tensor([[0.0, 1.0, 0.5, 50.0]])
    torch.manual_seed(0)
    drawn = helper._choose(None, torch.cat([original.repeat(4000, 1), local.repeat(4000, 1)]))[:4000]
    share = (drawn == 0).float().mean(0)
    want = torch.tensor([1.0, 1.5, 0.5]).div(2).softmax(0)
    torch.testing.assert_close(share, torch.cat([want, torch.zeros(1)]), atol=0.03, rtol=0)


def test_with_fewer_tokens(build):
    model, processor = build("llava"), tiny.processor("llava")
    helper = AGLA(model, processor, left_half, alpha=4.0, beta=1e-3)
    with accelerate(model, FastV(0.25, 1)) as handle:
        assert helper.generate([tiny.picture()], [QUESTION], **LENGTH)
        assert handle.report()["visual_tokens_per_layer"][-1] == 8  # 4 of 16, of both views


def test_what_is_wrong_is_named(build):
    model, processor = build("llava"), tiny.processor("llava")
    with pytest.raises(ValueError, match="the family 'Linear'"):
        AGLA(torch.nn.Linear(1, 1), processor, left_half)
    for option, message_ in (({"alpha": -1}, "alpha is -1"), ({"beta": 0}, "beta is 0"), ({"temperature": 0}, "None")):
        with pytest.raises(ValueError, match=message_):
            AGLA(model, processor, left_half, **option)
    helper = AGLA(model, processor, left_half)
    with pytest.raises(ValueError, match="as many questions as pictures"):
        helper.generate([tiny.picture()], QUESTION)
    with pytest.raises(ValueError, match="leave out do_sample, num_beams"):
        helper.generate([tiny.picture()], [QUESTION], num_beams=2, do_sample=True)


# ---- BLIP


@pytest.fixture(scope="module")
def blip():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    text = {**sizes, "vocab_size": 96, "encoder_hidden_size": 32, "pad_token_id": 0, "bos_token_id": 1}
    config = transformers.BlipConfig(
        text_config=text, vision_config={**sizes, "image_size": 32, "patch_size": 8}, image_text_hidden_size=16
    )
    model = transformers.BlipForImageTextRetrieval(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    size = {"height": 32, "width": 32}
    return model, transformers.BlipProcessor(transformers.BlipImageProcessor(size=size), tiny.tokenizer())


def test_blip_matches_by_attention_times_gradient(blip):
    """Against a finite difference: a hook adds to one weight of the attention, and the logit changes by the slope."""
    model, processor = blip
    picture = tiny.picture(width=32, height=32)
    relevance, match = BlipMatcher(model, processor, layer=1)(picture, f"the {QUESTION} ?")
    inputs = processor(images=picture, text=f"the {QUESTION} ?", return_tensors="pt")
    module = model.text_encoder.encoder.layer[1].crossattention.self
    weights, slopes = [], []

    def logit(change=None):
        def hook(module, args, output):
            context, attention = output
            weights[:] = [attention.detach().double()]
            if change is None:
                return None
            head, word, patch = change
            value = module.value(inputs["states"]).view(1, -1, 4, 8)[0, patch, head]
            context = context.clone()
            context[0, word, head * 8 : head * 8 + 8] += 1e-3 * value
            return context, attention

        handle = module.register_forward_hook(hook)
        with torch.no_grad():
            score = model(**{name: inputs[name] for name in ("input_ids", "attention_mask", "pixel_values")}).itm_score
        handle.remove()
        return float(score[0, 1])

    with torch.no_grad():
        inputs["states"] = model.vision_model(inputs["pixel_values"]).last_hidden_state
    plain = logit()
    attention = weights[0][0]
    words = range(1, attention.shape[1] - 1)
    patch = int(relevance.argmax())
    for head in range(4):
        slopes.append([(logit((head, word, patch + 1)) - plain) / 1e-3 for word in words])
    want = (attention[:, 1:-1, patch + 1] * torch.tensor(slopes).double().clamp(min=0)).mean()
    assert relevance.shape == (4, 4) and float(relevance.min()) >= 0 and relevance.max() > 2 * relevance.min()
    assert float(relevance.flatten()[patch]) == pytest.approx(float(want), rel=0.02)
    with torch.no_grad():
        vision = model.vision_proj(inputs["states"][:, 0])
        text = model.text_encoder(inputs["input_ids"], inputs["attention_mask"]).last_hidden_state[:, 0]
        cosine = torch.cosine_similarity(vision, model.text_proj(text)).item()
    assert match == pytest.approx(max(cosine, 0), abs=1e-6)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_blip_with_a_model_that_speaks(blip, build):
    helper = AGLA(build("llava"), tiny.processor("llava"), BlipMatcher(*blip, layer=2), alpha=4.0, beta=1e-3)
    assert helper.generate([tiny.picture()], [QUESTION], **LENGTH)[0]


def test_blip_refuses_what_it_is_not(blip, build):
    model, processor = blip
    with pytest.raises(ValueError, match="expected BlipForImageTextRetrieval"):
        BlipMatcher(build("llava"), processor)
    with pytest.raises(ValueError, match="layer is 6, but the text encoder has 3"):
        BlipMatcher(model, processor)
