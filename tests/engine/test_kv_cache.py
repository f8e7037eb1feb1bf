"""KV caches: what int8 costs in accuracy and saves in bytes; static, batched, with beams and over a second turn."""

import gc
import itertools
from dataclasses import replace

import pytest
import torch

from lowvram_lab.engine.cache_layers import Int8Layer
from lowvram_lab.engine.decode import decode_one_token, prefill
from lowvram_lab.engine.kv_cache import PreallocatedCache
from lowvram_lab.engine.sampling import choose_beams
from lowvram_lab.errors import PlanError
from lowvram_lab.memory.cuda import open_gpu
from lowvram_lab.planner.forecast import forecast
from lowvram_lab.planner.measure import run_workload
from lowvram_lab.planner.profile import Workload
from lowvram_lab.units import MiB
from tests.helpers.tiny import TINY, load_tiny, random_ids, relative_error, tiny_plan, tiny_spec, tiny_stock

simulated = pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA's own counters differ by what kernels hide")


@pytest.fixture(scope="module", params=TINY)
def model(request):
    return load_tiny(request.param, tiny_plan(request.param, "fp32", "half"))


@torch.no_grad()
def logits_of(model, cache, ids, prompt):
    """Logits of the last prompt token and of every token fed back after it, ``(tokens, batch, vocab)``."""
    steps = [prefill(model, ids[:, :prompt], cache)]
    steps += [decode_one_token(model, ids[:, index : index + 1], cache) for index in range(prompt, ids.shape[1])]
    return torch.stack([step.cpu() for step in steps])


@pytest.mark.parametrize("prompt", [1, 30])
def test_int8_is_close_to_16_bits(model, prompt):
    ids = random_ids(36)
    exact, rounded = (logits_of(model, MeteredCache(model.lowvram.gpu, name), ids, prompt) for name in ("fp32", "int8"))
    # A code is off by half of amax/127 at most: under 1 % of a key's typical size; bf16 scales add 2^-9 of it;
    # attention averages over tokens, the residual carries the rest past it.
    assert 0 < relative_error(rounded, exact) < 0.02


def test_a_static_cache_gives_the_growing_ones_logits(model):
    ids = random_ids(24, batch=2)
    growing = logits_of(model, PreallocatedCache(model), ids, 20)
    static = logits_of(model, MeteredStaticCache(model.lowvram.gpu, model.config, 24), ids, 20)
    assert relative_error(static, growing) < 1e-5  # masked positions are exact zeros; only the order of sums differs


@simulated
@pytest.mark.parametrize(
    ("kv_format", "recipe"), [("fp32", "fp32"), ("int8", "fp32"), ("bf16", "bf16"), ("int8", "bf16")]
)
@pytest.mark.parametrize("kind", TINY)
def test_bytes_are_the_plans(kind, kv_format, recipe):
    plan = replace(tiny_plan(kind, recipe), kv_format=kv_format)
    model, spec = load_tiny(kind, plan), tiny_spec(kind)
    cache = PreallocatedCache(model)
    assert cache.get_seq_length() == 0
    logits_of(model, cache, random_ids(64), 60)  # 64 tokens: each tensor of keys is a whole number of blocks
    tensors = [
        getattr(layer, name)
        for layer in cache.layers
        for name in ("keys", "values", "key_scale", "value_scale")
        if getattr(layer, name, None) is not None
    ]
    assert sum(tensor.nbytes for tensor in tensors) == plan.kv_bytes(spec, 64) == plan.kv_bytes(spec, 64, "gpu")
    scales = 2 * 3 * (512 - 64 * 2 * 2) if kv_format == "int8" else 0  # 256 bytes of scales fill half a block
    assert model.lowvram.gpu.meter.category_bytes("kv") == plan.kv_bytes(spec, 64) + scales
    del tensors, cache
    gc.collect()
    assert model.lowvram.gpu.meter.category_bytes("kv") == 0


@pytest.mark.parametrize("kv_format", ["fp32", "int8"])
def test_length_and_keeping(model, kv_format):
    ids = random_ids(20)
    whole = logits_of(model, PreallocatedCache(model), ids, 12)
    cache = PreallocatedCache(model)
    assert cache.get_seq_length() == 0
    logits_of(model, cache, random_ids(20, seed=9)[:, :5], 5)
    cache.keep(0)
    assert cache.get_seq_length() == 0
    logits_of(model, cache, ids, 12)
    assert cache.get_seq_length() == 20
    cache.keep(12)
    assert cache.get_seq_length() == 12
    with torch.no_grad():
        again = torch.stack([decode_one_token(model, ids[:, i : i + 1], cache).cpu() for i in range(12, 20)])
    assert relative_error(again, whole[1:]) < 1e-5
    cache.keep(100)
    assert cache.get_seq_length() == 20


@pytest.mark.parametrize("kv_format", ["fp32", "int8"])
def test_reordering_follows_the_beams(model, kv_format):
    ids, order = random_ids(10, batch=3), torch.tensor([2, 0, 0])
    cache = PreallocatedCache(model)
    logits_of(model, cache, ids[:, :9], 9)
    with model.lowvram.gpu.active(), torch.no_grad():
        cache.reorder_cache(order)
        found = decode_one_token(model, ids[:, 9:], cache)
    shuffled = torch.cat((ids[order, :9], ids[:, 9:]), dim=1)
    expected = logits_of(model, PreallocatedCache(model), shuffled, 9)[-1]
    assert relative_error(found, expected) < 1e-5


def test_an_empty_int8_layer():
    layer = Int8Layer()
    layer.reorder_cache(torch.tensor([0]))
    assert layer.get_seq_length() == 0


def test_an_int8_layer_keeps_zeros_and_the_largest():
    layer, states = Int8Layer(), torch.randn(1, 2, 5, 8, generator=torch.Generator().manual_seed(0))
    states[0, 0, 3] = 0
    codes, _ = layer.update(states, states)
    assert codes.dtype == torch.int8
    keys, values = layer.dequantized()
    assert torch.equal(keys, values)
    assert (keys[0, 0, 3] == 0).all()
    step = states.abs().amax(-1, keepdim=True) / 127
    assert ((keys - states).abs() <= step * (0.5 + 127 * 2**-8)).all()  # half a code, and the scale's bf16 rounding


def differences(kind, plan, workloads):
    """Allocated peak of every phase, forecast minus measured, workload by workload on one loaded model."""
    gpu = open_gpu("1000MiB")
    model, found = load_tiny(kind, plan, gpu), {}
    for workload in workloads:
        table = forecast(plan, tiny_spec(kind), gpu, workload=workload).compare(run_workload(model, workload))
        assert len(table) == 3 + bool(workload.follow_up_tokens)
        found |= {(workload, row.phase): row.difference for row in table.itertuples()}
        gc.collect()
        assert gpu.meter.category_bytes("kv") == 0
    return found


@simulated
@pytest.mark.parametrize("kv_format", ["bf16", "int8"])
@pytest.mark.parametrize("placement", ["gpu", "half"])
@pytest.mark.parametrize("recipe", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("kind", TINY)
def test_forecast_minus_measured_is_nought_with_batch_beams_and_a_second_turn(kind, recipe, placement, kv_format):
    plan = replace(tiny_plan(kind, recipe, placement), kv_format=kv_format)
    found = differences(kind, plan, [Workload(33, 1, batch_size=2, num_beams=2, follow_up_tokens=9)])
    assert not any(found.values()), found


@simulated
@pytest.mark.parametrize(("recipe", "placement"), [("int8", "half"), ("bf16", "gpu")])
def test_forecast_minus_measured_is_nought_for_odd_workloads(recipe, placement):
    workloads = [
        Workload(70, 3, batch_size=2, follow_up_tokens=20),
        Workload(20, 3, follow_up_tokens=20),  # forgets all of the first turn
        Workload(33, 3, num_beams=3),
        Workload(1, 0),
        Workload(40, 3, cache="static", batch_size=2),
    ]
    found = differences("qwen2", tiny_plan("qwen2", recipe, placement), workloads)
    assert not any(found.values()), found


@pytest.mark.parametrize("changes", [{"follow_up_tokens": 5}, {"num_beams": 2}])
def test_a_static_cache_has_its_limits(changes):
    with pytest.raises(PlanError, match="static cache"):
        Workload(10, cache="static", **changes)


def test_a_static_cache_in_int8_is_refused():
    plan = replace(tiny_plan("llama"), kv_format="int8")
    with pytest.raises(PlanError, match="static cache holds the plan's dtype, found kv_format int8"):
        forecast(plan, tiny_spec("llama"), "1000MiB", workload=Workload(64, 2, cache="static"))


@pytest.mark.parametrize(("batch", "num_beams", "vocabulary"), [(1, 2, 5), (2, 3, 7), (3, 1, 4), (1, 4, 3)])
def test_beams_are_the_best_of_all_continuations(batch, num_beams, vocabulary):
    generator = torch.Generator().manual_seed(batch)
    logits = torch.randn(batch * num_beams, vocabulary, generator=generator)
    scores = torch.randn(batch * num_beams, 1, generator=generator)
    tokens, best, rows = choose_beams(logits, scores, num_beams)
    assert tokens.shape == best.shape == (batch * num_beams, 1)
    for prompt in range(batch):
        own = range(prompt * num_beams, (prompt + 1) * num_beams)
        every = [
            (float(scores[row] + logits[row, token] - logits[row].logsumexp(0)), row, token)
            for row, token in itertools.product(own, range(vocabulary))
        ]
        expected = sorted(every, reverse=True)[:num_beams]
        assert [(int(rows[i]), int(tokens[i])) for i in own] == [(row, token) for _, row, token in expected]
        assert best[list(own), 0].tolist() == pytest.approx([score for score, _, _ in expected], abs=1e-5)


@torch.no_grad()
def beam_search(model, ids, num_beams, steps):
    gpu, cache = model.lowvram.gpu, PreallocatedCache(model)
    scores = torch.full((num_beams, 1), -1e9)
    scores[0] = 0  # as in generate: all beams begin alike, so only the first may branch
    with gpu.active():
        logits, answers = prefill(model, ids.repeat(num_beams, 1), cache), torch.empty(num_beams, 0, dtype=torch.long)
        for step in range(steps):
            logits = gpu.move(logits, "cpu")
            token, scores, rows = choose_beams(logits, scores, num_beams)
            answers = torch.cat((answers[rows], token), dim=1)
            if step < steps - 1:
                cache.reorder_cache(rows)
                logits = decode_one_token(model, token, cache)
    return answers


@pytest.mark.parametrize("num_beams", [2, 3])
def test_beam_steps_find_what_generate_finds(model, num_beams):
    ids, steps = random_ids(12), 6
    expected = tiny_stock(model.config.model_type).generate(
        ids,
        attention_mask=torch.ones_like(ids),
        num_beams=num_beams,
        num_return_sequences=num_beams,
        max_new_tokens=steps,
        length_penalty=0.0,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert beam_search(model, ids, num_beams, steps).tolist() == expected[:, ids.shape[1] :].tolist()


@simulated
def test_beams_cost_as_much_as_a_batch_and_their_reordering_on_top():
    plan, spec = tiny_plan("qwen2"), tiny_spec("qwen2")
    beams, batch = (forecast(plan, spec, workload=Workload(100, 2, **{n: 4})) for n in ("num_beams", "batch_size"))
    assert beams.kv_bytes == batch.kv_bytes
    assert beams.phase("prefill").peak_allocated_bytes >= batch.phase("prefill").peak_allocated_bytes
    assert beams.phase("decode").peak_allocated_bytes > batch.phase("decode").peak_allocated_bytes
    assert batch.kv_bytes > 4 * plan.kv_bytes(spec, 101)
    assert batch.peak_allocated_bytes < 1000 * MiB
