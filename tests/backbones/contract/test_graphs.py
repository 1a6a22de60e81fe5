"""Graphs: ``torch.compile`` without breaks and without recompiling for every size, and ``torch.export``."""

import pytest
import torch
from torch.testing import assert_close

SIZES = [(2, 64, 96), (3, 97, 131), (2, 33, 160), (5, 128, 64)]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_one_graph_for_all_sizes(make, pictures):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    model = make()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    with torch.inference_mode():
        for size in SIZES:
            assert_close(compiled(pictures(*size)), model(pictures(*size)), rtol=1e-4, atol=1e-4)
    assert len(graphs) == 1


def test_training_compiles(make, pictures):
    """Forward and backward as one graph each; gradients equal eager's."""
    model = make(drop_path_rate=0.0)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for train in (True, False):
        model.train(train)
        results = []
        for run in (model, compiled):
            model.zero_grad()
            run(pictures(2, 64)).square().mean().backward()
            results.append({key: parameter.grad.clone() for key, parameter in model.named_parameters()})
        for key, expected in results[0].items():
            assert_close(results[1][key], expected, rtol=1e-4, atol=1e-5, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.slow
@torch.inference_mode()
def test_inductor(make, pictures):
    model = make()
    compiled = torch.compile(model, fullgraph=True)
    assert_close(compiled(pictures(2, 64, 96)), model(pictures(2, 64, 96)), rtol=1e-4, atol=1e-4)


def test_export_of_one_size(make, pictures):
    model = make()
    exported = torch.export.export(model, (pictures(2, 64, 96),))
    with torch.inference_mode():
        found = exported.module()(pictures(2, 64, 96, seed=1))
        assert_close(found, model(pictures(2, 64, 96, seed=1)), rtol=1e-4, atol=1e-4)


def test_export_of_any_size(make, pictures):
    model = make()
    anything = torch.export.Dim.DYNAMIC  # an error if the model makes it a constant
    exported = torch.export.export(
        model, (pictures(2, 64, 96),), dynamic_shapes=({0: anything, 2: anything, 3: anything},)
    )
    with torch.inference_mode():
        for size in [*SIZES, (1, 224, 40)]:
            assert_close(exported.module()(pictures(*size)), model(pictures(*size)), rtol=1e-4, atol=1e-4)


def test_exported_training_graph(make, pictures):
    """What quantisation-aware training and other graph tools start from."""
    model = make().train()
    picture = pictures(2, 64)
    exported = torch.export.export(model, (picture,)).module()
    results = []
    for run in (model, exported):
        run.zero_grad()
        run(picture).square().mean().backward()
        results.append([parameter.grad for _, parameter in sorted(run.named_parameters())])
    for found, expected in zip(results[1], results[0], strict=True):
        assert_close(found, expected, rtol=1e-3, atol=1e-5)
