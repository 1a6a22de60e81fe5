"""The processor of composed models: pictures among text, tiles, conversations, and what of them is learned."""

import numpy as np
import pytest
import tiny_composed as tiny
import torch
from PIL import Image
from tiny_composed import BEGIN, END, SIZE, message, picture

from zoo.mllm import VisionLanguageProcessor
from zoo.mllm.processing import read_picture, tile_grid

MEAN, STD = (0.5, 0.25, 0.125), (0.5, 0.25, 0.2)
TOKENS = 4


def processor(chat_template=tiny.TEMPLATE, **options):
    options = {"image_size": SIZE, "tokens_per_tile": TOKENS, "mean": MEAN, "std": STD, **options}
    return VisionLanguageProcessor(tiny.tokenizer(chat_template), **options)


def shown(processor, ids, attention_mask=None):
    """Ids as text, a tile as #."""
    if attention_mask is not None:
        ids = ids[attention_mask.bool()]
    text = "".join("#" if i == processor.image_token_id else processor.tokenizer.decode([i]) for i in ids.tolist())
    return text.replace("#" * processor.tokens_per_tile, "#")


def rows(processor, batch):
    return [shown(processor, *row) for row in zip(batch["input_ids"], batch["attention_mask"])]


def colour(*rgb):
    return Image.new("RGB", (SIZE, SIZE), rgb)


# ---- text and pictures


@pytest.mark.parametrize(
    "images", [[picture(0), picture(1), picture(2)], [[picture(0)], [picture(1), picture(2)], []]], ids=["flat", "rows"]
)
def test_ragged_rows(images):
    made = processor()
    batch = made(text=["<image>hi", "a <image> longer<image>", "no picture"], images=images)
    assert rows(made, batch) == ["#hi", "a # longer#", "no picture"]
    assert batch["attention_mask"].tolist()[0] == [0] * 11 + [1] * 6  # padded on the left
    alone = torch.cat([made(text="<image>", images=picture(seed))["pixel_values"] for seed in range(3)])
    assert torch.equal(batch["pixel_values"], alone)


def test_text_alone():
    batch = processor()(text=["one", "three"], padding_side="right")
    assert batch.keys() == {"input_ids", "attention_mask"}
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1] * 5]


@pytest.mark.parametrize(
    ("text", "images", "message"),
    [
        ("<image>", [picture(), picture()], "The text has 1 times <image>, but 2 pictures"),
        ("<image> and <image>", picture(), "The text has 2 times <image>, but 1 pictures"),
        ("text", picture(), "The text has 0 times <image>, but 1 pictures"),
        ("<image>", None, "The text has 1 times <image>, but 0 pictures"),
        (["<image>", "<image>"], [[picture(), picture()], []], "Row 0 has 1 times <image>, but 2 pictures"),
        (["<image>", "<image>"], [[picture()]], "There are pictures for 1 rows, but 2 rows of text"),
        (None, picture(), "The processor needs text"),
    ],
)
def test_pictures_and_places_must_match(text, images, message):
    with pytest.raises(ValueError, match=message):
        processor()(text=text, images=images)


def test_the_placeholder_as_characters():
    made = processor()
    batch = made(text=r"<image> <\image> <\\image>", images=picture())
    assert rows(made, batch) == [r"# <image> <\image>"]
    talk = [message("user", picture(), r"is <image> or <\image> a picture", "? <ima", "ge>")]
    batch = made.apply_chat_template([talk], tokenize=True)
    assert rows(made, batch) == [f"{BEGIN}user\n#\nis <image> or <\\image> a picture? <image>{END}\n"]
    assert len(batch["pixel_values"]) == 1


def test_truncation_and_padding_to_a_length():
    made = processor()
    batch = made(text=["<image>abcdef", "x"], images=picture(), truncation=True, max_length=7)
    assert rows(made, batch) == ["#abc", "x"]
    assert made(text="abc", padding="max_length", max_length=9)["input_ids"].shape == (1, 9)
    with pytest.raises(ValueError, match="cutting it to max_length 5 would cut into a picture"):
        made(text="ab<image>", images=picture(), truncation=True, max_length=5)
    with pytest.raises(ValueError, match="return_tensors is 'np'"):
        made(text="abc", return_tensors="np")


def test_the_token_that_begins_sequences():
    made = processor()
    assert made(text="a")["input_ids"].shape == (1, 1)  # this tokenizer has none of its own accord
    made.tokenizer.backend_tokenizer.post_processor = tiny.tokenizers.processors.TemplateProcessing(
        single=f"{BEGIN} $A", special_tokens=[(BEGIN, 0)]
    )
    assert rows(made, made(text="<image>a", images=picture())) == [f"{BEGIN}#a"]
    assert rows(made, made(text="a", add_special_tokens=False)) == ["a"]
    talk = [{"role": "user", "content": "a"}]
    assert rows(made, made.apply_chat_template(talk, tokenize=True)) == [f"{BEGIN}user\na{END}\n"]


# ---- pictures


def test_pixels_are_normalised():
    pixels = processor()(text="<image>", images=colour(255, 51, 0))["pixel_values"]
    assert pixels.shape == (1, 3, SIZE, SIZE)
    assert pixels.dtype == torch.float32
    torch.testing.assert_close(pixels.amin((0, 2, 3)), torch.tensor([1.0, -0.2, -0.625]))
    torch.testing.assert_close(pixels.amax((0, 2, 3)), torch.tensor([1.0, -0.2, -0.625]))


def test_the_aspect_is_kept():
    pixels = processor()(text="<image>", images=Image.new("RGB", (2 * SIZE, SIZE), "white"))["pixel_values"][0, 2]
    inside = pixels[SIZE // 4 : -SIZE // 4]
    torch.testing.assert_close(inside, torch.full_like(inside, (1 - MEAN[2]) / STD[2]))
    beside = pixels[: SIZE // 4]
    torch.testing.assert_close(beside, torch.zeros_like(beside), atol=0.5 / 255 / STD[2], rtol=0)  # the mean colour


@pytest.mark.parametrize("size", [(3000, 2), (1, 900)])
@pytest.mark.parametrize("max_tiles", [1, 6])
def test_extreme_aspects(size, max_tiles):
    made = processor(max_tiles=max_tiles)
    batch = made(text="<image>", images=Image.new("RGB", size))
    assert len(batch["pixel_values"]) == (7 if max_tiles > 1 else 1)


@pytest.mark.parametrize(
    ("size", "max_tiles", "grid"),
    [
        ((64, 32), 1, (1, 1)),
        ((64, 32), 4, (1, 2)),
        ((32, 64), 4, (2, 1)),
        ((128, 128), 4, (2, 2)),
        ((32, 32), 4, (1, 1)),  # not made larger
        ((200, 100), 8, (2, 4)),
        ((100, 100), 3, (1, 1)),
        ((300, 100), 5, (1, 3)),
        ((20, 10), 9, (1, 2)),
    ],
)
def test_tile_grid(size, max_tiles, grid):
    assert tile_grid(*size, 32, max_tiles) == grid


def test_tiles_are_in_the_order_of_reading():
    colours = [(250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 250, 0)]
    whole = Image.new("RGB", (2 * SIZE, 2 * SIZE))
    for number, one in enumerate(colours):
        whole.paste(one, (number % 2 * SIZE, number // 2 * SIZE, (number % 2 + 1) * SIZE, (number // 2 + 1) * SIZE))
    made = processor(max_tiles=4)
    batch = made(text="<image>and<image>", images=[whole, colour(9, 9, 9)])
    assert rows(made, batch) == ["#\n##\n##and#"]
    pixels = batch["pixel_values"]
    tiles = [(pixels[n].mean((1, 2)) * torch.tensor(STD) + torch.tensor(MEAN)) * 255 for n in range(1, 6)]
    torch.testing.assert_close(torch.stack(tiles), torch.tensor([*colours, (9, 9, 9)]).float(), atol=1e-3, rtol=0)
    quarter = pixels[0, :, 1 : SIZE // 2 - 2, 1 : SIZE // 2 - 2]
    torch.testing.assert_close(quarter, pixels[1, :, 1 : SIZE // 2 - 2, 1 : SIZE // 2 - 2], atol=0.05, rtol=0)


def test_a_truncated_file(tmp_path):
    path = tmp_path / "cut.png"
    picture(0, 200, 200).save(path)
    path.write_bytes(path.read_bytes()[:400])
    with pytest.raises(ValueError, match=r"The picture .*cut.png cannot be read: .*truncated"):
        processor()(text="<image>", images=path)


@pytest.mark.parametrize("image", ["nothing.png", torch.zeros(3, 4, 4), None, np.zeros((4, 4, 3))], ids=type)
def test_what_is_no_picture(image):
    with pytest.raises(ValueError, match=r"The picture .* cannot be read"):
        processor()(text="<image>", images=[image])


def test_kinds_of_pictures(tmp_path):
    grey = np.arange(16, dtype=np.uint8).reshape(4, 4) * 16
    assert np.array_equal(read_picture(grey), np.stack([grey] * 3, -1))
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    assert deep.mode == "I;16"
    assert np.array_equal(read_picture(deep), np.stack([grey] * 3, -1))
    clear = Image.new("RGBA", (2, 2), (200, 0, 0, 0))
    assert read_picture(clear).getpixel((0, 0)) == (255, 255, 255)
    turned = Image.new("RGB", (6, 2))
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    turned.save(tmp_path / "turned.jpg", exif=exif)
    assert read_picture(str(tmp_path / "turned.jpg")).size == (2, 6)


# ---- conversations


def test_conversations():
    made = processor()
    talks = [
        [message("user", picture(0), "What?"), message("assistant", "A"), message("user", "And ", picture(1))],
        [{"role": "user", "content": "Hi"}],
    ]
    texts = made.apply_chat_template(talks, add_generation_prompt=True)
    assert texts[0] == (
        f"{BEGIN}user\n<image>\nWhat?{END}\n{BEGIN}assistant\nA{END}\n{BEGIN}user\nAnd <image>\n{END}\n"
        f"{BEGIN}assistant\n"
    )
    assert made.apply_chat_template(talks[1]) == f"{BEGIN}user\nHi{END}\n"
    batch = made.apply_chat_template(talks, add_generation_prompt=True, tokenize=True, return_dict=True)
    assert rows(made, batch) == [text.replace("<image>", "#") for text in texts]
    apart = made(text=texts, images=[picture(0), picture(1)], add_special_tokens=False)
    assert all(torch.equal(batch[name], apart[name]) for name in apart)
    without = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    batch = made.apply_chat_template(without, tokenize=True, processor_kwargs={"images": picture(1)})
    assert torch.equal(batch["pixel_values"], apart["pixel_values"][1:])
    with pytest.raises(ValueError, match="Row 0 has 1 times <image>, but 0 pictures"):
        made.apply_chat_template(without, tokenize=True)
    with pytest.raises(ValueError, match="a part of the type 'video', expected 'text' or 'image'"):
        made.apply_chat_template([{"role": "user", "content": [{"type": "video"}]}])


def test_a_tokenizer_without_template():
    made = processor(chat_template=None)
    talk = [message("user", picture(), "What?"), message("assistant", "A")]
    assert made.apply_chat_template(talk) == f"User: <image>\nWhat?\nAssistant: A{END}\n"
    assert made.apply_chat_template(talk[:1], add_generation_prompt=True) == "User: <image>\nWhat?\nAssistant: "


def learned(processor, batch):
    """For each row, the runs of tokens that have labels, as text."""
    found = []
    for ids, labels in zip(batch["input_ids"], batch["labels"]):
        kept = labels != -100
        assert torch.equal(ids[kept], labels[kept])
        parts = torch.tensor_split(ids, torch.nonzero(kept[1:] != kept[:-1])[:, 0] + 1)
        flags = torch.tensor_split(kept, torch.nonzero(kept[1:] != kept[:-1])[:, 0] + 1)
        found.append([shown(processor, part) for part, flag in zip(parts, flags) if flag[0]])
    return found


TALKS = [
    [message("user", picture(0), "What?"), message("assistant", "A cat"), message("user", "Where?"),
     message("assistant", "There")],
    [message("system", "Be brief."), message("user", "See ", picture(1)), message("assistant", "Yes"),
     message("user", picture(2), "never answered")],
    [message("user", "No picture"), message("assistant", "None")],
    [message("user", "Last ", picture(3)), message("assistant", "End")],
]  # fmt: skip


@pytest.mark.parametrize("side", ["left", "right"])
def test_answers_are_learned(side):
    made = processor()
    batch = made.with_labels(TALKS, padding_side=side)
    answers = [["A cat", "There"], ["Yes"], ["None"], ["End"]]
    assert learned(made, batch) == [[f"{answer}{END}\n" for answer in row] for row in answers]
    texts = made.apply_chat_template([TALKS[0], TALKS[1][:3], *TALKS[2:]])
    apart = made(text=texts, images=[picture(0), picture(1), picture(3)], padding_side=side)
    assert all(torch.equal(batch[name], apart[name]) for name in apart)  # what is not answered is left out


def test_labels_are_cut_with_their_rows():
    made = processor()
    whole = made.with_labels(TALKS[:1])
    size = whole["input_ids"].shape[1]
    batch = made.with_labels(TALKS[:1], max_length=size - 4)
    assert learned(made, batch) == [[f"A cat{END}\n", "The"]]
    with pytest.raises(ValueError, match="no answer to learn"):
        made.with_labels(TALKS[:1], max_length=20)
    with pytest.raises(ValueError, match="would cut into a picture"):
        made.with_labels(TALKS[3:], max_length=14)


def test_conversations_that_cannot_be_learned():
    with pytest.raises(ValueError, match="no message of the role 'assistant'"):
        processor().with_labels([TALKS[0][:1]])
    thinking = tiny.TEMPLATE.replace("assistant\n{% endif", "assistant\n<think>{% endif")
    with pytest.raises(ValueError, match="writes a message differently once an answer follows"):
        processor(chat_template=thinking).with_labels(TALKS[:1])
