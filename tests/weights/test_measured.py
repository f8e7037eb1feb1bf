"""KL measured by really quantising one module, against whole stock models of transformers with that module replaced."""

import pytest
import torch

from lowvram_lab.errors import LowvramError, PlanError
from lowvram_lab.model.formats import get_format
from lowvram_lab.weights.measured import measure_sensitivity
from lowvram_lab.weights.moments import InputMoments, captured_inputs
from lowvram_lab.weights.sensitivity import estimate_sensitivity
from lowvram_lab.weights.solve import solve
from tests.helpers.tiny import TINY, DictCheckpoint, random_ids, tiny_spec, tiny_state, tiny_stock

IDS = random_ids(64, batch=6)
FIT, HELD_OUT = IDS[::2], IDS[1::2]
EMBED = "model.embed_tokens"
PAIRS = {
    "llama": [(EMBED, "int3"), ("model.layers.0.self_attn.q_proj", "int4"), ("model.layers.2.mlp.down_proj", "int2")],
    "qwen2": [(EMBED, "int4"), ("lm_head", "int3"), ("model.layers.1.mlp.up_proj", "int8")],
}


@pytest.fixture(scope="module")
def estimates():
    return {
        kind: estimate_sensitivity(tiny_spec(kind), DictCheckpoint(tiny_state(kind)), IDS, progress=False)
        for kind in TINY
    }


def moments_in_stock(kind, name):
    model, moments = tiny_stock(kind), InputMoments()
    with captured_inputs({name: model.get_submodule(name)}) as seen:
        for window in FIT:
            model(window[None])
            moments.add(seen)
    return moments[name]


@torch.no_grad()
@pytest.mark.parametrize("kind", TINY)
def test_it_is_the_divergence_of_two_whole_models(kind, estimates):
    spec, state = tiny_spec(kind), tiny_state(kind)
    found = measure_sensitivity(
        spec, DictCheckpoint(state), estimates[kind], IDS, pairs=[*PAIRS[kind], PAIRS[kind][0]], progress=False
    )
    assert found.tokens == HELD_OUT.numel()
    assert [*zip(found.table["module"], found.table["format"], strict=True)] == PAIRS[kind]  # each once
    expected = tiny_stock(kind)(HELD_OUT).logits.double().log_softmax(-1)
    for row in found.table.itertuples():
        moments = None
        if row.module != EMBED:
            moments = moments_in_stock(kind, row.module)
        elif spec.tied:
            moments = moments_in_stock(kind, spec.head)
            moments = moments + estimates[kind].lookup * torch.eye(len(moments))
        weight = state[f"{row.module}.weight"]
        solution, *_ = solve(weight.__getitem__, len(weight), get_format(row.format), moments, "gptq", row.module)
        model = tiny_stock(kind)
        model.get_submodule(row.module).weight.copy_(solution.dequantize())
        changed = model(HELD_OUT).logits.double().log_softmax(-1)
        kl = float((expected.exp() * (expected - changed)).sum(-1).mean())
        assert row.measured == pytest.approx(kl, rel=1e-2, abs=1e-7)
        assert row.estimated == estimates[kind].costs[row.module][row.format]
        assert row.output_change == estimates[kind].activation_costs[row.module][row.format]


def test_a_sample_is_the_same_each_time_and_ranked_as_estimated(estimates):
    spec, checkpoint = tiny_spec("qwen2"), DictCheckpoint(tiny_state("qwen2"))
    once, again = (
        measure_sensitivity(spec, checkpoint, estimates["qwen2"], IDS, count=16, progress=False) for _ in range(2)
    )
    assert len(once.table) == 16
    assert once.table.equals(again.table)
    assert once.rank_correlations()["estimated"] > 0.9
    assert "16 pairs over 192 tokens" in once.summary()
    assert once.table["module"][0] in once._repr_html_()


def test_what_cannot_be_measured(estimates):
    spec, checkpoint = tiny_spec("llama"), DictCheckpoint(tiny_state("llama"))
    with pytest.raises(LowvramError, match="two windows of tokens or more, to fit and to measure on, found 1"):
        measure_sensitivity(spec, checkpoint, estimates["llama"], IDS[:1], progress=False)
    with pytest.raises(PlanError, match="expected pairs of the estimate, found lm_head in int4"):
        measure_sensitivity(spec, checkpoint, estimates["llama"], IDS, pairs=[("lm_head", "int4")], progress=False)
