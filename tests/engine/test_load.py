"""A loaded plan against stock transformers with the same weights; what is refused; what is undone."""

import gc
from dataclasses import replace

import pytest
import torch

from lowvram_lab.decoding.decode import ModuleDecoder, generate, prefill
from lowvram_lab.decoding.lean import decoder_for
from lowvram_lab.engine.kv_cache import PreallocatedCache
from lowvram_lab.engine.load import load, replan
from lowvram_lab.errors import CheckpointError, PlanError
from lowvram_lab.memory.cuda import open_gpu
from lowvram_lab.model.formats import DTYPES
from lowvram_lab.model.plan import Plan
from lowvram_lab.model.source import find_source
from lowvram_lab.units import MiB
from lowvram_lab.weights.layerwise import LayerByLayer
from tests.helpers.checkpoints import write_model
from tests.helpers.tiny import (
    PLACEMENTS,
    TINY,
    TOLERANCES,
    dequantised_state,
    load_tiny,
    random_ids,
    relative_error,
    stock_logits,
    tiny_plan,
    tiny_spec,
    tiny_state,
    tiny_stock,
)

UP = "model.layers.1.mlp.up_proj.weight"
RECIPES = list(TOLERANCES)
stand_in_only = pytest.mark.skipif(torch.cuda.is_available(), reason="about the simulated GPU")


@torch.no_grad()
def logits(model, ids, **kwargs):
    return model(ids, **kwargs).logits.cpu()


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("kind", TINY)
def test_logits_are_those_of_stock_transformers(kind, recipe, placement):
    plan, ids = tiny_plan(kind, recipe, placement), random_ids(70)
    found = logits(load_tiny(kind, plan), ids)
    assert found.dtype == DTYPES[plan.dtype]
    assert relative_error(found, stock_logits(kind, 70)) < TOLERANCES[recipe]
    # the strong one: stock transformers, in the plan's dtype, with the very weights that the formats leave
    same_weights = tiny_stock(kind, dequantised_state(kind, plan), DTYPES[plan.dtype])
    expected = logits(same_weights, ids)
    if recipe == plan.dtype:
        assert torch.equal(found, expected)
    else:
        assert relative_error(found, expected) < TOLERANCES["bf16"] < TOLERANCES[recipe]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("kind", TINY)
def test_quantised_weights_with_float32_activations(kind, recipe):
    """70 tokens of int8 run through the dequantised tile, nf4 through a dequantised weight: no bf16 anywhere."""
    plan, ids = tiny_plan(kind, recipe, dtype="fp32"), random_ids(70)
    if recipe == "bf16":
        plan = tiny_plan(kind, "fp32")
    expected = logits(tiny_stock(kind, dequantised_state(kind, plan)), ids)
    tolerance = TOLERANCES["bf16" if recipe.startswith("int4") else "fp32"]  # torch's int4 kernel casts to bf16
    assert relative_error(logits(load_tiny(kind, plan), ids), expected) < tolerance


@stand_in_only
@pytest.mark.parametrize("recipe", ["bf16", "int8", "int4", "int4+4"])
@pytest.mark.parametrize("kind", TINY)
def test_the_placement_changes_no_bit(kind, recipe):
    ids = random_ids(20)
    found = [logits(load_tiny(kind, tiny_plan(kind, recipe, placement)), ids) for placement in PLACEMENTS]
    assert all(torch.equal(other, found[0]) for other in found[1:])


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("kind", TINY)
def test_both_ways_to_generate_agree_with_stock(kind, placement):
    model, ids = load_tiny(kind, tiny_plan(kind, "fp32", placement)), random_ids(12)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = tiny_stock(kind).generate(ids, **options)[0, 12:].tolist()
    assert model.generate(ids, **options)[0, 12:].tolist() == expected
    for decoder in (decoder_for(model), ModuleDecoder(model)):
        assert list(generate(decoder, ids, max_new_tokens=12)) == expected
        assert decoder.cache.get_seq_length() == 12 + 11
    assert len(set(expected)) > 2  # not one token over and over


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_past_key_values_are_reused(placement):
    model, ids = load_tiny("qwen2", tiny_plan("qwen2", "fp32", placement)), random_ids(30)
    cache = PreallocatedCache(model)
    with torch.no_grad():
        steps = [prefill(model, part, cache) for part in ids.split([17, 1, 12], dim=1)]
    whole = logits(model, ids)
    for found, position in zip(steps, (16, 17, 29), strict=True):
        assert relative_error(found, whole[:, position]) < TOLERANCES["fp32"]
    cache.keep(17)
    with torch.no_grad():
        again = prefill(model, ids[:, 17:18], cache)
    assert relative_error(again, steps[1]) < TOLERANCES["fp32"]
    assert cache.get_seq_length() == 18


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("placement", ["gpu", "cpu"])
def test_the_last_token_of_a_prompt_does_not_make_torch_copy_the_head(placement, batch):
    """A strided ``(batch, 1, hidden)`` becomes a batched product, for which torch copies the whole weight first."""
    model = load_tiny("qwen2", tiny_plan("qwen2", "bf16", placement))
    with torch.profiler.profile() as profile, torch.no_grad(), model.lowvram.gpu.unmetered():
        prefill(model, random_ids(5, batch), PreallocatedCache(model, batch_size=batch))
    assert "aten::bmm" not in {event.name for event in profile.events()}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("kind", TINY)
def test_a_batch_of_two_with_padding(kind, placement, masked):
    ids = random_ids(9, batch=2)
    mask = {}
    if masked:
        mask["attention_mask"] = torch.ones_like(ids)
        mask["attention_mask"][0, :3] = 0
    found = logits(load_tiny(kind, tiny_plan(kind, "fp32", placement)), ids, **mask)
    expected = logits(tiny_stock(kind), ids, **mask)
    assert relative_error(found[:, 3:], expected[:, 3:]) < TOLERANCES["fp32"]


def test_the_loaded_model_says_what_it_is():
    plan = tiny_plan("qwen2", "int8", "half")
    model = load_tiny("qwen2", plan)
    places = model.hf_device_map
    assert [places[f"model.layers.{n}"] for n in range(3)][:2] == ["cpu", "cpu"]
    assert places["model.layers.2"] == places["lm_head"] != "cpu"
    assert set(places) == {"model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"} | {
        f"model.layers.{n}" for n in range(3)
    }
    assert model.lowvram.plan is plan
    assert not model.training
    assert not any(parameter.requires_grad or parameter.is_meta for parameter in model.parameters())
    assert "int8" in repr(model.model.layers[0].mlp)
    stored = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()] if tensor.dtype != torch.float32)
    assert stored == plan.weight_bytes()


@pytest.mark.parametrize("recipe", ["fp32", "int8"])
def test_a_tied_weight_is_stored_once(recipe):
    model = load_tiny("llama", tiny_plan("llama", recipe))
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


@stand_in_only
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_forward_leaves_nothing_behind(placement):
    model = load_tiny("llama", tiny_plan("llama", "int8", placement))
    gc.collect()
    before = dict(model.lowvram.gpu.meter.allocated)
    logits(model, random_ids(20))
    gc.collect()
    after = dict(model.lowvram.gpu.meter.allocated)
    assert after.get("gpu", 0) == before.get("gpu", 0)
    assert after.get("cpu", 0) == before.get("cpu", 0)


@stand_in_only
def test_detach_makes_a_stock_model_again():
    model, ids = load_tiny("qwen2", tiny_plan("qwen2", "fp32", "half")), random_ids(8)
    before, transfers = logits(model, ids), sum(model.lowvram.gpu.recording.transfers.values())
    assert "forward" in vars(model.model.layers[0])
    model.lowvram.placement.remove()
    assert not any("forward" in vars(module) for module in model.modules())
    assert torch.equal(logits(model, ids), before)
    assert sum(model.lowvram.gpu.recording.transfers.values()) == transfers  # nothing is moved or counted any more


def test_an_embedding_called_by_itself_hands_over_where_the_first_layer_computes():
    plan = tiny_plan("qwen2").with_modules("model.embed_tokens", device="cpu")
    model = load_tiny("qwen2", plan)
    with model.lowvram.gpu.active():
        hidden = model.get_input_embeddings()(random_ids(4))
    assert model.lowvram.gpu.meter.place_of(hidden) == "gpu"


def spoilt(change):
    state = tiny_state("qwen2")
    change(state)
    return state


def poison(state, name=UP):
    state[name] = state[name].clone()
    state[name].view(-1)[5] = float("nan")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: state.pop(UP), "found none"),
        (lambda state: state.update({UP: torch.zeros(192, 64)}), r"expected shape \(192, 128\), found \(192, 64\)"),
        (lambda state: state.update({UP: torch.zeros(192, 128, dtype=torch.int32)}), "found torch.int32"),
        (lambda state: state.update({UP: torch.zeros(192, 128, dtype=torch.float8_e4m3fn)}), "found torch.float8"),
    ],
)
@pytest.mark.parametrize("recipe", ["bf16", "int8"])
def test_a_bad_tensor_is_named(change, words, recipe):
    with pytest.raises(CheckpointError, match=words) as error:
        load_tiny("qwen2", tiny_plan("qwen2", recipe), state=spoilt(change))
    assert UP in str(error.value)


def test_a_tensor_of_another_shape_is_named_with_its_file_and_what_to_do(tmp_path):
    folder = write_model(tmp_path / "model", "qwen2", spoilt(lambda state: state.update({UP: torch.zeros(192, 64)})))
    source = find_source(folder)
    for call in (
        lambda: load(Plan.uniform(source.spec(), "int8", context=64), open_gpu("100MiB"), progress=False),
        lambda: LayerByLayer(source.spec(), source.checkpoint()).stored(UP),
    ):
        with pytest.raises(CheckpointError) as error:
            call()
        assert str(error.value) == (
            f"{folder / 'model.safetensors'}: tensor {UP}: expected shape (192, 128), found (192, 64); config.json and "
            "the weights are not of one model: take both from one repository"
        )


@pytest.mark.parametrize("name", [UP, "model.layers.1.self_attn.q_proj.bias"])
@pytest.mark.parametrize("recipe", ["bf16", "int8", "nf4"])
def test_nan_is_named(name, recipe):
    with pytest.raises(CheckpointError, match="NaN") as error:
        load_tiny("qwen2", tiny_plan("qwen2", recipe), state=spoilt(lambda state: poison(state, name)))
    assert name in str(error.value)


def test_a_model_is_not_planned_anew_as_another():
    model = load_tiny("qwen2")
    with pytest.raises(PlanError, match="this plan was made for 'tiny-llama'"):
        replan(model, tiny_plan("llama"), progress=False)
    assert model.lowvram.plan.model == "tiny-qwen2"


def test_planned_anew_by_a_plan_of_its_converted_sibling_it_keeps_its_own_weights():
    """The two have one fingerprint, and other weights are stored: what is loaded reads its own."""
    model, spec = load_tiny("qwen2"), tiny_spec("qwen2")
    formats = {name: a.format for name, a in tiny_plan("qwen2", "int4").modules.items() if a.format != "bf16"}
    sibling = Plan.uniform(replace(spec, stored=formats), "stored", context=512)
    assert sibling.spec.fingerprint == spec.fingerprint
    replan(model, sibling, progress=False)
    assert model.lowvram.plan.spec is spec
    expected = load_tiny("qwen2", tiny_plan("qwen2", "int4"))
    ids = random_ids(20)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected(ids).logits)


@stand_in_only
@pytest.mark.parametrize("recipe", ["fp32", "bf16"])
def test_out_of_memory_while_loading_leaves_nothing(recipe):
    gpu = open_gpu("3MiB")  # one segment of 2 MiB, of which another model leaves a quarter
    with gpu.active(), gpu.meter.scope(owner="another model", place="gpu"):
        kept = [torch.zeros(MiB // 8) for _ in range(3)]
    with pytest.raises(torch.OutOfMemoryError) as error:
        load_tiny("qwen2", tiny_plan("qwen2", recipe), gpu)
    message, event = str(error.value), error.value.lowvram.event
    assert f"for {event.module} during load" in message
    assert event.module in {m.name for m in tiny_spec("qwen2").modules}
    assert "another model (1.5 MiB)" in message
    assert "Held by: " in message
    assert "model.layers.0" in message or "model.embed_tokens" in message
    assert event.allocated_bytes > sum(tensor.nbytes for tensor in kept)
    del error, event
    gc.collect()
    assert gpu.meter.allocated["gpu"] == gpu.meter.allocator.allocated == sum(tensor.nbytes for tensor in kept)


def test_a_plans_threads_are_its_models_and_not_the_process():
    before, seen = torch.get_num_threads(), []
    for threads in (None, 2):
        model = load_tiny("qwen2", replace(tiny_plan("qwen2"), threads=threads))
        model.model.layers[1].register_forward_pre_hook(lambda *_: seen.append(torch.get_num_threads()))
        model(random_ids(4))
    assert seen == [before, 2]
    assert torch.get_num_threads() == before


def test_more_threads_than_the_machine_has_are_refused_before_loading():
    plan = replace(tiny_plan("qwen2"), threads=1000)
    with pytest.raises(PlanError, match=r"expected 1 to \d+ threads on this machine, found a plan with 1000"):
        load_tiny("qwen2", plan)
    model = load_tiny("qwen2")
    with pytest.raises(PlanError, match="found a plan with 1000"):
        replan(model, plan, progress=False)
    assert model.lowvram.plan == tiny_plan("qwen2")
