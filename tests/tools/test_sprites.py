"""The compositor against plain formulas, and what its batches promise."""

import dataclasses
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

from zoo.tools import sprites as S

MEAN, STD = (torch.tensor(v).view(1, 3, 1, 1) for v in (S.IMAGENET_DEFAULT_MEAN, S.IMAGENET_DEFAULT_STD))


def save_sprite(path, colour, shape="ellipse", box=(20, 20, 107, 107), inner=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGBA", (128, 128))
    draw = ImageDraw.Draw(image)
    getattr(draw, shape)(box, fill=colour)
    if inner:
        draw.rectangle((50, 50, 77, 77), fill=inner)
    image.save(path)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Three classes of flat colours in two styles; the last class lacks one."""
    root = tmp_path_factory.mktemp("sprites")
    for name, colour in (("blue", (0, 0, 255)), ("green", (0, 255, 0)), ("red", (255, 0, 0))):
        save_sprite(root / name / "one.png", (*colour, 255), inner=(255, 255, 0, 255))
        if name != "red":
            save_sprite(root / name / "two.png", (*colour, 128), "rectangle")
    return root


@pytest.fixture(scope="module")
def sprites(root):
    return S.load_sprites(root)


def test_load_reads_classes_styles_and_absences(sprites):
    assert sprites.classes == ["blue", "green", "red"]
    assert sprites.styles == ["one", "two"]
    assert (sprites.table >= 0).tolist() == [[True, True], [True, True], [True, False]]
    centre = sprites.pixels[sprites.table[1, 1], :, 64, 64].tolist()
    assert centre == [0, 128, 0, 128]  # premultiplied
    assert not sprites.pixels[:, :, : S.BORDER].any()


def test_load_names_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match="no sprites in"):
        S.load_sprites(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "one.png").write_text("not a picture")
    with pytest.raises(ValueError, match=r"one\.png is not a readable picture"):
        S.load_sprites(tmp_path)


def resized(rgba, side):
    """Triangle-filtered reduction of a premultiplied (4, 128, 128) array, written out as a matrix product."""
    scale = S.SIDE / side
    centres = (np.arange(side) + 0.5) * scale
    weights = np.maximum(0, 1 - np.abs(np.arange(S.SIDE) + 0.5 - centres[:, None]) / scale)
    weights /= weights.sum(1, keepdims=True)
    return weights @ rgba @ weights.T


@pytest.mark.parametrize(("background", "value"), [("white", 1.0), ("grey", 0.5)])
def test_evaluation_is_alpha_compositing(sprites, background, value):
    images, labels = next(S.evaluation_batches(sprites, 96, background))
    assert labels.tolist() == [0, 0, 1, 1, 2]
    side = round(96 * S.UPRIGHT)
    pad = (96 - side) // 2
    for image, row in zip(images * STD + MEAN, sprites.table[sprites.table >= 0]):
        small = np.zeros((4, 96, 96))
        small[:, pad : pad + side, pad : pad + side] = resized(sprites.pixels[row].double().numpy() / 255, side)
        np.testing.assert_allclose(image.numpy(), small[:3] + (1 - small[3:]) * value, atol=2e-3)


def test_evaluation_backgrounds_vary_but_not_between_calls(sprites):
    (first, _), (again, _) = (next(S.evaluation_batches(sprites, 32, "varied")) for _ in range(2))
    assert torch.equal(first, again)
    assert first[:, :, 0, 0].unique(dim=0).shape[0] == 5


def test_plain_composition_is_alpha_compositing(sprites):
    """With all randomness off, a picture is the stored sprite, slightly blurred, sampled upright over white."""
    composer = S.Composer(sprites, 64, recipe=S.PLAIN)
    images, labels = composer.compose(0, 3)
    pixels = (np.arange(64) + 0.5) / 64 * 2 - 1
    at = ((pixels / S.UPRIGHT + 1) * S.SIDE - 1) / 2  # where an output pixel lies in the stored sprite
    weights = np.maximum(0, 1 - np.abs(np.arange(S.SIDE) - at[:, None]))  # bilinear
    kernel = sum(w * np.eye(S.SIDE, k=k) for w, k in ((0.25, -1), (0.5, 0), (0.25, 1)))
    for image, label in zip(images, labels):
        expected = []
        for row in sprites.table[label][sprites.table[label] >= 0]:
            rgba = (weights @ kernel) @ (sprites.pixels[row].double().numpy() / 255) @ (weights @ kernel).T
            expected.append(rgba[:3] + (1 - rgba[3:]))
        assert min(np.abs(image.numpy() - e).max() for e in expected) < 6e-3


def test_labels_belong_to_the_pictures(sprites):
    images, labels = S.Composer(sprites, 32, recipe=S.PLAIN).compose(3, 60)
    assert sorted(labels.bincount().tolist()) == [20, 20, 20]
    centre_edge = images[:, :, 16, 8]  # inside every shape, outside the inner square
    assert torch.equal(centre_edge.argmax(1), 2 - labels)


def test_absent_styles_are_never_drawn(sprites):
    drawn = []

    class Spy(S.Composer):
        def _front(self, draws, rows, other, may_flip):
            drawn.append(torch.stack([rows, other]))
            return super()._front(draws, rows, other, may_flip)

    composer = Spy(sprites, 16)
    for step in range(5):
        composer.compose(step, 30)
    rows = torch.cat(drawn, 1)
    assert rows.min() >= 0
    assert set(rows.flatten().tolist()) == set(range(5))  # and those that exist all are
    styles = (sprites.table[:, None, :] == rows[0][None, :, None]).any(0).float().mean(0)
    assert styles.min() > 0.2


def test_versions_of_one_drawing_share_its_odds(tmp_path):
    for style in ("noto", "fluent-3d", "fluent-flat", "fluent-modern"):
        save_sprite(tmp_path / "a" / f"{style}.png", (255, 0, 0, 255))
    save_sprite(tmp_path / "b" / "noto.png", (255, 0, 0, 255))
    sprites = S.load_sprites(tmp_path)
    drawn = []

    class Spy(S.Composer):
        def _front(self, draws, rows, other, may_flip):
            drawn.append(rows)
            return super()._front(draws, rows, other, may_flip)

    Spy(sprites, 8, recipe=S.PLAIN).compose(0, 4000)
    counts = drawn[0].bincount(minlength=5)[sprites.table[0]]  # of the 2,000 pictures of a
    assert dict(zip(sprites.styles, (counts / 2000).tolist())) == {
        "fluent-3d": pytest.approx(1 / 6, abs=0.03),
        "fluent-flat": pytest.approx(1 / 6, abs=0.03),
        "fluent-modern": pytest.approx(1 / 6, abs=0.03),
        "noto": pytest.approx(1 / 2, abs=0.04),
    }


def test_a_batch_is_a_function_of_seed_step_and_rank(sprites):
    composer, twin = S.Composer(sprites, 32, seed=7), S.Composer(sprites, 32, seed=7)
    composer(0, 8)
    torch.manual_seed(123)  # neither earlier batches nor the global generator matter
    images, targets = composer(5, 16)
    again, same = twin(5, 16)
    assert torch.equal(images, again)
    assert torch.equal(targets, same)
    for other in (composer(6, 16)[0], composer(5, 16, rank=1)[0], S.Composer(sprites, 32, seed=8)(5, 16)[0]):
        assert not torch.allclose(images, other)


def test_batch_format(sprites):
    images, targets = S.Composer(sprites, 40, smoothing=0.1)(0, 33)
    assert images.shape == (33, 3, 40, 40)
    assert images.dtype == torch.float32
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert torch.isfinite(images).all()
    assert ((images * STD + MEAN) > -1e-5).all()
    assert ((images * STD + MEAN) < 1 + 1e-5).all()
    torch.testing.assert_close(targets.sum(1), torch.ones(33))
    plain = S.Composer(sprites, 16, recipe=S.PLAIN, smoothing=0.1)(0, 3)[1]
    torch.testing.assert_close(plain.sort(1).values, torch.tensor([[1 / 30, 1 / 30, 0.9 + 1 / 30]]).expand(3, 3))


def test_mixing_mixes_targets_in_proportion(sprites):
    recipe = dataclasses.replace(S.PLAIN, mixup=1.0)
    composer = S.Composer(sprites, 16, recipe=recipe)
    images, labels = composer.compose(0, 12)
    mixed, targets = composer(0, 12)
    mixed = mixed * STD + MEAN
    assert (targets.max(1).values < 1).any()
    everything = images.reshape(12, -1)
    for picture, target, label, own in zip(mixed, targets, labels, everything):
        weight = 1 - target[label]
        if 0 < weight < 0.41:
            partner = (picture.flatten() - (1 - weight) * own) / weight  # what must have been mixed in
            assert (everything - partner).abs().amax(1).min() < 1e-3


def test_outlines_are_only_near_edges(root, sprites):
    plain = S.Composer(sprites, 96, recipe=S.PLAIN)
    lined = S.Composer(sprites, 96, recipe=dataclasses.replace(S.PLAIN, outline=2.0))  # half as often where not flat
    for step in range(4):
        before, labels = plain.compose(step, 3)
        after, same = lined.compose(step, 3)
        assert torch.equal(labels, same)
        changed = (before - after).abs().amax(1, keepdim=True) > 0.02
        low, high = (sign * F.max_pool2d(sign * before, 3, 1, 1) for sign in (-1, 1))
        edge = (high - low).amax(1, keepdim=True) > 0.1
        near = F.max_pool2d(edge.float(), 13, 1, 6) > 0
        assert changed.float().mean() > 0.01
        assert not (changed & ~near).any()


def test_line_width_is_the_same_at_every_size_of_the_sprite(tmp_path):
    """A line is a threshold on a distance in output pixels: a sprite half as large gets lines as wide."""
    save_sprite(tmp_path / "a" / "x.png", (255, 255, 255, 255), "rectangle", (20, 20, 107, 107))
    composer = S.Composer(S.load_sprites(tmp_path), 96, recipe=S.PLAIN)
    areas = {}
    for zoom in (0.5, 1.0):
        source = composer.planes[:1].float() / 255
        theta = torch.tensor([[[1 / zoom, 0, 0], [0, 1 / zoom, 0]]])
        drawn = F.grid_sample(source, F.affine_grid(theta, (1, 6, 96, 96), align_corners=False), align_corners=False)
        front = drawn[:, :4].clone()
        draws = S.Draws(3, 1, torch.device("cpu"), torch.float32)
        scale = torch.full((1, 1, 1, 1), zoom * 96 / S.SIDE)
        composer._outline(draws, front, drawn[:, 4:5], drawn[:, 5:], scale, torch.ones(1, 1, 1, 1))
        line = (front[:, :3] - front[:, 3:]).abs().amax(1) > 0.3  # not white
        side = drawn[:, 3].amax(1).sum()
        areas[zoom] = float(line.sum() / side)
    assert areas[0.5] == pytest.approx(areas[1.0], rel=0.25)


def test_mirror_images_of_each_other_are_not_flipped(tmp_path):
    for name, points in (
        ("left", [(10, 64), (110, 20), (110, 108)]),
        ("right", [(117, 64), (17, 20), (17, 108)]),
        ("up", [(64, 10), (20, 110), (108, 110)]),
        ("pen", [(20, 10), (10, 20), (108, 118), (118, 108)]),  # leans, as other things may, and may be turned round
    ):
        (tmp_path / name).mkdir()
        image = Image.new("RGBA", (128, 128))
        ImageDraw.Draw(image).polygon(points, fill=(200, 30, 30, 255))
        for style in ("one", "two", "three", "four"):
            image.save(tmp_path / name / f"{style}.png")
    shutil.copy(tmp_path / "right" / "one.png", tmp_path / "left" / "one.png")  # one style that is unlike the others
    sprites = S.load_sprites(tmp_path)
    assert dict(zip(sprites.classes, S.mirror_safe(sprites).tolist())) == {
        "left": False, "right": False, "up": True, "pen": True,
    }  # fmt: skip


def test_distance_is_exact_up_to_its_reach():
    mask = torch.zeros(1, 40, 40, dtype=torch.bool)
    mask[0, 12, 7] = mask[0, 30, 33] = True
    y, x = torch.meshgrid(torch.arange(40), torch.arange(40), indexing="ij")
    expected = torch.minimum(((y - 12) ** 2 + (x - 7) ** 2), ((y - 30) ** 2 + (x - 33) ** 2)).float().sqrt()
    torch.testing.assert_close(S._distance(mask)[0], expected.clamp(max=S.REACH))


def test_regions_find_the_fills_and_their_colours(sprites):
    rgba = sprites.pixels[sprites.table[2, 0]][None].float() / 255
    region, palette = S._regions(rgba)
    centre, ring = palette[0, region[0, 64, 64]], palette[0, region[0, 64, 36]]
    torch.testing.assert_close(centre, torch.tensor([1.0, 1.0, 0.0]), atol=0.05, rtol=0)
    torch.testing.assert_close(ring, torch.tensor([1.0, 0.0, 0.0]), atol=0.05, rtol=0)


def test_jpeg_like_noise_keeps_flat_blocks_and_rounds_detail():
    torch.manual_seed(0)
    images = torch.rand(2, 3, 20, 20)
    images[0] = 0.5
    changed = S._block_noise(images.clone(), torch.full((2, 1, 1, 1, 1, 1), 0.02))
    assert (changed[0] - 0.5).abs().max() < 0.02
    assert 0.005 < (changed[1] - images[1])[:, :16, :16].abs().mean() < 0.2
    assert torch.equal(changed[1, :, 16:], images[1, :, 16:])  # whole blocks only
