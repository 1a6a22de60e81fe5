"""ZipVL: which tokens are important, what attends, and what is stored in how many bits."""

import copy

import pytest
import torch
from against_plain import IMAGE, coarsely, continued, generated, important, logits, masked, seen_by_layers
from transformers import DynamicCache

from zoo.mllm import DecoderShape, ZipVL, accelerate, kv_bytes, masks
from zoo.mllm.layout import TokenLayout
from zoo.mllm.mixed_cache import MixedLayer, Packed
from zoo.mllm.reduce import parse_reduction

# Without random probes, which the slow reference does not draw.
PLANS = {
    "two widths": ZipVL(tau=0.8, high=8, low=4, recent=6, random=0),
    "evicting": ZipVL(tau=0.8, high=16, low=0, recent=6, random=0),
    "evicting, coarse": ZipVL(tau=0.8, high=4, low=0, recent=6, random=0),
    "whole or coarse": ZipVL(tau=0.8, high=16, low=2, recent=6, random=0),
    "sparse attention alone": ZipVL(tau=0.8, high=16, low=16, recent=6, random=0),
    "all coarse": ZipVL(tau=1.0, high=8, low=8),
}


@pytest.fixture(scope="module")
def exact(model):
    """In double precision, since a number between two levels would be read as either."""
    return copy.deepcopy(model).double()


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_prefill_and_decoding_are_the_rule(exact, batch, rows, plan):
    """Against one pass over prompt and answer, row by row, with keys and values read back from their few bits."""
    model, inputs = exact, batch(rows)
    inputs["pixel_values"] = inputs["pixel_values"].double()
    plain = logits(model, inputs)
    with accelerate(model, plan) as handle:
        prefill = logits(model, inputs)
        sequences, answer, cache = generated(model, inputs)
        seen, report = seen_by_layers(handle), handle.report()
    last, valid = plain.shape[1] - 1, inputs["attention_mask"].bool()
    want = masked(model, continued(inputs, sequences), seen, zipped=plan)
    torch.testing.assert_close(answer.double(), want[:, last:-1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(prefill[valid], want[:, : last + 1][valid], atol=1e-5, rtol=1e-5)
    counts = report["important_tokens_per_layer"]
    if plan.tau < 1:
        assert (prefill - plain)[valid].abs().max() > 1e-4
        assert len(counts) == 5 and len(set(counts)) > 1 and max(counts) < valid.sum()  # as many as each layer needs
    else:
        assert torch.equal(prefill, plain) and counts == [int(valid.sum())] * 5
    lengths = [layer.update(*[layer.keys[:, :, :0]] * 2)[0].shape[2] - 2 for layer in cache.layers]
    if plan.low == 0 and rows == 1:
        assert lengths == counts
    elif plan.low:
        assert lengths == [last + 1] * 5


def test_eager_attention_gives_the_same(build, model, family, batch):
    eager, inputs, plan = build(family, "eager"), batch(3), PLANS["two widths"]
    with accelerate(model, plan), accelerate(eager, plan):
        a, b = generated(model, inputs, 2)[1], generated(eager, inputs, 2)[1]
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_a_row_is_as_it_is_alone(build, llava_batch):
    """Padding and other rows have no say in who probes, who is important, and in what is stored of all alike."""
    model, inputs = build("llava"), llava_batch(3)
    for plan in (ZipVL(0.9, 16, 0, recent=4, random=6), ZipVL(1.0, 8, 8)):
        with accelerate(model, plan):
            together = generated(model, inputs)[1]
            for row in range(2):
                inside = inputs["attention_mask"][row].bool()
                one = {name: inputs[name][row : row + 1, inside] for name in ("input_ids", "attention_mask")}
                alone = generated(model, {**one, "pixel_values": inputs["pixel_values"][row : row + 1]})[1]
                torch.testing.assert_close(alone[0], together[row], atol=1e-5, rtol=1e-5)


# ---- importance


@pytest.mark.parametrize(("tau", "count"), [(0.49, 1), (0.5, 1), (0.51, 2), (0.8, 2), (0.81, 3), (0.94, 4), (1.0, 6)])
def test_tau_is_the_share_of_the_attention_that_is_kept(tau, count):
    """One probe, the last of six tokens, attends 0.5, 0.3, 0.125, 0.05, 0.025 and 0 of itself."""
    shares = torch.tensor([0.3, 0.05, 0.5, 0.125, 0.025, 0.0])
    query = torch.zeros(1, 1, 6, 6)
    query[0, 0, 5] = shares.log().clamp(min=-1e4)
    found = ZipVL(tau, recent=1, random=0).important(query, torch.eye(6)[None, None], None, torch.ones(1, 6) > 0, 1.0)
    assert found[0].nonzero()[:, 0].tolist() == sorted([2, 0, 3, 1, 4, 5][:count])


def test_few_probes_that_may_see_a_token_do_not_make_it_worth_less():
    """Three probes: the last token is seen by one of them only, which gives it 0.5; the first is seen by all."""
    query, shares = torch.zeros(1, 1, 4, 4), torch.full((4, 4), -1e4)
    shares[1, 0] = shares[2, 0] = 0.0
    shares[1, 1] = shares[2, 2] = 0.0
    shares[3, :] = torch.tensor([0.25, 0.125, 0.125, 0.5]).log()
    query[0, 0] = shares
    # Mass: 1.25, 0.625, 0.625, 0.5 of 3; worth: 1.25 / 3, 0.625 / 3, 0.625 / 2, 0.5 / 1.
    method = ZipVL(0.6, recent=3, random=0)
    found = method.important(query, torch.eye(4)[None, None], None, torch.ones(1, 4) > 0, 1.0)
    assert found[0].tolist() == [True, False, False, True]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", [None, torch.bool, torch.float32])
def test_the_rule_written_out(seed, kind):
    generator = torch.Generator().manual_seed(seed)
    query, key = (2 * torch.randn(2, heads, 20, 8, generator=generator) for heads in (4, 2))
    ids = torch.tensor([[1] * 20, [0] * 7 + [1] * 13] if kind else [[1] * 20] * 2)
    layout = TokenLayout.from_ids(ids, [9], ids > 0)
    may = masks.causal(layout)
    mask = None if kind is None else may[:, None]
    if kind is torch.float32:
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(kind).min)
    method = ZipVL(0.7, recent=5, random=0)
    found = method.important(query, key, mask, layout.valid, 0.4)
    for row in range(2):
        scores = 0.4 * query[row] @ key[row].repeat_interleave(2, 0).mT
        want = important(scores, may[row], layout.valid[row], method)
        assert found[row].nonzero()[:, 0].tolist() == want and 2 < len(want) < layout.valid[row].sum()


def test_probes_are_the_latest_and_random_ones_before_them():
    valid = torch.ones(2, 200, dtype=torch.bool)
    valid[1, :50] = False
    probes = ZipVL()._probes(valid)
    assert probes.sum(1).tolist() == [128, 128] and probes[:, -64:].all() and not probes[1, :50].any()
    assert not torch.equal(probes, ZipVL(seed=1)._probes(valid))
    assert torch.equal(probes[1:, 50:], ZipVL()._probes(valid[1:, 50:]))
    few = ZipVL()._probes(valid[:, :80])
    assert few[0].all() and torch.equal(few[1], valid[1, :80])


# ---- bits


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_numbers_are_read_as_the_nearest_level(bits):
    x = torch.randn(2, 3, 17, 8, generator=torch.Generator().manual_seed(0)) * torch.arange(1.0, 9.0) ** 2
    packed = Packed.of(x, bits)
    read = packed.numbers(torch.float32)
    want = torch.stack([torch.stack([coarsely(head, bits) for head in row]) for row in x])
    torch.testing.assert_close(read, want, atol=1e-5, rtol=1e-5)
    assert ((read - x).abs() <= 0.5001 * packed.scale * packed.channel).all()  # half a level at most
    assert packed.codes.dtype == torch.uint8 and packed.codes.nbytes == x.numel() * bits // 8
    assert not torch.equal(read, x)


def test_numbers_that_are_all_alike_are_exact():
    for x in (torch.zeros(1, 1, 3, 8), torch.full((1, 1, 3, 8), 2.5)):
        torch.testing.assert_close(Packed.of(x, 2).numbers(torch.float32), x)
    x = torch.randn(1, 2, 3, 8).bfloat16()
    assert torch.equal(Packed.of(x, 16).numbers(torch.bfloat16), x)
    assert Packed.of(x[:, :, :0], 2).numbers(torch.bfloat16).shape == (1, 2, 0, 8)


def test_padding_has_no_say_in_how_coarse_numbers_are():
    filled = DynamicCache()
    states = torch.randn(1, 2, 6, 8, generator=torch.Generator().manual_seed(0))
    states[:, :, :2] *= 1e3
    filled.update(states, states, 0)
    valid = torch.tensor([[False, False, True, True, True, True]])
    layer = MixedLayer(filled.layers[0], torch.zeros_like(valid), valid, 8, 4)
    read = layer.update(states[:, :, :1], states[:, :, :1])[0]
    want = torch.stack([coarsely(head, 4) for head in states[0, :, 2:]])
    torch.testing.assert_close(read[0, :, 2:6], want)
    assert torch.equal(read[:, :, 6:], states[:, :, :1])


@pytest.mark.parametrize("bits", [(8, 4), (16, 2), (8, 0)])
@pytest.mark.parametrize(
    ("change", "rows"),
    [
        (lambda layer: layer.reorder_cache(torch.tensor([1, 1, 0])), [1, 1, 0]),
        (lambda layer: layer.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        (lambda layer: layer.batch_select_indices(torch.tensor([2, 0])), [2, 0]),
    ],
    ids=["reorder", "repeat", "select"],
)
def test_rows_change_their_places(bits, change, rows):
    filled, generator = DynamicCache(), torch.Generator().manual_seed(0)
    states = torch.randn(3, 2, 6, 8, generator=generator)
    filled.update(states, states + 1, 0)
    best = torch.tensor([[1, 1, 0, 0, 0, 0], [0, 0, 0, 1, 1, 1], [1, 0, 1, 0, 1, 0]]) > 0
    layer = MixedLayer(filled.layers[0], best, torch.ones_like(best), *bits)
    layer.update(states[:, :, :2], states[:, :, 1:3])
    layer.queries.append(states[:, :, :1])
    none = states[:, :, :0]
    before, kept = layer.update(none, none), layer.kept
    change(layer)
    none = none[:1].expand(len(rows), -1, -1, -1)
    for x, y in zip(before, layer.update(none, none)):
        assert torch.equal(x[rows], y)
    assert torch.equal(layer.queries[0], states[rows, :, :1])
    assert bits[1] or (
        torch.equal(layer.kept.index, kept.index[rows]) and torch.equal(layer.kept.valid, kept.valid[rows])
    )


def test_half_of_the_memory_and_less(build, llava_batch):
    """The published widths, of the heads of LLaVA: 28% of 16 bits if all is important, 16% if nothing is."""
    assert ZipVL().kv_share(1.0, 16, 128) == (4 + 0.5) / 16
    assert ZipVL().kv_share(0.0, 16, 128) == (2 + 0.5) / 16
    assert ZipVL(high=16, low=0).kv_share(0.4, 16, 128) == pytest.approx(0.4)
    model, inputs = build("llava"), llava_batch(3)
    for plan in (ZipVL(0.9, high=8, low=2), ZipVL(0.7, high=16, low=0), ZipVL()):
        with accelerate(model, []) as handle:
            logits(model, inputs)
            plain = handle.report()["kv_bytes"]
        with accelerate(model, plan) as handle:
            logits(model, inputs)
            report = handle.report()
        shape = DecoderShape.from_config(model.config)
        assert plain == kv_bytes(shape, 3 * inputs["input_ids"].shape[1], 4)
        assert report["kv_bytes"] < 0.75 * plain


def test_reported_bytes_are_what_is_stored():
    """Of heads as wide as LLaVA's, in bfloat16: at most half, to the byte what the formula says beside the index."""
    filled, tokens = DynamicCache(), 64
    states = torch.randn(1, 4, tokens, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    filled.update(states, states, 0)
    plain = 2 * states.nbytes
    best = torch.arange(tokens)[None] % 4 == 0
    for method in (ZipVL(), ZipVL(high=16, low=2), ZipVL(high=8, low=0)):
        layer = MixedLayer(filled.layers[0], best, torch.ones_like(best), method.high, method.low)
        kept = tokens // 4 if method.low == 0 else tokens
        channels = 2 * 4 * 128 * 4 * sum(0 < bits < 16 for bits in (method.high, method.low))
        assert layer.bytes == method.kv_share(0.25, 16, 128) * plain + 8 * kept + channels
        assert layer.bytes < 0.5 * plain
        storages = {x.untyped_storage().nbytes() for x in (layer.keys, layer.values)}
        assert storages == {0}  # and nothing else is held


def test_what_is_generated_is_compressed_from_time_to_time(build, llava_batch):
    model, inputs, chosen = build("llava"), llava_batch(3), []
    compress = MixedLayer.compress

    def spy(self, best):
        chosen.append(best)
        compress(self, best)

    with pytest.MonkeyPatch.context() as patch, accelerate(model, ZipVL(0.9, 8, 8, every=4, recent=2)):
        patch.setattr(MixedLayer, "compress", spy)
        _, answer, cache = generated(model, inputs, 11)
    with accelerate(model, ZipVL(0.9, 8, 8)):
        want = generated(model, inputs, 11)[1]
    assert [len(layer.blocks) for layer in cache.layers] == [3] * 5  # the prompt and two times four tokens
    assert [layer.keys.shape[2] for layer in cache.layers] == [2] * 5
    assert cache.get_seq_length() == inputs["input_ids"].shape[1] + 10
    assert len(chosen) == 10 and all(best.shape == (3, 4) and best.any(1).all() for best in chosen)
    assert not torch.stack(chosen).all()
    error = (answer - want).abs()
    assert torch.equal(answer[:, :4], want[:, :4]) and 0 < error.mean() < 0.02 * want.std()


def test_the_window_is_judged_by_the_same_rule(monkeypatch):
    """Of the four tokens since the last compression, those that the two latest attend to."""
    filled, generator, chosen = DynamicCache(), torch.Generator().manual_seed(0), []
    filled.update(*[torch.randn(1, 1, 5, 8, generator=generator)] * 2, 0)
    method = ZipVL(0.8, 16, 2, recent=2, random=0, every=4)
    layer = MixedLayer(filled.layers[0], torch.ones(1, 5) > 0, torch.ones(1, 5) > 0, 16, 2)
    monkeypatch.setattr(layer, "compress", chosen.append)
    for _ in range(4):
        query, key = (3 * torch.randn(1, 1, 1, 8, generator=generator) for _ in range(2))
        whole = layer.update(key, key)
        method._decode(layer, lambda *args, **kwargs: None, None, query, *whole, None, scaling=0.4)
    rows = torch.cat(layer.queries, 2)[0, 0] @ whole[0][0, 0].T * 0.4
    rows[0, -1] = -torch.inf
    shares = rows.softmax(-1)[:, -4:]
    mass, seers = shares.sum(0), torch.tensor([2, 2, 2, 1])
    order = mass.sort(descending=True).values.cumsum(0)
    count = int((order < 0.8 * mass.sum()).sum()) + 1
    assert chosen[0][0].nonzero()[:, 0].tolist() == sorted((mass / seers).topk(count).indices.tolist()) != [0, 1, 2, 3]


# ---- what is refused


def test_beams_have_caches_of_their_own(build, llava_batch):
    """What beam search says of its answer is what the plain model does, with what was evicted masked."""
    model, inputs, plan = build("llava"), llava_batch(1), PLANS["evicting"]
    with accelerate(model, plan) as handle:
        out = model.generate(
            **inputs, num_beams=3, max_new_tokens=4, do_sample=False, eos_token_id=None, suppress_tokens=[IMAGE],
            return_dict_in_generate=True, output_scores=True, length_penalty=0.0,
        )  # fmt: skip
        seen = seen_by_layers(handle)[:, :1]
    last = inputs["input_ids"].shape[1] - 1
    want = masked(model, continued(inputs, out.sequences), seen, zipped=plan)[:, last:-1]
    chosen = want.log_softmax(-1).gather(2, out.sequences[:, last + 1 :, None])
    torch.testing.assert_close(out.sequences_scores, chosen.sum((1, 2)), atol=1e-4, rtol=1e-4)


def test_what_does_not_fit_is_refused(build, llava_batch):
    model, inputs = build("llava"), llava_batch(1)
    with accelerate(model.train(), ZipVL(0.9)), pytest.raises(ValueError, match="ZipVL is for inference only"):
        model(**inputs)
    model.eval()
    with pytest.raises(ValueError, match="There are two methods ZipVL: give one that does all"):
        accelerate(model, [ZipVL(0.9), ZipVL(0.8)])
    with accelerate(model, ZipVL(0.9)):
        cache = generated(model, inputs)[2]
        with pytest.raises(ValueError, match="The cache of an accelerated model cannot be cut back"):
            cache.crop(-1)
        with pytest.raises(ValueError, match="ZipVL's cache cannot be used for another prompt"):
            cache.reset()


def test_text_alone_is_shortened_too(model):
    inputs = {"input_ids": torch.arange(1, 31)[None], "attention_mask": torch.ones(1, 30).long()}
    with accelerate(model, ZipVL(0.8, 16, 0, recent=6)) as handle:
        logits(model, inputs)
        assert max(handle.report()["important_tokens_per_layer"]) < 30


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("zipvl:tau=0", "ZipVL: tau is 0.0, expected more than 0 and at most 1"),
        ("zipvl:high=3", "ZipVL: high is 3 and low is 2 bits, expected 2, 4, 8 or 16 for high"),
        ("zipvl:low=8", "ZipVL: high is 4 and low is 8 bits"),
        ("zipvl:recent=0", "ZipVL: recent is 0, random 64 and every 100, expected at least 1, 0 and 1"),
        ("zipvl:keep=0.5", "'keep=0.5' is no option of zipvl: expected tau=float, high=int"),
    ],
)
def test_wrong_text_is_named(text, message):
    with pytest.raises(ValueError, match=message):
        parse_reduction(text)


def test_text_is_an_object():
    assert parse_reduction("zipvl:tau=0.96,high=16,low=0") == ZipVL(0.96, 16, 0)
    assert parse_reduction("zipvl:tau=1,high=16").is_identity and not ZipVL(1.0).is_identity
