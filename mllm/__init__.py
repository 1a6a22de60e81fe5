"""Multimodal language models with fewer visual tokens and other masks."""

from zoo.mllm.accelerate import Acceleration, accelerate
from zoo.mllm.families import register_family
from zoo.mllm.flops import DecoderShape, kv_bytes, prefill_flops
from zoo.mllm.layout import TokenLayout
from zoo.mllm.mod import MoD, arank
from zoo.mllm.reduce import DivPrune, FastV, Random, Reduction, Uniform
from zoo.mllm.search import Schedule, agreement, g_search, p_sigmoid

__all__ = [
    "Acceleration",
    "DecoderShape",
    "DivPrune",
    "FastV",
    "MoD",
    "Random",
    "Reduction",
    "Schedule",
    "TokenLayout",
    "Uniform",
    "accelerate",
    "agreement",
    "arank",
    "g_search",
    "kv_bytes",
    "p_sigmoid",
    "prefill_flops",
    "register_family",
]
