"""Measure images/s of onnxruntime and of PyTorch on this CPU, of fused models as `zoo.export` writes them.

python -m zoo.tools.benchmark_onnx van_b0 ravlt_tiny --size 224 --batch 1 --threads 1
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import timm
import torch
import typer
from rich.table import Table

from zoo.console import output_console
from zoo.deploy import fuse
from zoo.export import INPUT, export

WARM_UP = 2  # calls that are not measured


def images_per_second(call: Callable[[], object], batch: int, rounds: int) -> float:
    """The median over rounds of one call each."""
    seconds = []
    for _ in range(WARM_UP + rounds):
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    return batch / statistics.median(seconds[WARM_UP:])


def measure(name: str, size: int, batch: int, threads: int, rounds: int) -> tuple[float, float, float]:
    """Images/s of PyTorch and of onnxruntime, and the largest difference of their logits over the largest logit."""
    import onnxruntime

    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    pictures = torch.randn(batch, 3, size, size)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    with TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        export(model, path, (size, size), batch)
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    fused, inputs = fuse(model), {INPUT: pictures.numpy()}
    with torch.inference_mode():
        expected, (found,) = fused(pictures), session.run(None, inputs)
        error = (torch.from_numpy(found) - expected).abs().max() / expected.abs().max()
        torch_speed = images_per_second(lambda: fused(pictures), batch, rounds)
    return torch_speed, images_per_second(lambda: session.run(None, inputs), batch, rounds), error.item()


def main(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="Models of timm or the zoo.")],
    size: Annotated[int, typer.Option(min=1, help="Height and width of the pictures.")] = 224,
    batch: Annotated[int, typer.Option(min=1, help="Pictures of a call.")] = 1,
    threads: Annotated[int, typer.Option(min=1, help="Of both.")] = 1,
    rounds: Annotated[int, typer.Option(min=1, help="Calls, whose median counts.")] = 10,
) -> None:
    """Print a table of both, with random weights."""
    torch.set_num_threads(threads)
    table = Table("Model", box=None, pad_edge=False)
    for heading in ("PyTorch images/s", "onnxruntime images/s", "Ratio", "Difference"):
        table.add_column(heading, justify="right")
    for name in names:
        ours, theirs, error = measure(name, size, batch, threads, rounds)
        table.add_row(name, f"{ours:.4g}", f"{theirs:.4g}", f"{theirs / ours:.2f}", f"{error:.1e}")
    output_console().print(table)


if __name__ == "__main__":
    typer.run(main)
