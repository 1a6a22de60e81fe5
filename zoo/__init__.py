"""Linear-complexity vision backbones as first-class timm models: ``import zoo`` registers them."""

from zoo import backbones  # registers the models
from zoo.checkpoints import create_model, load_checkpoint
from zoo.classifier import Classifier, Prediction
from zoo.deploy import fuse

__all__ = ["Classifier", "Prediction", "backbones", "create_model", "fuse", "load_checkpoint"]
