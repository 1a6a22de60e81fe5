"""Every pair of methods: it is the plain model with what both leave out masked, or one sentence refuses it."""

from contextlib import nullcontext
from itertools import combinations

import pytest
import torch
from against_plain import IMAGE, MARKER, continued, generated, logits, masked, merged_by_layers, seen_by_layers

from zoo.mllm import YOPO, MoD, ZipVL, accelerate
from zoo.mllm.vision_attention import tower_of

ROUTED = (2, 4)
PLAN = YOPO(layer=4, ffn_ratio=2, pruned=((), (), (0, 1), (0, 3)))
WINDOW = YOPO(window=3)
EVICTING = ZipVL(tau=0.8, high=16, low=0, recent=6, random=0)
METHODS = {
    "fastv": {"reduce": "fastv:layer=1,keep=0.6"},
    "pyramiddrop": {"reduce": "pyramiddrop:layers=1/3,keep=0.7"},
    "sparsevlm": {"reduce": "sparsevlm:layers=1/2,keep=0.5/0.3"},
    "zipvl": {"reduce": EVICTING},
    "yopo": {"reduce": PLAN},
    "yopo's window": {"reduce": WINDOW},
    "visionzip": {"reduce": "visionzip:keep=0.6,contextual=0.25"},
    "prumerge": {"reduce": "prumerge:keep=0.6,neighbours=2"},
    "tome": {"reduce": "tome:keep=0.6"},
    "divprune": {"reduce": "divprune:keep=0.7"},
    "uniform": {"reduce": "uniform:layer=3,keep=0.5"},
    "random": {"reduce": "random:layer=1,keep=0.8"},
    "mod": {"depth": ROUTED},
    "mma": {"mask": "mma"},
    "mma_mutual": {"mask": "mma_mutual"},
    "framewise": {"mask": "framewise"},
    "composite": {"mask": "composite"},
}
TOWER, MASKS = {"visionzip", "prumerge", "tome"}, {"mma", "mma_mutual", "framewise", "composite"}
PAIRS = [pair for pair in combinations(METHODS, 2) if not set(pair) <= MASKS]
REFUSED = {  # at once
    "both work on the vision tower: take one of them.": {frozenset(pair) for pair in combinations(TOWER, 2)},
    "and MoD both change what a layer computes: take one of them.": {
        frozenset({"mod", name}) for name in ("zipvl", "yopo", "yopo's window")
    },
    "There are two methods YOPO: give one that does all.": {frozenset({"yopo", "yopo's window"})},
    "both say what is seen: take one of them.": {frozenset({"yopo's window", name}) for name in MASKS},
}
REFUSED_LATER = {  # when a prompt comes
    "both replace the attention of a layer: give one of them.": {
        frozenset({"zipvl", "yopo"}),
        frozenset({"zipvl", "yopo's window"}),
    },
    "take window=0, or drop tokens in later layers.": {
        frozenset({"yopo's window", name})
        for name in METHODS.keys() - MASKS - {"zipvl", "yopo", "yopo's window", "mod"}
    },
}


def said(refused, pair):
    return next((sentence for sentence, pairs in refused.items() if frozenset(pair) in pairs), None)


@pytest.mark.parametrize("pair", PAIRS, ids=" and ".join)
def test_two_methods(llava, llava_batch, pair):
    torch.manual_seed(0)
    model, inputs, options = llava, llava_batch(3), {}
    for name in pair:
        for kind, value in METHODS[name].items():
            options[kind] = [*options.get(kind, []), value] if kind == "reduce" else value
    rule, depth = options.get("mask", "causal"), MoD(0.5, ROUTED) if "mod" in pair else None
    start = [model, options.get("reduce", []), depth, rule, [MARKER]]
    for refused in (said(REFUSED, pair), said(REFUSED_LATER, pair)):
        if refused:
            with pytest.raises(ValueError, match=refused) as error, accelerate(*start):
                logits(model, inputs)
            assert "\n" not in str(error.value) and str(error.value).endswith(".") and ". " not in str(error.value)
            return
    given = []
    with accelerate(*start) as handle:
        tower = TOWER.intersection(pair)
        projector = tower_of(model).projector
        spy = projector.register_forward_pre_hook(lambda module, args: given.append(args[0])) if tower else None
        sequences, answer, cache = generated(model, inputs)
        seen, merged, report = seen_by_layers(handle), merged_by_layers(handle), handle.report()
    replay = nullcontext()
    if tower:
        spy.remove()
        replay = projector.register_forward_pre_hook(lambda module, args: (given[0],))
    plan = next((one for one in (PLAN, WINDOW) if one in options.get("reduce", [])), YOPO())
    try:
        want = masked(
            model, continued(inputs, sequences), seen, rule, (depth, ROUTED) if depth else None, plan, merged,
            EVICTING if "zipvl" in pair else None,
        )  # fmt: skip
    finally:
        if tower:
            replay.remove()
    last = inputs["input_ids"].shape[1] - 1
    torch.testing.assert_close(answer, want[:, last:-1], atol=1e-5, rtol=1e-5)
    visual = seen & (inputs["input_ids"] == IMAGE)
    assert report["visual_tokens_per_layer"] == [int(layer.sum()) for layer in visual]
    if "zipvl" not in pair:
        text = [layer.keys.shape[2] - 2 for layer in cache.layers]
        assert text == [int(layer.sum(1).max()) if not layer.all() else last + 1 for layer in seen]
