"""Which tokens of a picture the layers of a multimodal model see, as one picture."""

from collections.abc import Sequence
from pathlib import Path

from zoo.files import replacing
from zoo.images import Source, read_image
from zoo.mllm import accelerate
from zoo.mllm.prompts import encode, generate, message

HALF = "fastv:layer=2,keep=0.5"  # arXiv:2403.06764


def draw_kept_tokens(
    image: Source,
    folder: str,
    out: Path,
    *,
    prompt: str = "What is in the picture?",
    reduce: Sequence[str] = (HALF,),
    device: str | None = None,
) -> None:
    """Ask a multimodal model about a picture and write a PNG with ``zoo.mllm.plots.draw_kept``.

    Args:
        image: anything `zoo.images.read_image` takes.
        folder: of the model, or its name on the Hugging Face Hub.
        out: the file.
        prompt: the question, which decides what is kept in most methods.
        reduce: methods of ``zoo.mllm.accelerate``, besides what the model was trained with.
        device: where to compute, by default the first GPU, else the CPU.

    Raises:
        ImageError: the picture cannot be read.
        ImportError: transformers or matplotlib is not installed.
        ValueError: the model cannot be loaded, there is no such method, or the tokens form no grid.
    """
    from zoo.chat import load, options

    picture = read_image(image)
    model, processor = load(folder, device)
    with accelerate(model, list(reduce), **options(folder, model, processor, None)) as handle:
        inputs = encode(model, processor, [[message("user", prompt, [picture])]])
        generate(model, processor, inputs, max_new_tokens=1)
        with replacing(out) as part:
            handle.plot(part, [picture])
