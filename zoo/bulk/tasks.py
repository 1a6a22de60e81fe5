"""From the pictures of a batch to rows of results; the same code whichever engine calls it."""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from itertools import groupby
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from zoo.bulk.recipe import Recipe
from zoo.bulk.shards import FAILED, OK, Row
from zoo.bulk.sources import Item, fetch
from zoo.classifier import Classifier
from zoo.dense import DenseModel
from zoo.detector import Detector
from zoo.images import ImageError
from zoo.segmenter import Segmenter

Loaded = tuple[str, Any]  # a key, and what the model takes or an ImageError


class Task(ABC):
    """A model and what is asked of it, made from a `Recipe`."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    @staticmethod
    @abstractmethod
    def result_type() -> Any:
        """The Arrow type of a result."""

    @abstractmethod
    def load(self, source: str | bytes) -> Any:
        """Decode and prepare one picture: what the model takes, or an ImageError. Made for other processes."""

    @abstractmethod
    def answer(self, pictures: Sequence[Any]) -> Iterator[Any]:
        """The result of each picture of a batch, in what pyarrow makes the result type of."""

    def prepare(self, items: Sequence[Item]) -> list[Loaded]:
        """Read, decode and prepare a batch."""
        return [(item.key, self._prepared(item)) for item in items]

    def predict(self, batch: Sequence[Loaded]) -> list[Row]:
        """The rows of a prepared batch."""
        good = [picture for _, picture in batch if not isinstance(picture, ImageError)]
        answers = iter(self.answer(good)) if good else iter(())
        return [
            (key, None, FAILED, picture.reason) if isinstance(picture, ImageError) else (key, next(answers), OK, None)
            for key, picture in batch
        ]

    def _prepared(self, item: Item) -> Any:
        try:
            return self.load(fetch(item))
        except ImageError as error:
            return error
        except Exception as error:  # of whatever library: one picture of a million does not stop the others
            return ImageError(item.key, f"cannot be prepared ({type(error).__name__}: {error}).")


class EmbedTask(Task):
    """Feature vectors of `zoo.Classifier`."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        self.classifier = Classifier(
            recipe.model,
            checkpoint=recipe.checkpoint,
            labels=recipe.labels,
            device=recipe.device,
            amp=recipe.amp,
        )

    @staticmethod
    def result_type() -> Any:
        """list<float>."""
        import pyarrow as pa

        return pa.list_(pa.float32())

    def load(self, source: str | bytes) -> np.ndarray | ImageError:
        """float32 (C, H, W); an array because each tensor would take a file handle on its way to another process."""
        _, loaded = self.classifier._load(source, thumbnail=0)
        return loaded if isinstance(loaded, ImageError) else loaded.numpy()

    def answer(self, pictures: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
        """float32 (D,)."""
        batch = torch.from_numpy(np.stack(pictures))
        yield from self.classifier._run(self.classifier._features, batch).numpy()


class ClassifyTask(EmbedTask):
    """Names of `zoo.Classifier`."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        # A model without classes is refused before the work.
        next(self.classifier.predict_all([], recipe.top_k), None)

    @staticmethod
    def result_type() -> Any:
        """struct<names, probabilities, indices>."""
        import pyarrow as pa

        lists = {"names": pa.string(), "probabilities": pa.float32(), "indices": pa.int32()}
        return pa.struct({name: pa.list_(kind) for name, kind in lists.items()})

    def answer(self, pictures: Sequence[np.ndarray]) -> Iterator[dict[str, Any]]:
        """The fields of `zoo.Prediction`."""
        for row in self.classifier._run(self.classifier.model, torch.from_numpy(np.stack(pictures))):
            yield dataclasses.asdict(self.classifier._name(row, self.recipe.top_k))


class DenseTask(Task):
    """What `zoo detect --json` and `zoo segment --json` say of a picture: its annotations as COCO has them."""

    model: DenseModel

    @staticmethod
    def result_type() -> Any:
        """list<struct> with one struct per thing or class."""
        import pyarrow as pa

        mask = pa.struct({"size": pa.list_(pa.int32()), "counts": pa.string()})
        thing = {"category_id": pa.int32(), "name": pa.string(), "bbox": pa.list_(pa.float32()), "score": pa.float32()}
        return pa.list_(pa.struct({**thing, "area": pa.float32(), "iscrowd": pa.int8(), "segmentation": mask}))

    def load(self, source: str | bytes) -> Any:
        """What the pipeline of the config makes of a picture; of the picture itself, its size is enough."""
        loaded = self.model._load(source)
        if isinstance(loaded, ImageError):
            return loaded
        picture, data = loaded
        return SimpleNamespace(size=picture.size), data

    def answer(self, pictures: Sequence[Any]) -> Iterator[list[dict[str, Any]]]:
        """A list of annotations."""
        for _, group in groupby(pictures, key=lambda loaded: tuple(loaded[1]["inputs"].shape)):
            for result in self.model._answer_group([("", loaded) for loaded in group]):
                yield list(self.annotations(result.answer))

    @abstractmethod
    def annotations(self, answer: Any) -> Iterator[dict[str, Any]]:
        """Of one picture."""


class DetectTask(DenseTask):
    """Boxes and masks of `zoo.Detector`."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        self.model = Detector(recipe.model, score=recipe.score, **_dense_arguments(recipe))

    def annotations(self, answer: Any) -> Iterator[dict[str, Any]]:
        """One per thing."""
        from zoo.dense_cli import detected_objects

        for name, thing in zip(answer.names, detected_objects(answer)):
            yield {"name": name, **thing}


class SegmentTask(DenseTask):
    """Maps of classes of `zoo.Segmenter`."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        self.model = Segmenter(recipe.model, **_dense_arguments(recipe))

    def annotations(self, answer: Any) -> Iterator[dict[str, Any]]:
        """One per class that is there."""
        from zoo.dense_cli import segmented_objects

        for thing in segmented_objects(answer):
            yield {"name": answer.names[thing["category_id"]], **thing}


def _dense_arguments(recipe: Recipe) -> dict[str, Any]:
    names = ("config", "checkpoint", "labels", "device", "batch_size")
    return {name: getattr(recipe, name) for name in names}


TASKS: dict[str, type[Task]] = {
    "embed": EmbedTask,
    "classify": ClassifyTask,
    "detect": DetectTask,
    "segment": SegmentTask,
}
