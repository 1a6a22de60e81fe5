"""Which token of a map stands for a point in a picture."""


def token_at(point: tuple[int, int], size: tuple[int, int], grid: tuple[int, int]) -> tuple[int, int]:
    """Row and column of the token whose part of the picture holds the middle of a pixel.

    Args:
        point: column and row of the pixel, from 0.
        size: width and height of the picture, all of which the map stands for.
        grid: rows and columns of the map.

    Raises:
        ValueError: the point is outside the picture.
    """
    (x, y), (width, height), (rows, columns) = point, size, grid
    if not (0 <= x < width and 0 <= y < height):
        raise ValueError(
            f"The point {x},{y} is outside the picture of {width} x {height}: expected 0,0 to {width - 1},{height - 1}."
        )
    return (2 * y + 1) * rows // (2 * height), (2 * x + 1) * columns // (2 * width)
