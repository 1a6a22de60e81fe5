"""zoo.images: every odd, broken or hostile picture gives the right pixels or one sentence."""

import io
import os
import pickle
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from zoo.images import ImageError, RemoteImage, find_images, read_image


def encode(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def noise(width=24, height=16):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def pixels(source):
    image = read_image(source)
    assert image.mode == "RGB"
    return np.asarray(image)


def assert_reason(source, *words):
    """The source is refused with one sentence that starts with its name and holds the words."""
    with pytest.raises(ImageError) as caught:
        read_image(source)
    message = str(caught.value)
    assert message == f"{caught.value.source} {caught.value.reason}"
    assert message.endswith(".") and "\n" not in message
    for word in words:
        assert word in message
    return message


# ---- every kind of source gives the same pixels


def test_sources_agree(tmp_path):
    path = tmp_path / "a.png"
    noise().save(path)
    want = np.asarray(noise())
    for source in (path, str(path), path.read_bytes(), io.BytesIO(path.read_bytes()), noise(), want):
        assert np.array_equal(pixels(source), want)
    with path.open("rb") as file:
        assert np.array_equal(pixels(file), want)
    with Image.open(path) as lazy:
        assert np.array_equal(pixels(lazy), want)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "GIF", "WEBP", "JPEG", "JPEG2000", "ICO", "TGA"])
def test_formats(kind):
    image = Image.new("RGB", (32, 32), (200, 40, 90))
    assert np.abs(pixels(encode(image, kind)).astype(int) - (200, 40, 90)).max() <= 6


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_exif_orientation(orientation, kind):
    upright = Image.new("RGB", (32, 16), "white")
    upright.paste((255, 0, 0), (0, 0, 16, 8))  # red top left, blue top right
    upright.paste((0, 0, 255), (16, 0, 32, 8))
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # orientation -> the Transpose that stores it so
    stored = upright.transpose(Image.Transpose(undo[orientation])) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    got = pixels(encode(stored, kind, exif=exif)).astype(int)
    assert np.abs(got - np.asarray(upright).astype(int))[2:6, 2:14].max() < 30
    assert np.abs(got - np.asarray(upright).astype(int))[2:6, 18:30].max() < 30


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_a_broken_exif_block_does_not_cost_the_picture():
    data = encode(noise(), "PNG", exif=b"Exif\0\0MM\0\x2a\0\0\0\x08\xff\xff" + b"\xee" * 30)
    assert np.array_equal(pixels(data), np.asarray(noise()))


def test_a_given_image_is_left_as_it_is():
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.open(io.BytesIO(encode(noise(), "PNG", exif=exif)))
    read_image(image).putpixel((0, 0), (1, 2, 3))
    assert image.size == (24, 16) and np.array_equal(np.asarray(image), np.asarray(noise()))
    assert read_image(image).size == (16, 24)


# ---- colour modes


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk(kind):
    got = pixels(encode(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), kind))
    assert np.abs(got.astype(int) - (255, 0, 0)).max() <= 4


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_is_scaled_and_not_clipped(kind):
    values = np.array([[0, 257, 32896], [51400, 65278, 65535]], dtype=np.uint16)
    got = pixels(encode(Image.fromarray(values), kind))
    assert got[..., 0].tolist() == got[..., 2].tolist() == [[0, 1, 128], [200, 254, 255]]


def test_wide_integers_and_floats():
    def grey(mode, rows):
        dtype = np.int32 if mode == "I" else np.float32
        return pixels(encode(Image.fromarray(np.array(rows, dtype)), "TIFF"))[..., 1].tolist()

    assert grey("F", [[0, 0.5, 1.0]]) == [[0, 128, 255]]
    assert grey("F", [[0, 100.0, 255]]) == [[0, 100, 255]]
    assert grey("F", [[-100.0, 0, 100]]) == [[0, 128, 255]]
    assert grey("F", [[np.nan, np.inf, 1.0, 0.0]]) == [[0, 255, 255, 0]]
    assert grey("F", [[np.nan, np.nan]]) == [[0, 0]]
    assert grey("I", [[0, 100, 255]]) == [[0, 100, 255]]
    assert grey("I", [[0, 50_000, 100_000]]) == [[0, 128, 255]]
    assert grey("I", [[70_000, 70_000]]) == [[0, 0]]


def test_one_bit():
    assert pixels(encode(Image.fromarray(np.array([[True, False]])), "PNG")).tolist() == [[[255] * 3, [0] * 3]]


def test_transparency_is_shown_on_white():
    red, clear = (255, 0, 0, 255), (0, 0, 0, 0)
    rgba = Image.new("RGBA", (2, 1), clear)
    rgba.putpixel((0, 0), red)
    want = [[[255, 0, 0], [255, 255, 255]]]
    assert pixels(encode(rgba)).tolist() == want
    palette = Image.new("P", (2, 1), 1)
    palette.putpalette([255, 0, 0, 0, 0, 0])
    palette.putpixel((0, 0), 0)
    assert pixels(encode(palette, transparency=1)).tolist() == want  # one transparent colour
    assert pixels(encode(palette, transparency=b"\xff\x00")).tolist() == want  # an alpha for each colour
    rgb = Image.new("RGB", (2, 1))
    rgb.putpixel((0, 0), (255, 0, 0))
    assert pixels(encode(rgb, transparency=(0, 0, 0))).tolist() == want  # a colour key
    half = pixels(encode(Image.new("LA", (1, 1), (0, 128))))
    assert half.tolist() == [[[127] * 3]]


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_of_an_animation(kind):
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "lime", "blue")]
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:])
    assert np.abs(pixels(data).astype(int) - (255, 0, 0)).max() <= 4


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1)])
def test_extreme_sizes(size):
    assert read_image(encode(Image.new("RGB", size, "red"))).size == size


# ---- arrays


def test_arrays():
    grey = np.array([[0, 100], [200, 255]], np.uint8)
    want = np.repeat(grey[..., None], 3, axis=2)
    for array in (grey, grey[..., None], want, grey.astype(np.int64), grey.astype(np.uint16) * 257, grey / 255.0):
        assert np.array_equal(pixels(array), want), (array.dtype, array.shape)
    assert pixels(grey > 150)[..., 0].tolist() == [[0, 0], [255, 255]]
    assert np.array_equal(pixels(want[:, ::-1]), want[:, ::-1])  # not contiguous
    rgba = np.dstack([want, np.zeros((2, 2), np.uint8)])
    assert (pixels(rgba) == 255).all()


@pytest.mark.parametrize(
    ("array", "word"),
    [
        (np.zeros((3, 8, 8), np.uint8), "(3, 8, 8)"),
        (np.zeros((0, 8, 3), np.uint8), "(0, 8, 3)"),
        (np.zeros(8, np.uint8), "(8,)"),
        (np.zeros((8, 8, 0), np.uint8), "(8, 8, 0)"),
        (np.full((8, 8), 2.5), "2.5"),
        (np.full((8, 8), -1), "-1"),
        (np.full((8, 8), np.nan), "nan"),
        (np.full((8, 8), 256), "256"),
        (np.full((8, 8), 1j), "complex"),
    ],
)
def test_arrays_that_are_no_pictures(array, word):
    assert_reason(array, word, "expected")


# ---- refused, in one sentence


def test_refusals_of_paths(tmp_path):
    def file(name, data):
        (tmp_path / name).write_bytes(data)
        return tmp_path / name

    assert assert_reason(tmp_path / "no.png", "does not exist").startswith(str(tmp_path / "no.png"))
    assert_reason(tmp_path, "is a folder")
    assert_reason(file("zero.png", b""), "zero.png is empty")
    assert_reason(file("text.png", b"hello, this is a text\n" * 9), "is not a picture", "JPEG")
    assert_reason(file("page.svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>"), "is not a picture")
    assert_reason(file("head.jpg", encode(noise(), "JPEG")[:3]), "head.jpg is")
    assert_reason("x" * 5000, "cannot be opened")
    os.mkfifo(tmp_path / "pipe.png")
    assert_reason(tmp_path / "pipe.png", "not a regular file")
    assert_reason("https://example.com/a.png", "https://example.com/a.png was not fetched", "--allow-urls")
    with pytest.raises(TypeError, match="expected a path"):
        read_image(7)


def test_postscript_is_not_run():
    data = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    assert_reason(data, "is not a picture")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000"])
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_truncated(kind, share):
    data = encode(noise(97, 61), kind)
    assert_reason(data[: int(len(data) * share)])


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decompression_bomb(monkeypatch):
    small = encode(Image.new("1", (100, 100)))
    for limit in (9_999, 4_000):  # Pillow warns up to twice its limit and raises above
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        assert_reason(small, f"{limit:,} pixels")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    assert read_image(small).size == (100, 100)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert read_image(small).size == (100, 100)


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "ICO", "TGA"]),
    edits=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=8),
)
def test_damaged_bytes_give_a_picture_or_an_image_error(kind, edits):
    data = bytearray(encode(noise(), kind))
    for where, value in edits:
        data[int(where * len(data))] = value
    try:
        image = read_image(bytes(data))
    except ImageError as error:
        assert str(error).endswith(".")
    else:
        assert image.mode == "RGB" and image.size > (0, 0)


def test_image_errors_survive_pickling():
    error = pickle.loads(pickle.dumps(ImageError("a.png", "is empty.")))
    assert str(error) == "a.png is empty." and error.reason == "is empty."


# ---- finding pictures


@pytest.fixture
def tree(tmp_path):
    for name in (
        "b.png",
        "a.JPG",
        "sub/c.webp",
        "sub/deep/d.png",
        "notes.txt",
        ".hidden.png",
        ".git/e.png",
        "odd[1].png",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    return tmp_path


def names(found, root):
    return [os.path.relpath(path, root) for path in found]


def test_find_in_a_folder(tree):
    found, failed = find_images([tree])
    assert names(found, tree) == ["a.JPG", "b.png", "odd[1].png", "sub/c.webp", "sub/deep/d.png"] and not failed


def test_find_with_patterns(tree):
    assert names(find_images([f"{tree}/*.png"])[0], tree) == ["b.png", "odd[1].png"]
    assert names(find_images([f"{tree}/**/*.png"])[0], tree)[:3] == ["b.png", "odd[1].png", "sub/deep/d.png"]
    assert names(find_images([f"{tree}/sub/**"])[0], tree) == ["sub/c.webp", "sub/deep/d.png"]
    assert names(find_images([f"{tree}/odd[1].png"])[0], tree) == ["odd[1].png"]  # a name, not a pattern
    found, failed = find_images([f"{tree}/*.nothing", f"{tree}/empty", f"{tree}/**.png"])
    assert not found and [error.source for error in failed] == [f"{tree}/*.nothing", f"{tree}/empty", f"{tree}/**.png"]
    assert "matches no picture" in failed[0].reason and "without pictures" in failed[1].reason


def test_find_relative_patterns(tree, monkeypatch):
    monkeypatch.chdir(tree)
    assert find_images(["sub/*.webp"]) == (["sub/c.webp"], [])


def test_named_files_are_kept_and_listed_once(tree):
    link = tree / "link.png"
    link.symlink_to(tree / "b.png")
    found, failed = find_images([tree / "notes.txt", tree / "b.png", tree, link, tree / "missing.png"])
    assert names(found, tree)[:2] == ["notes.txt", "b.png"] and len(found) == 7 and not failed
    assert names(found, tree)[-1] == "missing.png"


def test_symlink_loops_end(tree):
    for number in range(3):  # two loops in one folder are enough to keep a naive walk busy for ever
        (tree / "sub" / f"loop{number}").symlink_to(tree)
    found, _ = find_images([tree / "sub", f"{tree}/**/*.png"])
    assert sorted({os.path.realpath(path) for path in found}) == sorted(os.path.realpath(path) for path in found)
    assert str(tree / "sub/c.webp") in found and len(found) == 5


# ---- URLs


@pytest.fixture
def server(monkeypatch):
    picture = encode(noise())

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(404 if "missing" in self.path else 200)
            self.end_headers()
            self.wfile.write(picture if "big" not in self.path else bytes(4096))

        def log_message(self, *args):
            pass

    monkeypatch.setenv("no_proxy", "*")
    with HTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


def test_urls(server, monkeypatch):
    url = f"{server}/a.png"
    (refused,), _ = find_images([url])
    assert_reason(refused, "URLs are off")
    (allowed, _), failed = find_images([url, url, f"{server}/b.png"], allow_urls=True)
    assert isinstance(allowed, RemoteImage) and not failed
    assert np.array_equal(pixels(allowed), np.asarray(noise()))
    assert_reason(RemoteImage(f"{server}/missing.png"), "could not be fetched", "404")
    assert_reason(RemoteImage("http://127.0.0.1:9/a.png"), "could not be fetched")
    monkeypatch.setattr("zoo.images.URL_MAX_BYTES", 2048)
    assert_reason(RemoteImage(f"{server}/big.png"), "is larger than")
    monkeypatch.setattr("zoo.images.URL_TIMEOUT", 1e-9)
    assert_reason(RemoteImage(url))
