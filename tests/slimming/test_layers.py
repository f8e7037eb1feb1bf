"""Layers left out: proposals against plain models, the choice against all that was tried, the repair against lstsq."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from lowvram_lab.errors import LowvramError
from lowvram_lab.slimming.choice import choose_layers
from lowvram_lab.slimming.divergence import divergences
from lowvram_lab.slimming.heal import heal, state_bytes
from lowvram_lab.slimming.influence import layer_influence
from lowvram_lab.slimming.repair import RIDGES, repair
from lowvram_lab.weights.layerwise import LayerByLayer
from tests.helpers.tiny import TINY, DictCheckpoint, random_ids, tiny_spec, tiny_state, tiny_stock

IDS = random_ids(48, batch=6, seed=5)


def stream_of(kind, state=None):
    return LayerByLayer(tiny_spec(kind), DictCheckpoint(state or tiny_state(kind)))


@torch.no_grad()
def cut(kind, removed, state=None):
    """The stock model without some layers."""
    model = tiny_stock(kind, state)
    kept = [layer for index, layer in enumerate(model.model.layers) if index not in removed]
    model.model.layers = torch.nn.ModuleList(kept)
    for index, layer in enumerate(kept):
        layer.self_attn.layer_idx = index
    model.config.num_hidden_layers = len(kept)
    return model


@torch.no_grad()
def kl(kind, removed, state=None, ids=IDS):
    whole = torch.log_softmax(tiny_stock(kind)(ids).logits, -1)
    found = torch.log_softmax(cut(kind, removed, state)(ids).logits, -1)
    return F.kl_div(found, whole, reduction="sum", log_target=True).item() / ids.numel()


@torch.no_grad()
@pytest.mark.parametrize("kind", TINY)
def test_influence_is_that_of_the_stock_models_states(kind):
    states = tiny_stock(kind).model(IDS, output_hidden_states=True).hidden_states
    found = layer_influence(stream_of(kind), IDS, longest_run=2, progress=False)
    layers = len(found.table)
    assert found.tokens == IDS.numel() and list(found.table["layer"]) == list(range(layers))
    for index in range(layers - 1):  # behind the last, the stock model gives what the norm made of it
        cosine = F.cosine_similarity(states[index], states[index + 1], dim=-1)
        assert found.table["influence"][index] == pytest.approx(1 - cosine.mean().item(), abs=1e-5)
        assert found.table["angle"][index] == pytest.approx((cosine.arccos() / torch.pi).mean().item(), abs=1e-4)
        assert found.runs[1][index] == pytest.approx(found.table["angle"][index])
    over_two = F.cosine_similarity(states[0], states[2], dim=-1)
    assert found.runs[2][0] == pytest.approx((over_two.arccos() / torch.pi).mean().item(), abs=1e-4)
    assert found.runs[2].isna().sum() == 1


@pytest.mark.parametrize("kind", TINY)
def test_the_choice_is_the_least_kl_of_all_that_was_tried(kind):
    found = choose_layers(stream_of(kind), IDS, 2, proposals=3, progress=False)
    assert len(found.removed) == len(found.kl) == 2 and len(set(found.removed)) == 2
    first = found.tried[found.tried["step"] == 1]
    assert sorted(first["layer"]) == [0, 1, 2]
    for row in first.itertuples():
        assert row.kl == pytest.approx(kl(kind, {row.layer}), rel=1e-3)
    assert found.removed[0] == first["layer"][first["kl"].idxmin()]
    assert found.kl[1] == pytest.approx(kl(kind, set(found.removed)), rel=1e-3)
    second = found.tried[found.tried["step"] == 2]
    assert found.kl[1] == second["kl"].min() and found.removed[0] not in set(second["layer"])


def test_fewer_are_tried_than_there_are():
    found = choose_layers(stream_of("llama"), IDS, 1, proposals=1, progress=False)
    influence = layer_influence(stream_of("llama"), IDS, progress=False).table["influence"]
    assert list(found.tried["layer"]) == [int(influence.idxmin())] == list(found.removed)


@pytest.mark.parametrize(("count", "proposals"), [(0, 6), (3, 6), (-1, 6), (1, 0)])
def test_more_layers_than_there_are_is_refused(count, proposals):
    with pytest.raises(LowvramError, match="^expected"):
        choose_layers(stream_of("llama"), IDS, count, proposals=proposals, progress=False)


@pytest.mark.parametrize("kind", TINY)
@pytest.mark.parametrize("removed", [{1}, {2}, {1, 2}])
def test_the_repair_is_least_squares_and_lessens_the_kl(kind, removed):
    stream, ids = stream_of(kind), random_ids(64, batch=24, seed=9)
    found = repair(stream, removed, ids, progress=False)
    name = f"model.layers.{min(removed) - 1}.mlp.down_proj.weight"
    assert set(found.weights) == {name} and set(found.explained) == {min(removed) - 1}
    assert found.weights[name].shape == tiny_state(kind)[name].shape
    state = {**tiny_state(kind), **found.weights}
    assert kl(kind, removed, state) < kl(kind, removed)
    assert 0 < found.explained[min(removed) - 1] < 1
    assert torch.equal(stream.weight(name.removesuffix(".weight")), tiny_state(kind)[name])  # the stream has its own


@torch.no_grad()
def test_the_repair_is_what_lstsq_finds_on_the_stock_models_states():
    ids = random_ids(64, batch=24, seed=9)
    stock, seen = tiny_stock("llama"), {}
    last = stock.model.layers[0].mlp.down_proj
    last.register_forward_pre_hook(lambda module, inputs: seen.update(x=inputs[0]))
    states = stock.model(ids, output_hidden_states=True).hidden_states
    x, missing, length = seen["x"], states[2] - states[1], states[2].norm(dim=-1, keepdim=True)
    x, missing = ((each / length).flatten(0, 1).double() for each in (x, missing))
    found = repair(stream_of("llama"), {1}, ids, progress=False)
    change = found.weights["model.layers.0.mlp.down_proj.weight"].double() - last.weight.double()
    errors = []
    for ridge in RIDGES:
        damped = (ridge * x.square().sum(0).mean()).sqrt() * torch.eye(x.shape[1], dtype=x.dtype)
        rows = torch.cat([x, damped]), torch.cat([missing, torch.zeros(x.shape[1], missing.shape[1], dtype=x.dtype)])
        errors.append(((torch.linalg.lstsq(*rows).solution.T - change).norm() / change.norm()).item())
    assert min(errors) < 1e-3


def test_a_gap_before_the_first_layer_is_left_as_it_is():
    found = repair(stream_of("llama"), {0}, IDS, progress=False)
    assert found.weights == {} and found.explained == {}


def test_one_window_is_not_enough_to_choose_on():
    with pytest.raises(LowvramError, match="two windows"):
        repair(stream_of("llama"), {1}, IDS[:1], progress=False)


HEALED_ON = random_ids(64, batch=24, seed=9)


def healed_state(kind, found):
    """A tiny model's, with what was learnt added."""
    state = tiny_state(kind)
    return state | {name: change.added_to(state[name]) for name, change in found.changes.items()}


@pytest.mark.parametrize("kind", TINY)
@pytest.mark.parametrize("removed", [{0}, {0, 1}, {1}, {2}])
def test_healing_lessens_the_kl_on_text_that_it_has_not_seen(kind, removed):
    found = heal(stream_of(kind), stream_of(kind), removed, HEALED_ON, passes=4, progress=False)
    assert kl(kind, removed, healed_state(kind, found)) < kl(kind, removed)
    assert len(found.kl) == 4 and found.kl[3] < found.kl[0] and found.tokens == HEALED_ON.numel()
    first = max(min(removed) - 1, 0)
    assert {int(name.split(".")[2]) for name in found.changes} == set(range(first, 3)) - removed


@pytest.mark.parametrize("rank", [1, 8])
def test_each_change_is_of_low_rank(rank):
    found = heal(stream_of("llama"), stream_of("llama"), {1}, HEALED_ON[:4], rank=rank, passes=1, progress=False)
    for name, change in found.changes.items():
        added = change.added_to(torch.zeros_like(tiny_state("llama")[name]))
        assert added.shape == tiny_state("llama")[name].shape and torch.linalg.matrix_rank(added) == rank


@pytest.mark.parametrize("options", [{"rank": 0}, {"passes": 0}])
def test_healing_without_a_rank_or_a_pass_is_refused(options):
    with pytest.raises(LowvramError, match="^expected a rank and a number of passes"):
        heal(stream_of("llama"), stream_of("llama"), {1}, IDS, progress=False, **options)


def test_a_step_is_adam_on_the_gradients_of_the_stock_models_kl():
    """Of the first step: the sign of each gradient, in steps of the same size; then the KL's gradient itself."""
    found = heal(stream_of("llama"), stream_of("llama"), {1}, IDS[:1], passes=1, progress=False)
    model = cut("llama", {1})
    weights = {name: parameter for name, parameter in model.named_parameters() if "_proj" in name}
    loss = F.kl_div(
        torch.log_softmax(model(IDS[:1], use_cache=False).logits, -1),
        torch.log_softmax(tiny_stock("llama")(IDS[:1]).logits, -1).detach(),
        reduction="sum",
        log_target=True,
    )
    loss.backward()
    assert found.kl[0] == pytest.approx(loss.item() / IDS[:1].numel(), rel=2e-2)
    same = []
    for name, change in found.changes.items():
        here = name.replace("layers.2", "layers.1")
        same.append((torch.sign(change.right) == -torch.sign(weights[here].grad @ change.left.T)).float().mean().item())
    assert min(same) > 0.95 and len(same) == 14


def test_one_layer_and_one_window_are_in_memory_at_a_time(monkeypatch):
    """Weights of decoder layers that are not on the meta device, whenever a layer runs."""
    seen, run = [], LayerByLayer.run

    def watched(stream, layer, hidden):
        weights = [module.weight for module in stream.model.model.layers.modules() if hasattr(module, "weight")]
        seen.append((sum(not weight.is_meta for weight in weights), sum(1 for _ in layer.children()), len(hidden)))
        return run(stream, layer, hidden)

    monkeypatch.setattr(LayerByLayer, "run", watched)
    heal(stream_of("llama"), stream_of("llama"), {1}, HEALED_ON, passes=1, progress=False)
    assert {weights for weights, *_ in seen} == {9}  # seven linear modules and two norms


class Kept:
    """What a run saves, as ``Keeps``; kills it after so many times."""

    def __init__(self, last=None):
        self.last, self.state, self.saved = last, None, 0

    def load(self):
        return self.state

    def save(self, tensors):
        self.state = {name: tensor.clone() for name, tensor in tensors.items()}
        self.saved += 1
        if self.saved == self.last:
            raise KeyboardInterrupt


@pytest.mark.parametrize("last", [1, 3, 6])
def test_healing_goes_on_where_it_was_killed_to_the_same_bits(last, monkeypatch):
    def healed(keep):
        return heal(stream_of("llama"), stream_of("llama"), {1}, HEALED_ON, passes=2, keep=keep, progress=False)

    expected, keep = healed(None), Kept(last)
    with pytest.raises(KeyboardInterrupt):
        healed(keep)
    assert keep.state["step"] == 8 * last
    found = healed(keep)
    assert found.kl == expected.kl
    for name, change in expected.changes.items():
        assert torch.equal(found.changes[name].left, change.left)
        assert torch.equal(found.changes[name].right, change.right)
    assert keep.saved == 6
    monkeypatch.setattr(LayerByLayer, "run", lambda *_: pytest.fail("learnt once more"))
    assert healed(keep).kl == expected.kl


def test_what_is_kept_is_as_large_as_was_said():
    keep = Kept()
    heal(stream_of("llama"), stream_of("llama"), {1}, IDS, passes=1, keep=keep, progress=False)
    size = sum(tensor.nbytes for name, tensor in keep.state.items() if name not in ("step", "totals"))
    assert size == state_bytes(stream_of("llama"), {1})


@torch.no_grad()
def test_divergence_of_the_whole_model_from_itself_is_none():
    stream = stream_of("qwen2")
    hidden = stream.embed(IDS)
    assert divergences(stream, hidden, {"same": hidden.clone()})["same"] == pytest.approx(0, abs=1e-7)
