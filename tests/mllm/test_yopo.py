"""YOPO in models of the seven families, against full computations in which what it leaves out is masked."""

import copy
import json

import pytest
import torch
from against_plain import GREEDY, IMAGE, MARKER, continued, logits, masked, seen_by_layers
from torch.utils.flop_counter import FlopCounterMode

from zoo.mllm import DecoderShape, FastV, MoD, accelerate, prefill_flops
from zoo.mllm.reduce import parse_reduction
from zoo.mllm.yopo import YOPO

PRUNED = ((), (2,), (0, 1), (0, 3), (0, 1, 2, 3))
PLANS = {
    "window": YOPO(window=3),
    "itself": YOPO(window=1),
    "heads": YOPO(pruned=PRUNED),
    "heads renorm": YOPO(pruned=PRUNED, renorm=True),
    "ffn": YOPO(ffn_ratio=3),
    "layers": YOPO(layer=3),
    "all": YOPO(layer=4, window=3, ffn_ratio=2, pruned=PRUNED),
    "all but windows": YOPO(layer=4, ffn_ratio=2, pruned=PRUNED, renorm=True),
}


@pytest.fixture(params=PLANS)
def plan(request, family):
    if PLANS[request.param].window and family == "llava_next":
        pytest.skip("images of LLaVA-NeXT are no grid")
    return PLANS[request.param]


@pytest.mark.parametrize("rows", [1, 3])
def test_leaving_out_is_masking(model, batch, rows, plan):
    """Prefill and cached decoding are the full computation with what is left out taken away."""
    inputs = batch(rows)
    plain, names = logits(model, inputs), list(model.state_dict())
    with accelerate(model, plan) as handle:
        prefill = logits(model, inputs)
        out = model.generate(**inputs, max_new_tokens=3, **GREEDY, return_dict_in_generate=True, output_logits=True)
        seen, report = seen_by_layers(handle), handle.report()
        assert list(model.state_dict()) == names
    assert torch.equal(logits(model, inputs), plain)
    last = len(plain[0]) - 1
    want = masked(model, continued(inputs, out.sequences), seen, plan=plan)
    torch.testing.assert_close(torch.stack(out.logits, 1), want[:, last:-1], atol=1e-5, rtol=1e-5)
    alive = seen[-1] & inputs["attention_mask"].bool()
    torch.testing.assert_close(prefill[alive], want[:, : last + 1][alive], atol=1e-5, rtol=1e-5)
    assert (prefill[:2, last] - plain[:2, last]).abs().max() > 1e-4
    if rows == 3:
        torch.testing.assert_close(prefill[2, last], plain[2, last], atol=1e-5, rtol=1e-5)
    images = int((inputs["input_ids"] == IMAGE).sum())
    with_images = plan.layer or 5
    assert report["visual_tokens_per_layer"] == [images] * with_images + [0] * (5 - with_images)
    text = int((inputs["attention_mask"].bool() & (inputs["input_ids"] != IMAGE)).sum(1).max())
    lengths = [layer.keys.shape[2] for layer in out.past_key_values.layers]
    assert lengths == [last + 3] * with_images + [text + 2] * (5 - with_images)


def test_nothing_left_out_is_the_plain_model(model, batch):
    for rows in (1, 3):
        inputs = batch(rows)
        plain, answer = logits(model, inputs), model.generate(**inputs, max_new_tokens=3, **GREEDY)
        for nothing in (YOPO(), YOPO(pruned=((), (), (), (), ())), "yopo"):
            with accelerate(model, nothing):
                assert torch.equal(logits(model, inputs), plain)
                assert torch.equal(model.generate(**inputs, max_new_tokens=3, **GREEDY), answer)
        text = {"input_ids": torch.tensor([[1, 5, 6, MARKER]]), "attention_mask": torch.ones(1, 4).long()}
        want = logits(model, text)
        with accelerate(model, PLANS["all but windows"]):
            assert torch.equal(logits(model, text), want)
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("rule", ["causal", "mma", "composite"])
@pytest.mark.parametrize("reduce", [[], ["divprune:keep=0.7", "fastv:layer=1,keep=0.6"]], ids=str)
def test_with_masks_and_other_methods(model, batch, reduce, rule):
    inputs, plan = batch(3), PLANS["all but windows"]
    with accelerate(model, [plan, *reduce], mask=rule, prompt_end=[MARKER]) as handle:
        out = model.generate(**inputs, max_new_tokens=3, **GREEDY, return_dict_in_generate=True, output_logits=True)
        seen = seen_by_layers(handle)
    last = inputs["input_ids"].shape[1] - 1
    longer = continued(inputs, out.sequences)
    want = masked(model, longer, seen, rule, plan=plan)[:, last:-1]
    torch.testing.assert_close(torch.stack(out.logits, 1), want, atol=1e-5, rtol=1e-5)
    assert (masked(model, longer, seen, rule)[:2, last:-1] - want[:2]).abs().max() > 1e-4


def test_eager_attention_gives_the_same(family, build, batch, model, plan):
    eager, inputs = build(family, "eager"), batch(3)
    with accelerate(model, plan), accelerate(eager, plan):
        a = model.generate(**inputs, max_new_tokens=2, **GREEDY, return_dict_in_generate=True, output_logits=True)
        b = eager.generate(**inputs, max_new_tokens=2, **GREEDY, return_dict_in_generate=True, output_logits=True)
    torch.testing.assert_close(torch.stack(a.logits), torch.stack(b.logits), atol=1e-5, rtol=1e-5)


def linear_flops(model, inputs):
    """FLOPs of the linear layers, those of the tower and of the head among them."""
    with FlopCounterMode(display=False) as counter:
        logits(model, inputs)
    counts = counter.get_flop_counts()["Global"]
    return sum(flops for op, flops in counts.items() if str(op) in ("aten.mm", "aten.addmm"))


@pytest.mark.parametrize("renorm", [False, True])
def test_what_is_left_out_is_not_computed(build, llava_batch, renorm):
    """To the last multiplication: heads and neurons of visual tokens, and whole layers; and the cost model agrees."""
    model, inputs = build("llava"), llava_batch(1)
    plan = YOPO(layer=4, ffn_ratio=2, pruned=PRUNED, renorm=renorm)
    plain = linear_flops(model, inputs)
    with accelerate(model, plan):
        less = linear_flops(model, inputs)
    visual, dim, head, mlp = int((inputs["input_ids"] == IMAGE).sum()), 32, 8, 48
    saved = 0
    for pruned in PRUNED[:4]:
        kv = 2 - len({index // 2 for index in range(4) if index not in pruned})
        saved += 2 * visual * dim * (head * (2 * len(pruned) + (1 + renorm) * kv) + 3 * mlp // 2)
    last = 2 * visual * dim * (2 * 4 * head + 2 * 2 * head + 3 * mlp)
    assert plain - less == saved + last > 0.1 * plain
    text = inputs["input_ids"].shape[1] - visual
    attention = sum(4 * visual * (visual + text) * head * len(pruned) for pruned in PRUNED[:4])
    tokens = [text + visual] * 4 + [text]
    assert plan.overhead(DecoderShape.from_config(model.config), text, tokens) == pytest.approx(-saved - attention)


@pytest.mark.parametrize(("heads", "ratio", "cut", "share"), [(30, 2, 20, 28.6), (20, 4, 16, 13.1)])
def test_published_shares_of_llava_13b(heads, ratio, cut, share):
    """The plans that the authors call 25 % and 12 % of the FLOPs of 576 visual tokens."""
    shape = DecoderShape(layers=40, dim=5120, mlp_dim=13824, num_heads=40, num_kv_heads=40, head_dim=128)
    plan = YOPO(cut, 5, ratio, (tuple(range(heads, 40)),) * cut, renorm=True)
    tokens = [576] * cut + [0] * (40 - cut)
    flops = prefill_flops(shape, tokens) + plan.overhead(shape, 0, tokens)
    assert round(100 * flops / prefill_flops(shape, 576), 1) == share
    assert YOPO().overhead(shape, 0, [576] * 40) == 0


def test_calibration_by_votes(build, batch, family):
    """Against the attention matrices of transformers; rows without an image do not vote."""
    model, eager, samples = build(family), build(family, "eager"), [batch(1), batch(3)]
    ratios = []
    for inputs in samples:
        with torch.no_grad():
            attentions = eager(**inputs, output_attentions=True).attentions
        for row, ids in enumerate(inputs["input_ids"]):
            valid, image = inputs["attention_mask"][row].bool(), ids == IMAGE
            if image.any():
                inside = torch.stack([one[row][:, valid] for one in attentions])  # (layers, heads, queries, keys)
                ratios.append(inside[..., image].sum((2, 3)) / inside[..., valid & ~image].sum((2, 3)))
    ratios = torch.stack(ratios)
    assert len(ratios) == 3
    threshold = float(ratios.median()) + 1e-4
    made = YOPO(layer=4, window=0).calibrate(model, iter(samples), threshold, votes=0.5, first=1)
    votes = (ratios > threshold).sum(0)
    want = [[head for head in range(4) if layer and votes[layer, head] < 2] for layer in range(5)]
    assert [list(heads) for heads in made.pruned] == want and any(want) and made.layer == 4
    assert model.get_decoder().config._attn_implementation == "sdpa"
    text = {"input_ids": torch.tensor([[1, 5, 6, MARKER]]), "attention_mask": torch.ones(1, 4).long()}
    with pytest.raises(ValueError, match="YOPO: no sample has an image"):
        YOPO().calibrate(model, [text], 0.1)


def test_plans_are_files(tmp_path):
    plan = YOPO(4, 5, 2, PRUNED, True)
    path = tmp_path / "plan.json"
    plan.save(path)
    assert YOPO.load(path) == plan == parse_reduction(f"yopo:plan={path}") != YOPO(4, 5, 2, PRUNED)
    assert [file.name for file in tmp_path.iterdir()] == ["plan.json"]
    assert parse_reduction("yopo:layer=3,window=5,ffn_ratio=2,renorm=true") == YOPO(3, 5, 2, renorm=True)
    for wrong in ("[1]", "{}", '{"pruned": 3}', "no", '{"pruned": [], "heads": 1}'):
        path.write_text(wrong)
        with pytest.raises(ValueError, match=r"plan\.json is no plan of YOPO: expected JSON such as"):
            YOPO.load(path)
    path.write_text(json.dumps({"pruned": [], "window": 4}))
    with pytest.raises(ValueError, match="YOPO: window is 4, expected an odd number"):
        YOPO.load(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("yopo:window=4", "YOPO: window is 4, expected an odd number, or 0 for none"),
        ("yopo:window=-1", "YOPO: window is -1"),
        ("yopo:ffn_ratio=0", "YOPO: ffn_ratio is 0, expected 1 or more"),
        ("yopo:layer=-1", "YOPO: layer is -1, expected at least 0"),
        ("yopo:pruned=1", "'pruned=1' is no option of yopo: expected layer=int"),
    ],
)
def test_wrong_text_is_named(text, message):
    with pytest.raises(ValueError, match=message):
        parse_reduction(text)


def test_what_does_not_fit_is_refused(build, batch, family):
    model, inputs = build(family), batch(1)
    plain = logits(model, inputs)

    def refused(message, *args, **kwargs):
        with pytest.raises(ValueError, match=message):
            accelerate(model, *args, **kwargs)
        assert model.get_decoder().config._attn_implementation == "sdpa"
        assert torch.equal(logits(model, inputs), plain)

    refused("LayerDrop: layer is 5, but the decoder has 5 layers", YOPO(layer=5))
    refused("prunes heads in 6 layers, up to head 4, but the decoder has 5 layers of 4", YOPO(pruned=((4,),) * 6))
    refused("FastV at layer 2 needs the attention of layer 1, in which YOPO", [FastV(), YOPO(pruned=PRUNED)])
    refused("YOPO and MoD both change what a layer computes", YOPO(window=1, ffn_ratio=2), MoD(0.5, (2,)))
    refused("YOPO and mask='composite' both say what is seen", YOPO(window=3), mask="composite")
    if family == "llava_next":
        refused("an image of LLaVA-NeXT is several pictures", YOPO(window=3))
    elif family == "llava":
        for methods, message in (
            (["uniform:keep=0.25,layer=1", YOPO(window=3)], "window needs whole pictures, but 4 of 16 visual tokens"),
            (["zipvl:tau=0.9", YOPO(pruned=PRUNED)], "YOPO and another method both replace the attention"),
        ):
            with accelerate(model, methods), pytest.raises(ValueError, match=message):
                model(**inputs)
    layer = model.get_decoder().layers[3]
    layer.mlp.up_proj = torch.nn.Sequential(layer.mlp.up_proj)
    with pytest.raises(ValueError, match="but up_proj of layer 3 is Sequential: merge adapters first"):
        accelerate(model, YOPO(ffn_ratio=2))
    with accelerate(model, YOPO(layer=3, ffn_ratio=2)) as handle:  # the layer has no visual tokens
        logits(model, inputs)
        assert handle.report()["visual_tokens_per_layer"][3:] == [0, 0]


def test_what_is_no_grid_is_refused_by_the_window(build, batch, family):
    if family not in ("qwen2_vl", "llava"):
        return
    model, inputs = build(family), batch(1)
    if family == "qwen2_vl":
        inputs |= {"pixel_values_videos": inputs.pop("pixel_values"), "video_grid_thw": torch.tensor([[2, 4, 6]])}
        inputs["input_ids"] = torch.where(inputs.pop("input_ids") == IMAGE, 91, batch(1)["input_ids"])
        inputs["mm_token_type_ids"] = 2 * inputs["mm_token_type_ids"]
        del inputs["image_grid_thw"]
    else:  # two pictures without anything between them
        ids = inputs["input_ids"]
        first = int((ids[0] == IMAGE).nonzero()[0])
        inputs["input_ids"] = torch.cat([ids[:, :first], ids.new_full((1, 16), IMAGE), ids[:, first:]], 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        inputs["pixel_values"] = inputs["pixel_values"].repeat(2, 1, 1, 1)
    refused = pytest.raises(ValueError, match=r"for images of rows and columns, but got \d+ visual tokens in a row")
    with accelerate(model, YOPO(window=3)), refused:
        model(**inputs)
    with accelerate(model, YOPO(pruned=PRUNED)):
        assert logits(model, inputs).isfinite().all()


def test_training(model, batch, plan):
    """Gradients are those of the pass without checkpoints; weights that change are not remembered."""
    inputs, gradients = batch(1), []
    for checkpointing in (False, True):
        trained = copy.deepcopy(model).train()
        if checkpointing:
            trained.gradient_checkpointing_enable({"use_reentrant": False})
        with accelerate(trained, plan, prompt_end=[MARKER]):
            trained(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
        gradients.append([x.grad for x in trained.get_decoder().layers.parameters()])
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-5)
    assert gradients[0][0].abs().max() > 0
    with accelerate(trained.eval(), plan, prompt_end=[MARKER]):
        before = logits(trained, inputs)
        torch.optim.SGD(trained.parameters(), 1.0).step()
        kept = logits(trained, inputs)
    with accelerate(trained, plan, prompt_end=[MARKER]):
        assert torch.equal(logits(trained, inputs), kept) and not torch.equal(before, kept)


def test_the_model_may_change_its_dtype(model, batch, plan):
    moved, inputs = copy.deepcopy(model), batch(3)
    with accelerate(moved, plan):
        single = logits(moved, inputs)
        moved.double()
        inputs["pixel_values"] = inputs["pixel_values"].double()
        double = logits(moved, inputs)
        moved.bfloat16()
        inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
        assert logits(moved, inputs).dtype == torch.bfloat16
    text = inputs["attention_mask"].bool() & (inputs["input_ids"] != IMAGE)
    assert double.dtype == torch.float64
    torch.testing.assert_close(single[text].double(), double[text], atol=1e-4, rtol=1e-4)
