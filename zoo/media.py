"""Pictures and videos named on a command line, and the frames of a video."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from zoo.images import URL, ImageError, find_images

VIDEOS = (".mp4", ".mov", ".m4v", ".avi", ".mkv", ".webm")
LAST_FRAMES = 30  # that fail in a row are the end of a video, whatever its header says
ROUNDING = 2  # frames that a header may promise too many


def find_media(
    paths: Sequence[str | os.PathLike], allow_urls: bool = False
) -> tuple[list[str], list[str], list[ImageError]]:
    """Expand what a user typed into pictures and videos.

    Args:
        paths: files, folders, globs and URLs of pictures, as of `zoo.images.find_images`; files, folders and globs of
            videos.
        allow_urls: as of `zoo.images.find_images`.

    Returns:
        Pictures, videos, and an error for each path that leads to neither.
    """
    found, failed = find_images(paths, allow_urls)
    pictures = [path for path in found if not _is_video(path)]
    videos = dict.fromkeys(path for path in found if _is_video(path))
    with_videos = set()
    for folder in filter(os.path.isdir, map(os.fspath, paths)):
        inside = (path for path in Path(folder).rglob("*") if _is_video(path.name) and path.is_file())
        shown = sorted(str(p) for p in inside if not any(part[0] == "." for part in p.relative_to(folder).parts))
        videos.update(dict.fromkeys(shown))
        with_videos |= {folder} if shown else set()
    return pictures, list(videos), [error for error in failed if error.source not in with_videos]


def _is_video(name: str) -> bool:
    return name.lower().endswith(VIDEOS) and not URL.match(name)


class Video:
    """The frames of a video file.

    Args:
        path: the file.

    Attributes:
        frames: how many there are, as its header says; 0 if that is not known.
        rate: frames per second.

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
        capture.release()

    def __iter__(self) -> Iterator[np.ndarray | ImageError]:
        """Each frame as RGB, (H, W, 3) uint8, or an error in its place; an error at the end if frames are missing."""
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
        if len(bad) > ROUNDING or number == len(bad):
            yield ImageError(self.path, f"ends after {number - len(bad)} of {self.frames} frames.")
