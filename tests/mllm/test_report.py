"""What a handle tells of the last prompt: numbers, and a picture of what was kept of a picture."""

import numpy as np
import pytest
import torch
from against_plain import IMAGE, generated, logits, seen_by_layers
from PIL import Image

from zoo.mllm import DecoderShape, accelerate, kv_bytes
from zoo.mllm.plots import draw_kept, grid_of

pytest.importorskip("matplotlib")
REDUCE = ["uniform:keep=0.5", "fastv:layer=2,keep=0.5", "pyramiddrop:layers=4,keep=0.5"]


def test_the_report(llava, llava_batch):
    inputs = llava_batch(3)
    with accelerate(llava, REDUCE) as handle:
        with pytest.raises(RuntimeError, match="There is nothing to report: run the model first"):
            handle.report()
        _, _, cache = generated(llava, inputs, 4)
        report = handle.report()
        assert report["visual_tokens"] == 32
        assert report["visual_tokens_per_layer"] == [16, 16, 8, 8, 4]
        lengths = [layer.keys.shape[2] - 3 for layer in cache.layers]
        assert report["kv_bytes"] == kv_bytes(DecoderShape.from_config(llava.config), [3 * one for one in lengths], 4)
        assert report["prefill_seconds"] > 0 and len(report["decode_seconds"]) == 3
        assert all(one > 0 for one in report["decode_seconds"]) and "peak_bytes" not in report
        llava(**inputs, use_cache=False)
        assert handle.report()["kv_bytes"] is None and handle.report()["decode_seconds"] == []


def test_places_are_positions_in_the_prompt(llava, llava_batch):
    with accelerate(llava, REDUCE[1:]) as handle:  # the first layers see padding too
        logits(llava, llava_batch(3))
        seen = seen_by_layers(handle)
        for row in range(3):
            assert torch.equal(handle.last.places(row, 5), seen[:, row] & handle.last.layout.valid[row])


def shades(path, monkeypatch, draw):
    """The numbers of the bars, and for each picture and shown layer the title and what is darkened."""
    from matplotlib.axes import Axes

    bars, seen = [], []
    show, bar = Axes.imshow, Axes.bar

    def imshow(self, image, **kwargs):
        if image.shape[-1] == 4:
            seen.append((self, image[..., 3] > 0))
        return show(self, image, **kwargs)

    monkeypatch.setattr(Axes, "imshow", imshow)
    monkeypatch.setattr(Axes, "bar", lambda self, x, height: bars.extend(height) or bar(self, x, height))
    draw()
    with Image.open(path) as made:
        made.load()
        assert made.format == "PNG"
    assert [one.name for one in path.parent.iterdir()] == [path.name]
    return bars, [(axis.get_title(), dark) for axis, dark in seen]


def test_the_plot_darkens_what_is_dropped(llava, llava_batch, tmp_path, monkeypatch):
    inputs, path = llava_batch(3), tmp_path / "kept.png"
    picture = Image.fromarray(np.full((64, 64, 3), 255, np.uint8))
    with accelerate(llava, REDUCE) as handle:
        with pytest.raises(RuntimeError, match="There is nothing to plot: run the model first"):
            handle.plot(path)
        logits(llava, inputs)
        seen = seen_by_layers(handle)[:, 1, inputs["input_ids"][1] == IMAGE]
        bars, dark = shades(path, monkeypatch, lambda: handle.plot(path, [picture], row=1))
    assert bars == [8, 8, 4, 4, 2]
    assert [title for title, _ in dark] == ["layer 0: 8", "layer 2: 4", "layer 4: 2"]
    for layer, (_, shade) in zip((0, 2, 4), dark):
        assert np.array_equal(shade, ~seen[layer].view(4, 4).numpy())


def test_a_plot_of_two_pictures_and_many_steps(tmp_path, monkeypatch):
    """At most four layers of a picture, the last among them."""
    seen = torch.ones(8, 14, dtype=torch.bool)
    for layer in range(1, 8):
        seen[layer:, layer] = False
    image = torch.tensor([-1, *[0] * 4, -1, *[1] * 8])
    pictures = [np.zeros((10, 10, 3), np.uint8), Image.new("L", (20, 10))]
    path = tmp_path / "kept.png"
    bars, dark = shades(path, monkeypatch, lambda: draw_kept(path, seen, image, pictures))
    assert bars == [12, 11, 10, 9, 8, 8, 7, 6]
    assert [title for title, _ in dark[:4]] == ["layer 0: 4", "layer 1: 3", "layer 2: 2", "layer 7: 0"]
    assert [shade.shape for _, shade in dark] == [(2, 2)] * 4 + [(2, 4)] * 4
    assert dark[-1][1].tolist() == [[True, True, False, False], [False] * 4]


def test_what_cannot_be_drawn_is_named(tmp_path):
    seen, image = torch.ones(2, 5, dtype=torch.bool), torch.tensor([-1, 0, 0, 0, 0])
    with pytest.raises(ValueError, match="There are 2 pictures, but the prompt has 1 images: give all of them"):
        draw_kept(tmp_path / "kept.png", seen, image, [Image.new("RGB", (4, 4))] * 2)
    with pytest.raises(ValueError, match="The 17 tokens of a picture of 100 x 100 form no grid: plot without pictures"):
        grid_of(17, 100, 100)
    assert not list(tmp_path.iterdir())
    assert grid_of(12, 80, 60) == (3, 4) and grid_of(12, 60, 80) == (4, 3) and grid_of(16, 300, 100) == (4, 4)
