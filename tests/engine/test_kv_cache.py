"""The KV cache: its bytes, what int8 costs in accuracy, how it is cut back, and what it refuses."""

import gc
from dataclasses import replace

import pytest
import torch

from lowvram_lab.decoding.decode import ModuleDecoder, prefill
from lowvram_lab.decoding.lean import LeanDecoder
from lowvram_lab.engine.cache_layers import PreallocatedLayer
from lowvram_lab.engine.kv_cache import PreallocatedCache
from lowvram_lab.errors import BudgetError, LowvramError
from lowvram_lab.memory.cuda import open_gpu
from lowvram_lab.model.geometry import KVShape
from tests.helpers.tiny import TINY, decoded, load_tiny, random_ids, relative_error, tiny_plan, tiny_stock

simulated = pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA's own counters differ by what kernels hide")
KV_FORMATS = ("fp32", "int8", "int4")


def plan_of(kind, kv_format, placement="half", **changes):
    return replace(tiny_plan(kind, "fp32", placement), kv_format=kv_format, **changes)


@pytest.mark.parametrize("made", [ModuleDecoder, LeanDecoder])
@pytest.mark.parametrize("prompt", [1, 30])
@pytest.mark.parametrize("kind", TINY)
def test_int8_is_close_to_16_bits(kind, prompt, made):
    ids = random_ids(36)
    exact, rounded = (decoded(made(load_tiny(kind, plan_of(kind, name))), ids, prompt) for name in ("fp32", "int8"))
    # A code is off by half of amax/127 at most: under 1 % of a key's typical size; bf16 scales add 2^-9 of it;
    # attention averages over tokens, the residual carries the rest past it.
    assert 0 < relative_error(rounded, exact) < 0.02


@simulated
@pytest.mark.parametrize(
    ("kv_format", "recipe"), [("fp32", "fp32"), ("int8", "fp32"), ("bf16", "bf16"), ("int8", "bf16")]
)
@pytest.mark.parametrize("kind", TINY)
def test_bytes_are_the_plans(kind, kv_format, recipe):
    plan = replace(tiny_plan(kind, recipe), kv_format=kv_format)
    model = load_tiny(kind, plan)
    cache = PreallocatedCache(model, 64)  # 64 tokens: each tensor of keys is a whole number of blocks
    tensors = [
        getattr(layer, name)
        for layer in cache.layers
        for name in ("keys", "values", "key_scale", "value_scale")
        if getattr(layer, name) is not None
    ]
    assert sum(tensor.nbytes for tensor in tensors) == plan.kv_bytes(64) == plan.kv_bytes(64, "gpu")
    scales = 2 * 3 * (512 - 64 * 2 * 2) if kv_format == "int8" else 0  # 256 bytes of scales fill half a block
    assert model.lowvram.gpu.meter.category_bytes("kv") == plan.kv_bytes(64) + scales
    where = [tensor.data_ptr() for tensor in tensors]
    with torch.no_grad():
        prefill(model, random_ids(60), cache)
    assert [tensor.data_ptr() for tensor in tensors] == where
    assert model.lowvram.gpu.meter.category_bytes("kv") == plan.kv_bytes(64) + scales
    del tensors, cache
    gc.collect()
    assert model.lowvram.gpu.meter.category_bytes("kv") == 0


@simulated
def test_each_layers_part_is_where_the_layer_computes():
    model = load_tiny("qwen2", plan_of("qwen2", "int8"))
    cache, place_of = PreallocatedCache(model), model.lowvram.gpu.meter.place_of
    found = [{place_of(each) for each in (held.keys, held.values, held.key_scale)} for held in cache.layers]
    assert found == [{"cpu"}, {"cpu"}, {"gpu"}]


@pytest.mark.parametrize("kv_format", ["fp32", "int8"])
@pytest.mark.parametrize("kind", TINY)
def test_length_and_keeping(kind, kv_format):
    model, ids = load_tiny(kind, plan_of(kind, kv_format)), random_ids(20)
    whole = decoded(ModuleDecoder(model), ids, 12)
    decoder = ModuleDecoder(model)
    cache = decoder.cache
    assert cache.get_seq_length() == 0
    decoded(decoder, random_ids(20, seed=9)[:, :5], 5)
    cache.keep(0)
    assert cache.get_seq_length() == 0
    decoded(decoder, ids, 12)
    assert cache.get_seq_length() == 20
    cache.keep(12)
    assert cache.get_seq_length() == 12
    again = torch.stack([decoder.decode(ids[:, at : at + 1]).cpu() for at in range(12, 20)])
    assert relative_error(again, whole[1:]) < 1e-5
    cache.keep(100)
    assert cache.get_seq_length() == 20


def test_an_int8_layer_keeps_zeros_and_the_largest():
    layer = PreallocatedLayer(open_gpu(None), "gpu", KVShape(1, 2, 9, 8, 8), torch.float32, "int8")
    states = torch.randn(1, 2, 5, 8, generator=torch.Generator().manual_seed(0))
    states[0, 0, 3] = 0
    keys, values = (each.cpu() for each in layer.update(states, states))
    assert layer.keys.dtype == torch.int8
    assert torch.equal(keys, values)
    assert (keys[0, 0, 3] == 0).all()
    step = states.abs().amax(-1, keepdim=True) / 127
    assert ((keys - states).abs() <= step * (0.5 + 127 * 2**-8)).all()  # half a code, and the scale's bf16 rounding


@pytest.mark.parametrize("kv_format", KV_FORMATS)
@pytest.mark.parametrize("found", [(1, 2, 3, 32), (2, 4, 3, 32), (2, 1, 3, 32), (2, 2, 3, 64)])
def test_keys_of_another_shape_are_refused_not_written_into_every_row(found, kv_format):
    """A batch, a number of heads (1 would be copied into all) or a width that the cache was not made for."""
    cache = PreallocatedCache(load_tiny("qwen2", plan_of("qwen2", kv_format)), 8, batch_size=2)
    right, wrong = torch.zeros(2, 2, 3, 32), torch.zeros(found)
    layer = cache.layers[2]
    for states in ((wrong, right), (right, wrong)):
        with pytest.raises(LowvramError, match="expected keys and values of 2 sequences, 2 heads and 32 features") as e:
            layer.update(*states)
        assert "\n" not in str(e.value)
        assert f"found {found[0]}, {found[1]} and {found[3]}" in str(e.value)
        assert layer.get_seq_length() == 0
    layer.update(right, right)
    assert layer.get_seq_length() == 3


@pytest.mark.parametrize("kv_format", KV_FORMATS)
def test_a_cache_of_another_batch_is_refused(kv_format):
    model = load_tiny("qwen2", plan_of("qwen2", kv_format))
    for held, found in ((2, 1), (1, 3)):
        cache = PreallocatedCache(model, 8, batch_size=held)
        words = f"the KV cache is for {held} sequences, found {found}; say batch_size={found}"
        with torch.no_grad(), pytest.raises(LowvramError, match=words):
            prefill(model, random_ids(4, batch=found), cache)
        assert cache.get_seq_length() == 0


@pytest.mark.parametrize("kv_format", KV_FORMATS)
def test_a_full_cache_is_refused_before_anything_is_written(kv_format):
    decoder = ModuleDecoder(load_tiny("qwen2", plan_of("qwen2", kv_format)), 8)
    decoder.prefill(random_ids(7))
    with pytest.raises(BudgetError, match="holds 8 tokens, asked for 9; plan a longer context"):
        decoder.prefill(random_ids(2))
    decoder.decode(torch.ones(1, 1, dtype=torch.long))
    with pytest.raises(BudgetError, match="holds 8 tokens, asked for 9; plan a longer context"):
        decoder.decode(torch.ones(1, 1, dtype=torch.long))
    assert {layer.get_seq_length() for layer in decoder.cache.layers} == {8}


@pytest.mark.parametrize("kv_format", KV_FORMATS)
def test_beams_are_for_stock_caches(kv_format):
    """transformers would reorder codes without their scales; with its own cache its beam search is as ever."""
    model, ids = load_tiny("qwen2", plan_of("qwen2", kv_format, "cpu")), random_ids(12)
    options = {"num_beams": 2, "max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with pytest.raises(LowvramError, match="beam search reorders its KV cache.*call generate without one"):
        model.generate(ids, past_key_values=PreallocatedCache(model, 32, batch_size=2), **options)
    assert torch.equal(model.generate(ids, **options), tiny_stock("qwen2").generate(ids, **options))
