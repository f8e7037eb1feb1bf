"""Distances against stock transformers' logits, of fewer tokens, layers and bits; the referee's word."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from lowvram_lab.conversion.convert import convert
from lowvram_lab.errors import LowvramError
from lowvram_lab.model.formats import get_format
from lowvram_lab.model.plan import Plan
from lowvram_lab.model.source import find_source
from lowvram_lab.slimming import referee as module
from lowvram_lab.slimming.referee import Rival, Verdict, rival_of
from lowvram_lab.slimming.yardstick import Distance, Yardstick, nats_a_byte, renumbered
from lowvram_lab.weights.layerwise import LayerByLayer
from lowvram_lab.weights.restored import RestoredLayers
from lowvram_lab.weights.solvers import round_to_nearest
from tests.helpers.checkpoints import restored_state, write_model
from tests.helpers.tiny import (
    TINY,
    DictCheckpoint,
    random_ids,
    tiny_spec,
    tiny_state,
    tiny_stock,
)

IDS = random_ids(48, batch=6, seed=5)


def stream_of(kind, state=None):
    return LayerByLayer(tiny_spec(kind), DictCheckpoint(state or tiny_state(kind)))


@torch.no_grad()
def predicted(kind, ids, state=None):
    return torch.log_softmax(tiny_stock(kind, state)(ids, use_cache=False).logits, -1)


def by_window(found, expected):
    return F.kl_div(found, expected, reduction="none", log_target=True).sum(-1).mean(-1).tolist()


@pytest.mark.parametrize("kind", TINY)
def test_fewer_bits_are_as_far_as_stock_transformers_says(kind):
    spec = tiny_spec(kind)
    plan = Plan.uniform(spec, "int8", context=64)
    found = Yardstick(stream_of(kind), IDS).distance(RestoredLayers(spec, DictCheckpoint(tiny_state(kind)), plan))
    state = {}
    for name, tensor in tiny_state(kind).items():
        module_name = name.removesuffix(".weight")
        rounded = module_name in plan.modules and name.endswith(".weight") and tensor.dim() == 2
        state[name] = round_to_nearest(tensor, get_format("int8")).dequantize() if rounded else tensor
    expected = by_window(predicted(kind, IDS, state), predicted(kind, IDS))
    assert found.by_window == pytest.approx(expected, rel=1e-3)
    assert found.tokens == IDS.numel() and found.kl == pytest.approx(sum(expected) / 6, rel=1e-3)
    assert found.interval[0] < found.kl < found.interval[1]


@pytest.mark.parametrize("kind", TINY)
@pytest.mark.parametrize("fmt", ["int8", "int4", "int3-g32"])
def test_a_converted_directory_is_read_as_its_codes_say(tmp_path, kind, fmt):
    source = write_model(tmp_path / "source", kind)
    plan = Plan.uniform(find_source(str(source)).spec(), fmt, context=64)
    convert(str(source), tmp_path / "made", plan, calibration_tokens=2048, solver="rtn", progress=False)
    made = find_source(str(tmp_path / "made"))
    stream = RestoredLayers(made.spec(), made.checkpoint(False))
    restored = restored_state(tmp_path / "made")
    for name in restored:
        assert torch.equal(stream.read(name), restored[name])
    whole = find_source(str(source))
    found = Yardstick(LayerByLayer(whole.spec(), whole.checkpoint(False)), IDS).distance(stream)
    state = {name: tensor.float() for name, tensor in tiny_state(kind).items()}
    state = {name: tensor.to(torch.bfloat16).float() for name, tensor in state.items()}
    expected = by_window(predicted(kind, IDS, restored), predicted(kind, IDS, state))
    assert found.by_window == pytest.approx(expected, rel=1e-3)


@torch.no_grad()
def test_fewer_tokens_cost_what_those_that_went_were_likely():
    kept = sorted({*IDS.flatten().tolist(), *range(0, 320, 3)})
    left = predicted("llama", IDS)[..., kept]
    share = left.logsumexp(-1)
    found = Yardstick(stream_of("llama"), IDS).distance(kept=kept)
    assert found.by_window == pytest.approx((-share).mean(-1).tolist(), rel=1e-4)
    # and a model with these rows alone, whose weights are others
    state = tiny_state("qwen2")
    other = {name: tensor + 0.01 for name, tensor in state.items()}
    rows = {name: other[name][kept] for name in ("model.embed_tokens.weight", "lm_head.weight")}
    yardstick = Yardstick(stream_of("qwen2"), IDS)
    small = LayerByLayer(small_spec(len(kept)), DictCheckpoint({**other, **rows}))
    left, found = predicted("qwen2", IDS)[..., kept], yardstick.distance(small, kept)
    shared_out = left - left.logsumexp(-1, keepdim=True)
    theirs = tiny_stock("qwen2", other)(IDS, use_cache=False).logits[..., kept].log_softmax(-1)
    expected = torch.tensor(by_window(theirs, shared_out)) - left.logsumexp(-1).mean(-1)
    assert found.by_window == pytest.approx(expected.tolist(), rel=1e-3)


def small_spec(tokens):
    from lowvram_lab.model.spec import ModelSpec
    from tests.helpers.tiny import tiny_config

    return ModelSpec.from_config(tiny_config("qwen2", vocab_size=tokens), "small")


def test_fewer_layers_are_run_alone():
    found = Yardstick(stream_of("llama"), IDS).distance(stream_of("llama"), layers=[0, 2])
    model = tiny_stock("llama")
    model.model.layers = torch.nn.ModuleList([model.model.layers[0], model.model.layers[2]])
    with torch.no_grad():
        theirs = torch.log_softmax(model(IDS, use_cache=False).logits, -1)
    assert found.by_window == pytest.approx(by_window(theirs, predicted("llama", IDS)), rel=1e-3)


def test_a_text_with_tokens_that_went_is_refused():
    with pytest.raises(LowvramError, match="found 2 of 3 that did not"):
        renumbered(torch.tensor([[4, 5, 9]]), [0, 4])
    assert renumbered(torch.tensor([[4, 0]]), [0, 4]).tolist() == [[1, 0]]


def test_nats_a_byte_is_the_loss_of_stock_transformers():
    ids, text = random_ids(300, seed=3)[0], "x" * 77
    found = nats_a_byte(stream_of("llama"), ids, [7], text, False)
    windows = ids[: 300 // 127 * 127].view(-1, 127)
    windows = torch.cat([torch.full((len(windows), 1), 7), windows], dim=1)
    loss = F.nll_loss(predicted("llama", windows)[:, :-1].flatten(0, 1), windows[:, 1:].flatten())
    assert found == pytest.approx(loss.item() * 300 / 77, rel=1e-4)


def test_closer_is_more_than_what_the_windows_make_of_it():
    near, far = Distance((0.1, 0.2, 0.3, 0.4), 8), Distance((0.2, 0.3, 0.4, 0.5), 8)
    assert near.closer_than(far) and not far.closer_than(near) and not near.closer_than(near)
    mixed = Distance((0.5, 0.1, 0.5, 0.1), 8)
    assert not near.closer_than(mixed) and not mixed.closer_than(near)
    with pytest.raises(LowvramError, match="expected two distances on one text, found 8 tokens and 9"):
        near.closer_than(Distance((0.1, 0.2, 0.3, 0.4), 9))
    assert Verdict(1, near, None).winner == "slimming"
    assert Verdict(1, near, Rival("int8 everywhere", 1, far)).winner == "slimming"
    assert Verdict(1, far, Rival("int8 everywhere", 1, near)).winner == "quantising"
    assert "neither wins" in Verdict(1, near, Rival("int8 everywhere", 1, mixed)).summary()


def test_a_rival_keeps_to_the_bytes(tmp_path, monkeypatch):
    monkeypatch.setenv("LOWVRAM_CACHE", str(tmp_path / "cache"))
    source = find_source(str(write_model(tmp_path / "source", "llama")))
    whole = LayerByLayer(source.spec(), source.checkpoint(False))
    yardstick, plan = Yardstick(whole, IDS), module.uniform_plan(whole.spec)
    eight = rival_of(source, whole, plan.weight_bytes(), yardstick, progress=False)
    assert eight.way == "int8 everywhere" and eight.weight_bytes == plan.weight_bytes()
    fewer = rival_of(source, whole, plan.weight_bytes() * 3 // 4, yardstick, progress=False)
    assert fewer.way == "a recipe" and fewer.weight_bytes <= plan.weight_bytes() * 3 // 4
    assert eight.distance.closer_than(fewer.distance)
    assert rival_of(source, whole, 1000, yardstick, progress=False) is None
    assert "nothing that is quantised alone fits" in Verdict(1000, eight.distance, None).summary()
