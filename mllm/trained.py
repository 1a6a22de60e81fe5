"""What a model was trained with and has to be run with: its mask and gamma-MoD's router, in files beside its own."""

import json
import os
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import nn

from zoo.mllm.accelerate import Acceleration
from zoo.mllm.mod import MoD
from zoo.mllm.plan_files import replacing, write_plan

SETTINGS = "acceleration.json"
ROUTER = "mod.safetensors"


def save_trained(folder: str | os.PathLike, handle: Acceleration) -> None:
    """Write the mask, the assistant marker and the router of an accelerated model to the model's folder."""
    folder, depth = Path(folder), handle.depth
    settings: dict[str, Any] = {"mask": handle.mask, "prompt_end": list(handle.prompt_end), "mod": None}
    if depth is not None:
        layers = None if depth.layers is None else list(depth.layers)
        settings["mod"] = {"ratio": depth.ratio, "layers": layers, "gate": depth.gate, "positions": depth.positions}
        with replacing(folder / ROUTER) as part:
            safetensors.torch.save_file({"weight": depth.router.weight.detach().float().cpu().contiguous()}, part)
    write_plan(folder / SETTINGS, settings)


def load_trained(folder: str | os.PathLike, model: nn.Module) -> dict[str, Any]:
    """The arguments ``depth``, ``mask`` and ``prompt_end`` of ``accelerate`` that a model was trained with.

    Args:
        folder: of the model; without ``save_trained``'s files, or for a hub id, nothing is returned.
        model: whose device and dtype the router gets.
    """
    folder = Path(folder)
    if not (folder / SETTINGS).is_file():
        return {}
    found = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    depth = None
    if found["mod"]:
        depth = MoD(**found["mod"])
        weight = safetensors.torch.load_file(folder / ROUTER)["weight"]
        depth.router = nn.Linear(weight.shape[1], 2, bias=False, device=model.device, dtype=model.dtype)
        depth.router.weight.data.copy_(weight)
    return {"depth": depth, "mask": found["mask"], "prompt_end": found["prompt_end"]}
