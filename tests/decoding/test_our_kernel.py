"""Plans in the formats that only our kernel multiplies: decoded lean, and the same as by dequantised weights."""

from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig

from lowvram_lab.decoding.decode import ModuleDecoder
from lowvram_lab.decoding.kinds import engine_of, why_not
from lowvram_lab.decoding.lean import LeanDecoder, decoder_for
from lowvram_lab.engine.layers import quantized_linear
from lowvram_lab.engine.load import load
from lowvram_lab.kernels import product
from lowvram_lab.kernels.library import there
from lowvram_lab.memory.cuda import open_gpu
from lowvram_lab.model.formats import get_format
from lowvram_lab.model.plan import Plan
from lowvram_lab.model.spec import ModelSpec
from lowvram_lab.planner.forecast import forecast
from lowvram_lab.planner.measure import run_workload
from lowvram_lab.planner.profile import Workload
from tests.helpers.tiny import (
    SIZES,
    TINY,
    TOLERANCES,
    DictCheckpoint,
    decoded,
    load_tiny,
    random_ids,
    random_state,
    relative_error,
    tiny_plan,
)

FORMATS = ("int2", "int3", "int3-g32", "int5", "int5-g32-asym", "int6", "int6-g16", "int6-g32", "nf4")
ROUNDINGS = 2 * TOLERANCES["bf16"]
"""The kernel rounds inputs to bf16, the modules round weights and results."""

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="about the CPU, and what stands in for a card there")


@pytest.fixture
def dequantised(monkeypatch):
    """Decodes with weights dequantised, by the modules; afterwards there is a compiler again."""
    monkeypatch.setenv("LOWVRAM_COMPILE", "1")
    if not there():
        pytest.skip("no C++ compiler")

    def by_modules(model, ids, prompt):
        layers = [module for module in model.modules() if getattr(module, "readable", False)]
        for layer in layers:
            layer.readable = False
        found = decoded(ModuleDecoder(model, batch_size=len(ids)), ids, prompt)
        for layer in layers:
            layer.readable = True
        return found

    return by_modules


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("recipe", FORMATS)
@pytest.mark.parametrize("kind", TINY)
def test_logits_are_those_of_dequantised_weights(kind, recipe, batch_size, dequantised):
    plan = tiny_plan(kind, recipe, context=64)
    model, ids = load_tiny(kind, plan), random_ids(24, batch_size)
    expected = dequantised(model, ids, 12)
    assert why_not(plan, "cpu") == ""
    lean = LeanDecoder(model, batch_size=batch_size, compiled=False)
    assert relative_error(decoded(lean, ids, 12), expected) < ROUNDINGS
    assert relative_error(decoded(ModuleDecoder(model, batch_size=batch_size), ids, 12), expected) < ROUNDINGS


def test_widths_that_torchs_int8_kernel_does_not_read(dequantised):
    spec = ModelSpec.from_config(LlamaConfig(**{**SIZES, "intermediate_size": 200}), "narrow")
    plan, ids = Plan.uniform(spec, "int8", context=64), random_ids(24)
    model = load(plan, open_gpu(None), checkpoint=DictCheckpoint(random_state(spec)), progress=False)
    expected = dequantised(model, ids, 12)
    assert relative_error(decoded(LeanDecoder(model, compiled=False), ids, 12), expected) < ROUNDINGS


def test_a_tied_int4_table_is_the_heads_weight_too(dequantised):
    plan, ids = tiny_plan("llama", "int4", context=64), random_ids(24)
    spec = plan.spec
    plan = plan.with_modules(spec.head, spec.embedding, format="int4")
    model = load_tiny("llama", plan)
    expected = dequantised(model, ids, 12)
    decoder = LeanDecoder(model, compiled=False)
    assert relative_error(decoded(decoder, ids, 12), expected) < ROUNDINGS
    tile = spec.vocab_size * spec.hidden_size * 2
    assert decoder.workspace_bytes < tile  # nothing is dequantised


@pytest.mark.parametrize("recipe", ["int3", "nf4"])
def test_compiled_layers_call_it(recipe, dequantised):
    plan, ids = tiny_plan("qwen2", recipe, context=64), random_ids(24)
    model = load_tiny("qwen2", plan)
    expected = dequantised(model, ids, 12)
    decoder = decoder_for(model, compiled=True, progress=False)
    assert decoder.name == engine_of(plan, "cpu")[1] == "the lean decoder, compiled"
    assert relative_error(decoded(decoder, ids, 12), expected) < ROUNDINGS


@pytest.mark.parametrize("recipe", ["int2", "int3", "nf4", "int8"])
def test_the_forecast_is_what_is_metered(recipe, dequantised):
    plan, workload = tiny_plan("qwen2", recipe, context=128), Workload(40, 12, follow_up_tokens=20)
    gpu = open_gpu("1000MiB")
    foretold = forecast(plan, gpu, workload=workload)
    measured = run_workload(load_tiny("qwen2", plan, gpu), workload)
    for dry, real in zip(foretold.phases, measured.phases, strict=True):
        assert dry.peak_allocated_bytes == real.peak_allocated_bytes
    assert foretold.engine == measured.engine


@pytest.mark.parametrize("name", ["int2", "int3", "int4-g96", "int5", "int6", "nf4"])
def test_a_layers_few_rows_are_the_rows_one_by_one(name, dequantised):
    layer = quantized_linear(192, 48, get_format(name), "cpu")
    layer.store(torch.randn(48, 192), lambda tensor: tensor)
    x = torch.randn(product.MOST_ROWS, 192)
    one_by_one = torch.cat([layer(row[None]) for row in x])
    for rows in range(1, len(x) + 1):
        assert torch.equal(layer(x[:rows]), one_by_one[:rows])


def test_without_a_compiler_the_modules_decode(monkeypatch):
    monkeypatch.setenv("LOWVRAM_COMPILE", "0")
    plan = replace(tiny_plan("qwen2", "int3"), context=64)
    assert "int3, which has no kernel" in why_not(plan, "cpu")
    model = load_tiny("qwen2", plan)
    assert torch.isfinite(decoded(decoder_for(model), random_ids(20), 8)).all()
