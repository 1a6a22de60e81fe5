"""How much the server takes on."""

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Limits:
    """What is beyond them is refused, and the rest goes on.

    Attributes:
        upload_bytes: of a request, the picture and all else.
        pixels: of a picture, whatever the size of its file.
        queue: requests that wait for a model; as many again may be uploading.
        concurrency: requests that are computed at once.
        seconds: of a request, from its first byte to its answer.
    """

    upload_bytes: int = 20 * 2**20
    pixels: int = 50_000_000
    queue: int = 32
    concurrency: int = 2
    seconds: float = 30.0

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) <= 0:
                raise ValueError(f"The limit {field.name} is {getattr(self, field.name)}, expected more than 0.")
