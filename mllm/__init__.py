"""Multimodal language models: composed of any parts, with fewer visual tokens, and with other masks."""

from importlib import import_module
from typing import Any

from zoo.mllm.accelerate import Acceleration, accelerate
from zoo.mllm.agla import AGLA
from zoo.mllm.blip import BlipMatcher
from zoo.mllm.cost import Cost, plan_cost
from zoo.mllm.families import register_family
from zoo.mllm.flops import DecoderShape, kv_bytes, prefill_flops
from zoo.mllm.layout import TokenLayout
from zoo.mllm.mod import MoD, arank
from zoo.mllm.prumerge import PruMerge
from zoo.mllm.reduce import DivPrune, FastV, PyramidDrop, Random, Reduction, SparseVLM, Uniform, ZipVL
from zoo.mllm.search import Schedule, agreement, g_search, p_sigmoid
from zoo.mllm.tome import ToMe
from zoo.mllm.vicrop import ViCrop
from zoo.mllm.visionzip import VisionZip
from zoo.mllm.yopo import YOPO

# Their classes are derived from those of transformers, which is slow to import and may be missing.
_LAZY = {
    "VisionLanguageConfig": "compose",
    "VisionLanguageModel": "compose",
    "VisionLanguageProcessor": "processing",
    "load": "loading",
}

__all__ = [
    "AGLA",
    "YOPO",
    "Acceleration",
    "BlipMatcher",
    "Cost",
    "DecoderShape",
    "DivPrune",
    "FastV",
    "MoD",
    "PruMerge",
    "PyramidDrop",
    "Random",
    "Reduction",
    "Schedule",
    "SparseVLM",
    "ToMe",
    "TokenLayout",
    "Uniform",
    "ViCrop",
    "VisionLanguageConfig",
    "VisionLanguageModel",
    "VisionLanguageProcessor",
    "VisionZip",
    "ZipVL",
    "accelerate",
    "agreement",
    "arank",
    "g_search",
    "kv_bytes",
    "load",
    "p_sigmoid",
    "plan_cost",
    "prefill_flops",
    "register_family",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise ImportError(f"{name} needs transformers: pip install 'linear-vision-zoo[mllm]'.") from None
