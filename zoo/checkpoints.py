"""Load published weights into a model: ours, timm's or the authors', from a path, a URL or the Hugging Face Hub.

Nothing in a file can run, a file that does not fit is refused with the reason, and a refused load leaves the model as
it was.
"""

import os
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from zoo.download import file_sha256, resolve
from zoo.files import replacing
from zoo.restricted_reader import CheckpointError, Inert, read_pickled

__all__ = [
    "CheckpointError",
    "LoadReport",
    "convert_checkpoint",
    "create_model",
    "load_checkpoint",
    "read_weights",
    "save_checkpoint",
]

Source = str | os.PathLike[str] | Mapping[str, Any]
Which = Literal["auto", "model", "ema"]

# What training scripts call their raw and their averaged weights; a file may nest them.
ENTRIES = {
    "model": ("state_dict", "model", "model_state_dict", "module", "net"),
    "ema": ("state_dict_ema", "model_ema", "ema_state_dict", "ema"),
}
NAMES = {"model": "raw weights", "ema": "EMA weights"}
MAX_NESTING = 3
# What detectors and trainers put before the names of their backbone.
PREFIXES = ("backbone.", "model.")
FEATURE_ARGUMENTS = ("features_only", "out_indices", "feature_cls")
SHOWN = 8


@dataclass(frozen=True)
class LoadReport:
    """What a load did, tensor by tensor, in the model's names.

    Attributes:
        source: the file's name.
        weights: which of its weights were taken, "model" (raw) or "ema".
        loaded: names that were filled.
        missing: names of the model that the file lacks; batch counters (``num_batches_tracked``) do not count.
        unexpected: names of the file that the model lacks.
        wrong_shaped: by name, the shape in the file and the shape in the model.
    """

    source: str
    weights: Literal["model", "ema"]
    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    wrong_shaped: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]

    @property
    def problems(self) -> str:
        """The names that do not match, the first 8 of each kind, with counts."""
        shapes = [f"{key} {theirs} for {ours}" for key, (theirs, ours) in self.wrong_shaped.items()]
        kinds = {"missing": self.missing, "unexpected": self.unexpected, "wrong-shaped": shapes}
        return ", ".join(
            f"{len(keys)} {kind} ({', '.join(keys[:SHOWN])}{', ...' if len(keys) > SHOWN else ''})"
            for kind, keys in kinds.items()
            if keys
        )

    def __str__(self) -> str:
        total = len(self.loaded) + len(self.missing) + len(self.wrong_shaped)
        line = f"{self.source} ({NAMES[self.weights]}): {len(self.loaded)} of {total} tensors loaded"
        return f"{line}, {self.problems}" if self.problems else line


def create_model(
    name: str, *, checkpoint: Source | None = None, strict: bool = True, which: Which = "auto", **kwargs: Any
) -> nn.Module:
    """Create a model, as ``timm.create_model`` does, and load a checkpoint into it.

    With ``features_only=True`` the checkpoint is loaded into the whole model, whose stages the feature model then is.

    Args:
        name: any name of the zoo or of timm.
        checkpoint: as ``source`` of ``load_checkpoint``; None leaves the model as timm makes it. With ``pretrained``
            the files of the zoo's authors are downloaded and read as any other checkpoint.
        strict: as of ``load_checkpoint``.
        which: as of ``load_checkpoint``.
        **kwargs: of ``timm.create_model``.

    Returns:
        The model, in training mode as timm's are.

    Raises:
        CheckpointError, OSError, ValueError: as ``load_checkpoint``.
    """
    if checkpoint is None:
        model = timm.create_model(name, **_authors_weights(name, kwargs), **kwargs)
        (getattr(model, "pretrained_cfg", None) or {}).pop("state_dict", None)  # what was loaded is not needed twice
        return model
    if not kwargs.get("features_only"):
        model = timm.create_model(name, **kwargs)
        load_checkpoint(model, checkpoint, strict=strict, which=which)
        return model
    whole_kwargs = {key: value for key, value in kwargs.items() if key not in FEATURE_ARGUMENTS}
    whole = timm.create_model(name, **{"num_classes": 0, **whole_kwargs})
    load_checkpoint(whole, checkpoint, strict=strict, which=which)
    features = timm.create_model(name, **kwargs)
    # timm's wrappers take the stages over under a prefix, or with dots flattened to underscores
    state = {key.replace(".", "_"): value for key, value in whole.state_dict().items()}
    features.load_state_dict(
        {
            key: state[key.removeprefix("model.").removeprefix("body.").replace(".", "_")]
            for key in features.state_dict()
            if not key.startswith("pyramid.")
        },
        strict=not hasattr(features, "pyramid"),  # layers.pyramid.PyramidFeatures: it has weights of its own
    )
    return features


def _authors_weights(name: str, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """For a pretrained model of the zoo, what makes timm take the authors' file as read here.

    timm would read it with ``torch.load``, which refuses a file that holds more than tensors, and start over a download
    that was cut off.
    """
    given = {"pretrained_cfg", "pretrained_cfg_overlay"} & kwargs.keys()
    if not kwargs.get("pretrained") or given or not timm.is_model(name):
        return {}
    if not timm.model_entrypoint(name).__module__.startswith("zoo."):
        return {}
    url = timm.get_pretrained_cfg(name).url
    return {"pretrained_cfg_overlay": {"state_dict": read_weights(url, "auto")[0]}} if url else {}


def load_checkpoint(model: nn.Module, source: Source, *, strict: bool = True, which: Which = "auto") -> LoadReport:
    """Load weights into a model, in its own dtype and on its own device, or leave it as it was.

    The names may be the model's own, or any that its family's ``checkpoint_filter_fn`` knows (the authors'), with the
    prefixes of DDP, ``torch.compile`` and detectors. A file without batch counters (``num_batches_tracked``) keeps the
    model's, as PyTorch does; a file with a head is fine for a model without one (``num_classes=0``).

    Args:
        model: a timm model, or any module.
        source: a ``.safetensors`` file or whatever ``torch.save`` wrote, as a path, an ``http(s)://`` URL or
            ``hf-hub:owner/repo[@revision][/file]``, each with an optional ``#sha256=<hex>``; or a mapping of tensors.
        strict: refuse a file that does not match the model tensor for tensor. Otherwise load what fits, and warn if
            that is less than half of the parameters.
        which: "model" for the raw weights, "ema" for the averaged ones, "auto" for the averaged ones if there are any,
            as timm does. The report says which were taken.

    Returns:
        What was loaded and what was not.

    Raises:
        CheckpointError: the file cannot be read, has no such weights, or does not match; then the message lists how,
            and which model of the zoo the file looks made for.
        FileNotFoundError, ConnectionError: the file cannot be had.
        ValueError: an argument is not valid.
    """
    if any(tensor.is_meta for tensor in model.state_dict().values()):
        raise ValueError(
            "The model is on the meta device and cannot hold weights: call model.to_empty(device=...) first."
        )
    named, report = _match(model, *read_weights(source, which), strict=strict)
    model.load_state_dict({key: named[key] for key in report.loaded}, strict=False)
    sizes = {key: parameter.numel() for key, parameter in model.named_parameters()}
    share = sum(sizes.get(key, 0) for key in report.loaded) / max(sum(sizes.values()), 1)
    if share < 0.5:
        warnings.warn(f"Only {share:.0%} of the model's parameters were loaded from {report}.", stacklevel=2)
    return report


def convert_checkpoint(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    model_name: str,
    which: Which = "auto",
    *,
    overwrite: bool = False,
    **model_kwargs: Any,
) -> LoadReport:
    """Rewrite a checkpoint as safetensors in the names of our model, in the dtypes it has.

    Args:
        source: path, URL or ``hf-hub:`` source, as of ``load_checkpoint``.
        destination: the ``.safetensors`` file to write. Its metadata say the model, the source and its SHA-256.
        model_name: the model that the weights are for; its number of classes is taken from the file's head.
        which: as of ``load_checkpoint``.
        overwrite: replace an existing destination.
        **model_kwargs: of ``timm.create_model``.

    Returns:
        The report of the strict load.

    Raises:
        FileExistsError: the destination exists.
        CheckpointError, OSError, ValueError: as ``load_checkpoint``.
    """
    destination = Path(destination)
    _check_destination(destination, overwrite)
    path = resolve(source)
    state, _, weights = read_weights(path, which)
    model = timm.create_model(model_name, **model_kwargs)
    if "num_classes" not in model_kwargs:
        model.reset_classifier(_head_classes(model, _named_for(model, state)) or 0)
    named, report = _match(model, state, os.fspath(source), weights, strict=True)
    metadata = {"model": model_name, "weights": weights, "source": path.name, "source_sha256": file_sha256(path)}
    save_checkpoint({key: named[key] for key in report.loaded}, destination, metadata=metadata, overwrite=overwrite)
    return report


def save_checkpoint(
    state: Mapping[str, Tensor],
    destination: str | os.PathLike[str],
    *,
    metadata: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> None:
    """Write tensors as safetensors: the whole file or none of it.

    Args:
        state: tensors by name, each of any layout; tensors that share memory are written out separately.
        destination: the ``.safetensors`` file.
        metadata: texts by name, for whoever reads the file later.
        overwrite: replace an existing file.

    Raises:
        FileExistsError: the destination exists.
        ValueError: its name does not end in ``.safetensors``.
    """
    destination = Path(destination)
    _check_destination(destination, overwrite)
    tensors = {key: tensor.detach().clone(memory_format=torch.contiguous_format) for key, tensor in state.items()}
    with replacing(destination) as part:
        part.touch()
        mode = part.stat().st_mode  # as the umask has it; safetensors makes files that only their owner can read
        try:
            safetensors.torch.save_file(tensors, part, metadata={"format": "pt", **(metadata or {})})
        except safetensors.SafetensorError as error:  # of the disk: the tensors are sound
            raise OSError(str(error)) from error
        part.chmod(mode)


def _check_destination(destination: Path, overwrite: bool) -> None:
    if destination.suffix != ".safetensors":
        raise ValueError(f"Checkpoints are written as .safetensors, not as {destination.name}: change the name.")
    if destination.exists() and not overwrite:
        raise FileExistsError(f"{destination} exists: choose another name, or overwrite=True to replace it.")


def read_weights(source: Source, which: Which) -> tuple[dict[str, Tensor], str, Literal["model", "ema"]]:
    """The wanted tensors of a source by their names there, what to call the source, and which weights they are.

    Raises:
        CheckpointError: the source cannot be read as tensors by name, or does not hold the wanted ones.
        OSError: there is no such file, or it cannot be downloaded.
        ValueError: `which` is none of the three.
    """
    if which not in ("auto", "model", "ema"):
        raise ValueError(f"which={which!r} is not one of 'auto', 'model' and 'ema'.")
    if isinstance(source, Mapping):
        label, content = "the mapping", source
    else:
        label, content = os.fspath(source), _read_file(resolve(source))
    if isinstance(content, Inert) or not isinstance(content, Mapping):
        kind = content.name if isinstance(content, Inert) else type(content).__name__
        raise CheckpointError(f"{label} holds a {kind}, not tensors by name: save the state_dict() of the model.")
    found = _weights_in(content, MAX_NESTING)
    wanted = ("ema" if "ema" in found else "model") if which == "auto" else which
    if wanted not in found:
        names = [
            f"{str(key)[:40]}{f' (a pickled {v.name})' if isinstance(v, Inert) else ''}" for key, v in content.items()
        ]
        holds = ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
        raise CheckpointError(f"{label} has no {NAMES[wanted] if found else 'tensors by name'}: it holds {holds}.")
    return found[wanted], label, wanted


def _read_file(path: Path) -> Any:
    with path.open("rb") as file:
        head = file.read(9)
    if head[8:] != b"{":  # safetensors: the size of a JSON header, then the header
        return read_pickled(path)
    try:
        return safetensors.torch.load_file(path)
    except Exception as error:  # as for a pickled file
        raise CheckpointError(f"Cannot read {path} as a checkpoint: it is damaged ({error}).") from error


def _weights_in(content: Mapping[Any, Any], nesting: int) -> dict[str, dict[str, Tensor]]:
    """The state dicts in a file by kind, "model" and "ema"; without known entries, its own tensors are "model"."""
    found: dict[str, dict[str, Tensor]] = {}
    for kind, entries in ENTRIES.items():
        for entry in entries:
            value = content.get(entry)
            inner = _weights_in(value, nesting - 1) if isinstance(value, Mapping) and nesting else {}
            if kind == "ema" and inner:
                inner = {"ema": inner.get("model") or inner["ema"]}
            found = inner | found
    tensors = {_clean(key): v for key, v in content.items() if isinstance(key, str) and isinstance(v, Tensor)}
    return found or ({"model": tensors} if tensors else {})


def _clean(key: str) -> str:
    """The name without the prefixes of torch.compile and DDP."""
    key = key.replace("_orig_mod.", "")
    while key.startswith("module."):
        key = key.removeprefix("module.")
    return key


def _named_for(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by the model's names: through its family's filter, without a prefix if that matches better."""
    own = model.state_dict()
    candidates = [state]
    for prefix in PREFIXES:
        bare = {key.removeprefix(prefix): tensor for key, tensor in state.items()}
        if bare.keys() != state.keys() and len(bare) == len(state):
            candidates.append(bare)
    return max(
        (_filtered(model, candidate) for candidate in candidates), key=lambda named: len(own.keys() & named.keys())
    )


def _filtered(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    function = getattr(sys.modules.get(type(model).__module__), "checkpoint_filter_fn", None)
    named = dict(state)
    if function is not None:
        try:
            named = function(named, model)
        except Exception:  # written for its own family, it may trip over another's file; the comparison tells of that
            named = state
    if getattr(model, "num_classes", None) == 0:
        named = {key: tensor for key, tensor in named.items() if not _in_head(model, key)}
    return named


def _match(
    model: nn.Module, state: dict[str, Tensor], label: str, weights: Literal["model", "ema"], *, strict: bool
) -> tuple[dict[str, Tensor], LoadReport]:
    """The tensors by the model's names, and how they compare; refused under ``strict`` if they differ at all."""
    own, named = model.state_dict(), _named_for(model, state)
    shapes = {key: (tuple(named[key].shape), tuple(own[key].shape)) for key in own if key in named}
    report = LoadReport(
        source=label,
        weights=weights,
        loaded=tuple(key for key, (theirs, ours) in shapes.items() if theirs == ours),
        missing=tuple(key for key in own if key not in named and not _is_counter(key)),
        unexpected=tuple(key for key in named if key not in own),
        wrong_shaped={key: pair for key, pair in shapes.items() if pair[0] != pair[1]},
    )
    if strict and report.problems:
        advice = _head_advice(model, named, report) or _lookalike(model, state)
        raise CheckpointError(f"{label} ({NAMES[weights]}) does not fit the model: {report.problems}; {advice}.")
    return named, report


def _is_counter(key: str) -> bool:
    return key.rpartition(".")[2] == "num_batches_tracked"


def _heads(model: nn.Module) -> tuple[str, ...]:
    """The names of the classifiers, from the model's timm configuration."""
    heads = _config(model).get("classifier") or ()
    return (heads,) if isinstance(heads, str) else tuple(heads)


def _config(model: nn.Module) -> dict[str, Any]:
    return getattr(model, "pretrained_cfg", None) or {}


def _in_head(model: nn.Module, key: str) -> bool:
    return key.startswith(tuple(f"{head}." for head in _heads(model)))


def _head_classes(model: nn.Module, named: dict[str, Tensor]) -> int | None:
    """For how many classes the head in the file is; None if there is none."""
    return next((len(named[f"{head}.weight"]) for head in _heads(model) if f"{head}.weight" in named), None)


def _head_advice(model: nn.Module, named: dict[str, Tensor], report: LoadReport) -> str | None:
    """What to do if only the head differs."""
    if not all(_in_head(model, key) for key in (*report.missing, *report.unexpected, *report.wrong_shaped)):
        return None
    theirs = _head_classes(model, named)
    if theirs is None:
        return "the file has no head: pass num_classes=0 or strict=False"
    if theirs == model.num_classes:
        return None
    return (
        f"the file's head has {theirs} classes, the model {model.num_classes}: "
        f"pass num_classes={theirs} or strict=False"
    )


def _lookalike(model: nn.Module, state: dict[str, Tensor]) -> str:
    """Which model of the zoo the tensors look made for, by names and shapes."""
    from zoo.catalogue import CATALOGUE

    state = {key: tensor.to("meta") for key, tensor in state.items()}  # so that filters cost nothing
    best, best_score, classes = None, 0.5, None
    for entry in CATALOGUE.values():
        candidate = timm.create_model(entry.name, device="meta")
        ours = {key: tensor.shape for key, tensor in candidate.state_dict().items() if not _is_counter(key)}
        named = _named_for(candidate, state)
        theirs = {key: tensor.shape for key, tensor in named.items() if not _is_counter(key)}
        score = sum(theirs.get(key) == shape for key, shape in ours.items()) / len(ours.keys() | theirs.keys())
        if score > best_score:
            best, best_score, classes = entry, score, _head_classes(candidate, named)
    if best is None:
        return "it looks like no model of the zoo"
    head = f"with {classes} classes" if classes else "without a head"
    looks = f"it looks like {best.name} of the family {best.family} {head}"
    same = best.name == _config(model).get("architecture")
    return f"{looks}, as this model is, so create it with the arguments that the file was made with" if same else looks
