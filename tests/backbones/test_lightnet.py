"""LightNet has no authors' outputs to compare with: the properties that its paper states are checked instead."""

import math

import pytest
import timm
import torch
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

import zoo  # noqa: F401  (registers the models)
from zoo.backbones.lightnet import ToeplitzEncoding
from zoo.catalogue import CATALOGUE
from zoo.kernels import linear_attention
from zoo.kernels.rotary import rotary_angles_across_heads, rotate

B, H, W, HEADS, D = 2, 5, 7, 3, 8
N = H * W
ROWS = list(range(N))
COLUMNS = torch.arange(N).view(H, W).T.flatten().tolist()


@pytest.fixture
def qkv():
    """Queries, logits of keys and values (B, N, heads, D) in float64; some keys are far above the others."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, B, N, HEADS, D, generator=generator, dtype=torch.float64)
    return q, 3 * k, v


def attention(q, k, v, grid=(H, W)):
    """The model's, of queries that are mapped; without MD-LRPE if the grid is None."""
    return linear_attention(q, k, v, "identity", grid=grid, normalisation="keys", rotary_across_heads=True)


def scan(k, v, order):
    """The additive recurrence over the tokens in an order: what each token has seen, itself included.

    g_t = g_{t-1} + exp(k_t) and S_t = (g_{t-1} / g_t) S_{t-1} + (exp(k_t) / g_t) v_t^T: the keys decide on the decay.

    Returns:
        g (B, N, heads, D) and S (B, N, heads, D, E).
    """
    normalisers, states = torch.zeros_like(k), k.new_zeros(*k.shape, v.shape[-1])
    g, state = torch.zeros_like(k[:, 0]), torch.zeros_like(states[:, 0])
    for t in order:
        before, g = g, g + k[:, t].exp()
        state = (before / g)[..., None] * state + (k[:, t].exp() / g)[..., None] * v[:, t, :, None]
        normalisers[:, t], states[:, t] = g, state
    return normalisers, states


def read(q, states):
    return torch.einsum("bnhd,bnhde->bnhe", q, states)


# ---- one scan


@pytest.mark.parametrize("order", [ROWS, COLUMNS], ids=["row by row", "column by column"])
def test_one_scan_equals_scans_in_both_directions(qkv, order):
    """One scan has what is before a token, the other what is after it, and both have the token itself."""
    q, k, v = qkv
    (g_forth, forth), (g_back, back), own = scan(k, v, order), scan(k, v, order[::-1]), k.exp()
    numerator = g_forth[..., None] * forth + g_back[..., None] * back - own[..., None] * v[:, :, :, None]
    expected = read(q, numerator / (g_forth + g_back - own)[..., None])
    assert (expected - read(q, forth)).abs().max() > 0.1  # a causal scan alone would not do
    assert_close(attention(q, k, v, None), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("order", [ROWS, ROWS[::-1], COLUMNS, COLUMNS[::-1]])
def test_one_scan_ends_in_the_same_state_whatever_its_order(qkv, order):
    q, k, v = qkv
    last = scan(k, v, order)[1][:, order[-1]]
    assert_close(attention(q, k, v, None), torch.einsum("bnhd,bhde->bnhe", q, last), rtol=1e-10, atol=1e-10)


def test_large_logits_do_not_overflow(qkv):
    q, k, v = (x.float() for x in qkv)
    shifted = attention(q, k + 200, v)  # exp(200) is infinite
    assert_close(shifted, attention(q, k, v), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_are_float32_also_under_autocast(dtype):
    """Rounding the inputs once is the only error, with 4096 tokens of nearly the same weight."""
    q, k, v = torch.randn(3, 1, 4096, 2, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = attention(q.double(), k.double(), v.double(), (64, 64))
    with torch.autocast("cpu", torch.bfloat16):
        found = attention(q, k, v, (64, 64))
    assert found.dtype == dtype
    half_a_step = torch.finfo(dtype).eps / 2
    assert_close(found.double(), expected, rtol=1.01 * half_a_step, atol=1e-6)


# ---- permutations


def test_tokens_may_be_permuted_without_positions(qkv):
    q, k, v = qkv
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    expected = attention(q, k, v, None)[:, order]
    assert_close(attention(q[:, order], k[:, order], v[:, order], None), expected)


def test_positions_tell_permutations_apart(qkv):
    q, k, v = qkv
    expected = attention(q, k, v).flip(1)
    assert (attention(q.flip(1), k, v) - expected).abs().max() > 0.1


def swap_halves_of_heads(x):
    """The channels that turn with the row in the place of those that turn with the column."""
    return torch.cat([x[..., D // 2 :], x[..., : D // 2]], dim=-1)


def test_axes_of_the_attention_may_be_permuted(qkv):
    """The map transposed, with the halves of the heads swapped, gives the transposed result: no axis comes first."""
    turned = [x.unflatten(1, (H, W)).transpose(1, 2).flatten(1, 2) for x in qkv]
    q, k, v = swap_halves_of_heads(turned[0]), swap_halves_of_heads(turned[1]), turned[2]
    expected = attention(*qkv).unflatten(1, (H, W)).transpose(1, 2).flatten(1, 2)
    assert_close(attention(q, k, v, (W, H)), expected)
    assert (attention(*turned, (W, H)) - expected).abs().max() > 0.1


@torch.inference_mode()
def test_axes_of_the_model_may_be_permuted():
    """Likewise the whole model, when the encodings of rows and columns change places too."""
    model, other = (awake("test_lightnet") for _ in range(2))
    state = model.state_dict()
    for key, tensor in state.items():
        if key.endswith("qkv.weight"):
            q, k, v = tensor.view(3, model.stages[0].blocks[0].mixer.num_heads, 2, -1, tensor.shape[1])
            swapped = torch.stack([q.flip(1), k.flip(1), v])
            state[key] = swapped.reshape(tensor.shape)
    rows = {key: state[key] for key in state if ".along_rows." in key}
    for key, tensor in rows.items():
        state[key] = state[key.replace("rows", "columns")]
        state[key.replace("rows", "columns")] = tensor
    state["stem.conv.weight"] = state["stem.conv.weight"].transpose(2, 3)
    other.load_state_dict(state)
    picture = torch.randn(1, 3, 97, 163, generator=torch.Generator().manual_seed(0))
    expected = model.forward_features(picture).transpose(2, 3)
    assert_close(other.forward_features(picture.transpose(2, 3)), expected, rtol=1e-3, atol=1e-4)
    assert (model.forward_features(picture.transpose(2, 3)) - expected).abs().max() > 0.1


def awake(name):
    """A model whose encodings along rows and along columns differ."""
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        else:
            torch.nn.init.normal_(parameter, 1, 0.3)
    return model


# ---- MD-LRPE


def test_lrpe_by_its_definition(qkv):
    """Angle = position along the axis times frequency, one head and pair at a time; keys turn when normalised."""
    q, k, v = qkv

    def turned(x):
        result = torch.empty_like(x)
        for n in range(N):
            for head in range(HEADS):
                for pair in range(D // 2):
                    axis, j = divmod(pair, D // 4)
                    angle = divmod(n, W)[axis] * 10000 ** (-2 * (head * D / 2 + j) / (HEADS * D))
                    a, b = x[:, n, head, 2 * pair], x[:, n, head, 2 * pair + 1]
                    result[:, n, head, 2 * pair] = a * math.cos(angle) - b * math.sin(angle)
                    result[:, n, head, 2 * pair + 1] = b * math.cos(angle) + a * math.sin(angle)
        return result

    scores = torch.einsum("bnhd,bmhd->bhnm", turned(q), turned(k.exp() / k.exp().sum(1, keepdim=True)))
    assert_close(attention(q, k, v), torch.einsum("bhnm,bmhe->bnhe", scores, v), rtol=1e-9, atol=1e-9)


def test_lrpe_depends_on_distances_only():
    """A query and a key meet with the same score wherever they are, and with another at every other distance."""
    height, width = 6, 9
    q, k = torch.randn(2, HEADS, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scores = pair_scores(q, k, height, width)
    by_distance = {}
    for row, column, other_row, other_column in torch.cartesian_prod(*map(torch.arange, scores.shape[:4])).tolist():
        distance = (row - other_row, column - other_column)
        by_distance.setdefault(distance, []).append(scores[row, column, other_row, other_column])
    assert len(by_distance) == (2 * height - 1) * (2 * width - 1)
    values = []
    for found in map(torch.stack, by_distance.values()):
        assert_close(found, found[:1].expand_as(found), rtol=1e-9, atol=1e-9)
        values.append(found[0])
    differences = torch.cdist(torch.stack(values), torch.stack(values))
    assert (differences + torch.eye(len(values))).min() > 1e-4


def pair_scores(q, k, height, width):
    """Scores (height, width, height, width, heads) of one query and one key, at all places."""
    angles = rotary_angles_across_heads(height, width, HEADS, D, 10000.0, q.device, q.dtype)
    turned = [rotate(x[:, None], angles.cos(), angles.sin()) for x in (q, k)]
    scores = torch.einsum("hnd,hmd->nmh", *turned)
    return scores.view(height, width, height, width, HEADS)


# ---- MD-TPE


def test_tpe_is_a_recurrence():
    """y_t = lambda y_{t-1} + (q . k) x_t along the last axis of the map, then the norm and the projection."""
    torch.manual_seed(0)
    tpe = ToeplitzEncoding(HEADS * D, HEADS, 4).double()
    for parameter in (tpe.q, tpe.k, tpe.log_decay):
        torch.nn.init.normal_(parameter)
    x = torch.randn(B, H, W, HEADS, D, dtype=torch.float64)
    decay = tpe.log_decay.sigmoid()[:, None]
    scale = (tpe.q.view(HEADS, D) * tpe.k.view(HEADS, D)).sum(1, keepdim=True)
    y = [scale * x[:, :, 0]]
    for t in range(1, W):
        y.append(decay * y[-1] + scale * x[:, :, t])
    y = torch.stack(y, 2).flatten(3)
    normed = y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    expected = normed @ tpe.proj[0].weight.T @ tpe.proj[1].weight.T
    assert expected.abs().max() > 0.01
    assert_close(tpe(x.flatten(3)), expected)


def test_a_block_by_its_definition():
    """Pre-norm; q = SiLU(W_q x), RMSNorm(o) * SiLU(W_u2 W_u1 x) before W_o; then (SiLU(W_1 x) * W_2 x) W_3."""
    block = awake("test_lightnet").stages[0].blocks[0].double()
    mixer, mlp, dim, heads = block.mixer, block.mlp, 32, 2
    x = torch.randn(B, H, W, dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def normed(x, weight):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight

    def silu(x):
        return x / (1 + torch.exp(-x))

    y = normed(x, block.norm1.weight)
    q, k, v = (y @ weight.T for weight in mixer.qkv.weight.chunk(3))
    q, k, v = (t.reshape(B, N, heads, dim // heads) for t in (silu(q), k, v))
    out = attention(q, k, v).reshape(x.shape)
    gate = silu(y @ mixer.gate[0].weight.T @ mixer.gate[1].weight.T)
    x1 = x + (normed(out, mixer.norm.weight) * gate) @ mixer.proj.weight.T
    w1, w2 = mlp.fc1.weight.chunk(2)
    y = normed(x1, block.norm2.weight)
    expected = x1 + (silu(y @ w1.T) * (y @ w2.T)) @ mlp.fc2.weight.T
    assert_close(block(x), expected, rtol=1e-9, atol=1e-9)


# ---- cost and size


def macs(module, *shape):
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(torch.empty(shape, device="meta"))
    return counter.get_total_flops() // 2


def test_the_cost_is_linear_in_the_tokens():
    """From 224 to 448 pixels, four times the tokens. Only MD-TPE, once a model, grows with the map's sides too."""
    model = timm.create_model("lightnet_tiny", device="meta").eval()
    mixer = model.stages[0].blocks[0].mixer
    tokens = 14 * 14
    projections = 192 * (4 * 192 + 2 * 64)
    state = 2 * 192 * 64
    assert macs(mixer, 1, 14, 14, 192) == tokens * (projections + state)
    assert macs(mixer, 1, 28, 28, 192) == 4 * macs(mixer, 1, 14, 14, 192)
    assert macs(mixer, 1, 7, 28, 192) == macs(mixer, 1, 14, 14, 192)
    assert macs(model.stages, 1, 28, 28, 192) == 4 * macs(model.stages, 1, 14, 14, 192)
    small, large = macs(model, 1, 3, 224, 224), macs(model, 1, 3, 448, 448)
    encoding = 192 * 14 * 14 * 28
    head = 192 * 1000
    assert large == 4 * (small - encoding - head) + 8 * encoding + head
    assert encoding < 1e-3 * small


@pytest.mark.parametrize(("name", "millions"), [("tiny", 6.0), ("small", 22.6), ("base", 87.7)])
def test_parameters(name, millions):
    """The sizes that the reconstruction was made for."""
    model = timm.create_model(f"lightnet_{name}", device="meta")
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 1) == millions


def test_what_is_not_the_authors_is_marked():
    names = [name for name in CATALOGUE if name.startswith("lightnet_")]
    assert len(names) == 4
    assert all(CATALOGUE[name].reconstruction and not CATALOGUE[name].golden for name in names)
    assert not any(entry.reconstruction for entry in CATALOGUE.values() if entry.family != "LightNet")


def test_heads_that_cannot_be_rotated():
    with pytest.raises(ValueError, match="dim 36 over 6 heads is no multiple of 4"):
        timm.create_model("test_lightnet", dim=36, num_heads=6)
