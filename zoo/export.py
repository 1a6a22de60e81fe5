"""Models as files that run without Python: ONNX, and packages of AOTInductor."""

import importlib.util
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from timm.data import resolve_data_config
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from zoo.dense import DenseModel
from zoo.deploy import fuse
from zoo.export_dense import PREPARATION, DetectorGraph, end_to_end
from zoo.files import replacing
from zoo.kernels.decompositions import decompositions

OPSET = 20
INPUT = "pictures"
AXES = {0: "batch", 2: "height", 3: "width"}
# Of a dynamic graph's sample: no axis of any map, nor the groups of tokens of gated linear attention, may be 1 here,
# or the graph would be for 1 only.
SAMPLE = (2, 544, 608)


@dataclass(frozen=True)
class Subject:
    """What is exported.

    Attributes:
        network: from float32 (B, 3, H, W) to its outputs.
        outputs: what they are called.
        facts: for ONNX's metadata.
        one_picture: it takes no batches.
    """

    network: nn.Module
    outputs: tuple[str, ...]
    facts: dict[str, Any]
    one_picture: bool = False


def export(
    model: nn.Module | DenseModel,
    path: str | os.PathLike[str],
    size: tuple[int, int] = (224, 224),
    batch: int = 1,
    *,
    dynamic: bool = False,
) -> None:
    """Write a fused copy of a model (see ``zoo.fuse``) as a file of ONNX or of AOTInductor.

    The file takes float32 pictures (batch, channels, height, width), called "pictures" in ONNX. Those of a classifier
    are prepared as the model's pretrained cfg says, and the output is "outputs"; those of a `zoo.Detector` or
    `zoo.Segmenter`, and what it answers, are as `zoo.export_dense` says. Metadata of ONNX files have as JSON how
    pictures are prepared, under "preprocessing", and the names of the classes, under "labels", where they are known.

    Args:
        model: a zoo or timm model with one tensor as its output, a detector or a segmenter; left as it is.
        path: the file: ``.onnx``, or ``.pt2`` for a package that a C++ compiler here makes for this kind of processor.
        size: height and width of the pictures, in pixels.
        batch: pictures of a call; 1 for a detector.
        dynamic: take pictures of any number and size instead.

    Raises:
        ValueError: the file name has another ending, or the model is not of a kind that can be exported.
        ImportError: ONNX is asked for and not installed.
        RuntimeError: PyTorch cannot trace or translate the model, or there is no C++ compiler.
    """
    path = Path(path)
    check_suffix(path)
    subject = _subject(model)
    if subject.one_picture and batch != 1:
        raise ValueError(f"A detector is exported for one picture at a time, got a batch of {batch}.")
    graph = trace(subject, size, batch, dynamic=dynamic)
    with _one_sentence(subject, path.suffix), replacing(path) as part:
        (_write_onnx if path.suffix == ".onnx" else _write_package)(graph, part, subject)


def check_suffix(path: Path) -> None:
    """Before the work is done: a wrong name or what is not installed is no reason to lose it.

    Raises:
        ValueError: the file name has another ending.
        ImportError: ONNX is asked for and not installed.
    """
    if path.suffix not in (".onnx", ".pt2"):
        raise ValueError(f"{path} does not end in .onnx or .pt2.")
    if path.suffix == ".onnx" and importlib.util.find_spec("onnxscript") is None:
        raise ImportError("An .onnx file needs onnxscript: pip install 'linear-vision-zoo[export]'.")


def trace(subject: Subject, size: tuple[int, int], batch: int, *, dynamic: bool) -> torch.export.ExportedProgram:
    """The graph of a fused copy of a network, with the operators of the zoo; arguments as of ``export``."""
    fused = fuse(subject.network).float()
    if dynamic:
        batch, *size = SAMPLE
    batch = 1 if subject.one_picture else batch
    axes = {axis: torch.export.Dim.DYNAMIC for axis in AXES if axis or not subject.one_picture} if dynamic else None
    first = next(fused.parameters())
    sample = torch.zeros(batch, getattr(subject.network, "in_chans", 3), *size, device=first.device)
    with _one_sentence(subject, "a graph"), torch.no_grad(), _Translatable():
        graph = torch.export.export(fused, (sample,), dynamic_shapes=(axes,))
    if dynamic:
        _check_any_size(graph, sample.transpose(2, 3)[..., 7:, 5:])
    return graph


def _check_any_size(graph: torch.export.ExportedProgram, sample: Tensor) -> None:
    """Run the graph at another size, because what code made fixed on the way is told by no one before."""
    try:
        graph.module()(sample)
    except AssertionError as error:
        raise ValueError(
            f"The model has parts for one size of picture ({error}): leave dynamic out, and give the size."
        ) from error


def _subject(model: nn.Module | DenseModel) -> Subject:
    if not isinstance(model, DenseModel):
        return Subject(model, ("outputs",), {"preprocessing": resolve_data_config({}, model=model)})
    network = end_to_end(model)
    facts = {"preprocessing": PREPARATION, "labels": model.labels}
    return Subject(network, network.names, facts, isinstance(network, DetectorGraph))


@contextmanager
def _one_sentence(subject: Subject, what: str) -> Iterator[None]:
    """The compilers' reports, which are many pages long, by their first line."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        # The translation's own errors say only that it failed.
        while error.__cause__ and "ONNX" in str(error).partition("\n")[0]:
            error = error.__cause__
        reason = str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
        raise RuntimeError(f"{type(subject.network).__name__} cannot be made into {what}: {reason}.") from error


def _write_onnx(graph: torch.export.ExportedProgram, part: Path, subject: Subject) -> None:
    names = {"input_names": [INPUT], "output_names": list(subject.outputs)}
    with patch.dict(torch._decomp.decomposition_table, decompositions()):  # which the exporter consults
        program = torch.onnx.export(graph, **names, dynamo=True, opset_version=OPSET, verbose=False)
    _name_axes(program.model)
    program.model.metadata_props.update({name: json.dumps(fact) for name, fact in subject.facts.items()})
    program.save(part, external_data=False)


def _name_axes(model: Any) -> None:
    """Give the axes that are free in the input their names, there and in the outputs."""
    (pictures,) = model.graph.inputs
    names = {str(edge): AXES[axis] for axis, edge in enumerate(pictures.shape) if not isinstance(edge, int)}
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.shape = type(value.shape)([names.get(str(edge), edge) for edge in value.shape])


def _write_package(graph: torch.export.ExportedProgram, part: Path, subject: Subject) -> None:
    with torch.no_grad(), part.open("w+b") as file:
        graph = graph.run_decompositions(decompositions())
        torch._inductor.aoti_compile_and_package(graph, package_path=file)


class _Translatable(TorchFunctionMode):
    """Puts other functions in the place of those that ONNX has not with arguments that depend on the input."""

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _OTHERS.get(func, func)(*args, **(kwargs or {}))


def _conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: list[int] = (1, 1),
    padding: list[int] = (0, 0),
    dilation: list[int] = (1, 1),
    groups: int | torch.SymInt = 1,
) -> Tensor:
    """A depthwise convolution where its groups are those of all pictures of a batch (InLine's)."""
    if not isinstance(groups, torch.SymInt):
        return torch.conv2d(x, weight, bias, stride, padding, dilation, groups)
    taps = torch.nn.functional.unfold(x, weight.shape[2:], dilation, padding, stride).unflatten(1, (groups, -1))
    return (taps * weight.flatten(1).unsqueeze(-1)).sum(2).view_as(x)  # of (1, groups, taps, H * W)


def _roll(x: Tensor, shifts: list[int], dims: list[int] = ()) -> Tensor:
    """``Tensor.roll`` by as much as the input says."""
    for shift, dim in zip(shifts, dims, strict=True):
        size = x.shape[dim]
        x = x.index_select(dim, torch.arange(size, device=x.device).repeat(3)[size - shift : 2 * size - shift])
    return x


_OTHERS: dict[Callable, Callable] = {torch.conv2d: _conv2d, torch.Tensor.roll: _roll}
