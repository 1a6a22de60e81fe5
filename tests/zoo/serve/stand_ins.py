"""Stand-ins for the models that tests of `zoo serve` do without."""

import time

import numpy as np
from PIL import Image

from zoo.dense import DenseResult
from zoo.detector import Detections, Detector
from zoo.segmenter import Segmentation, Segmenter
from zoo.serve import Chat
from zoo.serve.chat import Reply


def square(size=(300, 200), box=(60, 40, 160, 120)):
    image = Image.new("RGB", size, "white")
    image.paste((200, 0, 0), box)
    return image


class RedThings(Detector):
    """Finds what is red: once with all of it, and less surely its upper half."""

    def __init__(self):
        pass

    def _load(self, image):
        return image, {}

    def _answer_group(self, group):
        for source, (image, _) in group:
            red = np.asarray(image)[..., 1] < 100
            rows, columns = np.flatnonzero(red.any(1)), np.flatnonzero(red.any(0))
            left, top, right, bottom = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
            half = red & (np.arange(len(red)) < (top + bottom) // 2)[:, None]
            boxes = np.array([[left, top, right, bottom], [left, top, right, (top + bottom) // 2]], np.float32)
            scores, labels = np.array([0.9, 0.4], np.float32), np.array([1, 0])
            answer = Detections(boxes, scores, labels, ("square", "half"), np.stack([red, half]))
            yield DenseResult(source, image, answer)


class RedAreas(Segmenter):
    """Tells red from the background."""

    def __init__(self):
        pass

    def _load(self, image):
        return image, {}

    def _answer_group(self, group):
        for source, (image, _) in group:
            labels = (np.asarray(image)[..., 1] < 100).astype(np.int64)
            yield DenseResult(source, image, Segmentation(labels, ("background", "square")))


class Echo(Chat):
    """Answers in four words, with the upper half of the picture kept."""

    def __init__(self):
        self.name, self.asked = "echo", []

    def ask(self, picture, turns, question, *, keep, say, **options):
        self.asked.append((turns, question, keep))
        for word in ("You ", "asked: ", question, f" <b>{len(turns)}</b>"):
            say(word)
            time.sleep(0.15)
        return Reply(f"You asked: {question} <b>{len(turns)}</b>", 16, round(16 * keep), picture)
