"""COCO annotation files: what is wrong in one, and the rest without it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

LISTS = ("images", "annotations", "categories")


def clean_annotations(file: Path, classes: Sequence[str] | None = None) -> tuple[dict[str, Any], list[str]]:
    """Reads an instances file and leaves out the annotations that would stop or mislead a training run.

    Args:
        file: The file.
        classes: Names of categories that must be there; None if any will do.

    Returns:
        The document without its bad annotations, and one phrase for each of those. Pictures without annotations stay.

    Raises:
        ValueError: The file as a whole is of no use: one sentence that says why.
    """
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        what = "is empty" if not file.stat().st_size else f"is no JSON ({error})"
        raise ValueError(f"{file} {what}: expected COCO annotations.") from None
    lacking = [key for key in LISTS if not isinstance(document, dict) or not isinstance(document.get(key), list)]
    if lacking:
        raise ValueError(f"{file} has no list of {', '.join(lacking)}: expected COCO annotations of instances.")
    if not document["images"]:
        raise ValueError(f"{file} lists no pictures: there is nothing to train on.")
    try:
        names = {category["id"]: category["name"] for category in document["categories"]}
        sizes = {image["id"]: (image["height"], image["width"]) for image in document["images"]}
    except (KeyError, TypeError) as error:
        raise ValueError(f"{file} has a picture or category without {error}: expected COCO annotations.") from None
    if unknown := sorted(set(classes or ()) - set(names.values())):
        raise ValueError(
            f"{file} has no category {', '.join(unknown[:5])}, which the config names in metainfo.classes."
        )
    good, problems = [], []
    for annotation in document["annotations"]:
        problem = _problem(annotation, names, sizes)
        if problem:
            problems.append(f"annotation {annotation.get('id')} {problem}")
        else:
            good.append(annotation)
    if document["annotations"] and not good:
        raise ValueError(f"{file} has no annotation that can be used: {problems[0]}.")
    return {**document, "annotations": good}, problems


def _problem(annotation: dict[str, Any], names: dict[int, str], sizes: dict[int, tuple[int, int]]) -> str | None:
    """What is wrong with an annotation, if anything."""
    if annotation.get("image_id") not in sizes:
        return f"is of picture {annotation.get('image_id')}, which is not listed"
    if annotation.get("category_id") not in names:
        return f"has the category {annotation.get('category_id')}, which is not listed"
    box = annotation.get("bbox") or ()
    if len(box) != 4 or not (box[2] > 0 and box[3] > 0):
        return f"has the box {list(box)}, expected x, y, width and height above 0"
    mask, size = annotation.get("segmentation"), sizes[annotation["image_id"]]
    if isinstance(mask, dict) and tuple(mask.get("size", ())) != size:
        return f"has a mask of {mask.get('size')}, its picture is {list(size)} (height, width)"
    if isinstance(mask, list) and any(len(ring) < 6 or len(ring) % 2 for ring in mask):
        return "has a polygon of fewer than three points"
    return None
