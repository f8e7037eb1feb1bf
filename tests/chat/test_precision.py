"""A chat with weights in two planes: precision that changes any time, what a turn took, where it was unsure."""

from dataclasses import replace

import pytest
import torch

from lowvram_lab.chat.live import LiveDecoder
from lowvram_lab.chat.margins import margins_of, tokens_for
from lowvram_lab.chat.session import ChatSession
from lowvram_lab.decoding.escalate import Margins
from lowvram_lab.decoding.speculate import HighPlane, NGrams
from lowvram_lab.engine.load import load, replan
from lowvram_lab.engine.loaded import loaded
from lowvram_lab.errors import LowvramError, PlanError
from lowvram_lab.memory.cuda import open_gpu
from lowvram_lab.model.plan import Plan
from lowvram_lab.model.rules import PRECISIONS
from lowvram_lab.sampling import Sampling
from tests.helpers.checkpoints import directory_spec, write_model
from tests.helpers.scripted import Always
from tests.helpers.tiny import letters_state, load_tiny, tiny_plan, tiny_tokenizer

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="about the CPU")


def letters_model(**changes):
    return load_tiny("qwen2", replace(tiny_plan("qwen2", "int4+4"), **changes), state=letters_state())


@pytest.fixture(scope="module")
def model():
    return letters_model()


@pytest.fixture(autouse=True)
def two_windows_of_calibration(monkeypatch, tmp_path, request):
    if "compiling" not in request.fixturenames:  # what is compiled is kept
        monkeypatch.setenv("LOWVRAM_CACHE", str(tmp_path))
    monkeypatch.setattr("lowvram_lab.chat.margins.TOKENS", 512)
    monkeypatch.setattr("lowvram_lab.chat.margins.FLIPS", 1)


def chat(model, **options):
    return ChatSession(model, tiny_tokenizer(), **{"max_new_tokens": 12, "progress": False, **options})


def fed(session):
    """Notes how many tokens every prompt read has, and by which planes every token is decoded."""
    decoder, notes = session._live.begun(), []
    prefill, decode = decoder.prefill, decoder._decode
    decoder.prefill = lambda ids: notes.append(ids.shape[1]) or prefill(ids)
    decoder._decode = lambda token: notes.append(decoder._planes.both) or decode(token)
    return notes


def switching(session, text, precisions):
    """An answer during which precision is set anew after each piece."""
    answer = ""
    for piece, precision in zip(session.send(text), precisions, strict=False):
        answer += piece
        session.precision = precision
    return answer


@pytest.mark.parametrize("before, after", [("precise", "fast"), ("fast", "auto"), ("auto", "precise")])
def test_precision_changes_between_answers_and_all_else_stays(model, before, after):
    session = chat(model, precision=before)
    session.ask("one")
    session.precision = after
    answer = session.ask("two")
    assert [message["role"] for message in session.history] == ["user", "assistant"] * 2
    assert session.history[-1]["content"] == answer and len(answer) == 12
    first, second = session.turns
    assert second.cached_tokens == first.prompt_tokens + first.new_tokens - 1
    assert session.precision == after


def test_within_an_answer_each_token_is_by_the_precision_of_its_time(model):
    session = chat(model, precision="precise")
    notes = fed(session)
    answer = switching(session, "hi", ["precise"] * 3 + ["fast"] * 4 + ["precise"] * 9)
    prompt, *rest = notes
    assert prompt == session.turns[0].prompt_tokens
    # the last token before a switch is prefilled, by both; then one by one
    assert rest == [True] * 3 + [1, True] + [False] * 3 + [1, True] + [True] * 3
    assert len(answer) == 12 and session.history[-1]["content"] == answer
    assert session.turns[0].precise_tokens == 4 + 1 + 4


def test_after_a_switch_no_token_is_read_by_the_models_modules(model):
    """They take several times as long as the decoder that decodes all other tokens."""
    session, passes = chat(model, precision="auto", max_new_tokens=30), []
    session.ask("hi")  # margins are read, by the modules
    hook = model.register_forward_pre_hook(lambda *given: passes.append(1))
    try:
        answer = switching(session, "go on", [PRECISIONS[at % 3] for at in range(30)])
    finally:
        hook.remove()
    assert len(answer) == 30 and len(passes) == 1  # the prompt


def test_what_was_said_before_a_switch_is_as_without_it(model):
    expected = chat(model, precision="precise").ask("hello")
    session = chat(model, precision="precise")
    answer = switching(session, "hello", ["precise"] * 5 + ["fast"] * 7)
    assert answer[:6] == expected[:6]
    follow_up = session.ask("and then?")
    assert len(follow_up) == 12
    first, second = session.turns
    assert second.cached_tokens == first.prompt_tokens + first.new_tokens - 1


def test_fifty_switches(model):
    session = chat(model, precision="fast", max_new_tokens=52)
    notes = fed(session)
    answer = switching(session, "go on", [PRECISIONS[at % 3] for at in range(1, 53)])
    assert len(answer) == 52 == session.turns[0].new_tokens
    assert [note for note in notes[1:] if note is not True and note is not False] == [1] * 51
    assert session._live.begun().tokens == session.turns[0].prompt_tokens + 51
    before = [dict(message) for message in session.history]
    session.precision = "precise"
    session.ask("on")
    assert session.turns[1].cached_tokens == session.turns[0].prompt_tokens + 51
    assert session.history[:2] == before


def test_sampled_a_switch_draws_anew_and_is_repeatable(model):
    def answer():
        session = chat(model, precision="precise", sampling=Sampling(2.0, seed=4))
        return switching(session, "hi", ["precise"] * 4 + ["fast"] * 9)

    assert answer() == answer()


def test_two_chats_of_one_model_have_each_its_own_precision(model):
    precisions = "fast", "precise"
    alone = [chat(model, precision=precision).ask("hello") for precision in precisions]
    assert alone[0] != alone[1]
    both = zip(*(chat(model, precision=precision).send("hello") for precision in precisions), strict=True)
    assert ["".join(pieces) for pieces in zip(*both, strict=True)] == alone
    assert loaded(model).planes.both  # as it was before


def test_what_the_plan_says_is_the_default_and_a_new_plans_counts():
    model = letters_model(precision="fast")
    session = chat(model)
    assert session.precision == "fast" and not loaded(model).planes.both
    replan(model, replace(loaded(model).plan, precision=None), progress=False)
    assert session.precision == "precise" and loaded(model).planes.both
    assert session.ask("hi") == chat(letters_model()).ask("hi")


@pytest.mark.parametrize("precision", ["precise", "auto"])
def test_weights_in_one_plane_have_no_precision(precision):
    model = load_tiny("qwen2", tiny_plan("qwen2", "int4"), state=letters_state())
    with pytest.raises(PlanError, match=f"precision {precision} needs weights in two planes") as error:
        chat(model, precision=precision)
    assert "\n" not in str(error.value)
    session = chat(model, precision="fast")  # as they are decoded anyway
    with pytest.raises(PlanError, match="needs weights in two planes"):
        session.precision = precision
    session.ask("hi")
    assert session.precision is None is session.turns[0].precise_tokens
    with pytest.raises(LowvramError, match="expected a model with its low planes, found tiny-qwen2"):
        margins_of(model, tiny_tokenizer())


def test_what_is_no_precision_is_refused(model):
    session = chat(model)
    with pytest.raises(PlanError, match="expected precision fast, precise, auto, found 'exact'"):
        session.precision = "exact"
    assert session.precision == "precise"


@pytest.mark.parametrize("precision, expected", [("precise", 12), ("fast", 1)])  # the prompt is read by both
def test_what_a_turn_took_by_both_planes(model, precision, expected):
    session = chat(model, precision=precision)
    session.ask("hi")
    turn = session.turns[0].to_dict()
    assert (turn["precise_tokens"], turn["drafted"], turn["accepted"]) == (expected, 0, 0)
    assert [decision.both for decision in session.decisions].count(True) == expected
    assert session.unsure().empty


def test_unsure_tokens_are_those_of_the_latest_answer_the_least_sure_first(model):
    session = chat(model, precision="auto")
    session.flip_rate = 0.2
    session.ask("hi")
    table = session.unsure()
    assert list(table.columns) == ["token", "margin", "entropy", "both"]
    assert len(table) == 10 and len(session.unsure(3)) == 3
    assert list(table["entropy"]) == sorted(table["entropy"], reverse=True)
    assert set(table["token"]) <= set(session.history[-1]["content"])
    assert session.turns[0].precise_tokens == sum(decision.both for decision in session.decisions)
    assert len(session.decisions) == 12 and session.decisions[0].entropy is None  # the prompt is read by both
    session.ask("more")
    assert len(session.decisions) == 12
    session.precision = "fast"
    session.ask("still more")
    assert session.unsure().empty


def test_the_fewer_flips_are_allowed_the_more_tokens_both_planes_compute(model):
    precise_tokens = []
    for rate in (1.0, 0.2, 0.0):
        session = chat(model, precision="auto", max_new_tokens=40)
        session.flip_rate = rate
        session.ask("hi")
        precise_tokens.append(session.turns[0].precise_tokens)
    assert precise_tokens[0] == 1
    assert precise_tokens == sorted(precise_tokens)
    assert precise_tokens[2] > 20


@pytest.mark.parametrize("rate", [-1, 2, "1%", None])
def test_what_is_no_rate_is_refused_and_the_old_one_stays(model, rate):
    session = chat(model)
    with pytest.raises(LowvramError, match="expected a flip rate from 0 to 1"):
        session.flip_rate = rate
    assert session.flip_rate == 0.01


def test_a_plan_that_is_fast_has_its_low_planes_and_so_its_margins():
    session = chat(letters_model(precision="fast"))
    session.precision = "auto"
    assert len(session.ask("hi")) == 12
    assert len(session.unsure()) == 10


@pytest.mark.parametrize("rate, tokens", [(0, 24576), (0.001, 24576), (0.01, 15000), (0.03, 8192), (1, 8192)])
def test_the_rarer_flips_are_to_be_the_more_text_is_read(rate, tokens):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lowvram_lab.chat.margins.TOKENS", 8192)
        patch.setattr("lowvram_lab.chat.margins.FLIPS", 150)
        assert tokens_for(rate) == tokens


def test_more_is_read_for_a_rarer_rate_and_nothing_for_margins_that_are_given(model, monkeypatch):
    monkeypatch.setattr("lowvram_lab.chat.margins.FLIPS", 100)
    session = chat(model, precision="auto")
    assert session.margins is None
    session.ask("hi")
    of_a_hundredth = len(session.margins.flips)
    session.flip_rate = 0.5
    session.ask("hi")
    assert len(session.margins.flips) == of_a_hundredth  # they say more than is needed
    session.flip_rate = 0.005
    session.ask("hi")
    assert len(session.margins.flips) > of_a_hundredth
    session.margins = given = Margins(torch.tensor([2.0, 1.0]), torch.tensor([False, True]))
    session.ask("hi")
    assert session.margins is given


def counting(monkeypatch):
    from lowvram_lab.chat import margins

    count, inner = [], margins.read_margins
    monkeypatch.setattr(margins, "read_margins", lambda *given: count.append(1) or inner(*given))
    return count


def test_margins_are_read_once_for_a_models_files(monkeypatch, tmp_path):
    folder, count = write_model(tmp_path / "m", "qwen2", letters_state()), counting(monkeypatch)
    plan = Plan.uniform(directory_spec(folder), "int4+4", context=512)
    found = [margins_of(load(plan, open_gpu(None), progress=False), tiny_tokenizer(), progress=False) for _ in "12"]
    assert len(count) == 2  # windows
    assert torch.equal(found[0].margins, found[1].margins) and torch.equal(found[0].flips, found[1].flips)
    (kept,) = (tmp_path / "margins").iterdir()
    kept.write_text(kept.read_text()[:-9])  # damaged
    margins_of(load(plan, open_gpu(None), progress=False), tiny_tokenizer(), progress=False)
    assert len(count) == 4
    margins_of(load(plan, open_gpu(None), progress=False), tiny_tokenizer(), "some other text " * 40, progress=False)
    assert len(count) == 6


def test_margins_of_weights_without_files_are_not_kept_for_others(monkeypatch):
    """They have the same name and the same formats."""
    count, state = counting(monkeypatch), letters_state()
    other = {**state, "lm_head.weight": 2 * state["lm_head.weight"]}
    found = []
    for weights in (state, other):
        model = load_tiny("qwen2", tiny_plan("qwen2", "int4+4"), state=weights)
        found.append(margins_of(model, tiny_tokenizer(), progress=False))
    assert len(count) == 4
    assert not torch.equal(found[0].margins, found[1].margins)


def test_drafts_are_counted_in_a_turn(compiling):
    model = letters_model(kv_format="int8")
    session = chat(model, precision="precise", max_new_tokens=60, compiled=True)
    session._live._pace = Always(*HighPlane.kinds, *NGrams.kinds)
    answer = session.ask("hi")
    turn = session.turns[0]
    assert 0 < turn.accepted <= turn.drafted
    assert turn.precise_tokens == turn.new_tokens == 60
    one_by_one = chat(model, precision="precise", max_new_tokens=60, compiled=True)
    one_by_one._live.begun()._several = None
    assert one_by_one.ask("hi") == answer
    assert one_by_one.turns[0].drafted == 0
    session.precision = "fast"
    session.ask("and?")
    assert session.turns[1].drafted == 0


def test_a_live_decoder_of_two_planes_switches_while_it_streams(model):
    live = LiveDecoder(model, precision="fast")
    ids, found = tiny_tokenizer()("hello")["input_ids"], []
    for token in live.stream(ids, 9, frozenset(), Sampling()):
        found.append(token)
        live.precision = PRECISIONS[len(found) % 2]
    assert len(found) == 9
    assert live.begun().tokens == len(ids) + 8
