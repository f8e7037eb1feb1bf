"""Attention of one token in C++: what it writes is what the cache itself writes, what it finds is float64's."""

import pytest
import torch

from lowvram_lab.engine.cache_layers import PreallocatedLayer
from lowvram_lab.engine.int4_cache import GROUP, Int4Layer
from lowvram_lab.kernels.token_attention import CACHED, token_attention
from lowvram_lab.memory.gpu import StandInGpu
from lowvram_lab.model.geometry import KVShape
from tests.helpers.tiny import relative_error, seeded

FORMATS = [(kv, dtype) for kv in ("bf16", "int8", "int4") for dtype in (torch.bfloat16, torch.float16, torch.float32)]
SHAPES = {
    "heads that share keys": (1, 9, 3, 64),
    "a head of its own": (2, 4, 4, 128),
    "seven queries a key": (3, 7, 1, 32),
    "wide": (1, 2, 1, 256),
}
LENGTHS = (1, 2, 31, 32, 33, 255, 256, 257, 288, 600)
pytestmark = [
    pytest.mark.usefixtures("compiling"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="about the CPU"),
]


def cache(kv, dtype, batch, kv_heads, width, room):
    shape = KVShape(batch, kv_heads, room, width, width)
    if kv == "int4":
        return Int4Layer(StandInGpu(None), "cpu", shape, dtype)
    return PreallocatedLayer(StandInGpu(None), "cpu", shape, dtype, kv)


def tensors(layer):
    return [layer.tensors().get(name) for name in CACHED]


def case(kv, dtype, shape, tokens, room=None):
    """A cache with all tokens but one, its copy, and that token's queries, key and value."""
    batch, heads, kv_heads, width = SHAPES.get(shape, shape)
    random = torch.Generator().manual_seed(tokens)

    def states(heads, count):  # some channels large, as keys' are
        spread = torch.rand(heads, 1, width, generator=random) * 3
        return (torch.randn(batch, heads, count, width, generator=random) * spread + spread).to(dtype)

    layers = [cache(kv, dtype, batch, kv_heads, width, room or tokens + 5) for _ in range(2)]
    if tokens > 1:
        before = states(kv_heads, tokens - 1), states(kv_heads, tokens - 1)
        for layer in layers:
            layer.update(*before)
    return *layers, *(states(count, 1) for count in (heads, kv_heads, kv_heads))


def exactly(q, keys, values, scale):
    groups = q.shape[1] // keys.shape[1]
    keys, values = (each.double().repeat_interleave(groups, 1) for each in (keys, values))
    weights = (q.double() @ keys.transpose(2, 3) * scale).softmax(-1)
    return (weights @ values)[:, :, 0]


def attended(layer, q, k, v, tokens, scale):
    q, k, v = (each[:, :, 0].float() for each in (q, k, v))
    return token_attention(q, k, v, *tensors(layer), tokens, scale)


def check(kv, dtype, shape, tokens):
    theirs, ours, q, k, v = case(kv, dtype, shape, tokens)
    scale = q.shape[-1] ** -0.5
    found = attended(ours, q, k, v, tokens, scale)
    keys, values = theirs.update(k, v)
    *codes, recent = zip(tensors(ours), tensors(theirs), strict=True)
    assert all(mine is None or torch.equal(mine, other) for mine, other in codes)
    if kv == "int4":  # of its newest keys those of no whole block
        assert torch.equal(*(newest[:, :, : tokens % GROUP] for newest in recent))
    rounded = {torch.bfloat16: 2e-2, torch.float16: 2e-3, torch.float32: 3e-6}[dtype]  # as the cache itself reads codes
    wide = 3e-6 if kv == "bf16" else rounded
    assert relative_error(found.double(), exactly(q, keys, values, scale)) < wide


@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize(("kv", "dtype"), FORMATS)
def test_it_writes_what_the_cache_would_and_attends(kv, dtype, tokens):
    check(kv, dtype, "heads that share keys", tokens)


@pytest.mark.parametrize("way", ["AVX2", "none"], indirect=True)
@pytest.mark.parametrize(("kv", "dtype"), FORMATS)
def test_on_other_processors(kv, dtype, way):
    for tokens in (1, 33, 288):
        check(kv, dtype, "heads that share keys", tokens)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("kv", "dtype"), FORMATS)
def test_shapes(kv, dtype, shape):
    check(kv, dtype, shape, 300)


@pytest.mark.parametrize("width", [8, 24, 80])
@pytest.mark.parametrize("kv", ["bf16", "int8"])
def test_a_head_need_not_be_whole_vectors(kv, width):
    for tokens in (5, 300):
        check(kv, torch.bfloat16, (2, 4, 2, width), tokens)


@pytest.mark.parametrize("kv", ["bf16", "int8", "int4"])
def test_the_number_of_threads_changes_nothing(kv):
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            _, ours, q, k, v = case(kv, torch.bfloat16, "heads that share keys", 3000)
            results.append(attended(ours, q, k, v, 3000, 0.1))
        finally:
            torch.set_num_threads(1)
    assert torch.equal(*results)


@pytest.mark.parametrize("kv", ["bf16", "int8", "int4"])
def test_a_sequence_of_a_batch_is_as_alone(kv):
    _, layer, q, k, v = case(kv, torch.bfloat16, (3, 4, 2, 64), 290)
    alone = []
    for index in range(3):
        held = [each if each is None else each[index : index + 1].clone() for each in tensors(layer)]
        rows = (each[index : index + 1, :, 0].float() for each in (q, k, v))
        alone.append(token_attention(*rows, *held, 290, 0.125))
    assert torch.equal(attended(layer, q, k, v, 290, 0.125), torch.cat(alone))


MORE = 8
"""Tokens of one sequence: behind 28 a group of 32 ends among them, behind 250 a chunk of 256, behind 282 a group."""


def rows_of(layer, q, k, v, tokens):
    return token_attention(q, k, v, *tensors(layer), tokens, 0.125)


@pytest.mark.parametrize("before", [1, 28, 250, 282, 300])
@pytest.mark.parametrize(("kv", "dtype"), FORMATS)
def test_several_tokens_of_a_sequence_are_as_one_by_one(kv, dtype, before):
    together, one_by_one, *_ = case(kv, dtype, "heads that share keys", before + 1, before + MORE)
    q, k, v = (seeded(MORE, heads, 64, seed=seed) for seed, heads in enumerate((9, 3, 3)))
    found = rows_of(together, q, k, v, before + MORE)
    rows = [tuple(each[at : at + 1] for each in (q, k, v)) for at in range(MORE)]
    expected = [rows_of(one_by_one, *row, before + 1 + at) for at, row in enumerate(rows)]
    assert torch.equal(found, torch.cat(expected))
    written = zip(tensors(together), tensors(one_by_one), strict=True)
    assert all(ours is None or torch.equal(ours, theirs) for ours, theirs in written)


@pytest.mark.parametrize(("batch", "rows"), [(2, 3), (2, 1), (3, 6)])
def test_rows_that_are_neither_a_batch_nor_of_one_sequence_are_refused(batch, rows):
    layer = cache("bf16", torch.bfloat16, batch, 2, 64, 40)
    q, k, v = (seeded(rows, heads, 64) for heads in (4, 2, 2))
    with pytest.raises(RuntimeError, match=f"a token of each of {batch} sequences, or several of one, found {rows}"):
        rows_of(layer, q, k, v, 20)


@pytest.mark.parametrize("tokens", [3, 12])
def test_more_tokens_than_there_are_or_than_there_is_room_for_are_refused(tokens):
    """They would be written before the cache's memory, or behind it."""
    layer = cache("bf16", torch.bfloat16, 1, 2, 64, 11)
    q, k, v = (seeded(4, heads, 64) for heads in (4, 2, 2))
    with pytest.raises(RuntimeError, match=f"4 tokens of {tokens} in a cache of 11"):
        rows_of(layer, q, k, v, tokens)


def test_a_score_far_above_the_others_and_one_far_below():
    _, layer, q, k, v = case("bf16", torch.float32, (1, 2, 2, 64), 400)
    layer.keys[:, :, 7] *= 1000
    found = attended(layer, q * 50, k, v, 400, 1.0)
    wanted = exactly(q * 50, layer.keys[:, :, :400], layer.values[:, :, :400], 1.0)
    assert relative_error(found.double(), wanted) < 1e-5


def test_the_cache_of_float16_rounds_as_torch_does():
    values = torch.tensor(
        [0.0, -0.0, 6e-8, 3e-8, 2.98e-8, 1e-5, 6.1e-5, 1 + 2**-11, 1 + 3 * 2**-11, 65504.0, 65519.0, 65520.0]
    )
    values = torch.cat((values, -values, torch.randn(40) * 1e-5)).view(1, 1, 64)
    layer = cache("fp16", torch.float16, 1, 1, 64, 3)
    token_attention(torch.zeros(1, 1, 64), values, values, *tensors(layer), 1, 1.0)
    assert torch.equal(layer.keys[0, 0, 0].view(torch.int16), values.half()[0, 0].view(torch.int16))
