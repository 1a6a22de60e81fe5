"""Models composed of a tower, a projector and a language model, against the same parts put together by hand."""

import copy

import pytest
import timm
import tiny_composed as tiny
import torch
from against_plain import continued, logits, masked, seen_by_layers
from tiny_composed import GREEDY, SIZE, message, picture
from torch.nn import functional as F

from zoo.mllm import VisionLanguageModel, accelerate
from zoo.mllm.projector import make_projector
from zoo.mllm.towers import Tower

TEXTS = ["<image>What is it?", "Left <image> or right <image> of it?", "no picture", "the end <image>"]
IMAGES = [picture(seed) for seed in range(4)]


@pytest.fixture(scope="module")
def composed():
    return tiny.compose()


@pytest.fixture(scope="module")
def batch(composed):
    return dict(composed[1](text=TEXTS, images=IMAGES))


def alone(processor, row, **options):
    start = sum(text.count("<image>") for text in TEXTS[:row])
    images = IMAGES[start : start + TEXTS[row].count("<image>")]
    return dict(processor(text=TEXTS[row], images=images, **options))


def by_hand(model, inputs):
    """Logits of the language model for embeddings that are put together token by token."""
    tokens = iter(())
    if "pixel_values" in inputs:
        tokens = iter(model.projector(model.tower(inputs["pixel_values"])).flatten(0, 1))
    embed = model.get_input_embeddings()
    ids = inputs["input_ids"][0]
    row = torch.stack([next(tokens) if i == model.config.image_token_id else embed(i) for i in ids])
    assert next(tokens, None) is None
    return model.language_model(inputs_embeds=row[None]).logits[0]


# ---- the model


@torch.no_grad()
def test_left_padded_rows_are_those_by_hand(composed, batch):
    model, processor = composed
    assert processor.tokens_per_tile == 4
    together = model(**batch).logits
    for row in range(len(TEXTS)):
        valid = batch["attention_mask"][row].bool()
        expected = by_hand(model, alone(processor, row))
        torch.testing.assert_close(together[row, valid], expected, atol=1e-4, rtol=1e-5)
    text = alone(processor, 2)
    plain = model.language_model(input_ids=text["input_ids"]).logits
    assert torch.equal(model(**text).logits, plain)


@pytest.mark.parametrize("use_cache", [True, False])
def test_generation_in_a_batch_is_one_by_one(composed, batch, use_cache):
    model, processor = composed
    options = {"max_new_tokens": 5, "use_cache": use_cache, **GREEDY}
    together = model.generate(**batch, **options)[:, -5:]
    single = [model.generate(**alone(processor, row), **options)[0, -5:] for row in range(len(TEXTS))]
    assert torch.equal(together, torch.stack(single))
    other = model.generate(**(batch | {"pixel_values": batch["pixel_values"].flip(0)}), **options)[:, -5:]
    assert [torch.equal(*rows) for rows in zip(together, other)] == [False, False, True, False]  # they are looked at


def test_beams_see_the_pictures_of_their_row(composed):
    model, processor = composed
    inputs = processor(text=TEXTS[:3], images=IMAGES[:3])
    options = {"num_beams": 2, "num_return_sequences": 2, "max_new_tokens": 1, "return_dict_in_generate": True}
    found = model.generate(**inputs, output_scores=True, **options, **GREEDY)
    expected = logits(model, inputs)[:, -1].log_softmax(-1).topk(2).values
    torch.testing.assert_close(found.sequences_scores.view(3, 2), expected)
    with pytest.raises(ValueError, match="tiles of pictures make"):
        model.generate(**(inputs | {"pixel_values": inputs["pixel_values"][:2]}), **options, **GREEDY)


def test_logits_processors_see_ids_of_text_only(composed, batch):
    model, processor = composed
    seen = []

    def look(ids, scores):
        seen.append(ids)
        return scores

    model.generate(**batch, max_new_tokens=2, logits_processor=[look], **GREEDY)
    assert len(seen) == 2
    is_image = batch["input_ids"] == processor.image_token_id
    assert torch.equal(seen[0][~is_image], batch["input_ids"][~is_image])
    assert (seen[0] == seen[0].amin(1, keepdim=True))[is_image].all()
    inputs = alone(processor, 0)
    plain = logits(model, inputs)[0, -1]
    said = inputs["input_ids"].unique()[:-1]
    plain[said] = torch.where(plain[said] < 0, plain[said] * 50, plain[said] / 50)
    found = model.generate(**inputs, max_new_tokens=1, repetition_penalty=50.0, **GREEDY)
    assert found[0, -1] == plain.argmax()


def test_wrong_numbers_of_pictures(composed, batch):
    model, _ = composed
    with pytest.raises(ValueError, match="16 placeholders, but 3 tiles of pictures make 12 tokens"):
        model(**(batch | {"pixel_values": batch["pixel_values"][:3]}))
    with pytest.raises(ValueError, match="16 placeholders, but 0 tiles of pictures make 0 tokens"):
        model(input_ids=batch["input_ids"])
    with pytest.raises(ValueError, match="Pictures need input_ids"):
        model(inputs_embeds=torch.zeros(1, 4, 32), pixel_values=batch["pixel_values"])


def test_the_loss_is_of_the_answers(composed):
    model, processor = composed
    talks = [
        [message("user", IMAGES[0], "What?"), message("assistant", "A cat")],
        [message("user", "Hm?"), message("assistant", "Oh")],
    ]
    inputs = processor.with_labels(talks)
    labels = inputs["labels"][:, 1:]
    expected = F.cross_entropy(logits(model, {k: v for k, v in inputs.items() if k != "labels"})[:, :-1].mT, labels)
    assert float(expected) > 0
    torch.testing.assert_close(model(**inputs).loss, expected)
    everything = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    no_pictures = everything.masked_fill(everything == processor.image_token_id, -100)
    assert torch.equal(*(model(**(inputs | {"labels": one})).loss for one in (everything, no_pictures)))


def test_the_attention_of_the_language_model_stays(composed):
    eager, _ = tiny.compose(tiny.language_model("eager"))
    assert eager.config._attn_implementation == eager.language_model.config._attn_implementation == "eager"
    model = composed[0]
    assert model.config._attn_implementation == model.get_decoder().config._attn_implementation == "sdpa"


# ---- training


def gradients(model, inputs):
    model.zero_grad()
    model(**inputs).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


VAN = {"tower": "van_nano", "image_size": 64, "tower_options": None}


@pytest.mark.parametrize("tower", [tiny.VIT, VAN], ids=["vit", "van"])
def test_gradient_checkpointing(tower):
    model, processor = tiny.compose(**tower)
    inputs = processor.with_labels([[message("user", picture(0), "What?"), message("assistant", "A cat")]] * 2)
    model.train()
    for module in model.modules():  # statistics would be counted twice
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    plain = gradients(model, inputs)
    assert {name.partition(".")[0] for name in plain} == {"tower", "projector", "language_model"}
    calls = []
    block = next(m for n, m in model.tower.named_modules() if n.endswith(("blocks.0", "stages.0.blocks.0")))
    block.register_forward_pre_hook(lambda *_: calls.append(1))
    model.gradient_checkpointing_enable()
    again = gradients(model, inputs)
    assert len(calls) == 2
    assert again.keys() == plain.keys()
    for name, gradient in again.items():
        torch.testing.assert_close(gradient, plain[name], atol=1e-6, rtol=1e-4)
    model.gradient_checkpointing_disable()
    gradients(model, inputs)
    assert len(calls) == 3


def test_a_tower_that_is_not_trained_stays_in_evaluation():
    model, processor = tiny.compose(tower="van_nano", image_size=64, tower_options={"drop_path_rate": 0.5})
    pixels = processor(text="<image>", images=picture())["pixel_values"]
    before = model.get_image_features(pixels).pooler_output
    model.requires_grad_(False)
    model.projector.requires_grad_(True)
    model.train()
    assert model.projector.training
    assert torch.equal(model.get_image_features(pixels).pooler_output, before)
    next(model.tower.parameters()).requires_grad_(True)
    model.train()
    assert not torch.equal(model.get_image_features(pixels).pooler_output, before)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_lora_with_and_without_pictures(checkpointing):
    peft = pytest.importorskip("peft")
    model, processor = tiny.compose()
    model.requires_grad_(False)
    lora = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    peft.inject_adapter_in_model(lora, model.language_model)
    if checkpointing:
        model.gradient_checkpointing_enable()
    model.train()
    for talk in ([message("user", picture(), "What?")], [message("user", "What?")]):
        found = gradients(model, processor.with_labels([[*talk, message("assistant", "A cat")]]))
        assert len(found) == 2 * 7 * 3
        assert all(".lora_" in name and gradient.any() for name, gradient in found.items())


def test_the_trainer_of_transformers(tmp_path):
    pytest.importorskip("accelerate")
    import transformers

    model, processor = tiny.compose()
    model.requires_grad_(False)
    model.projector.requires_grad_(True)
    before = copy.deepcopy(model.state_dict())
    talk = [message("user", picture(), "What?"), message("assistant", "A cat")]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=8,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        gradient_checkpointing=True,
        remove_unused_columns=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(model, arguments, data_collator=processor.with_labels, train_dataset=[talk] * 16)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]
    changed = {name.partition(".")[0] for name, x in model.state_dict().items() if not torch.equal(x, before[name])}
    assert changed == {"projector"}


# ---- accelerated


@pytest.mark.parametrize("rows", [1, 4])
def test_everything_kept_is_the_plain_model(composed, batch, rows):
    model, processor = composed
    inputs = batch if rows > 1 else alone(processor, 0)
    valid = inputs["attention_mask"].bool()
    plain, answer = logits(model, inputs)[valid], model.generate(**inputs, max_new_tokens=3, **GREEDY)
    for keep in (1, 0.99):
        with accelerate(model, [f"uniform:keep={keep}", f"fastv:layer=1,keep={keep}"]) as handle:
            assert torch.equal(logits(model, inputs)[valid], plain)
            assert torch.equal(model.generate(**inputs, max_new_tokens=3, **GREEDY), answer)
            assert handle.report()["visual_tokens_per_layer"] == [4 * len(inputs["pixel_values"])] * 3
    assert torch.equal(logits(model, inputs)[valid], plain)


@pytest.mark.parametrize("reduce", ["fastv:layer=2,keep=0.5", "uniform:keep=0.5"])
def test_dropping_is_masking(composed, reduce):
    model, processor = composed
    inputs = dict(processor(text=TEXTS[:3], images=IMAGES[:3]))
    options = {"max_new_tokens": 3, "return_dict_in_generate": True, "output_logits": True, **GREEDY}
    with accelerate(model, reduce) as handle:
        found = model.generate(**inputs, **options)
        seen = seen_by_layers(handle)
        kept = handle.report()["visual_tokens_per_layer"]
    assert kept == ([12, 12, 6] if "fastv" in reduce else [6, 6, 6])
    expected = masked(model, continued(inputs, found.sequences), seen)
    torch.testing.assert_close(torch.stack(found.logits, 1), expected[:, -4:-1], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(expected[0, -4], logits(model, inputs)[0, -1], atol=1e-3)


# ---- towers


def test_a_tower_fuses_stages():
    tower = Tower("van_nano", (2, 3, 1), 64).eval()
    plain = timm.create_model("van_nano").eval()
    plain.load_state_dict(tower.body.state_dict(), strict=False)
    pixels = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        found = tower(pixels)
        finer, grid, coarser = plain.forward_intermediates(pixels, indices=[1, 2, 3], intermediates_only=True)
    assert grid.shape[-1] == 4
    pooled = F.avg_pool2d(finer, 2)
    wider = F.interpolate(coarser, scale_factor=2, mode="bilinear")
    torch.testing.assert_close(found, torch.cat([grid, wider, pooled], 1))
    assert tower.measure() == (found.shape[1], (4, 4))


def test_a_tower_ends_at_its_last_stage():
    tower = Tower("vit_tiny_patch16_224", (0,), SIZE, options=tiny.VIT["tower_options"])
    assert len(tower.body.blocks) == 1
    assert tower(torch.rand(1, 3, SIZE, SIZE)).shape == (1, 16, 2, 2)


@pytest.mark.parametrize(
    ("name", "stages", "message"),
    [
        ("nothing_at_all", (-1,), "There is no tower 'nothing_at_all'"),
        ("van_nano", (4,), r"The tower 'van_nano' has no stages \[4\]"),
        ("van_nano", (), "needs stages"),
    ],
)
def test_towers_that_cannot_be(name, stages, message):
    with pytest.raises(ValueError, match=message):
        Tower(name, stages, 64)


def test_open_clip():
    open_clip = pytest.importorskip("open_clip")
    name = "open_clip:ViT-S-32-alt"
    with pytest.raises(ValueError, match="names no weights"):
        Tower(name, pretrained=True)
    with pytest.raises(ValueError, match="open_clip has no model 'ViT-X'"):
        Tower("open_clip:ViT-X")
    tower = Tower(name, (-2,), 64).eval()
    assert tower.measure() == (384, (2, 2))
    assert tower.mean == open_clip.OPENAI_DATASET_MEAN
    model, processor = tiny.compose(tower=name, stages=(-2,), image_size=64, tower_options=None)
    inputs = processor(text="<image>What?", images=picture())
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits[0], by_hand(model, inputs))


# ---- projectors


def test_pixel_shuffle_joins_squares():
    torch.manual_seed(0)
    made = make_projector("pixel_shuffle:factor=2", 3, 8)
    x = torch.rand(1, 3, 4, 6)
    tokens = made(x)
    assert tokens.shape == (1, made.tokens((4, 6)), 8) == (1, 6, 8)
    x[0, :, 3, 2] += 1.0  # the second row of squares, the second square
    assert (made(x) != tokens).any(-1)[0].tolist() == [False, False, False, False, True, False]


def test_a_resampler_has_as_many_tokens_as_queries():
    torch.manual_seed(0)
    made = make_projector("resampler:queries=5,depth=2", 3, 16)
    x = torch.rand(2, 3, 4, 6)
    tokens = made(x)
    assert tokens.shape == (2, 5, 16)
    assert made(x[..., :3]).shape == (2, 5, 16)
    assert not torch.allclose(made(x.flip(-1)), tokens, atol=1e-3)  # it knows where things are
    first, second = (layer.linear1.weight for layer in made.layers)
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("linear", "There is no projector 'linear': expected one of mlp, pixel_shuffle, resampler"),
        ("mlp:factor=2", "'factor=2' is no option of the projector mlp: expected none"),
        ("pixel_shuffle:factor=two", "'factor=two' is no option of the projector pixel_shuffle: expected factor=int"),
        ("resampler:queries=0", "queries is 0"),
    ],
)
def test_projectors_that_cannot_be(text, message):
    with pytest.raises(ValueError, match=message):
        make_projector(text, 8, 16)


def test_a_grid_that_does_not_divide():
    with pytest.raises(ValueError, match="grid is 2 x 2, which does not divide by 3"):
        tiny.compose(projector="pixel_shuffle:factor=3")


@pytest.mark.parametrize("projector", ["pixel_shuffle:factor=2", "resampler:queries=3,depth=1"])
def test_models_with_other_projectors(projector):
    model, processor = tiny.compose(projector=projector, max_tiles=4)
    inputs = processor(text="<image>What?", images=picture(0, 2 * SIZE, SIZE))
    assert inputs["pixel_values"].shape[0] == 3
    assert processor.tokens_per_tile == (1 if "pixel" in projector else 3)
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits[0], by_hand(model, inputs), atol=1e-5, rtol=1e-5)


def test_a_model_from_elsewhere_needs_its_tokenizer():
    with pytest.raises(ValueError, match="needs its tokenizer"):
        VisionLanguageModel.compose("van_nano", tiny.language_model())
