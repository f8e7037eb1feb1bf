"""The lean decoder on a CUDA card: its logits are the CPU's, and what a token asks of the card is counted."""

import functools
import itertools
from collections import Counter
from dataclasses import replace

import pytest
import torch

from benchmarks.counts_cuda import SAMPLED, counted, has_counters
from lowvram_lab.chat.session import ChatSession
from lowvram_lab.decoding.decode import generate
from lowvram_lab.decoding.lean import decoder_for
from lowvram_lab.engine.load import load
from lowvram_lab.engine.loaded import loaded
from lowvram_lab.kernels.compiler import compiler, without_compiler
from lowvram_lab.memory.cuda import open_gpu
from lowvram_lab.model.plan import Plan
from lowvram_lab.model.spec import ModelSpec
from lowvram_lab.sampling import Sampling
from tests.helpers.tiny import (
    TINY,
    TOLERANCES,
    DictCheckpoint,
    decoded,
    letters_state,
    load_tiny,
    random_ids,
    random_state,
    relative_error,
    tiny_config,
    tiny_plan,
    tiny_tokenizer,
)

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("values")]
GRAPHS = "the lean decoder, as CUDA graphs"
KERNELS = 2 * TOLERANCES["bf16"]
"""Two paths of bf16 roundings, each some tens of them from ids to logits."""
PLACED = {
    "whole": lambda plan: plan,
    "split": lambda plan: plan.with_gpu_layers(1),
    "split, embedding off": lambda plan: plan.with_gpu_layers(2).with_modules(plan.spec.embedding, device="cpu"),
    "the first layers on the card": lambda plan: plan.with_modules(
        "model.layers.2.*", *((plan.spec.embedding,) if plan.spec.tied else ()), plan.spec.head, device="cpu"
    ),
    "head off": lambda plan: plan.with_modules(
        *((plan.spec.embedding,) if plan.spec.tied else ()), plan.spec.head, device="cpu"
    ),
    "travelling": lambda plan: replace(plan.with_gpu_layers(1, disk=1), stream_from=12),
}


@functools.cache
def wide_spec(kind: str) -> ModelSpec:
    """Products that tinygemm takes, so that int4 has a kernel."""
    return ModelSpec.from_config(tiny_config(kind, intermediate_size=256, num_hidden_layers=2), f"wide-{kind}")


@functools.cache
def wide_state(kind: str) -> dict:
    return random_state(wide_spec(kind))


def load_wide(plan: Plan):
    kind = plan.model.removeprefix("wide-")
    return load(plan, open_gpu(), checkpoint=DictCheckpoint(wide_state(kind)), progress=False)


@pytest.mark.parametrize("kv_format", ["16 bits", "int8", "int4"])
@pytest.mark.parametrize("recipe", ["bf16", "fp16", "int8", "int4", "nf4"])
@pytest.mark.parametrize("kind", TINY)
def test_logits_are_the_cpus(kind, recipe, kv_format):
    plan = Plan.uniform(wide_spec(kind), recipe, context=64)
    plan = plan if kv_format == "16 bits" else replace(plan, kv_format=kv_format)
    ids = random_ids(18)
    on_card = decoder_for(load_wide(plan))
    on_cpu = decoder_for(load_wide(plan.with_modules("*", device="cpu")), compiled=False)
    found, expected = decoded(on_card, ids, 12), decoded(on_cpu, ids, 12)
    if kv_format == "int4":
        assert "int4" in on_card.name  # the modules read it
    else:
        assert on_card.name == GRAPHS
    # of a cache in codes, a value that is rounded the other way is a whole step off
    steps = {"16 bits": 0.0, "int8": 0.01, "int4": 0.1}[kv_format]
    assert relative_error(found, expected) < KERNELS + steps


TIED_APART = ("llama", "split, embedding off")  # its head would be off the card with it, behind layers that are on it


@pytest.mark.parametrize(("kind", "placed"), [case for case in itertools.product(TINY, PLACED) if case != TIED_APART])
@pytest.mark.parametrize("recipe", ["bf16", "int4"])
def test_wherever_the_parts_lie(kind, recipe, placed, monkeypatch):
    monkeypatch.setattr("lowvram_lab.decoding.graph.SHORTEST", 16)  # several lengths, hence several graphs
    plan = PLACED[placed](tiny_plan(kind, recipe, context=64))
    model, ids = load_tiny(kind, plan), random_ids(40)
    decoder = decoder_for(model)
    on_cpu = decoder_for(load_tiny(kind, plan.with_modules("*", device="cpu")), compiled=False)
    found, expected = decoded(decoder, ids, 13), decoded(on_cpu, ids, 13)
    assert decoder.name == GRAPHS
    assert relative_error(found, expected) < KERNELS
    for each in (decoder, on_cpu):  # a second turn, after a part was forgotten
        each.cache.keep(20)
    assert relative_error(decoded(decoder, ids[:, 5:], 10), decoded(on_cpu, ids[:, 5:], 10)) < KERNELS


def test_layers_compiled_beside_a_head_on_the_card(monkeypatch):
    monkeypatch.setenv("LOWVRAM_COMPILE", "1")
    if compiler() is None:
        pytest.skip(without_compiler())
    plan, ids = tiny_plan("qwen2", "bf16", context=64).with_gpu_layers(0), random_ids(18)
    decoder = decoder_for(load_tiny("qwen2", plan, open_gpu()), compiled=True)
    on_cpu = decoder_for(load_tiny("qwen2", plan.with_modules("*", device="cpu")), compiled=False)
    assert decoder.name == "the lean decoder, compiled"
    assert relative_error(decoded(decoder, ids, 12), decoded(on_cpu, ids, 12)) < KERNELS


@pytest.mark.parametrize("placed", ["whole", "split, embedding off"])
def test_a_greedy_answer_is_the_likeliest_token_after_another(placed):
    """Also across the lengths of graphs: a new one is captured with the token in the place that it writes to."""
    plan = PLACED[placed](tiny_plan("qwen2", "bf16", context=600))
    decoder, ids = decoder_for(load_tiny("qwen2", plan)), random_ids(250)
    answer = list(generate(decoder, ids, max_new_tokens=12))
    assert set(decoder._ways[False].graphed._graphs) == {256, 512, 600}
    decoder.cache.keep(0)
    logits = [decoder.prefill(ids).clone(), *(decoder.decode(torch.tensor([[token]])).clone() for token in answer)]
    assert answer == [int(each.argmax(-1)) for each in logits[:-1]]


needs_counters = pytest.mark.skipif(not has_counters(), reason="a real card has no counters: see tests/fakecuda")
WAITED = {"whole": 1, "split": 2, "split, embedding off": 1, "travelling": 2}
"""Synchronisations a token: its id is read; where the embedding is on the card and the first layer not, its row too."""
CASES = [(placed, recipe) for placed in WAITED for recipe in ("bf16", "int8", "int4", "nf4")]


@needs_counters
@pytest.mark.parametrize("sampling", [Sampling(), SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize(("placed", "recipe"), CASES)
def test_what_a_token_asks_of_the_card(placed, recipe, sampling):
    decoder = decoder_for(load_tiny("qwen2", PLACED[placed](tiny_plan("qwen2", recipe, context=128))))
    answer = generate(decoder, random_ids(20), max_new_tokens=20, sampling=sampling)
    for _ in range(4):
        next(answer)
    found = counted(lambda: [next(answer) for _ in range(10)], 10)
    alone = placed in ("split", "travelling")  # the embedding is looked up by itself
    assert found["syncs"] == WAITED[placed]
    if recipe == "nf4" and placed != "whole":  # the CPU has no kernel for it
        assert "nf4, which has no kernel" in decoder.name
        return
    assert found["graph_launches"] == 1
    assert found["mallocs"] == 0
    assert found["d2h"] == found["syncs"]
    assert found["h2d"] == (placed != "whole")
    if sampling.takes_the_likeliest:
        assert found["kernels"] <= 8 * alone
        assert found["allocations"] <= 8 * alone
        assert alone or found["kernels"] == found["allocations"] == 0


@needs_counters
@pytest.mark.parametrize("layers", [3, 1])
@pytest.mark.parametrize("kind", TINY)
def test_what_a_token_sends_to_low_planes_beside_the_card(kind, layers):
    """By both planes: of each product on the card its input goes to the CPU and what the low plane makes of it back."""
    plan = tiny_plan(kind, "int4+4", context=128).with_gpu_layers(layers).with_modules("*", low="cpu")
    model = load_tiny(kind, plan)
    decoder, planes, token = decoder_for(model), loaded(model).planes, torch.tensor([[5]])
    decoder.prefill(random_ids(20))
    found, listed = {}, {}
    for both in (True, False):
        with planes.taking(both):
            decoder.decode(token)  # graphs are captured
            before = Counter(loaded(model).gpu.recording.transfers)
            found[both] = counted(lambda: decoder.decode(token))
            listed[both] = Counter(loaded(model).gpu.recording.transfers) - before
    rows, columns = map(sum, zip(*(plan.spec.module(name).weight_shape for name in plan.apart()), strict=True))
    there, back = columns * 2, rows * 2  # 16 bits
    split = 2 * plan.spec.hidden_size * (layers < 3)  # a hidden state, where the embedding and the first layer part
    assert plan.apart() and found[False]["graph_launches"] == 1 and found[True]["graph_launches"] == 0
    assert found[True]["d2h_bytes"] == listed[True]["gpu", "cpu"] == there + split
    assert found[True]["h2d_bytes"] == listed[True]["cpu", "gpu"]
    positions = 128 * (layers < 3)
    assert back + 8 + split <= listed[True]["cpu", "gpu"] <= back + 16 + split + positions  # ids are 8 bytes


@needs_counters
def test_a_chat_reads_each_token_once():
    model = load_tiny("qwen2", tiny_plan("qwen2", "bf16", context=256), None, letters_state())
    session = ChatSession(model, tiny_tokenizer(), max_new_tokens=30)
    session.ask("hello")
    before = counted(lambda: None)
    found = counted(lambda: session.ask("and then"))
    turn = session.turns[-1]
    assert not any(before.values())
    assert turn.new_tokens > 5
    # of the prompt, the ids go there and the rotary positions are looked at
    assert found["syncs"] <= turn.new_tokens + turn.stopped + 2
    assert found["graph_launches"] == turn.new_tokens + turn.stopped - 1


@needs_counters
@pytest.mark.parametrize("recipe", ["bf16", "int8", "int4", "nf4"])
def test_a_travelling_layer_is_one_copy(recipe):
    plan = replace(tiny_plan("qwen2", recipe).with_gpu_layers(1), stream_from=16)
    decoder = decoder_for(load_tiny("qwen2", plan))
    decoder.prefill(random_ids(20))
    decoder.cache.keep(0)
    found = counted(lambda: decoder.prefill(random_ids(20)))
    layers = decoder.model.lowvram.placement._weights._order
    assert len(layers) == 2
    assert found["h2d_pinned_bytes"] == sum(layer.size_bytes for layer in layers)
    # keys and values of each layer come home; hidden states do not cross, and nothing else is waited for
    assert found["d2h"] <= 2 * len(layers) + 1
    assert found["syncs"] <= found["d2h"] + 1
