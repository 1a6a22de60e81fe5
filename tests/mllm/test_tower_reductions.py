"""VisionZip, PruMerge and ToMe: what they keep and merge, and models of the seven families with them."""

import inspect

import pytest
import torch
from against_plain import GREEDY, IMAGE, continued, logits, masked, seen_by_layers
from torch.nn import functional as F

from zoo.mllm import accelerate
from zoo.mllm.attention import watch
from zoo.mllm.prumerge import PruMerge
from zoo.mllm.reduce import parse_reduction
from zoo.mllm.tome import ToMe
from zoo.mllm.vision_attention import Picture, tower_of
from zoo.mllm.visionzip import VisionZip

METHODS = [
    "visionzip:keep=0.5,contextual=0.25",
    "prumerge:neighbours=3",
    "prumerge:keep=0.4,neighbours=2",
    "tome:keep=0.3",
]


def picture(tokens=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (
        Picture(torch.rand(tokens, generator=generator) ** 8, torch.randn(tokens, 6, generator=generator)),
        torch.randn(tokens, 5, generator=generator),
    )


def cosine(keys, i, j):
    return float(F.cosine_similarity(keys[i], keys[j], dim=0))


def test_visionzip_adds_to_each_target_the_mean_of_what_is_like_it():
    seen, features = picture()
    keep, merged = VisionZip(0.5, contextual=0.34).merge(seen, features)
    dominant = sorted(range(12), key=lambda i: -seen.attention[i])[:4]
    rest = [i for i in range(12) if i not in dominant]
    targets = [rest[0], rest[4]]
    assert keep.nonzero()[:, 0].tolist() == sorted(dominant + targets)
    assert torch.equal(merged[dominant], features[dominant])
    groups = {target: [] for target in targets}
    for i in set(rest) - set(targets):
        groups[max(targets, key=lambda target: cosine(seen.keys, i, target))].append(features[i])
    assert all(groups.values())
    for target, group in groups.items():
        torch.testing.assert_close(merged[target], features[target] + torch.stack(group).mean(0))


def test_visionzip_without_context_only_chooses():
    seen, features = picture()
    keep, merged = VisionZip(0.25, contextual=0).merge(seen, features)
    assert keep.nonzero()[:, 0].tolist() == sorted(seen.attention.topk(3).indices.tolist())
    assert torch.equal(merged, features)


@pytest.mark.parametrize("plus", [False, True])
@pytest.mark.parametrize("keep", [0.0, 0.4])
def test_prumerge_adds_neighbours_and_what_is_left(keep, plus):
    seen, features = picture(24)
    attention = seen.attention
    low, high = (float(attention.quantile(q)) for q in (0.25, 0.75))
    count = 9 if keep else int((attention > high + 1.5 * (high - low)).sum())
    assert 0 < count < 24
    index = set(attention.topk(count).indices.tolist()) | (
        set(range(0, 24, max(1, 24 // count // 3))) if plus else set()
    )
    kept, merged = PruMerge(keep, neighbours=4, plus=plus).merge(seen, features)
    rest = [i for i in range(24) if i not in index]
    for i in index:
        others = sorted((j for j in range(24) if j != i), key=lambda j: -cosine(seen.keys, i, j))[:4]
        torch.testing.assert_close(merged[i], features[i] + sum(attention[j] * features[j] for j in others))
    assert set(kept.nonzero()[:, 0].tolist()) == index | set(rest[-1:])
    if rest:
        torch.testing.assert_close(merged[rest[-1]], sum(attention[j] * features[j] for j in rest))


def test_tome_merges_the_most_similar_pairs():
    seen, features = picture(6)
    pairs = sorted(
        ((max((1, 3, 5), key=lambda b: cosine(seen.keys, a, b)), a) for a in (0, 2, 4)),
        key=lambda pair: -cosine(seen.keys, pair[1], pair[0]),
    )[:2]
    keep, merged = ToMe(0.6).merge(seen, features)
    assert keep.nonzero()[:, 0].tolist() == [i for i in range(6) if i not in [a for _, a in pairs]]
    for b in (1, 3, 5):
        group = torch.stack([features[b], *(features[a] for target, a in pairs if target == b)])
        torch.testing.assert_close(merged[b], group.mean(0))


def test_tome_weighs_by_what_a_token_stands_for():
    """Whatever the order of merging, one token is the mean of all."""
    seen, features = picture(11)
    keep, merged = ToMe(1 / 11).merge(seen, features)
    assert keep.sum() == 1
    torch.testing.assert_close(merged[keep][0], features.mean(0))


def spied(model, inputs, block):
    """The attention (pictures, heads, L, L) of a block of the tower, from the eager code of transformers."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    seen, tower = [], tower_of(model, last=block)

    def spy(module, query, key, value, attention_mask, scaling, **kwargs):
        if module is tower.attention:
            seen.append((scaling * query @ key.transpose(-1, -2)).softmax(-1))
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)

    AttentionInterface.register("spy", spy)
    tower.module.set_attn_implementation("spy")
    logits(model, inputs)
    tower.module.set_attn_implementation("sdpa")
    return torch.cat(seen)


def test_what_the_tower_attends_to(build, batch, family):
    """Of CLS where there is one, else of all patches; a visual token has the mean of its patches."""
    model, inputs, seen = build(family), batch(1), []
    for last in (False, True):
        for parameter in tower_of(model, last).attention.parameters():
            torch.nn.init.normal_(parameter, std=0.5)  # the default leaves the attention of such small models flat
    weights = spied(model, inputs, False).sum(1)
    tower = tower_of(model)
    with accelerate(model, "visionzip"):
        handle = watch(tower.attention, lambda *args: seen.extend(tower.look(*args, False)))
        logits(model, inputs)
        handle.remove()
    patches = weights[:, 0, 1:] if family in ("llava", "llava_next", "internvl") else weights.mean(1)
    if family in ("internvl", "smolvlm", "idefics3"):
        patches = F.avg_pool2d(patches.view(-1, 1, 4, 4), 2).flatten(1)
    if family.startswith("qwen"):
        patches = patches.unflatten(1, (-1, 4)).mean(2)
    torch.testing.assert_close(torch.stack([one.attention for one in seen]), patches)
    assert patches.std() > 1e-3  # else nothing was compared
    if family in ("llava", "llava_next"):  # the projector takes the output of the last block but one
        assert not torch.allclose(spied(model, inputs, True).sum(1)[:, 0, 1:], patches, rtol=1e-3)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("method", ["visionzip:keep=1", "prumerge:keep=1", "tome:keep=1"])
def test_everything_kept_is_the_plain_model(model, batch, rows, method):
    inputs, names = batch(rows), list(model.state_dict())
    plain, answer = logits(model, inputs), model.generate(**inputs, max_new_tokens=3, **GREEDY)
    with accelerate(model, method):
        assert torch.equal(logits(model, inputs), plain)
        assert torch.equal(model.generate(**inputs, max_new_tokens=3, **GREEDY), answer)
    with accelerate(model, method.replace("=1", "=0.5")):
        assert not torch.equal(logits(model, inputs), plain)
        assert list(model.state_dict()) == names
    assert torch.equal(logits(model, inputs), plain)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rows", [1, 3])
def test_dropping_is_masking(model, batch, family, rows, method):
    """Prefill and decoding are one pass of the plain model, whose projector is given what was merged, with masks."""
    inputs, projector, given = batch(rows), tower_of(model).projector, []
    plain = logits(model, inputs)
    with accelerate(model, method) as handle:
        spy = projector.register_forward_pre_hook(lambda module, args: given.append(args[0]))
        prefill = logits(model, inputs)
        spy.remove()
        out = model.generate(**inputs, max_new_tokens=3, **GREEDY, return_dict_in_generate=True, output_logits=True)
        seen, report = seen_by_layers(handle), handle.report()
    replay = projector.register_forward_pre_hook(lambda module, args: (given[0],))
    want = masked(model, continued(inputs, out.sequences), seen)
    replay.remove()
    last = len(plain[0]) - 1
    torch.testing.assert_close(torch.stack(out.logits, 1), want[:, last:-1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(prefill[:, last], want[:, last], atol=1e-5, rtol=1e-5)
    assert (prefill[:2, last] - plain[:2, last]).abs().max() > 1e-4
    if rows == 3:
        torch.testing.assert_close(prefill[2, last], plain[2, last], atol=1e-5, rtol=1e-5)
    lengths = {layer.keys.shape[2] for layer in out.past_key_values.layers}
    assert lengths == {int(seen[0].sum(1).max()) + 2}
    images = (inputs["input_ids"] == IMAGE).sum(1)
    assert report["visual_tokens_per_layer"] == [int((seen[0] & (inputs["input_ids"] == IMAGE)).sum())] * 5
    if "keep" in method:  # of each crop of LLaVA-NeXT; its separators stay
        crops, rest = (3, 4) if family == "llava_next" else (1, 0)
        share = float(method.split("keep=")[1].split(",")[0])
        kept = crops * -(-int(images[0] - rest) * share // crops) + rest
        assert (seen[0] & (inputs["input_ids"] == IMAGE)).sum(1)[: min(rows, 2)].tolist() == [kept] * min(rows, 2)


@pytest.mark.parametrize("method", [["fastv:layer=2,keep=0.5", METHODS[0]], ["divprune:keep=0.5", METHODS[3]]], ids=str)
def test_with_other_methods(model, batch, method):
    """The tower's method comes first, and the other never sees a token that was dropped."""
    inputs, projector, given = batch(3), tower_of(model).projector, []
    with accelerate(model, method[1]):
        spy = projector.register_forward_pre_hook(lambda module, args: given.append(args[0]))
        logits(model, inputs)
        spy.remove()
    with accelerate(model, method[1]) as handle:
        logits(model, inputs)
        alone = seen_by_layers(handle)
    with accelerate(model, method) as handle:
        both = logits(model, inputs)
        seen = seen_by_layers(handle)
    replay = projector.register_forward_pre_hook(lambda module, args: (given[0],))
    want = masked(model, inputs, seen)
    replay.remove()
    torch.testing.assert_close(both[:, -1], want[:, -1], atol=1e-5, rtol=1e-5)
    assert (seen <= alone).all() and seen[-1].sum() < alone[-1].sum()


def test_features_made_before_can_be_given(build, llava_batch):
    model, inputs = build("llava"), llava_batch(1)
    if "mm_encoder_outputs" not in inspect.signature(model.model.forward).parameters:
        pytest.skip("this version of transformers takes no features")
    with accelerate(model, METHODS[0]):
        want = logits(model, inputs)
        with torch.no_grad():
            features = model.get_image_features(inputs.pop("pixel_values"), return_dict=True)
        got = logits(model, {**inputs, "mm_encoder_outputs": {"image": features}})
    assert torch.equal(got, want)


def test_gradients_reach_the_projector_through_what_is_kept(model, batch):
    inputs = batch(1)
    parameters = list(tower_of(model).projector.parameters())
    with accelerate(model, METHODS[0]):
        gradients = torch.autograd.grad(model(**inputs).logits[0, -1].square().sum(), parameters)
    assert all(one.isfinite().all() for one in gradients) and max(one.abs().max() for one in gradients) > 0


def test_half_precision(build, batch, family):
    model, inputs = build(family).to(torch.bfloat16), batch(3)
    inputs["pixel_values"] = inputs["pixel_values"].to(torch.bfloat16)
    with accelerate(model, METHODS[0]) as handle:
        out = logits(model, inputs)
        assert 0 < handle.report()["visual_tokens_per_layer"][0] < handle.report()["visual_tokens"]
    assert out.dtype == torch.bfloat16 and out[inputs["attention_mask"].bool()].isfinite().all()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("visionzip:keep=0", "VisionZip: keep is 0.0, expected more than 0"),
        ("visionzip:contextual=1", "VisionZip: contextual is 1.0, expected at least 0 and less than 1"),
        ("prumerge:keep=2", "PruMerge: keep is 2.0, expected 0 for as many as stand out"),
        ("prumerge:neighbours=-1", "PruMerge: neighbours is -1"),
        ("tome:layer=3", "'layer=3' is no option of tome: expected keep=float"),
    ],
)
def test_wrong_text_is_named(text, message):
    with pytest.raises(ValueError, match=message):
        parse_reduction(text)


def test_what_does_not_fit_is_refused(build, llava_batch):
    model, inputs = build("llava"), llava_batch(1)
    with pytest.raises(ValueError, match="VisionZip and ToMe both work on the vision tower"):
        accelerate(model, ["visionzip", "tome"])
    with (
        accelerate(model, "visionzip"),
        pytest.raises(ValueError, match="the projector is given 17 tokens, but the tower has seen 16 without CLS"),
    ):
        model(**inputs, vision_feature_select_strategy="full")
    model.config.model_type = "llama"
    from zoo.mllm.families import FAMILIES

    FAMILIES.add("llama")
    with pytest.raises(ValueError, match="where the vision tower of the family 'llama' has its attention"):
        accelerate(model, "visionzip")
    FAMILIES.discard("llama")
    assert model.get_decoder().config._attn_implementation == "sdpa"
    with pytest.raises(ValueError, match="PruMerge keeps what stands out in a picture"):
        PruMerge().visual_tokens(576, 576, 64)
