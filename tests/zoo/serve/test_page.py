"""The page as it is sent: what it has for which models, and that it needs nothing but the API."""

import json
import re

import pytest

pytest.importorskip("gradio", reason="serving needs the serve extra")
pytest.importorskip("fastapi_offline", reason="serving needs the serve extra")

from serving import NAME, serving

from zoo.serve import Chat, Models
from zoo.serve.models import load_models


def config(client):
    """What Gradio builds the page from."""
    text = client.get("/").text
    return json.loads(re.search(r"window\.gradio_config = (\{.*?\});</script>", text, re.DOTALL).group(1))


def props(found, kind):
    return [component["props"] for component in found["components"] if component["type"] == kind]


class Silent(Chat):
    def __init__(self):
        self.name = "silent"


def test_the_tabs_are_those_of_the_models(classifier):
    tasks = {"detect": "There are no boxes.", "segment": "There is no map."}
    with serving(Models({NAME: classifier}, missing=tasks)) as client:
        found = config(client)
        assert [tab["label"] for tab in props(found, "tabitem")] == ["Classify", "Detect", "Segment", "Compare"]
        texts = " ".join(text["value"] for text in props(found, "markdown"))
        assert "does not detect. There are no boxes." in texts and "does not segment. There is no map." in texts
    with serving(Models({NAME: classifier}, object(), object(), Silent())) as client:
        found = config(client)
        assert [tab["label"] for tab in props(found, "tabitem")] == ["Classify", "Detect", "Segment", "Chat", "Compare"]
        assert len(props(found, "markdown")) == 1


def test_no_click_needs_a_function_of_gradio(classifier):
    with serving(Models({NAME: classifier}, object(), object(), Silent())) as client:
        found = config(client)
    assert len(found["dependencies"]) == 7
    for event in found["dependencies"]:
        assert not event["backend_fn"] and re.fullmatch(r"zoo\.\w+", event["js"])


def test_what_can_be_set_has_a_label(classifier):
    with serving(Models({NAME: classifier}, object(), object(), Silent())) as client:
        found = config(client)
    for kind in ("slider", "dropdown", "textbox", "label"):
        assert props(found, kind) and all(one["label"] for one in props(found, kind)), kind
    (picture, *_) = [one for one in props(found, "html") if "file" in str(one.get("html_template"))]
    assert 'aria-label="Picture"' in picture["html_template"] and len(picture["value"]) == 12


def test_the_page_loads_nothing_from_elsewhere(client):
    text = client.get("/").text
    loaded = re.findall(r'<(?:script|link|img|iframe)[^>]*(?:src|href)="([^"]*)"', text)
    assert loaded and not [url for url in loaded if "//" in url]
    assert "fonts.googleapis" not in client.get("/theme.css").text


def test_unknown_classifiers_are_refused():
    with pytest.raises(ValueError, match="There is no model 'van_nan'; the nearest names are"):
        load_models(["van_nan"])
    with pytest.raises(ValueError, match="no classifier to serve"):
        Models({})
