"""The lean decoder beside transformers: every family, every format with a kernel, compiled or not; and its cache."""

import gc
import shutil
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from lowvram_lab.decoding import compiled
from lowvram_lab.decoding.bind import bind_layer
from lowvram_lab.decoding.decode import ModuleDecoder, prefill
from lowvram_lab.decoding.graph import GraphedStep
from lowvram_lab.decoding.kinds import why_not
from lowvram_lab.decoding.lean import LeanDecoder, decoder_for
from lowvram_lab.engine.kv_cache import PreallocatedCache
from lowvram_lab.engine.load import load, replan
from lowvram_lab.errors import BudgetError, LowvramError
from lowvram_lab.memory.cuda import open_gpu
from lowvram_lab.model.plan import Plan
from lowvram_lab.model.spec import ModelSpec
from tests.helpers.tiny import (
    SIZES,
    TINY,
    TOLERANCES,
    DictCheckpoint,
    bytes_by_operator,
    decoded,
    load_tiny,
    random_ids,
    random_state,
    relative_error,
    tiny_plan,
    tiny_stock,
)

simulated = pytest.mark.skipif(torch.cuda.is_available(), reason="layers on a card are not decoded here yet")
compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
FAMILIES = {
    "llama": LlamaConfig(
        **SIZES, tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 5e5}
    ),
    "llama, biases": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "llama 3's rotary": LlamaConfig(
        **SIZES,
        rope_parameters={
            "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=64),
}  # fmt: skip


def loaded(name: str, recipe: str = "fp32", **changes):
    """A tiny model of a family, and the stock one with the same weights."""
    spec = ModelSpec.from_config(FAMILIES[name], name)
    state = random_state(spec)
    plan = replace(Plan.uniform(spec, recipe, context=128), **changes)
    stock = AutoModelForCausalLM.from_config(spec.pretrained_config(), attn_implementation="sdpa")
    stock.load_state_dict(state, strict=False)
    stock.tie_weights()
    model = load(plan, open_gpu("1000MiB"), checkpoint=DictCheckpoint(state), progress=False)
    return model, stock.eval()


def by_modules(model, ids: torch.Tensor, prompt: int) -> torch.Tensor:
    return decoded(ModuleDecoder(model), ids, prompt)


@simulated
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_stock_transformers(name, batch):
    model, stock = loaded(name)
    ids = random_ids(40, batch)
    found = decoded(LeanDecoder(model, batch_size=batch, compiled=False), ids, 12)
    with torch.no_grad():
        expected = stock(ids).logits[:, 11:].transpose(0, 1)
    assert relative_error(found, expected) < TOLERANCES["fp32"]
    assert float((found - expected).abs().max() / expected.abs().max()) < TOLERANCES["fp32"]


@simulated
@pytest.mark.parametrize("kv_format", ["fp32", "int8"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_fixed_number_of_places_and_a_mask_give_the_same(name, batch, kv_format, monkeypatch):
    """What a CUDA graph captures, run operation by operation; lengths pass 4, 8, 16, 32 and the end of the cache."""
    monkeypatch.setattr("lowvram_lab.decoding.graph.SHORTEST", 4)
    model, _ = loaded(name, kv_format=kv_format)
    ids = random_ids(40, batch)
    decoder = LeanDecoder(model, max_tokens=40, batch_size=batch, compiled=False)
    expected = decoded(decoder, ids, 3)
    bound = [bind_layer(model, *both) for both in zip(model.model.layers, decoder.cache.layers, strict=True)]
    tables = decoder._tables["gpu"]
    decoder._ways[False].graphed = GraphedStep(
        bound, None, decoder._head, tables, batch, model.config.hidden_size, None
    )
    decoder._on_card = range(len(bound))
    decoder.cache.keep(3)
    for held in decoder.cache.layers:
        held.keys[:, :, 3:] = 100  # left over from before: hidden by the mask
    found = [decoder.decode(ids[:, at : at + 1]).clone() for at in range(3, 40)]
    assert relative_error(torch.stack(found), expected[1:]) < (1e-3 if kv_format == "int8" else TOLERANCES["fp32"])
    assert decoder.name == "the lean decoder"


@simulated
@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_text_is_stock_transformers_for_64_tokens(name):
    model, stock = loaded(name)
    ids = random_ids(20)
    expected = stock.generate(ids, max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0)[0, 20:]
    decoder = LeanDecoder(model, compiled=False)
    token = decoder.prefill(ids).argmax(-1, keepdim=True)
    found = [int(token)]
    while len(found) < 64:
        token = decoder.decode(token).argmax(-1, keepdim=True)
        found.append(int(token))
    assert found == expected.tolist()


@simulated
@pytest.mark.parametrize("kv_format", [None, "int8"])
@pytest.mark.parametrize("recipe", ["fp32", "bf16", "fp16", "int8", "int4", "int4-g32", "int4+4"])
@pytest.mark.parametrize("kind", TINY)
def test_formats_and_caches_decode_as_the_modules_do(kind, recipe, kv_format):
    plan = tiny_plan(kind, recipe, "half")
    plan = replace(plan, kv_format=kv_format or plan.kv_format)
    model, ids = load_tiny(kind, plan), random_ids(40)
    found = decoded(LeanDecoder(model, compiled=False), ids, 12)
    assert found.dtype == model.dtype
    tolerance = {"fp32": 1e-3, "fp16": 0.01}.get(recipe, TOLERANCES["bf16"])  # a rounded code may flip in an int8 cache
    assert relative_error(found.float(), by_modules(model, ids, 12).float()) < tolerance


@simulated
@compiler
@pytest.mark.parametrize(("recipe", "kv_format"), [("bf16", "bf16"), ("int4", "int8")])
def test_compiled_once_for_a_machine(recipe, kv_format, tmp_path, monkeypatch):
    """One library for all layers, all lengths up to the last place, and for the next decoder too."""
    made = []
    monkeypatch.setenv("LOWVRAM_COMPILE", "1")
    monkeypatch.setenv("LOWVRAM_CACHE", str(tmp_path))
    inner = compiled._compile
    monkeypatch.setattr(compiled, "_compile", lambda found, shown: made.append(len(found)) or inner(found, shown))
    model, ids = load_tiny("qwen2", replace(tiny_plan("qwen2", recipe), kv_format=kv_format)), random_ids(60)
    expected = by_modules(model, ids, 3).float()
    for room in (60, 90):
        decoder = LeanDecoder(model, max_tokens=room, compiled=True, progress=False)
        found = decoded(decoder, ids, 3)
        assert relative_error(found.float(), expected) < TOLERANCES["bf16"]
        assert len(set(decoder._ways[False].layers)) == 1
    assert made == [2]  # a layer and the head, by one process
    compiled._open.cache_clear()
    made_by_torch = [path for path in tmp_path.rglob("library.so") if "kernels" not in path.parent.name]
    library = made_by_torch[0]  # damaged, of the same size
    data = bytearray(library.read_bytes())
    data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)
    library.unlink()  # the file that is mapped stays whole
    library.write_bytes(data)
    assert LeanDecoder(model, max_tokens=60, progress=False).compiled
    assert made == [2, 1]


@simulated
def test_without_a_compiler_it_says_so_and_decodes(monkeypatch, caplog):
    model, ids = load_tiny("qwen2", tiny_plan("qwen2", "int4")), random_ids(20)
    monkeypatch.setenv("LOWVRAM_COMPILE", "1")
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(LowvramError, match=r"no C\+\+ compiler 'no-such-compiler'; .*, or leave compiled=True out"):
        LeanDecoder(model, compiled=True)
    for _ in range(2):
        decoder = LeanDecoder(model)
        assert not decoder.compiled
        assert torch.isfinite(decoded(decoder, ids, 8)).all()
    found = [record.message for record in caplog.records]
    assert len(found) == 1, "once is enough: the machine will not have one the next time"
    assert found[0].startswith("decoding without compiled layers, which is slower: found no C++ compiler")
    caplog.clear()
    monkeypatch.setenv("LOWVRAM_COMPILE", "0")  # the user's own choice
    assert not LeanDecoder(model).compiled
    with pytest.raises(LowvramError, match="LOWVRAM_COMPILE=0"):
        LeanDecoder(model, compiled=True)
    assert not caplog.records


@simulated
@compiler
def test_where_nothing_can_be_kept_it_says_so_and_decodes(monkeypatch, tmp_path, caplog):
    model, ids = load_tiny("qwen2", tiny_plan("qwen2", "int4")), random_ids(20)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LOWVRAM_COMPILE", "1")
    monkeypatch.setenv("LOWVRAM_CACHE", str(tmp_path / "file"))
    decoder = LeanDecoder(model, progress=False)
    assert not decoder.compiled
    (record,) = caplog.records
    assert "decoding without compiled layers" in record.message and "set LOWVRAM_CACHE" in record.message
    assert torch.isfinite(decoded(decoder, ids, 8)).all()


@simulated
def test_closer_to_full_precision_than_the_modules():
    """The residual stays in float32, and so does everything between two matrix products."""
    ids = random_ids(40)
    with torch.no_grad():
        exact = tiny_stock("qwen2")(ids).logits[:, 11:].transpose(0, 1)
    model = load_tiny("qwen2", tiny_plan("qwen2", "bf16"))
    lean, modules = decoded(LeanDecoder(model, compiled=False), ids, 12), by_modules(model, ids, 12)
    assert relative_error(lean.float(), exact) < relative_error(modules.float(), exact)


@simulated
def test_nothing_grows_over_500_tokens():
    """By torch's own count of what its allocator gave and took back."""
    plan = tiny_plan("qwen2", "int8", context=600)
    model = load_tiny("qwen2", plan)
    decoder, token = LeanDecoder(model, compiled=False), torch.ones(1, 1, dtype=torch.long)
    decoder.prefill(random_ids(4))
    decoder.decode(token)
    usage = bytes_by_operator(decoder, 500)
    assert sum(usage) == 0
    assert any(usage)
    assert decoder.tokens == 505
    assert model.lowvram.gpu.meter.category_bytes("kv") == plan.kv_bytes(600, "gpu")


@simulated
def test_a_meter_around_it_is_left_out():
    model = load_tiny("qwen2", tiny_plan("qwen2", "int8", "half"))
    decoder, token = LeanDecoder(model, compiled=False), torch.ones(1, 1, dtype=torch.long)
    with model.lowvram.gpu.active():
        decoder.prefill(random_ids(4))
        inside = decoder.decode(token).clone()
    decoder.cache.keep(4)
    assert torch.equal(inside, decoder.decode(token))


@simulated
@pytest.mark.parametrize("kv_format", ["fp32", "int8"])
@pytest.mark.parametrize("placement", ["gpu", "half"])
def test_the_cache_is_one_that_stock_generate_uses(placement, kv_format):
    plan = replace(tiny_plan("qwen2", "fp32", placement), kv_format=kv_format)
    model, ids = load_tiny("qwen2", plan), random_ids(12)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cache = PreallocatedCache(model, 40)
    where = [layer.keys.data_ptr() for layer in cache.layers]
    found = model.generate(ids, past_key_values=cache, **options)
    assert torch.equal(found, model.generate(ids, past_key_values=PreallocatedCache(model), **options))
    assert [layer.keys.data_ptr() for layer in cache.layers] == where
    assert cache.get_seq_length() == 23
    cache.keep(5)
    assert cache.get_seq_length() == 5
    cache.reset()
    assert cache.get_seq_length() == 0


@simulated
def test_full_empty_and_out_of_memory():
    model = load_tiny("qwen2", tiny_plan("qwen2", "fp32"))
    decoder = LeanDecoder(model, max_tokens=8, compiled=False)
    token = torch.ones(1, 1, dtype=torch.long)
    with pytest.raises(LowvramError, match="call prefill first"):
        decoder.decode(token)
    with pytest.raises(BudgetError, match="holds 8 tokens, asked for 9"):
        decoder.prefill(random_ids(9))
    decoder.cache.reset()
    decoder.prefill(random_ids(7))
    decoder.decode(token)
    with pytest.raises(BudgetError, match="cache of 8 tokens is full"):
        decoder.decode(token)
    tight = load_tiny("qwen2", tiny_plan("qwen2", "bf16"), open_gpu("2MiB"))
    with pytest.raises(torch.OutOfMemoryError, match="for kv cache"):
        LeanDecoder(tight, max_tokens=8192, compiled=False)


@simulated
def test_sizes_and_shapes_that_are_wrong():
    model = load_tiny("qwen2", tiny_plan("qwen2", "fp32"))
    for size in (0, -5, 1.5, True):
        with pytest.raises(LowvramError, match="expected max_tokens of 1 or more, found"):
            PreallocatedCache(model, size)
    decoder = LeanDecoder(model, max_tokens=40, batch_size=2, compiled=False)
    with pytest.raises(LowvramError, match="the KV cache is for 2 sequences, found 1; say batch_size=1"):
        decoder.prefill(random_ids(4))
    decoder.prefill(random_ids(4, batch=2))
    with pytest.raises(LowvramError, match=r"one token of each sequence, \(2, 1\), found \(1, 1\)"):
        decoder.decode(torch.ones(1, 1, dtype=torch.long))
    chunked = load_tiny("qwen2", replace(tiny_plan("qwen2", "fp32"), prefill_chunk=16))
    cache = PreallocatedCache(chunked, 40)
    with torch.no_grad(), pytest.raises(BudgetError, match="holds 40 tokens, asked for 60"):
        prefill(chunked, random_ids(60), cache)
    assert cache.get_seq_length() == 0  # nothing half-read
    with torch.no_grad(), pytest.raises(LowvramError, match="expected a prompt of one token or more"):
        prefill(chunked, random_ids(60)[:, :0], cache)


@simulated
def test_int8_inputs_that_its_kernel_cannot_read_are_left_to_the_modules():
    config = LlamaConfig(**{**SIZES, "intermediate_size": 200})
    spec = ModelSpec.from_config(config, "narrow")
    plan = Plan.uniform(spec, "int8", context=64)
    model = load(plan, open_gpu(None), checkpoint=DictCheckpoint(random_state(spec)), progress=False)
    assert why_not(plan, "cpu") == "down_proj is in int8, which has no kernel"
    assert decoder_for(model).why == "down_proj is in int8, which has no kernel"


@simulated
def test_it_may_be_made_in_inference_mode():
    model, ids = load_tiny("qwen2", tiny_plan("qwen2", "int8")), random_ids(20)
    with torch.inference_mode():
        inside = LeanDecoder(model, compiled=False)
    outside = LeanDecoder(model, compiled=False)
    assert inside.workspace_bytes == outside.workspace_bytes
    assert torch.equal(decoded(inside, ids, 8), decoded(outside, ids, 8))


@simulated
def test_a_decoder_that_goes_takes_its_cache_along_at_once():
    model = load_tiny("qwen2", tiny_plan("qwen2", "int4"))
    gc.collect()
    gc.disable()
    try:
        decoder = LeanDecoder(model, compiled=False)
        decoder.prefill(random_ids(4))
        decoder.decode(torch.ones(1, 1, dtype=torch.long))
        assert model.lowvram.gpu.meter.category_bytes("kv") > 0
        del decoder
        assert model.lowvram.gpu.meter.category_bytes("kv") == 0
    finally:
        gc.enable()


@simulated
def test_a_replan_frees_the_weights_that_a_decoder_held():
    plan = tiny_plan("qwen2", "bf16")
    model = load_tiny("qwen2", plan)
    decoder = LeanDecoder(model, compiled=False)
    decoder.prefill(random_ids(4))
    replan(model, tiny_plan("qwen2", "int8"), progress=False)
    fresh = load_tiny("qwen2", tiny_plan("qwen2", "int8"))
    assert model.lowvram.gpu.meter.category_bytes("weights") == fresh.lowvram.gpu.meter.category_bytes("weights")
    with pytest.raises(LowvramError, match="planned anew meanwhile"):
        decoder.decode(torch.ones(1, 1, dtype=torch.long))


@simulated
def test_what_it_does_not_know_is_refused_by_name():
    with pytest.raises(LowvramError, match="gate_proj is in int3, which has no kernel; use the model itself"):
        LeanDecoder(load_tiny("qwen2", tiny_plan("qwen2").with_modules("*.gate_proj", format="int3")))
    plan = tiny_plan("qwen2")
    assert why_not(plan, "cpu") == why_not(plan, "cuda") == ""
    for change, reason in (
        ({"model_type": "gpt2"}, "gpt2 is none of llama, mistral, qwen2, qwen3"),
        ({"hidden_act": "gelu"}, "its activation is gelu, not silu"),
        ({"rope_parameters": {"rope_type": "dynamic"}}, "its rotary positions (dynamic) depend on the length"),
        (
            {"sliding_window": 100, "layer_types": ["sliding_attention"] * 3},
            "its attention slides over 100 tokens",
        ),
    ):
        other = replace(plan.spec, config={**plan.spec.config, **change})
        assert why_not(replace(plan, spec=other), "cpu") == reason
    split = plan.with_gpu_layers(1)
    assert why_not(split, "cpu") == ""
    assert why_not(split, "cuda") == ""
    torn = plan.with_modules("model.layers.1.*", device="cpu")
    apart = "its layers on the card do not lie side by side, with the head behind them"
    assert (why_not(torn, "cpu"), why_not(torn, "cuda")) == ("", apart)
    assert why_not(plan.with_modules("model.layers.2.*", device="cpu"), "cuda") == apart
    assert why_not(plan.with_modules("lm_head", device="cpu"), "cuda") == ""
    assert "int4, which without compiled kernels the modules read" in why_not(replace(plan, kv_format="int4"), "cpu")
    assert why_not(replace(split, stream_from=16), "cpu") == why_not(replace(split, stream_from=16), "cuda") == ""
