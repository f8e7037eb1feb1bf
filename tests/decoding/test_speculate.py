"""Drafting on real decoders of tiny models: the tokens of decoding by both planes one by one."""

import pytest
import torch

from lowvram_lab.chat.live import LiveDecoder
from lowvram_lab.decoding.decode import generate
from lowvram_lab.decoding.lean import LeanDecoder
from lowvram_lab.decoding.speculate import Drafting, HighPlane, NGrams, speculate
from lowvram_lab.errors import BudgetError
from lowvram_lab.sampling import Sampling
from tests.decoding.test_two_planes import ALL, CASES
from tests.helpers.planes import in_two_planes
from tests.helpers.scripted import Always
from tests.helpers.tiny import random_ids

pytestmark = [
    pytest.mark.usefixtures("compiling"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="about the CPU"),
]
KINDS = {"high plane": (*HighPlane.kinds,), "n-grams": (*NGrams.kinds,), "both": (*HighPlane.kinds, *NGrams.kinds)}
PROMPTS, TOKENS = 4, 130


def decoder_of(kind, kv_format, max_tokens=None):
    return LeanDecoder(in_two_planes(kind, kv_format), max_tokens, compiled=True, progress=False)


def plain(decoder, ids, tokens=TOKENS, **options):
    decoder.cache.keep(0)
    return list(generate(decoder, ids, max_new_tokens=tokens, **options))


def drafted(decoder, ids, tokens=TOKENS, pace=None, **options):
    decoder.cache.keep(0)
    pace = pace or Always(*KINDS["both"], most=7)
    return list(speculate(decoder, ids, max_new_tokens=tokens, pace=pace, **options))


@pytest.mark.parametrize("penalty", [1.0, 1.2])
@pytest.mark.parametrize(("kind", "kv_format"), ALL)
def test_greedy_it_says_what_both_planes_say_one_by_one(kind, kv_format, penalty):
    decoder, sampling = decoder_of(kind, kv_format), Sampling(repetition_penalty=penalty)
    counts = {name: Drafting() for name in KINDS}
    for seed in range(PROMPTS):
        ids = random_ids(9 + seed, seed=seed)
        expected = plain(decoder, ids, sampling=sampling)
        for name, kinds in KINDS.items():
            pace = Always(*kinds, most=2 + seed)
            assert drafted(decoder, ids, pace=pace, sampling=sampling, drafting=counts[name]) == expected
            assert decoder.tokens == ids.shape[1] + TOKENS - 1  # the last was never fed
    assert counts["high plane"].acceptance > 0.2
    assert sum(counts["both"].drafted.values()) > PROMPTS * TOKENS / 2


def test_so_it_does_at_the_pace_that_this_machine_has():
    decoder = decoder_of("llama", "bf16")
    ids = random_ids(20)
    decoder.cache.keep(0)
    expected = plain(decoder, ids, 200)
    decoder.cache.keep(0)
    assert list(speculate(decoder, ids, max_new_tokens=200)) == expected


@pytest.mark.parametrize(("kind", "kv_format"), CASES)
def test_high_planes_leave_nothing_in_the_cache(kind, kv_format):
    """Going on by both planes, from where drafts were: to the bit."""
    decoder, ids = decoder_of(kind, kv_format), random_ids(20)
    token, found = torch.tensor([[5]]), []
    for way in (plain, drafted):
        way(decoder, ids, 75)
        found.append(decoder.decode(token).clone())
    assert torch.equal(*found)


@pytest.mark.parametrize("position", range(1, 12))
def test_a_stop_token_within_a_draft(position):
    decoder, ids = decoder_of("llama", "bf16"), random_ids(12, seed=2)
    options = {"stop_ids": frozenset({plain(decoder, ids, 12)[position]})}
    assert drafted(decoder, ids, **options) == plain(decoder, ids, **options)


@pytest.mark.parametrize("tokens", range(10))
def test_the_longest_answer_ends_within_a_draft(tokens):
    decoder, ids = decoder_of("llama", "bf16"), random_ids(12)
    assert drafted(decoder, ids, tokens) == plain(decoder, ids, tokens)
    assert decoder.tokens == 12 + max(0, tokens - 1)


@pytest.mark.parametrize(("kind", "kv_format"), CASES)
@pytest.mark.parametrize("room", [72, 97])
def test_the_context_is_full_within_a_draft(kind, kv_format, room):
    decoder, ids = decoder_of(kind, kv_format, room), random_ids(room - 9)
    answers = []
    for made in (generate, speculate):
        decoder.cache.keep(0)
        tokens = []
        with pytest.raises(BudgetError, match=f"cache of {room} tokens is full"):
            for token in made(decoder, ids, max_new_tokens=50):
                tokens.append(token)
        answers.append(tokens)
        assert decoder.tokens == room
    assert answers[0] == answers[1]
    assert len(answers[0]) == 9 + 1


class OneByOne(LiveDecoder):
    """By both planes, a token at a time."""

    def begun(self):
        decoder = super().begun()
        decoder._several = None
        return decoder


def pair(kind, kv_format):
    options = {"compiled": True, "progress": False, "precision": "precise"}
    model = in_two_planes(kind, kv_format)
    fast, slow = LiveDecoder(model, **options), OneByOne(model, **options)
    assert slow.begun().most_tokens == 1 < fast.begun().most_tokens
    fast._pace = Always(*KINDS["both"], most=7)
    return fast, slow


def read(live, ids, tokens):
    """So many tokens; then its reader goes away."""
    made, found = live.stream(ids, 60, frozenset(), Sampling()), []
    for token in made:
        found.append(token)
        if len(found) == tokens:
            break
    made.close()
    live.holds([*ids, *found])
    return found


@pytest.mark.parametrize("tokens", [1, 2, 5, 11, 23])
@pytest.mark.parametrize(("kind", "kv_format"), CASES)
def test_closed_early_it_goes_on_as_if_it_had_not_drafted(kind, kv_format, tokens):
    ids = random_ids(13)[0].tolist()
    both = pair(kind, kv_format)
    first, expected = (read(live, ids, tokens) for live in both)
    assert first == expected
    more = [*ids, *first]
    common = min(live.reuse(more) for live in both)  # drafted, the last token may have been fed already
    assert common >= len(ids) + tokens - 1
    for live in both:
        assert live.reuse(more[: common + 1]) == common
    found = [read(live, more, 40) for live in both]
    assert found[0] == found[1]


@pytest.mark.parametrize("at", [1, 2, 5])
@pytest.mark.parametrize("method", ["draft", "decode_several"])
@pytest.mark.parametrize(("kind", "kv_format"), CASES)
def test_after_an_interrupt_it_goes_on_as_if_there_had_been_none(kind, kv_format, method, at):
    """It comes where all layers but the last have written what they hold of the tokens."""
    ids = random_ids(13)[0].tolist()
    fast, slow = pair(kind, kv_format)
    decoder, left = fast.begun(), [at]

    def interrupting(run):
        def wrapped(arguments):
            left[0] -= 1
            if not left[0]:
                raise KeyboardInterrupt
            return run(arguments)

        return wrapped

    layers = decoder._several.layers if method == "decode_several" else decoder._ways[False].layers
    inner = layers[-1]
    layers[-1] = interrupting(inner)
    found = []
    with pytest.raises(KeyboardInterrupt):
        for token in fast.stream(ids, 60, frozenset(), Sampling()):
            found.append(token)
    layers[-1] = inner
    assert found
    assert decoder.tokens == len(ids) + len(found) - 1
    assert read(slow, ids, len(found)) == found
    for live in (fast, slow):
        live.holds([*ids, *found])
    answers = [read(live, [*ids, *found], 40) for live in (fast, slow)]
    assert answers[0] == answers[1]
