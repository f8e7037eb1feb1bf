"""A loaded model's own modules with our kernels in them, beside stock transformers."""

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, StaticCache

from lowvram_lab.engine import prompt_kernels
from lowvram_lab.engine.load import replan
from lowvram_lab.engine.prompt_kernels import NAME, use_our_kernels
from lowvram_lab.kernels.library import multiplies_pairs
from tests.helpers.tiny import SIZES, TINY, load_tiny, random_ids, relative_error, tiny_plan

pytestmark = [
    pytest.mark.usefixtures("compiling"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="about the CPU"),
]


class Operators(TorchDispatchMode):
    """Which operators ran."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))

    def ours(self):
        return {name for name in self.names if name.startswith("lowvram")}


def stock_logits(config, model, ids):
    stock = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    stock.load_state_dict(model.state_dict())
    assert stock.config._attn_implementation == "sdpa"
    with torch.no_grad():
        return stock(ids).logits


@pytest.mark.parametrize(("kind", "batch_size"), list(itertools.product(TINY, (1, 2))))
def test_a_model_reads_its_prompt_with_them(kind, batch_size):
    plan = tiny_plan(kind, "bf16", context=64)
    model, ids = load_tiny(kind, plan), random_ids(40, batch_size)
    with torch.no_grad(), Operators() as ran:
        found = model(ids).logits
    assert model.config._attn_implementation == NAME
    if multiplies_pairs():
        assert ran.names.count("lowvram.attention.default") == plan.spec.num_hidden_layers
    wanted = {f"lowvram.{name}.default" for name in ("rms_norm", "rotated", "gated")}
    assert ran.ours() == wanted | ({"lowvram.attention.default"} if multiplies_pairs() else set())
    assert relative_error(found, stock_logits(plan.spec.pretrained_config(), model, ids)) < 2e-2


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_every_family_of_them(kind):
    config = AutoConfig.for_model(kind, **SIZES, sliding_window=9, head_dim=32)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    ids = random_ids(40, 2)
    with torch.no_grad():
        expected = model(ids).logits
        use_our_kernels(model)
        with Operators() as ran:
            found = model(ids).logits
    assert len([name for name in ran.names if name.startswith("lowvram.rms_norm")]) == 7 + 6 * (kind == "qwen3")
    assert relative_error(found, expected) < 2e-2


def test_a_layer_takes_few_operators():
    """Each passes a meter: what a prompt costs beside its products."""
    counts = []
    for layers in (1, 2):
        config = AutoConfig.for_model("llama", **(SIZES | {"num_hidden_layers": layers}))
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
        use_our_kernels(model)
        with torch.no_grad(), Operators() as ran:
            model(random_ids(40, 1), use_cache=False)
        counts.append(len(ran.names))
    assert counts[1] - counts[0] <= 60


def test_other_dtypes_and_models_are_as_they_were():
    for kind, dtype in (("llama", torch.float32), ("llama", torch.float16), ("gpt_neox", torch.bfloat16)):
        config = AutoConfig.for_model(kind, **SIZES)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        ids = random_ids(7, 1)  # too few for our attention
        with torch.no_grad():
            expected = model(ids).logits
            use_our_kernels(model)
            with Operators() as ran:
                found = model(ids).logits
        assert not ran.ours()
        assert torch.equal(found, expected)


def test_a_cache_with_empty_places_and_gradients_are_as_in_stock():
    config = AutoConfig.for_model("llama", **SIZES)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    ids = random_ids(12, 1)
    with torch.no_grad():
        expected = model(ids, past_key_values=StaticCache(config=config, max_cache_len=64)).logits
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    wanted = torch.autograd.grad(model(inputs_embeds=embedded).logits.float().sum(), embedded)[0]
    use_our_kernels(model)
    with torch.no_grad(), Operators() as ran:
        found = model(ids, past_key_values=StaticCache(config=config, max_cache_len=64)).logits
    assert ran.ours()
    assert relative_error(found, expected) < 2e-2
    assert torch.equal(torch.autograd.grad(model(inputs_embeds=embedded).logits.float().sum(), embedded)[0], wanted)


def test_a_module_that_is_loaded_anew_has_them():
    plan = tiny_plan("llama", "bf16", context=64)
    model, ids = load_tiny("llama", plan), random_ids(7, 1)
    replan(model, plan.with_gpu_layers(1))
    with torch.no_grad(), Operators() as ran:
        model(ids)
    assert ran.names.count("lowvram.rms_norm.default") == 2 * plan.spec.num_hidden_layers + 1


def test_without_a_compiler_a_model_is_stock(monkeypatch):
    monkeypatch.setattr(prompt_kernels, "there", lambda: False)
    plan = tiny_plan("llama", "bf16", context=64)
    model, ids = load_tiny("llama", plan), random_ids(40, 1)
    with torch.no_grad(), Operators() as ran:
        found = model(ids).logits
    assert not ran.ours()
    assert torch.equal(found, stock_logits(plan.spec.pretrained_config(), model, ids))
