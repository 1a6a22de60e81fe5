"""Packages the better of the zoo's small models: its weights in float16, the names of its classes, the model card."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from safetensors import safe_open
from safetensors.torch import load_file

from zoo.catalogue import CATALOGUE
from zoo.checkpoints import create_model, save_checkpoint
from zoo.files import write_text
from zoo.tools.quickstart.card import model_card, weights_file

MAX_BYTES = 6_000_000
SAME_RECIPE_APART_FROM = {"model", "output", "max_minutes", "checkpoint_every", "eval_every", "log_every", "workers"}


def publish(runs: Sequence[Path], data: Path, out: Path) -> dict[str, Any]:
    """Writes ``<model>_quickstart.safetensors``, ``quickstart_classes.json`` and ``README.md`` of the best zoo model.

    The best has the highest top-1 on white. Weights of another model that were packaged before are removed.

    Args:
        runs: Output folders of `tools/train_classifier.py` for the quickstart data, one per model.
        data: The data folder that they were trained on.
        out: ``zoo/weights``.

    Returns:
        The metrics of the packaged model.

    Raises:
        FileNotFoundError: A run is not finished, or ``data`` was not built.
        ValueError: No run is of a model of the zoo, the runs differ in more than the model, were trained on other
            classes, or the weights are too large.
    """
    found = [(folder, json.loads((folder / "metrics.json").read_text("utf-8"))) for folder in runs]
    ours = [item for item in found if item[1]["model"] in CATALOGUE]
    if not ours:
        raise ValueError("none of the runs is of a model of the zoo: there is nothing to package.")
    folder, best = max(ours, key=lambda item: item[1]["white"]["top1"])
    rest = sorted((run for _, run in found if run is not best), key=lambda run: -run["white"]["top1"])
    for run in rest:
        _check_same_recipe(best, run)
    classes = json.loads((data / "classes.json").read_text("utf-8"))
    trained = _labels(folder / "model.safetensors")
    if trained != [entry["slug"] for entry in classes]:
        raise ValueError(f"{folder} was trained on other classes than {data} has ({len(trained)} and {len(classes)}).")
    pictures = json.loads((data / "report.json").read_text("utf-8"))["pictures"]

    out.mkdir(parents=True, exist_ok=True)
    file = out / weights_file(best["model"])
    _write_weights(folder / "model.safetensors", file, best)
    for old in set(out.glob(weights_file("*"))) - {file}:
        old.unlink()
    kept = [{key: entry[key] for key in ("slug", "name", "group")} for entry in classes]
    lines = ",\n".join(json.dumps(entry, ensure_ascii=False) for entry in kept)
    write_text(out / "quickstart_classes.json", f"[\n{lines}\n]\n")
    write_text(out / "README.md", model_card([best, *rest], classes, pictures))
    return best


def _check_same_recipe(best: dict[str, Any], run: dict[str, Any]) -> None:
    ours, theirs = best["config"], run["config"]
    differ = sorted(key for key in ours if key not in SAME_RECIPE_APART_FROM and ours[key] != theirs.get(key))
    if differ:
        raise ValueError(f"{run['model']} was not trained as {best['model']} was, they differ in {', '.join(differ)}.")


def _labels(weights: Path) -> list[str]:
    with safe_open(weights, "pt") as file:
        return json.loads(file.metadata()["labels"])


def _write_weights(source: Path, file: Path, run: dict[str, Any]) -> None:
    state = {key: value.half() if value.is_floating_point() else value for key, value in load_file(source).items()}
    size = sum(value.numel() * value.element_size() for value in state.values())
    if size > MAX_BYTES:
        raise ValueError(f"the weights of {run['model']} take {size:,} bytes in float16, {MAX_BYTES:,} are allowed.")
    infinite = [key for key, value in state.items() if value.is_floating_point() and not value.isfinite().all()]
    if infinite:
        raise ValueError(f"weights of {run['model']} do not fit into float16: {', '.join(infinite[:8])}.")
    create_model(run["model"], checkpoint=state, num_classes=len(_labels(source)))  # it must fit
    metadata = {"model": run["model"], "licence": "Apache-2.0", "card": "README.md"}
    save_checkpoint(state, file, metadata=metadata, overwrite=True)


app = typer.Typer(add_completion=False)


@app.command(help=__doc__)
def main(
    runs: Annotated[list[Path], typer.Argument(help="Output folders of the trained models.")],
    data: Annotated[Path, typer.Option(help="The quickstart data.")] = Path("data/quickstart"),
    out: Annotated[Path, typer.Option(help="Where to write.")] = Path("zoo/weights"),
) -> None:
    """Packages the best of the runs."""
    try:
        best = publish(runs, data, out)
    except (OSError, ValueError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
    typer.echo(f"{best['model']}: top-1 {best['white']['top1']}, top-5 {best['white']['top5']}; written to {out}")


if __name__ == "__main__":
    app()
