"""The bytes that a token's temporaries take, beside what torch's own profiler sees its allocator give."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from lowvram_lab.decoding.lean import LeanDecoder
from lowvram_lab.engine.load import load
from lowvram_lab.memory.cuda import open_gpu
from lowvram_lab.model.plan import Plan
from lowvram_lab.model.spec import ModelSpec
from tests.helpers.tiny import TINY, DictCheckpoint, load_tiny, random_ids, random_state, tiny_config, tiny_plan

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="on a card a graph's own pool is the workspace")
compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
BLOCK = 512
CONTEXT = 200


def allocated(run, path) -> int:
    """Most bytes that torch's allocator had given at once while ``run`` ran, beside those it had given before."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        run()
    profile.export_chrome_trace(str(path))
    events = json.loads(path.read_text())["traceEvents"]
    found = [event["args"] for event in events if event["name"] == "[memory]"]
    return max(each["Total Allocated"] for each in found) - (found[0]["Total Allocated"] - found[0]["Bytes"])


def of_the_last_token(decoder, batch_size, path) -> int:
    """Bytes beside weights and cache for the token that fills the cache: it looks at all of it."""
    decoder.prefill(random_ids(decoder.cache.max_tokens - 2, batch_size))
    token = torch.ones(batch_size, 1, dtype=torch.long)
    decoder.decode(token)  # once before: what torch keeps for itself is there then
    decoder.cache.keep(decoder.cache.max_tokens - 1)
    return allocated(lambda: decoder.decode(token), path)


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("kv_format", [None, "int8"])
@pytest.mark.parametrize("recipe", ["fp32", "bf16", "fp16", "int8", "int4"])
@pytest.mark.parametrize("kind", TINY)
def test_a_layer_takes_what_is_kept_for_it(kind, recipe, kv_format, batch_size, tmp_path):
    plan = tiny_plan(kind, recipe, context=CONTEXT)
    model = load_tiny(kind, replace(plan, kv_format=kv_format or plan.kv_format))
    decoder = LeanDecoder(model, batch_size=batch_size, compiled=False)
    found = of_the_last_token(decoder, batch_size, tmp_path / "trace.json")
    # a workspace is counted in the allocator's blocks, tensor by tensor, and some of these have a few bytes
    assert found <= decoder.workspace_bytes < found + 4 * BLOCK


def wide_headed(kind, fmt, dtype):
    """A model of which the head takes most, in a format of its own (a tied embedding in the same)."""
    spec = ModelSpec.from_config(tiny_config(kind, vocab_size=20_000), f"wide-{kind}")
    names = {spec.head, spec.embedding} if spec.tied else {spec.head}
    plan = Plan.uniform(spec, dtype, context=16).with_modules(*names, format=fmt)
    state = DictCheckpoint(random_state(spec))
    return load(plan, open_gpu("1000MiB"), checkpoint=state, progress=False)


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize(
    ("kind", "fmt"),
    [("llama", "fp32"), ("llama", "int8"), ("llama", "int4"), ("qwen2", "int4"), ("qwen2", "int3"), ("qwen2", "nf4")],
)
def test_a_head_takes_what_is_kept_for_it(kind, fmt, batch_size, tmp_path):
    """A head without a kernel (a tied int4 one, say) is multiplied by dequantised tiles, a hundred times its logits."""
    model = wide_headed(kind, fmt, "fp32" if fmt in ("fp32", "nf4") else "bf16")  # fp32: no scratch inside a product
    decoder = LeanDecoder(model, batch_size=batch_size, compiled=False)
    found = of_the_last_token(decoder, batch_size, tmp_path / "trace.json")
    assert found - BLOCK <= decoder.workspace_bytes < found + 4 * BLOCK
    by_tiles = fmt in ("int3", "nf4") or (kind, fmt) == ("llama", "int4")
    assert (decoder.workspace_bytes > 20_000 * 128 * 2) == by_tiles  # a whole weight, in 16 bits


def test_a_bf16_product_takes_scratch_that_neither_meter_nor_workspace_sees(tmp_path):
    """Measured beside the very product, so that it is known how much: 64 rows of the weight at most.

    With AMX oneDNN takes 5 KiB more, and not where ONEDNN_MAX_CPU_ISA keeps it from it.
    """
    decoder = LeanDecoder(wide_headed("llama", "bf16", "bf16"), compiled=False)
    found = of_the_last_token(decoder, 1, tmp_path / "trace.json")
    weight, x = torch.zeros(20_000, 128, dtype=torch.bfloat16), torch.zeros(1, 128, dtype=torch.bfloat16)
    alone = allocated(lambda: torch.nn.functional.linear(x, weight), tmp_path / "trace.json")
    scratch = alone - 20_000 * 2
    tiles = 10 * BLOCK if torch.cpu._is_amx_tile_supported() else 4 * BLOCK
    assert 0 <= scratch <= 64 * 128 * 2 + tiles
    assert found - scratch <= decoder.workspace_bytes < found - scratch + 4 * BLOCK


@compiler
@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "kv_format", "batch_size"),
    [("fp32", "fp32", 1), ("bf16", "int8", 1), ("int8", "bf16", 2), ("int4", "int8", 2)],
)
def test_a_compiled_token_takes_at_most_what_is_kept_and_at_least_half(
    recipe, kv_format, batch_size, tmp_path, monkeypatch
):
    monkeypatch.setenv("LOWVRAM_COMPILE", "1")
    monkeypatch.setenv("LOWVRAM_CACHE", str(tmp_path))
    model = load_tiny("qwen2", replace(tiny_plan("qwen2", recipe, context=CONTEXT), kv_format=kv_format))
    decoder = LeanDecoder(model, batch_size=batch_size, compiled=True, progress=False)
    found = of_the_last_token(decoder, batch_size, tmp_path / "trace.json")
    assert found <= decoder.workspace_bytes <= 2 * found
