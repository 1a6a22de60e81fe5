"""The adapter for lmms-eval: under a stand-in for lmms-eval's interface, and under the real one if it is there."""

import abc
import importlib.util
import sys
import types
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("transformers", reason="multimodal models need the mllm extra")

from zoo.mllm import accelerate, load
from zoo.mllm.conversations import read_conversations
from zoo.mllm.prompts import encode, generate, message

_spec = importlib.util.spec_from_file_location("tiny_vlm", Path(__file__).parents[1] / "tools" / "tiny_vlm.py")
tiny = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tiny)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Data and a model, as ``tiny.model`` says."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny.language_model(folder / "lm")
    tiny.data(folder, count=5)
    tiny.model(folder)
    return folder


@pytest.fixture
def asked(folder):
    """Texts and pictures."""
    return [(talk.turns[0][0], talk.images) for talk in read_conversations(folder / "train.json")]


@pytest.fixture
def adapter(monkeypatch):
    """The adapter, with a stand-in for lmms-eval's interface (0.7)."""
    monkeypatch.delitem(sys.modules, "zoo.mllm.lmms_adapter", raising=False)

    class Hook:
        def __init__(self):
            self.seen = []

        def add_partial(self, *arguments):
            self.seen.append(arguments)

    class Base(abc.ABC):
        def __init__(self):
            self.task_dict, self.cache_hook = {}, Hook()

        @abc.abstractmethod
        def loglikelihood(self, requests): ...

        @abc.abstractmethod
        def generate_until(self, requests): ...

        @abc.abstractmethod
        def generate_until_multi_round(self, requests): ...

    parts = {
        "lmms_eval": {},
        "lmms_eval.api": {},
        "lmms_eval.models": {},
        "lmms_eval.api.model": {"lmms": Base},
        "lmms_eval.models.registry_v2": {"ModelManifest": types.SimpleNamespace},
    }
    for name, content in parts.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    import zoo.mllm.lmms_adapter as found

    yield found
    sys.modules.pop("zoo.mllm.lmms_adapter", None)


def test_lmms_eval_drives_an_accelerated_model(adapter, folder, asked):
    lm = adapter.ZooModel(
        str(folder / "model"),
        reduce='"uniform:layer=0,keep=0.5"',
        batch_size="3",
        dtype="float32",
        device="cpu",
        extra=1,
    )
    documents = [{"pictures": [Image.open(path) for path in images]} for _, images in asked]
    documents.append({"pictures": []})
    lm.task_dict = {"squares": {"test": documents}}

    def request(number, text, **options):
        arguments = (text, options, lambda document: document["pictures"], number, "squares", "test")
        return types.SimpleNamespace(args=arguments)

    requests = [request(number, text, max_new_tokens=4, until=["\n\n"]) for number, (text, _) in enumerate(asked)]
    requests.insert(2, request(5, "where is it ?", max_new_tokens=1, temperature=0, do_sample=False))
    found = lm.generate_until(requests)
    assert len(found[2].split()) <= 1 and len(lm.cache_hook.seen) == 6
    expected = []
    model, processor = load(folder / "model")
    with accelerate(model, "uniform:keep=0.5"):
        for (text, _), document in zip(asked, documents):
            pictures = [picture.convert("RGB") for picture in document["pictures"]]
            inputs = encode(model, processor, [[message("user", text, pictures)]])
            expected += generate(model, processor, inputs, max_new_tokens=4)
    assert found[:2] + found[3:] == [answer.strip() for answer in expected] and len(set(expected)) > 1
    stop = found[0].split()[-1]
    (cut,) = lm.generate_until([request(0, asked[0][0], max_new_tokens=4, until=stop)])
    assert found[0].startswith(cut) and cut != found[0] and stop not in cut
    assert lm.handle.report()["visual_tokens_per_layer"] == [processor.tokens_per_tile // 2] * 3
    with pytest.raises(NotImplementedError, match="generate_until"):
        lm.loglikelihood([])
    with pytest.raises(NotImplementedError, match="generate_until"):
        lm.generate_until_multi_round([])
    documents[0]["pictures"] = ["film.mp4"]
    with pytest.raises(ValueError, match="only pictures"):
        lm.generate_until(requests[:1])


def test_lmms_eval_is_told_where_the_model_is(adapter):
    told = adapter.manifest()
    module, _, name = told.simple_class_path.rpartition(".")
    assert told.model_id == "zoo_mllm" and getattr(sys.modules[module], name) is adapter.ZooModel


def test_the_real_lmms_eval_finds_the_model():
    pytest.importorskip("lmms_eval", reason="lmms-eval is not installed: pip install lmms-eval")
    from lmms_eval.models.registry_v2 import ModelRegistryV2

    registry = ModelRegistryV2()
    registry.load_entrypoint_manifests()
    assert registry.get_model_class("zoo_mllm", force_simple=True).__name__ == "ZooModel"


def test_the_adapter_needs_lmms_eval(monkeypatch):
    monkeypatch.delitem(sys.modules, "zoo.mllm.lmms_adapter", raising=False)
    monkeypatch.setitem(sys.modules, "lmms_eval", None)
    with pytest.raises(ImportError, match="needs lmms-eval"):
        import zoo.mllm.lmms_adapter  # noqa: F401
