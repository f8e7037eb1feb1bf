"""Where the high planes are believed: margins and a rate of flips, and one token by both where they are unsure."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowvram_lab.decoding.decode import ModuleDecoder, generate
from lowvram_lab.decoding.escalate import Margins, escalate, margin, read_margins
from lowvram_lab.decoding.lean import decoder_for
from lowvram_lab.decoding.speculate import Drafting
from lowvram_lab.engine.loaded import loaded
from lowvram_lab.errors import LowvramError
from lowvram_lab.sampling import Sampling
from tests.helpers.planes import decoded_by, in_two_planes
from tests.helpers.tiny import TINY, random_ids

INFINITE = math.inf


def margins_of(pairs):
    """From (margin, flip) pairs in any order."""
    values, flips = zip(*pairs, strict=True)
    return Margins.joined([Margins(torch.tensor(values, dtype=torch.float32), torch.tensor(flips))])


@given(
    st.lists(st.tuples(st.integers(0, 12).map(lambda n: n / 8), st.booleans()), min_size=1, max_size=60),
    st.one_of(st.floats(0, 1).map(lambda rate: round(rate, 6)), st.integers(0, 20).map(lambda n: n / 20)),
)
@settings(max_examples=300, deadline=None)
def test_of_all_thresholds_that_keep_the_rate_it_is_the_smallest(pairs, rate):
    """Ties too: a margin is either believed or not, whichever token has it."""

    def flipped(threshold):
        return sum(flip for value, flip in pairs if value >= threshold) / len(pairs)

    found, threshold = margins_of(pairs), margins_of(pairs).threshold(rate)
    assert flipped(threshold) <= rate
    lower = {value for value, _ in pairs if value < threshold}
    assert all(flipped(value) > rate for value in lower)
    assert found.escalated(threshold) == pytest.approx(sum(value < threshold for value, _ in pairs) / len(pairs))
    assert found.flip_rate == pytest.approx(flipped(0.0))


@pytest.mark.parametrize("tokens, flips", [(100, 29), (50, 7), (10, 3), (1000, 57), (7, 3)])
def test_a_rate_that_is_met_exactly_is_allowed(tokens, flips):
    """``0.29 * 100`` is a little less than 29."""
    pairs = [(float(tokens - at), at % 2 == 0) for at in range(2 * flips)] + [(0.5, False)] * (tokens - 2 * flips)
    assert margins_of(pairs).threshold(flips / tokens) == 0.0
    assert margins_of(pairs).threshold((flips - 1) / tokens) > 0.5


def test_rates_of_none_and_all():
    found = margins_of([(3.0, False), (2.0, True), (1.0, False), (0.5, True)])
    assert 2.0 < found.threshold(0.0) < 3.0
    assert found.threshold(1) == found.threshold(1.0) == 0.0
    assert found.escalated(found.threshold(0.0)) == 0.75
    sure = margins_of([(3.0, False), (0.0, False)])
    assert sure.threshold(0.0) == 0.0  # what never flips is always believed
    assert (sure.flip_rate, found.flip_rate) == (0.0, 0.5)


@pytest.mark.parametrize("rate", [-0.1, 1.1, math.nan, math.inf, None, "1%", True])
def test_what_is_no_rate_is_refused(rate):
    with pytest.raises(LowvramError, match="expected a flip rate from 0 to 1") as error:
        margins_of([(1.0, True)]).threshold(rate)
    assert "\n" not in str(error.value)


def test_margins_of_logits():
    high = torch.tensor([[0.0, 2.0, 1.5], [4.0, 1.0, 0.0], [1.0, 1.0, 0.0]])
    both = torch.tensor([[0.0, 1.0, 1.5], [4.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    assert margin(high).tolist() == [0.5, 3.0, 0.0]
    found = Margins.of(high, both)
    assert found.margins.tolist() == [3.0, 0.5, 0.0]
    assert found.flips.tolist() == [False, True, False]


def test_a_model_reads_a_text_twice():
    model, ids = in_two_planes("qwen2"), random_ids(40)[0]
    planes, logits = loaded(model).planes, {}
    for both in (True, False):
        with planes.taking(both), torch.no_grad():
            logits[both] = model(ids[None]).logits[0]
    for first in (0, 7):
        found, rows = read_margins(model, ids, first), slice(first, 39)  # what comes behind the last is not there
        expected = Margins.of(logits[False][rows], logits[True][rows])
        assert torch.equal(found.margins, expected.margins) and torch.equal(found.flips, expected.flips)
    assert planes.both and 0 < found.flip_rate < 1


DECODERS = [decoder_for, ModuleDecoder]


def answered(decoder, threshold, tokens=40, **options):
    decoder.cache.keep(0)
    drafting = Drafting()
    made = escalate(decoder, random_ids(12), threshold=threshold, max_new_tokens=tokens, drafting=drafting, **options)
    found = list(made)
    assert [decision.token for decision in drafting.decisions] == found
    return found, drafting.decisions


def plain(decoder, both, tokens=40, **options):
    decoder.cache.keep(0)
    with loaded(decoder.model).planes.taking(both):
        return list(generate(decoder, random_ids(12), max_new_tokens=tokens, **options))


SAMPLINGS = {
    "greedy": Sampling(),
    "not to repeat": Sampling(repetition_penalty=1.5),
    "sampled": Sampling(1.5, 0.9, seed=3, repetition_penalty=1.1),
}


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
@pytest.mark.parametrize("make", DECODERS)
@pytest.mark.parametrize("kind", TINY)
def test_never_believed_it_is_by_both_and_always_believed_by_the_high_ones(kind, make, sampling):
    decoder = make(in_two_planes(kind))
    precise, by_both = answered(decoder, INFINITE, sampling=sampling)
    fast, by_high = answered(decoder, 0.0, sampling=sampling)
    assert precise == plain(decoder, both=True, sampling=sampling)
    assert fast == plain(decoder, both=False, sampling=sampling)
    assert precise != fast
    assert all(decision.both for decision in by_both)
    assert [decision.both for decision in by_high] == [True] + [False] * 39  # the prompt is read by both


def test_between_them_each_token_is_decided_by_its_own_margin():
    decoder = decoder_for(in_two_planes("qwen2"))
    values = sorted(decision.margin for decision in answered(decoder, 0.0)[1][1:])
    threshold = values[len(values) // 2]
    _, (first, *others) = answered(decoder, threshold)
    assert (first.margin, first.entropy, first.both) == (None, None, True)
    assert [decision.both for decision in others] == [decision.margin < threshold for decision in others]
    assert {decision.both for decision in others} == {True, False}
    assert all(0 <= decision.entropy <= math.log(320) for decision in others)


def test_the_first_that_they_are_unsure_of_is_what_both_say_of_the_same_cache():
    decoder = decoder_for(in_two_planes("llama"))
    _, (_, second, *_) = answered(decoder, INFINITE)
    ids = torch.cat((random_ids(12), torch.tensor([[answered(decoder, INFINITE)[0][0]]])), dim=1)
    by_high, by_both = (decoded_by(decoder, both, ids, 12) for both in (False, True))
    assert second.token == int(by_both.argmax())
    assert second.margin == pytest.approx(margin(by_high).item(), abs=1e-6)


@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_it_ends_where_it_is_told_to_and_its_cache_is_as_long_as_without(tokens):
    decoder = decoder_for(in_two_planes("qwen2"))
    found, _ = answered(decoder, 1.0, tokens)
    assert len(found) == tokens
    assert decoder.tokens == 12 + max(0, tokens - 1)
    stopped, decisions = answered(decoder, 1.0, stop_ids=frozenset(found[-1:]))
    expected = list(itertools.takewhile(lambda token: token not in found[-1:], answered(decoder, 1.0)[0]))
    assert stopped == expected and len(decisions) == len(stopped)


def test_an_int4_cache_ends_a_group_by_both_planes(compiling):
    """Its exact keys are gone then: those of the high planes could not be taken back."""
    decoder = decoder_for(in_two_planes("qwen2", "int4"), compiled=False)
    _, decisions = answered(decoder, 0.0)
    position = 12  # of the first token that is fed
    ends = [at for at in range(1, 40) if (position + at) % 32 == 0]
    assert [at for at, decision in enumerate(decisions) if decision.both] == [0, *ends]
    assert ends == [20]
