"""The documents that the JSON API answers with."""

from typing import Any

from pydantic import BaseModel, Field


class Error(BaseModel):
    """Why there is no answer."""

    error: str


class Names(BaseModel):
    """The classes that a picture most probably shows, best first."""

    model: str
    names: list[str]
    probabilities: list[float] = Field(description="Softmax over all classes, 0 to 1.")
    indices: list[int] = Field(description="Places in the model's output.")


class Drawable(BaseModel):
    """An answer in the pixels of a picture."""

    width: int = Field(description="Of the picture that the pixels are counted in. Large pictures are scaled down.")
    height: int
    drawn: str | None = Field(None, description="The answer drawn into the picture, as a data URL of a JPEG.")


class Box(BaseModel):
    """A thing in a picture."""

    name: str
    score: float = Field(description="0 to 1.")
    bbox: list[float] = Field(description="Left, top, width and height in pixels.")
    area: float = Field(description="Of the mask, or without one of the box.")
    segmentation: dict[str, Any] | None = Field(None, description="The mask in COCO's compressed RLE.")


class Detections(Drawable):
    """The things in a picture, the surest first."""

    detections: list[Box]


class Area(BaseModel):
    """A class in a picture."""

    name: str
    share: float = Field(description="Of the picture, 0 to 1.")
    segmentation: dict[str, Any] = Field(description="Where it is, in COCO's compressed RLE.")


class Segmentation(Drawable):
    """The classes of a picture's pixels, the largest first."""

    classes: list[Area]


class Facts(BaseModel):
    """What is known of a model of the zoo, and what it says of a picture if it is served."""

    model: str
    params: int | None = None
    macs: int | None = Field(None, description="Multiply-accumulates for 224 x 224.")
    top1: float | None = Field(None, description="Published accuracy on ImageNet-1k in percent.")
    seconds: float | None = Field(None, description="That this answer took to compute.")
    answer: Names | None = None


class Comparison(BaseModel):
    """Two models."""

    models: list[Facts]


class Answer(BaseModel):
    """What a multimodal model says about a picture."""

    answer: str
    visual_tokens: int = Field(description="Of the picture.")
    kept_tokens: int = Field(description="That the last layer sees.")
    overlay: str | None = Field(None, description="The picture, dark where tokens were dropped; a data URL of a JPEG.")


class Overview(BaseModel):
    """What is served, and within which limits."""

    classifiers: list[str] = Field(description="The first is the default.")
    detect: bool
    segment: bool
    chat: str | None
    missing: dict[str, str] = Field(description="Why something is not served.")
    limits: dict[str, float]
