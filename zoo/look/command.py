"""What `zoo look` does."""

import re
from collections.abc import Sequence
from pathlib import Path

import typer

from zoo.files import replacing
from zoo.images import URL, RemoteImage
from zoo.look.kept import draw_kept_tokens
from zoo.look.overview import look


def run(
    image: str,
    out: Path,
    model: str,
    checkpoint: str | None,
    point: str | None,
    layer: int | None,
    label: str | None,
    prompt: str | None,
    reduce: Sequence[str],
    device: str | None,
    allow_urls: bool,
) -> None:
    """Draw what a classifier sees or, if the model is a folder, what tokens a multimodal model keeps.

    Raises:
        ImageError: the picture cannot be read.
        ValueError: an option is wrong or does not go with the model.
    """
    source = RemoteImage(image) if allow_urls and URL.match(image) else image
    if Path(model).is_dir():
        for name, value in {"checkpoint": checkpoint, "point": point, "layer": layer, "class": label}.items():
            if value is not None:
                raise ValueError(f"--{name} is of classifiers, but {model} is a folder of a multimodal model.")
        chosen = {"prompt": prompt, "reduce": reduce, "device": device}
        draw_kept_tokens(source, model, out, **{name: value for name, value in chosen.items() if value})
    else:
        if prompt or reduce:
            raise ValueError(f"--prompt and --reduce are of multimodal models, but {model} is no folder of one.")
        place = point and re.fullmatch(r"\s*(\d+)\s*,\s*(\d+)\s*", point, re.ASCII)
        if point is not None and not place:
            raise ValueError(f"--point is {point!r}, expected a column and a row in pixels from 0, such as 120,80.")
        where = (int(place[1]), int(place[2])) if place else None
        drawn = look(source, model, checkpoint=checkpoint, point=where, layer=layer, label=label, device=device)
        with replacing(out) as part:
            drawn.save(part, "PNG")
    typer.echo(f"Wrote {out}")
