"""Architectures and sizes that are not forecast are refused by name, in one line; those that are, rightly."""

from dataclasses import replace

import pytest
import torch
import transformers

from lowvram_lab.engine.load import load
from lowvram_lab.errors import BudgetError, CheckpointError, LowvramError, PlanError, UnitError
from lowvram_lab.memory.budget import GpuBudget
from lowvram_lab.memory.gpu import StandInGpu
from lowvram_lab.model.plan import Plan
from lowvram_lab.model.spec import ModelSpec
from lowvram_lab.planner.forecast import forecast
from lowvram_lab.planner.measure import run_workload
from lowvram_lab.planner.profile import Workload
from lowvram_lab.planner.search import max_context
from lowvram_lab.planner.suggest import suggest
from tests.helpers.tiny import SIZES, DictCheckpoint, tiny_config, tiny_plan, tiny_spec

BIG = 10**12


def one_line(error) -> str:
    message = str(error.value)
    assert message
    assert "\n" not in message
    assert len(message) < 400
    return message


def experts(kind, **changes):
    return lambda: getattr(transformers, kind)(**{**SIZES, **changes})


UNSUPPORTED = {
    "mixtral": (experts("MixtralConfig", num_local_experts=4), "mixture of experts"),
    "qwen2_moe": (experts("Qwen2MoeConfig", num_experts=4), "mixture of experts"),
    "qwen3_next": (experts("Qwen3NextConfig", num_experts=0), "linear attention"),
    "mamba": (
        lambda: transformers.MambaConfig(hidden_size=64, num_hidden_layers=2, vocab_size=320),
        "linear attention",
    ),
    "t5": (lambda: transformers.T5Config(d_model=64, num_layers=2, vocab_size=320), "encoder-decoder"),
    "gemma3": (lambda: transformers.Gemma3Config(), "more than one tower"),
    "vit": (lambda: transformers.ViTConfig(num_hidden_layers=2), ""),
}


@pytest.mark.parametrize("kind", UNSUPPORTED)
def test_what_is_not_forecast_is_named(kind):
    config, why = UNSUPPORTED[kind]
    with pytest.raises(CheckpointError) as error:
        ModelSpec.from_config(config(), kind)
    assert kind in one_line(error)
    assert why in str(error.value)
    if why:
        assert str(error.value).endswith("whose layers keep keys and values (Llama, Qwen2, …)")


def test_a_config_no_model_can_be_built_from():
    config = tiny_config("llama", hidden_act="no such activation")
    with pytest.raises(CheckpointError, match="transformers cannot build a 'llama'.*no such activation") as error:
        ModelSpec.from_config(config, "broken")
    one_line(error)


def test_a_class_that_cannot_be_built_on_meta(monkeypatch):
    from transformers.models.llama import modeling_llama

    class Reader(modeling_llama.LlamaMLP):
        def __init__(self, config):
            super().__init__(config)
            self.scale = self.up_proj.weight.abs().max().item()  # reads a value: there is none on meta

    monkeypatch.setattr(modeling_llama, "LlamaMLP", Reader)
    with pytest.raises(CheckpointError, match="cannot build a 'llama'.*meta") as error:
        ModelSpec.from_config(tiny_config("llama", vocab_size=352), "reader")
    one_line(error)


def windowed(kind, window, **changes):
    config = getattr(transformers, kind)(**{**SIZES, "sliding_window": window, **changes})
    return ModelSpec.from_config(config, kind)


SLIDING = {
    "mistral": ("MistralConfig", {}),
    "qwen2": ("Qwen2Config", {"use_sliding_window": True, "max_window_layers": 0}),
    "qwen2, later layers only": ("Qwen2Config", {"use_sliding_window": True, "max_window_layers": 2}),
}


@pytest.mark.parametrize("name", SLIDING)
def test_beyond_its_window_a_model_is_refused(name):
    kind, changes = SLIDING[name]
    spec = windowed(kind, 200, **changes)
    assert spec.sliding_window == 200
    with pytest.raises(PlanError, match=f"{kind} has sliding-window attention of 200 tokens") as error:
        Plan.uniform(spec, "bf16", context=201)
    assert "200 or less, found 201" in one_line(error)
    plan = Plan.uniform(spec, "bf16", context=200)
    with pytest.raises(PlanError):
        forecast(replace(plan, context=300))


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA's own counters differ by what kernels hide")
@pytest.mark.parametrize("recipe", ["bf16", "int8"])
@pytest.mark.parametrize("name", SLIDING)
def test_within_its_window_the_forecast_is_exact(name, recipe):
    kind, changes = SLIDING[name]
    spec, generator = windowed(kind, 200, **changes), torch.Generator().manual_seed(0)
    state = {
        f"{module.name}.{key}": torch.randn(shape, generator=generator) * 0.05
        for module in spec.modules
        for key, shape in module.parameters.items()
    }
    plan = Plan.uniform(spec, recipe, context=200)
    for placed in (plan, plan.with_gpu_layers(1)):
        gpu = StandInGpu(GpuBudget(10**9))
        model = load(placed, gpu, checkpoint=DictCheckpoint(state), progress=False)
        for workload in (Workload.full_context(200), Workload(50, 2, follow_up_tokens=20, batch_size=2)):
            table = forecast(placed, gpu, workload=workload).compare(run_workload(model, workload))
            assert (table["difference"] == 0).all(), table


LONGROPE = {
    "original_max_position_embeddings": 64,
    "rope_scaling": {"rope_type": "longrope", "short_factor": [1.1] * 16, "long_factor": [1.7] * 16},
}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
OTHERS = [
    ("qwen3", "int8", True, {}),
    ("phi3", "int8", True, {}),
    ("gemma3_text", "bf16", False, {"head_dim": 32}),
    ("gemma3_text", "int8", False, {"head_dim": 32}),  # a tied, scaled embedding
    ("falcon", "bf16", False, {}),  # multi-query, without the fused kernel
    ("opt", "int8", False, {"ffn_dim": 192, "word_embed_proj_dim": 128}),
    ("opt", "int8", True, {"ffn_dim": 192, "word_embed_proj_dim": 128}),  # learned positions beside a split
    ("gpt2", "int8", True, {}),
    ("gpt_bigcode", "int8", True, {}),
    ("phi3", "bf16", True, LONGROPE),  # rotary tables that depend on the length
    ("llama", "int8", False, {"rope_parameters": DYNAMIC, "max_position_embeddings": 128}),  # all that it may see
    ("qwen2", "bf16", True, {"rope_parameters": DYNAMIC}),
    (
        "gemma3_text",  # asks its positions once for each kind of layer
        "bf16",
        False,
        {"head_dim": 32, "rope_parameters": {"full_attention": DYNAMIC, "sliding_attention": DYNAMIC}},
    ),
]


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA's own counters differ by what kernels hide")
@pytest.mark.parametrize(("kind", "recipe", "split", "changes"), OTHERS)
def test_other_architectures_are_forecast_to_the_byte(kind, recipe, split, changes):
    sizes = dict(SIZES)
    if kind in ("falcon", "opt", "gpt2", "gpt_bigcode"):  # these have as many key/value heads as heads, or one
        del sizes["num_key_value_heads"]
    config = transformers.AutoConfig.for_model(kind, **{**sizes, **changes})
    spec, generator = ModelSpec.from_config(config, kind), torch.Generator().manual_seed(0)
    state = {
        f"{module.name}.{key}": torch.randn(shape, generator=generator) * 0.05
        for module in spec.modules
        for key, shape in module.parameters.items()
    }
    plan = Plan.uniform(spec, recipe, context=128)
    plan = plan.with_gpu_layers(1) if split else plan
    gpu = StandInGpu(GpuBudget(10**9))
    dry = forecast(plan, gpu, workload=Workload(100, 2))
    model = load(plan, gpu, checkpoint=DictCheckpoint(state), progress=False)
    table = dry.compare(run_workload(model, Workload(100, 2)))
    assert (table["difference"] == 0).all(), table


def test_a_window_that_is_not_in_use_is_none():
    spec = windowed("Qwen2Config", 200, use_sliding_window=False)
    assert spec.sliding_window is None
    assert Plan.uniform(spec, "bf16", context=1000).context == 1000


@pytest.mark.parametrize("name", ["prompt_tokens", "new_tokens", "follow_up_tokens", "batch_size"])
@pytest.mark.parametrize("value", [-1, -BIG, 1.5, "7", None, True, float("nan")])
def test_sizes_that_are_none(name, value):
    with pytest.raises(PlanError, match=f"expected {name} of [01] or more, found") as error:
        Workload(**{"prompt_tokens": 5, name: value})
    one_line(error)


@pytest.mark.parametrize("sizes", [{"batch_size": 0}, {"prompt_tokens": 0}])
def test_sizes_of_nothing(sizes):
    with pytest.raises(PlanError) as error:
        Workload(**{"prompt_tokens": 5, **sizes})
    one_line(error)


@pytest.mark.parametrize("context", [BIG, 10**30, 2**63, 1025, 1, 0, -1, 2.5, True, None, "512"])
def test_contexts_that_are_none(context):
    with pytest.raises(PlanError) as error:
        Plan.uniform(tiny_spec("llama"), "int8", context=context)
    assert "context" in one_line(error)


@pytest.mark.parametrize("workload", [{"prompt_tokens": BIG}, {"prompt_tokens": 10**30}, {"new_tokens": 2**70}])
def test_a_workload_beyond_the_context(workload):
    with pytest.raises(PlanError, match="the plan a context of 512") as error:
        forecast(tiny_plan("llama"), workload=Workload(**{"prompt_tokens": 5, **workload}))
    one_line(error)


@pytest.mark.parametrize("size", [10**5, 10**9, BIG, 10**18, 10**30])
def test_an_absurd_batch_does_not_fit_or_is_refused(size):
    try:
        workload = Workload(400, 1, batch_size=size)
        found = forecast(tiny_plan("llama"), "4GiB", workload=workload)
    except LowvramError as error:
        assert "\n" not in str(error)
    else:
        assert not found.fits
        assert found.peak_allocated_bytes > 400 * size


@pytest.mark.parametrize("budget", [10**30, 2**80, "1000000000TiB"])
def test_an_absurd_budget_fits_everything(budget):
    plan = tiny_plan("llama", context=64)
    assert forecast(plan, budget).fits
    assert suggest(plan, budget) == []
    assert max_context(plan, budget).limited_by == "model"


@pytest.mark.parametrize("budget", [0, -1, -BIG, "0GiB", "-4GiB", "", "GiB", 1.5, True, "nanGiB", "1e9GiB", 1024])
def test_budgets_that_are_none(budget):
    plan = tiny_plan("llama")
    for ask in (forecast, max_context, suggest):
        with pytest.raises((UnitError, BudgetError)) as error:
            ask(plan, budget)
        one_line(error)


@pytest.mark.parametrize("field", ["dtype", "kv_format"])
def test_formats_that_are_none(field):
    for value in ("int3", "", None, 16, "fp64"):
        with pytest.raises(PlanError) as error:
            forecast(replace(tiny_plan("llama"), **{field: value}))
        one_line(error)
