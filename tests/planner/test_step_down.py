"""Another plan on a loaded model, the order of what is given up, and a chat that outlives a full GPU."""

import gc
import logging
from dataclasses import replace

import pytest
import torch

from lowvram_lab.chat.live import LiveDecoder
from lowvram_lab.chat.session import ChatSession
from lowvram_lab.decoding.decode import ModuleDecoder
from lowvram_lab.engine import load as loader
from lowvram_lab.engine import room
from lowvram_lab.engine.load import replan
from lowvram_lab.engine.placement import Placement
from lowvram_lab.errors import BudgetError, CheckpointError, PlanError
from lowvram_lab.evaluation.fidelity import fidelity
from lowvram_lab.memory.cuda import open_gpu
from lowvram_lab.planner.measure import run_workload
from lowvram_lab.planner.moves import cost
from lowvram_lab.planner.profile import Workload
from lowvram_lab.planner.step_down import smaller_plans
from tests.helpers.tiny import (
    TOLERANCES,
    letters_state,
    load_tiny,
    random_ids,
    relative_error,
    tiny_plan,
    tiny_spec,
    tiny_tokenizer,
)

SIMULATED = pytest.mark.skipif(torch.cuda.is_available(), reason="about the simulated GPU")


@torch.no_grad()
def logits(model):
    return model(random_ids(40)).logits.cpu().float()


def variants(kind):
    plain = tiny_plan(kind)
    return {
        "split": plain.with_gpu_layers(1),
        "int4": tiny_plan(kind, "int4"),
        "int4, split": tiny_plan(kind, "int4").with_gpu_layers(2),
        "mixed": plain.with_modules("*.down_proj", format="int5").with_modules("*.q_proj", format="int8"),
        "int8 KV": replace(plain, kv_format="int8"),
        "on the CPU": plain.with_modules("*", device="cpu"),
        "as it was": plain,
    }


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_another_plan_is_what_a_fresh_load_makes_of_it(kind):
    model = load_tiny(kind, tiny_plan(kind))
    for name, plan in variants(kind).items():
        replan(model, plan, progress=False)
        fresh = load_tiny(kind, plan)
        assert torch.equal(logits(model), logits(fresh)), name
        assert model.lowvram.plan == plan
        assert model.hf_device_map == fresh.hf_device_map
        assert model.lowvram.gpu.meter.allocated["gpu"] == fresh.lowvram.gpu.meter.allocated["gpu"], name
        assert ("save_pretrained" in vars(model)) == ("save_pretrained" in vars(fresh))


def test_only_what_changes_is_loaded_again(monkeypatch):
    model, read = load_tiny("qwen2", tiny_plan("qwen2")), []
    original = model.lowvram.weights.read
    monkeypatch.setattr(model.lowvram.weights, "read", lambda name: (read.append(name), original(name))[1])
    replan(model, tiny_plan("qwen2").with_gpu_layers(2), progress=False)
    assert read
    assert all(name.startswith("model.layers.0.") for name in read)


def test_another_dtype_is_another_model():
    with pytest.raises(PlanError, match="computes in bf16, found a plan in fp32"):
        replan(load_tiny("llama", tiny_plan("llama")), tiny_plan("llama", "fp32"), progress=False)


def filled(gpu) -> list[torch.Tensor]:
    """Takes what is left of a card, as another process might; gives back what holds it."""
    gpu.meter.allocator.capacity = gpu.meter.allocator.reserved
    kept = []
    with gpu.active(), gpu.meter.scope(place="gpu", force=True):
        for size in (64 * 1024, 512):
            try:
                while True:
                    kept.append(torch.zeros(size, dtype=torch.uint8))
            except torch.OutOfMemoryError:
                pass
    return kept


@SIMULATED
def test_without_room_the_model_is_as_it_was():
    tiny_spec("qwen2")
    plan = tiny_plan("qwen2").with_gpu_layers(1)
    model = load_tiny("qwen2", plan, open_gpu("16MiB"))
    before, held = logits(model), model.lowvram.gpu.meter.allocated["gpu"]
    kept = filled(model.lowvram.gpu)
    with pytest.raises(torch.OutOfMemoryError):
        replan(model, plan.with_gpu_layers(3), progress=False)
    assert model.lowvram.plan == plan
    del kept
    gc.collect()
    assert model.lowvram.gpu.meter.allocated["gpu"] == held
    assert torch.equal(logits(model), before)


def test_an_interrupt_leaves_the_model_as_it_was(monkeypatch):
    model = load_tiny("qwen2", tiny_plan("qwen2"))
    before, reads, original = logits(model), [], model.lowvram.weights.read

    def interrupted(name):
        reads.append(name)
        if len(reads) == 3:
            raise KeyboardInterrupt
        return original(name)

    monkeypatch.setattr(model.lowvram.weights, "read", interrupted)
    with pytest.raises(KeyboardInterrupt):
        replan(model, tiny_plan("qwen2").with_gpu_layers(1), progress=False)
    assert torch.equal(logits(model), before)
    assert model.lowvram.plan == tiny_plan("qwen2")


def test_each_smaller_plan_takes_less_and_costs_more():
    plan = tiny_plan("qwen2", context=1024)
    texts, plans = zip(*smaller_plans(plan), strict=True)
    assert plans[1] == replace(plans[0], prefill_chunk=256)
    taken = [each.weight_bytes("gpu") + each.kv_bytes(each.context) for each in plans]
    assert taken == sorted(taken, reverse=True)
    assert texts[:4] == (
        "embedding to the CPU",
        "prompts read 256 tokens at a time",
        "KV cache in int8",
        "KV cache in int4",
    )
    at_full_context = [cost(each) for each in plans if each.context == 1024]
    assert at_full_context[2:] == sorted(at_full_context[2:])  # the same table: what auto_plan would rather give up
    assert at_full_context[1][:2] == (0, 0)
    assert sorted(texts[4:7]) == [
        "1 more layer on the CPU, 2 left on the GPU",
        "2 more layers on the CPU, 0 left on the GPU",
        "head to the CPU",
    ]
    four = replace(plan, kv_format="int4")
    assert all(smaller.kv_format == "int4" for _, smaller in smaller_plans(four))  # int8 would be more
    assert list(texts[7:]) == [f"a context of {n} tokens" for n in (768, 576, 432, 324, 256)]


@pytest.mark.parametrize("at", ["_wrap", "_device_name"])
def test_a_replan_interrupted_while_it_finishes_is_undone(at, monkeypatch):
    model = load_tiny("qwen2", tiny_plan("qwen2", "int8"))
    before, plan = logits(model), tiny_plan("qwen2", "int8").with_gpu_layers(1)
    owner = Placement if at == "_wrap" else loader
    real, calls = getattr(owner, at), []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(owner, at, interrupted)
    with pytest.raises(KeyboardInterrupt):
        replan(model, plan, progress=False)
    assert model.lowvram.plan == tiny_plan("qwen2", "int8")
    assert torch.equal(logits(model), before)


def test_a_replan_that_the_disk_has_no_room_for_changes_nothing(monkeypatch):
    tiny_spec("qwen2")
    plans = [tiny_plan("qwen2", "int8").with_gpu_layers(1, disk=1)]
    names = {"": 0, "model.layers.1": "disk", "model.layers.0": "cpu"}
    plans.append(tiny_plan("qwen2", "int8").with_device_map(names))
    model = load_tiny("qwen2", plans[0])
    before = logits(model)
    monkeypatch.setattr(room.shutil, "disk_usage", lambda path: type("", (), {"free": 10}))
    with pytest.raises(CheckpointError, match="found 10 B free"):
        replan(model, plans[1], progress=False)
    assert torch.equal(logits(model), before)
    replan(model, replace(plans[0], context=64), progress=False)  # writes nothing


def test_a_chat_goes_on_where_ram_is_short_for_a_step(monkeypatch):
    session = letters_chat(open_gpu("1000MiB"))
    real = loader.check_room_in_ram

    def short_once(plan, *args):
        if plan.layer_devices().count("gpu") == 3:
            raise BudgetError("no RAM")
        real(plan, *args)

    monkeypatch.setattr(loader, "check_room_in_ram", short_once)
    live = session._live
    live.step_down(torch.OutOfMemoryError())
    assert len(live.given_up) == 1
    assert "1 more layer on the CPU" in live.given_up[0]


def test_buffers_for_travelling_weights_are_the_first_to_go():
    tiny_spec("qwen2")
    plan = replace(tiny_plan("qwen2").with_gpu_layers(2, disk=1), stream_from=16)
    texts, plans = zip(*smaller_plans(plan), strict=True)
    assert texts[0] == "long prompts computed where the layers are"
    assert texts[3] == "KV cache in int8"
    assert plans[0] == replace(plan, stream_from=None)
    assert all(each.layer_devices()[0] == "disk" for each in plans)


def letters_chat(gpu, context=512, **options):
    model = load_tiny("qwen2", tiny_plan("qwen2", "fp32", context=context), gpu, letters_state())
    return ChatSession(model, tiny_tokenizer(), **{"max_new_tokens": 12, **options})


def fresh_answer(session, history, text):
    """What a chat with the same plan and all the room in the world says."""
    model = load_tiny("qwen2", session.model.lowvram.plan, open_gpu(None), letters_state())
    other = ChatSession(model, tiny_tokenizer(), max_new_tokens=12)
    other.history.extend(dict(message) for message in history)
    return other.ask(text)


@SIMULATED
def test_a_chat_goes_on_when_the_gpu_is_full(caplog):
    caplog.set_level(logging.WARNING)
    session = letters_chat(open_gpu("4MiB"))
    session.ask("hi")
    before, steps = list(session.history), list(smaller_plans(session.model.lowvram.plan))
    answer = session.ask("x" * 300)
    given_up = session.turns[-1].given_up
    assert given_up and given_up == tuple(text for text, _ in steps[: len(given_up)])
    assert session.model.lowvram.plan == steps[len(given_up) - 1][1]
    assert f"the GPU is full; going on with less: {given_up[0]}" in caplog.text
    assert session.history == [
        *before,
        {"role": "user", "content": "x" * 300},
        {"role": "assistant", "content": answer},
    ]
    assert answer == fresh_answer(session, before, "x" * 300)
    assert session.turns[0].given_up == ()


@SIMULATED
def test_every_chat_of_a_model_is_told_that_it_was_planned_smaller():
    session = letters_chat(open_gpu("4MiB"))
    other = ChatSession(session.model, tiny_tokenizer(), max_new_tokens=12)
    session.ask("x" * 300)
    other.ask("hi")
    assert (
        session.turns[0].given_up
        and other.turns[0].given_up[: len(session.turns[0].given_up)] == session.turns[0].given_up
    )


@SIMULATED
def test_a_lean_answer_needs_no_memory_that_was_not_there_before():
    session, pieces = letters_chat(open_gpu("16MiB")), []
    assert session.engine.startswith("the lean decoder")
    for piece in session.send("tell me"):
        pieces.append(piece)
        if len(pieces) == 4:
            allocator = session.model.lowvram.gpu.meter.allocator
            allocator.capacity = allocator.reserved
    assert len("".join(pieces)) == 12
    assert session.turns[-1].given_up == ()
    assert allocator.reserved == allocator.capacity


@SIMULATED
def test_an_answer_cut_by_a_full_gpu_is_finished_where_it_was(monkeypatch):
    """Out of memory in the middle of an answer: another process takes what was left."""
    monkeypatch.setattr("lowvram_lab.chat.live.decoder_for", lambda model, **options: ModuleDecoder(model))
    session, pieces = letters_chat(open_gpu("16MiB")), []
    for piece in session.send("tell me"):
        pieces.append(piece)
        if len(pieces) == 4:
            kept = filled(session.model.lowvram.gpu)
    assert len("".join(pieces)) == 12
    assert session.turns[-1].new_tokens == 12
    assert session.turns[-1].given_up
    assert kept


@SIMULATED
def test_of_two_chats_on_a_full_card_the_idle_one_is_read_again(caplog):
    caplog.set_level(logging.WARNING)
    one = letters_chat(open_gpu("64MiB"), context=1024)
    before, plan = one.ask("hi"), one.model.lowvram.plan
    kept = filled(one.model.lowvram.gpu)
    del kept[:12]  # room for a pass, not for a KV cache
    other = ChatSession(one.model, tiny_tokenizer(), max_new_tokens=12)
    assert one._live._decoder is None and "no room for the KV caches of several chats" in caplog.text
    assert other.ask("hi") == before
    assert one.ask("and now?") == fresh_answer(one, one.history[:2], "and now?")
    assert one.turns[1].cached_tokens == 0 and other._live._decoder is None
    assert kept and one.model.lowvram.plan == plan and not any(turn.given_up for turn in one.turns + other.turns)


@SIMULATED
def test_what_is_measured_beside_an_idle_chat_on_a_full_card_has_its_room():
    one = letters_chat(open_gpu("64MiB"), context=1024)
    one.ask("hi")
    kept = filled(one.model.lowvram.gpu)
    found = fidelity(one.model, one.model, tiny_tokenizer(), "some letters to be read " * 9, progress=False)
    assert found.kl_mean == 0 and one._live._decoder is None and kept
    assert one.ask("and now?") == fresh_answer(one, one.history[:2], "and now?")


def test_a_chat_that_answers_lets_go_of_nothing():
    one = letters_chat(open_gpu("64MiB"))
    other, pieces = LiveDecoder(one.model), one.send("tell me")
    next(pieces)
    decoder = one._live._decoder
    assert not other._others_let_go() and one._live._decoder is decoder
    assert len("".join(pieces)) == 11
    assert other._others_let_go() and one._live._decoder is None
    assert not other._others_let_go()


def test_a_chat_notices_that_its_model_was_replanned():
    session = letters_chat(open_gpu("64MiB"))
    session.ask("hi")
    before = list(session.history)
    replan(session.model, session.model.lowvram.plan.with_gpu_layers(1), progress=False)
    assert session.ask("and now?") == fresh_answer(session, before, "and now?")
    assert session.turns[-1].cached_tokens == 0


@SIMULATED
def test_after_stepping_down_a_run_that_fits_says_so():
    session = letters_chat(open_gpu("4MiB"))
    session.ask("x" * 300)
    assert session.turns[-1].given_up
    assert run_workload(session.model, Workload(20, 2)).fits


def test_a_history_cut_by_its_owner_is_a_new_beginning():
    session = letters_chat(open_gpu("64MiB"), context=128)
    for number in range(6):
        session.ask(f"question {number}")
    assert session.dropped_turns > 1
    session.history.clear()
    assert session.ask("new start") == fresh_answer(session, [], "new start")
    assert session.dropped_turns == 0


@SIMULATED
def test_where_nothing_helps_the_error_passes_and_the_history_is_as_before():
    plan = replace(tiny_plan("qwen2", "fp32", context=256), kv_format="int4").with_gpu_layers(0)
    plan = plan.with_modules("model.embed_tokens", "lm_head", device="cpu")
    model = load_tiny("qwen2", plan, open_gpu("16MiB"), letters_state())
    session = ChatSession(model, tiny_tokenizer(), max_new_tokens=12)
    session.ask("hi")
    before, kept = list(session.history), filled(model.lowvram.gpu)
    with pytest.raises(torch.OutOfMemoryError):
        session.ask("x" * 100)
    assert session.history == before
    assert kept


@SIMULATED
@pytest.mark.parametrize("turns", [30, pytest.param(200, marks=pytest.mark.slow)])
def test_a_long_chat_under_a_tight_cap_ends_with_its_history(turns):
    session = letters_chat(open_gpu("4MiB"), context=400)
    for number in range(turns):
        assert session.ask(f"question {number}")
    assert len(session.history) == 2 * turns
    assert [m["content"] for m in session.history[::2]] == [f"question {n}" for n in range(turns)]
    assert session.dropped_turns > 0
    assert all(t.prompt_tokens + t.new_tokens <= 400 for t in session.turns)
    assert session.model.lowvram.gpu.meter.allocator.peak_reserved <= 4 * 2**20


def test_tolerance_of_splits():
    """A split changes where, not what: every split equals the unsplit model within its kernels' tolerance."""
    for kind in ("llama", "qwen2"):
        model = load_tiny(kind, tiny_plan(kind))
        whole = logits(model)
        for count in range(3):
            replan(model, tiny_plan(kind).with_gpu_layers(count), progress=False)
            assert relative_error(logits(model), whole) < TOLERANCES["bf16"]
