"""The authors' checkpoints load, and give the authors' features and logits."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

import zoo
from zoo.catalogue import CATALOGUE

GOLDEN = Path(__file__).parents[1] / "golden"
_spec = importlib.util.spec_from_file_location("golden_state", GOLDEN / "state.py")
golden = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(golden)

NAMES = {"RAVLT_T": "ravlt_tiny", "RAVLT_S": "ravlt_small", "RAVLT_B": "ravlt_base", "RAVLT_L": "ravlt_large"}
FILES = {NAMES.get(path.stem, path.stem): path for path in sorted(GOLDEN.glob("*/*.json"))}


def weights(name):
    """What a golden json says, and its state dict as tensors."""
    meta = golden.read_meta(FILES[name])
    return meta, {key: torch.from_numpy(array) for key, array in golden.make_state(meta).items()}


def picture(seed, shape):
    normal = np.random.Generator(np.random.PCG64(seed)).standard_normal(shape)
    return torch.from_numpy(normal.astype(np.float32))


def test_every_published_variant_is_here():
    assert set(FILES) == {name for name in CATALOGUE if not name.endswith("_nano")}
    for name, path in FILES.items():
        assert CATALOGUE[name].golden == path.with_suffix(".npz").exists()


@pytest.mark.parametrize("name", FILES)
def test_checkpoint_logits_and_features(name):
    meta, state = weights(name)
    model = zoo.create_model(name, checkpoint={"state_dict": state}).eval()  # strict
    assert sum(parameter.numel() for parameter in model.parameters()) == meta["params"]
    if not CATALOGUE[name].golden:
        return
    answers, tolerance = np.load(FILES[name].with_suffix(".npz")), 5 * meta["checks"]["fp32_vs_fp64_max_abs"]
    with torch.inference_mode():
        final, maps = model.forward_intermediates(picture(0, meta["input"]["shape"]))
        logits = model.forward_head(final)
        np.testing.assert_allclose(logits, answers["logits"], rtol=0, atol=tolerance)
        second = model(picture(1, (1, 3, 256, 320)))
        np.testing.assert_allclose(second, answers["logits_second"], rtol=0, atol=tolerance)
    for i, (features, shape) in enumerate(zip(maps, meta["features"]["shapes"], strict=True)):
        assert list(features.shape) == shape
        flat = features.numpy().ravel()
        sample, stored = flat[np.linspace(0, flat.size - 1, 64).astype(np.int64)], answers[f"feat{i}_sample"]
        # A layer norm with another eps changes features by 1e-4 of their deviation, rounding by up to 1e-5.
        np.testing.assert_allclose(sample, stored, rtol=0, atol=2e-5 * answers[f"feat{i}_std"])
        np.testing.assert_allclose(flat.mean(dtype=np.float64), answers[f"feat{i}_mean"], atol=1e-5)
        np.testing.assert_allclose(flat.std(dtype=np.float64), answers[f"feat{i}_std"], rtol=1e-5)


@pytest.mark.parametrize("name", ["van_b0", "ravlt_tiny"])
def test_a_checkpoint_file_as_the_authors_write_it(name, tmp_path):
    meta, state = weights(name)
    everything = {key: state.get(key, torch.zeros(shape)) for key, shape, _ in meta["state_dict"]}
    torch.save({"model": {f"module.{key}": tensor for key, tensor in everything.items()}}, tmp_path / "model.pth")
    from_file = zoo.create_model(name, checkpoint=tmp_path / "model.pth").eval()
    from_memory = zoo.create_model(name, checkpoint=state).eval()
    x = picture(0, (1, 3, 64, 64))
    with torch.inference_mode():
        assert torch.equal(from_file(x), from_memory(x)) and from_file(x).std() > 0.1


@pytest.mark.parametrize("name", FILES)
def test_counts_equal_the_authors(name):
    meta = golden.read_meta(FILES[name])
    assert CATALOGUE[name].params == meta["params"]
    assert CATALOGUE[name].macs == meta["macs_torch_flop_counter"]


@pytest.mark.parametrize("name", CATALOGUE)
def test_counts_of_the_catalogue(name):
    model = timm.create_model(name, device="meta").eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, 224, 224, device="meta"))
    assert CATALOGUE[name].params == sum(parameter.numel() for parameter in model.parameters())
    assert CATALOGUE[name].macs == counter.get_total_flops() // 2
