"""Schedules and the searches for them, on qualities whose best schedule is known."""

import pytest

from zoo.mllm import DecoderShape, FastV, Schedule, accelerate, agreement, g_search, p_sigmoid, prefill_flops
from zoo.mllm.search import sigmoid_schedule

SHAPE = DecoderShape(layers=8, dim=64, mlp_dim=128, num_heads=4, num_kv_heads=4, head_dim=16)


def test_a_schedule_is_reductions_and_survives_its_file(tmp_path):
    schedule = Schedule((1, 1, 0.5, 0.5, 0.25))
    assert schedule.reductions() == [FastV(0.5, 2), FastV(0.5, 4)]
    schedule.save(tmp_path / "schedule.json")
    assert Schedule.load(tmp_path / "schedule.json") == schedule
    assert [path.name for path in tmp_path.iterdir()] == ["schedule.json"]
    (tmp_path / "other.json").write_text('{"rate": 1}')
    with pytest.raises(ValueError, match=r"other\.json is no schedule: expected JSON"):
        Schedule.load(tmp_path / "other.json")


@pytest.mark.parametrize("rates", [(1, 0.5, 0.5), (1, 1, 0.5, 0.6), (1, 1, 0.5, 0)])
def test_rates_must_fall(rates):
    with pytest.raises(ValueError, match="expected 1 for the first 2 layers"):
        Schedule(rates)


def test_g_search_finds_what_each_layer_needs():
    needed = (1, 1, 0.75, 0.75, 0.5, 0.5, 0.125, 0.125)
    tried = []

    def quality(schedule):
        tried.append(schedule)
        return -sum(rate < need for rate, need in zip(schedule.rates, needed))

    # A layer's rate is tried with all later ones at the same: so each gets what it or a later one needs.
    assert g_search(quality, 8).rates == needed
    assert len(tried) < 8 * 5
    assert g_search(lambda schedule: 0.0, 8).rates == (1, 1, *[1 / 16] * 6)
    assert g_search(quality, 8, tolerance=8).rates == (1, 1, *[1 / 16] * 6)
    assert g_search(lambda schedule: sum(schedule.rates), 8).rates == (1,) * 8


@pytest.mark.parametrize("budget", [0.4, 0.6, 0.9])
@pytest.mark.parametrize(("slope", "middle"), [(0.05, 0.0), (0.5, 4.0), (2.0, 7.0)])
def test_sigmoid_schedules_cost_their_budget(budget, slope, middle):
    schedule = sigmoid_schedule(SHAPE, 20, 200, budget, slope, middle)
    assert schedule.flops(SHAPE, 20, 200) == pytest.approx(budget * prefill_flops(SHAPE, 220), rel=1e-6)


def test_too_small_a_budget_is_named():
    with pytest.raises(ValueError, match=r"The budget is 0\.1, but the smallest rates already cost 0\.297"):
        sigmoid_schedule(SHAPE, 20, 200, 0.1, 1.0, 4.0)


def test_p_sigmoid_takes_the_best():
    late = p_sigmoid(lambda schedule: -schedule.rates[-1], SHAPE, 20, 200, 0.6)
    flat = p_sigmoid(lambda schedule: schedule.rates[-1], SHAPE, 20, 200, 0.6)
    assert late.rates[-1] < 0.1 < flat.rates[-1] and late.rates[2] > flat.rates[2]
    assert late.flops(SHAPE, 20, 200) == pytest.approx(flat.flops(SHAPE, 20, 200))


def test_calibration_on_a_model(model, batch):
    inputs = batch(3)
    quality = agreement(model, [inputs])
    assert quality(Schedule((1,) * 5)) == 0
    assert quality(Schedule((1, 1, 0.1, 0.1, 0.1))) < quality(Schedule((1, 1, 1, 1, 0.5))) < 0
    found = g_search(quality, 5, tolerance=1e-3, steps=3)
    assert quality(found) >= -1e-3 or found.rates == (1,) * 5
    with accelerate(model, found.reductions()) as handle:
        model(**inputs)
        assert handle.report()["visual_tokens"] > 0
