"""Models over split rows give on every rank what one rank gives with whole pictures, and the same gradients."""

import re
import sys
from itertools import chain
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))
import ranks
from ranks import error

import zoo  # noqa: F401  (registers the models)
from zoo.deploy import fuse
from zoo.parallel import split_rows
from zoo.tools.benchmark_rows import Traffic


def make(name, **options):
    """A model in which every parameter and statistic counts."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7, **options).eval()
    with torch.no_grad():
        for key, x in chain(model.named_parameters(), model.named_buffers()):
            if key.endswith("gamma"):
                x.uniform_(0.1, 0.2)
            elif key.endswith("running_var"):
                x.uniform_(0.5, 2)
            elif x.is_floating_point():
                x.add_(torch.randn_like(x) * 0.05)
    return model


def strip_of(maps, stride, heights, rank):
    """The rows of maps (B, C, H, W) that a rank has, of the rows of the picture that the ranks have."""
    start, stop = sum(heights[:rank]), sum(heights[: rank + 1])
    return maps[:, :, -(-start // stride) : -(-stop // stride)]


def model_case(name, heights, width, fused=False, checkpointing=False, **options):
    """A case: logits, maps and gradients against those of one rank in float64; what is sent in one forward pass."""

    def case(group):
        model, exact_model, rank = make(name, **options), make(name, **options).double(), dist.get_rank(group)
        model = fuse(model) if fused else model
        model.set_grad_checkpointing(checkpointing)
        pictures = torch.randn(2, 3, sum(heights), width, generator=torch.Generator().manual_seed(1))
        strip = strip_of(pictures, 1, heights, rank)
        split = split_rows(model, group)
        found = {}
        with torch.inference_mode():
            exact = exact_model(pictures.double())
            with Traffic() as traffic:
                found["logits"] = error(split(strip), exact)
            found |= {key: getattr(traffic, key) for key in ("gathers", "gathered", "exchanges", "rows")}
            found["left alone"] = error(model(pictures), exact)
            maps = split.forward_intermediates(strip, intermediates_only=True)
            exact = exact_model.forward_intermediates(pictures.double(), intermediates_only=True)
            strides = [info["reduction"] for info in model.feature_info]
            parts = [strip_of(whole, stride, heights, rank) for whole, stride in zip(exact, strides, strict=True)]
            found["maps"] = max(error(a, b) for a, b in zip(maps, parts, strict=True))
        if not fused:
            target = torch.tensor([1, 4])
            F.cross_entropy(exact_model(pictures.double()), target).backward()
            parallel = DistributedDataParallel(split, process_group=group)  # reduces as long as it is there
            F.cross_entropy(parallel(strip), target).backward()
            pairs = [(a.grad, b.grad) for a, b in zip(split.parameters(), exact_model.parameters(), strict=True)]
            floor = 1e-3 * max(exact.norm() for _, exact in pairs)  # some are zero but for rounding
            found["gradients"] = max(((a - b).norm() / (b.norm() + floor)).item() for a, b in pairs)
            found["shared"] = all(a is b for a, b in zip(split.parameters(), model.parameters(), strict=True))
            found["names"] = list(split.state_dict()) == list(model.state_dict())
        return found

    return len(heights), case


def mistakes(group):
    """What is said of models and strips that do not fit."""
    rank = dist.get_rank(group)
    said = {}

    def note(name, function):
        try:
            function()
        except ValueError as error:
            said[name] = str(error)

    van = split_rows(make("test_van"), group)
    note("swin", lambda: split_rows(make("test_inline"), group))
    note("softmax", lambda: split_rows(make("test_inline_deit", attention="softmax"), group))
    note("max", lambda: split_rows(make("test_van", global_pool="max"), group))
    note("elsewhere", lambda: split_rows(make("test_van"), dist.GroupMember.NON_GROUP_MEMBER))
    note("widths", lambda: van(torch.zeros(1, 3, 32, 32 + rank)))
    note("empty", lambda: van(torch.zeros(1, 3, 0, 32)))
    note("training", lambda: van.train()(torch.zeros(1, 3, 32, 32)))
    return said


CASES = {
    "van": model_case("van_nano", (70, 35), 64),
    "van of three": model_case("test_van", (33, 1, 50), 45),
    "van fused": model_case("test_van", (20, 44), 40, fused=True),
    "ravlt": model_case("ravlt_nano", (70, 35), 64),
    "ravlt of three": model_case("test_ravlt", (13, 64, 0), 70),
    "ravlt fused": model_case("test_ravlt", (20, 44), 40, fused=True),
    "ravlt checkpointing": model_case("test_ravlt", (40, 25), 40, checkpointing=True),
    "lightnet": model_case("lightnet_nano", (45, 60), 50),
    "lightnet of three": model_case("test_lightnet", (50, 3, 40), 40),
    "lightnet fused": model_case("test_lightnet", (20, 44), 40, fused=True),
    "inline": model_case("test_inline_deit", (70, 43), 64),
    "inline of three": model_case("test_inline_deit", (10, 0, 90), 64, global_pool="avg"),
    "inline fused": model_case("test_inline_deit", (20, 44), 40, fused=True),
    "mistakes": (2, mistakes),
}


@pytest.fixture(scope="module")
def found():
    return ranks.results(__file__)


@pytest.mark.parametrize("name", [name for name in CASES if name != "mistakes"])
def test_every_rank_has_what_one_rank_has(found, name):
    assert len(found[name]) == CASES[name][0]
    for result in found[name]:
        assert max(result[key] for key in ("logits", "maps", "left alone")) < 1e-5
        if "fused" not in name:
            assert result["gradients"] < 1e-5
            assert result["shared"] and result["names"]


@pytest.mark.parametrize(
    ("name", "gathers", "exchanges"),
    [
        # The shapes of the strips, and the pooling, are one each.
        ("van", 1 + 1, 1 + 3 + 2 * 12),  # stem, downsampling, and two depthwise layers in each of 12 blocks
        ("ravlt", 1 + 2 * 4 + 1, 4 + 3 + 3 * 11 + 7),  # 4 blocks with linear attention; 7 with a ring of two
        ("lightnet", 1 + 1 + 10 + 1, 1),  # the stem's recurrence; 10 blocks
        ("inline", 1 + 2 * 4 + 1, 1 + 4),  # 4 blocks, each with a mean token, a state and a convolution
    ],
)
def test_collectives_of_a_forward_pass(found, name, gathers, exchanges):
    assert [(result["gathers"], result["exchanges"]) for result in found[name]] == [(gathers, exchanges)] * 2


def test_bytes_of_a_forward_pass(found):
    """The shape of the strip and the sums of 192 channels of two pictures; the three rows that complete a patch."""
    assert [result["gathered"] for result in found["van"]] == [4 * 8 + 2 * 192 * 4] * 2
    assert [result["rows"] for result in found["lightnet"]] == [0, 3 * 2 * 56 * 3 * 4]


@pytest.mark.parametrize(
    ("mistake", "words"),
    [
        ("swin", "InLineSwin cannot be split"),
        ("softmax", "attention='inline' only"),
        ("max", "pooling 'max'"),
        ("elsewhere", "not in the group"),
        ("widths", r"\[\[1, 32, 32, 3\], \[1, 32, 33, 3\]\]"),
        ("empty", "at least one row"),
        ("training", "call eval"),
    ],
)
def test_mistakes(found, mistake, words):
    for said in found["mistakes"]:
        assert re.search(words, said[mistake])


def test_without_ranks():
    with pytest.raises(ValueError, match="init_process_group"):
        split_rows(timm.create_model("test_van"))


if __name__ == "__main__":
    ranks.main(CASES)
