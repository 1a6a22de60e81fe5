"""FSDP2: parameters, gradients and states of the optimizer in shards, one for each process (torch's ``fully_shard``).

State dicts stay whole: what a sharded run saves, a run on one GPU or under DDP goes on from, and the other way round.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def shard(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Shard a model, block by block, and its optimizer, in place.

    From then on ``state_dict`` of either gives whole tensors and has to be called by all processes;
    ``load_state_dict`` takes whole tensors. Buffers are not sharded.

    Args:
        model: on its device, with the same weights in all processes. Members of lists named ``blocks`` are gathered
            one at a time, the rest together.
        optimizer: of the model's parameters.
    """
    before = dict(model.named_parameters())
    device = next(iter(before.values())).device.type
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    for name, module in model.named_modules():
        if name.split(".")[-2:-1] == ["blocks"]:
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    after = dict(model.named_parameters())
    now = {whole: after[name] for name, whole in before.items()}
    for group in optimizer.param_groups:
        group["params"] = [now[whole] for whole in group["params"]]
    for whole in list(optimizer.state):
        optimizer.state[now[whole]] = _split(optimizer.state.pop(whole), now[whole])
    model.register_state_dict_post_hook(_gather_weights)
    model.register_load_state_dict_pre_hook(_split_weights)
    optimizer.register_state_dict_post_hook(_gather_states)
    optimizer.register_load_state_dict_pre_hook(_split_states)


def end_processes() -> None:
    """At the end of a command: threads of a process group that is open can abort a process that ends with them."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _gather(tensors: dict[str, Any]) -> dict[str, Any]:
    return {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in tensors.items()}


def _split(tensors: dict[str, Any], like: DTensor) -> dict[str, Any]:
    """Those of the shape of a parameter as it is split; others, such as a number of steps, as they are."""

    def split(x: Any) -> Any:
        if not isinstance(x, Tensor) or isinstance(x, DTensor) or x.shape != like.shape:
            return x
        return distribute_tensor(x.to(like.device), like.device_mesh, like.placements)

    return {name: split(x) for name, x in tensors.items()}


def _gather_weights(module: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
    state.update(_gather(state))


def _split_weights(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    for name, parameter in module.named_parameters(prefix.rstrip(".")):
        if name in state:
            state.update(_split({name: state[name]}, parameter))


def _gather_states(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    return {**state, "state": {number: _gather(tensors) for number, tensors in state["state"].items()}}


def _split_states(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return {**state, "state": {number: _split(x, parameters[number]) for number, x in state["state"].items()}}
