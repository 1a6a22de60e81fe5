"""What decides the results of a bulk run, in a form that can be sent to another process and compared."""

from dataclasses import dataclass
from typing import Any

from zoo.download import file_sha256, resolve

OPTIONS = {"embed": (), "classify": ("top_k",), "detect": ("score",), "segment": ()}  # what else changes the results


@dataclass(frozen=True)
class Recipe:
    """What is done with each picture.

    Attributes:
        task: "embed", "classify", "detect" or "segment".
        model: as of `zoo.Classifier`, or of `zoo.Detector` and `zoo.Segmenter`.
        checkpoint: as there.
        config: as of `zoo.Detector` and `zoo.Segmenter`.
        labels: names of the classes, as of `zoo.Classifier`.
        top_k: classes per picture, of "classify".
        score: the least score, of "detect".
        amp: as of `zoo.Classifier`.
        device: where to compute.
        batch_size: pictures that go through the model at once.

    Raises:
        ValueError: there is no such task, or a number is too small.
    """

    task: str
    model: str
    checkpoint: str | None = None
    config: str | None = None
    labels: tuple[str, ...] | None = None
    top_k: int = 5
    score: float = 0.3
    amp: bool = False
    device: str | None = None
    batch_size: int = 16

    def __post_init__(self) -> None:
        if self.task not in OPTIONS:
            raise ValueError(f"The task is {self.task!r}, expected one of {', '.join(OPTIONS)}.")
        if self.batch_size < 1 or self.top_k < 1:
            raise ValueError(f"batch_size and top_k must be at least 1, got {self.batch_size} and {self.top_k}.")

    def settings(self) -> dict[str, Any]:
        """What results in one folder have in common, for JSON; checkpoint and config by the SHA-256 of their files."""
        found: dict[str, Any] = {"task": self.task, "model": self.model, "amp": self.amp}
        for name in ("checkpoint", "config"):
            file = getattr(self, name)
            found[name] = file and file_sha256(resolve(file))
        found["labels"] = self.labels and list(self.labels)
        return found | {name: getattr(self, name) for name in OPTIONS[self.task]}
