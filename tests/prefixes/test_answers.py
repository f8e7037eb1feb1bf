"""A remembered answer is verified, several tokens a pass: the same text sooner, and a stale one changes nothing."""

import pytest
import torch

from lowvram_lab.chat.session import ChatSession
from lowvram_lab.decoding.decode import generate
from lowvram_lab.decoding.lean import decoder_for
from lowvram_lab.decoding.replay import KIND, Replay
from lowvram_lab.decoding.speculate import Drafting
from lowvram_lab.prefixes.store import Remember
from lowvram_lab.sampling import Sampling
from tests.helpers.tiny import TINY, letters_state, random_ids, tiny_tokenizer
from tests.prefixes.test_bits import loaded_tiny

SPOILT = {
    "right": lambda answer: answer,
    "wrong at first": lambda answer: [answer[0] ^ 1, *answer[1:]],
    "wrong within": lambda answer: [*answer[:11], answer[11] ^ 1, *answer[12:]],
    "short": lambda answer: answer[:7],
    "longer": lambda answer: [*answer, 7, 7],
    "ids that are none": lambda answer: [*answer[:5], 10**6, -3],
    "nothing": lambda answer: [],
}


ALL = [
    pytest.param(kind, kv_format, marks=() if (kind, kv_format) == ("llama", "bf16") else pytest.mark.slow)
    for kind in TINY
    for kv_format in ("bf16", "int8", "int4")
]
"""A library is compiled for each, in some ten seconds."""


@pytest.mark.usefixtures("compiling")
@pytest.mark.parametrize(("kind", "kv_format"), ALL)
def test_it_gives_the_tokens_that_decoding_gives(kind, kv_format):
    model = loaded_tiny(kind, "gpu", kv_format, recipe="int8", ram=None)
    decoder = decoder_for(model, 512, compiled=True, progress=False)
    assert decoder.most_tokens > 1
    ids = random_ids(150, seed=1)
    plain = list(generate(decoder, ids, max_new_tokens=60))
    for name, spoil in SPOILT.items():
        decoder.cache.keep(0)
        drafting = Drafting()
        replay = Replay(decoder, spoil(plain), drafting)
        found = list(replay.tokens(ids, 60, frozenset()))
        if not replay.ended:
            rest = torch.tensor([[found[-1]]])
            found += generate(decoder, rest, max_new_tokens=60 - len(found))
        assert found == plain, name
        if name == "right":
            assert drafting.accepted[KIND] == drafting.drafted[KIND] > 40
            assert drafting.passes < 30


@pytest.mark.usefixtures("compiling")
def test_it_ends_at_a_stop_token_and_at_the_most_tokens():
    decoder = decoder_for(loaded_tiny("llama", recipe="int8", ram=None), 512, compiled=True, progress=False)
    ids = random_ids(150, seed=1)
    plain = list(generate(decoder, ids, max_new_tokens=60))
    stop = max(plain, key=plain.index)
    assert plain.index(stop) > 2
    decoder.cache.keep(0)
    replay = Replay(decoder, plain, Drafting())
    assert list(replay.tokens(ids, 60, frozenset([stop]))) == plain[: plain.index(stop)]
    assert replay.ended
    decoder.cache.keep(0)
    replay = Replay(decoder, plain, Drafting())
    assert list(replay.tokens(ids, 13, frozenset())) == plain[:13]
    assert replay.ended


def asked_twice(folder, **options):
    turns, answers = [], []
    for _ in range(2):
        model = loaded_tiny("llama", recipe="int8", ram=None, disk=None)
        wanted = Remember(disk="64MiB", folder=folder)
        session = ChatSession(model, tiny_tokenizer(), max_new_tokens=40, remember=wanted, compiled=True, **options)
        answers.append(session.ask("what is a fern? " * 10))
        turns.append(session.turns[-1])
    return answers, turns, session


@pytest.mark.usefixtures("compiling")
def test_a_question_that_was_asked_before_is_answered_from_memory(tmp_path):
    answers, turns, session = asked_twice(tmp_path)
    assert answers[0] == answers[1]
    assert (turns[0].drafted, turns[1].drafted) == (0, turns[1].accepted)
    assert turns[1].accepted > 25
    assert len(session.decisions) == turns[1].new_tokens
    assert session.decisions[-2].by == "an answer remembered"


@pytest.mark.usefixtures("compiling")
def test_a_stale_answer_changes_nothing(tmp_path):
    answers, _, session = asked_twice(tmp_path)
    prompt = session._said.prompt
    store = session._live.prompts.store
    store.keep_answer(prompt, [5, 6, 7] * 10, 0.1)
    session.history = []
    assert session.ask("what is a fern? " * 10) == answers[0]
    assert store.answer(prompt) == session._said.answer  # and is replaced by what was said


@pytest.mark.usefixtures("compiling")
def test_sampled_answers_are_not_remembered(tmp_path):
    _, turns, _ = asked_twice(tmp_path, sampling=Sampling(temperature=0.8, seed=2))
    assert turns[1].drafted == 0
    _, turns, _ = asked_twice(tmp_path, sampling=Sampling(repetition_penalty=1.2))
    assert turns[1].drafted == 0


@pytest.mark.usefixtures("compiling")
def test_an_answer_that_is_expected_is_verified(tmp_path):
    model = loaded_tiny("llama", recipe="int8", ram=None, disk=None)
    wanted = Remember(disk="64MiB", folder=tmp_path)
    plain = ChatSession(model, tiny_tokenizer(), max_new_tokens=24, compiled=True).ask("what is a fern?")
    session = ChatSession(model, tiny_tokenizer(), max_new_tokens=24, remember=wanted, compiled=True)
    store = session._live.prompts.store
    for expected in (plain, "something else", plain[:9] + "?" + plain[10:]):
        session.history = []
        session.expect("what is a fern?", expected)
        prompt = session.beginning("what is a fern?")
        assert tiny_tokenizer().decode(store.answer(prompt)) == expected
        assert session.ask("what is a fern?") == plain


@pytest.mark.usefixtures("compiling")
def test_no_token_is_none():
    decoder = decoder_for(loaded_tiny("llama", recipe="int8", ram=None), 512, compiled=True, progress=False)
    replay = Replay(decoder, [5, 6, 7], Drafting())
    assert list(replay.tokens(random_ids(150, seed=1), 0, frozenset())) == []
    assert replay.ended


@pytest.mark.usefixtures("compiling")
def test_an_answer_cut_short_does_not_take_the_place_of_a_longer_one(tmp_path):
    _, _, session = asked_twice(tmp_path)
    store, prompt = session._live.prompts.store, session._said.prompt
    whole = store.answer(prompt)
    store.keep_answer(prompt, whole[:5], 0.1)
    assert store.answer(prompt) == whole


def bits_of(session):
    cache = session._live.begun().cache
    return [view.clone() for layer in cache.held for view in layer.span(0, cache.get_seq_length()).values()]


def remembering(folder, kind="llama", state=None, **options):
    model = loaded_tiny(kind, recipe="int8", ram=None, disk=None, state=state)
    options = {"remember": Remember(disk="64MiB", folder=folder), "compiled": True, "progress": False, **options}
    return ChatSession(model, tiny_tokenizer(), **options)


@pytest.mark.usefixtures("compiling")
def test_a_draft_that_ends_where_a_block_ends_changes_no_bit(tmp_path):
    """The token behind it is decoded like any other, not read by the modules as the last of a block would be."""
    question = "what is a fern? " * 6
    cold = remembering(tmp_path / "cold", max_new_tokens=60)
    cold.ask(question)
    prompt, answer, expected = cold._said.prompt, cold._said.answer, bits_of(cold)
    at = -len(prompt) % 128
    assert 2 < at < len(answer)
    for name, draft in (("a", answer[:at]), ("b", [*answer[: at - 1], answer[at - 1] ^ 1]), ("c", answer[: at - 2])):
        warm = remembering(tmp_path / name, max_new_tokens=60)
        warm._live.prompts.store.keep_answer(prompt, draft, 0.1)
        warm.ask(question)
        assert warm._said.answer == answer
        assert all(torch.equal(one, other) for one, other in zip(bits_of(warm), expected, strict=True)), name


@pytest.mark.usefixtures("compiling")
def test_an_answer_that_its_reader_cuts_off_leaves_what_decoding_leaves(tmp_path):
    """One pass may have verified more than was read."""

    def cut_off(folder, pieces):
        session = remembering(folder, "qwen2", letters_state(), max_new_tokens=40)
        answer = session.send("what is a fern?")
        for _ in range(pieces):
            next(answer)
        answer.close()
        held = session._live.begun().tokens, list(session._live._held)
        return held, session.ask("and a moss?"), bits_of(session)

    whole = remembering(tmp_path / "warm", "qwen2", letters_state(), max_new_tokens=40)
    whole.ask("what is a fern?")
    for pieces in (3, 5, 8):
        cold, warm = cut_off(tmp_path / str(pieces), pieces), cut_off(tmp_path / "warm", pieces)
        assert cold[:2] == warm[:2]
        assert all(torch.equal(one, other) for one, other in zip(cold[2], warm[2], strict=True))
