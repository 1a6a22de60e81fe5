"""The page in a headless Chromium: a picture goes up, the result is drawn, words stream."""

import shutil
import socket
import threading
import time
from importlib.resources import files

import pytest

pytest.importorskip("gradio", reason="serving needs the serve extra")
pytest.importorskip("fastapi_offline", reason="serving needs the serve extra")
pytest.importorskip("playwright", reason="driving a browser needs the package playwright")
pytest.importorskip("supervision", reason="dense prediction needs the dense extra")

import uvicorn
from playwright import sync_api
from serving import NAME, encoded, picture
from stand_ins import Echo, RedAreas, RedThings, square

from zoo.classifier import Classifier
from zoo.serve import Limits, Models, create_app

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="there is no Chromium on this machine")
SAMPLES = files("zoo") / "samples"
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
ARGUMENTS += ["--disable-component-update", "--disable-sync"]
PHONE, DESKTOP = {"width": 390, "height": 844}, {"width": 1280, "height": 900}


@pytest.fixture(scope="module")
def chat():
    return Echo()


@pytest.fixture(scope="module")
def address(classifier, chat):
    """Of a server with the packaged classifier, a small one and stand-ins, behind the token "token"."""
    models = Models({"van_nano": Classifier(device="cpu"), NAME: classifier}, RedThings(), RedAreas(), chat)
    models.classifiers["van_nano"].predict(picture())
    with socket.create_server(("127.0.0.1", 0)) as listening:
        config = uvicorn.Config(create_app(models, Limits(pixels=10**6), "token"), log_level="warning")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
        server.should_exit = True
        thread.join(20)


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(params=[PHONE], ids=["phone"])
def page(browser, address, request):
    """The page as it is after loading; at the end nothing must have failed in it."""
    context = browser.new_context(viewport=request.param, http_credentials={"username": "", "password": "token"})
    page, faults = context.new_page(), []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("requestfailed", lambda failed: faults.append(failed.url))
    page.on(
        "request", lambda asked: None if asked.url.startswith((address, "blob:", "data:")) else faults.append(asked.url)
    )
    page.goto(address)
    page.get_by_role("tab", name="Classify").wait_for()
    yield page
    context.close()
    assert faults == []


def choose(page, data, name="picture.png"):
    page.get_by_label("Picture", exact=True).set_input_files({"name": name, "mimeType": "image/png", "buffer": data})


def press(page, tab):
    page.get_by_role("tab", name=tab).click()
    page.get_by_role("button", name=tab, exact=True).click()


def pixels(locator):
    """The size of a drawn picture, and the share of it that is not white."""
    return locator.evaluate(
        """async image => {
            await image.decode();
            const canvas = new OffscreenCanvas(image.naturalWidth, image.naturalHeight);
            const context = canvas.getContext("2d");
            context.drawImage(image, 0, 0);
            const data = context.getImageData(0, 0, canvas.width, canvas.height).data;
            let coloured = 0;
            for (let i = 0; i < data.length; i += 4) coloured += Math.min(data[i], data[i + 1], data[i + 2]) < 200;
            return [canvas.width, canvas.height, coloured * 4 / data.length];
        }"""
    )


@pytest.mark.parametrize("page", [PHONE, DESKTOP], ids=["phone", "desktop"], indirect=True)
def test_a_picture_is_named_within_two_seconds(page):
    choose(page, (SAMPLES / "rocket.jpg").read_bytes())
    start = time.monotonic()
    page.get_by_role("button", name="Classify", exact=True).click()
    page.get_by_role("heading", name="rocket").wait_for()
    assert time.monotonic() - start < 2
    assert page.evaluate("document.documentElement.scrollWidth") == page.viewport_size["width"]


def test_examples_are_pictures_too(page):
    page.get_by_role("button", name="pizza").click()
    page.get_by_role("img", name="The chosen picture").wait_for()
    assert page.get_by_label("Picture", exact=True).input_value().endswith("pizza.jpg")
    page.get_by_role("button", name="Classify", exact=True).click()
    page.get_by_role("heading", name="pizza").wait_for()


@pytest.mark.parametrize("page", [PHONE, DESKTOP], ids=["phone", "desktop"], indirect=True)
def test_boxes_and_maps_are_drawn(page):
    choose(page, encoded(square()))
    press(page, "Detect")
    drawn = page.get_by_role("img", name="The picture with square, half")
    drawn.wait_for()
    width, height, coloured = pixels(drawn)
    assert (width, height) == (300, 200) and 0.1 < coloured < 0.3
    assert page.get_by_role("cell", name="90.0%").is_visible()
    press(page, "Segment")
    drawn = page.get_by_role("img", name="The picture with background, square")
    drawn.wait_for()
    assert pixels(drawn)[2] > 0.1


def test_two_models_are_compared(page):
    choose(page, (SAMPLES / "rocket.jpg").read_bytes())
    press(page, "Compare")
    page.get_by_role("columnheader", name="van_nano").wait_for()
    assert page.get_by_role("columnheader", name=NAME).is_visible()
    assert (
        page.get_by_role("cell", name="2.8 M").is_visible() and page.get_by_role("cell", name="rocket 9").is_visible()
    )


def test_words_stream(page, chat):
    choose(page, encoded(square()))
    page.get_by_role("tab", name="Chat").click()
    talk = page.get_by_role("log", name="Conversation")
    for number in range(2):
        page.get_by_label("Question").fill("what is it?")
        page.get_by_role("button", name="Ask").click()
        answer = talk.locator("p.answer").nth(number)
        seen = set()
        while "</b>" not in (text := answer.text_content()):  # and not as an element: what a model says is text
            seen.add(text)
            page.wait_for_timeout(20)
        assert {"You ", "You asked: "} <= seen
        page.get_by_role("img", name="8 of 16 visual tokens").wait_for()
        page.wait_for_function("!document.body.hasAttribute('aria-busy')")
    assert chat.asked[-2:] == [
        ([], "what is it?", 0.5),
        ([("what is it?", "You asked: what is it? <b>0</b>")], "what is it?", 0.5),
    ]
    page.get_by_role("button", name="New conversation").click()
    talk.locator("p").first.wait_for(state="detached")


def test_errors_are_sentences(page):
    page.get_by_role("button", name="Classify", exact=True).click()
    page.get_by_role("alert").get_by_text("Choose a picture first").wait_for()
    choose(page, b"<script>no picture</script>")
    for tab in ("Classify", "Detect", "Segment", "Compare"):
        press(page, tab)
        page.get_by_role("alert").get_by_text("The picture is not a picture of a kind read here").last.wait_for()
    choose(page, encoded(picture(0, (2000, 1000))))
    press(page, "Classify")
    page.get_by_role("alert").get_by_text("more than 1,000,000 pixels").wait_for()


def test_everything_has_a_name_for_a_screen_reader(page):
    choose(page, encoded())
    for tab in ("Classify", "Detect", "Segment", "Chat", "Compare"):
        page.get_by_role("tab", name=tab).click()
        for line in page.locator("body").aria_snapshot().splitlines():
            control = line.strip().removeprefix("- ").rstrip(":")
            if control.split(" ")[0] in ("button", "slider", "textbox", "combobox", "spinbutton", "tab", "log"):
                assert '"' in control, control


def test_without_the_token_there_is_no_page(browser, address):
    context = browser.new_context()
    assert context.request.get(address).status == 401
    context.close()
