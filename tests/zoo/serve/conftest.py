"""A small classifier, and an app with the usual limits that serves it."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # for what the tests share


@pytest.fixture(scope="session")
def network():
    """A network that is sure of something."""
    import timm

    torch.manual_seed(0)
    model = timm.create_model("test_convnext")
    with torch.no_grad():
        model.head.fc.weight.mul_(30)
    return model


@pytest.fixture(scope="session")
def classifier(network):
    from zoo.classifier import Classifier

    return Classifier(network)


@pytest.fixture
def waiting(network):
    from serving import Waiting

    found = Waiting(network)
    yield found
    found.let.set()


@pytest.fixture(scope="session")
def client(classifier):
    from serving import serving

    with serving(classifier) as client:
        yield client
