"""The cost model against the published numbers."""

import pytest

from zoo.mllm.flops import DecoderShape, kv_bytes, prefill_flops

LLAMA_7B = DecoderShape(layers=32, dim=4096, mlp_dim=11008, num_heads=32, num_kv_heads=32, head_dim=128)


@pytest.mark.parametrize(("skip", "published"), [(0.0, 19.2), (0.379, 12.6), (0.577, 9.3)])
def test_published_tflops_of_gamma_mod(skip, published):
    """LLaVA-HR-7B of 1,400 tokens on average, 4 layers dense (arXiv:2410.13859, table 4)."""
    tokens = [1400.0] * 4 + [1400 * (1 - skip)] * 28
    assert round(prefill_flops(LLAMA_7B, tokens) / 1e12, 1) == published


def test_grouped_heads_cost_less_to_project_and_to_keep():
    grouped = DecoderShape(layers=32, dim=4096, mlp_dim=11008, num_heads=32, num_kv_heads=8, head_dim=128)
    less = prefill_flops(LLAMA_7B, 10) - prefill_flops(grouped, 10)
    assert less == 32 * 4 * 10 * 4096 * 24 * 128
    assert kv_bytes(LLAMA_7B, 10) == 4 * kv_bytes(grouped, 10) == 32 * 2 * 10 * 4096 * 2


def test_a_list_of_another_length_is_named():
    with pytest.raises(ValueError, match="There are 2 numbers of tokens, expected one for each of 32 layers"):
        prefill_flops(LLAMA_7B, [1, 2])
