"""What each stage of a model puts out and costs: the table of `zoo info`."""

import copy
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class StageRow:
    """One line of the table.

    Attributes:
        name: the child of the model, such as "stem", "stages.0", "head", or "total".
        shape: its output for one picture, without the batch dimension.
        params: number of parameters in it.
        macs: multiply-accumulates of its matrix products, convolutions and attention for one picture.
    """

    name: str
    shape: tuple[int, ...]
    params: int
    macs: int


def stage_table(model: nn.Module, size: tuple[int, int], in_chans: int = 3) -> list[StageRow]:
    """Shapes, parameters and multiply-accumulates of a model by stage, for one picture of a size.

    Nothing is computed: a copy of the model runs on the meta device. The rows are the model's children in the order
    they run, with ``stages`` (or ``layers``) opened up and what is free (dropout, activations) left out, and last the
    total. Parameters that the model holds itself (a position table, a class token) are in the total only.

    Args:
        model: a zoo or timm model; left as it is.
        size: height and width in pixels.
        in_chans: channels of the picture.

    Raises:
        ValueError: the model does not take a picture of this size.
    """
    meta = copy.deepcopy(model).to("meta").eval()
    parts: dict[str, nn.Module] = {}
    for name, child in meta.named_children():
        if name in ("stages", "layers"):
            parts |= {f"{name}.{index}": stage for index, stage in child.named_children()}
        else:
            parts[name] = child
    shapes: dict[str, tuple[int, ...]] = {}  # filled in the order the parts run

    def watch(name: str, module: nn.Module) -> None:
        module.register_forward_hook(lambda _module, _inputs, output: shapes.update({name: _shape(output)}))

    for name, part in parts.items():
        watch(name, part)
    counter = FlopCounterMode(display=False)
    try:
        with torch.no_grad(), counter:
            output = meta(torch.empty(1, in_chans, *size, device="meta"))
    except (AssertionError, RuntimeError, ValueError) as error:
        height, width = size
        reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
        shape = f"{in_chans}x{height}x{width}"
        raise ValueError(f"{type(model).__name__} does not take {shape} pictures: {reason}.") from error
    flops = {name.partition(".")[2]: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    rows = [StageRow(name, shape, _params(parts[name]), flops.get(name, 0) // 2) for name, shape in shapes.items()]
    rows = [row for row in rows if row.params or row.macs]
    return [*rows, StageRow("total", _shape(output), _params(meta), counter.get_total_flops() // 2)]


def _params(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _shape(output: torch.Tensor | tuple | list) -> tuple[int, ...]:
    return tuple(output.shape[1:]) if isinstance(output, torch.Tensor) else _shape(output[0])
