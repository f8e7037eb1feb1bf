"""Keys and values in 4 bits: against a plain reference, in bytes, cut back, forecast, chatted with."""

import gc
from dataclasses import replace

import pytest
import torch

from lowvram_lab.chat.session import ChatSession
from lowvram_lab.decoding.decode import ModuleDecoder
from lowvram_lab.engine.int4_cache import GROUP, Int4Layer
from lowvram_lab.engine.kv_cache import PreallocatedCache
from lowvram_lab.errors import BudgetError, PlanError
from lowvram_lab.memory.cuda import open_gpu
from lowvram_lab.model.geometry import KVLayer, KVShape
from lowvram_lab.planner.forecast import forecast
from lowvram_lab.planner.measure import run_speed, run_workload
from lowvram_lab.planner.profile import Workload
from tests.engine.test_kv_cache import simulated
from tests.helpers.tiny import (
    TINY,
    decoded,
    letters_state,
    load_tiny,
    random_ids,
    relative_error,
    tiny_plan,
    tiny_spec,
    tiny_tokenizer,
)


def plan_of(kind="qwen2", placement="gpu", context=128):
    return replace(tiny_plan(kind, "fp32", placement, context=context), kv_format="int4")


def layer_of(tokens=100, heads=2, width=64, batch=1):
    return Int4Layer(open_gpu(None), "gpu", KVShape(batch, heads, tokens, width, width), torch.float32)


def rounded(states: torch.Tensor, dim: int) -> torch.Tensor:
    """4 bits over one whole dimension, written down as plainly as can be."""
    low, high = states.amin(dim, keepdim=True), states.amax(dim, keepdim=True)
    scale, zero = ((high - low) / 15).bfloat16().float(), low.bfloat16().float()
    return ((states - zero) / scale).round().clamp(0, 15) * scale + zero


@pytest.mark.parametrize("pieces", [[77], [1] * 77, [31, 1, 1, 30, 14], [40, 37], [64, 13]])
def test_what_is_read_is_what_was_written_rounded_in_groups(pieces):
    layer, states = layer_of(), torch.randn(2, 1, 2, 77, 64)
    done = 0
    for size in pieces:
        keys, values = layer.update(*states[:, :, :, done : done + size])
        done += size
        assert keys.shape == values.shape == (1, 2, done, 64)
    expected = torch.cat(
        [rounded(part, 2) if part.shape[2] == GROUP else part for part in states[0].split(GROUP, 2)], 2
    )
    assert torch.equal(keys, expected)
    assert torch.equal(values, torch.cat([rounded(part, 3) for part in states[1].split(GROUP, 3)], 3))


def test_keys_with_loud_channels_lose_little():
    """What per-token scales would lose: that is why keys are grouped by channel."""
    states = torch.randn(1, 1, GROUP, 64)
    states[..., ::16] = states[..., ::16] * 0.1 + 20
    layer = layer_of(heads=1)
    found, _ = layer.update(states, states)
    quiet = [channel for channel in range(64) if channel % 16]
    per_token = torch.cat([rounded(part, 3) for part in states.split(GROUP, 3)], 3)
    error = relative_error(found[..., quiet], states[..., quiet])
    assert error < 0.15 < 3 * error < relative_error(per_token[..., quiet], states[..., quiet])


@pytest.mark.parametrize("kept", [0, 5, 32, 40, 63, 64, 70, 76, 77, 90])
def test_cut_back_and_gone_on_with(kept):
    layer, states = layer_of(), torch.randn(2, 1, 2, 77, 64)
    before, _ = (tensor.clone() for tensor in layer.update(*states))
    layer.keep(kept)
    assert layer.get_seq_length() == min(kept, 77)
    if kept < 77:
        more = torch.randn(2, 1, 2, 3, 64)
        keys, values = layer.update(*more)
        assert keys.shape[2] == kept + 3
        whole = kept // GROUP * GROUP
        assert torch.equal(keys[:, :, :whole], before[:, :, :whole])
        same = slice(whole, kept if (kept + 3) // GROUP == kept // GROUP else whole)  # else rounded once more
        assert torch.equal(keys[:, :, same], before[:, :, same])
        assert torch.equal(values[:, :, kept:], torch.cat([rounded(part, 3) for part in more[1].split(GROUP, 3)], 3))


@pytest.mark.parametrize("placement", ["gpu", "half", "cpu"])
@pytest.mark.parametrize("kind", TINY)
def test_logits_are_near_those_of_an_exact_cache(kind, placement):
    model, ids = load_tiny(kind, plan_of(kind, placement)), random_ids(70)
    exact = ModuleDecoder(load_tiny(kind, replace(plan_of(kind, placement), kv_format="fp32")))
    expected, found = decoded(exact, ids, 40), decoded(ModuleDecoder(model), ids, 40)
    assert 0 < relative_error(found, expected) < 0.25  # random weights: nothing in them expects to be rounded
    exact.cache.keep(0)
    expected, found = (decoded(each, ids[:, :20], 10) for each in (exact, ModuleDecoder(model)))
    assert 0 < relative_error(found, expected) < 0.25  # keys are exact yet, values are not


@simulated
@pytest.mark.parametrize("kind", TINY)
def test_bytes_are_the_plans_and_the_forecasts(kind):
    plan = plan_of(kind)
    model = load_tiny(kind, plan)
    cache = PreallocatedCache(model)
    held = sum(
        getattr(layer, name).nbytes
        for layer in cache.layers
        for name in ("keys", "key_scale", "recent", "values", "value_scale")
    )
    assert held == plan.kv_bytes(128) == plan.kv_bytes(128, "gpu")
    long = replace(plan, context=1024)
    assert 5 / 16 < long.kv_bytes(1024) / replace(long, kv_format="fp32").kv_bytes(1024) * 2 < 0.38
    del cache
    gc.collect()
    for workload in (Workload(100, 20), Workload(60, 3, follow_up_tokens=20), Workload(30, 4, batch_size=2)):
        measured, dry = run_workload(model, workload), forecast(plan, model.lowvram.gpu, workload=workload)
        assert measured.kv_bytes == dry.kv_bytes > 0
        assert [p.peak_allocated_bytes for p in measured.phases] == [p.peak_allocated_bytes for p in dry.phases]
    assert run_speed(model, Workload(20, 3)).decode_tokens_per_s > 0


def test_full():
    layer, states = layer_of(tokens=40, batch=2), torch.randn(2, 2, 2, 40, 64)
    keys, values = (tensor.clone() for tensor in layer.update(*states))
    with pytest.raises(BudgetError, match="holds 40 tokens, asked for 41"):
        layer.update(*states[:, :, :, :1])
    layer.keep(39)
    again, _ = layer.update(*states[:, :, :, :1])
    assert torch.equal(again[:, :, :39], keys[:, :, :39])
    assert values.shape == keys.shape


def test_a_head_that_is_no_multiple_of_a_group_is_refused():
    spec = replace(tiny_spec("qwen2"), kv_layers=(KVLayer(2, 48, 48),) * 3)
    with pytest.raises(PlanError, match="heads of 32, 64 … features, found 48; take int8"):
        replace(plan_of(), spec=spec)


def test_a_chat_with_it_says_what_decodes():
    model = load_tiny("qwen2", plan_of(context=256), None, letters_state())
    session = ChatSession(model, tiny_tokenizer(), max_new_tokens=12)
    assert (
        session.engine
        == "the model's modules (its KV cache is in int4, which without compiled kernels the modules read)"
    )
    assert session.ask("hello") and session.ask("and more?")
    assert session.turns[-1].cached_tokens > 0
