"""ViCrop: where a model looks, which window is cut out, and that the answer is that of the model with both pictures."""

import numpy as np
import pytest
import tiny_composed
import tiny_processors as tiny
import torch
from PIL import Image

from zoo.mllm import FastV, ViCrop, accelerate
from zoo.mllm.look import looking
from zoo.mllm.prompts import encode, message
from zoo.mllm.vicrop import GENERAL, RATIOS, best_window
from zoo.mllm.views import whole_pixels, whole_view

pytest.importorskip("transformers")

QUESTION = "where is the rocket"


@pytest.fixture(scope="module")
def processor(family):
    return tiny.processor(family)


def ask(model, processor, *pictures, question=QUESTION):
    return dict(encode(model, processor, [[message("user", question, pictures)]]))


# ---- windows


def slow_window(importance, size, window):
    """The rule, written out."""
    rows, columns = importance.shape
    found = []
    for ratio in RATIOS:
        down = min(max(int(window * ratio / (size[1] / rows)), 1), rows)
        across = min(max(int(window * ratio / (size[0] / columns)), 1), columns)
        sums = {
            (top, left): float(importance[top : top + down, left : left + across].double().sum())
            for top in range(rows - down + 1)
            for left in range(columns - across + 1)
        }
        (top, left), most = max(sums.items(), key=lambda item: item[1])
        beside = [
            sums[place] for dy, dx in ((-1, 0), (1, 0), (0, -1), (0, 1)) if (place := (top + dy, left + dx)) in sums
        ]
        contrast = (most - sum(beside) / len(beside)) / (down * across) if beside else 0.0
        found.append((contrast, (left, top, left + across, top + down)))
    left, top, right, bottom = max(found, key=lambda one: one[0])[1]
    x, y = size[0] / columns, size[1] / rows
    return round(left * x), round(top * y), round(right * x), round(bottom * y)


@pytest.mark.parametrize("seed", range(6))
def test_the_window_is_the_one_of_the_rule(seed):
    generator = torch.Generator().manual_seed(seed)
    importance = torch.rand(18, 24, generator=generator) ** 8
    size = (1000 + 37 * seed, 700)
    assert best_window(importance, size, 200) == slow_window(importance, size, 200)


@pytest.mark.parametrize(("side", "want"), [(6, (480, 240, 840, 600)), (10, (480, 240, 1080, 840))])
def test_the_window_fits_what_stands_out(side, want):
    """A token is 60 pixels wide, so the windows are 6, 7, 8, 9, 10 and 12 tokens wide."""
    importance = torch.full((24, 24), 0.01)
    importance[4 : 4 + side, 8 : 8 + side] = 1.0
    assert best_window(importance, (1440, 1440), 360) == want


def test_a_small_picture_is_taken_whole():
    assert best_window(torch.rand(5, 7), (300, 200), 336) == (0, 0, 300, 200)


def test_a_flat_map_takes_the_first_of_the_smallest():
    assert best_window(torch.ones(10, 10), (1000, 1000), 300) == (0, 0, 300, 300)


# ---- where the tokens of the picture are


def test_each_token_is_where_its_pixels_are(build, family, processor):
    """With towers whose attention does nothing, a token depends on its own pixels alone."""
    model = build(family)
    tower = next(
        part for name, part in model.model.named_children() if name in ("vision_tower", "visual", "vision_model")
    )
    with torch.no_grad():
        for name, parameter in tower.named_parameters():
            if ".attn.proj." in name or "out_proj" in name or "projection_layer" in name:
                parameter.zero_()
    seen = []
    handle = model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    inputs = ask(model, processor, tiny.picture(width=64, height=32 if family.startswith("qwen") else 64))
    inputs["pixel_values"].requires_grad_()
    model(**inputs, use_cache=False)
    handle.remove()
    view = whole_view(model.config, inputs)
    assert len(view.places) == view.rows * view.columns > 3
    assert (inputs["input_ids"][0, view.places] == tiny.tiny.IMAGE).all()
    for number, place in enumerate(view.places):
        (slope,) = torch.autograd.grad(seen[0][0, place].abs().sum(), inputs["pixel_values"], retain_graph=True)
        blocks = torch.nn.functional.adaptive_avg_pool2d(
            whole_pixels(model.config, inputs, slope).abs().sum(0)[None], (view.rows, view.columns)
        )
        assert blocks.flatten().nonzero().flatten().tolist() == [number]


def test_the_pixels_are_those_of_the_whole_picture(model, family, processor):
    picture = tiny.picture(width=96, height=64)
    inputs = ask(model, processor, picture)
    pixels = whole_pixels(model.config, inputs, inputs["pixel_values"]).mean(0)
    if family == "llava":  # whose processor cuts the sides off
        picture = picture.crop((16, 0, 80, 64))
    small = np.asarray(picture.resize(pixels.shape[::-1], Image.Resampling.BICUBIC), np.float32).mean(2)
    assert np.corrcoef(small.ravel(), pixels.flatten().numpy())[0, 1] > 0.97


def test_two_pictures_are_no_view(model, family, processor):
    if family in ("llava", "qwen2_vl"):
        with pytest.raises(ValueError, match="give one picture"):
            whole_view(model.config, ask(model, processor, tiny.picture(), tiny.picture(1)))


# ---- importance


def eager(build, family, inputs, layer):
    """Attention of all heads and its gradient, by transformers and autograd."""
    model = build(family, "eager")
    output = model(**inputs, use_cache=False, output_attentions=True)
    confidence = output.logits[0, -1].log_softmax(-1).max()
    (slope,) = torch.autograd.grad(confidence, output.attentions[layer])
    return output.attentions[layer][0, :, -1].detach(), slope[0, :, -1]


def test_attention_and_gradient_equal_those_of_eager_attention(build, model, family, processor):
    picture = tiny.picture(width=64, height=64)
    inputs, general = ask(model, processor, picture), ask(model, processor, picture, question=GENERAL)
    view, other = whole_view(model.config, inputs), whole_view(model.config, general)
    attention, slope = eager(build, family, inputs, 3)
    described, _ = eager(build, family, general, 3)
    shape = (view.rows, view.columns)
    want = attention.mean(0)[view.places] / described.mean(0)[other.places]
    found = ViCrop(model, processor, layer=3).importance(picture, QUESTION)
    torch.testing.assert_close(found, want.view(shape), rtol=1e-4, atol=1e-6)
    assert found.std() > 0.01
    want = (attention * slope.relu()).mean(0)[view.places].view(shape)
    found = ViCrop(model, processor, "grad-att", layer=3).importance(picture, QUESTION)
    torch.testing.assert_close(found, want, rtol=1e-3, atol=1e-9)
    assert found.max() > 0


def test_pure_gradient_is_that_of_the_pixels_at_edges(model, family, processor):
    """Half of the picture has no edge, so that half of the map is zero; the other half is the mean of the gradient."""
    pixels = np.full((64, 64, 3), 128, np.uint8)
    pixels[:, 40:] = np.random.default_rng(0).integers(0, 256, (64, 24, 3))
    picture = Image.fromarray(pixels)
    found = ViCrop(model, processor, "pure-grad").importance(picture, QUESTION)
    columns = found.shape[1]
    assert (found[:, : columns // 2 - 1 + columns % 2] == 0).all() if columns > 2 else True
    assert (found[:, -1] > 0).all()
    inputs = ask(model, processor, picture)
    inputs["pixel_values"].requires_grad_()
    logits = model(**inputs, use_cache=False).logits[0, -1]
    (slope,) = torch.autograd.grad(logits.log_softmax(-1).max(), inputs["pixel_values"])
    size = whole_pixels(model.config, inputs, slope).norm(dim=0)
    bound = torch.nn.functional.adaptive_avg_pool2d(size[None], found.shape)[0]
    assert (found <= bound * 1.0001).all()
    assert (found[:, -1] > 0.2 * bound[:, -1]).all()


def test_relative_attention_ignores_what_any_question_attends_to(build, monkeypatch):
    """Planted: a strong place that the general prompt has too, and a weaker one that only the question has."""
    model, processor = build("llava"), tiny.processor("llava")
    anywhere, asked = torch.full((12, 12), 0.1), torch.full((12, 12), 0.1)
    anywhere[1:4, 1:4] = asked[1:4, 1:4] = 5.0
    asked[7:10, 8:11] = 1.0
    texts = []

    def inputs(self, picture, question):
        texts.append(question)
        return {"question": question}

    monkeypatch.setattr(ViCrop, "_inputs", inputs)
    monkeypatch.setattr(
        ViCrop, "_attention", lambda self, x, gradient=False: asked if x["question"] == "q" else anywhere
    )
    picture = tiny.picture(width=600, height=600)
    (box,) = ViCrop(model, processor, window=150).boxes([picture], ["q"])
    assert box == (400, 350, 550, 500)
    assert texts == ["q", GENERAL]
    (box,) = ViCrop(model, processor, "grad-att", window=150).boxes([picture], ["q"])
    assert box == (50, 50, 200, 200)


def test_large_pictures_are_looked_at_in_pieces(build, monkeypatch):
    sizes = []

    def brightness(self, picture, question):
        sizes.append(picture.size)
        small = np.asarray(picture.convert("L").resize((6, 6), Image.Resampling.BOX), np.float32)
        return torch.from_numpy(small)

    monkeypatch.setattr(ViCrop, "_importance", brightness)
    picture = Image.new("RGB", (1500, 900))
    picture.paste("white", (1000, 300, 1250, 450))
    look = ViCrop(build("llava"), tiny.processor("llava"), window=250)
    importance = look.importance(picture, QUESTION)
    assert sizes == [(750, 900), (750, 900)] and importance.shape == (6, 12)
    assert importance.nonzero().tolist() == [[2, 8], [2, 9]]
    (box,) = look.boxes([picture], [QUESTION])
    assert box[0] <= 1000 and box[1] <= 300 and box[2] >= 1250 and box[3] >= 450


@pytest.mark.parametrize("method", ["rel-att", "grad-att", "pure-grad"])
def test_a_look_leaves_the_model_as_it_was(build, method):
    model, processor = build("llava"), tiny.processor("llava")
    model.model.multi_modal_projector.requires_grad_(False)
    inputs = ask(model, processor, tiny.picture())
    before = model(**inputs).logits
    trained = [parameter.requires_grad for parameter in model.parameters()]
    with torch.inference_mode():
        ViCrop(model, processor, method).importance(tiny.picture(), QUESTION)
    assert model.get_decoder().config._attn_implementation == "sdpa"
    assert [parameter.requires_grad for parameter in model.parameters()] == trained
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(model(**inputs).logits, before)


def test_a_look_that_fails_leaves_the_model_as_it_was(build):
    model = build("llava")
    with pytest.raises(KeyError), looking(model, 1, gradient=False):
        raise KeyError
    assert model.get_decoder().config._attn_implementation == "sdpa"
    assert all(parameter.requires_grad for parameter in model.parameters())


# ---- answers


def test_the_answer_is_that_of_the_picture_and_its_crop(model, family, processor):
    pictures, questions = [tiny.picture(), tiny.picture(1, 64, 80)], [QUESTION, "how many are there"]
    look = ViCrop(model, processor, window=24)
    boxes = look.boxes(pictures, questions)
    assert all((right - left, bottom - top) != one.size for (left, top, right, bottom), one in zip(boxes, pictures))
    length = {"min_new_tokens": 3, "max_new_tokens": 5}
    answers = look.generate(pictures, questions, **length)
    for picture, question, box, answer in zip(pictures, questions, boxes, answers):
        inputs = ask(model, processor, picture, picture.crop(box), question=question)
        ids = model.generate(**inputs, **length, do_sample=False, suppress_tokens=[tiny.tiny.IMAGE])
        want = processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert answer == want and want
        assert look.generate([picture], [question], [box], **length) == [want]


def test_with_fewer_tokens_after_the_look(build):
    model, processor = build("llava"), tiny.processor("llava")
    look, pictures = ViCrop(model, processor, window=24), [tiny.picture()]
    boxes = look.boxes(pictures, [QUESTION])
    with accelerate(model, FastV(0.25, 1)) as handle:
        assert look.generate(pictures, [QUESTION], boxes, max_new_tokens=3)
        assert handle.report()["visual_tokens_per_layer"][-1] == 8  # of 2 x 16
        with pytest.raises(ValueError, match="call remove"):
            look.boxes(pictures, [QUESTION])


def test_the_layer_is_that_of_the_paper_for_its_models(build):
    words = tiny.processor("llava")
    model = build("llava")
    assert ViCrop(model, words).layer == 2
    model.get_decoder().layers = torch.nn.ModuleList([model.get_decoder().layers[0]] * 32)
    assert ViCrop(model, words).layer == 14
    model = build("qwen2_5_vl")
    model.get_decoder().layers = torch.nn.ModuleList([model.get_decoder().layers[0]] * 28)
    assert ViCrop(model, words).layer == 22


def test_what_is_wrong_is_named(build):
    model, processor = build("llava"), tiny.processor("llava")
    with pytest.raises(ValueError, match="the family 'Linear'"):
        ViCrop(torch.nn.Linear(1, 1), processor)
    with pytest.raises(ValueError, match="method is 'att', expected one of rel-att"):
        ViCrop(model, processor, "att")
    with pytest.raises(ValueError, match="layer is 5, but the decoder has 5 layers"):
        ViCrop(model, processor, layer=5)
    with pytest.raises(ValueError, match="window is 0"):
        ViCrop(model, processor, window=0)
    for questions in (QUESTION, [QUESTION] * 2):
        with pytest.raises(ValueError, match="as many questions as pictures"):
            ViCrop(model, processor).boxes([tiny.picture()], questions)
    with pytest.raises(ValueError, match="holds <image>"):
        ViCrop(model, processor).boxes([tiny.picture()], ["what is <image>"])
    processor.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        ViCrop(model, processor).boxes([tiny.picture()], [QUESTION])


@pytest.mark.parametrize("options", [{}, {"max_tiles": 4}, {"image_size": 64, "projector": "pixel_shuffle:factor=2"}])
def test_a_composed_model_looks_and_answers(options):
    """Where it looks is what eager attention says of the tile that shows all of a picture."""
    model, processor = tiny_composed.compose(**options)
    eager, _ = tiny_composed.compose(tiny_composed.language_model("eager"), **options)
    wide = tiny_composed.picture(width=64, height=32)
    found, maps = ViCrop(model, processor, layer=1).importance(wide, QUESTION), []
    for question in (QUESTION, GENERAL):
        inputs = ask(model, processor, wide.resize((64, 64)), question=question)
        with torch.no_grad():
            attention = eager(**inputs, output_attentions=True).attentions[1][0, :, -1].mean(0)
        maps.append(attention[inputs["input_ids"][0] == model.config.image_token_id][:4].view(2, 2))
    torch.testing.assert_close(found, maps[0] / maps[1], rtol=1e-4, atol=1e-6)
    for method in ("rel-att", "grad-att", "pure-grad"):
        look = ViCrop(model, processor, method, window=20)
        boxes = look.boxes([wide], [QUESTION])
        assert boxes[0] != (0, 0, *wide.size)
        assert look.generate([wide], [QUESTION], boxes, min_new_tokens=3, max_new_tokens=3)[0]


def test_a_resampler_has_no_view():
    model, processor = tiny_composed.compose(projector="resampler:queries=4,depth=1")
    with pytest.raises(ValueError, match="The tokens of a resampler belong to no part of a picture"):
        ViCrop(model, processor).importance(tiny_composed.picture(), QUESTION)
