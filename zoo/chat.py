"""`zoo chat` and `zoo demo-chat`: talk with a multimodal model about pictures."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from PIL import Image

from zoo.classifier import best_device, check_device
from zoo.cli import Device, Json, Urls, app, print_json
from zoo.images import URL, RemoteImage, read_image
from zoo.mllm import accelerate
from zoo.mllm.masks import RULES
from zoo.mllm.prompts import Message, encode, generate, message

PACKAGED = Path(str(files("zoo"))) / "weights" / "vlm_van_nano"  # of tools/train_mllm.py, without its language model
SCENE = Path(str(files("zoo"))) / "scenes" / "scene.jpg"
QUESTIONS = (  # and what is right
    ("How many things are there?", "5"),
    ("What is at the top left?", "dog face"),
    ("Where is the candle?", "bottom right"),
    ("What colour is the thing at the bottom?", "red"),
    ("Is the frog to the left of the crab?", "yes"),
    ("Is there a guitar?", "no"),
)

Model = Annotated[
    str | None, typer.Option(help="A folder or a Hugging Face name; by default the packaged small model.")
]
Images = Annotated[list[str] | None, typer.Option("--image", help="A picture to talk about; may be repeated.")]
Prompt = Annotated[str | None, typer.Option(help="One question; without it, one per line of the input.")]
Reduce = Annotated[
    list[str] | None,
    typer.Option(help="Fewer visual tokens, such as fastv:layer=2,keep=0.5; may be repeated. See docs/MLLM.md."),
]
Mask = Annotated[
    str | None, typer.Option(help=f"What visual tokens see: {', '.join(RULES)}; by default what they saw in training.")
]
Stream = Annotated[bool, typer.Option("--stream", help="Print an answer while it is made.")]
NewTokens = Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")]
Verbose = Annotated[bool, typer.Option("--verbose", help="Tell on stderr how many visual tokens each layer saw.")]


@dataclass
class Talk:
    """A conversation about pictures, which come with its first question.

    Attributes:
        model: of ``zoo.mllm.load``.
        processor: of the model.
        pictures: RGB.
        options: of ``model.generate``.
        messages: all turns so far.
    """

    model: Any
    processor: Any
    pictures: Sequence[Image.Image]
    options: dict[str, Any]
    messages: list[Message] = field(default_factory=list)

    def ask(self, prompt: str) -> str:
        """The answer to a question; both are remembered."""
        asked = [*self.messages, message("user", prompt, () if self.messages else self.pictures)]
        inputs = encode(self.model, self.processor, [asked])
        (answer,) = generate(self.model, self.processor, inputs, **self.options)
        self.messages = [*asked, message("assistant", answer.strip())]
        return answer.strip()


@app.command()
def chat(
    model: Model = None,
    image: Images = None,
    prompt: Prompt = None,
    reduce: Reduce = None,
    mask: Mask = None,
    stream: Stream = False,
    max_new_tokens: NewTokens = 256,
    device: Device = None,
    as_json: Json = False,
    verbose: Verbose = False,
    allow_urls: Urls = False,
) -> None:
    """Talk with a multimodal model about pictures; without --prompt until the input ends or Ctrl-C."""
    if as_json and stream:
        raise ValueError("--json and --stream exclude each other: leave one of them out.")
    if prompt is not None and not prompt.strip():
        raise ValueError("--prompt is empty: write a question, or leave it out to be asked for one.")
    if mask not in (None, *RULES):
        raise ValueError(f"--mask is {mask!r}, expected one of {', '.join(RULES)}.")
    sources = image or []
    pictures = [read_image(RemoteImage(one) if allow_urls and URL.match(one) else one) for one in sources]
    loaded, processor = load(model, device)
    talk = Talk(loaded, processor, pictures, {"max_new_tokens": max_new_tokens})
    if stream:
        talk.options["streamer"] = _streamer(processor)
    turns: list[dict[str, str]] = []
    with ExitStack() as stack:
        trained = options(model, loaded, processor, mask)
        handle = None
        if reduce or trained or verbose:
            handle = stack.enter_context(accelerate(loaded, reduce or [], **trained))
        for question in [prompt] if prompt else _questions():
            answer = _ask(talk, question, alone=prompt is not None)
            if answer is None:
                continue
            turns.append({"prompt": question, "answer": answer})
            if not (as_json or stream):
                typer.echo(answer)
            if verbose:
                _print_report(handle.report())
        if not turns and not _typed():
            raise ValueError("There was no question: give --prompt, or one question per line of the input.")
        if as_json:
            report = {"report": handle.report()} if handle and turns else {}
            print_json({"model": model or PACKAGED.name, "images": sources, "turns": turns, **report})


@app.command("demo-chat")
def demo_chat() -> None:
    """Ask the packaged small model a few questions about the packaged scene, whose style it was not trained on."""
    talk = Talk(*load(None, "cpu"), [read_image(SCENE)], {"max_new_tokens": 16})
    typer.echo(f"About {SCENE}:")
    for question, right in QUESTIONS:
        talk.messages = []  # each on its own, as it was measured
        answer = talk.ask(question)
        typer.echo(f"{question} {answer}" + ("" if answer.lower() == right else f" (no: {right})"))


def load(path: str | None, device: str | None) -> tuple[Any, Any]:
    """A model and its processor, ready to answer; float32 on a CPU, else as it was saved.

    Args:
        path: a folder or a Hugging Face name; None for the packaged small model.
        device: as of torch; None for the first GPU, else the CPU.

    Raises:
        ImportError: transformers is not installed.
        ValueError: there is no such model, or it is no multimodal one.
    """
    if not find_spec("transformers"):
        raise ImportError("Talking needs transformers: pip install 'linear-vision-zoo[mllm]'.")
    if path is None and not PACKAGED.exists():
        raise ValueError(
            f"The packaged model is missing ({PACKAGED} is no folder): train it as configs/README.md says, or give "
            "`zoo chat` another --model, a folder or a name of the Hugging Face Hub."
        )
    place = check_device(device or best_device())
    from transformers.utils import logging

    from zoo.mllm import loading

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        model, processor = loading.load(path or PACKAGED, dtype=torch.float32 if place.type == "cpu" else "auto")
    except (OSError, ValueError, KeyError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".:")
        raise ValueError(f"{path or PACKAGED} cannot be loaded as a multimodal model: {reason}.") from error
    return model.to(place), processor


def options(path: str | None, model: Any, processor: Any, mask: str | None) -> dict[str, Any]:
    """The arguments of ``accelerate`` that a model was trained with, but for the mask if one is given.

    Args:
        path: as of ``load``.
        model: of ``load``.
        processor: of ``load``.
        mask: what visual tokens see; None for what they saw in training.
    """
    from zoo.mllm.conversations import assistant_marker
    from zoo.mllm.trained import load_trained

    trained = load_trained(path or PACKAGED, model)
    if mask is not None:
        trained["mask"] = mask
    if trained.get("mask", "causal").startswith("mma") and "prompt_end" not in trained:
        trained["prompt_end"] = assistant_marker(processor)
    return trained


def _streamer(processor: Any) -> Any:
    from transformers import TextStreamer

    return TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)


def _typed() -> bool:
    return sys.stdin.isatty()


def _questions() -> Iterator[str]:
    """Lines that are typed, or come through a pipe, until their end or Ctrl-C."""
    typed = _typed()
    while True:
        try:
            if typed:
                typer.echo("> ", nl=False, err=True)
            line = input().strip()
        except (EOFError, KeyboardInterrupt):
            if typed:
                typer.echo(err=True)
            return
        if line:
            yield line


def _ask(talk: Talk, question: str, alone: bool) -> str | None:
    """The answer; None where someone types, and stopped it with Ctrl-C or asked what cannot be asked."""
    ends = alone or not _typed()
    try:
        return talk.ask(question)
    except KeyboardInterrupt:
        if ends:
            raise
        typer.echo("\nStopped.", err=True)
    except ValueError as error:
        if ends:
            raise
        typer.echo(f"zoo: {error}", err=True)
    return None


def _print_report(report: dict[str, Any]) -> None:
    for name, value in report.items():
        typer.echo(f"{name}: {value}", err=True)
