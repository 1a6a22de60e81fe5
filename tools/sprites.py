"""Training pictures composed on the device from transparent sprites.

A folder of RGBA sprites (``ROOT/<class>/<style>.png``) is read once. What is slow (a palette per sprite, the distance
of every pixel to the outline and to the inner colour edges) is worked out once per sprite, so that a batch is only
table look-ups, one warp and a few dozen element-wise operations: a line of any width is a threshold on a distance, and
a sprite in other colours is another palette.

The aim is a classifier that knows a thing whatever the drawing style, so the augmentation changes what styles change
(outlines, flat fills, palettes, proportions) and keeps what they keep.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

SIDE = 128  # pixels of a stored sprite, border included
BORDER = 8  # empty pixels on each side, so that outlines fit around shapes that fill their picture
REACH = 10  # how far, in stored pixels, the distance maps see
COLOURS = 8  # palette entries per sprite
SHADE = 0.45  # how little brightness counts when colours are grouped
EDGE = 0.3  # colour difference across an inner edge that earns a line
UPRIGHT = 0.84 * SIDE / (SIDE - 2 * BORDER)  # stored size in an undistorted picture: a margin of 8% around the sprite
BACKGROUNDS = ("white", "grey", "varied")


@dataclass(frozen=True)
class Recipe:
    """How often, as a share of the batch, and how strongly pictures are changed; all zeros leaves the sprite alone."""

    flat: float = 0.62  # drawn from its palette, without shading
    line_art: float = 0.12  # of the flat ones: two tones
    recolour: float = 0.15  # of the flat ones: some entries get a random colour
    style_mix: float = 0.16  # blended with another style of the same class
    outline: float = 0.75  # line around the shape, and along inner edges; half as often where not flat
    geometry: float = 1.0  # strength of rotation, shear, scale, perspective and shift
    warp: float = 0.5  # smooth deformation
    flip: float = 0.35  # mirrored, only classes that no other class mirrors
    colour: float = 1.0  # strength of hue, saturation, contrast and brightness changes
    grey: float = 0.08
    white: float = 0.4  # plain white background
    plain: float = 0.16  # plain coloured background; the rest are gradients, noise, stripes and checks
    clutter: float = 0.1  # other sprites, out of focus, behind
    shadow: float = 0.12
    blur: float = 0.15
    rescale: float = 0.1  # to half the size and back
    thicken: float = 0.12  # dark parts grow or shrink by a pixel
    posterise: float = 0.08
    noise: float = 0.1
    jpeg: float = 0.1
    cutout: float = 0.15
    cutmix: float = 0.1
    mixup: float = 0.1


PLAIN = Recipe(**dict.fromkeys(Recipe.__dataclass_fields__, 0.0) | {"white": 1.0})


@dataclass(frozen=True)
class Sprites:
    """Sprites as read.

    Args:
        pixels: (N, 4, 128, 128) uint8, colour premultiplied by alpha.
        table: (classes, styles) int64, rows of ``pixels``, or -1 where a class lacks a style.
        classes: Names, sorted.
        styles: Names, sorted.
    """

    pixels: Tensor
    table: Tensor
    classes: list[str]
    styles: list[str]


def load_sprites(root: str | Path, device: str | torch.device = "cpu", classes: Sequence[str] | None = None) -> Sprites:
    """Read every ``ROOT/<class>/<style>.png`` once, resized to 112 x 112 with an empty border of 8 pixels.

    Args:
        root: Folder with one folder per class, as torchvision's ImageFolder; classes and styles are sorted by name.
        device: Where the pixels are kept.
        classes: Which to read; None for all.

    Returns:
        The sprites.

    Raises:
        FileNotFoundError: The folder holds no ``<class>/<style>.png``, or none of a class that was asked for.
        ValueError: A file is not a readable picture.
    """
    files = sorted(Path(root).glob("*/*.png"))
    if not files:
        raise FileNotFoundError(f"no sprites in {root}: expected <class>/<style>.png with transparency")
    found = {file.parent.name for file in files}
    if lacking := sorted(set(classes or ()) - found):
        raise FileNotFoundError(f"no sprites of {', '.join(lacking)} in {root}")
    if classes:
        files = [file for file in files if file.parent.name in classes]
    classes = sorted(found.intersection(classes) if classes else found)
    styles = sorted({file.stem for file in files})
    table = torch.full((len(classes), len(styles)), -1)
    for row, file in enumerate(files):
        table[classes.index(file.parent.name), styles.index(file.stem)] = row
    with ThreadPoolExecutor() as pool:
        pixels = torch.from_numpy(np.stack(list(pool.map(_read, files))))
    return Sprites(pixels.permute(0, 3, 1, 2).contiguous().to(device), table.to(device), classes, styles)


def _read(file: Path) -> np.ndarray:
    try:
        with Image.open(file) as image:
            inner = (SIDE - 2 * BORDER,) * 2
            pixels = np.asarray(image.convert("RGBA").convert("RGBa").resize(inner, Image.Resampling.LANCZOS))
            return np.pad(pixels, ((BORDER, BORDER), (BORDER, BORDER), (0, 0)))
    except OSError as error:
        raise ValueError(f"{file} is not a readable picture ({error}): replace or remove it") from error


def seed_of(*parts: int) -> int:
    """One well-mixed 63-bit seed from several small numbers, the same on every machine."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)


class Draws:
    """Random numbers of one batch, a pure function of the seed; one block of uniforms serves all per-picture draws."""

    def __init__(self, seed: int, batch: int, device: torch.device, dtype: torch.dtype) -> None:
        self.generator = torch.Generator(device).manual_seed(seed)
        self.batch, self.device, self.dtype = batch, device, dtype
        self._block = iter(torch.rand(160, batch, 1, 1, 1, generator=self.generator, device=device))

    def __call__(self, low: float = 0.0, high: float = 1.0, count: int | None = None) -> Tensor:
        """Uniform numbers of shape (count, 1, 1, 1), one per picture unless told."""
        return (low + (high - low) * next(self._block)[:count]).to(self.dtype)

    def chance(self, share: float | Tensor, count: int | None = None) -> Tensor:
        """True with that probability, shape (count, 1, 1, 1)."""
        return next(self._block)[:count] < share

    def rows(self, share: float) -> Tensor:
        """A random choice of that share of the batch, as indices."""
        return next(self._block).flatten().argsort()[: round(share * self.batch)]

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers."""
        return torch.randn(shape, generator=self.generator, device=self.device, dtype=self.dtype)

    def uniform(self, *shape: int) -> Tensor:
        """Uniform numbers in [0, 1), float32."""
        return torch.rand(shape, generator=self.generator, device=self.device)

    def colour(self, count: int | None = None) -> Tensor:
        """Random colours of shape (count, 3, 1, 1)."""
        return self.uniform(count or self.batch, 3, 1, 1).to(self.dtype)


class Composer:
    """Training batches composed from sprites on their device; a batch is a pure function of seed, step and rank.

    Args:
        sprites: What to draw.
        size: Side of the pictures, pixels.
        seed: Of all randomness.
        recipe: Shares and strengths of the augmentation.
        smoothing: Label smoothing.
    """

    def __init__(
        self, sprites: Sprites, size: int, seed: int = 0, recipe: Recipe | None = None, smoothing: float = 0.0
    ) -> None:
        self.size, self.seed, self.recipe, self.smoothing = size, seed, recipe or Recipe(), smoothing
        self.table, self.classes = sprites.table, len(sprites.classes)
        self.device = sprites.pixels.device
        self.dtype = torch.float16 if self.device.type == "cuda" else torch.float32
        parts = [_analyse(chunk) for chunk in sprites.pixels.split(128)]
        self.planes, self.region, self.palette = (torch.cat(part) for part in zip(*parts))
        self.may_flip = mirror_safe(sprites)
        # Styles whose names begin with the same word are versions of one drawing, and share its odds.
        families = [style.partition("-")[0] for style in sprites.styles]
        related = [[float(ours == theirs) for theirs in families] for ours in families]
        self.related = torch.tensor(related, device=self.device)

    def __call__(self, step: int, batch: int, rank: int = 0) -> tuple[Tensor, Tensor]:
        """Compose a batch.

        Args:
            step: Number of the batch.
            batch: Pictures in it.
            rank: Of the process, so that processes see different pictures.

        Returns:
            Pictures (B, 3, size, size) float32 channels_last, normalised with ImageNet's mean and deviation, and soft
            targets (B, classes) float32.
        """
        images, labels = self.compose(step, batch, rank)
        targets = torch.full((batch, self.classes), self.smoothing / self.classes, device=self.device)
        targets[torch.arange(batch, device=self.device), labels] += 1 - self.smoothing
        self._mix(self._draws(step, batch, rank, 1), images, targets)
        return normalise(images), targets

    def compose(self, step: int, batch: int, rank: int = 0) -> tuple[Tensor, Tensor]:
        """Pictures (B, 3, size, size) in [0, 1], before mixing and normalisation, and their labels (B,) int64."""
        draws = self._draws(step, batch, rank, 0)
        front, labels = self._drawings(draws)
        back = paint_background(draws, self.size, self.recipe)
        self._behind(draws, front, back)
        images = torch.addcmul(front[:, :3], back, 1 - front[:, 3:])
        self._degrade(draws, images)
        return images.clamp_(0, 1), labels

    def drawings(self, step: int, batch: int, rank: int = 0) -> tuple[Tensor, Tensor]:
        """Sprites in new styles, on nothing.

        Returns:
            (B, 4, size, size) in [0, 1], colour premultiplied by alpha, and alpha; and their labels (B,) int64.
        """
        return self._drawings(self._draws(step, batch, rank, 0))

    def _drawings(self, draws: Draws) -> tuple[Tensor, Tensor]:
        batch = draws.batch
        # Without replacement: a class comes twice only when the batch is larger than the list of classes.
        labels = draws.uniform(math.ceil(batch / self.classes), self.classes).argsort(1).flatten()[:batch]
        table = self.table[labels]
        exists = (table >= 0).float()
        # The largest of powers of uniform numbers: a choice with odds of 1 to the number of versions of a drawing.
        chances = draws.uniform(*table.shape) ** (exists @ self.related).clamp_min(1)
        order = (exists + chances).argsort(1, descending=True)  # existing styles first
        rows = table.gather(1, order)
        other = rows[:, min(1, rows.shape[1] - 1)]
        return self._front(draws, rows[:, 0], other.where(other >= 0, rows[:, 0]), self.may_flip[labels]), labels

    def _draws(self, step: int, batch: int, rank: int, stream: int) -> Draws:
        return Draws(seed_of(self.seed, step, rank, stream), batch, self.device, self.dtype)

    def _front(self, draws: Draws, rows: Tensor, other: Tensor, may_flip: Tensor) -> Tensor:
        """Sprites ``rows`` warped, recoloured and outlined: (B, 4, size, size), colour premultiplied by alpha, alpha.

        The rows are in random order, so a share of the batch is simply its first part: line art, then flat, shaded.
        """
        recipe, batch = self.recipe, len(rows)
        source = self.planes[rows].to(self.dtype).div_(255)
        flat = round(recipe.flat * batch)
        line_art = round(recipe.line_art * flat)
        if flat:
            palette = self._palettes(draws, rows[:flat], line_art).transpose(1, 2)
            region = self.region[rows[:flat]].flatten(1)[:, None].expand(-1, 3, -1).long()
            source[:flat, :3] = palette.gather(2, region).view(flat, 3, SIDE, SIDE) * source[:flat, 3:4]
        if mixed := round(recipe.style_mix * batch):
            some = slice(start := round(0.6 * (batch - mixed)), start + mixed)  # flat ones and shaded ones
            field = smooth(draws.normal(mixed, 1, 3, 3), SIDE).mul_(5).add_(draws(-1, 1, mixed)).sigmoid_()
            weight = torch.where(draws.chance(0.5, mixed), draws(0.2, 0.8, mixed), field)
            source[some] = source[some].lerp(self.planes[other[some]].to(self.dtype).div_(255), weight)

        grid, zoom = self._grid(draws, may_flip)
        drawn = F.grid_sample(source, grid, align_corners=False)
        front = drawn[:, :4]
        self._recolour(draws, front)
        if recipe.outline:
            share = torch.full((batch, 1, 1, 1), recipe.outline / 2, device=self.device)
            share[:flat] = recipe.outline
            share[:line_art] = 1
            self._outline(draws, front, drawn[:, 4:5], drawn[:, 5:], zoom * (self.size / SIDE), share)
        return front

    def _palettes(self, draws: Draws, rows: Tensor, line_art: int) -> Tensor:
        """Palettes (n, colours, 3) for flat fills: jittered, partly random, the first ``line_art`` in two tones."""
        recipe, n = self.recipe, len(rows)
        palette = self.palette[rows].to(self.dtype)
        if recipe.colour:
            palette = palette + draws.normal(n, COLOURS, 3) * draws(0, 0.06, n)[..., 0]
            palette = palette + draws.normal(n, COLOURS, 1) * draws(0, 0.08, n)[..., 0]
            mean = palette.mean(2, keepdim=True)
            palette = mean + (palette - mean) * draws(0.8, 1.7, n)[..., 0]  # flat styles are more saturated
        wild = draws.chance(recipe.recolour, n)[..., 0] & (draws.uniform(n, COLOURS, 1) < 0.4)
        palette = torch.where(wild, draws.uniform(n, COLOURS, 3).to(self.dtype), palette)
        ink = palette[:line_art].mean(2, keepdim=True) < draws(0.2, 0.45, line_art)[..., 0]
        palette[:line_art] = torch.where(ink, 0.08, draws(0.85, 1, line_art)[..., 0])
        return palette.clamp_(0, 1)

    def _grid(self, draws: Draws, may_flip: Tensor) -> tuple[Tensor, Tensor]:
        """Where every output pixel reads its sprite (B, size, size, 2), and the size of the sprite in the picture."""
        recipe, strength = self.recipe, self.recipe.geometry
        angle = math.radians(20) * strength * draws(-1, 1)
        zoom = UPRIGHT * torch.exp(strength * draws(math.log(0.65), math.log(1.3)))
        shift_x, shift_y = (strength * draws(-1, 1) * ((1.05 - zoom).clamp(0) + 0.05) for _ in "xy")
        aspect, shear = torch.exp(strength * draws(-0.2, 0.2)), strength * draws(-0.2, 0.2)
        leans = draws.chance(0.4)
        lean_x, lean_y = (strength * draws(-0.25, 0.25) * leans for _ in "xy")
        mirror = 1 - 2 * (draws.chance(recipe.flip) & may_flip.view(-1, 1, 1, 1)).to(self.dtype)

        x, y = _axes(draws, self.size)
        depth = zoom * (1 + lean_x * x + lean_y * y)
        x, y = (x - shift_x) / depth, (y - shift_y) / depth
        cos, sin = angle.cos(), angle.sin()
        x, y = cos * x + sin * y, cos * y - sin * x
        grid = torch.cat([(x + shear * y) * aspect * mirror, y / aspect], dim=1)
        if recipe.warp:
            amount = draws(0.01, 0.07) * draws.chance(recipe.warp)
            grid += smooth(draws.normal(draws.batch, 2, 4, 4) * amount, self.size)
        return grid.permute(0, 2, 3, 1), zoom

    def _recolour(self, draws: Draws, front: Tensor) -> None:
        """Hue, saturation, contrast, tint, brightness, grey and negative as one colour matrix per picture, in place."""
        strength = self.recipe.colour
        if not (strength or self.recipe.grey):
            return
        n, eye = draws.batch, torch.eye(3, device=self.device, dtype=self.dtype)
        angle = strength * draws(-0.35, 0.35) * draws.chance(0.6)
        angle = torch.where(draws.chance(0.06 * strength), draws(-math.pi, math.pi), angle).view(n, 1, 1)
        twist = _constant(((0, -1, 1), (1, 0, -1), (-1, 1, 0)), self.device, self.dtype)
        hue = angle.cos() * eye + (1 - angle.cos()) / 3 + angle.sin() / 3**0.5 * twist
        saturation = torch.where(draws.chance(self.recipe.grey), 0.0, 1 + strength * draws(-0.5, 0.5)).view(n, 1, 1)
        luma = _constant((0.299, 0.587, 0.114), self.device, self.dtype)
        contrast = (1 + strength * draws(-0.35, 0.35)).view(n, 1, 1)
        contrast = torch.where(draws.chance(0.015 * strength).view(n, 1, 1), -contrast, contrast)  # a negative
        tint = 1 + strength * 0.12 * (2 * draws.colour().view(n, 3, 1) - 1)
        matrix = contrast * tint * ((saturation * eye + (1 - saturation) * luma) @ hue)
        offset = (1 - contrast) / 2 + strength * draws(-0.12, 0.12).view(n, 1, 1)
        alpha = front[:, 3:].flatten(2)
        colour = (matrix @ front[:, :3].flatten(2)).addcmul_(offset, alpha).clamp_(min=0)
        front[:, :3] = torch.minimum(colour, alpha, out=colour).view_as(front[:, :3])

    def _outline(self, draws: Draws, front: Tensor, inside: Tensor, near: Tensor, scale: Tensor, share: Tensor) -> None:
        """Lines of even width along the edge of the shape and along inner colour edges, in place.

        Args:
            draws: Random numbers.
            front: (B, 4, size, size), changed.
            inside: (B, 1, size, size), 0.5 at the edge, towards 1 inside and 0 outside.
            near: (B, 1, size, size), 1 on an inner edge and 0 far from it.
            scale: (B, 1, 1, 1), output pixels per stored pixel.
            share: (B, 1, 1, 1), the chance of either line.
        """
        width = torch.exp(draws(0, math.log(4))) * (self.size / 96)
        half = (width + 1) / 2
        from_edge = (0.5 - inside) * (2 * REACH * scale) - draws(-0.5, 0.5) * width
        line = (half - from_edge.abs()).clamp_(0, 1) * draws.chance(share)
        thinner = torch.where(draws.chance(0.5), 1.0, draws(0.4, 1))
        inner = (half * thinner - (1 - near) * (REACH * scale)).clamp_(0, 1) * draws.chance(share)
        line = torch.maximum(line, inner, out=inner)
        ink = draws.colour() * torch.where(draws.chance(0.1), 1.0, draws(0, 0.3))
        front[:, :3].lerp_(ink, line)
        front[:, 3:].lerp_(torch.ones_like(ink[:, :1]), line)

    def _behind(self, draws: Draws, front: Tensor, back: Tensor) -> None:
        """Other sprites out of focus, and soft shadows, painted into ``back``."""
        rows = draws.rows(self.recipe.clutter)
        if n := len(rows):
            scene = back[rows]
            for distance in (1, 2):
                piece = F.avg_pool2d(front[(rows + distance) % draws.batch], 4)
                x, y = _axes(draws, self.size)
                x, y = x * draws(0.8, 2, n) + draws(-1.5, 1.5, n), y * draws(0.8, 2, n) + draws(-1.5, 1.5, n)
                x, y = torch.broadcast_tensors(x, y)
                piece = F.grid_sample(piece, torch.cat([x, y], 1).permute(0, 2, 3, 1), align_corners=False)
                piece *= draws(0.4, 1, n)
                scene = torch.addcmul(piece[:, :3], scene, 1 - piece[:, 3:])
            back[rows] = scene
        rows = draws.rows(self.recipe.shadow)
        if n := len(rows):
            wide, right, down = self.size // 16 * 2 + 1, self.size // 32, self.size // 20
            shadow = F.pad(F.avg_pool2d(front[rows, 3:], wide, 1, wide // 2), (right, -right, down, -down))
            back[rows] *= 1 - shadow * draws(0.2, 0.6, n)

    def _degrade(self, draws: Draws, images: Tensor) -> None:
        """What cameras, files and other people's scaling do, each to its share of the pictures, in place."""
        recipe, size = self.recipe, self.size
        for share, change in (
            (recipe.blur, lambda x: x.lerp(F.avg_pool2d(x, 3, 1, 1, count_include_pad=False), draws(0.5, 1, len(x)))),
            (recipe.rescale, lambda x: F.interpolate(F.avg_pool2d(x, 2), (size, size), mode="bilinear")),
            (recipe.thicken / 2, lambda x: F.max_pool2d(x, 3, 1, 1)),
            (recipe.thicken / 2, lambda x: -F.max_pool2d(-x, 3, 1, 1)),
            (recipe.posterise, lambda x: _quantise(x, 1 / draws(2, 6, len(x)).round())),
            (recipe.noise, lambda x: x + draws.normal(*x.shape) * draws(0.01, 0.08, len(x))),
            (recipe.jpeg, lambda x: _block_noise(x, draws(0.01, 0.06, len(x))[..., None, None])),
            (
                recipe.cutout,
                lambda x: torch.where(_boxes(draws, size, draws(0.02, 0.2, len(x))), draws.colour(len(x)), x),
            ),
        ):
            rows = draws.rows(share)
            if len(rows):
                images[rows] = change(images[rows].clamp(0, 1))

    def _mix(self, draws: Draws, images: Tensor, targets: Tensor) -> None:
        """Cutmix and mixup with another picture of the batch, each on its share, in place."""
        rows = draws.rows(self.recipe.cutmix)
        if len(rows) > 1:
            box = _boxes(draws, self.size, draws(0.05, 0.4, len(rows)))
            _blend(images, targets, rows, box.to(self.dtype))
        rows = draws.rows(self.recipe.mixup)
        if len(rows) > 1:
            _blend(images, targets, rows, draws(0.05, 0.4, len(rows)))


def paint_background(draws: Draws, size: int, recipe: Recipe) -> Tensor:
    """Backgrounds (B, 3, size, size): white, one colour, gradients, smooth noise, stripes and checks."""
    kind = draws()
    pattern = (kind - recipe.white - recipe.plain) / max(1 - recipe.white - recipe.plain, 1e-3)  # below 0: none
    gradient, noise, checks = pattern < 0.3, (pattern >= 0.3) & (pattern < 0.6), pattern >= 0.8
    first = draws.colour()
    second = first.lerp(draws.colour(), draws(0.2, 1))
    angle, phase = draws(0, math.pi), draws(0, 2 * math.pi)
    pace = torch.where(gradient, draws(0.4, 1.3), draws(6, 25))
    x, y = _axes(draws, size)
    wave = torch.sin((angle.cos() * x + angle.sin() * y) * pace + phase)
    wave *= torch.where(checks, torch.sin((angle.cos() * y - angle.sin() * x) * pace), 1.0)
    share = (0.5 + wave * torch.where(gradient, 0.5, draws(0.5, 5))).clamp_(0, 1) * ((pattern >= 0) & ~noise)
    back = torch.lerp(first, second, share)
    back += smooth(draws.normal(draws.batch, 3, 6, 6) * (draws(0.1, 0.35) * noise), size)
    return torch.where(kind < recipe.white, 1.0, back).clamp_(0, 1)


def evaluation_batches(
    sprites: Sprites, size: int, background: str, batch: int = 512
) -> Iterator[tuple[Tensor, Tensor]]:
    """Every sprite once, upright, with a margin of 8%, on a background; the same pictures at every call.

    Args:
        sprites: What to draw.
        size: Side of the pictures, pixels.
        background: ``white``, ``grey`` or ``varied`` (no white among them).
        batch: Pictures per batch.

    Yields:
        Normalised pictures (B, 3, size, size) float32 channels_last and labels (B,) int64.
    """
    labels, styles = (sprites.table >= 0).nonzero(as_tuple=True)
    side = round(size * UPRIGHT)
    start = (size - side) // 2
    for number, (some, style) in enumerate(zip(labels.split(batch), styles.split(batch))):
        pixels = sprites.pixels[sprites.table[some, style]].float() / 255
        pixels = F.interpolate(pixels, (side, side), mode="bilinear", antialias=True)
        front = F.pad(pixels, (start, size - side - start) * 2)
        if background == "varied":
            draws = Draws(seed_of(number), len(some), front.device, torch.float32)
            back = paint_background(draws, size, Recipe(white=0.0, plain=0.3))
        else:
            back = {"white": 1.0, "grey": 0.5}[background]
        yield normalise(front[:, :3] + (1 - front[:, 3:]) * back), some


def normalise(images: Tensor) -> Tensor:
    """Pictures in [0, 1] with ImageNet's mean and deviation taken out, float32 channels_last."""
    mean, std = (_constant(v, images.device, images.dtype) for v in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    return ((images - mean.view(3, 1, 1)) / std.view(3, 1, 1)).to(torch.float32, memory_format=torch.channels_last)


@functools.lru_cache
def _constant(values: tuple, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Kept, because making a tensor from Python numbers on a GPU waits for all the work queued before it."""
    return torch.tensor(values, device=device, dtype=dtype)


def smooth(field: Tensor, size: int) -> Tensor:
    """A field (B, C, k, k) interpolated to (B, C, size, size) by cubic splines, as two small matrix products."""
    cells = field.shape[-1]
    knots = torch.eye(cells, device=field.device)[None, None]
    basis = F.interpolate(knots, (size, cells), mode="bicubic", align_corners=True)[0, 0].to(field.dtype)
    return basis @ field @ basis.T


def _axes(draws: Draws, size: int) -> tuple[Tensor, Tensor]:
    """Pixel centres in [-1, 1]: x (1, 1, 1, size) and y (1, 1, size, 1)."""
    line = ((torch.arange(size, device=draws.device) + 0.5) * (2 / size) - 1).to(draws.dtype)
    return line.view(1, 1, 1, size), line.view(1, 1, size, 1)


def _boxes(draws: Draws, size: int, area: Tensor) -> Tensor:
    """Rectangles as masks (n, 1, size, size) that cover about ``area`` (n, 1, 1, 1) of the picture."""
    x, y = _axes(draws, size)
    n, aspect = len(area), torch.exp(draws(-0.5, 0.5, len(area)))
    across = (x - draws(-0.8, 0.8, n)).abs() < area.sqrt() * aspect
    return across & ((y - draws(-0.8, 0.8, n)).abs() < area.sqrt() / aspect)


def _blend(images: Tensor, targets: Tensor, rows: Tensor, weight: Tensor) -> None:
    """Put the next of ``rows`` into each with ``weight`` (n, 1, 1, 1) or (n, 1, size, size), targets in proportion."""
    images[rows] = images[rows].lerp(images[rows.roll(1)], weight)
    targets[rows] = targets[rows].lerp(targets[rows.roll(1)], weight.float().mean((1, 2, 3))[:, None])


def _quantise(values: Tensor, step: Tensor) -> Tensor:
    return (values / step).round_() * step


def _block_noise(images: Tensor, step: Tensor) -> Tensor:
    """What JPEG leaves: 8 x 8 cosine coefficients rounded, higher frequencies more coarsely (whole blocks only)."""
    n, _, size, _ = images.shape
    blocks = size // 8
    i = torch.arange(8, device=images.device)
    cosine = torch.cos(math.pi / 8 * (i[None] + 0.5) * i[:, None]) / torch.where(i > 0, 2, 8**0.5)[:, None]
    cosine = cosine.to(images.dtype)
    tiles = images[..., : blocks * 8, : blocks * 8].reshape(n, 3, blocks, 8, blocks, 8).transpose(3, 4)
    rounded = _quantise(cosine @ tiles @ cosine.T, step * (1 + i[None] + i[:, None]).to(images.dtype))
    images[..., : blocks * 8, : blocks * 8] = (
        (cosine.T @ rounded @ cosine).transpose(3, 4).reshape(n, 3, blocks * 8, -1)
    )
    return images


def mirror_safe(sprites: Sprites) -> Tensor:
    """Which classes may be mirrored (classes,) bool: those whose mirror image is not (nearly) another class.

    Left and right arrows, waxing and waning moons and the hours of a clock are told apart by their side; the sign is
    that the mirror image of one class is much nearer to another class than to itself, in a third of its styles.
    """
    small = F.avg_pool2d(sprites.pixels.float() / 255, SIDE // 16)
    nearer = torch.zeros(len(sprites.classes), device=small.device)
    for column in sprites.table.T:
        present = column >= 0
        own = small[column[present]]
        distance = torch.cdist(own.flip(3).flatten(1), own.flatten(1))
        mirrored = distance.diagonal().clone()
        distance.fill_diagonal_(torch.inf)
        nearer[present] += distance.amin(1) <= 0.4 * mirrored
    return nearer < (sprites.table >= 0).sum(1) / 3


@torch.no_grad()
def _analyse(pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What is worked out once per sprite.

    Args:
        pixels: (n, 4, 128, 128) uint8, premultiplied.

    Returns:
        Planes (n, 6, 128, 128) uint8: the sprite slightly blurred (so that shrinking it does not alias), insideness
        (128 at the edge of the shape) and nearness of inner edges; the palette entry of every pixel (n, 128, 128)
        uint8; and the palettes (n, colours, 3) float32.
    """
    rgba = pixels.float() / 255
    alpha = rgba[:, 3]
    region, palette = _regions(rgba)
    flat = palette.gather(1, region.flatten(1)[..., None].expand(-1, -1, 3)).transpose(1, 2).view(-1, 3, SIDE, SIDE)
    shape = alpha > 0.5
    edge = torch.zeros_like(shape)
    for axis, before, after in ((1, slice(None, -1), slice(1, None)), (2, slice(None, -1), slice(1, None))):
        a = (slice(None),) * axis + (before,)
        b = (slice(None),) * axis + (after,)
        differs = (flat.movedim(1, -1)[a] - flat.movedim(1, -1)[b]).norm(dim=-1) > EDGE
        differs &= shape[a] & shape[b]
        edge[a] |= differs
        edge[b] |= differs
    signed = _distance(shape) - _distance(~shape)  # positive outside
    inside = 0.5 - signed.clamp(-REACH, REACH) / (2 * REACH)
    near = 1 - _distance(edge) / REACH
    maps = F.avg_pool2d(torch.stack([inside, near], 1), 3, 1, 1, count_include_pad=False)
    soft = F.avg_pool2d(F.pad(F.avg_pool2d(rgba, 2, 1), (1, 1, 1, 1)), 2, 1)
    return torch.cat([soft, maps], 1).mul(255).round().byte(), region.byte(), palette


def _regions(rgba: Tensor) -> tuple[Tensor, Tensor]:
    """k-means over the colours of each sprite, smoothed by a majority vote over 5 x 5 pixels.

    Args:
        rgba: (n, 4, 128, 128), premultiplied, in [0, 1].

    Returns:
        The entry of every pixel (n, 128, 128) int64 and the palettes (n, colours, 3).
    """

    def unmixed(x: Tensor) -> tuple[Tensor, Tensor]:
        """Colours (n, pixels, 3), brightness counting less so that shading does not split a fill; alpha (n, pixels)."""
        colour = (x[:, :3] / x[:, 3:].clamp_min(1 / 255)).flatten(2).transpose(1, 2)
        return colour - SHADE * colour.mean(2, keepdim=True), x[:, 3].flatten(1)

    colour, weight = unmixed(F.avg_pool2d(rgba, 2))
    weight = (weight > 0.9).float() + 1e-6
    centres = (colour * weight[..., None]).sum(1, keepdim=True) / weight.sum(1)[:, None, None]
    for _ in range(COLOURS - 1):  # start from colours far apart, so that small parts such as eyes get their own
        worst = (torch.cdist(colour, centres).amin(2) * weight).argmax(1)
        centres = torch.cat([centres, colour[torch.arange(len(colour)), worst][:, None]], 1)
    for _ in range(6):
        member = F.one_hot(torch.cdist(colour, centres).argmin(2), COLOURS) * weight[..., None]
        total = member.sum(1)[..., None]
        centres = torch.where(total > 1e-3, member.transpose(1, 2) @ colour / total.clamp_min(1e-6), centres)
    colour, weight = unmixed(rgba)
    member = F.one_hot(torch.cdist(colour, centres).argmin(2), COLOURS) * (weight[..., None] + 1e-3)
    votes = F.avg_pool2d(member.transpose(1, 2).reshape(-1, COLOURS, SIDE, SIDE), 5, 1, 2)
    return votes.argmax(1), centres + centres.mean(2, keepdim=True) * (SHADE / (1 - SHADE))


def _distance(mask: Tensor) -> Tensor:
    """Distance in pixels to the nearest set pixel of (n, H, W), exact up to ``REACH`` and that beyond."""
    squared = torch.where(mask, 0.0, 2.0 * REACH**2)
    for axis in (1, 2):
        size = squared.shape[axis]
        padded = F.pad(squared, (0, 0, REACH, REACH) if axis == 1 else (REACH, REACH), value=2.0 * REACH**2)
        shifts = ((padded.narrow(axis, REACH + d, size) + d * d) for d in range(-REACH, REACH + 1))
        squared = functools.reduce(torch.minimum, shifts)
    return squared.sqrt().clamp(max=REACH)
