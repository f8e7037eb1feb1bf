"""Where a card is full, or both planes are too slow, the low planes leave first, and come back when there is room."""

import logging
from dataclasses import replace

import pytest
import torch

from lowvram_lab.chat import live as live_module
from lowvram_lab.chat import margins
from lowvram_lab.chat.session import ChatSession
from lowvram_lab.conversion.convert import convert
from lowvram_lab.decoding.decision import HIGH_PLANE
from lowvram_lab.engine.load import load, replan
from lowvram_lab.engine.loaded import loaded
from lowvram_lab.errors import LowvramError
from lowvram_lab.memory.cuda import open_gpu
from lowvram_lab.model.plan import Plan
from lowvram_lab.packaged import calibration_text
from tests.helpers.checkpoints import directory_spec, write_model
from tests.helpers.tiny import letters_state, load_tiny, tiny_plan, tiny_tokenizer
from tests.planner.test_step_down import filled

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="about the stand-in")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A conversion: what moves low planes alone reads their file."""
    place = tmp_path_factory.mktemp("planes")
    original, text = write_model(place / "model", "qwen2", letters_state()), place / "calibration.txt"
    text.write_text(calibration_text()[:2300], encoding="utf-8")
    plan = Plan.uniform(directory_spec(original), "int4+4", context=512)
    convert(original, place / "converted", plan=plan, calibration=text, solver="rtn", progress=False)
    return place / "converted"


@pytest.fixture
def session(folder):
    plan = Plan.uniform(directory_spec(folder), "stored", context=256)
    model = load(plan, open_gpu("100MiB"), progress=False)
    return ChatSession(model, tiny_tokenizer(), max_new_tokens=12, progress=False, precision="precise")


def plan_of(session):
    return loaded(session.model).plan


def step_down(session):
    session._live.step_down(torch.OutOfMemoryError("no room"))


def taken(session):
    return session.model.lowvram.gpu.meter.allocated["gpu"]


def test_they_leave_first_and_come_back_with_the_next_answer(session, caplog):
    caplog.set_level(logging.WARNING)
    before, size = plan_of(session), taken(session)
    session.ask("one")
    held = session._live.begun().tokens
    step_down(session)
    assert plan_of(session).low_planes() == {"cpu"} and replace(plan_of(session), modules=before.modules) == before
    assert "low planes" in session._live.given_up[0] and session._live.given_up[0] in caplog.text
    assert session._live.begun().tokens == held  # the KV cache stayed
    assert taken(session) < size
    session.ask("two")
    assert plan_of(session) == before and taken(session) == size
    assert session.turns[1].cached_tokens == held


def test_an_answer_goes_on_as_if_they_had_not_left(session, folder, monkeypatch):
    """The card is full in the middle of it."""
    expected = session.ask("hello")
    other = ChatSession(
        load(plan_of(session), open_gpu("100MiB"), progress=False),
        tiny_tokenizer(),
        max_new_tokens=12,
        progress=False,
        precision="precise",
    )
    decoder, left = other._live.begun(), [5]
    decode = decoder._decode

    def once_full(token):
        left[0] -= 1
        if not left[0]:
            raise torch.OutOfMemoryError("no room")
        return decode(token)

    monkeypatch.setattr(decoder, "_decode", once_full)
    assert other.ask("hello") == expected
    assert plan_of(other).low_planes() == {"cpu"} and left == [0]
    assert other.turns[0].given_up == ("low planes to the CPU",)


def test_a_card_too_full_to_read_margins_on_goes_on_with_less(session, monkeypatch):
    session.precision, full = "auto", [True]
    read = margins.read_margins

    def once_full(*given):
        if full.pop() if full else False:
            raise torch.OutOfMemoryError("no room")
        return read(*given)

    monkeypatch.setattr(margins, "read_margins", once_full)
    monkeypatch.setattr(margins, "TOKENS", 512)
    monkeypatch.setattr(margins, "FLIPS", 1)
    assert len(session.ask("hello")) == 12 and not full
    assert session.turns[0].given_up == ("low planes to the CPU",)


def test_a_second_step_does_not_forget_them(session):
    before = plan_of(session)
    step_down(session)
    step_down(session)
    smaller = plan_of(session)
    assert smaller.low_planes() == {"cpu"} and smaller.context == before.context
    assert session._live.given_up == ["low planes to the CPU", session._live.given_up[1]]
    session.ask("hi")
    back = plan_of(session)
    assert "gpu" in back.low_planes()
    lows = {name: assignment.low for name, assignment in before.modules.items() if assignment.low}
    assert all(back.modules[name].low in (low, back.modules[name].device) for name, low in lows.items())
    assert replace(back, modules=smaller.modules) == smaller  # what else was given up stays so


def test_they_stay_away_where_little_is_free(session, monkeypatch):
    step_down(session)
    with monkeypatch.context() as patch:
        patch.setattr(type(session.model.lowvram.gpu), "free_bytes", 1024)
        session.ask("hi")
        assert plan_of(session).low_planes() == {"cpu"}
    session.ask("hi")
    assert plan_of(session).low_planes() == {"gpu"}


def test_they_stay_away_where_more_was_free_than_can_be_had(session):
    step_down(session)
    kept = filled(session.model.lowvram.gpu)
    session.ask("hi")
    assert plan_of(session).low_planes() == {"cpu"} and kept


def test_a_plan_that_someone_else_made_is_left_alone(session):
    step_down(session)
    theirs = replace(plan_of(session), context=128)
    replan(session.model, theirs, progress=False)
    session.ask("hi")
    assert plan_of(session) == theirs


class Clock:
    """Seconds that pass while a token is made."""

    def __init__(self, session, monkeypatch, seconds):
        self.now, self.seconds = 0.0, seconds
        monkeypatch.setattr(live_module.time, "perf_counter", lambda: self.now)
        decoder = session._live.begun()
        decode = decoder._decode

        def timed(token):
            self.now += self.seconds
            return decode(token)

        decoder._decode = timed


def test_too_slow_by_both_the_rest_of_an_answer_is_by_the_high_planes(session, monkeypatch, caplog):
    caplog.set_level(logging.WARNING)
    session.max_new_tokens, session.least_tokens_per_s = 40, 5
    clock = Clock(session, monkeypatch, 0.25)
    assert len(session.ask("hi")) == 40
    (text,) = session.turns[0].given_up
    assert text == "the high planes alone (both made 4 tokens/s, at least 5 were wanted)" and text in caplog.text
    by = [decision.by == HIGH_PLANE for decision in session.decisions]
    judged = live_module.JUDGED_TOKENS
    count = by.index(True)
    assert judged < count <= judged + 3 and by == [False] * count + [True] * (40 - count)
    assert session.turns[0].precise_tokens == count
    clock.seconds = 0.1
    session.ask("and now?")  # begun by both again
    assert session.turns[1].given_up == () and session.turns[1].precise_tokens == 40
    assert session.precision == "precise"


@pytest.mark.parametrize("precision, seconds", [("precise", 0.19), ("fast", 9.0)])
def test_what_is_fast_enough_or_fast_anyway_is_left_as_it_is(session, monkeypatch, precision, seconds):
    session.precision = precision
    session.max_new_tokens, session.least_tokens_per_s = 40, 5
    Clock(session, monkeypatch, seconds)
    session.ask("hi")
    assert session.turns[0].given_up == ()


@pytest.mark.parametrize("least", [0, -1, "5", True, float("nan"), float("inf")])
def test_what_is_no_least_speed_is_refused_and_the_old_one_stays(session, least):
    session.least_tokens_per_s = 3
    with pytest.raises(LowvramError, match="expected a least number of tokens a second above 0") as error:
        session.least_tokens_per_s = least
    assert "\n" not in str(error.value) and session.least_tokens_per_s == 3


def test_weights_in_one_plane_have_nothing_to_leave_out():
    model = load_tiny("qwen2", tiny_plan("qwen2", "int4"), state=letters_state())
    session = ChatSession(model, tiny_tokenizer(), progress=False)
    session.least_tokens_per_s = None
    with pytest.raises(LowvramError, match="needs weights in two planes"):
        session.least_tokens_per_s = 5
