"""Measure models whose rows are split over the GPUs of one machine against the same models on one GPU.

    python -m zoo.tools.benchmark_rows lightnet_tiny van_b1 --size 8192 --seconds 500 --json rows.json
    python -m zoo.tools.benchmark_rows van_nano --device cpu --dtype fp32 --size 512 --seconds 60

Each measurement starts processes of its own, one for each rank, so one that runs out of memory takes nothing along.

- images/s: of one picture of ``--size`` in inference mode, in the median round.
- peak: the memory that torch allocates on the fullest rank.
- gathers, gathered: collectives of a forward pass with states of linear attention and means, and what rank 0 sends in
  them. It does not depend on the size, but for one row of tokens in LightNet's stem.
- rows: what rank 0 sends of rows of maps (halos), and of keys and values of softmax attention.
- ring: what it would send if ring attention took the place of linear attention: all keys and values.
- hidden: the share of the time of NCCL's kernels in which others run, from the profiler.
- largest: the side of the largest square picture that fits, in steps of ``--step``; on GPUs only.
"""

import json
import math
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from itertools import pairwise
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Annotated, Any

import timm
import torch
import typer
from rich.table import Table
from torch import Tensor, nn
from torch import distributed as dist
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from zoo import backbones  # noqa: F401  (registers the models)
from zoo.console import output_console
from zoo.files import write_text
from zoo.measure import MEBIBYTE, Dtype, console, environment
from zoo.parallel import SplitAdditiveAttention, SplitRankAugmentedAttention, SplitTokenInjectiveAttention, split_rows

LINEAR = (SplitAdditiveAttention, SplitRankAugmentedAttention, SplitTokenInjectiveAttention)
ALIGNMENT = 32  # rows: strips are whole multiples, but for the last
FIRST = 2048  # side of the first picture, from whose memory the largest one is guessed, in pixels
MARGIN = 0.95  # of a GPU's memory, for the guess: the rest is not torch's


class Traffic(TorchDispatchMode):
    """What this rank sends to others while this is entered.

    Attributes:
        gathers: collectives in which every rank sends the same to all.
        gathered: their bytes.
        exchanges: other collectives, of rows.
        rows: their bytes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.gathers = self.gathered = self.exchanges = self.rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.namespace == "c10d":
            if "alltoall_base_" not in func.name():
                raise ValueError(f"{func.name()} is no collective of zoo.kernels.distributed, whose bytes are known.")
            _, data, group, _, sent = args[:5]
            rank = dist.ProcessGroup.unbox(group).rank()
            size = (sum(sent) - sent[rank]) * (data.nbytes // max(data.shape[0], 1))
            if set(sent) == {1}:
                self.gathers, self.gathered = self.gathers + 1, self.gathered + size
            else:
                self.exchanges, self.rows = self.exchanges + 1, self.rows + size
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Case:
    """One measurement.

    Attributes:
        name: of the model.
        size: height and width of the picture.
        ranks: processes.
        device: "cpu" or "cuda".
        dtype: of weights and picture.
        seconds: of timing; 0 to find out only whether it fits.
    """

    name: str
    size: int
    ranks: int
    device: str
    dtype: Dtype
    seconds: float


@dataclass
class Row:
    """What a case gave, on rank 0 unless said otherwise; bytes are those of one forward pass.

    Attributes:
        case: what was measured.
        peak: bytes allocated on the fullest rank; None on a CPU.
        budget: bytes of the GPU with the least memory.
        times: seconds of each round.
        gathers: collectives of states and means.
        gathered: bytes sent in them.
        rows: bytes sent of rows of maps, keys and values.
        ring: bytes that ring attention would send instead of states.
        hidden: share of the communication during which something else ran; None on a CPU.
    """

    case: Case
    peak: int | None = None
    budget: int | None = None
    times: list[float] = field(default_factory=list)
    gathers: int = 0
    gathered: int = 0
    rows: int = 0
    ring: int = 0
    hidden: float | None = None

    @property
    def rate(self) -> float | None:
        """Images per second in the median round."""
        return 1 / statistics.median(self.times) if self.times else None


def heights(size: int, ranks: int) -> list[int]:
    """Rows of every rank, as even as whole multiples of the alignment are."""
    blocks = -(-size // ALIGNMENT)
    bounds = [min(blocks * rank // ranks * ALIGNMENT, size) for rank in range(ranks + 1)]
    return [stop - start for start, stop in pairwise(bounds)]


def hidden_share(hidden: Sequence[tuple[float, float]], others: Sequence[tuple[float, float]]) -> float:
    """The share of the union of some intervals that the union of others covers."""
    union, cover = _union(hidden), _union(others)
    total = sum(stop - start for start, stop in union)
    both = sum(max(0.0, min(b, d) - max(a, c)) for a, b in union for c, d in cover)
    return both / total if total else math.nan


def _union(intervals: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    merged: list[tuple[float, float]] = []
    for start, stop in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], stop))
        else:
            merged.append((start, stop))
    return merged


@torch.inference_mode()
def _measure(case: Case, rank: int) -> Row:
    """On one rank, in its process group."""
    cuda = case.device == "cuda"
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    torch.manual_seed(0)
    model = timm.create_model(case.name).eval().to(device, case.dtype.torch)
    if case.ranks > 1:
        model = split_rows(model)
    rows = heights(case.size, case.ranks)[rank]
    strip = torch.randn(1, 3, rows, case.size, device=device, dtype=case.dtype.torch)

    def run() -> float:
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        model(strip)
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    run()
    row = Row(case)
    if cuda:
        row.peak, row.budget = torch.cuda.max_memory_allocated(), torch.cuda.mem_get_info()[1]
    if case.seconds:
        rounds = max(3, min(50, round(case.seconds / _slowest(run(), case, device))))
        row.times = [_slowest(run(), case, device) for _ in range(rounds)]
        if case.ranks > 1:
            _count(row, model, strip)
            row.hidden = _hidden(run) if cuda else None
    return row


def _slowest(seconds: float, case: Case, device: torch.device) -> float:
    """Of all ranks, so that they agree."""
    if case.ranks == 1:
        return seconds
    times = torch.tensor(seconds, device=device)
    dist.all_reduce(times, dist.ReduceOp.MAX)
    return times.item()


def _count(row: Row, model: nn.Module, strip: Tensor) -> None:
    """The bytes of a forward pass."""

    def add(_: nn.Module, inputs: tuple, __: Tensor) -> None:
        row.ring += 2 * inputs[0].nbytes * (row.case.ranks - 1)  # keys and values, passed on

    hooks = [x.register_forward_hook(add) for x in model.modules() if isinstance(x, LINEAR)]
    with Traffic() as traffic:
        model(strip)
    for hook in hooks:
        hook.remove()
    row.gathers, row.gathered, row.rows = traffic.gathers, traffic.gathered, traffic.rows


def _hidden(run: Callable[[], float]) -> float:
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        run()
    kernels = [event for event in found.events() if event.device_type == DeviceType.CUDA]
    spans = [(event.name, (event.time_range.start, event.time_range.end)) for event in kernels]
    communication = [span for name, span in spans if name.startswith("ncclDevKernel")]
    return hidden_share(communication, [span for name, span in spans if not name.startswith("nccl")])


def _rank(case: Case, rank: int, folder: str, answer: Connection) -> None:
    """A process: sends a row, or why there is none."""
    store, timeout = f"file://{folder}/store", timedelta(minutes=10)
    try:
        if case.device == "cuda":
            torch.cuda.set_device(rank)
        if case.ranks > 1:
            backend = "nccl" if case.device == "cuda" else "gloo"
            dist.init_process_group(backend, init_method=store, rank=rank, world_size=case.ranks, timeout=timeout)
        answer.send(_measure(case, rank))
    except Exception as error:
        answer.send(str(error).partition("\n")[0])
    answer.recv()  # no rank leaves before all are through: it is ended


def measure(case: Case, deadline: float) -> Row | str:
    """Start the ranks and wait for them.

    Args:
        case: what to measure.
        deadline: of ``time.monotonic``; then it is given up.

    Returns:
        The row of rank 0 with the peak of all, or why there is none, such as too little memory.
    """
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe() for _ in range(case.ranks)]
    with tempfile.TemporaryDirectory() as folder:
        arguments = [(case, rank, folder, there) for rank, (_, there) in enumerate(pipes)]
        processes = [context.Process(target=_rank, args=each, daemon=True) for each in arguments]
        for process in processes:
            process.start()
        try:
            return _answer([here for here, _ in pipes], processes, deadline)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _answer(pipes: Sequence[Connection], processes: Sequence[BaseProcess], deadline: float) -> Row | str:
    rows: dict[int, Row] = {}
    while len(rows) < len(pipes):
        missing = {pipe: rank for rank, pipe in enumerate(pipes) if rank not in rows}
        ready = wait([*missing, *(process.sentinel for process in processes)], max(0, deadline - time.monotonic()))
        answers = {missing[pipe]: pipe.recv() for pipe in ready if pipe in missing}
        if not answers:
            return "a process died" if ready else "the time was over"
        for answer in answers.values():
            if isinstance(answer, str):
                return answer
        rows |= answers
    rows[0].peak = max((row.peak for row in rows.values() if row.peak is not None), default=None)
    return rows[0]


def largest(case: Case, step: int, deadline: float) -> int:
    """The side of the largest square picture that fits, guessed from the memory of smaller ones and then tried.

    Args:
        case: its size, a multiple of the step, is tried first.
        step: in pixels.
        deadline: of ``time.monotonic``; what is known by then is the answer.

    Returns:
        The side; 0 if not even the first picture fits.
    """
    fits, fails, side = 0, math.inf, case.size
    while fits < side < fails and time.monotonic() < deadline:
        row = measure(replace(case, size=side, seconds=0), deadline)
        if isinstance(row, str):
            console.print(f"{case.name}, {case.ranks} ranks, {side} pixels: {row}", style="yellow", markup=False)
            fails = side
        else:
            fits = side
        if fails < math.inf:
            side = int(fits + fails) // 2 // step * step
        else:
            side = max(int(side * math.sqrt(MARGIN * row.budget / row.peak)) // step * step, fits + step)
    return fits


def report(rows: Sequence[tuple[Row, int]]) -> Table:
    """The table that is printed, of rows and the largest sides."""
    table = Table()
    for heading in (
        "model",
        "ranks",
        "side",
        "images/s",
        "peak MiB",
        "gathers",
        "gathered KiB",
        "rows MiB",
        "ring MiB",
        "hidden",
        "largest",
    ):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for row, side in rows:
        table.add_row(
            row.case.name,
            str(row.case.ranks),
            str(row.case.size),
            "-" if row.rate is None else f"{row.rate:.3g}",
            "-" if row.peak is None else f"{row.peak / MEBIBYTE:.0f}",
            str(row.gathers),
            f"{row.gathered / 1024:.1f}",
            f"{row.rows / MEBIBYTE:.2f}",
            f"{row.ring / MEBIBYTE:.1f}",
            "-" if row.hidden is None else f"{row.hidden:.0%}",
            str(side or "-"),
        )
    return table


def main(
    names: Annotated[list[str], typer.Argument(help="Models that zoo.parallel.split_rows takes.")],
    size: Annotated[int, typer.Option(min=32, help="Height and width in pixels of what is timed.")] = 8192,
    ranks: Annotated[int, typer.Option(min=0, help="Processes; 0 for one on each GPU, or 2 on a CPU.")] = 0,
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    dtype: Annotated[Dtype, typer.Option(help="Of weights and pictures.")] = Dtype.bf16,
    step: Annotated[int, typer.Option(min=32, help="Of the largest side, in pixels; 2048 is a multiple.")] = 256,
    timing: Annotated[float, typer.Option(help="Seconds of each timing.")] = 5.0,
    seconds: Annotated[float, typer.Option(help="Of everything; what is not done by then is left out.")] = 540.0,
    json_path: Annotated[Path | None, typer.Option("--json", help="Also write the numbers to a file.")] = None,
) -> None:
    """Measure models whose rows are split over GPUs against the same models on one."""
    deadline = time.monotonic() + seconds
    if device == "cuda" and torch.cuda.device_count() < max(2, ranks):
        console.print(f"error: There are {torch.cuda.device_count()} GPUs, expected 2 or more: use --device cpu.")
        raise typer.Exit(1)
    ranks = ranks or (torch.cuda.device_count() if device == "cuda" else 2)
    cases = [Case(name, size, count, device, dtype, timing) for name in names for count in (1, ranks)]
    timed = {case: measure(case, deadline) for case in cases}
    rows = []
    for case, row in timed.items():  # after all timings: it takes the time that is left
        if isinstance(row, str):
            console.print(f"left out: {case.name}, {case.ranks} ranks: {row}", style="yellow", markup=False)
            row = Row(case)
        share = (deadline - time.monotonic()) / (len(cases) - len(rows))
        until = time.monotonic() + share
        rows.append((row, largest(replace(case, size=FIRST), step, until) if device == "cuda" else 0))
    facts = environment(device)
    output_console().print(", ".join(f"{key} {value}" for key, value in facts.items()), report(rows))
    if json_path:
        content = [{**asdict(row), "images_per_second": row.rate, "largest": side} for row, side in rows]
        write_text(json_path, json.dumps({"environment": facts, "rows": content}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
