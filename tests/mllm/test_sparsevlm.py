"""SparseVLM: who rates, what is kept, and what is recycled."""

import pytest
import torch
from against_plain import IMAGE, generated, logits, seen_by_layers

from zoo.mllm import SparseVLM, TokenLayout, accelerate
from zoo.mllm.base import Scene
from zoo.mllm.reduce import parse_reduction
from zoo.mllm.sparsevlm import density_peaks

IDS = torch.tensor([[1, 2, 9, 9, 9, 3, 4, 5, 6], [0, 0, 1, 9, 9, 3, 4, 5, 6]])
LAYOUT = TokenLayout.from_ids(IDS, [9], IDS != 0)


def raters_of(layout, embeds):
    return [row.nonzero()[:, 0].tolist() for row in SparseVLM().queries(layout, embeds)]


def slow_raters(layout, embeds, row, question):
    """mean_v softmax_t(V T^T) above its mean, one by one."""
    shares = dict.fromkeys(question, 0.0)
    visual = layout.is_image[row].nonzero()[:, 0].tolist()
    for place in visual:
        weights = {word: float((embeds[row, place] * embeds[row, word]).sum().exp()) for word in question}
        for word, weight in weights.items():
            shares[word] += weight / sum(weights.values()) / len(visual)
    mean = sum(shares.values()) / len(shares)
    return [word for word in question if shares[word] > mean]


def test_words_that_look_at_the_image_rate():
    embeds = torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(3))
    found = raters_of(LAYOUT, embeds)
    assert found == [slow_raters(LAYOUT, embeds, row, [5, 6, 7, 8]) for row in range(2)]
    assert all(0 < len(row) < 4 for row in found)


def test_a_question_before_its_image_rates_and_an_answer_does_not():
    ids = torch.tensor([[1, 3, 4, 5, 9, 9, 8, 6, 7]])
    embeds = torch.randn(1, 9, 4, generator=torch.Generator().manual_seed(4))
    before = TokenLayout.from_ids(ids[:, :6], [9])
    assert raters_of(before, embeds[:, :6]) == [slow_raters(before, embeds, 0, [0, 1, 2, 3])]
    layout = TokenLayout.from_ids(ids, [9], prompt_end=[8])
    assert raters_of(layout, embeds) == [[6]]  # behind the image, and no answer


def test_equal_words_all_rate():
    assert raters_of(LAYOUT, torch.ones(2, 9, 4)) == [[5, 6, 7, 8]] * 2


def test_what_raters_attend_to_in_the_layer_before_stays(build, model, family, batch):
    """Against transformers' eager attention, mean over heads and raters."""
    inputs, embedded = batch(3), []
    handle = model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: embedded.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    logits(model, inputs)
    handle.remove()
    layout = TokenLayout.from_ids(inputs["input_ids"], [IMAGE], inputs["attention_mask"])
    raters = SparseVLM().queries(layout, embedded[0])
    with torch.no_grad():
        attention = build(family, "eager")(**inputs, output_attentions=True).attentions[1].mean(1)
    with accelerate(model, SparseVLM((0.3,), (2,), recycle=False)) as handle:
        logits(model, inputs)
    seen = seen_by_layers(handle)[2] & layout.is_image
    for row in range(2):
        places = layout.is_image[row].nonzero()[:, 0].tolist()
        assert raters[row].any()
        scores = attention[row, raters[row]].mean(0)
        order = sorted(places, key=lambda place: -float(scores[place]))[: -(-len(places) * 3 // 10)]
        assert seen[row].nonzero()[:, 0].tolist() == sorted(order)
    assert not seen[2].any()


def scene(tokens, scores, hidden=None):
    layout = TokenLayout.from_ids(torch.tensor([[1, *[9] * tokens, 2]]), [9])
    attention = torch.zeros(1, 2, tokens + 2)
    attention[0, 0, 1:-1] = scores
    hidden = torch.zeros(1, tokens + 2, 4) if hidden is None else hidden
    return Scene(layout, hidden, attention, torch.tensor([tokens]))


def test_the_best_of_the_dropped_become_the_means_of_their_clusters():
    """Of 60 tokens 20 stay; of the 40 others the 12 best are two heaps, which become two tokens."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(60, generator=generator)
    order = scores.argsort(descending=True)
    pool = order[20:32].sort().values + 1
    hidden = torch.randn(1, 62, 4, generator=generator)
    heap = torch.arange(12) % 2
    hidden[0, pool] = 0.01 * hidden[0, pool] + 10.0 * heap[:, None]
    choice = SparseVLM((1 / 3,), (2,)).select(scene(60, scores, hidden))
    keep, mix = choice.keep[0], choice.mix[0]
    assert keep[0] and keep[-1] and keep[order[:20] + 1].all() and keep.sum() == 2 + 20 + 2
    centres = [place for place in pool.tolist() if keep[place]]
    assert len(centres) == 2
    for centre in centres:
        members = pool[heap == heap[pool.tolist().index(centre)]]
        torch.testing.assert_close((mix @ hidden[0])[centre], hidden[0, members].mean(0))
    others = [place for place in range(62) if place not in centres]
    assert torch.equal(mix[others], torch.eye(62)[others])


def test_without_recycling_nothing_is_merged():
    choice = SparseVLM((0.5,), (2,), recycle=False).select(scene(8, torch.arange(8.0)))
    assert choice.mix is None and choice.keep[0].nonzero()[:, 0].tolist() == [0, 5, 6, 7, 8, 9]


def slow_density_peaks(tokens, count):
    """DPC-KNN written out."""
    points = tokens.tolist()
    width = len(points[0]) ** 0.5
    apart = [[sum((x - y) ** 2 for x, y in zip(a, b)) ** 0.5 / width for b in points] for a in points]
    density = [-sum(d * d for d in sorted(row)[:5]) / min(5, len(points)) for row in apart]  # the logarithm of it
    gap = []
    for i, row in enumerate(apart):
        denser = [row[j] for j in range(len(points)) if density[j] > density[i]]
        gap.append(min(denser) if denser else max(map(max, apart)))
    worth = [g * 2.718281828459045**d for g, d in zip(gap, density)]
    centres = sorted(range(len(points)), key=lambda i: -worth[i])[:count]
    owner = [min(range(count), key=lambda c: row[centres[c]]) for row in apart]
    return centres, owner


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("size", "count"), [(20, 3), (4, 2), (1, 1)])
def test_density_peaks_by_the_rule(seed, size, count):
    tokens = torch.randn(size, 6, generator=torch.Generator().manual_seed(seed))
    centres, owner = density_peaks(tokens, count)
    assert (centres.tolist(), owner.tolist()) == slow_density_peaks(tokens, count)


def test_equal_tokens_are_one_cluster_each():
    centres, owner = density_peaks(torch.ones(6, 3), 2)
    assert owner[centres].tolist() == [0, 1] and set(owner.tolist()) == {0, 1}


def test_the_published_numbers():
    """300, 200 and 110 of 576 tokens; with what is recycled, 309, 204 and 113."""
    method = SparseVLM()
    plain, left = [], 576
    for step in method.steps(32):
        left = step.visual_tokens(left, 576, 64)
        plain.append(left)
    assert [step.layer for step in method.steps(32)] == [3, 7, 16] and plain == [309, 204, 113]
    kept = [step.visual_tokens(576, 576, 64) for step in SparseVLM(recycle=False).steps(32)]
    assert kept == [300, 200, 110]


def test_layers_are_as_long_as_planned(build, llava_batch):
    model, inputs = build("llava"), llava_batch(3)
    method = SparseVLM((0.5, 0.25), (2, 4))
    with accelerate(model, method) as handle:
        _, _, cache = generated(model, inputs)
        report = handle.report()
    counts, left = [16, 16], 16
    for step in method.steps(5):
        left = step.visual_tokens(left, 16, 8)
        counts += [left] * 2
    counts = counts[:5]
    assert report["visual_tokens_per_layer"] == [2 * count for count in counts] and counts[-1] < counts[2] < 16
    text, padded = int(inputs["attention_mask"].sum(1).max()) - 16, inputs["input_ids"].shape[1]
    assert [layer.keys.shape[2] - 2 for layer in cache.layers] == [padded] * 2 + [text + count for count in counts[2:]]


@pytest.mark.parametrize(("scale", "kept"), [(1.0, 2), (0.5, 5)])
def test_the_rank_tells_how_many(scale, kept):
    """Two raters of their own mind: rank 2 of 8 tokens."""
    this = scene(8, torch.rand(8, generator=torch.Generator().manual_seed(0)))
    this.attention[0, 1, 1:-1] = torch.rand(8, generator=torch.Generator().manual_seed(1))
    choice = SparseVLM(scale=scale, recycle=False).steps(32)[0].select(this)
    assert choice.keep.sum() == 2 + kept
    same = scene(8, this.attention[0, 0, 1:-1])
    same.attention[0, 1] = 2 * same.attention[0, 0]  # of one mind: rank 1
    assert SparseVLM(scale=1.0, recycle=False).steps(32)[0].select(same).keep.sum() == 2 + 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sparsevlm:keep=0", "SparseVLM: keep is 0.0, expected more than 0"),
        ("sparsevlm:layers=0/2/3", "SparseVLM: layer is 0, expected at least 1"),
        ("sparsevlm:layers=2/3", "SparseVLM: keep has 3 numbers for 2 layers, expected one, or one for each layer"),
        ("sparsevlm:scale=2", "SparseVLM: scale is 2.0, expected 0 or more, and at most 1"),
    ],
)
def test_wrong_text_is_named(text, message):
    with pytest.raises(ValueError, match=message):
        parse_reduction(text)


def test_text_is_an_object():
    text = "sparsevlm:keep=0.5/0.25,layers=3/7,recycle=false"
    assert parse_reduction(text) == SparseVLM((0.5, 0.25), (3, 7), recycle=False)
