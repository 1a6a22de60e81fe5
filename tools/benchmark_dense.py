r"""Measure training images/s and peak memory of one detector on several backbones, side by side in one process.

    python -m zoo.tools.benchmark_dense ravlt_small ravlt_small@torch resnet50 \
        --config configs/detection/mask_rcnn_1x_van_b2.py --device cuda --dtype bf16 --json dense.json

A step is forward, losses, backward and AdamW under autocast, on pictures of noise with ``BOXES`` boxes and masks each.
A name is any that ``ZooBackbone`` takes; with ``@torch`` after it the model runs on PyTorch's operators instead of the
Triton kernels. The weights are random: neither speed nor memory asks what a detector finds.
"""

import gc
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import timm
import torch
import typer
from rich.table import Table

from zoo.console import output_console
from zoo.files import write_text
from zoo.measure import MEBIBYTE, Dtype, console, environment, kernels, split_name

BOXES = 7  # in a picture, as on average in COCO


def build_detector(config_file: Path, name: str, size: tuple[int, int]) -> torch.nn.Module:
    """A detector of mmdet with random weights, on another backbone than its config's.

    Args:
        config_file: of mmdet, with a ``ZooBackbone``.
        name: of the backbone; what follows an @ is for the kernels.
        size: height and width of the pictures, for models of timm that are made for one size.

    Raises:
        FileNotFoundError: there is no such config.
        ValueError: it is no config of mmdet, or the model is unknown.
    """
    from zoo.tools.dense_runs import read_config  # first of all: makes mmcv.ops work

    config = read_config(config_file)
    if config.default_scope != "mmdet":
        raise ValueError(f"{config_file} is a config of {config.default_scope}, a detector needs one of mmdet.")

    from mmdet.utils import register_all_modules
    from mmengine.model import revert_sync_batchnorm
    from mmengine.registry import MODELS, DefaultScope

    from zoo.openmmlab import channels

    name, _ = split_name(name)
    fixed = timm.is_model(name) and timm.models.get_pretrained_cfg_value(name, "fixed_input_size")
    padded = [-(-side // 32) * 32 for side in size]  # as the config's data preprocessor does
    config.model.backbone = {"type": "ZooBackbone", "model_name": name, **({"img_size": padded} if fixed else {})}
    config.model.neck.in_channels = list(channels(name))
    register_all_modules(init_default_scope=False)
    with DefaultScope.overwrite_default_scope("mmdet"):
        return revert_sync_batchnorm(MODELS.build(config.model))


def make_data(batch: int, size: tuple[int, int], classes: int) -> dict[str, Any]:
    """Pictures of noise with boxes and masks, as a dataloader of mmdet collates them."""
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks
    from mmengine.structures import InstanceData

    random, (height, width) = np.random.default_rng(0), size
    samples = []
    for _ in range(batch):
        corners = random.uniform(0, [0.8 * width, 0.8 * height], (BOXES, 2))
        sides = random.uniform(0.05, 0.2, (BOXES, 2)) * [width, height]
        boxes = np.concatenate([corners, corners + sides], 1).astype(np.float32)
        masks = np.zeros((BOXES, height, width), np.uint8)
        for mask, (left, top, right, bottom) in zip(masks, boxes.astype(int)):
            mask[top:bottom, left:right] = 1
        labels = torch.from_numpy(random.integers(0, classes, BOXES))
        instances = InstanceData(bboxes=torch.from_numpy(boxes), labels=labels, masks=BitmapMasks(masks, height, width))
        facts = {"img_shape": size, "ori_shape": size, "scale_factor": (1.0, 1.0)}
        samples.append(DetDataSample(metainfo=facts, gt_instances=instances))
    pictures = torch.from_numpy(random.integers(0, 256, (batch, 3, height, width), np.uint8))
    return {"inputs": list(pictures), "data_samples": samples}


def make_step(model: torch.nn.Module, data: dict[str, Any], device: str, dtype: Dtype) -> Callable[[], None]:
    """What is timed: one training step. The model is moved to the device."""
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-5)
    mixed = torch.autocast(device.partition(":")[0], dtype.torch, enabled=dtype is not Dtype.fp32)

    def step() -> None:
        optimizer.zero_grad()
        with mixed:
            losses = model(**model.data_preprocessor(data, True), mode="loss")
            loss, _ = model.parse_losses(losses)
        loss.backward()
        optimizer.step()
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)

    return step


def measure_detector(
    config: Path, name: str, size: tuple[int, int], batch: int, device: str, dtype: Dtype, steps: int
) -> dict[str, Any]:
    """Images per second of the median step, peak memory in MiB (on CUDA) and millions of parameters."""
    torch.manual_seed(0)
    with kernels(name):
        model = build_detector(config, name, size)
        data = make_data(batch, size, 80)
        step = make_step(model, data, device, dtype)
        for _ in range(3):
            step()
        if on_gpu := device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats(device)
        seconds = []
        for _ in range(steps):
            began = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - began)
    peak = torch.cuda.max_memory_allocated(device) / MEBIBYTE if on_gpu else None
    parameters = sum(x.numel() for x in model.parameters()) / 1e6
    return {
        "name": name,
        "images_per_second": batch / statistics.median(seconds),
        "peak_mib": peak,
        "parameters": parameters,
    }


def report(rows: Sequence[dict[str, Any]], title: str) -> Table:
    """The table that is printed; the last column compares with the first row."""
    table = Table(title=title)
    table.add_column("backbone", no_wrap=True)
    for heading in ("params (M)", "images/s", "peak MiB", "relative"):
        table.add_column(heading, justify="right")
    for row in rows:
        peak = "-" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}"
        relative = row["images_per_second"] / rows[0]["images_per_second"]
        speed = f"{row['images_per_second']:.1f}"
        table.add_row(row["name"], f"{row['parameters']:.1f}", speed, peak, f"{relative:.2f}x")
    return table


def main(
    names: Annotated[list[str], typer.Argument(help="Backbones; NAME@torch runs without the Triton kernels.")],
    config: Annotated[Path, typer.Option(help="Of mmdet: the detector around them.")],
    size: Annotated[tuple[int, int], typer.Option(min=32, help="Height and width in pixels.")] = (800, 1333),
    batch: Annotated[int, typer.Option(min=1, help="Pictures in a step.")] = 4,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[Dtype, typer.Option(help="Of the autocast; fp32 for none.")] = Dtype.fp32,
    steps: Annotated[int, typer.Option(min=1, help="Timed steps, after three that are not.")] = 20,
    json_path: Annotated[Path | None, typer.Option("--json", help="Also write the numbers to a file.")] = None,
) -> None:
    """Measure training images/s and peak memory of one detector on several backbones."""
    rows = []
    try:
        for name in names:
            rows.append(measure_detector(config, name, size, batch, device, dtype, steps))
            console.print(rows[-1])
            gc.collect()
            if device.startswith("cuda"):
                torch.cuda.empty_cache()
    except (ValueError, FileNotFoundError, ImportError) as error:
        console.print(f"error: {error}", style="red", markup=False)
        raise typer.Exit(1) from None
    facts = ", ".join(f"{key} {value}" for key, value in environment(device).items())
    what = f"{config.stem}, training, {batch} x {size[0]} x {size[1]}, {dtype.value}"
    output_console().print(report(rows, f"{facts}\n{what}"))
    if json_path:
        write_text(json_path, json.dumps({"environment": environment(device), "what": what, "rows": rows}, indent=1))


if __name__ == "__main__":
    typer.run(main)
