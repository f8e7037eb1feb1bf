"""Where the high planes are unsure, a few guesses more are verified with that token: who decides what then."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowvram_lab.decoding.decision import BOTH_PLANES, GUESS_BY_N_GRAMS, GUESS_OF_HIGH_PLANE, HIGH_PLANE
from lowvram_lab.decoding.decode import generate
from lowvram_lab.decoding.escalate import escalate, margin
from lowvram_lab.decoding.lean import LeanDecoder
from lowvram_lab.decoding.speculate import TRIED, UNSURE, Drafting, HighPlane, NGrams, Pace, speculate
from lowvram_lab.sampling import Sampling
from tests.decoding.test_drafting import BOTH, HIGH_ALONE, p_values
from tests.decoding.test_two_planes import CASES
from tests.helpers.planes import in_two_planes
from tests.helpers.scripted import Always, ScriptedDecoder, interrupting
from tests.helpers.tiny import random_ids, seeded

CHAIN = seeded(300, 300, seed=5)
UNLIKE = CHAIN + 0.3 * seeded(300, 300, seed=6)
INFINITE = math.inf
PROMPT = [4, 5, 6]


def answer(threshold, tokens=60, *, kinds=(), most=3, high=UNLIKE, room=10**6, **options):
    decoder, drafting = ScriptedDecoder(CHAIN, high, room, fast=UNLIKE), Drafting()
    options = {"pace": Always(*kinds, most=most), "drafting": drafting, **options}
    made = escalate(decoder, torch.tensor([PROMPT]), threshold=threshold, max_new_tokens=tokens, **options)
    return made, decoder, drafting


def checked(threshold, tokens=60, **options):
    """An answer each of whose tokens is what those say who are said to have decided it, as is what the cache holds."""
    made, decoder, drafting = answer(threshold, tokens, **options)
    found = list(made)
    assert [decision.token for decision in drafting.decisions] == found
    before, fed = PROMPT[-1], [(token, "both") for token in PROMPT]
    for at, decision in enumerate(drafting.decisions):
        sure = decision.by == HIGH_PLANE
        said = (UNLIKE if sure else CHAIN)[before]
        assert decision.token == int(said.argmax())
        if sure or decision.margin is not None:
            assert decision.margin == pytest.approx(margin(UNLIKE[before][None]).item())
            assert sure == (decision.margin >= threshold)
        if at:
            fed.append((before, "high" if sure else "both"))
        before = decision.token
    assert decoder.cache.held == fed
    return drafting.decisions, drafting


@pytest.mark.parametrize("most", [1, 2, 7])
@pytest.mark.parametrize("kinds", [(), (*NGrams.kinds,)])
@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.3, 1.0, INFINITE])
def test_each_token_is_decided_by_whom_it_is_said_to_be(threshold, kinds, most):
    decisions, drafting = checked(threshold, kinds=kinds, most=most)
    by = {decision.by for decision in decisions[1:]}
    if threshold == 0 and not kinds:
        assert by == {HIGH_PLANE} and not drafting.drafted
    if threshold == INFINITE:
        assert HIGH_PLANE not in by and drafting.drafted[UNSURE]


def test_sure_unsure_and_guessed_tokens_stand_side_by_side():
    decisions, drafting = checked(0.3, 80)
    assert {decision.by for decision in decisions} == {HIGH_PLANE, BOTH_PLANES, GUESS_OF_HIGH_PLANE}
    (high,) = HighPlane.kinds
    assert 0 < drafting.accepted[UNSURE] <= drafting.drafted[UNSURE]
    assert 0 < drafting.accepted[high] <= drafting.drafted[high]
    decisions, _ = checked(0.3, 80, kinds=tuple(NGrams.kinds))
    assert GUESS_BY_N_GRAMS in {decision.by for decision in decisions}


@given(st.floats(0, 3), st.integers(1, 7), st.integers(0, 30))
@settings(max_examples=60, deadline=None)
def test_at_any_threshold(threshold, most, tokens):
    decisions, _ = checked(threshold, tokens, most=most)
    assert len(decisions) == tokens


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_never_believed_it_says_what_both_planes_say(penalty):
    made, _, _ = answer(INFINITE, sampling=Sampling(repetition_penalty=penalty))
    text = list(PROMPT)
    for token in made:
        logits, seen = CHAIN[text[-1]].clone(), torch.tensor(sorted(set(text)))
        logits[seen] = torch.where(logits[seen] < 0, logits[seen] * penalty, logits[seen] / penalty)
        assert token == int(logits.argmax())
        text.append(token)
    assert len(text) == 63


@pytest.mark.parametrize("short_head", [False, True])
def test_sampled_and_never_believed_it_draws_from_what_both_planes_say(short_head):
    decoder, drafting = (
        ScriptedDecoder(BOTH, HIGH_ALONE[:, :4] if short_head else HIGH_ALONE, fast=HIGH_ALONE),
        Drafting(),
    )
    never = partial(escalate, threshold=INFINITE)
    found = p_values(decoder, Sampling(1.0), (), drafting, never)
    assert {UNSURE, *HighPlane.kinds} == set(drafting.drafted)
    assert 0.02 < drafting.acceptance < 0.95
    assert len(found) > 1 and min(found) > 1e-3 / len(found)


def test_sampled_and_always_believed_it_draws_from_what_the_high_planes_say():
    decoder = ScriptedDecoder(HIGH_ALONE, HIGH_ALONE, fast=HIGH_ALONE)
    found = p_values(decoder, Sampling(1.0), (), None, partial(escalate, threshold=0.0))
    assert set(decoder.passes) == {"fast"}
    assert len(found) > 1 and min(found) > 1e-3 / len(found)


@pytest.mark.parametrize("room", range(4, 14))
def test_it_stays_within_the_context(room):
    """The scripted decoder refuses more."""
    for threshold in (0.0, 0.3, INFINITE):
        made, decoder, _ = answer(threshold, room - 2, most=7, room=room)
        assert len(list(made)) == room - 2
        assert len(decoder.cache.held) == room


@pytest.mark.parametrize("at", range(1, 7))
@pytest.mark.parametrize("method", ["decode_fast", "draft", "decode_several"])
def test_an_interrupt_leaves_nothing_of_an_undecided_token(method, at, monkeypatch):
    expected = list(answer(0.3)[0])
    made, decoder, drafting = answer(0.3)
    monkeypatch.setattr(decoder, method, interrupting(getattr(decoder, method), at))
    tokens = []
    with pytest.raises(KeyboardInterrupt):
        tokens.extend(made)
    assert tokens == expected[: len(tokens)]
    assert [token for token, _ in decoder.cache.held] == [*PROMPT, *tokens[:-1]]
    planes = ["high" if decision.by == HIGH_PLANE else "both" for decision in drafting.decisions]
    assert [by for _, by in decoder.cache.held[3:]] == planes[1:]


def seconds(what):
    return {"fast": 0.6, "draft": 0.4}.get(what) or 1 + 0.05 * (what - 1)


def paced(threshold, both, high, tokens=400):
    decoder, drafting = ScriptedDecoder(both, high, seconds=seconds), Drafting()
    options = {"pace": Pace(7, decoder.clock), "drafting": drafting}
    found = list(escalate(decoder, torch.tensor([[1]]), threshold=threshold, max_new_tokens=tokens, **options))
    assert len(found) == tokens
    return decoder.now / tokens, decoder, drafting


def test_guesses_that_come_true_are_many_and_those_that_do_not_are_none():
    """Of a model that repeats nothing: n-grams do not guess."""
    rows = torch.arange(512)
    chain = torch.zeros(512, 512)
    chain[rows, (rows + 1) % 512] = 1.0  # each token has its own, 1 ahead of the others
    other = torch.zeros(512, 512)
    other[rows, (rows + 2) % 512] = 1.0
    of_a_token, decoder, drafting = paced(2.0, chain, chain)
    assert drafting.acceptance == 1.0
    assert of_a_token < 0.7 and max(what for what in decoder.passes if isinstance(what, int)) == 8
    of_a_token, decoder, drafting = paced(2.0, chain, other)
    assert drafting.acceptance < 0.2
    assert of_a_token < 1.6 * 1.05  # a token by the high planes, and one by both


@pytest.mark.parametrize("cycle", [512, 9], ids=["nothing comes again", "all comes again"])
@pytest.mark.parametrize("threshold", [0.5, 2.0], ids=["sure", "unsure"])
def test_it_is_no_slower_than_verifying_everything(cycle, threshold):
    """Where n-grams, or the high planes' drafts, do better than asking margins, they are asked."""
    rows, chain = torch.arange(512), torch.zeros(512, 512)
    chain[rows, (rows + 1) % cycle] = 1.0
    of_a_token, decoder, drafting = paced(threshold, chain, chain, 800)
    assert drafting.acceptance in (None, 1.0)
    precise = ScriptedDecoder(chain, chain, seconds=seconds)
    list(speculate(precise, torch.tensor([[1]]), max_new_tokens=800, pace=Pace(7, precise.clock)))
    assert of_a_token < 1.1 * precise.now / 800


def test_where_margins_decide_what_n_grams_would_have_guessed_is_noted():
    """A text begins to repeat itself after one in which n-grams were always wrong: that is seen without a pass."""
    rows, chain = torch.arange(512), torch.zeros(512, 512)
    chain[rows, (rows + 1) % 9] = 1.0
    decoder, drafting = ScriptedDecoder(chain, chain, seconds=seconds), Drafting()
    pace = Pace(7, decoder.clock)
    for kind in NGrams.kinds:
        for _ in range(40):
            pace.learns(kind, 7, 0)
    before = {kind: pace.share(kind) for kind in NGrams.kinds}
    made = escalate(decoder, torch.tensor([[1]]), threshold=0.5, max_new_tokens=60, pace=pace, drafting=drafting)
    list(made)
    longest = list(NGrams.kinds)[-1]
    assert before[longest] < 0.15 < 0.5 < pace.share(longest)
    by = [decision.by for decision in drafting.decisions]
    assert GUESS_BY_N_GRAMS not in by[:9] and by.count(GUESS_BY_N_GRAMS) > 8


@pytest.mark.parametrize("rate, asked", [(0.5, True), (1.0, True), (1.5, False)])
def test_n_grams_are_believed_where_they_promise_more_than_margins_make(rate, asked):
    pace, (high,) = Pace(7, lambda: 0.0), HighPlane.kinds
    for _ in range(60):
        pace.decided(1, 1.0)
    assert pace.rate == 1.0
    assert [pace.asks_margins(kind, rate) for kind in NGrams.kinds] == [asked] * 3
    assert pace.asks_margins(None, 0.0)
    assert [pace.asks_margins(high, 9.0) for _ in range(4)] == [True] * TRIED + [False]  # margins are tried first


def test_of_what_margins_make_the_slowest_pass_does_not_count():
    pace = Pace(7, lambda: 0.0)
    assert pace.rate == 0
    for took in (1.0, 1.0, 40.0, 1.0):
        pace.decided(2, took)
    assert pace.rate == 2.0
    pace.decided(1, 2.0)
    assert pace.rate == pytest.approx(7 / 5)


class Stalling(ScriptedDecoder):
    """One pass of a kind takes long."""

    stalls = None

    def _pass(self, what, *rest):
        if self.stalls and what in self.stalls:
            self.now, self.stalls = self.now + 8, None
        return super()._pass(what, *rest)


@pytest.mark.parametrize("stalls", [range(3, 9), ("fast",)], ids=["verifying", "high plane"])
@pytest.mark.parametrize("fast", [0.6, 0.2], ids=["both planes are near", "both planes are dear"])
def test_a_stall_is_forgotten(stalls, fast):
    """Over several short answers at one pace, as of a chat: the last of them take what they take without it."""
    rows, chain, took = torch.arange(512), torch.zeros(512, 512), []
    chain[rows, (rows + 1) % 9] = 1.0
    for at in (None, stalls):
        decoder = Stalling(
            chain, chain, seconds=lambda what: {"fast": fast, "draft": fast * 0.7}.get(what) or seconds(what)
        )
        decoder.stalls, pace = at, Pace(7, decoder.clock)
        for _ in range(12):
            before = decoder.now
            list(escalate(decoder, torch.tensor([[1]]), threshold=0.5, max_new_tokens=60, pace=pace))
        took.append(decoder.now - before)
        assert decoder.stalls is None
    assert took[1] < 1.25 * took[0]  # where margins and guesses are nearly as fast, which of them is left to chance


def test_where_a_penalty_brings_the_second_token_near_the_high_planes_are_unsure():
    chain = torch.full((8, 8), -5.0)
    chain[:, 3], chain[:, 5] = 10.0, 6.1
    decoder, drafting = ScriptedDecoder(chain, chain), Drafting()
    options = {"sampling": Sampling(repetition_penalty=1.6), "pace": Always(), "drafting": drafting}
    list(escalate(decoder, torch.tensor([[3, 1]]), threshold=2.0, max_new_tokens=2, **options))
    assert drafting.decisions[1].margin == pytest.approx(abs(10 / 1.6 - 6.1), abs=1e-5)
    assert drafting.decisions[1].both


@pytest.mark.usefixtures("compiling")
@pytest.mark.skipif(torch.cuda.is_available(), reason="about the CPU")
@pytest.mark.parametrize(("kind", "kv_format"), CASES)
def test_a_real_decoder_never_believed_says_what_both_planes_say(kind, kv_format):
    decoder = LeanDecoder(in_two_planes(kind, kv_format), compiled=True, progress=False)
    drafting = Drafting()
    for seed in range(3):
        ids, answers = random_ids(9 + seed, seed=seed), []
        for made in (generate, partial(escalate, threshold=INFINITE, pace=Always(most=7), drafting=drafting)):
            decoder.cache.keep(0)
            answers.append(list(made(decoder, ids, max_new_tokens=100)))
            assert decoder.tokens == ids.shape[1] + 99
        assert answers[0] == answers[1]
    assert drafting.acceptance > 0.1 and drafting.drafted[UNSURE] > 20
