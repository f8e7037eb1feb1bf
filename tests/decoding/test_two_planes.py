"""The lean decoder of weights in two planes: by both, by the high ones, and several tokens in one pass."""

from functools import partial

import pytest
import torch

from lowvram_lab.decoding.bind import why_not_several
from lowvram_lab.decoding.decode import ModuleDecoder
from lowvram_lab.decoding.lean import LeanDecoder
from lowvram_lab.engine.load import load
from lowvram_lab.engine.loaded import loaded
from lowvram_lab.engine.nested import NestedLinear
from lowvram_lab.engine.random_weights import RandomWeights
from lowvram_lab.errors import BudgetError, LowvramError
from lowvram_lab.kernels.product import MOST_ROWS
from lowvram_lab.machine import cpu_threads
from lowvram_lab.memory.cuda import open_gpu
from lowvram_lab.model.plan import Plan
from lowvram_lab.model.spec import ModelSpec
from tests.helpers.planes import decoded_by, in_two_planes
from tests.helpers.tiny import TINY, TOLERANCES, load_tiny, random_ids, relative_error, seeded, tiny_config, tiny_plan

pytestmark = [
    pytest.mark.usefixtures("compiling"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="about the CPU"),
]
CASES = [("llama", "bf16"), ("qwen2", "int8"), ("qwen2", "int4")]
MORE = [("qwen2", "bf16"), ("llama", "int8"), ("llama", "int4")]  # the same again, a minute of compiling
ALL = [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE)]
PROMPT = 27  # a group of 32 tokens ends among those behind it


def compiled(kind, kv_format, max_tokens=None):
    return LeanDecoder(in_two_planes(kind, kv_format), max_tokens, compiled=True, progress=False)


def held(decoder):
    """All that its cache keeps, but for what is to be written over."""
    return [tensor.clone() for layer in decoder.cache.layers for tensor in layer.tensors().values()]


@pytest.mark.parametrize("both", [True, False], ids=["both", "high"])
@pytest.mark.parametrize(("kind", "kv_format"), ALL)
def test_compiled_it_decodes_as_the_modules_do(kind, kv_format, both):
    decoder, ids = compiled(kind, kv_format), random_ids(60)
    found = decoded_by(decoder, both, ids, PROMPT)
    modules = ModuleDecoder(in_two_planes(kind, kv_format))
    # a rounded code may flip in a cache of codes
    tolerance = TOLERANCES["bf16"] + {"int4": 0.05}.get(kv_format, 0.0)
    assert relative_error(found, decoded_by(modules, both, ids, PROMPT)) < tolerance
    assert relative_error(found, decoded_by(decoder, not both, ids, PROMPT)) > tolerance


@pytest.mark.parametrize("both", [True, False], ids=["both", "high"])
@pytest.mark.parametrize("kind", TINY)
def test_not_compiled_it_decodes_as_the_modules_do(kind, both):
    model, ids = in_two_planes(kind), random_ids(60)
    decoders = LeanDecoder(model, compiled=False), ModuleDecoder(model)
    lean, modules = (decoded_by(decoder, both, ids, PROMPT) for decoder in decoders)
    assert relative_error(lean, modules) < TOLERANCES["bf16"]


PROJECTIONS = ("model.layers.*.mlp.*_proj", "model.layers.*.self_attn.*_proj")


@pytest.mark.parametrize("kernels", ["ours", "torch's"])
@pytest.mark.parametrize("budget", ["1000MiB", None])
@pytest.mark.parametrize("low", ["cpu", "disk"])
@pytest.mark.parametrize("placement", ["gpu", "half", "cpu"])
def test_low_planes_elsewhere_say_the_same(placement, low, budget, kernels, monkeypatch):
    """To the bit: they are the same codes, multiplied by the same kernel, whatever lies side by side with what."""
    monkeypatch.setenv("LOWVRAM_COMPILE", "1" if kernels == "ours" else "0")
    ids, gpu = random_ids(20), open_gpu(budget)
    beside = load_tiny("qwen2", tiny_plan("qwen2", "int4+4"), open_gpu(budget))
    apart = load_tiny("qwen2", tiny_plan("qwen2", "int4+4", placement).with_modules(*PROJECTIONS, low=low), gpu)
    lows = [module.low for module in apart.modules() if isinstance(module, NestedLinear)]
    assert {gpu.meter.place_of(plane.packed) for plane in lows} == {"cpu"} or budget is None
    for make in (ModuleDecoder, partial(LeanDecoder, compiled=False)):
        for both in (False, True):
            found, expected = (decoded_by(make(model), both, ids, 12) for model in (apart, beside))
            assert torch.equal(found, expected)


@pytest.mark.parametrize("count", range(2, MOST_ROWS + 1))
@pytest.mark.parametrize(("kind", "kv_format"), ALL)
def test_several_tokens_in_one_pass_are_as_one_by_one(kind, kv_format, count):
    """Logits to the bit, and what is kept of the tokens."""
    decoder, ids = compiled(kind, kv_format), random_ids(PROMPT + 3 * MOST_ROWS)
    assert decoder.most_tokens == MOST_ROWS
    expected = decoded_by(decoder, True, ids, PROMPT)
    kept = held(decoder)
    decoder.cache.keep(0)
    decoder.prefill(ids[:, :PROMPT])
    pieces = ids[:, PROMPT:].split(count, dim=1)
    found = torch.cat([decoder.decode_several(piece).float().clone() for piece in pieces])
    assert torch.equal(found, expected)
    assert decoder.tokens == ids.shape[1]
    assert all(torch.equal(one, other) for one, other in zip(held(decoder), kept, strict=True))


def test_the_number_of_threads_changes_no_bit():
    """The compiler would part the sum of a single row's squares among threads, where there are enough of them."""
    sizes = {"hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3, "num_hidden_layers": 1}
    spec = ModelSpec.from_config(tiny_config("llama", **sizes), "wider")
    model = load(Plan.uniform(spec, "int4+4", context=64), checkpoint=RandomWeights(spec), progress=False)
    decoder, found = LeanDecoder(model, compiled=True, progress=False), []
    (_, tensors), run = decoder._ways[True].bound[0], decoder._ways[True].layers[0]
    cos, sin = decoder._tables["gpu"]
    for threads in (1, 2):
        with cpu_threads(threads), torch.no_grad():
            rows = [seeded(1, 576, seed=seed) * 10 ** (seed % 4) for seed in range(400)]
            found.append([run([row, cos[1], sin[1], torch.arange(2), *tensors])[0] for row in rows])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_both_planes_are_taken_in_a_pass_of_several_and_high_ones_in_a_draft_whatever_is_set():
    decoder, ids = compiled("llama", "bf16"), random_ids(20)
    wanted = {both: decoded_by(decoder, both, ids, 19)[0] for both in (True, False)}
    for both in (True, False):
        with loaded(decoder.model).planes.taking(both):
            decoder.cache.keep(19)
            assert torch.equal(decoder.draft(ids[:, 19:])[0].float(), wanted[False])
            decoder.cache.keep(19)
            assert torch.equal(decoder.decode_several(ids[:, 19:])[0].float(), wanted[True])
            assert loaded(decoder.model).planes.both == both


@pytest.mark.parametrize("make", [ModuleDecoder, partial(LeanDecoder, compiled=False)], ids=["modules", "lean"])
def test_one_token_behind_others_is_prefilled_as_it_is_decoded_by_both_planes(make):
    decoder, ids = make(in_two_planes("llama")), random_ids(21)
    wanted = decoded_by(decoder, True, ids, 19)
    decoder.cache.keep(0)
    decoder.prefill(ids[:, :19])
    with loaded(decoder.model).planes.taking(False):
        found = [decoder.prefill(token).float().clone() for token in ids[:, 19:].split(1, dim=1)]
        assert not loaded(decoder.model).planes.both
    assert torch.equal(torch.cat(found), wanted)
    assert decoder.tokens == 21


def test_a_head_of_the_commonest_tokens_says_the_same_of_them(monkeypatch):
    monkeypatch.setattr("lowvram_lab.decoding.bind.SHORT_HEAD", 96)
    monkeypatch.setattr("lowvram_lab.decoding.bind.HEAD_BOUND", 0.0)
    decoder, ids = compiled("qwen2", "int8"), random_ids(20)
    whole = decoded_by(decoder, False, ids, 19)
    decoder.cache.keep(19)
    short = decoder.draft(ids[:, 19:])
    assert short.shape == (1, 96)
    assert relative_error(short.float(), whole[:, :96]) < TOLERANCES["bf16"]


@pytest.mark.parametrize("recipe", ["int4", "bf16"])
def test_weights_in_one_plane_are_read_a_token_at_a_time(recipe):
    assert LeanDecoder(load_tiny("qwen2", tiny_plan("qwen2", recipe)), compiled=False).most_tokens == 1


def test_without_compiled_layers_a_token_at_a_time():
    model, ids = in_two_planes("llama"), random_ids(6)
    for decoder in (
        LeanDecoder(model, compiled=False),
        ModuleDecoder(model),
        LeanDecoder(model, 40, 2, compiled=False),
    ):
        assert decoder.most_tokens == 1
    decoder = LeanDecoder(model, compiled=False)
    decoder.prefill(ids)
    assert decoder.decode_several(ids[:, :1]).shape == (1, 320)
    with pytest.raises(LowvramError, match=r"expected \(1, up to 1\) tokens, found \(1, 2\) for a batch of 1"):
        decoder.decode_several(ids[:, :2])


def test_without_a_compiler_a_token_at_a_time(monkeypatch):
    monkeypatch.setenv("LOWVRAM_COMPILE", "0")
    assert LeanDecoder(load_tiny("llama", tiny_plan("llama", "int4+4"))).most_tokens == 1


def test_a_layer_that_another_kernel_multiplies_is_read_a_token_at_a_time():
    """Its sums may be others for several rows."""
    plan = tiny_plan("llama", "int4+4").with_modules("*.2.mlp.down_proj", format="bf16")
    model = load_tiny("llama", plan)
    assert why_not_several(model) == "down_proj is multiplied by another kernel than ours"
    head = tiny_plan("qwen2", "int4+4").with_modules("lm_head", format="bf16")
    assert why_not_several(load_tiny("qwen2", head)) == "the head is multiplied by another kernel than ours"
    assert why_not_several(in_two_planes("llama")) == ""


@pytest.mark.parametrize("shape", [(1, MOST_ROWS + 1), (1, 0), (2, 1), (2, 3)])
def test_what_is_no_few_tokens_of_one_sequence_is_refused(shape):
    decoder = compiled("llama", "bf16")
    decoder.prefill(random_ids(6))
    with pytest.raises(LowvramError, match=r"expected \(1, up to 8\) tokens, found .* for a batch of 1"):
        decoder.decode_several(torch.ones(shape, dtype=torch.long))
    assert decoder.tokens == 6


def test_of_a_batch_it_decodes_one_token_each():
    decoder = LeanDecoder(in_two_planes("llama"), batch_size=2, compiled=False)
    decoder.prefill(random_ids(6, 2))
    with pytest.raises(LowvramError, match=r"found \(2, 1\) for a batch of 2"):
        decoder.decode_several(torch.ones(2, 1, dtype=torch.long))


def test_full_and_empty():
    decoder, ids = compiled("llama", "bf16", max_tokens=10), random_ids(4)
    with pytest.raises(LowvramError, match="call prefill first"):
        decoder.decode_several(ids)
    decoder.prefill(random_ids(7))
    with pytest.raises(BudgetError, match="cache of 10 tokens is full"):
        decoder.decode_several(ids)
    assert decoder.tokens == 7  # nothing half-read
    decoder.decode_several(ids[:, :3])
    for feed in (decoder.decode_several, decoder.draft):
        with pytest.raises(BudgetError, match="cache of 10 tokens is full"):
            feed(ids[:, :1])


@pytest.mark.parametrize("kv_format", ["bf16", "int8", "int4"])
def test_what_is_forgettable_is_forgotten_without_a_trace(kv_format):
    model, ids = in_two_planes("qwen2", kv_format), random_ids(80)
    decoder = LeanDecoder(model, max_tokens=70, compiled=False)
    for tokens in (1, 30, 31, 32, 40, 69, 70):
        decoder.cache.keep(0)
        decoder.prefill(ids[:, :tokens])
        before, most = held(decoder), decoder.cache.forgettable
        assert most == (70 - tokens if kv_format != "int4" else min(70 - tokens, 31 - tokens % 32))
        for at in range(most):
            decoder.decode(ids[:, tokens + at : tokens + at + 1])
        decoder.cache.keep(tokens)
        assert same_tokens(decoder, before, tokens), tokens


def same_tokens(decoder, before, tokens):
    """Whether the places of the first tokens hold what they held."""
    now = held(decoder)
    names = [name for layer in decoder.cache.layers for name in layer.tensors()]
    blocks = {"keys": tokens // 32, "key_scale": tokens // 32, "recent": tokens % 32}
    int4 = "recent" in names
    places = [blocks.get(name, tokens) if int4 else tokens for name in names]
    return all(torch.equal(a[:, :, :count], b[:, :, :count]) for a, b, count in zip(now, before, places, strict=True))
