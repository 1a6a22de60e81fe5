"""The stand-in for mmcv's compiled ops against stored results of the compiled ones, and how it is put in place."""

import itertools
import re
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("mmcv")

from zoo.openmmlab import ops

# isort: split
import mmcv
from mmcv import ops as mmcv_ops

DATA = Path(__file__).with_name("data")


def positional(function):
    """An autograd function, which takes no keywords."""
    return lambda *inputs, **options: function(*inputs, *options.values())


def nms_match(dets, **options):
    """As one tensor: the members of each group, -1 after each."""
    return torch.tensor([i for group in mmcv_ops.nms_match(dets, **options) for i in (*group.tolist(), -1)])


def focal(loss):
    return lambda input, target, weight, gamma, alpha, reduction: loss(input, target, gamma, alpha, weight, reduction)


def attention(value, locations, weights, shapes):
    shapes = torch.tensor(shapes)
    function = mmcv_ops.multi_scale_deform_attn.MultiScaleDeformableAttnFunction
    return function.apply(value, shapes, torch.zeros(len(shapes), dtype=torch.long), locations, weights, 64)


def grid(**options):
    """Every combination of options."""
    return [dict(zip(options, values)) for values in itertools.product(*options.values())]


PLAIN = {"stride": 1, "padding": 1, "dilation": 1, "groups": 1, "deform_groups": 1}
STRIDED = {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2), "groups": 2, "deform_groups": 2}
FOCAL = [{"gamma": 2.0, "alpha": 0.25, "reduction": "sum"}, {"gamma": 1.5, "alpha": 0.4, "reduction": "mean"}]
# Op: function of its inputs and options, the inputs it is differentiated by, the options of each case, tolerance.
OPS = {
    "nms": (mmcv_ops.nms, [], grid(iou_threshold=[0.3, 0.7], offset=[0, 1], score_threshold=[0, 0.4]), 0),
    "batched_nms": (
        mmcv_ops.batched_nms,
        [],
        [
            {"nms_cfg": {"type": "nms", "iou_threshold": 0.5}},
            {"nms_cfg": {"type": "nms", "iou_threshold": 0.5, "split_thr": 10, "max_num": 20}},
            {"nms_cfg": {"type": "nms", "iou_threshold": 0.5, "class_agnostic": True}},
        ],
        0,
    ),
    "soft_nms": (mmcv_ops.soft_nms, [], grid(method=["naive", "linear", "gaussian"], offset=[0, 1]), 1e-6),
    "nms_match": (nms_match, [], grid(iou_threshold=[0.3, 0.6]), 0),
    "bbox_overlaps": (mmcv_ops.bbox_overlaps, [], grid(mode=["iou", "iof"], aligned=[False, True], offset=[0, 1]), 0),
    "roi_align": (
        positional(mmcv_ops.roi_align),
        ["input"],
        grid(size=[(2, 3)], scale=[0.25], sampling_ratio=[0, 2], pool_mode=["avg"], aligned=[True, False]),
        1e-5,
    ),
    "roi_pool": (positional(mmcv_ops.roi_pool), ["input"], [{"size": (2, 3), "scale": 0.25}], 1e-6),
    "deform_conv": (positional(mmcv_ops.deform_conv2d), ["input", "offset", "weight"], [PLAIN, STRIDED], 1e-5),
    "modulated_deform_conv": (
        positional(mmcv_ops.modulated_deform_conv2d),
        ["input", "offset", "mask", "weight", "bias"],
        [PLAIN, STRIDED, PLAIN | {"stride": 2}],  # the last one's offsets are larger than the output, as DyHead's
        1e-5,
    ),
    "sigmoid_focal_loss": (focal(mmcv_ops.sigmoid_focal_loss), ["input"], FOCAL, 1e-6),
    "softmax_focal_loss": (focal(mmcv_ops.softmax_focal_loss), ["input"], FOCAL, 1e-6),
    "psa_mask": (positional(mmcv_ops.psa_mask.psa_mask), ["input"], grid(type=[0, 1], size=[(5, 3), (9, 11)]), 0),
    "masked_conv": (positional(mmcv_ops.masked_conv2d), [], [{"padding": 1}, {"padding": (0, 1)}], 1e-5),
    "carafe": (positional(mmcv_ops.carafe), ["features", "masks"], [{"kernel": 3, "groups": 2, "scale": 2}], 1e-5),
    "deform_attention": (attention, ["value", "locations", "weights"], [{"shapes": [(4, 5), (2, 3)]}], 1e-5),
}
CASES = [(op, index) for op, (_, _, cases, _) in OPS.items() for index in range(len(cases))]


def run(op, index, inputs):
    """Outputs, and the gradients of their sum weighted by -1 ... 1."""
    function, differentiable, cases, _ = OPS[op]
    inputs = {name: tensor.clone().requires_grad_(name in differentiable) for name, tensor in inputs.items()}
    outputs = function(*inputs.values(), **cases[index])
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    results = {f"output{number}": output.detach() for number, output in enumerate(outputs)}
    if differentiable:
        weights = (
            torch.linspace(-1, 1, outputs[0].numel(), dtype=outputs[0].dtype) if outputs[0].ndim else torch.ones(1)
        )
        gradients = torch.autograd.grad(
            outputs[0], [inputs[name] for name in differentiable], weights.view_as(outputs[0])
        )
        results |= {f"gradient of {name}": gradient for name, gradient in zip(differentiable, gradients)}
    return results


def stored(op, index):
    """Inputs as tensors and results as arrays."""
    with np.load(DATA / f"{op}.npz") as file:
        case = {key.partition("/")[2]: value for key, value in file.items() if key.startswith(f"{index}/")}
    inputs = {key[6:]: torch.from_numpy(value) for key, value in case.items() if key.startswith("input/")}
    return inputs, {key[7:]: value for key, value in case.items() if key.startswith("result/")}


@pytest.mark.parametrize(("op", "index"), CASES)
def test_results_are_those_of_the_compiled_op(op, index):
    inputs, expected = stored(op, index)
    results = run(op, index, inputs)
    assert results.keys() == expected.keys()
    tolerance = OPS[op][3]
    for name, value in expected.items():
        assert np.any(value)
        np.testing.assert_allclose(results[name].numpy(), value, rtol=tolerance, atol=tolerance, err_msg=name)


# ---- what the stored cases do not show


def test_boxes_that_overlap_by_just_the_threshold_stay():
    """The threshold has float32's precision: the IoU of these is 0.3 in float32, a little more than 0.3."""
    pair = torch.tensor([[0.0, 0.0, 13.0, 10.0], [7.0, 0.0, 20.0, 10.0]])
    assert ops.OPS["nms"](pair, torch.tensor([0.9, 0.8]), 0.3, 0).tolist() == [0, 1]
    assert ops.OPS["nms"](pair, torch.tensor([0.9, 0.8]), 0.2999, 0).tolist() == [0]


def test_focal_loss_of_certain_errors_ends_where_mmcvs_does():
    logits = torch.tensor([[30.0, -200.0]], requires_grad=True)
    loss = mmcv_ops.sigmoid_focal_loss(logits, torch.tensor([1]), 2.0, 0.25, None, "none")
    tiny = -np.log(np.finfo(np.float32).tiny)  # 87.3
    np.testing.assert_allclose(loss.detach(), [[0.75 * tiny, 0.25 * tiny]], rtol=1e-6)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    np.testing.assert_allclose(gradient, [[0.75, -0.25]], rtol=1e-6)


def test_a_region_without_area_pools_nothing():
    features = torch.randn(1, 2, 6, 6, requires_grad=True)
    regions = torch.tensor([[0.0, 4.0, 4.0, 1.0, 5.0], [0.0, 50.0, 50.0, 60.0, 60.0], [0.0, 0.0, 0.0, 2.0, 2.0]])
    pooled = mmcv_ops.roi_pool(features, regions, (2, 2), 1.0)
    assert not pooled[:2].any() and pooled[2].all()
    assert torch.autograd.grad(pooled[:2].sum(), features, retain_graph=True)[0].abs().sum() == 0
    assert torch.autograd.grad(pooled[2].sum(), features)[0].sum() == pooled[2].numel()


def test_naive_carafe_is_carafe():
    inputs, expected = stored("carafe", 0)
    result = mmcv_ops.carafe_naive(*inputs.values(), 3, 2, 2)
    np.testing.assert_allclose(result, expected["output0"], rtol=1e-5, atol=1e-5)
    gradients = {
        name: torch.empty_like(tensor) for name, tensor in inputs.items()
    }  # mmcv differentiates it on GPUs only
    weights = torch.linspace(-1, 1, result.numel()).view_as(result)
    ops.OPS["carafe_naive_backward"](weights, *inputs.values(), *gradients.values(), 3, 2, 2)
    for name, gradient in gradients.items():
        np.testing.assert_allclose(gradient, expected[f"gradient of {name}"], rtol=1e-5, atol=1e-5)


def test_nothing_in_gives_nothing_out():
    none, no_scores = torch.zeros(0, 4), torch.zeros(0)
    for suppress in (mmcv_ops.nms, mmcv_ops.soft_nms):
        dets, keep = suppress(none, no_scores, 0.5)
        assert dets.shape == (0, 5) and keep.shape == (0,)
    features, regions = torch.randn(1, 3, 8, 8, requires_grad=True), torch.zeros(0, 5)
    for pool in (mmcv_ops.roi_align, mmcv_ops.roi_pool):
        pooled = pool(features, regions, (2, 2), 1.0)
        assert pooled.shape == (0, 3, 2, 2)
        assert torch.autograd.grad(pooled.sum(), features)[0].shape == features.shape


@pytest.mark.parametrize("op", [op for op, (_, differentiable, *_) in OPS.items() if differentiable])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32_and_rounded(op, dtype):
    inputs, _ = stored(op, 0)
    halves = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}
    floats = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in halves.items()}
    for name, result in run(op, 0, halves).items():
        exact = run(op, 0, floats)[name]
        assert result.dtype == dtype and exact.any()
        torch.testing.assert_close(result.float(), exact, rtol=0.01, atol=0.01 * exact.abs().max().item())


def test_an_op_without_replacement_says_what_to_install():
    boxes = torch.rand(3, 5)
    with pytest.raises(NotImplementedError, match=r"^The mmcv op nms_rotated has no .*: install mmcv with .*\)\.$"):
        mmcv_ops.nms_rotated(boxes, torch.rand(3), 0.5)
    with pytest.raises(NotImplementedError, match="roi_align with pool_mode='max'"):
        mmcv_ops.roi_align(torch.rand(1, 1, 4, 4), boxes, (2, 2), 1.0, 0, "max")


# ---- how it is put in place


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """mmcv without its extension, and a folder where one may be put."""
    monkeypatch.setattr(sys, "meta_path", [x for x in sys.meta_path if type(x).__module__ != "zoo.openmmlab.ops"])
    monkeypatch.delitem(sys.modules, "mmcv._ext")
    monkeypatch.setattr(mmcv, "_ext", None)
    monkeypatch.setattr(mmcv, "__path__", [*mmcv.__path__, str(tmp_path)])
    return tmp_path


def test_it_is_there_where_nothing_is(fresh):
    assert ops.install() == ops.install() == "torch"
    assert sum(type(finder).__module__ == "zoo.openmmlab.ops" for finder in sys.meta_path) == 1
    assert sys.modules["mmcv._ext"].nms is ops.OPS["nms"]
    assert not hasattr(sys.modules["mmcv._ext"], "__wrapped__")  # dunders are no ops


def test_compiled_ops_are_used(fresh):
    (fresh / "_ext.py").write_text("nms = 'compiled'")  # what matters is that Python finds it by itself
    assert ops.install() == "compiled"
    assert sys.modules["mmcv._ext"].nms == "compiled"


def test_broken_compiled_ops_are_replaced_with_a_warning(fresh):
    (fresh / f"_ext{EXTENSION_SUFFIXES[0]}").write_bytes(b"built for another PyTorch")
    with pytest.warns(UserWarning, match=r"^The compiled ops of mmcv do not load, PyTorch's are used instead: .*_ext"):
        assert ops.install() == "torch"
    assert sys.modules["mmcv._ext"].nms is ops.OPS["nms"]
    assert [file.name for file in fresh.iterdir()] == [f"_ext{EXTENSION_SUFFIXES[0]}"]
    assert (fresh / f"_ext{EXTENSION_SUFFIXES[0]}").read_bytes() == b"built for another PyTorch"


def test_models_that_were_imported_before_are_named(fresh, monkeypatch):
    """The fork of mmdet goes on without mmcv.ops, with classes that raise."""
    monkeypatch.setitem(sys.modules, "mmdet.models", mmcv)
    monkeypatch.delitem(sys.modules, "mmdet.structures", raising=False)
    assert ops.install() == "torch"  # with mmcv.ops
    monkeypatch.delitem(sys.modules, "mmcv.ops")
    with pytest.raises(
        ImportError, match=r"^mmdet\.models was imported without .*: import zoo\.openmmlab before it\.$"
    ):
        ops.install()


def test_every_symbol_is_one_that_mmcv_calls():
    """A misspelt name would be served, and raise only when it is called."""
    called = set()
    for file in Path(mmcv_ops.__file__).parent.glob("*.py"):
        called |= set(re.findall(r"ext_module\.(\w+)", file.read_text(encoding="utf-8")))
    assert len(called) > 90
    assert set(ops.OPS) <= called
