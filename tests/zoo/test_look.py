"""`zoo look`: rows of attention against whole matrices, class-activation maps by hand, the drawing, and the command."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from typer.testing import CliRunner

import zoo as package
from zoo import cli
from zoo.kernels.gated_linear_attention.reference import gated_linear_attention_reference
from zoo.kernels.linear_attention.reference import linear_attention_reference
from zoo.look import attention_from, class_map, layers_of, look, overview, receptive_field
from zoo.look.panels import EDGE, map_panel, marked, upsampled
from zoo.look.place import token_at
from zoo.sheet import GAP, MARGIN

SAMPLES = Path(package.__file__).parent / "samples"
PIZZA = str(SAMPLES / "pizza.jpg")
SIZE = (97, 61)  # of a picture, width and height


def made(name, dtype=torch.float64):
    """A model whose attention is far from even: all matrices are larger than they begin."""
    torch.manual_seed(0)
    model = timm.create_model(name).eval().to(dtype)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight.mul_(6)
    return model


def pixels(height=64, width=96, dtype=torch.float64):
    return torch.randn(1, 3, height, width, dtype=dtype, generator=torch.Generator().manual_seed(1))


# ---- rows of attention


def matrices(name, layer, x):
    """Every token's row (N, heads, N), by direction, as the result of values that are the unit vectors."""
    tokens, heads = x[..., 0].numel(), layer.num_heads
    unit = torch.eye(tokens, dtype=x.dtype)[None, :, None].expand(1, -1, heads, -1)

    def split(y):
        return y.reshape(1, tokens, heads, -1)

    if "vig" in name:
        s = layer.act(layer.local(x)).flatten(1, 2)
        C = s.shape[2]
        q, k, _ = map(split, layer.qkv(s).split([C // 2, C // 2, C], -1))
        ahead, back = map(split, (nn.functional.logsigmoid(layer.decay(s)) / 16).chunk(2, -1))
        in_order, _ = gated_linear_attention_reference(q, k, unit, ahead, scale=layer.scale)
        q, k, unit, back = (y.flip(1) for y in (q, k, unit, back))
        in_reverse, _ = gated_linear_attention_reference(q, k, unit, back, scale=layer.scale)
        return {"in order": in_order[0], "in reverse": in_reverse[0].flip(0)}
    projected = layer.qkvo(x) if "ravlt" in name else layer.qkv(x)
    C = x.shape[-1]
    q, k = split(projected[..., :C]), projected[..., C : 2 * C]
    k = split(layer.position(k) if hasattr(layer, "position") else k)
    grid = tuple(x.shape[1:3])
    form = {
        "ravlt": {"token_weights": True, "grid": grid},
        "slab": {"feature_map": "relu"},
        "inline": {"feature_map": "identity", "normalisation": "subtraction", "scale": layer.head_dim**-0.5},
        "lightnet": {"feature_map": "silu", "normalisation": "keys", "grid": grid, "rotary_across_heads": True},
    }[name.split("_")[1]]
    return {"": linear_attention_reference(q, k, unit, **form)[0]}


FAMILIES = (
    "test_ravlt",
    "test_slab",
    "test_slab_deit",
    "test_slab_cswin",
    "test_inline",
    "test_inline_deit",
    "test_inline_cswin",
    "test_lightnet",
    "test_vig",
    "test_vig_h",
)


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_are_those_of_the_matrix(name):
    model, x = made(name), pixels()
    layers = layers_of(model)
    checked = 0
    for layer in (next(iter(layers.values())), list(layers.values())[-1]):
        inputs = []
        with layer.register_forward_pre_hook(lambda _, args, kept=inputs: kept.append(args)), torch.no_grad():
            model(x)
        tokens, *others = inputs[0]
        height, width = grid = others if tokens.ndim == 3 else tokens.shape[1:3]
        if "slab_deit" in name:
            tokens = tokens.unflatten(1, grid)
        with torch.no_grad():
            expected = matrices(name, layer, tokens)
        prefix = next(iter(expected.values())).shape[0] - height * width
        assert prefix == (name == "test_inline_deit")
        for point in ((0, 0), (96, 60), (40, 22)):
            found = attention_from(model, layer, x, point, SIZE)
            row, column = token_at(point, SIZE, (height, width))
            assert found.rows.keys() == expected.keys()
            for way, matrix in expected.items():
                whole = matrix[prefix + row * width + column]  # (heads, N)
                torch.testing.assert_close(
                    found.rows[way], whole[:, prefix:].unflatten(1, (height, width)), rtol=1e-9, atol=1e-12
                )
                assert whole.std() > 0.02 * whole.abs().mean()  # nothing would be shown by even rows
            total = sum(matrix[prefix + row * width + column] for matrix in expected.values())
            torch.testing.assert_close(found.prefix, total[:, :prefix].sum(1), rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(found.whole.sum((1, 2)) + found.prefix, total.sum(1), rtol=1e-9, atol=1e-12)
            checked += 1
    assert checked == 6


def test_rows_of_injective_attention_sum_to_one_and_may_be_negative():
    model = made("test_inline_deit")
    layer = list(layers_of(model).values())[-1]
    found = [attention_from(model, layer, pixels(), point, SIZE) for point in ((0, 0), (90, 10), (50, 50))]
    for attention in found:
        sums = attention.whole.sum((1, 2)) + attention.prefix
        torch.testing.assert_close(sums, torch.ones_like(sums), rtol=1e-12, atol=1e-12)
    assert min(attention.whole.min() for attention in found) < 0


def test_directions_look_ahead_and_back():
    model = made("test_vig")
    layer = next(iter(layers_of(model).values()))
    rows = attention_from(model, layer, pixels(), (50, 30), SIZE).rows
    row, column = token_at((50, 30), SIZE, (4, 6))
    token = row * 6 + column
    before, after = rows["in order"].flatten(1), rows["in reverse"].flatten(1)
    assert (before[:, token + 1 :] == 0).all() and (before[:, : token + 1] != 0).all()
    assert (after[:, :token] == 0).all() and (after[:, token:] != 0).all()
    torch.testing.assert_close(before[:, token], after[:, token])  # a token's own value is in both with one weight


class Largest(TorchDispatchMode):
    """The most numbers that a result has."""

    numbers = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else [result]:
            if isinstance(x, torch.Tensor):
                self.numbers = max(self.numbers, x.numel())
        return result


@pytest.mark.parametrize("name", ["test_ravlt", "test_vig_h"])
def test_there_is_no_matrix_of_tokens(name):
    model = made(name, torch.float32)
    layer, tokens = next(iter(layers_of(model).values())), 48 * 48
    with Largest() as largest:
        attention = attention_from(model, layer, pixels(192, 192, torch.float32), (5, 5), (192, 192))
    assert attention.whole[0].numel() == tokens
    assert 0 < largest.numbers < tokens**2 / 8


def test_layers():
    assert list(layers_of(timm.create_model("test_ravlt"))) == ["stages.0.blocks.0.mixer", "stages.1.blocks.0.mixer"]
    assert list(layers_of(timm.create_model("test_van")))[-1] == "stages.3.blocks.0.mixer.attn"
    assert "stages.2.blocks.1.mixer" not in layers_of(timm.create_model("test_inline"))  # windows of softmax attention
    assert not layers_of(timm.create_model("test_resnet"))


def test_a_point_and_its_token():
    def at(*point):
        return token_at(point, SIZE, (2, 3))

    assert at(0, 0) == (0, 0) and at(96, 60) == (1, 2)
    assert at(31, 29) == (0, 0) and at(32, 29) == (0, 1)  # 97 / 3 is 32.33: the middle of pixel 32 is beyond
    assert at(64, 29) == (0, 1) and at(65, 30) == (1, 2)
    assert token_at((2, 1), (3, 2), (20, 30)) == (15, 25)  # more tokens than pixels
    for outside in ((97, 0), (0, 61), (-1, 0), (0, -1)):
        with pytest.raises(ValueError, match=rf"point {outside[0]},{outside[1]} is outside .* 97 x 61: .* 96,60\.$"):
            at(*outside)


# ---- receptive field


def test_the_receptive_field_is_how_much_pixels_move_a_result():
    model, x = made("test_van"), pixels(128, 128)
    layer = next(iter(layers_of(model).values()))
    point, kept = (70, 40), []
    field = receptive_field(model, layer, x, point, (128, 128))
    layer.register_forward_hook(lambda _, inputs, result: kept.append(result))
    row, column = token_at(point, (128, 128), (32, 32))
    for y, pixel in ((40, 70), (30, 90), (45, 66)):
        slopes = []
        for colour in range(3):
            for step in (1e-5, -1e-5):
                moved = x.clone()
                moved[0, colour, y, pixel] += step
                with torch.no_grad():
                    model(moved)
            up, down = (result[0, row, column].sum() for result in kept[-2:])
            slopes.append(abs(up - down).item() / 2e-5)
        assert sum(slopes) > 0 and field[y, pixel].item() == pytest.approx(sum(slopes), rel=1e-5)
    far = 4 * (2 + 9 + 1) + 4  # 5 x 5, then 7 x 7 with gaps of 3, on tokens of 4 pixels, after a stem of 7 x 7
    seen = field.nonzero()
    assert (seen - torch.tensor([40, 70])).abs().max() <= far
    assert (field[40 - 20 : 40 + 20, 70 - 20 : 70 + 20] > 0).float().mean() > 0.9


# ---- class-activation maps


def test_cam_by_hand():
    model, x = made("test_van"), pixels()
    found = class_map(model, x, 7)
    with torch.no_grad():
        features, logit = model.forward_features(x)[0], model(x)[0, 7]
    by_hand = torch.zeros(2, 3, dtype=torch.float64)
    for channel, weight in enumerate(model.head.fc.weight[7].tolist()):
        by_hand += weight * features[channel]
    assert found.exact
    torch.testing.assert_close(found.map, by_hand)
    torch.testing.assert_close(found.map.mean() + model.head.fc.bias[7], logit)
    assert found.map.min() < 0 < found.map.max()


def test_grad_cam_by_hand():
    model, x = made("test_convnext"), pixels()  # of timm, with a norm after its pooling
    found = class_map(model, x, 3)
    features = model.forward_features(x).detach().requires_grad_()
    (slope,) = torch.autograd.grad(model.forward_head(features)[0, 3], features)
    weights = slope[0].mean((1, 2))
    by_hand = sum(weight * channel for weight, channel in zip(weights, features.detach()[0])).clamp(min=0)
    assert not found.exact and (by_hand > 0).any()
    torch.testing.assert_close(found.map / found.map.max(), by_hand / by_hand.max())


def test_grad_cam_where_the_class_token_is_pooled():
    model, x = made("test_inline_deit"), pixels()
    found = class_map(model, x, 3)
    with torch.no_grad():
        tokens = model._pos_embed(model._patches(x))
        for block in model.blocks[:-1]:
            tokens = block(tokens, 4, 6)
    tokens.requires_grad_()
    after = model.forward_head(model.norm(model.blocks[-1](tokens, 4, 6)))
    torch.testing.assert_close(after, model(x))
    (slope,) = torch.autograd.grad(after[0, 3], tokens)
    by_hand = (tokens[0, 1:] @ slope[0, 1:].sum(0)).relu().view(4, 6).detach()
    assert not found.exact and (by_hand > 0).any()
    torch.testing.assert_close(found.map, by_hand)


class ChannelsLast(nn.Module):
    """Maps (B, H, W, C), as of timm's Swin, or pooled features."""

    def __init__(self, output_fmt):
        super().__init__()
        self.output_fmt, self.num_classes = output_fmt, 5
        self.fc = nn.Linear(3, 5)

    def forward_features(self, x):
        return x.permute(0, 2, 3, 1) if self.output_fmt == "NHWC" else x.mean((2, 3))

    def forward_head(self, x):
        return self.fc(x.mean((1, 2)) if x.ndim == 4 else x)


def test_cam_of_other_layouts():
    torch.manual_seed(0)
    model, x = ChannelsLast("NHWC"), torch.randn(1, 3, 4, 6)
    found = class_map(model, x, 2)
    assert found.exact
    torch.testing.assert_close(found.map, torch.einsum("c,chw->hw", model.fc.weight[2].detach(), x[0]))
    model = made("test_slab_deit")  # tokens, all of them pooled
    found, x = class_map(model, pixels(), 2), pixels()
    with torch.no_grad():
        tokens = model.forward_features(x)[0]
    assert found.exact
    torch.testing.assert_close(found.map, (tokens @ model.head.weight[2].detach()).view(4, 6))
    with pytest.raises(ValueError, match=r"ChannelsLast has features of shape \(1, 3\), which are no map"):
        class_map(ChannelsLast("NC"), pixels(dtype=torch.float32), 2)
    with pytest.raises(ValueError, match="Linear is not a timm model"):
        class_map(nn.Linear(3, 3), x, 2)


# ---- drawing


def test_upsampling_by_hand():
    values = torch.tensor([[0.0, 1.0]])
    assert upsampled(values, (4, 1), True).tolist() == [[0, 0.25, 0.75, 1]]  # between the middles of the tokens
    assert upsampled(values, (4, 2), False).tolist() == [[0, 0, 1, 1]] * 2
    odd = upsampled(torch.arange(6.0).view(2, 3), SIZE, False)
    for x, y in ((0, 0), (31, 29), (32, 31), (64, 60), (65, 31), (96, 29)):
        row, column = token_at((x, y), SIZE, (2, 3))
        assert odd[y, x] == 3 * row + column


def colours(values):
    grey = Image.new("RGB", (values.shape[1] * 10, values.shape[0] * 10), (90, 90, 90))
    panel = map_panel("", "", grey, values)
    return np.asarray(panel.picture)[5::10, 5::10].astype(int), panel.ends


def test_colours_of_signed_maps():
    (row,), ends = colours(torch.tensor([[-2.0, -1.0, 0.0, 1.0, 4.0]]))
    assert ends == (-4, 4)
    strength = row[:, 0] - row[:, 2]  # red over blue
    assert strength[0] < 0 and strength[1] < 0 and strength[2] == 0 and strength[3] > 0 and strength[4] > 100
    assert row[2].tolist() == [164] * 3  # the picture, lightened
    (opposite,), _ = colours(torch.tensor([[-4.0, 4.0]]))
    assert opposite[0, 2] - opposite[0, 0] > 100 and opposite[1].tolist() == row[4].tolist()


def test_colours_of_positive_maps_begin_at_the_least_value():
    (row,), ends = colours(torch.tensor([[5.0, 5.5, 6.0]]))
    assert ends == (5, 6)
    assert row[0].tolist() == [164] * 3 and row[2].tolist() == colours(torch.tensor([[0.0, 1.0]]))[0][0, 1].tolist()
    even, _ = colours(torch.full((2, 2), 3.0))
    assert (even == 164).all()


def test_the_point_is_marked():
    white = Image.new("RGB", (320, 160), (10, 200, 10))
    changed = (np.asarray(marked(white, (30, 10), (64, 32))) != np.asarray(white)).any(2)
    rows, columns = (np.flatnonzero(changed.any(axis)) for axis in (1, 0))
    assert (rows[0] + rows[-1]) / 2 == pytest.approx(52.5, abs=1)  # 10.5 of 32, times 160
    assert (columns[0] + columns[-1]) / 2 == pytest.approx(152.5, abs=1)
    assert not changed[52, 152]  # a ring


@pytest.fixture
def panels(monkeypatch):
    """What is drawn by the next calls of ``look``: title and panels."""
    drawn = []
    original = overview.draw_panels
    monkeypatch.setattr(overview, "draw_panels", lambda *args: drawn.append(args) or original(*args))
    return drawn


def test_the_packaged_model(panels):
    sheet = look(PIZZA, point=(100, 80), layer=3)
    ((title, (first, cam, field)),) = panels
    assert title == "van_nano · layer 3 of 0 to 11: stages.1.blocks.1.mixer.attn"
    assert first.title == "pizza.jpg" and first.note == "given as 96 x 96, point 100,80" and first.ends is None
    (prediction,) = package.Classifier().predict(PIZZA)  # also of the whole picture: it is square, and not cropped
    assert prediction.names[0] == "pizza"
    assert (cam.title, cam.note) == ("CAM: pizza", f"probability {prediction.probabilities[0]:.1%}")
    assert field.title == "Effective receptive field (gradient)" and "no rows" in field.note
    assert sheet.width == 2 * MARGIN + 3 * EDGE + 2 * GAP
    pictures = np.asarray(sheet)[MARGIN:, MARGIN : MARGIN + EDGE]
    assert (pictures != np.asarray(sheet)[MARGIN:, -MARGIN - EDGE : -MARGIN]).any()


def test_panels_of_heads_and_directions(panels, tmp_path):
    look(PIZZA, made("test_vig_h", torch.float32), layer=-1)
    look(PIZZA, made("test_inline_deit", torch.float32), layer=0)
    look(PIZZA, made("test_ravlt", torch.float32), layer=0)
    (title, gated), (_, tokens), (_, one) = panels
    assert title.startswith("HierViG · layer ")
    titles = [panel.title for panel in gated]
    heads = int(titles[-1].removeprefix("Head ")) + 1
    assert titles[2:5] == ["Attention, mean of heads", "Only in order", "Only in reverse"]
    assert titles[5:] == [f"Head {head}" for head in range(heads)] and heads > 1
    assert tokens[2].note.startswith("sum 1, class token ") and tokens[3].title == "Head 0"
    assert [panel.title for panel in one][2:] == ["Attention, mean of heads"]  # of one head, which it is


def test_pictures_of_any_shape(panels):
    model = made("test_ravlt", torch.float32)
    for size in ((333, 111), (1, 3000), (3000, 1)):
        look(Image.new("RGB", size, (200, 30, 30)), model)
    notes = [given[0].note for _, given in panels]
    assert notes[0] == "given as 288 x 96, point 166,55"  # of 160 x 160 pixels: 277.1 x 92.4, in steps of 32
    assert notes[1] == "given as 32 x 1280, point 0,1500" and notes[2] == "given as 1280 x 32, point 1500,0"
    assert panels[1][1][0].picture.size == (1, EDGE)


def test_models_of_one_size_get_it(panels):
    model = made("test_vit", torch.float32)  # of timm
    look(Image.new("RGB", (400, 100)), model)
    ((title, (first, cam)),) = panels
    assert title == "VisionTransformer" and first.note == "given as 160 x 160" and cam.title.startswith("Grad-CAM: ")


# ---- the command


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    for name in ("test_ravlt", "test_resnet"):
        save_file(made(name, torch.float32).state_dict(), folder / f"{name}.safetensors")
    return {
        name: ["--model", name, "--checkpoint", str(folder / f"{name}.safetensors")]
        for name in ("test_ravlt", "test_resnet")
    }


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def zoo(*arguments, code=0):
    result = CliRunner().invoke(cli.app, ["look", *map(str, arguments), "--device", "cpu"])
    assert result.exit_code == code, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result


def error(*arguments):
    """The one sentence on stderr of a usage error, after which no file is left."""
    result = zoo(*arguments, code=2)
    assert result.stdout == "" and result.stderr.startswith("zoo: ") and result.stderr.count("\n") == 1
    assert not list(Path().iterdir())
    return result.stderr


def test_command(weights):
    options = {"checkpoint": weights["test_ravlt"][3], "device": "cpu"}
    result = zoo(
        PIZZA,
        *weights["test_ravlt"],
        "--point",
        "20, 31",
        "--layer",
        1,
        "--class",
        "acoustic guitar",
        "--out",
        "sub/a.png",
    )
    assert result.stdout == "Wrote sub/a.png\n"
    expected = look(PIZZA, "test_ravlt", point=(20, 31), layer=1, label="acoustic guitar", **options)
    assert (np.asarray(Image.open("sub/a.png")) == np.asarray(expected)).all()
    zoo(PIZZA, *weights["test_ravlt"])
    plain = np.asarray(Image.open("look.png"))
    assert (plain == np.asarray(look(PIZZA, "test_ravlt", point=(160, 160), layer=-1, **options))).all()
    assert (plain != np.asarray(expected)).any()


def test_classes(weights, panels):
    model = weights["test_resnet"]
    for name in ("Acoustic GUITAR", "402", "crane"):
        zoo(PIZZA, *model, "--class", name)
    guitar, number, crane = (given[1].title for _, given in panels)
    assert guitar == number == "CAM: acoustic guitar" and crane == "CAM: crane"


def test_the_most_probable_of_classes_with_one_name(weights, panels):
    model = timm.create_model("test_resnet").eval()
    for best, probability in ((134, "90.9%"), (517, "90.9%")):  # ImageNet's two cranes; e ** 9.21 = 9999 of 10998
        with torch.no_grad():
            model.fc.weight.zero_()
            model.fc.bias.zero_()[best] = 9.2102
        look(PIZZA, model, label="crane", device="cpu")
        assert panels[-1][1][1].note == f"probability {probability}"


def test_models_without_such_layers_have_a_class_activation_map_only(weights, panels):
    zoo(PIZZA, *weights["test_resnet"])
    ((title, (first, cam)),) = panels
    assert title == "test_resnet" and first.note == "given as 160 x 160" and cam.title.startswith("CAM: ")
    assert Image.open("look.png").width == 2 * MARGIN + 2 * EDGE + GAP


def test_errors(weights):
    ravlt, resnet = weights["test_ravlt"], weights["test_resnet"]
    assert "point 320,5 is outside the picture of 320 x 320: expected 0,0 to 319,319." in error(
        PIZZA, *ravlt, "--point", "320,5"
    )
    for wrong in ("12", "1,2,3", "a,b", "-1,5", ""):
        assert f"--point is {wrong!r}, expected a column and a row" in error(PIZZA, *ravlt, f"--point={wrong}")
    assert "test_ravlt has no layer 2 to look into, only 0 to 1." in error(PIZZA, *ravlt, "--layer", 2)
    assert "test_ravlt has no layer -3 to look into" in error(PIZZA, *ravlt, "--layer", -3)
    for option in (("--layer", 0), ("--point", "3,3")):
        assert "test_resnet has no layer of linear attention" in error(PIZZA, *resnet, *option)
    assert "no class 'guitarr'; the nearest names are" in error(PIZZA, *resnet, "--class", "guitarr")
    assert "no class '1000'" in error(PIZZA, *resnet, "--class", "1000")
    assert "missing.png does not exist." in error("missing.png", *resnet)
    assert "URLs are off" in error("https://example.org/a.png", *resnet)
    assert "does not end in .png" in error(PIZZA, *resnet, "--out", "a.jpg")
    assert "There is no model 'nothing'" in error(PIZZA, "--model", "nothing")
    assert "ravlt_nano has no weights of its own" in error(PIZZA, "--model", "ravlt_nano")
    for option in (("--prompt", "what"), ("--reduce", "fastv:layer=1,keep=0.5")):
        assert "--prompt and --reduce are of multimodal models" in error(PIZZA, *resnet, *option)
    with pytest.raises(ValueError, match=r"VAN has no classes \(num_classes=0\)"):
        look(PIZZA, timm.create_model("test_van", num_classes=0))


def test_kept_tokens_of_a_multimodal_model(tmp_path_factory):
    pytest.importorskip("transformers", reason="multimodal models need the mllm extra")
    pytest.importorskip("matplotlib", reason="the overlay needs the bench extra")
    from zoo.mllm import accelerate, load
    from zoo.mllm.prompts import encode, generate, message

    spec = importlib.util.spec_from_file_location("tiny_vlm", Path(__file__).parents[1] / "tools" / "tiny_vlm.py")
    tiny = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tiny)
    folder = tmp_path_factory.mktemp("tiny")
    tiny.language_model(folder / "lm")
    tiny.data(folder, count=4)
    tiny.model(folder)
    name, picture = str(folder / "model"), folder / "0.png"
    for wrong in (("--point", "1,1"), ("--layer", 0), ("--class", "red"), ("--checkpoint", "a.pth")):
        assert f"{wrong[0]} is of classifiers" in error(picture, "--model", name, *wrong)
    zoo(picture, "--model", name, "--prompt", "where is it ?")
    zoo(picture, "--model", name, "--prompt", "where is it ?", "--reduce", "fastv:layer=1,keep=0.25", "--out", "b.png")
    model, processor = load(name, dtype=torch.float32)
    image = Image.open(picture).convert("RGB")
    for file, method, numbers in (
        ("look.png", "fastv:layer=2,keep=0.5", [16, 16, 8]),
        ("b.png", "fastv:layer=1,keep=0.25", [16, 4, 4]),
    ):
        with accelerate(model, [method]) as handle:
            inputs = encode(model, processor, [[message("user", "where is it ?", [image])]])
            generate(model, processor, inputs, max_new_tokens=1)
            assert handle.report()["visual_tokens_per_layer"] == numbers
            handle.plot("expected.png", [image])
        assert (np.asarray(Image.open(file)) == np.asarray(Image.open("expected.png"))).all()
