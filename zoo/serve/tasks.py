"""From the bytes of an upload to the documents of the API: what runs in the threads that decode and compute."""

import base64
import dataclasses
import io
import time
from collections.abc import Callable
from typing import Any

from PIL import Image
from torch import Tensor

from zoo.catalogue import CATALOGUE
from zoo.classifier import Classifier
from zoo.dense_cli import detected_objects, segmented_objects
from zoo.detector import Detector
from zoo.drawing import draw_detections, draw_segmentation
from zoo.images import ImageError, read_image
from zoo.segmenter import Segmenter
from zoo.serve.answers import Answer, Area, Box, Detections, Facts, Names, Segmentation
from zoo.serve.chat import Reply

EDGE = 2048  # pixels; larger pictures are scaled down, except for classifiers


def load_picture(data: bytes) -> Image.Image:
    """A picture to look at, of no more than 2048 x 2048.

    Raises:
        ImageError: it cannot be read.
    """
    picture = read_image(data)
    picture.thumbnail((EDGE, EDGE))
    return picture


def loader(model: Classifier | Detector | Segmenter) -> Callable[[bytes], Any]:
    """A function that decodes and prepares an upload for a model, and raises an ImageError if it cannot."""

    def load(data: bytes) -> Any:
        if isinstance(model, Classifier):
            _, loaded = model._load(data, thumbnail=0)
        else:
            loaded = model._load(load_picture(data))
        if isinstance(loaded, ImageError):
            raise loaded
        return loaded

    return load


def classify(name: str, classifier: Classifier, tensor: Tensor, top_k: int) -> Names:
    """The names of what is in a picture, (C, H, W)."""
    found = classifier._name(classifier._run(classifier.model, tensor[None])[0], top_k)
    return Names(model=name, **dataclasses.asdict(found))


def detect(model: Detector, loaded: Any, score: float, draw: bool) -> Detections:
    """The things in a picture that are at least as sure."""
    (result,) = model._answer_group([("", loaded)])
    found = result.answer
    count = int((found.scores >= score).sum())  # they come surest first
    part = {name: getattr(found, name)[:count] for name in ("boxes", "scores", "labels", "names")}
    masks = None if found.masks is None else found.masks[:count]
    found = dataclasses.replace(found, **part, masks=masks)
    width, height = result.picture.size
    return Detections(
        width=width,
        height=height,
        drawn=_data_url(draw_detections(result.picture, found)) if draw else None,
        detections=[Box(name=name, **thing) for name, thing in zip(found.names, detected_objects(found))],
    )


def segment(model: Segmenter, loaded: Any, draw: bool) -> Segmentation:
    """The classes of a picture's pixels."""
    (result,) = model._answer_group([("", loaded)])
    found, (width, height) = result.answer, result.picture.size
    areas = [
        Area(
            name=found.names[thing["category_id"]],
            share=thing["area"] / (width * height),
            segmentation=thing["segmentation"],
        )
        for thing in segmented_objects(found)
    ]
    return Segmentation(
        width=width,
        height=height,
        drawn=_data_url(draw_segmentation(result.picture, found)) if draw else None,
        classes=sorted(areas, key=lambda area: -area.share),
    )


def facts(name: str) -> Facts:
    """What is known of a model."""
    entry = CATALOGUE.get(name)
    return Facts(model=name, **({"params": entry.params, "macs": entry.macs, "top1": entry.top1} if entry else {}))


def timed_classify(name: str, classifier: Classifier, tensor: Tensor, top_k: int) -> Facts:
    """What is known of a model, with its answer."""
    start = time.perf_counter()
    answer = classify(name, classifier, tensor, top_k)
    return facts(name).model_copy(update={"answer": answer, "seconds": time.perf_counter() - start})


def answer(reply: Reply) -> Answer:
    """What a model said."""
    overlay = reply.overlay and _data_url(reply.overlay)
    return Answer(answer=reply.text, visual_tokens=reply.visual_tokens, kept_tokens=reply.kept_tokens, overlay=overlay)


def _data_url(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=88)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
