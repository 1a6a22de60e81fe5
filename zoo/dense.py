"""What `zoo.Detector` and `zoo.Segmenter` share: a model of mmdet or mmseg, and pictures streamed through it."""

import importlib.util
import json
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from importlib.resources import files
from itertools import chain, groupby, islice
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
import safetensors
import torch
from PIL import Image, ImageOps

from zoo.checkpoints import load_checkpoint
from zoo.classifier import Picture, as_array, best_device, check_device, listed
from zoo.download import resolve
from zoo.images import ImageError, describe, read_image
from zoo.memory import PartsThatFit
from zoo.restricted_reader import read_pickled

MAX_ASPECT = 8  # longer pictures are seen with a grey border along their long sides
GREY = (114, 114, 114)

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class DenseResult(Generic[Answer]):
    """What became of one picture of a stream: an answer, or else an error.

    Attributes:
        source: its path or URL, or what kind of object it was.
        picture: RGB, as it was read.
        answer: `Detections` or `Segmentation`.
        error: why there is no answer.
    """

    source: str
    picture: Image.Image | None = None
    answer: Answer | None = None
    error: ImageError | None = None


class DenseModel(Generic[Answer]):
    """A model of mmdet or mmseg with its weights, its class names and the way its pictures are prepared.

    Args:
        model: backbone of a quickstart model, whose config is part of the package; ignored where a `config` is given.
        config: a config of mmdet or mmseg.
        checkpoint: weights: a ``.safetensors`` file of the tools, what mmengine's Runner wrote, or anything else that
            `zoo.load_checkpoint` takes. Without it the packaged weights of `model`.
        labels: the names of the classes; by default those in the checkpoint, else those in the config.
        device: where to compute; by default the first GPU, else the CPU.
        batch_size: pictures that are read ahead, and of which those of one size go through the model at once; fewer,
            with a warning, once the GPU's memory runs out.
        workers: threads that decode and prepare pictures.

    Raises:
        ImportError: the extra ``dense`` is not installed.
        FileNotFoundError: there is no such config, checkpoint or packaged model.
        ValueError: the config is of another kind, the weights do not fit, or the device is unknown.
    """

    task: ClassVar[str]
    scope: ClassVar[str]

    def __init__(
        self,
        model: str = "van_nano",
        *,
        config: str | Path | None = None,
        checkpoint: str | None = None,
        labels: Sequence[str] | None = None,
        device: str | torch.device | None = None,
        batch_size: int = 8,
        workers: int = 2,
    ) -> None:
        if batch_size < 1 or workers < 1:
            raise ValueError(f"batch_size and workers must be at least 1, got {batch_size} and {workers}.")
        if missing := [name for name in ("mmengine", "mmdet", "mmseg", "pycocotools") if not _is_there(name)]:
            raise ImportError(f"{', '.join(missing)} not found: pip install 'linear-vision-zoo[dense]'.")
        self.device = check_device(device or best_device())
        self.batch_size, self.workers = batch_size, workers
        self._in_parts = PartsThatFit()
        self.config = self._read_config(model, config)
        checkpoint = checkpoint or self._packaged_weights(model, config)
        self.model = self._build()
        load_checkpoint(self.model, checkpoint, which="model")  # of mmengine: where it keeps an average, the average
        self.model.to(self.device).eval()
        self.labels = tuple(labels or _labels_of(checkpoint) or _labels_in(self.config))
        self._prepare = self._build_pipeline()

    def _read_config(self, model: str, config: str | Path | None) -> Any:
        from mmengine.config import Config

        import zoo.openmmlab  # noqa: F401 (before mmdet and mmseg: makes mmcv.ops work)

        path = Path(config) if config else Path(str(files("zoo.configs") / f"quickstart/{self.task}_{model}.py"))
        if not path.is_file():
            raise FileNotFoundError(
                f"There is no config file {path}."
                if config
                else f"There is no quickstart {self.task} on {model}: give a config and a checkpoint."
            )
        try:
            found = Config.fromfile(path)
        except Exception as error:  # a config is a program
            raise ValueError(f"{path} cannot be read as a config: {_reason(error)}.") from error
        if "model" not in found:
            raise ValueError(f"{path} is no config of a model: it has no dict called model.")
        if found.get("default_scope") != self.scope:
            raise ValueError(
                f"{path} is a config of {found.get('default_scope')}, a {self.task} needs one of {self.scope}."
            )
        return found

    def _packaged_weights(self, model: str, config: str | Path | None) -> str:
        packaged = Path(str(files("zoo") / f"weights/{self.task}_{model}.safetensors"))
        if config or not packaged.is_file():
            what = f"{config} has" if config else f"The quickstart {self.task} on {model} has"
            raise FileNotFoundError(f"{what} no packaged weights: give a checkpoint.")
        return str(packaged)

    def _build(self) -> torch.nn.Module:
        from mmengine.model import revert_sync_batchnorm
        from mmengine.registry import MODELS, DefaultScope

        if self.scope == "mmdet":
            from mmdet.utils import register_all_modules
        else:
            from mmseg.utils import register_all_modules
        register_all_modules(init_default_scope=False)
        begin_without_weights(self.config)
        with DefaultScope.overwrite_default_scope(self.scope):
            try:
                model = MODELS.build(self.config.model)
            except Exception as error:  # of whatever part of it
                raise ValueError(f"The model of the config cannot be built: {_reason(error)}.") from error
            return revert_sync_batchnorm(model)

    def _build_pipeline(self) -> Any:
        """The evaluation pipeline of the config, from arrays instead of files and without annotations."""
        from mmengine.dataset import Compose
        from mmengine.registry import DefaultScope

        dataset = self.config.get("test_dataloader", {}).get("dataset", {})
        steps = dataset.get("pipeline") or self.config.get("test_pipeline")
        if not steps:
            raise ValueError("The config has neither test_dataloader.dataset.pipeline nor test_pipeline.")
        steps = [step for step in steps if not str(step["type"]).startswith("Load")]
        with DefaultScope.overwrite_default_scope(self.scope):
            return Compose([{"type": "LoadImageFromNDArray"}, *steps])

    def predict(self, images: Picture | Sequence[Picture]) -> list[Answer]:
        """What is in one picture or several.

        Args:
            images: as of `zoo.Classifier.predict`, of any sizes from 1 x 1.

        Returns:
            One answer per picture, in the pixels of that picture.

        Raises:
            ImageError: a picture cannot be read.
        """
        answers = []
        for result in self.predict_all(listed(images)):
            if result.error:
                raise result.error
            answers.append(result.answer)
        return answers

    def predict_all(self, images: Iterable[Picture | ImageError]) -> Iterator[DenseResult[Answer]]:
        """Like `predict` for any number of pictures: results come in order, while the next pictures are being decoded.

        A picture that cannot be read, or an error in its place, gives a result with an `error` and does not stop the
        rest.

        Args:
            images: the pictures; taken from as needed.
        """
        images = iter(images)
        pool = ThreadPoolExecutor(self.workers)
        pending: deque[tuple[str, Future]] = deque()
        try:
            while True:
                for image in islice(images, 2 * self.batch_size - len(pending)):
                    name = image.source if isinstance(image, ImageError) else describe(image)
                    pending.append((name, pool.submit(self._load, image)))
                if not pending:
                    return
                batch = [pending.popleft() for _ in range(min(self.batch_size, len(pending)))]
                loaded = [(source, future.result()) for source, future in batch]
                # Padding would change what is seen near the border: only pictures of one size share a batch.
                for _, group in groupby(loaded, key=lambda item: _shape(item[1])):
                    yield from self._answer_group(list(group))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _load(self, image: Picture | ImageError) -> tuple[Image.Image, dict[str, Any]] | ImageError:
        """In a worker thread: decode and prepare one picture."""
        if isinstance(image, ImageError):
            return image
        try:
            picture = read_image(as_array(image) if isinstance(image, torch.Tensor) else image)
        except ImageError as error:
            return error
        pixels = np.asarray(_padded(picture))[..., ::-1]
        return picture, self._prepare({"img": np.ascontiguousarray(pixels)})

    def _answer_group(self, group: list[tuple[str, Any]]) -> Iterator[DenseResult[Answer]]:
        if isinstance(group[0][1], ImageError):
            yield from (DenseResult(source, error=error) for source, error in group)
            return
        data = [prepared for _, (_, prepared) in group]
        with torch.inference_mode():
            samples = chain.from_iterable(self._in_parts(self._test, data))
        for (source, (picture, _)), sample in zip(group, samples):
            yield DenseResult(source, picture, self._answer(sample, picture.size))

    def _test(self, data: list[dict[str, Any]]) -> list[Any]:
        return self.model.test_step({key: [item[key] for item in data] for key in data[0]})

    def _answer(self, sample: Any, size: tuple[int, int]) -> Answer:
        """From a data sample of the library, of a picture of width and height ``size`` that may have been padded."""
        raise NotImplementedError


def begin_without_weights(config: Any) -> None:
    """Changes a config whose ``ZooBackbone`` would load weights; for models that get a whole checkpoint."""
    backbone = config.model.get("backbone", {})
    if backbone.get("type") == "ZooBackbone":
        backbone.update(pretrained=False, checkpoint=None)


def _reason(error: Exception) -> str:
    lines = str(error).strip("'\"").splitlines()
    return f"{type(error).__name__}: {lines[0].rstrip('.')}" if lines else type(error).__name__


def _is_there(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _shape(loaded: Any) -> tuple[int, ...]:
    return () if isinstance(loaded, ImageError) else tuple(loaded[1]["inputs"].shape)


def _padded(picture: Image.Image) -> Image.Image:
    """The picture, with a border on the right or below if it would be scaled to a side of less than a pixel."""
    shortest = -(-max(picture.size) // MAX_ASPECT)
    size = tuple(max(edge, shortest) for edge in picture.size)
    return picture if size == picture.size else ImageOps.pad(picture, size, color=GREY, centering=(0, 0))


def _labels_of(checkpoint: str) -> list[str]:
    """Class names that the tools or mmengine's Runner wrote into a checkpoint."""
    path = resolve(checkpoint)
    if path.suffix == ".safetensors":
        with safetensors.safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get("labels", "[]")
        try:
            names = json.loads(text)
        except ValueError:
            return []
        return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
    content = read_pickled(path)
    meta = content.get("meta") if isinstance(content, dict) else None
    known = meta.get("dataset_meta") if isinstance(meta, dict) else None
    classes = known.get("classes") if isinstance(known, dict) else None
    return [name for name in classes or () if isinstance(name, str)]


def _labels_in(config: Any) -> list[str]:
    """Class names that a config has for its dataset, or that its dataset's type is known to have."""
    from mmengine.registry import DATASETS, DefaultScope

    dataset = config.get("test_dataloader", {}).get("dataset", {})
    if classes := dataset.get("metainfo", {}).get("classes"):
        return list(classes)
    with DefaultScope.overwrite_default_scope(config.default_scope):
        kind = DATASETS.get(dataset.get("type", "")) if dataset else None
    return list(getattr(kind, "METAINFO", {}).get("classes", ()))
