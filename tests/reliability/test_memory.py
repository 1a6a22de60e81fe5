"""Where the memory of the GPU runs out, batches are halved, and the results are those of whole batches."""

import warnings

import numpy as np
import pytest
import timm
import torch

from zoo.classifier import Classifier
from zoo.memory import PartsThatFit

MESSAGE = "CUDA out of memory. Tried to allocate 2.00 GiB."


def small(most, sizes):
    """A stand-in for a GPU that has memory for so many pictures; notes the sizes that it was given."""

    def compute(part):
        sizes.append(len(part))
        if len(part) > most:
            raise torch.OutOfMemoryError(MESSAGE)
        return [2 * value for value in part]

    return compute


def test_a_batch_is_halved_until_it_fits():
    sizes, parts = [], PartsThatFit()
    with pytest.warns(UserWarning) as said:
        found = parts(small(3, sizes), list(range(10)))
    assert [value for part in found for value in part] == [2 * value for value in range(10)]
    assert sizes == [10, 5, 2, 2, 2, 2, 2]
    assert [str(warning.message) for warning in said] == [
        "The GPU has no memory for 10 pictures at once: going on with 5.",
        "The GPU has no memory for 5 pictures at once: going on with 2.",
    ]


def test_later_batches_begin_with_what_fitted():
    sizes, parts = [], PartsThatFit()
    with pytest.warns(UserWarning):
        parts(small(4, sizes), list(range(8)))
    sizes.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        parts(small(4, sizes), list(range(7)))
    assert sizes == [4, 3]


def test_a_single_picture_that_does_not_fit_is_one_sentence():
    with pytest.raises(torch.OutOfMemoryError, match="no memory left for a single picture"), pytest.warns(UserWarning):
        PartsThatFit()(small(0, []), [1, 2])


def test_other_errors_are_not_taken_for_it():
    def broken(part):
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        PartsThatFit()(broken, [1, 2])


@pytest.mark.parametrize("method", ["predict_all", "embed_all"])
def test_a_classifier_goes_on(method):
    torch.manual_seed(0)
    model = timm.create_model("test_convnext").eval()
    pictures = list(np.random.default_rng(0).integers(0, 256, (5, 40, 40, 3), dtype=np.uint8))
    wanted = list(getattr(Classifier(model), method)(pictures))
    forward = model.forward_features

    def limited(batch):
        if len(batch) > 1:
            raise torch.OutOfMemoryError(MESSAGE)
        return forward(batch)

    model.forward_features = limited
    with pytest.warns(UserWarning, match=r"no memory for 4 pictures at once: going on with 2"):
        found = list(getattr(Classifier(model, batch_size=4), method)(pictures))
    assert len(found) == 5
    for one, other in zip(found, wanted):
        if method == "embed_all":
            np.testing.assert_allclose(one.embedding, other.embedding, rtol=1e-4, atol=1e-5)
        else:
            assert one.prediction.indices == other.prediction.indices
            np.testing.assert_allclose(one.prediction.probabilities, other.prediction.probabilities, rtol=1e-4)


def test_a_dense_model_goes_on(monkeypatch):
    """Without mmdet: the stream of `DenseModel` around a stand-in for its model."""
    from zoo.dense import DenseModel

    class Model(DenseModel):
        def __init__(self):
            self.batch_size, self.workers, self._in_parts = 4, 1, PartsThatFit()
            self.model, self.sizes = self, []

        def _prepare(self, item):
            return {"inputs": torch.from_numpy(item["img"].copy())}

        def test_step(self, batch):
            self.sizes.append(len(batch["inputs"]))
            if len(batch["inputs"]) > 2:
                raise torch.OutOfMemoryError(MESSAGE)
            return [int(picture.float().mean()) for picture in batch["inputs"]]

        def _answer(self, sample, size):
            return sample

    pictures = [np.full((6, 6, 3), shade, np.uint8) for shade in (10, 20, 30, 40, 50)]
    model = Model()
    with pytest.warns(UserWarning, match="no memory for 4 pictures"):
        assert [result.answer for result in model.predict_all(pictures)] == [10, 20, 30, 40, 50]
    assert model.sizes == [4, 2, 2, 1]
