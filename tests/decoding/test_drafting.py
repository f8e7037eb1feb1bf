"""Who drafts and how much: n-grams seen before, what passes take, how often guesses come true. And what is kept."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowvram_lab.decoding.speculate import (
    SHARE,
    Drafting,
    Guess,
    HighPlane,
    NGrams,
    Pace,
    Speculation,
    expected_tokens,
    seen_tokens,
    speculate,
)
from lowvram_lab.sampling import Sampling, distribution
from tests.helpers.scripted import Always, ScriptedDecoder, interrupting
from tests.helpers.tiny import seeded

(HIGH,) = HighPlane.kinds
TWO, THREE, FOUR = NGrams.kinds


def guessed(ids, most=3):
    found = NGrams()
    found.reads(ids)
    return found.guess(most)


def test_the_longest_match_wins():
    text = [1, 2, 3, 4, 50, 9, 2, 3, 4, 60, 9, 9, 3, 4, 70, 8, 1, 2, 3, 4]
    assert guessed(text) == Guess(FOUR, [50, 9, 2])  # two and three of the last tokens have been there since
    assert guessed(text[1:]) == Guess(THREE, [60, 9, 9])
    assert guessed([5, *text[10:15], 3, 4]) == Guess(TWO, [70, 3, 4])


def test_of_equally_long_matches_the_latest_wins():
    assert guessed([1, 2, 30, 1, 2, 40, 1, 2], most=1) == Guess(TWO, [40])


def test_the_last_tokens_are_no_match_for_themselves():
    assert guessed([1, 2, 3, 4, 5, 6]) is None
    assert guessed([7, 7]) is None
    assert guessed([7, 7, 7]) == Guess(TWO, [7])
    assert guessed([]) is None


@given(st.lists(st.integers(0, 2), max_size=60), st.lists(st.integers(0, 60)), st.integers(1, 5))
@settings(max_examples=200, deadline=None)
def test_read_in_pieces_nothing_of_a_text_is_skipped(text, cuts, most):
    """Also where it is looked up beside all places where the last tokens may have been."""
    pieces = NGrams()
    for cut in [*sorted(cuts), len(text)]:
        pieces.reads(text[:cut])
    assert pieces.guess(most) == guessed(text, most) == by_looking_everywhere(text, most)


def by_looking_everywhere(text, most):
    for length, kind in ((4, FOUR), (3, THREE), (2, TWO)):
        for end in range(len(text) - 1, length - 1, -1):
            if len(text) >= length and text[end - length : end] == text[-length:]:
                return Guess(kind, text[end : end + most])
    return None


def test_another_text_is_not_mixed_with_the_first():
    found = NGrams()
    found.reads([1, 2, 3, 1, 2])
    found.reads([9, 9, 5, 1, 2])
    assert found.guess(3) is None


@given(st.floats(0, 1), st.integers(0, 12))
def test_expected_tokens_are_summed_over_all_outcomes(share, length):
    chances = [share**kept * (1 - share) for kept in range(length)] + [share**length]
    assert expected_tokens(share, length) == pytest.approx(sum((kept + 1) * p for kept, p in enumerate(chances)))


def test_expected_tokens_are_what_is_counted():
    coins = torch.rand(100_000, 5, generator=torch.Generator().manual_seed(0)) < 0.7
    counted = coins.int().cumprod(1).sum(1).float().mean().item() + 1
    assert expected_tokens(0.7, 5) == pytest.approx(counted, abs=0.02)


def pace(draft, several=lambda tokens: 1 + 0.05 * (tokens - 1)):
    """One that has timed all passes; a token by both planes takes a second."""
    found = Pace(7)
    found.took("draft", draft)
    for tokens in range(1, 9):
        found.took(tokens, several(tokens))
    return found


def test_nothing_is_drafted_where_that_does_not_pay():
    assert pace(draft=1.0).length(HIGH, 7) == (0, 1.0)
    assert pace(draft=0.5, several=float).length(HIGH, 7)[0] == 0
    assert pace(draft=0.3).length(HIGH, 0)[0] == 0
    assert pace(draft=5.0).length(FOUR, 7)[0] > 0  # n-grams cost nothing


def test_the_better_guesses_come_true_the_longer_drafts_are():
    lengths = []
    for accepted in range(11):
        found = pace(draft=0.3)
        for _ in range(60):
            found.learns(HIGH, 10, accepted)
        length, rate = found.length(HIGH, 7)
        assert rate == pytest.approx(best_of_all(found.share(HIGH), 0.3))
        lengths.append(length)
    assert lengths == sorted(lengths)
    assert lengths[0] == 0 and lengths[-1] == 7
    assert found.length(HIGH, 3)[0] == 3  # no more than there is


def best_of_all(share, draft):
    return max(expected_tokens(share, n) / (n * draft + 1 + 0.05 * n) for n in range(8))


def test_what_is_learnt_is_the_share_of_judged_tokens_and_old_guesses_fade():
    found = Pace(7)
    for _ in range(400):
        found.learns(HIGH, 5, 2)  # two right, the third wrong, the others not judged
    assert found.share(HIGH) == pytest.approx(2 / 3, abs=1e-3)
    for _ in range(60):
        found.learns(HIGH, 4, 4)
    assert found.share(HIGH) > 0.95
    assert found.share(TWO) == pytest.approx(NGrams.kinds[TWO])


def test_a_pass_takes_the_median_of_the_last_timings():
    found = Pace(7)
    assert found.seconds("draft") < found.seconds(1) < found.seconds(8)  # before anything was timed
    for seconds in (9.0, 9.0, *[2.0] * 6, 50.0, 2.0, 2.0):
        found.took(1, seconds)
    assert found.seconds(1) == 2.0
    assert found.seconds("draft") == pytest.approx(1.2)
    assert found.seconds(3) == pytest.approx(2 * 1.12)


@pytest.mark.parametrize("lost", [0.5, 2.0, 7.0])
def test_a_kind_that_lost_time_is_tried_again_the_later_the_more_it_lost(lost):
    found = pace(draft=1.0)
    assert found.is_due(HIGH)
    found.gave(HIGH, 2, 2 + lost)
    waited = 0
    while not found.is_due(HIGH):
        found.gave(None, 1, 1.0)
        waited += 1
    assert waited == pytest.approx(lost / SHARE, abs=1)
    assert found.is_due(TWO)
    found.gave(HIGH, 3, 2.5)
    assert found.is_due(HIGH)  # that one won time


def costs(what):
    return 0.6 if what == "draft" else 1 + 0.05 * (what - 1)


def test_drafts_that_never_come_true_are_given_up_and_lose_next_to_nothing():
    both = torch.zeros(200, 200)
    both[:, 1::2] = -1e4  # even tokens, each as likely as the other; the high planes say odd ones
    decoder, measured = ScriptedDecoder(both, both.roll(1, 1), seconds=costs), []
    for _ in speculate(
        decoder, torch.tensor([[2]]), max_new_tokens=4000, pace=Pace(7, decoder.clock), sampling=Sampling(1.0)
    ):
        measured.append(decoder.now)
    of_a_token = (measured[-1] - measured[1000]) / (len(measured) - 1001)
    assert 1 < of_a_token < 1 + 4 * SHARE  # of four kinds each may lose that
    assert 20 < decoder.passes.count("draft") < 100


def test_drafts_that_come_true_are_as_long_as_they_may_be():
    logits, count = seeded(40, 40), Drafting()
    decoder = ScriptedDecoder(logits, logits, seconds=lambda what: 0.1 if what == "draft" else 1.0)
    options = {"pace": Pace(7, decoder.clock), "drafting": count}
    tokens = list(speculate(decoder, torch.tensor([[1]]), max_new_tokens=401, **options))
    assert len(tokens) == 401 == count.tokens + 1  # the first is the prompt's
    assert count.acceptance == 1.0
    assert count.passes == pytest.approx(400 / 8, abs=10)
    assert Drafting().acceptance is None


def p_value(counts, chances):
    """Of a chi-squared test; cells of a chance of zero must be empty."""
    counts, chances = counts.double(), chances.double()
    possible = chances > 0
    assert counts[~possible].sum() == 0
    expected = counts.sum() * chances[possible]
    statistic = ((counts[possible] - expected) ** 2 / expected).sum()
    freedom = torch.tensor(len(expected) - 1.0, dtype=torch.double)
    return torch.special.gammaincc(freedom / 2, statistic / 2).item() if freedom else 1.0


DRAWS, ANSWERS = 20_000, 10
SAMPLINGS = {
    "as it is": Sampling(1.0),
    "all": Sampling(0.8, 0.9, top_k=4, min_p=0.05),
    "top k": Sampling(1.7, top_k=3),
    "top p": Sampling(1.0, 0.8),
    "min p": Sampling(1.0, min_p=0.15),
}
FIRST = list(SAMPLINGS)[:2]
EACH = [pytest.param(SAMPLINGS[name], id=name, marks=() if name in FIRST else pytest.mark.slow) for name in SAMPLINGS]
BOTH = seeded(6, 6, seed=1)
HIGH_ALONE = BOTH + seeded(6, 6, seed=2)


def p_values(decoder, sampling, kinds, drafting=None, generate=speculate):
    """Whether what follows each token is drawn from what both planes say: a p-value for each."""
    size = len(decoder.both)
    counts, wanted = torch.zeros(size, size), distribution(decoder.both, sampling)
    for seed in range(ANSWERS):
        prompt, options = torch.tensor([[1, 2, 1, 2, 1]]), {"sampling": replace(sampling, seed=seed)}
        made = generate(
            decoder, prompt, max_new_tokens=DRAWS // ANSWERS, pace=Always(*kinds), drafting=drafting, **options
        )
        counts.index_put_(tuple(torch.tensor(list(pairwise(made))).T), torch.tensor(1.0), accumulate=True)
    return [p_value(*row) for row in zip(counts, wanted, strict=True) if row[0].sum() > 200]


@pytest.mark.parametrize("kinds", [(HIGH,), (TWO, THREE, FOUR)], ids=["drawn", "certain"])
@pytest.mark.parametrize("sampling", EACH)
def test_sampled_tokens_have_the_distribution_of_both_planes(sampling, kinds):
    decoder, count = ScriptedDecoder(BOTH, HIGH_ALONE), Drafting()
    found = p_values(decoder, sampling, kinds, count)
    assert set(count.drafted) <= set(kinds)
    assert 0.02 < count.acceptance < 0.95
    assert len(found) > 1
    assert min(found) > 1e-3 / len(found)


def test_drafts_by_a_head_of_the_commonest_tokens_leave_the_others_their_chance():
    decoder = ScriptedDecoder(BOTH, HIGH_ALONE[:, :4])
    found = p_values(decoder, Sampling(1.0), (HIGH,))
    assert len(found) == 6
    assert min(found) > 1e-3 / len(found)


def test_the_test_of_distributions_finds_one_that_is_another():
    """Guesses that are kept wherever both planes give them any chance."""
    decoder = ScriptedDecoder(BOTH, HIGH_ALONE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "rand", lambda *_, **__: torch.tensor(0.0))
        assert min(p_values(decoder, Sampling(1.0), (HIGH,))) < 1e-6


def test_a_repetition_penalty_where_the_commonest_tokens_have_not_been_seen():
    """As text of rare tokens only: then nothing is penalised."""
    sampling = Sampling(1.0, repetition_penalty=1.5)
    logits = seeded(1, 4)
    found = distribution(logits, sampling, seen_tokens(sampling, [7, 9], logits))
    assert torch.equal(found, logits.softmax(-1))
    assert seen_tokens(sampling, [7, 2], logits).tolist() == [[2]]
    assert seen_tokens(Sampling(1.0), [7, 2], logits) is None


CHAIN = seeded(30, 30, seed=5)
"""Greedy it repeats itself soon; so do its drafts, in part others."""


def answer(kinds=(HIGH,), tokens=40, room=10**6, decoder=None, **options):
    decoder = decoder or ScriptedDecoder(CHAIN, CHAIN + 0.5 * seeded(30, 30, seed=6), room)
    made = speculate(decoder, torch.tensor([[4, 5, 6]]), max_new_tokens=tokens, pace=Always(*kinds), **options)
    return made, decoder


def plain(tokens, penalty=1.0):
    """Greedy, a token at a time."""
    text = [4, 5, 6]
    while len(text) < tokens + 3:
        logits = CHAIN[text[-1]].clone()
        if penalty != 1:
            seen = torch.tensor(sorted(set(text)))
            logits[seen] = torch.where(logits[seen] < 0, logits[seen] * penalty, logits[seen] / penalty)
        text.append(int(logits.argmax()))
    return text[3:]


KINDS = [(), (HIGH,), (TWO, THREE, FOUR), (HIGH, TWO, THREE, FOUR)]


def held(decoder, tokens):
    """Whether the cache holds these tokens, as both planes see them."""
    return decoder.cache.held == [(token, "both") for token in tokens]


@pytest.mark.parametrize("penalty", [1.0, 1.3, 8.0])
@pytest.mark.parametrize("kinds", KINDS)
def test_greedy_is_as_a_token_at_a_time(kinds, penalty):
    made, decoder = answer(kinds, tokens=60, sampling=Sampling(repetition_penalty=penalty))
    tokens = list(made)
    assert tokens == plain(60, penalty)
    assert held(decoder, [4, 5, 6, *tokens[:-1]])  # the last is never fed


@pytest.mark.parametrize("tokens", range(12))
@pytest.mark.parametrize("kinds", KINDS)
def test_no_more_tokens_than_asked_also_where_a_draft_has_more(kinds, tokens):
    made, decoder = answer(kinds, tokens)
    assert list(made) == plain(tokens)
    assert held(decoder, ([4, 5, 6] + plain(tokens))[: 3 + max(tokens - 1, 0)])


@pytest.mark.parametrize("position", range(10))
@pytest.mark.parametrize("kinds", KINDS)
def test_a_stop_token_ends_the_answer_also_within_a_draft(kinds, position):
    expected = plain(40)
    stop = expected[position]
    made, decoder = answer(kinds, stop_ids=frozenset({stop}))
    tokens = list(made)
    assert tokens == expected[: expected.index(stop)]
    assert decoder.cache.held[: 3 + len(tokens)] == [(token, "both") for token in [4, 5, 6, *tokens]]


@pytest.mark.parametrize("room", range(4, 14))
@pytest.mark.parametrize("kinds", KINDS)
def test_a_draft_stays_within_the_context(kinds, room):
    """The scripted decoder refuses more; where there is room for no token at all, the real one says so."""
    made, decoder = answer(kinds, tokens=room - 2, room=room)
    assert list(made) == plain(room - 2)
    assert len(decoder.cache.held) == room


@pytest.mark.parametrize("read", range(1, 12))
def test_closed_early_the_cache_holds_what_was_read_and_perhaps_more(read):
    made, decoder = answer()
    tokens = [next(made) for _ in range(read)]
    made.close()
    assert decoder.cache.held[: 2 + read] == [(token, "both") for token in [4, 5, 6, *tokens[:-1]]]


@pytest.mark.parametrize("at", range(1, 9))
@pytest.mark.parametrize("method", ["draft", "decode_several"])
def test_an_interrupt_leaves_the_cache_as_it_was(method, at, monkeypatch):
    made, decoder = answer()
    monkeypatch.setattr(decoder, method, interrupting(getattr(decoder, method), at))
    tokens = []
    with pytest.raises(KeyboardInterrupt):
        tokens.extend(made)
    assert tokens == plain(40)[: len(tokens)]
    assert held(decoder, [4, 5, 6, *tokens[:-1]])


def test_what_is_looked_up_is_the_whole_prompt():
    decoder = ScriptedDecoder(CHAIN, CHAIN)
    first = int(CHAIN[6].argmax())
    seen = torch.tensor([[9, 6, first, 21, 22, 6]])
    count = Drafting()
    list(speculate(decoder, seen[:, -1:], max_new_tokens=3, seen=seen, pace=Always(TWO), drafting=count))
    assert count.drafted[TWO] >= 1


def test_of_two_drafters_the_one_that_promises_more_is_asked():
    class Prefers(Always):
        def length(self, kind, available):
            return min(2, available), {HIGH: self.promise}.get(kind, 1.0)

    for promise, asked in ((0.5, TWO), (1.5, HIGH)):
        pace, count = Prefers(), Drafting()
        pace.promise = promise
        decoder = ScriptedDecoder(CHAIN, CHAIN)
        work = Speculation(decoder, Sampling(), pace, count)
        decoder.prefill(torch.tensor([[1, 2, 3, 1]]))
        work.cycle([1, 2, 3, 1, 2], 9)
        assert set(count.drafted) == {asked}
