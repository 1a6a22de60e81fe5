"""`zoo export`: a model as a file of ONNX or of AOTInductor."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from zoo.classifier import Classifier
from zoo.cli import Checkpoint, app
from zoo.detector import Detector
from zoo.segmenter import Segmenter


class Task(str, Enum):
    """What the model does."""

    classify = "classify"
    detect = "detect"
    segment = "segment"


@app.command()
def export(
    name: Annotated[
        str, typer.Argument(help="Any zoo or timm model; to detect or segment as of `zoo detect --model`.")
    ],
    out: Annotated[Path, typer.Argument(help="The file: .onnx, or .pt2 for AOTInductor.")],
    dynamic: Annotated[bool, typer.Option("--dynamic", help="Take pictures of any number and size.")] = False,
    size: Annotated[int, typer.Option(min=1, help="Without --dynamic: height and width of the pictures.")] = 224,
    batch_size: Annotated[int, typer.Option(min=1, help="Without --dynamic: pictures of a call.")] = 1,
    task: Annotated[Task, typer.Option(help="What the model does.")] = Task.classify,
    checkpoint: Checkpoint = None,
    config: Annotated[Path | None, typer.Option(help="To detect or segment: a config of mmdet or mmseg.")] = None,
) -> None:
    """Write a model as a file that runs without Python: ONNX, or a package of AOTInductor. See docs/EXPORT.md."""
    from zoo.export import check_suffix
    from zoo.export import export as write

    check_suffix(out)
    if task is Task.classify:
        if config:
            raise ValueError("A classifier has no --config: name --task detect or segment.")
        model = Classifier(name, checkpoint=checkpoint, device="cpu").model
    elif task is Task.detect:
        model = Detector(name, score=0, config=config, checkpoint=checkpoint, device="cpu")  # the config has a score
    else:
        model = Segmenter(name, config=config, checkpoint=checkpoint, device="cpu")
    write(model, out, (size, size), batch_size, dynamic=dynamic)
    typer.echo(f"Wrote {out}")
