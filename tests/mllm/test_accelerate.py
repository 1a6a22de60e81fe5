"""Accelerated models of the seven families against the plain ones."""

import copy

import pytest
import torch
from against_plain import GREEDY, IMAGE, MARKER, continued, generated, logits, masked, merged_by_layers, seen_by_layers

from zoo.mllm import MoD, accelerate

REDUCTIONS = [
    "fastv:layer=2,keep=0.5",
    "uniform:keep=0.5",
    "random:layer=3,keep=0.5",
    "divprune:keep=0.3",
    "pyramiddrop:keep=0.6",
    "sparsevlm:layers=2/3,keep=0.6/0.3",
    ["random:layer=2,keep=0.75", "fastv:layer=2,keep=0.5"],
    ["uniform:keep=0.75", "fastv:layer=2,keep=0.5", "random:layer=4,keep=0.4"],
]


WHOLE = [
    ["fastv:keep=1", "uniform:keep=1", "pyramiddrop:keep=1", "sparsevlm:keep=1", "zipvl:tau=1,high=16,low=16"],
    # Shares that are rounded up to all: everything is chosen and gathered, and nothing may change.
    ["uniform:keep=0.99", "fastv:layer=1,keep=0.99", "pyramiddrop:keep=0.99", "sparsevlm:layers=3,keep=0.99"],
]


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("reduce", WHOLE, ids=["left out", "rounded up"])
def test_everything_kept_is_the_plain_model(model, batch, rows, reduce):
    inputs = batch(rows)
    plain, names = logits(model, inputs), list(model.state_dict())
    answer = model.generate(**inputs, max_new_tokens=3, **GREEDY)
    with accelerate(model, reduce) as handle:
        assert torch.equal(logits(model, inputs), plain)
        assert torch.equal(model.generate(**inputs, max_new_tokens=3, **GREEDY), answer)
        assert list(model.state_dict()) == names
        report = handle.report()
        assert report["visual_tokens_per_layer"] == [int((inputs["input_ids"] == IMAGE).sum())] * 5
    assert torch.equal(logits(model, inputs), plain)


@pytest.mark.parametrize("reduce", REDUCTIONS, ids=str)
@pytest.mark.parametrize("rows", [1, 3])
def test_dropping_is_masking(model, batch, rows, reduce):
    """Prefill and cached decoding give the logits of one pass over all tokens with the dropped ones masked."""
    inputs = batch(rows)
    plain = logits(model, inputs)
    with accelerate(model, reduce) as handle:
        prefill = logits(model, inputs)
        sequences, answer, cache = generated(model, inputs)
        seen, report = seen_by_layers(handle), handle.report()
    last = len(plain[0]) - 1
    want = masked(model, continued(inputs, sequences), seen, merged=merged_by_layers(handle))
    torch.testing.assert_close(answer, want[:, last:-1], atol=1e-5, rtol=1e-5)
    alive = seen[-1] & inputs["attention_mask"].bool()
    torch.testing.assert_close(prefill[alive], want[:, : last + 1][alive], atol=1e-5, rtol=1e-5)
    is_image = inputs["input_ids"] == IMAGE
    assert report["visual_tokens_per_layer"] == [int((layer & is_image).sum()) for layer in seen]
    assert report["visual_tokens_per_layer"][-1] < report["visual_tokens"] == int(is_image.sum())
    assert (prefill[:2, last] - plain[:2, last]).abs().max() > 1e-4  # what was dropped did matter
    if rows == 3:  # a row of text alone loses nothing
        torch.testing.assert_close(prefill[2, last], plain[2, last], atol=1e-5, rtol=1e-5)
    lengths = [layer.keys.shape[2] for layer in cache.layers]
    assert lengths == [int(layer.sum(1).max()) + 2 if not layer.all() else last + 3 for layer in seen]


def test_a_step_chooses_among_what_the_one_before_it_left(build, llava_batch):
    """Of each row: the best attended of the tokens that a random step keeps at the same layer."""
    inputs, first = llava_batch(3), "random:layer=2,keep=0.75"
    is_image = inputs["input_ids"] == IMAGE
    with torch.no_grad():
        attention = build("llava", "eager")(**inputs, output_attentions=True).attentions[1][:, :, -1].mean(1)
    model, seen = build("llava"), []
    for reduce in (first, [first, "fastv:layer=2,keep=0.5"]):
        with accelerate(model, reduce) as handle:
            logits(model, inputs)
            seen.append(seen_by_layers(handle)[2] & is_image)
    for left, chosen, scores in zip(*seen, attention):
        places = sorted(left.nonzero()[:, 0].tolist(), key=lambda place: -float(scores[place]))
        assert chosen.nonzero()[:, 0].tolist() == sorted(places[: len(places) // 2])


@pytest.mark.parametrize("rule", ["mma", "mma_mutual", "framewise", "composite"])
@pytest.mark.parametrize("reduce", [[], REDUCTIONS[-1]], ids=["whole", "reduced"])
def test_masks_also_of_what_is_kept(model, batch, rule, reduce):
    inputs = batch(3)
    with accelerate(model, reduce, mask=rule, prompt_end=[MARKER]) as handle:
        out = model.generate(**inputs, max_new_tokens=3, **GREEDY, return_dict_in_generate=True, output_logits=True)
        seen = seen_by_layers(handle)
    last = inputs["input_ids"].shape[1] - 1
    longer = continued(inputs, out.sequences)
    want = masked(model, longer, seen, rule)[:, last:-1]
    torch.testing.assert_close(torch.stack(out.logits, 1), want, atol=1e-5, rtol=1e-5)
    assert (masked(model, longer, seen)[:2, last:-1] - want[:2]).abs().max() > 1e-4


def test_eager_attention_gives_the_same(family, build, batch, model):
    eager, inputs = build(family, "eager"), batch(3)
    for mask, reduce in (("causal", REDUCTIONS[-1]), ("mma", REDUCTIONS[0])):
        with (
            accelerate(model, reduce, mask=mask, prompt_end=[MARKER]),
            accelerate(eager, reduce, mask=mask, prompt_end=[MARKER]),
        ):
            a = model.generate(**inputs, max_new_tokens=2, **GREEDY, return_dict_in_generate=True, output_logits=True)
            b = eager.generate(**inputs, max_new_tokens=2, **GREEDY, return_dict_in_generate=True, output_logits=True)
        torch.testing.assert_close(torch.stack(a.logits), torch.stack(b.logits), atol=1e-5, rtol=1e-5)


def test_answers_do_not_reach_the_prompt(model, batch):
    """Modality-mutual attention unlocks the question for the image, but no gradient comes from the answer."""
    inputs = batch(1)
    ids = torch.cat([inputs["input_ids"], torch.tensor([[30, 31]])], 1)
    inputs = continued(inputs, ids)
    prompt, image = ids.shape[1] - 2, (ids[0] == IMAGE).nonzero()[0, 0]
    embedded = []
    handle = model.get_decoder().register_forward_pre_hook(
        lambda m, a, k: embedded.append(k["inputs_embeds"]),
        with_kwargs=True,
    )
    with accelerate(model, mask="mma", prompt_end=[MARKER]):
        out = model(**inputs).logits
    handle.remove()
    leak, seen = (
        torch.autograd.grad(rows.square().sum(), embedded[0], retain_graph=True)[0][0]
        for rows in (out[0, :prompt], out[0, image])
    )
    assert leak[prompt:].abs().max() == 0
    assert seen[prompt - 3 : prompt].abs().max() > 0  # the question, behind the image


def test_training_with_labels(model, batch):
    """With tokens dropped, logits and labels stay aligned, and gradients flow."""
    inputs = batch(1)
    labels = inputs["input_ids"].clone()
    labels[:, :-3] = -100
    trained = copy.deepcopy(model).train()
    with accelerate(trained, "fastv:layer=2,keep=0.5"), pytest.raises(ValueError, match="ranks by the last token"):
        trained(**inputs, labels=labels)
    with accelerate(trained, "fastv:layer=2,keep=0.5", prompt_end=[MARKER]) as handle:
        loss = trained(**inputs, labels=labels).loss
        loss.backward()
        seen = seen_by_layers(handle)
    want = masked(model, inputs, seen)[0, -4:-1]
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(want, labels[0, -3:]), atol=1e-5, rtol=1e-5)
    assert trained.get_decoder().layers[-1].self_attn.q_proj.weight.grad.abs().max() > 0


def test_text_alone_is_the_plain_model(model):
    inputs = {"input_ids": torch.tensor([[1, 5, 6, MARKER]]), "attention_mask": torch.ones(1, 4).long()}
    plain = logits(model, inputs)
    with accelerate(model, REDUCTIONS[-1]):
        assert torch.equal(logits(model, inputs), plain)


ROUTED = (2, 4)


@pytest.mark.parametrize("rows", [1, 3])
def test_mod_that_skips_nothing_is_the_plain_model(model, batch, rows):
    inputs = batch(rows)
    plain, answer = logits(model, inputs), model.generate(**inputs, max_new_tokens=3, **GREEDY)
    with accelerate(model, depth=MoD(0, ROUTED, gate=False)):
        assert torch.equal(logits(model, inputs), plain)
        assert torch.equal(model.generate(**inputs, max_new_tokens=3, **GREEDY), answer)
    assert torch.equal(logits(model, inputs), plain)


@pytest.mark.parametrize("rule", ["causal", "mma"])
@pytest.mark.parametrize("reduce", [[], ["uniform:keep=0.75", "fastv:layer=2,keep=0.7"]], ids=["whole", "reduced"])
@pytest.mark.parametrize("rows", [1, 3])
def test_mod_is_skipping(model, batch, rows, reduce, rule):
    """Also with fewer tokens and another mask: prefill and decoding are the plain model with tokens held back."""
    inputs = batch(rows)
    torch.manual_seed(0)
    depth = MoD(0.5, ROUTED)
    with accelerate(model, reduce, depth, rule, [MARKER]) as handle:
        prefill = logits(model, inputs)
        out = model.generate(**inputs, max_new_tokens=3, **GREEDY, return_dict_in_generate=True, output_logits=True)
        seen, routed, report = seen_by_layers(handle), handle.last.routed, handle.report()
    last = inputs["input_ids"].shape[1] - 1
    want = masked(model, continued(inputs, out.sequences), seen, rule, (depth, ROUTED))
    torch.testing.assert_close(torch.stack(out.logits, 1), want[:, last:-1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(prefill[:, last], want[:, last], atol=1e-5, rtol=1e-5)
    is_image = inputs["input_ids"] == IMAGE
    assert report["visual_tokens_per_layer"] == [int((layer & is_image).sum()) for layer in seen]
    for layer, before in ((2, seen[3] if reduce else None), (4, seen[3])):
        if before is not None:
            visual = (before & is_image).sum(1)
            assert ((seen[layer] & is_image).sum(1) == visual - visual // 2).all()
            p = routed[layer][0].softmax(-1)[0, :, 1]
            skipped = ~routed[layer][1][0]
            assert skipped.any() and p[skipped].max() <= p[routed[layer][1][0]].max()


@pytest.mark.parametrize("reduce", [[], ["uniform:keep=0.75", "fastv:layer=2,keep=0.7"]], ids=["whole", "reduced"])
@pytest.mark.parametrize("select", ["topk", "threshold"])
def test_mod_as_the_published_checkpoints_have_it(llava, llava_batch, reduce, select):
    """Their layers number the tokens that they process from 0 on, in the prompt and after it."""
    inputs, answers = llava_batch(3), []
    for positions in ("compact", "keep"):
        torch.manual_seed(0)
        depth = MoD(0.5, ROUTED, select, threshold=0.49, positions=positions)
        with accelerate(llava, reduce, depth) as handle:
            sequences, answer, _ = generated(llava, inputs)
            seen = seen_by_layers(handle)
        want = masked(llava, continued(inputs, sequences), seen, routing=(depth, ROUTED))
        torch.testing.assert_close(answer, want[:, inputs["input_ids"].shape[1] - 1 : -1], atol=1e-5, rtol=1e-5)
        answers.append(answer)
    assert seen[1][:2].sum() > seen[2][:2].sum() and (answers[0] - answers[1])[:2].abs().max() > 1e-4


def test_mod_trains_its_router(model, batch):
    """Through the gate and the auxiliary loss, the same with gradient checkpointing."""
    inputs = {**batch(1)}
    labels = torch.where(inputs["input_ids"] == IMAGE, -100, inputs["input_ids"])
    torch.manual_seed(0)
    depth, gradients, losses = MoD(0.5, ROUTED), [], []
    for checkpointing in (False, True):
        trained = copy.deepcopy(model).train()
        if checkpointing:
            trained.gradient_checkpointing_enable({"use_reentrant": False})
        for parameter in trained.parameters():
            parameter.requires_grad_(True)
        depth.zero_grad() if depth.router else None
        with accelerate(trained, depth=depth) as handle:
            loss = trained(**inputs, labels=labels, use_cache=False).loss
            from_lm = torch.autograd.grad(loss, depth.router.weight, retain_graph=True)[0]
            aux = handle.loss()
            (loss + aux).backward()
        assert from_lm.abs().max() > 0 and not torch.allclose(from_lm, depth.router.weight.grad)
        gradients.append([depth.router.weight.grad.clone(), trained.get_decoder().layers[2].mlp.up_proj.weight.grad])
        losses.append((loss.item(), aux.item()))
    assert losses[0] == pytest.approx(losses[1]) and losses[0][1] > 0
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("reduce", ["fastv:layer=1,keep=0.5", "divprune:layer=1,keep=0.5"])
def test_checkpoints_of_two_passes(model, batch, reduce):
    """A checkpointed layer that is computed again drops, skips and gates as in its own pass, not as in the last."""
    one, other = batch(1), batch(1)
    other["input_ids"] = torch.where(one["input_ids"] == 7, 40, one["input_ids"])
    depth, gradients = MoD(0.5, ROUTED), []
    for checkpointing in (False, True):
        trained = copy.deepcopy(model).train()
        if checkpointing:
            trained.gradient_checkpointing_enable({"use_reentrant": False})
        with accelerate(trained, reduce, depth, prompt_end=[MARKER]):
            depth.zero_grad()
            losses = [trained(**inputs, labels=inputs["input_ids"], use_cache=False).loss for inputs in (one, other)]
            sum(losses).backward()
        gradients.append([depth.router.weight.grad, *(x.grad for x in trained.get_decoder().layers.parameters())])
    assert gradients[0][0].abs().max() > 0
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-5)


ACCELERATIONS = [("uniform:keep=0.5", None), ("fastv:layer=2,keep=0.5", None), ((), MoD(0.5, ROUTED))]


@torch.no_grad()
def by_hand(model, inputs, tokens, copied=False):
    """Logits of the prompt's last token and of the tokens fed one by one, without masks and positions."""
    out = model(**{name: x for name, x in inputs.items() if name != "attention_mask"}, use_cache=True)
    steps = [out.logits[:, -1]]
    for token in tokens.split(1, dim=1):
        name = "cache" if "cache" in out else "past_key_values"
        cache = copy.deepcopy(out[name]) if copied else out[name]
        out = model(input_ids=token, use_cache=True, **{name: cache})
        steps.append(out.logits[:, -1])
    return torch.stack(steps, 1)


@pytest.mark.parametrize(("reduce", "depth"), ACCELERATIONS, ids=["before", "inside", "routed"])
def test_decoding_by_hand_of_rows_with_and_without_an_image(model, batch, reduce, depth):
    """Nothing is padded, but fewer tokens are kept of the row with an image."""
    inputs = batch(1)
    text = torch.arange(inputs["input_ids"].shape[1])[None] % 80 + 3
    inputs["input_ids"] = torch.cat([inputs["input_ids"], text])
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if "mm_token_type_ids" in inputs:
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE).long()
    if (
        inputs["pixel_values"].ndim == 5
        and len(inputs["pixel_values"]) == 1
        and model.config.model_type != "llava_next"
    ):
        inputs["pixel_values"] = torch.cat([inputs["pixel_values"], torch.zeros_like(inputs["pixel_values"])])
    tokens = torch.tensor([[30, 31], [32, 33]])
    with accelerate(model, reduce, depth) as handle:
        fed = by_hand(model, inputs, tokens)
        seen = seen_by_layers(handle)
        assert torch.equal(by_hand(model, inputs, tokens, copied=True), fed)
        answer = model.generate(**inputs, max_new_tokens=3, **GREEDY)
    assert not seen.all()
    length = inputs["input_ids"].shape[1]
    routing = depth and (depth, ROUTED)
    longer = continued(inputs, torch.cat([inputs["input_ids"], tokens], 1))
    torch.testing.assert_close(fed, masked(model, longer, seen, routing=routing)[:, length - 1 :], atol=1e-5, rtol=1e-5)
    want = masked(model, continued(inputs, answer), seen, routing=routing)[:, length - 1 : -1]
    want[..., IMAGE] = -torch.inf
    assert torch.equal(want.argmax(-1), answer[:, length:])


def test_what_would_silently_be_plain_is_refused(build, batch, family):
    model, inputs = build(family), batch(1)
    options = {"max_new_tokens": 1, **GREEDY}
    with accelerate(model, "uniform"), pytest.raises(ValueError, match="needs a cache that grows"):
        model.generate(**inputs, **options, cache_implementation="static")
    if family != "llava":  # the others take no parts of prompts with images
        return
    behind_image = int((inputs["input_ids"][0] == IMAGE).nonzero()[-1]) + 2
    for size, acceleration in ((8, {"reduce": "uniform"}), (behind_image, {"mask": "mma", "prompt_end": [MARKER]})):
        refused = pytest.raises(ValueError, match="A part of the prompt came after the cache was filled")
        with accelerate(model, **acceleration), refused:
            model.generate(**inputs, **options, prefill_chunk_size=size)


def test_the_model_may_change_its_dtype(model, batch):
    moved = copy.deepcopy(model)
    inputs = batch(3)
    with accelerate(moved, "fastv:layer=1,keep=0.5", MoD(0.5, ROUTED), "mma", [MARKER]):
        moved.double()
        inputs["pixel_values"] = inputs["pixel_values"].double()
        out = logits(moved, inputs)
    assert out.dtype == torch.float64 and out.isfinite().all()
