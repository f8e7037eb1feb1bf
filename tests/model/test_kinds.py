"""What a module computes decides what it is, not its class's name."""

import pytest
import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from lowvram_lab.engine.load import load
from lowvram_lab.memory.cuda import open_gpu
from lowvram_lab.model.kinds import EMBEDDING, LINEAR, OTHER, Kind, kind_of
from lowvram_lab.model.plan import Plan
from lowvram_lab.model.spec import ModelSpec
from lowvram_lab.weights.layerwise import LayerByLayer
from tests.helpers.tiny import SIZES, TOLERANCES, DictCheckpoint, random_ids, random_state, relative_error


class Renamed(nn.Linear):
    def forward(self, x):
        return x @ self.weight.T + (0 if self.bias is None else self.bias)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Router(nn.Linear):
    def forward(self, x):
        return super().forward(x).softmax(-1)


class Refuser(nn.Linear):
    def forward(self, x, mask):
        return super().forward(x)


class Extra(nn.Linear):
    def __init__(self):
        super().__init__(4, 6)
        self.gain = nn.Parameter(torch.ones(1))


class Scaled(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids) * 11.5


class Shifted(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids - 1)


class Normed(nn.Embedding):
    def forward(self, ids):
        return nn.functional.normalize(super().forward(ids), dim=-1)


@pytest.mark.parametrize(
    ("module", "kind"),
    [
        (nn.Linear(4, 6), LINEAR),
        (Renamed(4, 6), LINEAR),
        (Renamed(4, 6, bias=False), LINEAR),
        (Conv1D(6, 4), Kind("linear", transposed=True)),
        (Doubled(4, 6), OTHER),
        (Router(4, 6), OTHER),
        (Refuser(4, 6), OTHER),
        (Extra(), OTHER),
        (nn.Conv1d(4, 6, 3), OTHER),
        (nn.LayerNorm(4), OTHER),
        (nn.Embedding(9, 4), EMBEDDING),
        (nn.Embedding(9, 4, padding_idx=8), EMBEDDING),
        (Scaled(9, 4, padding_idx=8), Kind("embedding", scale=11.5)),
        (Shifted(9, 4), OTHER),
        (Normed(9, 4), OTHER),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_a_kind_is_found_by_computing(module, kind):
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    assert kind_of(module) == kind
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
    assert kind_of(module.to("meta")) == kind


def config_of(kind, **changes):
    sizes = {**SIZES, "head_dim": 32} if "gemma" in kind else dict(SIZES)
    if kind in ("gpt2", "falcon", "gpt_bigcode", "opt"):
        del sizes["num_key_value_heads"]
    return transformers.AutoConfig.for_model(kind, **{**sizes, **changes})


KINDS = {
    "gpt2": ("transformer.h.0.mlp.c_fc", "linear", (512, 128)),
    "falcon": ("transformer.h.0.self_attention.query_key_value", "linear", (192, 128)),
    "gemma": ("model.embed_tokens", "embedding", (320, 128)),
    "opt": ("model.decoder.embed_positions", "other", (1026, 128)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_real_classes(kind):
    name, expected, shape = KINDS[kind]
    module = ModelSpec.from_config(config_of(kind), kind).module(name)
    assert (module.kind, module.weight_shape) == (expected, shape)


@pytest.mark.parametrize("recipe", ["int8", "int4"])
@pytest.mark.parametrize("kind", ["gpt2", "falcon", "gemma"])
def test_quantised_they_compute_what_stock_does(kind, recipe):
    spec = ModelSpec.from_config(config_of(kind), kind)
    state = random_state(spec)
    stock = transformers.AutoModelForCausalLM.from_config(spec.pretrained_config())
    stock.load_state_dict(state, strict=False)
    stock.tie_weights()
    plan = Plan.uniform(spec, recipe, context=64)
    assert {plan.modules[m.name].format for m in spec.modules if m.kind == "linear" and m.layer is not None} == {recipe}
    model = load(plan, open_gpu(None), checkpoint=DictCheckpoint(state), progress=False)
    ids = random_ids(20)
    with torch.no_grad():
        assert relative_error(model(ids).logits, stock.eval()(ids).logits) < TOLERANCES[recipe]


def test_what_was_asked_for_and_cannot_be_given_is_said():
    spec = ModelSpec.from_config(config_of("gpt2", hidden_size=132), "gpt2")  # no multiple of a group of 64
    plan = Plan.uniform(spec, "int4", context=64)
    lacking = plan.not_given()
    assert {m.name.split(".", 3)[3] for m in lacking} == {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}
    assert "of the layers (transformer.h.*.attn.c_attn, …) are in int8, not in the int4 asked for" in plan.summary()
    assert "divisible by 64, found 132" in plan.summary()
    assert plan == Plan.from_json(plan.to_json(), spec)
    assert plan.with_modules("*c_fc", format="bf16").not_given() == ()
    assert Plan.uniform(spec, "bf16", context=64).not_given() == ()
    assert (
        "asked for"
        not in Plan.uniform(ModelSpec.from_config(config_of("llama"), "llama"), "int4", context=64).summary()
    )


def test_a_scaled_embedding_is_scaled_layer_by_layer_too():
    spec = ModelSpec.from_config(config_of("gemma"), "gemma")
    state = random_state(spec)
    stock = transformers.AutoModelForCausalLM.from_config(spec.pretrained_config())
    stock.load_state_dict(state, strict=False)
    stock.tie_weights()
    stream, ids = LayerByLayer(spec, DictCheckpoint(state)), random_ids(20)
    hidden = stream.embed(ids)
    with torch.no_grad():
        for index in range(len(stream)):
            with stream.layer(index) as layer:
                stream.run_in_place(layer, hidden)
        logits = stream.norm(hidden) @ stream.weight(spec.head).T
        assert relative_error(logits, stock.eval()(ids).logits) < TOLERANCES["fp32"]
