"""Measure what a multimodal model loses and saves with fewer visual tokens, on questions in LLaVA's format.

    python -m zoo.tools.evaluate_mllm MODEL QUESTIONS.json --plan none --plan fastv:layer=2,keep=0.5 --out output/fastv

A plan is what ``zoo.mllm.accelerate`` takes: one reduction, several joined by ``+``, or ``none``. Every question is
asked on its own and answered greedily; an answer is right if it is the file's, but for case and a final full stop.
"""

import dataclasses
import json
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

from zoo.console import output_console
from zoo.files import replacing, write_text
from zoo.mllm import DecoderShape, accelerate, load
from zoo.mllm.base import Method
from zoo.mllm.conversations import Conversation, read_conversations, read_picture
from zoo.mllm.cost import flops_with
from zoo.mllm.prompts import encode, generate, message
from zoo.mllm.reduce import parse_reductions
from zoo.mllm.trained import load_trained

app = typer.Typer(add_completion=False, help=__doc__)
console = Console(stderr=True)


@dataclasses.dataclass(frozen=True)
class Question:
    """One question, whatever conversation it is from."""

    images: tuple[Path, ...]
    text: str
    answer: str
    kind: str


@dataclasses.dataclass(frozen=True)
class Result:
    """What a plan gives.

    Attributes:
        plan: its text.
        accuracy: percentage of right answers.
        kinds: the same for each kind of question.
        visual_tokens: mean over layers and questions.
        gflops: of the decoder's layers for a prompt, 10^9: of the tokens that each layer saw and of choosing them; what
            ZipVL's attention saves is not counted.
        kv_megabytes: that a prompt leaves in the cache, 10^6 bytes, as measured, with the padding of its batch.
        milliseconds: for a question, preprocessing and generation of the whole answer, in batches.
        prefill_milliseconds: for a question, until its first token, without preprocessing.
    """

    plan: str
    accuracy: float
    kinds: dict[str, float]
    visual_tokens: float
    gflops: float
    kv_megabytes: float
    milliseconds: float
    prefill_milliseconds: float


def questions_of(conversations: Sequence[Conversation]) -> list[Question]:
    """All questions; those of later turns are asked with the pictures, but without the turns before."""
    return [
        Question(conversation.images, text, answer, kind)
        for conversation in conversations
        for (text, answer), kind in zip(conversation.turns, conversation.kinds)
    ]


def normalised(answer: str) -> str:
    """An answer as it is compared."""
    return " ".join(answer.lower().strip().removesuffix(".").split())


def _methods(plan: str) -> list[Method]:
    return [] if plan == "none" else parse_reductions(plan.split("+"))


def evaluate(
    model: nn.Module,
    processor: Any,
    questions: Sequence[Question],
    plan: str = "none",
    *,
    trained: Mapping[str, Any] | None = None,
    batch_size: int = 32,
    max_new_tokens: int = 16,
) -> tuple[Result, list[str]]:
    """Ask all questions under one plan.

    Args:
        model: of transformers, on its device.
        processor: of the model.
        questions: what to ask.
        plan: reductions joined by ``+``, or "none".
        trained: more arguments of ``accelerate``, as of ``load_trained``.
        batch_size: questions asked together.
        max_new_tokens: of an answer.

    Returns:
        The result, and the answers.
    """
    shape, device, methods = DecoderShape.from_config(model.config), model.device, _methods(plan)
    answers: list[str] = []
    seconds = prefill_seconds = flops = cache = visual_tokens = 0.0
    batches = [questions[start : start + batch_size] for start in range(0, len(questions), batch_size)]
    model.eval()
    with accelerate(model, methods, **(trained or {})) as handle:
        for batch in track(batches, plan, console=console, disable=not console.is_terminal):
            began = _now(device)
            talks = [[message("user", one.text, [read_picture(path) for path in one.images])] for one in batch]
            inputs = encode(model, processor, talks)
            answers += generate(model, processor, inputs, max_new_tokens=max_new_tokens)
            seconds += _now(device) - began
            began = _now(device)
            with torch.no_grad():
                model(**inputs, logits_to_keep=1)
            prefill_seconds += _now(device) - began
            # Of the mean prompt of the batch: attention's part, which grows with the square, is a little more.
            seen = handle.report()
            text = (int(inputs["attention_mask"].sum()) - seen["visual_tokens"]) / len(batch)
            per_layer = [text + visual / len(batch) for visual in seen["visual_tokens_per_layer"]]
            flops += len(batch) * flops_with(methods, shape, text, per_layer)
            cache += seen["kv_bytes"]
            visual_tokens += sum(seen["visual_tokens_per_layer"]) / shape.layers
    right = defaultdict(list)
    for question, answer in zip(questions, answers):
        right[question.kind].append(normalised(answer) == normalised(question.answer))
    count = len(questions)
    kinds = {kind: round(100 * sum(hits) / len(hits), 2) for kind, hits in sorted(right.items()) if kind}
    result = Result(
        plan=plan,
        accuracy=round(100 * sum(map(sum, right.values())) / count, 2),
        kinds=kinds,
        visual_tokens=round(visual_tokens / count, 1),
        gflops=round(flops / count / 1e9, 6),
        kv_megabytes=round(cache / count / 1e6, 6),
        milliseconds=round(1e3 * seconds / count, 3),
        prefill_milliseconds=round(1e3 * prefill_seconds / count, 3),
    )
    return result, answers


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def table(results: Sequence[Result]) -> Table:
    """One line for each plan."""
    kinds = list(results[0].kinds)
    found = Table(box=None, pad_edge=False)
    found.add_column("plan", no_wrap=True)
    for heading in ("right, %", *kinds, "visual tokens", "GFLOPs", "KV, MB", "ms", "prefill, ms"):
        found.add_column(heading, justify="right")
    for one in results:
        numbers = [one.accuracy, *one.kinds.values(), one.visual_tokens, one.gflops]
        numbers += [one.kv_megabytes, one.milliseconds, one.prefill_milliseconds]
        found.add_row(one.plan, *(f"{number:.1f}" for number in numbers))
    return found


def plot(results: Sequence[Result], path: Path) -> None:
    """Accuracy against FLOPs, visual tokens and prefill time; plans of one method are joined by a line."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("The plot needs matplotlib: pip install 'linear-vision-zoo[bench]'.") from None
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    methods = defaultdict(list)
    for one in results:
        methods["+".join(part.partition(":")[0] for part in one.plan.split("+"))].append(one)
    measures = {"gflops": "GFLOPs of the prefill", "visual_tokens": "visual tokens, mean over layers"}
    measures["prefill_milliseconds"] = "prefill, ms per question"
    for axis, (measure, label) in zip(axes, measures.items()):
        for number, (method, points) in enumerate(methods.items()):
            points = sorted(points, key=lambda one: getattr(one, measure))
            style = "k*" if method == "none" else f"C{number % 10}{'os^Dv'[number // 10 % 5]}-"
            x, y = [getattr(one, measure) for one in points], [one.accuracy for one in points]
            axis.plot(x, y, style, label=method, markersize=10 if method == "none" else 5)
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("right answers, %")
    axes[2].legend(fontsize="small")
    with replacing(path) as part:
        figure.savefig(part, format="png", dpi=150)


Plans = Annotated[list[str] | None, typer.Option("--plan", help="Reductions joined by +, or none; again for more.")]


@app.command()
def main(
    model: Annotated[str, typer.Argument(help="A folder or hub id, as of zoo.mllm.load.")],
    questions: Annotated[Path, typer.Argument(help="JSON file in LLaVA's format.")],
    plan: Plans = None,
    images: Annotated[Path | None, typer.Option(help="Folder of the pictures; by default the file's.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of results.json, answers.json and results.png.")] = Path(
        "output/evaluate_mllm"
    ),
    limit: Annotated[int, typer.Option(min=0, help="Only so many questions, evenly spread; 0: all.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions asked together.")] = 32,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of an answer.")] = 16,
    device: Annotated[str | None, typer.Option(help="By default a GPU, if there is one.")] = None,
    bf16: Annotated[bool, typer.Option(help="Turn the model to bfloat16.")] = False,
) -> None:
    """Ask all questions under each plan, and write one table, one plot and JSON."""
    try:
        asked = questions_of(read_conversations(questions, images))
        if limit:
            asked = asked[:: max(1, len(asked) // limit)][:limit]
        net, processor = load(model)
        net.to(device or ("cuda" if torch.cuda.is_available() else "cpu"), torch.bfloat16 if bf16 else None)
        trained = load_trained(model, net)
        plans = plan or ["none"]
        for one in plans:  # a plan that cannot be is told at once
            accelerate(net, _methods(one), **trained).remove()
        options = {"trained": trained, "batch_size": batch_size, "max_new_tokens": max_new_tokens}
        evaluate(net, processor, asked[:batch_size], **options)  # what is slow the first time only
        results, answers = [], {}
        given = [{**dataclasses.asdict(one), "images": [path.name for path in one.images]} for one in asked]
        for one in plans:
            result, answers[one] = evaluate(net, processor, asked, one, **options)
            results.append(result)
            console.print(f"{one}: {result.accuracy:.2f} % right, {result.gflops:.2f} GFLOPs", markup=False)
            device_name = torch.cuda.get_device_name(net.device) if net.device.type == "cuda" else "CPU"
            found = {"model": model, "questions": len(asked), "device": device_name, "batch_size": batch_size}
            found |= {"bf16": bf16, "results": [dataclasses.asdict(one) for one in results]}
            write_text(out / "results.json", json.dumps(found, indent=1))
            write_text(out / "answers.json", json.dumps({"questions": given, "answers": answers}))
        plot(results, out / "results.png")
    except (ImportError, OSError, ValueError) as error:
        console.print(f"error: {error}", style="red", markup=False)
        raise typer.Exit(1) from None
    output_console().print(table(results))


if __name__ == "__main__":
    app()
