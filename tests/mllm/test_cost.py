"""What a plan costs before it is run, against what a run reports and counts."""

import pytest
from against_plain import logits
from torch.utils.flop_counter import FlopCounterMode

from zoo.mllm import YOPO, DecoderShape, MoD, PruMerge, Schedule, ZipVL, accelerate, plan_cost, prefill_flops

LLAMA_7B = DecoderShape(layers=32, dim=4096, mlp_dim=11008, num_heads=32, num_kv_heads=32, head_dim=128)
PLANS = [
    {},
    {"reduce": "fastv:layer=2,keep=0.3"},
    {"reduce": "pyramiddrop:keep=0.3"},
    {"reduce": "sparsevlm:layers=2/4,keep=0.7/0.2"},
    {"reduce": ["uniform:keep=0.7", "sparsevlm:layers=2,keep=0.5"]},
    {"reduce": ["fastv:layer=1,keep=0.5", "visionzip:keep=0.6", "random:layer=1,keep=0.9"]},
    {"reduce": "tome:keep=0.3"},
    {"reduce": "prumerge:keep=0.4"},
    {"reduce": "divprune:keep=0.1"},
    {"reduce": YOPO(layer=3)},
    {"reduce": Schedule((1, 1, 0.5, 0.25, 0.25)).reductions()},
    {"depth": (0.34, (2, 4))},
    {"depth": (0.5, None), "reduce": "uniform:layer=2,keep=0.6"},
]


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_what_is_planned_is_what_is_reported(llava, llava_batch, plan):
    inputs = llava_batch(1)
    if "depth" in plan:
        plan = {**plan, "depth": MoD(*plan["depth"])}
    text = inputs["input_ids"].shape[1] - 16
    cost = plan_cost(llava.config, text, 16, **plan, bits=32)
    with accelerate(llava, **plan) as handle:
        logits(llava, inputs)
        report = handle.report()
    assert list(cost.visual_tokens) == report["visual_tokens_per_layer"]
    assert cost.kv_bytes == report["kv_bytes"]


def test_zipvl_takes_at_most_what_is_planned(llava, llava_batch):
    inputs, plain = llava_batch(1), plan_cost(llava.config, 8, 16, bits=32).kv_bytes
    for method in (ZipVL(0.9, 8, 8), ZipVL(0.7, 16, 0, recent=6, random=0)):
        with accelerate(llava, method) as handle:
            logits(llava, inputs)
            found, planned = handle.report()["kv_bytes"], plan_cost(llava.config, 8, 16, method, bits=32).kv_bytes
        # Beside it each layer has an index, and scales of the channels for both widths.
        extra = 5 * (24 * 8 + (2 * 2 * 2 * 8 * 4 if method.high < 16 else 0))
        assert found == planned + extra if method.low else found < plain == planned


def test_fastv_costs_what_its_paper_says():
    """K F(n) + (32 - K) F((1 - R) n), with F(n) = 8 n d^2 + 4 n^2 d + 6 n d m here, and one row of attention."""
    whole, less = (prefill_flops(LLAMA_7B, count) / 32 for count in (640, 352))
    found = plan_cost(LLAMA_7B, 64, 576, "fastv:layer=2,keep=0.5").flops
    assert found == 2 * whole + 30 * less + 2 * 640 * 4096
    assert 0.5 < found / plan_cost(LLAMA_7B, 64, 576).flops < 0.6


def linear_flops(model, inputs):
    """FLOPs of the layers' linear parts."""
    counts = []
    for layer in model.get_decoder().layers:
        layer.counter = FlopCounterMode(display=False)
        layer.register_forward_pre_hook(lambda module, args: module.counter.__enter__() and None)
        layer.register_forward_hook(lambda module, args, output: module.counter.__exit__(None, None, None))
    logits(model, inputs)
    for layer in model.get_decoder().layers:
        found = layer.counter.get_flop_counts()["Global"]
        counts.append(sum(flops for op, flops in found.items() if str(op) in ("aten.mm", "aten.addmm")))
    return counts


@pytest.mark.parametrize("reduce", ["fastv:layer=2,keep=0.5", "pyramiddrop:layers=1/3,keep=0.5", "uniform:keep=0.25"])
def test_layers_compute_what_is_planned(build, llava_batch, reduce):
    model, inputs = build("llava"), llava_batch(1)
    shape, text = DecoderShape.from_config(model.config), inputs["input_ids"].shape[1] - 16
    with accelerate(model, reduce):
        found = linear_flops(model, inputs)
    for count, visual in zip(found, plan_cost(shape, text, 16, reduce).visual_tokens):
        tokens = text + visual
        assert count == prefill_flops(shape, tokens) / 5 - 4 * tokens**2 * 4 * 8


def test_what_cannot_be_told_before_is_named():
    with pytest.raises(ValueError, match="PruMerge keeps what stands out in a picture: give keep"):
        plan_cost(LLAMA_7B, 64, 576, PruMerge())
    with pytest.raises(ValueError, match="MoD with a threshold skips what the picture tells"):
        plan_cost(LLAMA_7B, 64, 576, depth=MoD(select="threshold"))
    with pytest.raises(ValueError, match=r"MoD: layers are \[40\]"):
        plan_cost(LLAMA_7B, 64, 576, depth=MoD(layers=[40]))
