"""lmms-eval drives an accelerated model: ``lmms-eval --model zoo_mllm --model_args pretrained=...,reduce='"..."'``.

lmms-eval finds this file by the entry point of the package; nothing else imports it.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from PIL import Image

from zoo.mllm.accelerate import accelerate
from zoo.mllm.conversations import PLACEHOLDER
from zoo.mllm.loading import load
from zoo.mllm.prompts import encode, generate, message
from zoo.mllm.trained import load_trained

try:
    from lmms_eval.api.model import lmms
    from lmms_eval.models.registry_v2 import ModelManifest
except ImportError:
    raise ImportError("The adapter needs lmms-eval: pip install lmms-eval.") from None

# Of a task's options, those that are model.generate's; the latter only where it draws its answers at random.
OPTIONS, SAMPLING = ("max_new_tokens", "num_beams"), ("do_sample", "temperature", "top_p")


def manifest() -> ModelManifest:
    """What lmms-eval is told: the model's name and where its class is."""
    return ModelManifest(model_id="zoo_mllm", simple_class_path=f"{__name__}.ZooModel")


class ZooModel(lmms):
    """A model of ``zoo.mllm.load`` under ``zoo.mllm.accelerate``, for tasks with pictures that are answered in text.

    Args:
        pretrained: folder or hub id.
        reduce: reductions joined by ``+``, as text; empty for none.
        batch_size: questions asked together.
        device: where the model goes; None for a GPU, if there is one.
        dtype: of the model.
        max_new_tokens: of an answer, where a task does not say.
        **kwargs: what lmms-eval tells all models, and is not needed.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        reduce: str = "",
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str = "bfloat16",
        max_new_tokens: int = 64,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.model, self.processor = load(pretrained, dtype=getattr(torch, dtype))
        self.model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.batch_size, self.max_new_tokens = int(batch_size), max_new_tokens
        plan = reduce.strip("\"'").split("+") if reduce else []
        self.handle = accelerate(self.model, plan, **load_trained(pretrained, self.model))

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answers to requests; those with the same options are asked together.

        Args:
            requests: with ``args``: text, options, the function that gives a document's pictures, the document's
                number, task and split.
        """
        alike: dict[str, list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            alike[repr(request.args[1])].append(number)
        answers = [""] * len(requests)
        for numbers in alike.values():
            for start in range(0, len(numbers), self.batch_size):
                batch = numbers[start : start + self.batch_size]
                for number, answer in zip(batch, self._ask([requests[number].args for number in batch])):
                    text, options = requests[number].args[:2]
                    answers[number] = answer
                    self.cache_hook.add_partial("generate_until", (text, options), answer)
        return answers

    def _ask(self, batch: Sequence[tuple[str, dict[str, Any], Callable, Any, str, str]]) -> Iterator[str]:
        talks = []
        for text, _, pictures_of, document, task, split in batch:
            pictures = pictures_of(self.task_dict[task][split][document]) or []
            if not all(isinstance(picture, Image.Image) for picture in pictures):
                raise ValueError(f"The task {task} shows something else than pictures: only pictures are supported.")
            pictures = [picture.convert("RGB") for picture in pictures]
            talks.append([message("user", text.replace(PLACEHOLDER, "").strip(), pictures)])
        told = batch[0][1]
        names = (*OPTIONS, *SAMPLING) if told.get("do_sample") else OPTIONS
        options = {"max_new_tokens": self.max_new_tokens} | {name: told[name] for name in names if name in told}
        until = told.get("until") or []
        found = generate(self.model, self.processor, encode(self.model, self.processor, talks), **options)
        for answer in found:
            for stop in [until] if isinstance(until, str) else until:
                answer = answer.partition(stop)[0] if stop else answer
            yield answer.strip()

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Not supported."""
        raise NotImplementedError("zoo_mllm does not rate given answers: choose tasks of the type generate_until.")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Not supported."""
        raise NotImplementedError("zoo_mllm does not answer in rounds: choose tasks of the type generate_until.")
