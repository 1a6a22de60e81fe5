"""zoo.Classifier: names and features are those of the model run by hand, whatever the batch, workers or input."""

import gc
import threading
import time

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config

from zoo.classifier import Classifier, check_name
from zoo.images import ImageError, read_image

NAME = "test_convnext"  # of timm, 0.3 M parameters, 160 x 160


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = timm.create_model(NAME)
    with torch.no_grad():
        model.head.fc.weight.mul_(30)  # so that the probabilities are not all about 1 / 1000
    return model


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    from safetensors.torch import save_file

    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_file(model.state_dict(), path)
    return str(path)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for index, size in enumerate([(200, 160), (90, 300), (160, 160), (31, 17), (400, 250), (161, 163), (1, 1)]):
        coarse = Image.fromarray(generator.integers(0, 256, (5, 6, 3), dtype=np.uint8))
        coarse.resize(size, Image.Resampling.BICUBIC).save(folder / f"{index}.png")
    return sorted(map(str, folder.iterdir()))


def logits_by_hand(model, paths):
    transform = create_transform(**resolve_data_config({}, model=model))
    batch = torch.stack([transform(Image.open(path).convert("RGB")) for path in paths])
    with torch.no_grad():
        return model.eval()(batch)


def assert_same(prediction, logits, top_k=5):
    values, indices = logits.softmax(-1).topk(top_k)
    assert list(prediction.indices) == indices.tolist()
    torch.testing.assert_close(torch.tensor(prediction.probabilities), values, rtol=1e-4, atol=1e-6)


def test_predictions_are_those_of_the_model_run_by_hand(model, pictures):
    predictions = Classifier(model, batch_size=3).predict(pictures, top_k=4)
    names = timm.data.ImageNetInfo().label_descriptions()
    assert len(predictions) == len(pictures)
    for prediction, logits in zip(predictions, logits_by_hand(model, pictures), strict=True):
        assert_same(prediction, logits, top_k=4)
        assert list(prediction.names) == [names[index] for index in prediction.indices]
    assert len({prediction.indices for prediction in predictions}) > 1


def test_one_picture_of_any_kind(model, pictures):
    classifier = Classifier(model)
    (want,) = logits_by_hand(model, pictures[:1])
    image = read_image(pictures[0])
    array = np.asarray(image)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    for source in (pictures[0], image, array, tensor, tensor / 255, (tensor / 255).double(), array[None], tensor[None]):
        (prediction,) = classifier.predict(source)
        assert_same(prediction, want)
    assert classifier.predict([]) == []
    with pytest.raises(ImageError, match=r"2\.1.*expected floats"):
        classifier.predict(torch.full((3, 8, 8), 2.1))


def test_a_result_does_not_depend_on_its_batch(model, pictures):
    alone = [Classifier(model, batch_size=1, workers=1).predict(path)[0] for path in pictures]
    for batch_size, workers in ((2, 1), (7, 3), (64, 8)):
        together = Classifier(model, batch_size=batch_size, workers=workers).predict(pictures)
        for one, other in zip(alone, together, strict=True):
            assert one.indices == other.indices
            assert one.probabilities == pytest.approx(other.probabilities, rel=1e-4, abs=1e-6)


def test_errors_do_not_stop_a_stream_or_change_its_order(model, pictures, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_text("not a picture")
    sources = [str(broken), *pictures[:3], str(tmp_path / "missing.png"), *pictures[3:], str(broken)]
    results = list(Classifier(model, batch_size=2).predict_all(sources))
    assert [result.source for result in results] == sources
    assert [index for index, result in enumerate(results) if result.error] == [0, 4, 9]
    assert "missing.png does not exist" in str(results[4].error)
    good = [result.prediction for result in results if not result.error]
    for prediction, logits in zip(good, logits_by_hand(model, pictures), strict=True):
        assert_same(prediction, logits)
    with pytest.raises(ImageError, match="is not a picture"):
        Classifier(model).predict([pictures[0], broken])
    assert all(result.error for result in Classifier(model).predict_all([broken] * 40))


def test_a_stream_reads_only_a_little_ahead(model, pictures):
    taken = 0

    def endless():
        nonlocal taken
        while True:
            taken += 1
            yield pictures[taken % len(pictures)]

    before = set(threading.enumerate())  # threads of earlier tests among them, which may end at any time
    results = Classifier(model, batch_size=4, workers=2).predict_all(endless())
    for number in range(1, 11):
        next(results)
        assert taken <= number + 3 * 4
    ours = set(threading.enumerate()) - before
    results.close()
    deadline = time.monotonic() + 30
    while ours & set(threading.enumerate()) and time.monotonic() < deadline:
        time.sleep(0.01)  # they end after the picture that they are decoding
    assert ours and not ours & set(threading.enumerate())


def test_an_abandoned_stream_does_not_wait_for_its_threads(model, pictures, monkeypatch):
    """The garbage collector runs in any place, also where threads start: waiting for one there would be forever."""
    results = Classifier(model, batch_size=2).predict_all(pictures * 2)
    next(results)
    waited_for = []
    monkeypatch.setattr(threading.Thread, "join", lambda thread, *_: waited_for.append(thread))
    del results
    gc.collect()
    assert not waited_for


def test_embeddings(model, pictures):
    transform = create_transform(**resolve_data_config({}, model=model))
    batch = torch.stack([transform(read_image(path)) for path in pictures])
    with torch.no_grad():
        want = model.eval().forward_head(model.forward_features(batch), pre_logits=True).numpy()
    classifier = Classifier(model, batch_size=3)
    got = classifier.embed(pictures)
    assert got.dtype == np.float32 and got.shape == (7, model.num_features) and want.std() > 0.1
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    assert classifier.embed([]).shape == (0, model.num_features)
    results = list(classifier.embed_all([pictures[0], "missing.png"]))
    assert results[1].error and results[1].embedding is None and results[0].prediction is None
    assert np.array_equal(results[0].embedding, classifier.embed(pictures[0])[0])
    headless = timm.create_model(NAME, num_classes=0)
    headless.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("head.fc")})
    np.testing.assert_allclose(Classifier(headless).embed(pictures), want, rtol=1e-4, atol=1e-5)


def test_a_name_with_a_checkpoint(model, checkpoint, pictures):
    (prediction,) = Classifier(NAME, checkpoint=checkpoint, device="cpu").predict(pictures[0])
    assert_same(prediction, logits_by_hand(model, pictures[:1])[0])
    fresh = timm.create_model(NAME)
    (prediction,) = Classifier(fresh, checkpoint=checkpoint).predict(pictures[0])
    assert_same(prediction, logits_by_hand(model, pictures[:1])[0])


def test_labels(model, checkpoint, pictures):
    labels = [f"thing {index}" for index in range(1000)]
    (prediction,) = Classifier(model, labels=labels).predict(pictures[0])
    assert prediction.names == tuple(f"thing {index}" for index in prediction.indices)
    few = timm.create_model(NAME, num_classes=3)
    (prediction,) = Classifier(few).predict(pictures[0], top_k=99)  # more than there are
    assert sorted(prediction.names) == ["class 0", "class 1", "class 2"]
    assert sum(prediction.probabilities) == pytest.approx(1)
    with pytest.raises(ValueError, match="3 classes, but 2 labels"):
        Classifier(few, labels=["a", "b"])

    class Plain(torch.nn.Module):  # no timm model: the number of its classes shows in its outputs
        def forward(self, x):
            return x.mean((2, 3))

    (prediction,) = Classifier(Plain(), labels=["red", "green", "blue"]).predict(Image.new("RGB", (8, 8), "lime"))
    assert prediction.names[0] == "green"
    with pytest.raises(ValueError, match="3 classes, but 2 labels"):
        Classifier(Plain(), labels=["a", "b"]).predict(pictures[0])
    with pytest.raises(ValueError, match="Plain is not a timm model"):
        Classifier(Plain()).embed(pictures[0])


def test_a_head_of_another_size_is_made_for_the_labels(tmp_path, pictures):
    from safetensors.torch import save_file

    torch.manual_seed(1)
    few = timm.create_model(NAME, num_classes=3)
    save_file(few.state_dict(), tmp_path / "few.safetensors")
    classifier = Classifier(NAME, checkpoint=str(tmp_path / "few.safetensors"), labels=["a", "b", "c"], device="cpu")
    assert_same(classifier.predict(pictures[0])[0], logits_by_hand(few, pictures[:1])[0], top_k=3)


def test_extreme_aspect_ratios_stay_small(model, monkeypatch):
    seen = []
    classifier = Classifier(model)
    transform = classifier._transform
    monkeypatch.setattr(classifier, "_transform", lambda image: seen.append(image.size) or transform(image))
    line = Image.new("RGB", (1, 20_000), "red")
    dot = Image.new("RGB", (1, 1), "red")
    assert_same(classifier.predict(line)[0], classifier.model(transform(dot)[None])[0])
    assert seen == [(1, 64)]
    (result,) = classifier.predict_all([line], thumbnail=100)
    assert result.thumbnail.height == 100 and result.thumbnail.width >= 1


def test_amp_is_close_and_different(model, pictures):
    exact = Classifier(model).predict(pictures[0], top_k=1000)[0]
    rounded = Classifier(model, amp=True).predict(pictures[0], top_k=1000)[0]
    by_index = dict(zip(rounded.indices, rounded.probabilities, strict=True))
    difference = max(abs(by_index[i] - p) for i, p in zip(exact.indices, exact.probabilities, strict=True))
    assert 0 < difference < 0.1 * exact.probabilities[0]
    assert sum(rounded.probabilities) == pytest.approx(1, abs=1e-5)  # softmax in float32


def test_a_half_precision_model(model, pictures):
    import copy

    classifier = Classifier(copy.deepcopy(model).to(torch.bfloat16))
    assert classifier.embed(pictures[0]).dtype == np.float32
    assert sum(classifier.predict(pictures[0], top_k=1000)[0].probabilities) == pytest.approx(1, abs=1e-5)


def test_the_model_evaluates_without_gradients(pictures):
    model = timm.create_model(NAME, drop_path_rate=0.9).train()
    classifier = Classifier(model)
    assert classifier.predict(pictures[0]) == classifier.predict(pictures[0])
    assert not model.training and all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "reznet18"}, "no model 'reznet18'; the nearest names are resnet18"),
        ({"model": "test_convnext.foo"}, "foo"),
        ({"device": "nonsense"}, "'nonsense' cannot be used here"),
        ({"batch_size": 0}, "at least 1"),
        ({"workers": 0}, "at least 1"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises((ValueError, RuntimeError), match=message) as caught:
        Classifier(**arguments)
    assert "\n" not in str(caught.value)


def test_bad_calls(model, pictures):
    with pytest.raises(ValueError, match="top_k must be at least 1"):
        Classifier(model).predict(pictures[0], top_k=0)
    with pytest.raises(ValueError, match=r"no classes \(num_classes=0\)"):
        Classifier(timm.create_model(NAME, num_classes=0)).predict(pictures[0])
    with pytest.raises(ValueError, match="has no pooling"):
        Classifier(timm.create_model(NAME, num_classes=0, global_pool="")).embed(pictures[0])
    with pytest.raises(TypeError, match="expected a path"):
        Classifier(model).predict(7)


def test_a_name_without_weights_is_refused():
    name = next(name for name in timm.list_models() if not timm.get_pretrained_cfg(name).has_weights)
    with pytest.raises(ValueError, match=f"{name} has no weights of its own"):
        Classifier(name)


def test_check_name_lets_hub_names_pass():
    check_name("hf-hub:timm/resnet18.a1_in1k")
    check_name("resnet18.a1_in1k")
