"""The `zoo` command: name what is in pictures, embed them, look models up, convert checkpoints."""

import dataclasses
import io
import json
import os
import re
import sys
import warnings
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import timm
import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

from zoo.bulk.command import run_command
from zoo.bulk.recipe import Recipe
from zoo.catalogue import CATALOGUE, DEFAULT_MODEL
from zoo.checkpoints import convert_checkpoint
from zoo.classifier import Classifier, Result, check_name
from zoo.compare import compare, draw
from zoo.console import output_console
from zoo.doctor import Diagnosis, diagnose
from zoo.files import replacing
from zoo.images import ImageError, find_images
from zoo.labels import read_labels
from zoo.measure import Dtype, Settings, split_name
from zoo.plots import new_figure
from zoo.printable import printable
from zoo.sheet import LIMIT, THUMBNAIL, draw_sheet
from zoo.stages import stage_table


class _Commands(TyperGroup):
    """Commands whose user errors are one sentence on stderr and exit code 2, without a traceback."""

    def invoke(self, ctx: typer.Context) -> Any:
        warnings.filterwarnings("ignore", module="PIL")  # said again, and better, by ImageError
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")  # names that are not UTF-8; in JSON an escape of its own
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort, BrokenPipeError):
            raise
        except (ValueError, OSError, RuntimeError, ImportError) as error:
            named = isinstance(error, OSError) and error.filename and error.strerror
            typer.echo(f"zoo: {f'{error.filename}: {error.strerror}.' if named else error}", err=True)
            raise typer.Exit(2) from error


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Paths = Annotated[list[str], typer.Argument(metavar="PATH...", help="Pictures, folders, or globs in quotes.")]
Model = Annotated[str, typer.Option(help="Any zoo or timm model.")]
Checkpoint = Annotated[str | None, typer.Option(help="Weights to load: a file, a URL or hf-hub:owner/repo.")]
Batch = Annotated[int, typer.Option(min=1, help="Pictures that go through the model at once.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 or mps; by default a GPU if there is one.")]
Amp = Annotated[bool, typer.Option("--amp", help="Compute in half precision where that is safe.")]
Workers = Annotated[int, typer.Option(min=1, help="Threads that decode pictures.")]
Urls = Annotated[bool, typer.Option("--allow-urls", help="Fetch pictures from http(s) addresses.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
Engine = Annotated[
    str | None,
    typer.Option(metavar="local|ray", help="Bulk: PATH is one source, --out a folder of Parquet files to go on with."),
]
ShardRows = Annotated[int, typer.Option(min=1, help="With --engine: pictures per Parquet file.")]
Column = Annotated[str | None, typer.Option(help="With --engine: the column of Parquet with bytes or paths.")]


@app.callback(invoke_without_command=True)
def main(show_version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    """Linear-complexity vision backbones: name what is in pictures, embed them, look models up."""
    if show_version:
        typer.echo(f"zoo {version('linear-vision-zoo')}")
        raise typer.Exit


@app.command()
def classify(
    paths: Paths,
    model: Model = DEFAULT_MODEL,
    checkpoint: Checkpoint = None,
    labels: Annotated[Path | None, typer.Option(help="Text file with one class name per line.")] = None,
    top_k: Annotated[int, typer.Option(min=1, help="Names per picture.")] = 5,
    as_json: Json = False,
    out: Annotated[Path | None, typer.Option(help="Also draw an annotated sheet: a .png file.")] = None,
    batch_size: Batch = 16,
    device: Device = None,
    amp: Amp = False,
    workers: Workers = 2,
    allow_urls: Urls = False,
    engine: Engine = None,
    shard_rows: ShardRows = 512,
    column: Column = None,
) -> None:
    """Name what is in pictures. Exit code 1 if some could not be read, 2 if none could."""
    names = labels and read_labels(labels)
    if engine:
        recipe = Recipe(
            "classify",
            model,
            checkpoint,
            labels=names and tuple(names),
            top_k=top_k,
            amp=amp,
            device=device,
            batch_size=batch_size,
        )
        run_command(recipe, paths, out, engine, workers, shard_rows, column, allow_urls, as_json)
        return
    _check_suffix(out, ".png")
    classifier = Classifier(
        model,
        checkpoint=checkpoint,
        labels=names,
        device=device,
        amp=amp,
        batch_size=batch_size,
        workers=workers,
    )
    _classify(classifier, model, *find_images(paths, allow_urls), top_k=top_k, as_json=as_json, out=out)


@app.command()
def demo(out: Annotated[Path, typer.Option(help="Where to draw the sheet.")] = Path("demo/sheet.png")) -> None:
    """Name what is in the packaged sample pictures, with the packaged model."""
    _check_suffix(out, ".png")
    samples = find_images([str(files("zoo") / "samples")])
    _classify(Classifier(), DEFAULT_MODEL, *samples, top_k=5, as_json=False, out=out)


@app.command()
def embed(
    paths: Paths,
    out: Annotated[Path, typer.Option(help="A .npy file (with the paths in a .json beside it) or a .parquet file.")],
    model: Model = DEFAULT_MODEL,
    checkpoint: Checkpoint = None,
    batch_size: Batch = 16,
    device: Device = None,
    amp: Amp = False,
    workers: Workers = 2,
    allow_urls: Urls = False,
    engine: Engine = None,
    shard_rows: ShardRows = 512,
    column: Column = None,
) -> None:
    """Turn pictures into feature vectors. Exit code 1 if some could not be read, 2 if none could."""
    if engine:
        recipe = Recipe("embed", model, checkpoint, amp=amp, device=device, batch_size=batch_size)
        run_command(recipe, paths, out, engine, workers, shard_rows, column, allow_urls)
        return
    _check_suffix(out, ".npy", ".parquet")
    if out.suffix == ".parquet":
        _pyarrow()
    classifier = Classifier(
        model, checkpoint=checkpoint, device=device, amp=amp, batch_size=batch_size, workers=workers
    )
    sources, failed = find_images(paths, allow_urls)
    done = _collect(classifier.embed_all(sources), len(sources), failed)
    if done:
        names, features = [result.source for result in done], np.stack([result.embedding for result in done])
        save = _save_parquet if out.suffix == ".parquet" else _save_npy
        save(out, names, features)
        typer.echo(f"Wrote {features.shape[0]} vectors of {features.shape[1]} numbers to {out}")
    report_failures(failed, len(done))


@app.command("list")
def list_models(
    pattern: Annotated[str, typer.Argument(help="Names to list, such as 'van*'.")] = "*", as_json: Json = False
) -> None:
    """List the models of the zoo."""
    entries = [entry for name, entry in CATALOGUE.items() if fnmatchcase(name, pattern)]
    if not entries:
        raise ValueError(f"No model of the zoo is called {pattern}: `zoo list` names them all.")
    if as_json:
        print_json([dataclasses.asdict(entry) for entry in entries])
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("Model", "Family"):
        table.add_column(heading, no_wrap=True)
    for heading in ("Params", "MACs", "Top-1"):
        table.add_column(heading, justify="right", no_wrap=True)
    for heading in ("Licence", "Golden"):
        table.add_column(heading, no_wrap=True)
    table.add_column("Weights")  # the one that is cut where the table is too wide; `zoo info` has it whole
    for entry in entries:
        top1 = f"{entry.top1:.1f}" if entry.top1 else ""
        facts = (_short(entry.params), _short(entry.macs), top1, entry.licence, "yes" if entry.golden else "no")
        table.add_row(entry.name, entry.family, *facts, Text(entry.weights, no_wrap=True, overflow="ellipsis"))
    output_console().print(table)


@app.command()
def info(
    name: Annotated[str, typer.Argument(help="A zoo or timm model.")],
    size: Annotated[int, typer.Option(min=1, help="Height and width of the picture.")] = 224,
    as_json: Json = False,
) -> None:
    """Show what is known of a model, and what each of its stages puts out and costs."""
    check_name(name)
    facts = dataclasses.asdict(CATALOGUE[name]) if name in CATALOGUE else {"name": name}
    rows = stage_table(timm.create_model(name), (size, size))
    if as_json:
        print_json({**facts, "size": size, "stages": [dataclasses.asdict(row) for row in rows]})
        return
    console = output_console()
    table = Table(box=None, show_header=False, pad_edge=False)
    for key, value in facts.items():
        text = _short(value) if key in ("params", "macs") else {True: "yes", False: "no", None: ""}.get(value, value)
        table.add_row(key, Text(str(text)))
    console.print(table, "")
    table = Table("Stage", "Output", box=None, pad_edge=False)
    table.add_column("Params", justify="right")
    table.add_column(f"MACs at {size}", justify="right")
    for row in rows:
        table.add_row(row.name, " x ".join(map(str, row.shape)), f"{row.params:,}", _short(row.macs))
    console.print(table)


@app.command("compare")
def compare_models(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="Zoo or timm models.")],
    size: Annotated[int, typer.Option(min=1, help="Height and width of the pictures.")] = 224,
    batch_size: Batch = 8,
    device: Device = None,
    amp: Annotated[bool, typer.Option("--amp", help="Compute under autocast to bfloat16.")] = False,
    out: Annotated[Path | None, typer.Option(help="Also draw the comparison: a .png file.")] = None,
    as_json: Json = False,
) -> None:
    """Compare models: published accuracy, parameters, MACs, and the speed and memory measured here."""
    _check_suffix(out, ".png")
    if out:
        new_figure(1, 1)  # what is missing is said before the work is done
    for name in names:
        check_name(split_name(name)[0])
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    settings = Settings(size, batch_size, device, Dtype.bf16 if amp else Dtype.fp32, amp)
    rows = compare(names, settings)
    if as_json:
        print_json([dataclasses.asdict(row) for row in rows])
    else:
        table = Table("Model", box=None, pad_edge=False)
        for heading in ("Top-1", "Params", f"MACs at {size}", "Images/s", "", "Memory (MiB)"):
            table.add_column(heading, justify="right")
        for row in rows:
            speed, memory = f"{row.images_per_second:.4g}", "" if row.peak_mib is None else f"{row.peak_mib:.0f}"
            top1 = f"{row.top1:.1f}" if row.top1 else ""
            counts = (_short(row.params), _short(row.macs))
            table.add_row(Text(row.name), top1, *counts, speed, f"+-{row.spread:.0%}", memory)
        output_console().print(table)
    if out:
        with replacing(out) as part:
            draw(rows, settings, part)
        typer.echo(f"Wrote {out}", err=as_json)


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="A checkpoint: a file, a URL or hf-hub:owner/repo.")],
    destination: Annotated[Path, typer.Argument(help="The .safetensors file to write.")],
    model: Annotated[str, typer.Option(help="The model that the checkpoint belongs to.")],
    which: Annotated[str, typer.Option(help="Which weights, where the file has several: model, ema or auto.")] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
) -> None:
    """Rewrite a checkpoint of the authors, of timm or of the zoo as safetensors in the zoo's names."""
    check_name(model)
    report = convert_checkpoint(source, destination, model, which=which, overwrite=overwrite)
    typer.echo(f"Wrote {destination}: {report}")


@app.command("look")
def look_inside(
    image: Annotated[str, typer.Argument(metavar="IMAGE", help="A picture.")],
    model: Annotated[str, typer.Option(help="Any zoo or timm model, or a folder of a multimodal one.")] = DEFAULT_MODEL,
    checkpoint: Checkpoint = None,
    point: Annotated[str | None, typer.Option(metavar="X,Y", help="Pixel to look from; by default the middle.")] = None,
    layer: Annotated[int | None, typer.Option(help="Layer to look into, from 0; by default the last.")] = None,
    label: Annotated[str | None, typer.Option("--class", help="Class to map; by default the most probable.")] = None,
    out: Annotated[Path, typer.Option(help="Where to draw: a .png file.")] = Path("look.png"),
    prompt: Annotated[str | None, typer.Option(help="Multimodal: what is asked about the picture.")] = None,
    reduce: Annotated[list[str] | None, typer.Option(help="Multimodal: as of `zoo chat`; by default half.")] = None,
    device: Device = None,
    allow_urls: Urls = False,
) -> None:
    """Draw where a model sees a class and what a layer attends to from a point, or what tokens are kept."""
    from zoo.look.command import run

    _check_suffix(out, ".png")
    run(image, out, model, checkpoint, point, layer, label, prompt, reduce or [], device, allow_urls)


@app.command()
def serve(
    model: Annotated[list[str] | None, typer.Option(help="A classifier; may be repeated, to compare them.")] = None,
    talker: Annotated[
        str | None, typer.Option("--chat", help="A multimodal model: a folder or a Hugging Face name.")
    ] = None,
    device: Device = None,
    host: Annotated[str, typer.Option(help="Name or address to listen on; other than loopback, with a token.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 for a free one.")] = 7860,
    token: Annotated[
        str, typer.Option(envvar="ZOO_SERVE_TOKEN", help="What requests must bring; the variable shows it to nobody.")
    ] = "",
    upload_mib: Annotated[float, typer.Option(min=0.01, help="Largest request.")] = 20,
    megapixels: Annotated[float, typer.Option(min=0.01, help="Largest picture.")] = 50,
    queue: Annotated[int, typer.Option(min=1, help="Requests that may wait; more are refused.")] = 32,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests that are computed at once.")] = 2,
    seconds: Annotated[float, typer.Option(min=0.1, help="Longest that a request may take.")] = 30,
) -> None:
    """Serve a page and a JSON API for pictures, on this machine unless told otherwise. See docs/SERVE.md."""
    from zoo.serve import Limits
    from zoo.serve.command import serve as serve_models

    limits = Limits(int(upload_mib * 2**20), int(megapixels * 1e6), queue, concurrency, seconds)
    serve_models(model or [DEFAULT_MODEL], talker, device, host, port, token, limits)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Show what is installed, what works, and what to install. Exit code 1 if something installed does not work."""
    diagnosis = diagnose()
    if as_json:
        print_json(dataclasses.asdict(diagnosis))
    else:
        _print_diagnosis(diagnosis)
    if diagnosis.problems:
        raise typer.Exit(1)


def _print_diagnosis(diagnosis: Diagnosis) -> None:
    console = output_console()
    toolkit, gpus = diagnosis.toolkit or "none", ", ".join(diagnosis.gpus) or "none"
    torch_ops = sorted({re.sub("_(forward|backward).*", "", op) for op in diagnosis.torch_ops})
    ops = {None: "no mmcv", "compiled": "compiled", "torch": f"PyTorch has {', '.join(torch_ops)}; no others"}
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_row("Python", f"{diagnosis.python}, {diagnosis.system}")
    table.add_row("CUDA", f"{toolkit}, GPUs: {gpus}")
    table.add_row("Triton", Text(diagnosis.triton))
    table.add_row("mmcv.ops", ops[diagnosis.mmcv_ops])
    console.print(table, "")
    table = Table("Package", "Version", "For", box=None, pad_edge=False)
    for package in diagnosis.packages:
        table.add_row(package.name, package.version or "not installed", package.use)
    console.print(table)
    for use, command in diagnosis.advice.items():
        typer.echo(f"\nFor {use}: {command}")
    for problem in diagnosis.problems:
        typer.echo(f"\nBroken: {problem}.")


def _classify(
    classifier: Classifier,
    model: str,
    sources: Sequence[str],
    failed: list[ImageError],
    *,
    top_k: int,
    as_json: bool,
    out: Path | None,
) -> None:
    results = classifier.predict_all(sources, top_k, THUMBNAIL if out else 0)
    done = _collect(results, len(sources), failed)
    if as_json:
        found = [{"source": result.source, **dataclasses.asdict(result.prediction)} for result in done]
        print_json({"model": model, "results": found, "failed": [vars(error) for error in failed]})
    elif done:
        output_console().print(_table(done))
    if out and done:
        with replacing(out) as part:
            draw_sheet(done, f"{model} · {classifier.model.num_classes:,} classes").save(part, "PNG")
        typer.echo(f"Wrote {out}", err=as_json)
    report_failures(failed, len(done))


def _collect(results: Iterable[Result], total: int, failed: list[ImageError]) -> list[Result]:
    """The results that are no errors; the errors are added to `failed`."""
    console = Console(stderr=True)
    done: list[Result] = []
    for result in track(results, "", total, console=console, transient=True, disable=not console.is_terminal):
        if result.error:
            failed.append(result.error)
        else:  # more thumbnails than a sheet shows would only fill the memory
            done.append(result if len(done) < LIMIT else dataclasses.replace(result, thumbnail=None))
    return done


def report_failures(failed: Sequence[ImageError], done: int) -> None:
    """Say on stderr what failed and why, and end with the exit code that tells."""
    if failed:
        typer.echo(f"{len(failed)} of {len(failed) + done} failed:", err=True)
        for error in failed:
            typer.echo(f"  {error}", err=True)
        raise typer.Exit(1 if done else 2)


def _table(results: Sequence[Result]) -> Table:
    folders = {os.path.dirname(result.source) for result in results}
    shared = folders.pop() if len(folders) == 1 else ""
    title = Text(printable(shared)) if shared else None
    table = Table("Picture", "Name", "", box=None, pad_edge=False, title=title, title_justify="left")
    table.add_column("Probability", justify="right")
    for result in results:
        picture = os.path.relpath(result.source, shared) if shared else result.source
        for name, probability in zip(result.prediction.names, result.prediction.probabilities):
            bar = ProgressBar(1.0, probability, width=20, finished_style="bar.complete")
            shown = (Text(printable(text)) for text in (picture, name))
            table.add_row(*shown, bar, f"{probability:.1%}", style="bold" if picture else "")
            picture = ""
    return table


def print_json(document: Any) -> None:
    """Print a document for other programs."""
    typer.echo(json.dumps(document, indent=2, ensure_ascii=False))


def _short(number: int | None) -> str:
    if not number:
        return ""
    unit, letter = (1e9, "G") if number >= 1e9 else (1e6, "M") if number >= 1e6 else (1e3, "k")
    return f"{number / unit:.2f} {letter}"


def _check_suffix(path: Path | None, *suffixes: str) -> None:
    """Before the work is done: a wrong name is no reason to lose it."""
    if path and path.suffix not in suffixes:
        raise ValueError(f"--out {path} does not end in {' or '.join(suffixes)}.")
    if path and path.is_dir():
        raise ValueError(f"--out {path} is a folder.")


def _save_npy(path: Path, names: Sequence[str], features: np.ndarray) -> None:
    text = json.dumps(names, indent=0, ensure_ascii=False)
    with replacing(path.with_suffix(".json")) as names_part, replacing(path) as part:  # both or none
        names_part.write_text(text, encoding="utf-8", errors="backslashreplace")
        with part.open("wb") as file:
            np.save(file, features)


def _save_parquet(path: Path, names: Sequence[str], features: np.ndarray) -> None:
    pyarrow, parquet = _pyarrow()
    embedding = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(features.ravel()), features.shape[1])
    texts = [name.encode(errors="backslashreplace").decode() for name in names]
    with replacing(path) as part:
        parquet.write_table(pyarrow.table({"path": texts, "embedding": embedding}), part)


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise ImportError("A .parquet file needs pyarrow: pip install 'linear-vision-zoo[export]'.") from None
    return pyarrow, parquet


from zoo import chat, dense_cli, export_cli  # noqa: E402, F401 (add commands: chat, detect, segment, export)
