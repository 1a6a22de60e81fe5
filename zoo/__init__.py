"""Linear-complexity vision backbones as first-class timm models: ``import zoo`` registers them."""

from zoo import backbones, mllm  # the backbones register the models
from zoo.checkpoints import create_model, load_checkpoint
from zoo.classifier import Classifier, Prediction
from zoo.deploy import fuse, optimize
from zoo.detector import Detections, Detector
from zoo.segmenter import Segmentation, Segmenter

__all__ = [
    "Classifier",
    "Detections",
    "Detector",
    "Prediction",
    "Segmentation",
    "Segmenter",
    "backbones",
    "create_model",
    "fuse",
    "load_checkpoint",
    "mllm",
    "optimize",
]
