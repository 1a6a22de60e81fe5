"""Checkpoints: every published shape of file loads, what does not fit is refused with the reason, nothing half-way."""

import argparse
import copy
import hashlib
import sys
import types
import warnings

import numpy as np
import pytest
import safetensors
import safetensors.torch
import timm
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from zoo.checkpoints import (
    CheckpointError,
    LoadReport,
    convert_checkpoint,
    create_model,
    load_checkpoint,
    save_checkpoint,
)


class Family(nn.Module):
    """A family whose authors called things otherwise, and stored a linear layer as a 1x1 convolution."""

    def __init__(self, num_classes=3):
        super().__init__()
        self.num_classes = num_classes
        self.pretrained_cfg = {"classifier": "head", "architecture": "family"}
        self.stem = nn.Linear(3, 8)
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, num_classes) if num_classes else nn.Identity()

    def forward(self, x):
        return self.head(self.norm(self.stem(x)))


def checkpoint_filter_fn(state_dict, model):
    if "patch_embed.weight" not in state_dict:
        return state_dict
    renamed = {key.replace("patch_embed.", "stem."): value for key, value in state_dict.items()}
    renamed["stem.weight"] = renamed["stem.weight"].flatten(1)
    return renamed


def filled(seed, **kwargs):
    """A model of random weights and statistics."""
    model = Family(**kwargs).eval()
    generator = torch.Generator().manual_seed(seed)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.1)
    return model


def authors(model):
    """The state dict as the authors' code would save it."""
    state = {key.replace("stem.", "patch_embed."): value for key, value in model.state_dict().items()}
    state["patch_embed.weight"] = state["patch_embed.weight"][:, :, None, None]
    return {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}


def same(model, other):
    x = torch.linspace(-1, 1, 12).reshape(4, 3)
    return torch.equal(model(x), other(x))


@pytest.fixture
def catalogue(monkeypatch):
    """A zoo of three timm models."""
    models = {
        name: types.SimpleNamespace(name=name, family=name[5:8]) for name in ("test_vit", "test_vit2", "test_resnet")
    }
    monkeypatch.setitem(sys.modules, "zoo.catalogue", types.SimpleNamespace(CATALOGUE=models))


# --- every shape of file -----------------------------------------------------------------------------------------

RAW, EMA = filled(1), filled(2)
SHAPES = {
    "ours": RAW.state_dict(),
    "the authors'": authors(RAW),
    "model": {"model": authors(RAW), "epoch": 3},
    "state_dict": {"state_dict": RAW.state_dict(), "meta": {"config": argparse.Namespace(a=1)}, "best": np.float64(1)},
    "module": {"module": authors(RAW), "lr": 0.1},
    "nested": {"model": {"state_dict": {"module": authors(RAW)}}},
    "timm's entry first": {"state_dict": RAW.state_dict(), "model": EMA.state_dict()},
    "DDP": {"model": {f"module.{key}": value for key, value in authors(RAW).items()}},
    "DDP of compiled": {f"module._orig_mod.{key}": value for key, value in RAW.state_dict().items()},
    "compiled DDP of DDP": {f"_orig_mod.module.module.{key}": value for key, value in authors(RAW).items()},
    "compiled in parts": {key.replace("stem.", "stem._orig_mod."): value for key, value in RAW.state_dict().items()},
    "a trainer's": {"state_dict": {f"model.{key}": value for key, value in RAW.state_dict().items()}},
    "a backbone's": {"state_dict": {f"backbone.{key}": value for key, value in authors(RAW).items()}},
    "no raw beside None": {"model": authors(RAW), "model_ema": None},
}


FLAT = [name for name, content in SHAPES.items() if all(isinstance(value, torch.Tensor) for value in content.values())]
PICKLED = [".pth", ".pth.tar", ".bin", "legacy", "mapping"]


@pytest.mark.parametrize(
    ("name", "suffix"),
    [*((name, suffix) for name in SHAPES for suffix in PICKLED), *((name, ".safetensors") for name in FLAT)],
)
def test_every_shape_of_file_loads_strictly(tmp_path, name, suffix):
    content, source = SHAPES[name], tmp_path / f"x{suffix}"
    if suffix == "mapping":
        source = content
    elif suffix == ".safetensors":
        safetensors.torch.save_file({key: value.contiguous() for key, value in content.items()}, source)
    else:
        torch.save(content, source, _use_new_zipfile_serialization=suffix != "legacy")
    model = filled(0)
    report = load_checkpoint(model, str(source) if suffix == ".bin" else source)
    assert same(model, RAW)
    assert set(model.state_dict()) - set(report.loaded) <= {"norm.num_batches_tracked"}
    assert (report.missing, report.unexpected, report.wrong_shaped) == ((), (), {})
    assert report.weights == "model"


@pytest.mark.parametrize(
    "content",
    [
        {"model": authors(RAW), "model_ema": authors(EMA)},
        {"state_dict": RAW.state_dict(), "state_dict_ema": EMA.state_dict()},
        {"model": authors(RAW), "ema": {"module": authors(EMA), "decay": 0.99}},
        {
            "state_dict": RAW.state_dict(),
            "ema_state_dict": {"steps": 5, **{f"module.{k}": v for k, v in authors(EMA).items()}},
        },
        {"checkpoint": None, "model": {"model": authors(RAW), "model_ema": authors(EMA)}},
    ],
    ids=["DeiT", "timm", "nested", "mmengine", "both inside"],
)
def test_raw_and_averaged_weights_can_be_chosen(tmp_path, content):
    torch.save(content, tmp_path / "x.pth")
    model = filled(0)
    for which, expected, weights in (("model", RAW, "model"), ("ema", EMA, "ema"), ("auto", EMA, "ema")):
        report = load_checkpoint(model, tmp_path / "x.pth", which=which)
        assert same(model, expected)
        assert report.weights == weights
    assert "(EMA weights): " in str(report)


def test_only_averaged_weights(tmp_path):
    torch.save({"state_dict_ema": EMA.state_dict(), "epoch": 1}, tmp_path / "x.pth")
    model = filled(0)
    assert load_checkpoint(model, tmp_path / "x.pth").weights == "ema"
    with pytest.raises(CheckpointError, match="has no raw weights: it holds state_dict_ema, epoch"):
        load_checkpoint(model, tmp_path / "x.pth", which="model")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"model": authors(RAW), "epoch": 1}, "has no EMA weights: it holds model, epoch"),
        ({"optimizer": {}, "epoch": 1}, "has no tensors by name: it holds optimizer, epoch"),
        (
            {"ema": argparse.Namespace(), "epoch": 1},
            r"has no tensors by name: it holds ema \(a pickled argparse\.Namespace\)",
        ),
        (argparse.Namespace(), r"holds a argparse\.Namespace, not tensors by name"),
        ([torch.ones(2)], "holds a list, not tensors by name"),
        ({str(i): None for i in range(20)}, r"it holds 0, 1, 2, 3, 4, 5, 6, 7, \.\.\."),
    ],
)
def test_asking_for_what_is_not_there_says_what_is(tmp_path, content, reason):
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=reason) as caught:
        load_checkpoint(filled(0), tmp_path / "x.pth", which="ema")
    assert "\n" not in str(caught.value)


def test_a_file_that_contains_itself_ends(tmp_path):
    content = {}
    content["model"] = content
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="no tensors by name"):
        load_checkpoint(filled(0), tmp_path / "x.pth")


def test_an_unknown_choice_is_an_error():
    with pytest.raises(ValueError, match="which='best' is not one of"):
        load_checkpoint(filled(0), RAW.state_dict(), which="best")


def test_a_url_is_a_source(tmp_path, monkeypatch):
    import zoo.checkpoints

    torch.save(authors(RAW), tmp_path / "x.pth")
    asked = []
    monkeypatch.setattr(zoo.checkpoints, "resolve", lambda source: asked.append(source) or tmp_path / "x.pth")
    report = load_checkpoint(filled(0), "https://host/x.pth#sha256=00000000")
    assert asked == ["https://host/x.pth#sha256=00000000"]
    assert report.source == asked[0]


# --- into the model ----------------------------------------------------------------------------------------------


def test_weights_take_the_dtype_of_the_model():
    model = filled(0).double()
    load_checkpoint(model, {key: value.half() for key, value in authors(RAW).items()})
    assert model.stem.weight.dtype == torch.float64
    assert torch.equal(model.stem.weight, RAW.stem.weight.half().double())


def test_parameters_stay_the_objects_that_the_optimizer_has():
    model = filled(0)
    before = dict(model.named_parameters())
    load_checkpoint(model, RAW.state_dict())
    assert all(parameter is before[name] and parameter.requires_grad for name, parameter in model.named_parameters())


def test_the_model_does_not_share_memory_with_the_source():
    source, model = copy.deepcopy(RAW.state_dict()), filled(0)
    load_checkpoint(model, source)
    source["stem.weight"].zero_()
    assert same(model, RAW)


def test_batch_counters_may_be_absent_and_are_kept():
    model = filled(0)
    model.norm.num_batches_tracked.fill_(7)
    assert load_checkpoint(model, authors(RAW)).missing == ()
    assert model.norm.num_batches_tracked == 7
    load_checkpoint(model, {**RAW.state_dict(), "norm.num_batches_tracked": torch.tensor(9)})
    assert model.norm.num_batches_tracked == 9


@pytest.mark.parametrize("damage", ["missing", "unexpected", "wrong-shaped"])
def test_a_refused_load_leaves_the_model_as_it_was(damage, catalogue):
    state, model = dict(RAW.state_dict()), filled(0)
    if damage == "missing":
        del state["norm.running_var"]
    elif damage == "unexpected":
        state["extra"] = torch.ones(1)
    else:
        state["norm.weight"] = torch.ones(9)
    with pytest.raises(CheckpointError, match=f"1 {damage} \\("):
        load_checkpoint(model, state)
    assert same(model, filled(0))
    report = load_checkpoint(model, state, strict=False)
    assert len(report.missing) + len(report.unexpected) + len(report.wrong_shaped) == 1
    assert torch.equal(model.stem.weight, RAW.stem.weight)
    assert damage in str(report)


def test_meta_models_are_refused():
    with torch.device("meta"):
        model = Family()
    with pytest.raises(ValueError, match="meta device"):
        load_checkpoint(model, RAW.state_dict())


# --- what does not fit -------------------------------------------------------------------------------------------


def test_the_message_counts_and_shows_the_first_eight(catalogue):
    state = {f"extra{i:02}": torch.ones(1) for i in range(30)}
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(filled(0), {**RAW.state_dict(), **state, "norm.bias": torch.ones(2, 3)})
    message = str(caught.value)
    assert "30 unexpected (extra00, extra01, extra02, extra03, extra04, extra05, extra06, extra07, ...)" in message
    assert "1 wrong-shaped (norm.bias (2, 3) for (8,))" in message
    assert "missing" not in message
    assert message.endswith("it looks like no model of the zoo.")
    assert "\n" not in message


def test_another_number_of_classes_says_so():
    state = authors(filled(1, num_classes=21))
    with pytest.raises(CheckpointError, match="head has 21 classes, the model 3: pass num_classes=21 or strict=False"):
        load_checkpoint(filled(0), state)
    model = filled(0)
    report = load_checkpoint(model, state, strict=False)
    assert report.wrong_shaped == {"head.weight": ((21, 8), (3, 8)), "head.bias": ((21,), (3,))}
    assert torch.equal(model.stem.weight, RAW.stem.weight)
    assert torch.equal(model.head.weight, filled(0).head.weight)


def test_heads_on_one_side_only():
    headless = {key: value for key, value in RAW.state_dict().items() if not key.startswith("head.")}
    with pytest.raises(CheckpointError, match="the file has no head: pass num_classes=0 or strict=False"):
        load_checkpoint(filled(0), headless)
    model = filled(0, num_classes=0)
    report = load_checkpoint(model, RAW.state_dict())
    assert report.unexpected == ()
    assert torch.equal(model.stem.weight, RAW.stem.weight)


def test_another_variant_is_named(catalogue):
    state = timm.create_model("test_vit2", num_classes=7).state_dict()
    with pytest.raises(CheckpointError, match=r"it looks like test_vit2 of the family vit with 7 classes\.$"):
        create_model("test_vit", checkpoint=state)
    state = {
        f"module.{key}": value for key, value in timm.create_model("test_resnet", num_classes=0).state_dict().items()
    }
    with pytest.raises(CheckpointError, match=r"it looks like test_resnet of the family res without a head\.$"):
        create_model("test_vit", checkpoint=state)
    with pytest.raises(CheckpointError, match=r"looks like test_resnet of .*, as this model is, so create it with"):
        create_model("test_resnet", checkpoint=timm.create_model("test_resnet", in_chans=1).state_dict())
    with pytest.raises(CheckpointError, match="it looks like no model of the zoo"):
        create_model("test_vit", checkpoint=RAW.state_dict())


def test_the_zoos_own_variants_are_told_apart():
    pytest.importorskip("zoo.catalogue")
    import zoo  # noqa: F401 - registers the models

    for made_for, asked in (("van_b1", "van_b0"), ("ravlt_tiny", "van_nano"), ("ravlt_nano", "ravlt_tiny")):
        family = made_for.partition("_")[0]
        state = timm.create_model(made_for, num_classes=21).state_dict()
        with pytest.raises(
            CheckpointError, match=rf"(?i)it looks like {made_for} of the family {family} with 21 classes"
        ):
            create_model(asked, checkpoint=state)


def test_a_filter_that_trips_over_another_familys_file_is_a_mismatch(catalogue):
    with pytest.raises(CheckpointError, match="does not fit the model"):
        load_checkpoint(filled(0), {"patch_embed.weight": torch.tensor(1.0)})  # a scalar cannot be flattened from 1


def test_loading_less_than_half_warns():
    with pytest.warns(UserWarning, match=r"Only 0% of the model's parameters were loaded from the mapping"):
        report = load_checkpoint(filled(0), {"else": torch.ones(1)}, strict=False)
    assert report.loaded == ()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_checkpoint(filled(0), authors(filled(1, num_classes=2)), strict=False)


def test_a_report_is_one_readable_line():
    report = LoadReport("van.pth", "ema", ("a", "b"), ("c",), (), {"d": ((2,), (3,))})
    assert (
        str(report) == "van.pth (EMA weights): 2 of 4 tensors loaded, 1 missing (c), 1 wrong-shaped (d (2,) for (3,))"
    )
    assert str(LoadReport("x", "model", ("a",), (), (), {})) == "x (raw weights): 1 of 1 tensors loaded"


# --- models of timm ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def resnet():
    torch.manual_seed(0)
    return timm.create_model("test_resnet").eval()


def test_create_model_is_timms_with_weights(resnet, tmp_path):
    torch.save({"state_dict": resnet.state_dict(), "args": argparse.Namespace()}, tmp_path / "x.pth")
    model = create_model("test_resnet", checkpoint=tmp_path / "x.pth", drop_rate=0.5)
    assert model.drop_rate == 0.5
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(model.eval()(x), resnet(x))
    plain = create_model("test_resnet", num_classes=4)
    assert plain.num_classes == 4


@pytest.mark.parametrize(
    ("kwargs", "shape"),
    [
        ({}, (2, 1000)),
        ({"num_classes": 4}, (2, 4)),  # another head: timm leaves the file's out
        ({"num_classes": 0}, (2, 32)),
        ({"in_chans": 1}, (2, 1000)),
    ],
)
def test_the_authors_files_are_read_safely_when_pretrained(tmp_path, monkeypatch, kwargs, shape):
    torch.manual_seed(0)
    trained = timm.create_model("test_van").eval()
    file = tmp_path / "published.pth"
    torch.save({"state_dict": trained.state_dict(), "args": argparse.Namespace(lr=1), "best": np.float64(3)}, file)
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        torch.load(file, weights_only=True)
    published = timm.get_pretrained_cfg("test_van")
    monkeypatch.setattr(published, "url", str(file))
    monkeypatch.setattr(timm, "get_pretrained_cfg", lambda name: published)
    model = create_model("test_van", pretrained=True, **kwargs).eval()
    assert not model.pretrained_cfg.get("state_dict")
    ours, theirs = model.state_dict(), trained.state_dict()
    differ = {key for key in theirs if key not in ours or not torch.equal(ours[key], theirs[key])}
    changed = {"num_classes": ("head.",), "in_chans": ("stem.",)}.get(next(iter(kwargs), ""), ())
    assert all(key.startswith(changed) for key in differ) and bool(differ) == bool(changed)
    assert model(torch.randn(2, kwargs.get("in_chans", 3), 64, 64)).shape == shape


def test_pretrained_models_of_timm_are_left_to_timm(monkeypatch):
    seen = []
    monkeypatch.setattr(timm, "create_model", lambda name, **kwargs: seen.append((name, kwargs)) or nn.Identity())
    for name in ("resnet18", "hf-hub:owner/repo"):
        create_model(name, pretrained=True)
    create_model("van_b0", pretrained=True, pretrained_cfg_overlay={"file": "x.pth"})
    assert seen == [
        ("resnet18", {"pretrained": True}),
        ("hf-hub:owner/repo", {"pretrained": True}),
        ("van_b0", {"pretrained": True, "pretrained_cfg_overlay": {"file": "x.pth"}}),
    ]


@pytest.mark.parametrize("feature_cls", ["list", "dict", "hook", "getter"])
def test_features_come_from_the_checkpoint(resnet, feature_cls):
    model = create_model(
        "test_resnet", checkpoint=resnet.state_dict(), features_only=True, out_indices=(1, 3), feature_cls=feature_cls
    )
    x = torch.randn(2, 3, 64, 64)
    features = model.eval()(x)
    features = list(features.values()) if isinstance(features, dict) else features
    expected = resnet.forward_intermediates(x, indices=(1, 3), intermediates_only=True)
    assert [feature.shape for feature in features] == [feature.shape for feature in expected]
    for ours, theirs in zip(features, expected):
        torch.testing.assert_close(ours, theirs)


# --- writing -----------------------------------------------------------------------------------------------------


def test_convert_writes_our_names_and_where_they_are_from(tmp_path, resnet):
    state = {
        f"module.{key}": value.half() if value.is_floating_point() else value
        for key, value in resnet.state_dict().items()
    }
    source, destination = tmp_path / "in.pth", tmp_path / "out.safetensors"
    torch.save({"model": state, "args": argparse.Namespace()}, source)
    report = convert_checkpoint(source, destination, "test_resnet")
    assert report.weights == "model"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.pth", "out.safetensors"]
    with safetensors.safe_open(destination, "pt") as file:
        assert file.metadata() == {
            "format": "pt",
            "model": "test_resnet",
            "weights": "model",
            "source": "in.pth",
            "source_sha256": hashlib.sha256(source.read_bytes()).hexdigest(),
        }
    written = safetensors.torch.load_file(destination)
    assert written.keys() == resnet.state_dict().keys()
    assert written["fc.weight"].dtype == torch.float16
    assert torch.equal(written["fc.weight"], resnet.fc.weight.half())
    model = timm.create_model("test_resnet", pretrained=True, pretrained_cfg_overlay={"file": str(destination)})
    assert torch.equal(model.fc.weight, resnet.fc.weight.half().float())


@pytest.mark.parametrize("num_classes", [0, 21])
def test_convert_takes_the_classes_from_the_head(tmp_path, num_classes):
    model = timm.create_model("test_resnet", num_classes=num_classes)
    torch.save(model.state_dict(), tmp_path / "in.pth")
    report = convert_checkpoint(tmp_path / "in.pth", tmp_path / "out.safetensors", "test_resnet")
    assert ("fc.weight" in report.loaded) == bool(num_classes)
    load_checkpoint(model, tmp_path / "out.safetensors")


def test_convert_refuses(tmp_path, resnet, catalogue):
    source, destination = tmp_path / "in.pth", tmp_path / "out.safetensors"
    torch.save(resnet.state_dict(), source)
    with pytest.raises(CheckpointError, match="it looks like test_resnet"):
        convert_checkpoint(source, destination, "test_vit")
    with pytest.raises(CheckpointError, match="head has 1000 classes, the model 3"):
        convert_checkpoint(source, destination, "test_resnet", num_classes=3)
    with pytest.raises(ValueError, match=r"not as out\.pth"):
        convert_checkpoint(source, tmp_path / "out.pth", "test_resnet")
    assert list(tmp_path.iterdir()) == [source]
    destination.write_text("precious")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        convert_checkpoint(source, destination, "test_resnet")
    assert destination.read_text() == "precious"
    convert_checkpoint(source, destination, "test_resnet", overwrite=True)
    load_checkpoint(copy.deepcopy(resnet), destination)


def test_saving_takes_views_and_leaves_nothing_when_it_fails(tmp_path, monkeypatch):
    base = torch.arange(6.0).reshape(2, 3)
    save_checkpoint({"a": base, "b": base.t(), "tied": base}, tmp_path / "x.safetensors", metadata={"note": "n"})
    read = safetensors.torch.load_file(tmp_path / "x.safetensors")
    assert torch.equal(read["a"], base)
    assert torch.equal(read["b"], base.t())

    def fail(tensors, path, metadata):
        path.write_text("half")
        raise OSError("disk full")

    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint({"a": base}, tmp_path / "x.safetensors", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]
    assert torch.equal(safetensors.torch.load_file(tmp_path / "x.safetensors")["a"], base)


# --- damage ------------------------------------------------------------------------------------------------------

SAFETENSORS = safetensors.torch.save({key: value.contiguous() for key, value in RAW.state_dict().items()})


@settings(max_examples=200, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    edits=st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), min_size=1, max_size=6),
    cut=st.one_of(st.none(), st.integers(0, 2000)),
)
def test_damaged_safetensors_give_one_clean_error_or_load(tmp_path, edits, cut):
    data = bytearray(SAFETENSORS)
    for position, value in edits:
        data[position % len(data)] = value
    (tmp_path / "x.safetensors").write_bytes(data[:cut])
    model = filled(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a damaged name is a missing one
            load_checkpoint(model, tmp_path / "x.safetensors", strict=False)
    except CheckpointError as error:
        assert "\n" not in str(error)
        assert same(model, filled(0))


def test_a_saved_file_is_as_readable_as_any_other(tmp_path):
    save_checkpoint({"weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    (tmp_path / "other").touch()
    assert (tmp_path / "model.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode
