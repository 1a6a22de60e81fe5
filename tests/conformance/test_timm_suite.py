"""timm's own model tests on the zoo's tiny models: every test that applies ran, and passed."""

import os
from pathlib import Path

import pytest
import timm
from packaging.version import Version

from zoo.tools import conformance

CACHE = Path(__file__).parents[2] / ".conformance"
EXPECTED = {
    "test_model_forward",
    "test_model_backward",
    "test_model_default_cfgs",
    "test_model_forward_torchscript",
    "test_model_forward_features",
    "test_model_forward_intermediates_features",
    "test_model_forward_intermediates",
    "test_model_forward_fx",
    "test_model_backward_fx",
}
if Version(timm.__version__) >= Version("1.0.31"):
    EXPECTED.add("test_prune_intermediate_layers_contract")
if "GITHUB_ACTIONS" not in os.environ:  # timm does not define it there
    EXPECTED.add("test_model_forward_fx_torchscript")
# Models of tokens have a test of their own for the cfg, and none for maps that a classifier pools.
EXPECTED_OF_TOKENS = EXPECTED - {"test_model_default_cfgs", "test_model_forward_features"}
EXPECTED_OF_TOKENS |= {"test_model_default_cfgs_non_std"}
TINY = conformance.zoo_models("test_*")

BROKEN = """
import torch
from timm.models import generate_default_cfgs, register_model

default_cfgs = generate_default_cfgs({"test_broken.untrained": dict(input_size=(3, 32, 32), num_classes=10)})

class Broken(torch.nn.Module):
    default_cfg = {"input_size": (3, 32, 32)}

    def forward(self, x):
        return x.mean((2, 3)) * float("nan")

@register_model
def test_broken(pretrained=False, **kwargs):
    return Broken()
"""


@pytest.fixture(scope="module")
def suite():
    """timm's tests; without them CI must not be green, elsewhere the reason is enough."""
    try:
        conformance.timm_tests(CACHE)
    except ConnectionError as error:
        if os.environ.get("CI"):
            pytest.fail(str(error))
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def results(suite):
    return conformance.run_suite(TINY, cache=CACHE)


def test_every_family_has_a_tiny_model():
    assert {"test_van", "test_ravlt"} <= set(TINY)


@pytest.mark.parametrize("model", TINY)
def test_timms_tests_pass(results, model):
    ours = [result for result in results if result.model == model]
    assert [f"{r.test}: {r.outcome}, {r.reason}" for r in ours if r.outcome != "passed"] == []
    expected = EXPECTED_OF_TOKENS if model.endswith("_deit") else EXPECTED
    assert {result.test for result in ours} == expected
    assert len(ours) == len(expected)


def test_a_broken_model_fails(suite, tmp_path, monkeypatch):
    (tmp_path / "broken_model.py").write_text(BROKEN)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")])))
    monkeypatch.setenv("PYTEST_ADDOPTS", "-p broken_model -k 'test_model_forward[ or test_model_backward['")
    outcomes = {result.test: result for result in conformance.run_suite(["test_broken"], cache=CACHE)}
    assert outcomes["test_model_forward"].outcome == "failed"
    assert "NaN" in outcomes["test_model_forward"].reason
    assert outcomes["test_model_backward"].outcome == "failed"


def test_a_suite_that_does_not_start_is_an_error(suite, monkeypatch):
    monkeypatch.setenv("PYTEST_ADDOPTS", "-p no_such_plugin")
    with pytest.raises(RuntimeError, match="before the tests"):
        conformance.run_suite(["test_van"], cache=CACHE)


def test_an_archive_with_another_hash_is_refused(suite, tmp_path, monkeypatch):
    monkeypatch.setitem(conformance.SHA256, timm.__version__, "0" * 64)
    with pytest.raises(ConnectionError, match="hash"):
        conformance.timm_tests(tmp_path)
    assert not list(tmp_path.iterdir())


def test_only_the_tests_are_unpacked(suite):
    folder = conformance.timm_tests(CACHE)
    assert [entry.name for entry in folder.iterdir() if entry.name != "__pycache__"] == ["tests"]


def test_a_glob_that_matches_nothing():
    with pytest.raises(ValueError, match=r"No model of the zoo is named resnet\*: the names are .*test_van"):
        conformance.zoo_models("resnet*")
