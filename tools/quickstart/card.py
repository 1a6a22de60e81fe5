"""The model card of the packaged weights, from what the runs measured."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from zoo.tools.quickstart.attribution import LICENCE_TEXTS
from zoo.tools.quickstart.packages import PACKAGES

Metrics = Mapping[str, Any]  # the content of a metrics.json of tools/train_classifier.py

BACKGROUNDS = ("white", "grey", "varied")
CONFUSIONS = 15
PEER = "convnext_atto"

HEAD = """# Model card: {model}, quickstart

The default model of the zoo: `{model}` with {parameters:.2f} M parameters, which names {classes:,} things, symbols and
faces in drawings of any style. It was trained from scratch on emoji in {styles} drawing styles and is measured on
a style that it has never seen. Its weights are in `{file}` (float16), its classes in
`quickstart_classes.json`, in the order of the outputs. Pictures are prepared as `timm.data.create_transform` does with
the model's pretrained cfg: the shorter side scaled to {size} pixels, the middle cut out.

**It knows drawings, not photographs**: a photograph gets a name, but no reliable one. Where two emoji differ by a
detail (faces, clocks, arrows), by the number of things or by their colour alone, it errs more often.
"""

RESULTS = """## Results on the held-out style

Top-1 / top-5 in percent on {count:,} pictures in the style of OpenMoji, one per class. No picture of that style was in
the training data. `varied` backgrounds are colours, gradients, blurred noise, stripes and checks. All
models were trained by the same recipe, of {steps:,} steps.

"""

RECIPE = """## Training

{pictures:.1f} million pictures of {img_size} x {img_size} pixels ({steps:,} steps of {batch_size:,}), composed on the
GPU by `tools/sprites.py` from transparent drawings: flat fills, outlines, other palettes, smooth deformations,
perspective, varied backgrounds, shadows, noise, blur, cut-out, CutMix and mixup. {opt}, learning rate {lr:g} with
{warmup} steps of warm-up and cosine decay, weight decay {weight_decay:g}, gradients clipped at {clip_grad:g}, label
smoothing {smoothing:g}, drop path {drop_path:g}, exponential moving average of the weights (decay {ema_decay:g}),
{precision}. It took {minutes:.0f} minutes on {device}.

To train it again:

```sh
pip install '.[train]'
python -m zoo.tools.build_quickstart_data build data/quickstart
python -m zoo.tools.train_classifier configs/classification/quickstart_{model}.yaml
```
"""

DATA = """## Data and licences

The pictures come from these packages; [the builder](../../tools/build_quickstart_data.py) pins and checks them. Classes
are emoji that at least three of the training styles and OpenMoji draw, without flags, letters, digits, skin tones and
variants by gender. The weights are licensed under Apache-2.0; thanks are due to the authors of the drawings.

"""


def model_card(runs: Sequence[Metrics], classes: Sequence[Mapping[str, str]], pictures: Mapping[str, int]) -> str:
    """Returns the card as Markdown.

    Args:
        runs: What was measured of each model by one recipe; the first is the packaged one.
        classes: Entries of ``classes.json``: slug, name and group.
        pictures: Number of pictures by style, as in the builder's ``report.json``.
    """
    best, config = runs[0], runs[0]["config"]
    held_out = {package.style for package in PACKAGES if package.held_out}
    facts = {
        "model": best["model"],
        "file": weights_file(best["model"]),
        "parameters": best["parameters"] / 1e6,
        "classes": len(classes),
        "styles": len(pictures.keys() - held_out),
        "size": config["eval_size"] or config["img_size"],
    }
    recipe = config | {
        "pictures": config["steps"] * config["batch_size"] / 1e6,
        "minutes": best["minutes"],
        "device": best["device"],
        "opt": {"adamw": "AdamW"}.get(config["opt"], config["opt"]),
    }
    sections = [
        HEAD.format(**facts),
        RESULTS.format(count=best["white"]["count"], steps=config["steps"]) + _comparison(runs),
        f"{best['model']} by group of classes:\n\n" + _groups(best),
        f"Some of what {best['model']} takes for one another most often, counted over the three backgrounds:\n\n"
        + _confusions(best, {entry["slug"]: entry["name"] for entry in classes}),
        RECIPE.format(**recipe),
        DATA + _packages(pictures),
    ]
    return "\n".join(sections)


def weights_file(model: str) -> str:
    """Returns the name of the file of a model's packaged weights."""
    return f"{model}_quickstart.safetensors"


def _table(*rows: Sequence[object]) -> str:
    heading, *rest = (f"| {' | '.join(map(str, row))} |\n" for row in rows)
    return heading + f"|{' --- |' * len(rows[0])}\n" + "".join(rest)


def _score(part: Mapping[str, float]) -> str:
    return f"{part['top1']:.1f} / {part['top5']:.1f}"


def _comparison(runs: Sequence[Metrics]) -> str:
    notes = {runs[0]["model"]: " (packaged)", PEER: " (of timm, to compare)"}
    rows = [
        (
            run["model"] + notes.get(run["model"], ""),
            f"{run['parameters'] / 1e6:.2f} M",
            *(_score(run[background]) for background in BACKGROUNDS),
            f"{run['step']:,}",
            f"{run['minutes']:.0f}",
        )
        for run in runs
    ]
    return _table(("Model", "Parameters", *BACKGROUNDS, "Steps", "Minutes"), *rows)


def _groups(run: Metrics) -> str:
    rows = [
        (group, part["count"], *(_score(run[background]["groups"][group]) for background in BACKGROUNDS))
        for group, part in run["white"]["groups"].items()
    ]
    return _table(("Group", "Classes", *BACKGROUNDS), *rows)


def _confusions(run: Metrics, names: Mapping[str, str]) -> str:
    pairs = Counter()
    for background in BACKGROUNDS:
        for true, guess, count in run[background]["confusions"]:
            pairs[tuple(sorted((true, guess)))] += count
    commonest = sorted(pairs.items(), key=lambda item: (-item[1], item[0]))
    tied = [item for item in commonest if item[1] == commonest[min(CONFUSIONS, len(commonest)) - 1][1]]
    first = commonest[: commonest.index(tied[0])] if tied else []
    wanted = CONFUSIONS - len(first)
    commonest = first + tied[:: max(1, len(tied) // wanted)][:wanted]  # of equally common ones some from all over
    rows = [(names[one], names[other], count) for (one, other), count in commonest]
    return _table(("Thing", "Thing", "Times, of 6"), *rows)


def _packages(pictures: Mapping[str, int]) -> str:
    rows = [
        (
            f"{package.name} {package.version}",
            package.author,
            f"[{package.licence}]({LICENCE_TEXTS[package.licence]})",
            f"{pictures[package.style]:,} {'to measure' if package.held_out else 'to train'}"
            if package.style
            else "names and groups",
        )
        for package in PACKAGES
    ]
    return _table(("Package", "By", "Licence", "Pictures"), *rows)
