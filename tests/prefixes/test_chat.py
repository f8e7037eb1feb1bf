"""A chat that remembers: same answers, sooner; and nothing it answers depends on what is remembered."""

import hashlib
import json
from dataclasses import replace

import pytest
import torch

from lowvram_lab.chat.session import ChatSession
from lowvram_lab.engine.load import replan
from lowvram_lab.errors import UnitError
from lowvram_lab.prefixes.store import Remember
from lowvram_lab.sampling import Sampling
from tests.helpers.tiny import letters_state, tiny_tokenizer
from tests.prefixes.test_bits import loaded_tiny

SYSTEM = "You are a keeper of plants. " * 20


def said(session, question):
    """An answer, and the bits of all keys and values behind it: a tiny model's words say little of what it has read."""
    answer, cache = session.ask(question), session._live.begun().cache
    views = [view for layer in cache.held for view in layer.span(0, cache.get_seq_length()).values()]
    return answer, hashlib.sha256(torch.cat([view.flatten() for view in views]).view(torch.uint8).numpy()).hexdigest()


def chat(folder, *questions, kind="llama", salt="", state=None, **options):
    model = loaded_tiny(kind, ram=None, disk=None, state=state)
    wanted = Remember(disk="64MiB", salt=salt, folder=folder)
    session = ChatSession(model, tiny_tokenizer(), system=SYSTEM, max_new_tokens=20, remember=wanted, **options)
    return [said(session, question) for question in questions], session


def test_another_process_need_not_read_what_is_remembered(tmp_path):
    cold, first = chat(tmp_path, "what is a fern?")
    warm, second = chat(tmp_path, "what is a fern?")
    assert cold == warm
    assert first.turns[0].remembered_tokens == 0
    whole = first.turns[0].prompt_tokens // 128 * 128
    assert second.turns[0].remembered_tokens == second.turns[0].cached_tokens == whole


def test_a_turn_says_why_no_more_was_remembered(tmp_path):
    _, first = chat(tmp_path, "what is a fern? " * 10)
    assert first.turns[0].missed == "not read before"
    first.history = first.history[:1]
    first.ask("what is a fern? " * 10)
    assert first.turns[1].missed is None
    _, other = chat(tmp_path, "what is a moss? " * 10)
    assert other.turns[0].remembered_tokens and other.turns[0].missed == "not read before"
    model = loaded_tiny("llama", ram=None, disk=None, kv_format="int8")
    session = ChatSession(model, tiny_tokenizer(), system=SYSTEM, remember=Remember(disk="64MiB", folder=tmp_path))
    session.ask("what is a fern? " * 10)
    assert session.turns[0].missed == "kv_format: bf16 then, int8 now"


def test_two_chats_of_one_model_answer_by_turns_whatever_each_remembers(tmp_path):
    model = loaded_tiny("llama", ram=None, disk=None, state=letters_state())
    options = {"system": SYSTEM, "max_new_tokens": 12}
    asks = ChatSession(model, tiny_tokenizer(), remember=Remember(disk="64MiB", folder=tmp_path), **options)
    plain = ChatSession(model, tiny_tokenizer(), **options)
    alone = said(ChatSession(model, tiny_tokenizer(), **options), "what is a fern?")
    pieces = asks.send("what is a fern?")
    begun = next(pieces)
    assert said(plain, "what is a fern?") == alone
    answer = begun + "".join(pieces)
    again = ChatSession(model, tiny_tokenizer(), remember=Remember(disk="64MiB", folder=tmp_path / "b"), **options)
    assert answer == again.ask("what is a fern?") and asks.turns[0].new_tokens == again.turns[0].new_tokens
    assert model.lowvram.plan.remember is None


def test_a_size_that_cannot_be_read_is_named(tmp_path):
    model = loaded_tiny("llama", ram=None, disk=None)
    for wanted, name in ((Remember(disk="lots"), "remember"), (Remember(ram="2Gb"), "remember_ram")):
        with pytest.raises(UnitError, match=f"^{name}: "):
            ChatSession(model, tiny_tokenizer(), remember=wanted)


def test_answers_do_not_depend_on_what_is_remembered(tmp_path):
    questions = ["what is a fern?", "and a moss?", "what is a fern?"]
    apart = [chat(tmp_path / str(at), *questions)[0] for at in range(2)]
    again = chat(tmp_path / "0", *questions)[0]
    assert apart[0] == apart[1] == again
    assert len({bits for _, bits in again}) == 3


def test_another_question_in_the_same_chat_goes_on_from_a_whole_block(tmp_path):
    _, session = chat(tmp_path, "what is a fern?")
    session.history = session.history[:1]
    again = said(session, "what is a moss?")
    cold, _ = chat(tmp_path / "other", "what is a moss?")
    assert [again] == cold
    assert session.turns[-1].cached_tokens % 128 == 0


def test_salts_share_nothing(tmp_path):
    one, _ = chat(tmp_path, "what is a fern?", salt="one")
    other, session = chat(tmp_path, "what is a fern?", salt="other")
    assert one == other
    assert session.turns[0].remembered_tokens == 0
    again, session = chat(tmp_path, "what is a fern?", salt="one")
    assert session.turns[0].remembered_tokens > 0


def test_what_was_put_back_keeps_its_worth_and_is_not_added(tmp_path):
    def worth():
        return json.loads((tmp_path / "index.json").read_text())["worth"]

    def session(ram):
        model, wanted = loaded_tiny("llama", ram=None, disk=None), Remember(disk="64MiB", ram=ram, folder=tmp_path)
        return ChatSession(model, tiny_tokenizer(), system=SYSTEM, max_new_tokens=4, remember=wanted)

    session(None).ask("what is a fern?")
    cold = worth()
    assert len(cold) == 4 and all(cold.values())
    for ram in (None, "8MiB"):
        warm = session(ram)
        for _ in range(2):  # from disk, and from where it was put meanwhile
            warm.history = warm.history[:1]
            warm.ask("what is a fern?")
        assert worth() == pytest.approx(cold, rel=1e-4)  # a file has six digits
        done = session(ram).read("what is a fern?")
        assert done.blocks_added == 0 and done.remembered_tokens == 512


def test_a_prompt_that_is_answered_with_nothing_is_remembered_too(tmp_path):
    session = chat(tmp_path)[1]
    session._stop_ids = frozenset(range(320))
    assert session.ask("what is a fern?") == ""
    assert session.turns[0].new_tokens == 0
    _, again = chat(tmp_path, "what is a fern?")
    assert again.turns[0].remembered_tokens == 512


def test_sampled_answers_too(tmp_path):
    sampling = Sampling(temperature=1.0, seed=3)
    cold, _ = chat(tmp_path, "what is a fern?", sampling=sampling)
    warm, session = chat(tmp_path, "what is a fern?", sampling=sampling)
    assert cold == warm
    assert session.turns[0].remembered_tokens


def test_an_explanation_says_why_a_chat_is_no_longer_what_it_was(tmp_path):
    _, session = chat(tmp_path, "what is a fern?", kind="qwen2", state=letters_state())
    assert session.explain("and a moss?").drift is None
    session.history[1] = {"role": "user", "content": "what is a fir?"}
    found = session.explain("and a moss?")
    assert "the messages themselves differ (message 2, user)" in found.drift
    assert found.drift in found.text


def test_a_chat_that_does_not_ask_remembers_nothing_and_disturbs_none_that_does(tmp_path, monkeypatch):
    monkeypatch.setenv("LOWVRAM_CACHE", str(tmp_path / "cache"))
    model = loaded_tiny("llama", ram=None, disk=None)
    asks = ChatSession(model, tiny_tokenizer(), remember=Remember(disk="64MiB", folder=tmp_path / "asks"))
    asks.ask("what is a fern? " * 20)
    plain = ChatSession(model, tiny_tokenizer())
    plain.ask("what is a fern? " * 20)
    assert plain._live.prompts is None
    assert not (tmp_path / "cache" / "prefixes").exists()
    asks.history = []
    asks.ask("what is a fern? " * 20)
    assert asks.turns[-1].cached_tokens == 256 and asks.turns[-1].remembered_tokens == 0  # its KV cache held them
    replan(model, replace(model.lowvram.plan, remember=1 << 26), progress=False)
    assert ChatSession(model, tiny_tokenizer())._live.prompts is not None


def test_reading_goes_on_from_whole_blocks_behind_an_answer_too(tmp_path):
    _, session = chat(tmp_path / "one", "what is a fern?", kind="qwen2", state=letters_state())
    longer = "and a moss? " * 30
    done = session.read(longer)
    assert done.blocks_added >= 2
    cold, other = chat(tmp_path / "two", "what is a fern?", kind="qwen2", state=letters_state())
    assert other.explain(longer).hit_tokens <= session.explain(longer).hit_tokens - 256
    del cold


def test_what_was_on_disk_is_kept_in_ram_too(tmp_path):
    chat(tmp_path, "what is a fern?")
    model = loaded_tiny("llama", ram=None, disk=None)
    wanted = Remember(disk="64MiB", ram="8MiB", folder=tmp_path)
    session = ChatSession(model, tiny_tokenizer(), system=SYSTEM, max_new_tokens=20, remember=wanted)
    for place in ("disk", "RAM"):
        assert set(session.explain("what is a fern?").places) == {place}
        session.ask("what is a fern?")
        session.history = session.history[:1]
