"""Models for the contract tests: the tiny model of every family, with weights under which every part of it counts."""

import pytest
import timm
import torch

from zoo.tools.conformance import zoo_models

TINY = zoo_models("test_*")  # an error if there are none
MAPS = [name for name in TINY if not name.endswith("_deit")]  # models of tokens are in test_tokens.py


def pytest_generate_tests(metafunc):
    """A file that is not for all models with feature maps has a list ``NAMES``."""
    if "name" in metafunc.fixturenames:
        metafunc.parametrize("name", getattr(metafunc.module, "NAMES", MAPS))


@pytest.fixture(autouse=True)
def one_thread():
    """Two threads on two busy cores wait for each other most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def make(name):
    """Makes the model with ``timm.create_model`` arguments, in eval mode."""
    return lambda **kwargs: awaken(timm.create_model(name, **kwargs)).eval()


def awaken(model, seed=0):
    """Draw all weights anew: as initialised, layer scales and biases near zero would hide most faults of the blocks."""
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor, std, mean=0.0):
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * std + mean)

    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if not tensor.is_floating_point():
                continue
            if key.endswith("running_var"):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
            elif key.endswith(("bias", "running_mean", "alpha")):
                normal(tensor, 0.1)
            elif "blocks." in key and key.endswith(".bn.weight"):  # RepBN is affine: gains of 1 would blow up
                normal(tensor, 0.05, mean=0.25)
            elif key.endswith("gamma"):  # layer scale, of both signs: products of branches must not blow up
                normal(tensor, 0.3)
            elif tensor.ndim == 1:
                normal(tensor, 0.1, mean=1.0)
            else:
                normal(tensor, tensor[0].numel() ** -0.5)
    return model


@pytest.fixture
def pictures():
    """Makes random pictures (batch, channels, height, width) that depend on a seed."""

    def make(batch, height, width=None, channels=3, seed=0):
        return torch.randn(batch, channels, height, width or height, generator=torch.Generator().manual_seed(seed))

    return make
