"""The lean decoder with attention by our kernel: every KV format, wherever layers lie, beside the modules and stock."""

from dataclasses import replace

import pytest
import torch

from lowvram_lab.decoding.decode import ModuleDecoder
from lowvram_lab.decoding.kinds import engine_of, why_not
from lowvram_lab.decoding.lean import LeanDecoder, decoder_for
from lowvram_lab.memory.budget import GpuBudget
from lowvram_lab.planner.forecast import forecast
from tests.helpers.tiny import (
    PLACEMENTS,
    TINY,
    TOLERANCES,
    bytes_by_operator,
    decoded,
    load_tiny,
    random_ids,
    relative_error,
    tiny_plan,
    tiny_stock,
)

FORMATS = ["fp32", "bf16", "fp16", "int8", "nf4", "int2", "int3", "int4", "int5", "int6"]
pytestmark = [
    pytest.mark.usefixtures("compiling"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="about the CPU"),
]


def loaded(kind, recipe="fp32", placement="gpu", kv_format=None, context=128):
    plan = tiny_plan(kind, recipe, placement, context)
    return load_tiny(kind, replace(plan, kv_format=kv_format or plan.kv_format))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kind", TINY)
def test_logits_are_those_of_stock_transformers(kind, batch):
    ids = random_ids(80, batch)
    decoder = LeanDecoder(loaded(kind), batch_size=batch, compiled=False)
    assert all(run.args[0].our_attention for run in decoder._ways[False].layers)
    with torch.no_grad():
        expected = tiny_stock(kind)(ids).logits[:, 11:].transpose(0, 1)
    assert relative_error(decoded(decoder, ids, 12), expected) < TOLERANCES["fp32"]


CASES = [(recipe, None) for recipe in FORMATS] + [
    ("bf16", "int8"),
    ("bf16", "int4"),
    ("int3", "int8"),
    ("int3", "int4"),
]
MORE = [("llama", "int8", 2), ("llama", "int4", 2), ("qwen2", "int8", 1)]
REFUSED = {("streamed", "int4")}  # weights travel beside keys and values that can go with them


@pytest.mark.parametrize(("recipe", "kv_format"), CASES)
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_every_format_in_every_place_decodes_as_the_modules_do(placement, recipe, kv_format):
    if (placement, kv_format) in REFUSED:
        pytest.skip("refused by the plan")
    model, ids = loaded("qwen2", recipe, placement, kv_format), random_ids(44)
    assert why_not(model.lowvram.plan, "cpu") == ""
    lean = decoded(LeanDecoder(model, compiled=False), ids, 12).float()
    modules = decoded(ModuleDecoder(model), ids, 12).float()
    # a rounded code may flip in a cache of codes
    tolerance = {"fp32": 1e-3, "fp16": 0.01}.get(recipe, TOLERANCES["bf16"]) + {"int4": 0.05}.get(kv_format, 0.0)
    assert relative_error(lean, modules) < tolerance


@pytest.mark.parametrize("kind", TINY)
def test_a_long_int4_cache_is_read_as_exactly_as_a_short_one(kind):
    """Blocks fill, the newest keys are exact: over 400 tokens beside the modules, which dequantise the same codes."""
    model, ids = loaded(kind, "fp32", kv_format="int4", context=512), random_ids(400)
    lean = decoded(LeanDecoder(model, compiled=False), ids, 12)
    assert relative_error(lean, decoded(ModuleDecoder(model), ids, 12)) < 0.02


@pytest.mark.parametrize(
    ("kind", "kv_format", "batch"),
    [
        ("qwen2", "int4", 1),
        ("llama", None, 3),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE),
    ],  # each compiles for a minute
)
def test_compiled_is_the_same_and_its_workspace_is_forecast(kind, kv_format, batch):
    model, ids = loaded(kind, "int4", kv_format=kv_format, context=300), random_ids(80, batch)
    decoder = decoder_for(model, batch_size=batch, progress=False)
    assert decoder.compiled
    plain = decoded(LeanDecoder(model, batch_size=batch, compiled=False), ids, 12).float()
    assert relative_error(decoded(decoder, ids, 12).float(), plain) < 0.02
    plan = model.lowvram.plan
    budget = replace(GpuBudget.parse("1000MiB"), kernels="cpu")
    assert engine_of(plan, "cpu")[1] == decoder.name == forecast(plan, budget).engine


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "kv_format"), [*((recipe, None) for recipe in FORMATS[3:]), ("bf16", "int4")])
def test_compiled_nothing_grows_over_500_tokens(recipe, kv_format):
    """By torch's own count of what its allocator gave and took back."""
    model, token = loaded("qwen2", recipe, kv_format=kv_format, context=600), torch.ones(1, 1, dtype=torch.long)
    decoder = LeanDecoder(model, compiled=True, progress=False)
    decoder.prefill(random_ids(4))
    decoder.decode(token)
    usage = bytes_by_operator(decoder, 500)
    assert sum(usage) == 0
    assert any(usage)
