"""From pictures to names or feature vectors: decoding in threads, batches on the device, results in order."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import islice

import numpy as np
import timm
import torch
from PIL import Image, ImageOps
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn

from zoo.catalogue import DEFAULT_MODEL
from zoo.checkpoints import create_model, load_checkpoint
from zoo.images import ImageError, Source, describe, read_image
from zoo.labels import label_names
from zoo.memory import PartsThatFit

MAX_ASPECT = 64  # of longer pictures the middle is seen

Picture = Source | Tensor


@dataclass(frozen=True)
class Prediction:
    """The classes that a picture most probably shows, best first.

    Attributes:
        names: what they are called.
        probabilities: softmax over all classes, 0..1.
        indices: their places in the model's output.
    """

    names: tuple[str, ...]
    probabilities: tuple[float, ...]
    indices: tuple[int, ...]


@dataclass(frozen=True)
class Result:
    """What became of one picture of a stream: a prediction or an embedding, or else an error.

    Attributes:
        source: its path or URL, or what kind of object it was.
        prediction: of `Classifier.predict_all`.
        embedding: of `Classifier.embed_all`, float32 (D,).
        thumbnail: a small copy, if one was asked for.
        error: why there is neither a prediction nor an embedding.
    """

    source: str
    prediction: Prediction | None = None
    embedding: np.ndarray | None = None
    thumbnail: Image.Image | None = None
    error: ImageError | None = None


class Classifier:
    """Names what is in pictures, or turns them into feature vectors, with any timm or zoo model.

    Pictures are prepared as the model's pretrained cfg says (timm's evaluation transform). A picture's result does not
    depend on the others in its batch.

    Args:
        model: a model name; None for the packaged default model; or a module, which is put into evaluation mode and
            moved to `device`. A name without `checkpoint` gets its pretrained weights.
        checkpoint: weights to load strictly: anything `zoo.load_checkpoint` takes. With a model name and `labels` the
            head is made for that many classes.
        labels: the names of the classes in the order of the outputs; by default those that belong to the weights, or
            "class 0", "class 1", ... where these are not known.
        device: where to compute, such as "cpu" or "cuda:1"; by default where a given module is, else the first GPU,
            else the CPU.
        amp: compute in bfloat16 (float16 on GPUs without it) where autocast finds that safe.
        batch_size: pictures that go through the model at once; fewer, with a warning, once the GPU's memory runs out.
        workers: threads that decode and prepare pictures.

    Raises:
        ValueError: unknown model, no weights, unknown device, or a number of labels that is not the number of outputs.
    """

    def __init__(
        self,
        model: str | nn.Module | None = None,
        *,
        checkpoint: str | None = None,
        labels: Sequence[str] | None = None,
        device: str | torch.device | None = None,
        amp: bool = False,
        batch_size: int = 16,
        workers: int = 2,
    ) -> None:
        if batch_size < 1 or workers < 1:
            raise ValueError(f"batch_size and workers must be at least 1, got {batch_size} and {workers}.")
        if isinstance(model, nn.Module):
            first = next(model.parameters(), None)
            self.device = check_device(device or (first.device if first is not None else "cpu"))
            if checkpoint:
                load_checkpoint(model, checkpoint)
        else:
            self.device = check_device(device or best_device())
            model = _build(model or DEFAULT_MODEL, checkpoint, labels)
        self.model = model.to(self.device).eval()
        self.labels = list(labels) if labels else label_names(model)
        self._check_labels(getattr(model, "num_classes", None))
        self.amp, self.batch_size, self.workers = amp, batch_size, workers
        self._in_parts = PartsThatFit()
        self._transform = create_transform(**resolve_data_config({}, model=model), is_training=False)

    def predict(self, images: Picture | Sequence[Picture], top_k: int = 5) -> list[Prediction]:
        """Name what is in one picture or several.

        Args:
            images: a path, PIL image, array (H, W, C), tensor (C, H, W) with values as in `zoo.images.read_image`, or a
                sequence of these; or a batch of arrays (B, H, W, C) or tensors (B, C, H, W).
            top_k: classes per picture; at most as many as the model has.

        Returns:
            One prediction per picture.

        Raises:
            ImageError: a picture cannot be read.
            ValueError: the model has no classes.
        """
        return [_or_raise(result).prediction for result in self.predict_all(listed(images), top_k)]

    def predict_all(self, images: Iterable[Picture], top_k: int = 5, thumbnail: int = 0) -> Iterator[Result]:
        """Like `predict` for any number of pictures: results come in order, while the next pictures are being decoded.

        A picture that cannot be read gives a result with an `error` and does not stop the rest. Only about three
        batches are held in memory.

        Args:
            images: the pictures; taken from as needed.
            top_k: classes per picture.
            thumbnail: keep a copy of each picture that fits into this many pixels squared; 0 for none.
        """
        if top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {top_k}.")
        if getattr(self.model, "num_classes", None) == 0:
            raise ValueError(f"{type(self.model).__name__} has no classes (num_classes=0): it can only embed.")
        for source, small, row in self._stream(images, self.model, thumbnail):
            if isinstance(row, ImageError):
                yield Result(source, error=row)
            else:
                self._check_labels(len(row))
                yield Result(source, prediction=self._name(row, top_k), thumbnail=small)

    def embed(self, images: Picture | Sequence[Picture]) -> np.ndarray:
        """Pooled features, before the classifier, of one picture or several (as in `predict`).

        Returns:
            float32 (N, D).

        Raises:
            ImageError: a picture cannot be read.
            ValueError: the model does not pool its features.
        """
        rows = [_or_raise(result).embedding for result in self.embed_all(listed(images))]
        return np.stack(rows) if rows else np.zeros((0, getattr(self.model, "head_hidden_size", 0)), np.float32)

    def embed_all(self, images: Iterable[Picture]) -> Iterator[Result]:
        """Like `embed` for any number of pictures, streamed as by `predict_all`."""
        for source, _, row in self._stream(images, self._features):
            if isinstance(row, ImageError):
                yield Result(source, error=row)
            else:
                yield Result(source, embedding=row.numpy())

    def _features(self, batch: Tensor) -> Tensor:
        if not hasattr(self.model, "forward_head"):
            raise ValueError(f"{type(self.model).__name__} is not a timm model: it has no forward_head to embed with.")
        features = self.model.forward_head(self.model.forward_features(batch), pre_logits=True)
        if features.ndim != 2:
            raise ValueError(f"{type(self.model).__name__} has no pooling (its features are {tuple(features.shape)}).")
        return features

    def _stream(
        self, images: Iterable[Picture], forward: Callable[[Tensor], Tensor], thumbnail: int = 0
    ) -> Iterator[tuple[str, Image.Image | None, Tensor | ImageError]]:
        """(source, thumbnail, float32 row of `forward` or error) for each picture in order."""
        images = iter(images)
        pool = ThreadPoolExecutor(self.workers)
        pending: deque[tuple[str, Future]] = deque()
        try:
            while True:
                for image in islice(images, 2 * self.batch_size - len(pending)):
                    pending.append((describe(image), pool.submit(self._load, image, thumbnail)))
                if not pending:
                    return
                batch = [pending.popleft() for _ in range(min(self.batch_size, len(pending)))]
                loaded = [(source, *future.result()) for source, future in batch]
                good = [item for _, _, item in loaded if isinstance(item, Tensor)]
                rows = iter(self._run(forward, torch.stack(good)) if good else ())
                for source, small, item in loaded:
                    yield source, small, next(rows) if isinstance(item, Tensor) else item
        finally:
            # Without waiting: the garbage collector may end an abandoned stream inside the start of another thread,
            # which holds the lock that waiting for a thread needs.
            pool.shutdown(wait=False, cancel_futures=True)

    def _load(self, image: Picture, thumbnail: int) -> tuple[Image.Image | None, Tensor | ImageError]:
        """In a worker thread: decode and prepare one picture."""
        try:
            picture = read_image(as_array(image) if isinstance(image, Tensor) else image)
        except ImageError as error:
            return None, error
        # The transform makes the short edge as long as the input: of a line of 1 x 10,000 that would be gigabytes.
        longest = MAX_ASPECT * min(picture.size)
        if max(picture.size) > longest:
            picture = ImageOps.fit(picture, tuple(min(edge, longest) for edge in picture.size))
        small = ImageOps.contain(picture, (thumbnail, thumbnail)) if thumbnail else None
        return small, self._transform(picture)

    def _run(self, forward: Callable[[Tensor], Tensor], batch: Tensor) -> Tensor:
        first = next(self.model.parameters(), batch)
        float16 = self.device.type == "mps" or (self.device.type == "cuda" and not torch.cuda.is_bf16_supported())
        dtype = torch.float16 if float16 else torch.bfloat16
        with torch.inference_mode(), torch.autocast(self.device.type, dtype, enabled=self.amp):
            return torch.cat(
                self._in_parts(lambda part: forward(part.to(self.device, first.dtype)).float().cpu(), batch)
            )

    def _name(self, logits: Tensor, top_k: int) -> Prediction:
        values, indices = logits.softmax(-1).topk(min(top_k, len(logits)))
        places = tuple(indices.tolist())
        names = tuple(self.labels[place] if self.labels else f"class {place}" for place in places)
        return Prediction(names, tuple(values.tolist()), places)

    def _check_labels(self, num_classes: int | None) -> None:
        if self.labels and num_classes and len(self.labels) != num_classes:
            raise ValueError(f"The model has {num_classes} classes, but {len(self.labels)} labels were given.")


def check_name(name: str) -> None:
    """Raise a ValueError that suggests the nearest names if timm (with the zoo's models) does not know a model."""
    if ":" not in name and not timm.is_model(name):  # "hf-hub:owner/repo" is looked up there
        nearest = ", ".join(get_close_matches(name, timm.list_models(), 3, cutoff=0))
        raise ValueError(f"There is no model {name!r}; the nearest names are {nearest}.")


def _build(name: str, checkpoint: str | None, labels: Sequence[str] | None) -> nn.Module:
    check_name(name)
    if checkpoint:
        return create_model(name, checkpoint=checkpoint, **({"num_classes": len(labels)} if labels else {}))
    if ":" not in name and not timm.get_pretrained_cfg(name).has_weights:
        raise ValueError(f"{name} has no weights of its own: give a checkpoint.")
    try:
        return create_model(name, pretrained=True)
    except OSError as error:  # of huggingface_hub and of urllib
        reason = str(error) or type(error).__name__
        raise ConnectionError(f"The weights of {name} cannot be fetched now: {reason}") from error


def listed(images: Picture | Sequence[Picture]) -> list[Picture]:
    """One picture or several, or a batch in one array or tensor, as a list."""
    many = isinstance(images, list | tuple) or getattr(images, "ndim", 0) == 4
    return list(images) if many else [images]


def _or_raise(result: Result) -> Result:
    if result.error:
        raise result.error
    return result


def as_array(image: Tensor) -> np.ndarray:
    """A tensor (C, H, W) or (H, W) as an array (H, W, C) or (H, W)."""
    image = image.detach().cpu()
    image = image.float() if image.is_floating_point() else image
    return (image.movedim(0, -1) if image.ndim == 3 else image).numpy()


def best_device() -> str:
    """The first GPU, else the CPU."""
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def check_device(name: str | torch.device) -> torch.device:
    """The device of that name, or a ValueError that says why it cannot be used."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA
        reason = str(error).splitlines()[0].rstrip(".")
        raise ValueError(f"The device {str(name)!r} cannot be used here: {reason}.") from error
    return device
