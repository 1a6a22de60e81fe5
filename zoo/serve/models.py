"""The models that are served, and why others are not."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from PIL import Image

from zoo.classifier import Classifier
from zoo.detector import Detector
from zoo.segmenter import Segmenter
from zoo.serve.chat import Chat, load_chat

LEAST_SCORE = 0.1  # of a detection that can be asked for


@dataclass
class Models:
    """What a server has.

    Attributes:
        classifiers: by name; the first is the default. Any that tell classes apart.
        detector: with the least score that can be asked for.
        segmenter: for maps of classes.
        chat: a multimodal model.
        missing: why there is no detector, segmenter or chat, by task ("detect", "segment", "chat").
    """

    classifiers: dict[str, Classifier]
    detector: Detector | None = None
    segmenter: Segmenter | None = None
    chat: Chat | None = None
    missing: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.classifiers:
            raise ValueError("There is no classifier to serve: give at least one.")


def load_models(names: Sequence[str], chat: str | None = None, device: str | None = None) -> Models:
    """Load what is to be served: classifiers, and the detector, segmenter and chat model of the package if it has them.

    Args:
        names: of classifiers with pretrained weights.
        chat: folder or hub id of a multimodal model; None for the packaged one.
        device: where to compute; by default the first GPU, else the CPU.

    Raises:
        ValueError: there is no such classifier, or the chat model that was asked for cannot be loaded.
    """
    models = Models({name: Classifier(name, device=device) for name in names})
    try:
        models.detector = Detector(score=LEAST_SCORE, device=device)
    except (ImportError, FileNotFoundError) as error:
        models.missing["detect"] = str(error)
    try:
        models.segmenter = Segmenter(device=device)
    except (ImportError, FileNotFoundError) as error:
        models.missing["segment"] = str(error)
    try:
        models.chat = load_chat(chat, device)
    except (ImportError, ValueError) as error:
        if chat is not None:
            raise
        models.missing["chat"] = str(error)
    for model in (*models.classifiers.values(), models.detector, models.segmenter):
        if model:  # what is prepared at the first picture is not for a user to wait for
            model.predict(Image.new("RGB", (224, 224)))
    return models
