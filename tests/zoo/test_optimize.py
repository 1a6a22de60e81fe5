"""`zoo.optimize`: the outputs of the model, whatever the size, and what it says where something cannot be."""

import contextlib
import functools
import re

import pytest
import timm
import torch
from torch import nn

import zoo


def lively(name):
    """A model whose norms, scales and biases do something."""
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if key.endswith("running_var"):
                tensor.uniform_(0.5, 1.5)
            elif tensor.is_floating_point():
                tensor.add_(torch.randn_like(tensor), alpha=0.1)
    return model


@pytest.fixture
def compiles(monkeypatch):
    """Compilation without machine code, which would take a minute for each model; gives what was compiled."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend, fullgraph=True))
    yield graphs
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["test_van", "test_ravlt", "test_vig", "test_slab", "test_inline", "test_lightnet"])
def test_the_same_outputs(name, compiles):
    model, pictures = lively(name), torch.randn(2, 3, 64, 64)
    fast = zoo.optimize(model, pictures)
    assert not fast.training
    with torch.no_grad():
        expected = model(pictures)
    outputs = fast(pictures)
    assert len(compiles) == 1 and expected.std() > 1e-3 and not outputs.requires_grad
    assert (outputs - expected).norm() < 1e-4 * expected.norm()


def test_other_sizes_compile_once_more(compiles):
    model = lively("test_van")
    fast = zoo.optimize(model, torch.randn(2, 3, 64, 64))
    for size in [(3, 3, 96, 80), (4, 3, 80, 112)]:
        pictures = torch.randn(size)
        with torch.no_grad():
            torch.testing.assert_close(fast(pictures), model(pictures), rtol=1e-3, atol=1e-4)
    assert len(compiles) == 2


@pytest.mark.slow
def test_with_machine_code():
    model, pictures = lively("test_van"), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(zoo.optimize(model, pictures)(pictures), model(pictures), rtol=1e-3, atol=1e-4)


def test_without_compilation(compiles):
    model, pictures = lively("test_van"), torch.randn(1, 3, 64, 64)
    fast = zoo.optimize(model, pictures, compile=False)
    assert not compiles and not any(isinstance(module, nn.BatchNorm2d) for module in fast.modules())
    assert {tuple(p.shape[2:]) for p in fast.parameters() if p.ndim == 4} > {(3, 3)}
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in fast.parameters() if p.ndim == 4)
    with torch.no_grad():
        torch.testing.assert_close(fast(pictures), model(pictures), rtol=1e-3, atol=1e-4)


def test_the_dtype_is_that_of_the_sample(compiles):
    model, pictures = lively("test_ravlt"), torch.randn(1, 3, 64, 64)
    fast = zoo.optimize(model, pictures.bfloat16())
    assert next(model.parameters()).dtype == torch.float32
    with torch.no_grad():
        expected = model(pictures)
        outputs = fast(pictures.bfloat16())
    assert outputs.dtype == torch.bfloat16
    assert 0 < (outputs.float() - expected).norm() < 5e-2 * expected.norm()
    with pytest.raises(ValueError, match=r"pictures are torch.float32 on cpu, but .* for torch.bfloat16 on cpu: conv"):
        fast(pictures)


def test_autocast_does_not_change_the_outputs():
    model, pictures = lively("test_van"), torch.randn(1, 3, 64, 64)
    fast = zoo.optimize(model, pictures, compile=False)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fast(pictures), fast(pictures)) and fast(pictures).dtype == torch.float32


def test_feature_maps(compiles):
    backbone, pictures = timm.create_model("test_van", features_only=True).eval(), torch.randn(1, 3, 64, 64)
    maps = zoo.optimize(backbone, pictures)(pictures)
    with torch.no_grad():
        for found, expected in zip(maps, backbone(pictures), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_one_warning_where_there_is_no_compiler(monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("/nowhere/c++",))
    monkeypatch.setattr("torch._inductor.config.force_disable_caches", True)
    model, pictures = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU()), torch.randn(1, 3, 8, 8)
    with pytest.warns(UserWarning, match="runs without torch.compile, which failed: .*No working C") as said:
        fast = zoo.optimize(model, pictures)
    (ours,) = (str(one.message) for one in said if str(one.message).startswith("The model runs"))
    assert "\n" not in ours
    with torch.no_grad():
        torch.testing.assert_close(fast(pictures), model(pictures))


@pytest.mark.parametrize("sample", [torch.zeros(3, 8, 8), torch.zeros(1, 3, 8, 8, dtype=torch.uint8)])
def test_one_sentence_for_a_wrong_sample(sample):
    said = rf"The sample is {sample.dtype} of shape {re.escape(str(tuple(sample.shape)))}, expected floating-point \(B"
    with pytest.raises(ValueError, match=said):
        zoo.optimize(timm.create_model("test_van"), sample)


class OneSize(nn.Module):
    """As some of timm's."""

    def forward(self, x):
        if x.shape[-1] != 8:
            raise ValueError(f"The pictures are {x.shape[-1]} wide, expected 8.")
        return x.mean((1, 2, 3))


def test_what_the_model_says_about_a_size(compiles):
    with pytest.raises(ValueError, match=r"^The pictures are 9 wide, expected 8\.$"):
        zoo.optimize(OneSize(), torch.zeros(1, 3, 8, 9))
    fast = zoo.optimize(OneSize(), torch.zeros(1, 3, 8, 8))
    with pytest.raises(Exception, match="The pictures are 9 wide, expected 8"):
        fast(torch.zeros(1, 3, 8, 9))


class Recording:
    """Stands for a CUDA graph: replaying computes again from the recorded input into the recorded output."""

    replays = 0

    def replay(self):
        self.replays += 1
        with torch.no_grad():
            self.of.outputs.copy_(self.of._compute(self.of.pictures))


def test_the_steps_around_a_cuda_graph(monkeypatch):
    """Copy in, replay, clone out; other shapes go past the graph."""

    class Stream:
        def wait_stream(self, other):
            pass

    for name, stand_in in {
        "Stream": Stream,
        "current_stream": Stream,
        "stream": contextlib.nullcontext,
        "CUDAGraph": Recording,
        "graph": contextlib.nullcontext,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    model, sample = lively("test_van"), torch.randn(2, 3, 64, 64)
    fast = zoo.optimize(model, sample, compile=False)
    fast._capture(sample)
    fast.graph.of = fast
    first, second = torch.randn(2, 3, 64, 64, requires_grad=True), torch.randn(2, 3, 64, 64)
    found = [fast(first), fast(second)]
    assert fast.graph.replays == 2 and not any(outputs.requires_grad for outputs in found)
    with torch.no_grad():
        for outputs, pictures in zip(found, (first, second), strict=True):
            torch.testing.assert_close(outputs, model(pictures), rtol=1e-3, atol=1e-4)
        other = torch.randn(1, 3, 96, 64)
        torch.testing.assert_close(fast(other), model(other), rtol=1e-3, atol=1e-4)
    assert fast.graph.replays == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("compile", [False, True])
def test_on_a_gpu(compile):
    model = lively("test_ravlt").cuda()
    fast = zoo.optimize(model, torch.randn(2, 3, 64, 64, device="cuda"), compile=compile)
    for size in [(2, 3, 64, 64), (2, 3, 64, 64), (1, 3, 96, 64)]:
        pictures = torch.randn(size, device="cuda")
        with torch.no_grad():
            torch.testing.assert_close(fast(pictures), model(pictures), rtol=1e-2, atol=1e-3)
