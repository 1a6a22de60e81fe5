"""Pictures and videos named on a command line, and the frames of a video."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from zoo.images import ImageError, find_images

VIDEOS = (".mp4", ".mov", ".m4v", ".avi", ".mkv", ".webm")
LAST_FRAMES = 30  # that fail in a row are the end of a video, whatever its header says
ROUNDING = 2  # frames that a header may promise too many


def find_media(
    paths: Sequence[str | os.PathLike], allow_urls: bool = False
) -> tuple[list[str], list[str], list[ImageError]]:
    """Expand what a user typed into pictures and videos.

    Args:
        paths: files, folders, globs and URLs of pictures, as of `zoo.images.find_images`; files and folders of videos.
        allow_urls: as of `zoo.images.find_images`.

    Returns:
        Pictures, videos, and an error for each path that leads to neither.
    """
    videos: dict[str, None] = {}
    others, only_videos = [], set()
    for path in map(os.fspath, paths):
        found = [path] if _is_video(path) and not os.path.isdir(path) else []
        if os.path.isdir(path):
            hidden = (part for part in Path(path).rglob("*") if _is_video(part.name) and part.is_file())
            found = sorted(str(part) for part in hidden if not part.name.startswith("."))
            others.append(path)
            only_videos |= {path} if found else set()
        elif not found:
            others.append(path)
        videos.update(dict.fromkeys(found))
    pictures, failed = find_images(others, allow_urls)
    return pictures, list(videos), [error for error in failed if error.source not in only_videos]


def _is_video(name: str) -> bool:
    return name.lower().endswith(VIDEOS)


class Video:
    """The frames of a video file.

    Args:
        path: the file.

    Attributes:
        frames: how many there are, as its header says; 0 if that is not known.
        rate: frames per second.
        size: width and height.

    Raises:
        ImageError: it is missing, or no video that can be read here.
    """

    def __init__(self, path: str) -> None:
        if not os.path.isfile(path):
            raise ImageError(path, "does not exist.")
        import cv2

        self.path = path
        capture = cv2.VideoCapture(path)
        if not capture.isOpened():
            raise ImageError(path, "is no video that can be read here, or it is damaged.")
        self.frames = max(0, int(capture.get(cv2.CAP_PROP_FRAME_COUNT)))
        self.rate = capture.get(cv2.CAP_PROP_FPS) or 25.0
        self.size = tuple(int(capture.get(edge)) for edge in (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT))
        capture.release()

    def __iter__(self) -> Iterator[np.ndarray | ImageError]:
        """Each frame as RGB, (H, W, 3) uint8, or an error in its place."""
        import cv2

        capture = cv2.VideoCapture(self.path)
        bad: list[ImageError] = []
        number = 0
        try:
            while len(bad) < LAST_FRAMES:
                good, frame = capture.read()
                if good:
                    yield from bad
                    bad.clear()
                    yield np.ascontiguousarray(frame[..., ::-1])
                elif number >= self.frames:
                    break
                else:
                    bad.append(ImageError(f"{self.path}, frame {number + 1},", "cannot be decoded."))
                number += 1
        finally:
            capture.release()
        if len(bad) > ROUNDING:
            yield ImageError(self.path, f"ends after {number - len(bad)} of {self.frames} frames.")
