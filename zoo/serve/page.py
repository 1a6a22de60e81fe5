"""The page: a picture at the left, and a tab for each thing to ask of it. All of it asks the JSON API."""

from collections.abc import Sequence
from importlib.resources import files

import gradio as gr
from fastapi import FastAPI

from zoo.catalogue import CATALOGUE
from zoo.serve.models import LEAST_SCORE, Models

TITLE = "linear-vision-zoo"
ABOUT = (
    f"# {TITLE}\nName, find and talk about what is in a picture. Pictures stay on this server only while they are "
    "looked at. The same as a [JSON API](docs)."
)
PICTURE = """
<label class="zoo-drop">
  <span>Choose, take, drop or paste a picture</span>
  <input type="file" accept="image/*" aria-label="Picture">
  <img alt="The chosen picture" hidden>
</label>
<div class="zoo-samples" role="group" aria-label="Example pictures">
  {{#each value}}
  <button type="button" data-name="{{this}}"><img src="samples/{{this}}.jpg" alt="{{this}}"></button>
  {{/each}}
</div>
"""


def mount_page(app: FastAPI, models: Models, samples: Sequence[str]) -> FastAPI:
    """Add the page to an app, at its root.

    Args:
        app: with the API.
        models: what it serves.
        samples: names of the pictures under /samples, without ".jpg".
    """
    folder = files("zoo.serve")
    script, style = (folder.joinpath(name).read_text(encoding="utf-8") for name in ("page.js", "page.css"))
    # Fonts of the reader's own machine: nothing is loaded from elsewhere.
    theme = gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    return gr.mount_gradio_app(
        app,
        _build(models, samples),
        path="/",
        theme=theme,
        css=style,
        head=f"<script>{script}</script>",
        ssr_mode=False,
        enable_monitoring=False,
        mcp_server=False,
        pwa=False,
        footer_links=[],
    )


def _build(models: Models, samples: Sequence[str]) -> gr.Blocks:
    names = list(models.classifiers)
    with gr.Blocks(title=TITLE, analytics_enabled=False) as page:
        gr.Markdown(ABOUT)
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                gr.HTML(list(samples), html_template=PICTURE, js_on_load="zoo.attach(element)")
            with gr.Column(scale=3, min_width=300), gr.Tabs():
                with gr.Tab("Classify"):
                    _classify(names)
                with gr.Tab("Detect"):
                    _detect() if models.detector else gr.Markdown(_missing(models, "detect"))
                with gr.Tab("Segment"):
                    _segment() if models.segmenter else gr.Markdown(_missing(models, "segment"))
                if models.chat:
                    with gr.Tab("Chat"):
                        _chat()
                with gr.Tab("Compare"):
                    _compare(names)
    return page


def _classify(names: Sequence[str]) -> None:
    model = gr.Dropdown(names, value=names[0], label="Model", visible=len(names) > 1)
    count = gr.Slider(1, 10, 5, step=1, label="Number of names")
    button, status = _button("Classify")
    answer = gr.Label(label="Names")
    button.click(None, [model, count], [status, answer], js="zoo.classify")


def _detect() -> None:
    score = gr.Slider(LEAST_SCORE, 1, 0.3, step=0.05, label="Least score")
    button, status = _button("Detect")
    button.click(None, score, [status, gr.HTML()], js="zoo.detect")


def _segment() -> None:
    button, status = _button("Segment")
    button.click(None, None, [status, gr.HTML()], js="zoo.segment")


def _chat() -> None:
    keep = gr.Slider(0.05, 1, 0.5, step=0.05, label="Share of the visual tokens that is kept")
    gr.HTML('<div id="zoo-talk" role="log" aria-label="Conversation"></div>')
    question = gr.Textbox(label="Question", placeholder="What is in the picture?", max_lines=3)
    button, status = _button("Ask")
    again = gr.Button("New conversation")
    seen = gr.HTML()
    for ask in (button.click, question.submit):
        ask(None, [question, keep], [status, question, seen], js="zoo.chat")
    again.click(None, None, [status, seen], js="zoo.forget")


def _compare(names: Sequence[str]) -> None:
    known = [*names, *(name for name in CATALOGUE if name not in names)]
    with gr.Row():
        pair = [
            gr.Dropdown(known, value=known[place], label=label, min_width=140)
            for place, label in enumerate(("First model", "Second model"))
        ]
    button, status = _button("Compare")
    button.click(None, pair, [status, gr.HTML()], js="zoo.compare")


def _button(text: str) -> tuple[gr.Button, gr.HTML]:
    return gr.Button(text, variant="primary"), gr.HTML(elem_classes="zoo-status")


def _missing(models: Models, task: str) -> str:
    return f"This server does not {task}. {models.missing.get(task, 'It was left out.')}"
