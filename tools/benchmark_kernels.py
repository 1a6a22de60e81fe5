"""Time the operators against what else computes the same, or does the same job, in one process.

    python -m zoo.tools.benchmark_kernels --device cuda --json kernels.json
    python -m zoo.tools.benchmark_kernels --device cuda --op linear_attention --plot kernels.png
    python -m zoo.tools.benchmark_kernels --seconds 30

Each line is one contender on one shape: ours (on Triton where it can), ours on PyTorch's operators, the definition in
``reference.py`` under ``torch.compile``, flash attention (SDPA), PyTorch's convolutions (cuDNN on a GPU) in both
layouts. Times are milliseconds, of a forward pass and of forward and backward together, called from Python and, on a
GPU, as a CUDA graph; on a CPU they are those of one core. "of copy" is the share of the measured copy bandwidth that
the better of the two times amounts to if inputs are read once and results written once (backward: inputs and the
gradient of the result read, the gradients of the inputs written). "host" is how long a call keeps Python busy, in
microseconds, on a GPU only; "peak" is the memory that forward and backward allocate. ``--plot`` times square maps of
224 to 4096 pixels at stride 4 instead.
"""

import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from zoo.files import write_text
from zoo.kernels import (
    bidirectional_gated_linear_attention,
    depthwise_conv2d,
    gated_linear_attention,
    large_kernel_attention,
    linear_attention,
)
from zoo.kernels.depthwise_conv.reference import depthwise_conv2d_reference
from zoo.kernels.large_kernel_attention.reference import large_kernel_attention_reference
from zoo.kernels.linear_attention.reference import linear_attention_reference
from zoo.measure import MEBIBYTE, Dtype, environment, kernels
from zoo.plots import draw_lines, new_figure

SIDES = (224, 512, 1024, 2048, 4096)  # of the pictures in the plot, in pixels
SLOW = 0.25  # seconds of one call from which it is timed once
COMPILED = "reference, compiled"
HEADINGS = ("fwd", "graph", "of copy", "fwd+bwd", "graph", "of copy", "host us", "peak MiB")


class Op(str, Enum):
    """What can be timed."""

    linear_attention = "linear_attention"
    depthwise_conv2d = "depthwise_conv2d"
    large_kernel_attention = "large_kernel_attention"
    gated_linear_attention = "gated_linear_attention"
    bidirectional_gated_linear_attention = "bidirectional_gated_linear_attention"


# Batch, heads, tokens, head dim (and value dim); batch, channels, side (and kernel size, dilation).
GPU_SHAPES: dict[Op, tuple[tuple[int, ...], ...]] = {
    Op.linear_attention: (
        (64, 1, 3136, 64),
        (4, 1, 65536, 64),
        (64, 2, 784, 64),
        (64, 5, 196, 64),
        (4, 5, 4096, 64),
    ),
    Op.depthwise_conv2d: tuple(
        (*shape, *kernel)
        for shape in ((64, 64, 56), (8, 64, 256), (64, 32, 56), (64, 128, 28), (64, 320, 14))
        for kernel in ((5, 1), (7, 3))
    ),
    Op.large_kernel_attention: ((64, 64, 56), (8, 64, 256), (64, 32, 56), (64, 128, 28), (64, 320, 14)),
    Op.bidirectional_gated_linear_attention: ((16, 3, 4096, 32, 64), (128, 3, 196, 32, 64)),
    Op.gated_linear_attention: ((16, 3, 4096, 32, 64),),
}
CPU_SHAPES: dict[Op, tuple[tuple[int, ...], ...]] = {
    Op.linear_attention: ((1, 1, 3136, 64), (1, 5, 196, 64)),
    Op.depthwise_conv2d: ((1, 64, 56, 5, 1), (1, 64, 56, 7, 3)),
    Op.large_kernel_attention: ((1, 64, 56), (1, 320, 14)),
    Op.bidirectional_gated_linear_attention: ((1, 3, 196, 32, 64),),
    Op.gated_linear_attention: ((1, 3, 196, 32, 64),),
}


@dataclass(frozen=True)
class Contender:
    """One way to compute.

    Attributes:
        name: for the table; what follows an @ are the kernels that the operator runs on.
        compute: of the inputs.
        inputs: all are read, and have gradients.
    """

    name: str
    compute: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]


@dataclass(frozen=True)
class Row:
    """One contender on one shape; times in milliseconds, None where there is nothing to measure.

    Attributes:
        op: operator.
        shape: as in ``GPU_SHAPES``.
        contender: its name.
        forward: of a forward pass.
        forward_graph: the same as a CUDA graph.
        forward_share: of the copy bandwidth, from 0 to 1.
        both: of forward and backward.
        both_graph: the same as a CUDA graph.
        both_share: of the copy bandwidth.
        host: microseconds that a forward call keeps Python busy.
        peak: MiB that forward and backward allocate.
    """

    op: str
    shape: tuple[int, ...]
    contender: str
    forward: float
    forward_graph: float | None
    forward_share: float
    both: float
    both_graph: float | None
    both_share: float
    host: float | None
    peak: float | None


def contenders(op: Op, shape: Sequence[int], device: str, dtype: torch.dtype) -> Iterator[Contender]:
    """All ways to compute an operator on random inputs of a shape, quick ones to start first."""
    generator = torch.Generator().manual_seed(0)

    def random(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(size, generator=generator) * scale).to(device, dtype).requires_grad_()

    def decays(*size: int) -> Tensor:
        return F.logsigmoid(torch.randn(size, generator=generator) + 3).to(device, dtype).requires_grad_()

    if op is Op.linear_attention:
        batch, heads, tokens, dim = shape
        qkv = tuple(random(batch, tokens, heads, dim) for _ in range(3))
        yield from _ours(lambda q, k, v: linear_attention(q, k, v, token_weights=True), qkv)
        yield Contender("SDPA", lambda *x: F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in x)), qkv)
        yield _compiled(lambda q, k, v: linear_attention_reference(q, k, v, token_weights=True), qkv)
    elif op is Op.depthwise_conv2d:
        batch, channels, side, size, dilation = shape
        x, parameters = random(batch, side, side, channels), _filter(random, channels, size)
        yield from _ours(lambda *x: depthwise_conv2d(*x, dilation=dilation), (x, *parameters))
        convolve = lambda *x: _convolve(*x, dilation)  # noqa: E731
        yield from _layouts(convolve, x, parameters)
        yield _compiled(lambda *x: depthwise_conv2d_reference(*x, dilation=dilation), (x, *parameters))
    elif op is Op.large_kernel_attention:
        batch, channels, side = shape
        mix = random(channels, channels, scale=channels**-0.5), random(channels)
        x = random(batch, side, side, channels)
        parameters = (*_filter(random, channels, 5), *_filter(random, channels, 7), *mix)
        yield from _ours(lambda *x: large_kernel_attention(*x, 3), (x, *parameters))
        yield from _layouts(_attend, x, parameters)
        yield _compiled(lambda *x: large_kernel_attention_reference(*x, 3), (x, *parameters))
    else:
        batch, heads, tokens, dim, value_dim = shape
        q, k, v = (random(batch, tokens, heads, size) for size in (dim, dim, value_dim))
        gates = [decays(batch, tokens, heads, dim) for _ in range(1 if op is Op.gated_linear_attention else 2)]
        causal = op is Op.gated_linear_attention
        both = bidirectional_gated_linear_attention
        yield from _ours((lambda *x: gated_linear_attention(*x)[0]) if causal else both, (q, k, v, *gates))


def _filter(random: Callable[..., Tensor], channels: int, size: int) -> tuple[Tensor, Tensor]:
    return random(channels, 1, size, size, scale=1 / size), random(channels)


def _ours(compute: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> Iterator[Contender]:
    yield Contender("ours", compute, inputs)
    if inputs[0].is_cuda:
        yield Contender("ours@torch", compute, inputs)


def _compiled(reference: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> Contender:
    torch._dynamo.reset()  # one frame of code serves all shapes: too many would go on eagerly
    return Contender(COMPILED, torch.compile(reference, dynamic=False), inputs)


def _layouts(compute: Callable[..., Tensor], x: Tensor, parameters: tuple[Tensor, ...]) -> Iterator[Contender]:
    """Convolutions of (B, C, H, W) that lie in memory as their name says."""
    for name, layout in (("NCHW", torch.contiguous_format), ("NHWC", torch.channels_last)):
        moved = x.detach().permute(0, 3, 1, 2).contiguous(memory_format=layout).requires_grad_()
        weights = (t.detach().contiguous(memory_format=layout) if t.ndim == 4 else t.detach() for t in parameters)
        yield Contender(f"conv2d {name}", compute, (moved, *(t.requires_grad_() for t in weights)))


def _convolve(x: Tensor, weight: Tensor, bias: Tensor, dilation: int) -> Tensor:
    return F.conv2d(x, weight, bias, 1, dilation * (weight.shape[-1] // 2), dilation, x.shape[1])


def _attend(x: Tensor, w5: Tensor, b5: Tensor, w7: Tensor, b7: Tensor, mix: Tensor, mix_bias: Tensor) -> Tensor:
    stages = _convolve(_convolve(x, w5, b5, 1), w7, b7, 3)
    return x * F.conv2d(stages, mix[:, :, None, None], mix_bias)


def time_contender(op: Op, shape: Sequence[int], contender: Contender, bandwidth: float, seconds: float) -> Row:
    """All numbers of one contender.

    Args:
        op: operator.
        shape: of its inputs.
        contender: what computes.
        bandwidth: bytes per second of a copy, read and written ones together.
        seconds: spent on each of the times.
    """
    inputs = contender.inputs
    cuda = inputs[0].is_cuda
    with kernels(contender.name):
        result = contender.compute(*inputs)
        gradient = torch.randn_like(result)
        read = sum(x.nbytes for x in inputs)
        floor, floor_both = read + result.nbytes, 3 * read + 2 * result.nbytes
        del result

        @torch.no_grad()
        def forward() -> None:
            contender.compute(*inputs)

        def both() -> None:
            torch.autograd.grad(contender.compute(*inputs), inputs, gradient)

        peak = _peak(both) if cuda else None
        times = [_milliseconds(forward, cuda, seconds), _milliseconds(both, cuda, seconds)]
        graphs = [_milliseconds(_graph(step), cuda, seconds) if cuda else None for step in (forward, both)]
        host = _host_microseconds(forward) if cuda else None
    best = [min(filter(None, pair)) for pair in zip(times, graphs)]
    shares = [size / bandwidth * 1e3 / time for size, time in zip((floor, floor_both), best)]
    forward_both = (x for numbers in zip(times, graphs, shares) for x in numbers)
    return Row(op.value, tuple(shape), contender.name, *forward_both, host, peak)


def _milliseconds(step: Callable[[], Any], cuda: bool, seconds: float) -> float:
    """Of one call: the median on a GPU; the mean on a CPU, in time of the core, which other processes do not share."""
    now = time.perf_counter if cuda else time.process_time
    step()
    start = now()
    step()
    if cuda:
        torch.cuda.synchronize()
    once = now() - start
    if once > SLOW:
        return once * 1e3
    if cuda:
        from triton.testing import do_bench  # empties the caches of the GPU before each call

        return do_bench(step, warmup=5, rep=seconds * 1e3, return_mode="median")
    repeats = max(3, min(1000, math.ceil(seconds / max(once, 1e-6))))
    start = now()
    for _ in range(repeats):
        step()
    return (now() - start) / repeats * 1e3


def _graph(step: Callable[[], None]) -> Callable[[], None]:
    graph = torch.cuda.CUDAGraph()
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        step()
    torch.cuda.current_stream().wait_stream(aside)
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def _host_microseconds(step: Callable[[], None]) -> float:
    """How long a call takes until Python goes on, while the GPU has nothing else to do."""
    times = []
    for _ in range(50):
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return statistics.median(times) * 1e6


def _peak(step: Callable[[], None]) -> float:
    step()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    return (torch.cuda.max_memory_allocated() - before) / MEBIBYTE


def copy_bandwidth(device: str) -> float:
    """Bytes per second, read and written together, of copying what no cache holds."""
    source = torch.zeros(2**29 if device == "cuda" else 2**27, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _milliseconds(lambda: target.copy_(source), device == "cuda", 0.2) * 1e3


def plot_shape(op: Op, side: int) -> tuple[int, ...]:
    """One picture of side x side pixels at stride 4: 64 channels, in one head."""
    tokens = (side // 4) ** 2
    return {
        Op.linear_attention: (1, 1, tokens, 64),
        Op.depthwise_conv2d: (1, 64, side // 4, 7, 3),
        Op.large_kernel_attention: (1, 64, side // 4),
    }.get(op, (1, 1, tokens, 32, 64))


def line(row: Row) -> str:
    """A row of the printed table."""
    shares = {2: row.forward_share, 5: row.both_share}
    numbers = (row.forward, row.forward_graph, None, row.both, row.both_graph, None, row.host, row.peak)
    cells = [f"{shares[i]:.0%}" if i in shares else "-" if n is None else f"{n:.4g}" for i, n in enumerate(numbers)]
    return f"{row.op:36} {' x '.join(map(str, row.shape)):26} {row.contender:20}" + "".join(f"{c:>9}" for c in cells)


def run(
    problems: Sequence[tuple[Op, tuple[int, ...]]],
    device: str,
    dtype: torch.dtype,
    bandwidth: float,
    seconds: float,
    compiled: bool = True,
) -> Iterator[Row]:
    """The rows, as they are measured; no new contender begins when the time is over.

    A contender that failed, or whose forward and backward pass took longer than a second, gets no larger shape of the
    operator.
    """
    end = time.monotonic() + seconds
    limits: dict[tuple[Op, str], int] = {}  # elements of the first input
    for op, shape in problems:
        for contender in contenders(op, shape, device, dtype):
            if time.monotonic() > end:
                print(f"The {seconds:g} seconds are over: what is missing needs more (--seconds).", file=sys.stderr)
                return
            key, elements = (op, contender.name), contender.inputs[0].numel()
            if elements >= limits.get(key, elements + 1) or (contender.name == COMPILED and not compiled):
                continue
            try:
                row = time_contender(op, shape, contender, bandwidth, min(0.05, seconds / 100))
            except (RuntimeError, NotImplementedError) as error:
                reason = str(error).partition("\n")[0]
                print(f"{contender.name} does not run on {op.value} of {shape}: {reason}", file=sys.stderr)
                limits[key] = elements
                continue
            if row.both > 1000:
                limits[key] = elements
            yield row


def main(
    op: Annotated[list[Op], typer.Option(help="Only this operator; may be given again.")] = list(Op),  # noqa: B006
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[Dtype | None, typer.Option(help="By default bf16 on a GPU, fp32 on a CPU.")] = None,
    seconds: Annotated[float, typer.Option(help="No new measurement begins after that.")] = 300,
    compiled: Annotated[bool, typer.Option("--compile/--no-compile", help="Time the compiled reference.")] = True,
    json_path: Annotated[Path | None, typer.Option("--json", help="Also write the numbers to a file.")] = None,
    plot_path: Annotated[Path | None, typer.Option("--plot", help="Time 224 to 4096 pixels and draw it.")] = None,
    side: Annotated[list[int], typer.Option(min=4, help="Other sizes for the plot, in pixels.")] = list(SIDES),  # noqa: B006
) -> None:
    """Time the operators against what else computes the same, or does the same job."""
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise typer.BadParameter(f"the device {device!r} cannot be used here, try cpu.", param_hint="--device")
    if plot_path:
        new_figure(1, 1)  # what is missing is said before the work is done
    if device == "cpu":
        torch.set_num_threads(1)
    dtype = dtype or (Dtype.bf16 if device == "cuda" else Dtype.fp32)
    shapes = GPU_SHAPES if device == "cuda" else CPU_SHAPES
    problems = [(o, s) for o in op for s in ([plot_shape(o, n) for n in sorted(side)] if plot_path else shapes[o])]
    facts = {**environment(device), "dtype": dtype.value, "copy_bandwidth": round(copy_bandwidth(device))}
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    print(f"{'':84}" + "".join(f"{heading:>9}" for heading in HEADINGS), flush=True)
    rows = []
    for row in run(problems, device, dtype.torch, facts["copy_bandwidth"], seconds, compiled):
        print(line(row), flush=True)
        rows.append(row)
        if json_path:  # after every row: what is there is not lost if the time is over for the whole process
            _write(json_path, {"environment": facts, "rows": [asdict(row) for row in rows]})
    if plot_path:
        _plot(rows, facts["device"], plot_path)


def _write(path: Path, document: dict[str, Any]) -> None:
    write_text(path, json.dumps(document, indent=1) + "\n")


def _plot(rows: Sequence[Row], device: str, path: Path) -> None:
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for row in rows:
        side = row.shape[2] if "attention" not in row.op or "kernel" in row.op else math.isqrt(row.shape[2])
        lines = panels.setdefault(row.op, {})
        lines.setdefault(f"{row.contender}, forward", []).append((4 * side, row.forward_graph or row.forward))
        lines.setdefault(f"{row.contender}, forward and backward", []).append((4 * side, row.both_graph or row.both))
    draw_lines(path, panels, "height and width of the picture (pixels)", "milliseconds", device)


if __name__ == "__main__":
    typer.run(main)
