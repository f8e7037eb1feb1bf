"""A conversation goes on after a restart as if it had never been closed, or is refused by name."""

import os
from dataclasses import replace

import pytest
import torch

from lowvram_lab.chat.session import ChatSession
from lowvram_lab.engine.load import replan
from lowvram_lab.errors import LowvramError
from lowvram_lab.prefixes.block_file import IDS
from lowvram_lab.prefixes.saved import opened, save_cache
from lowvram_lab.prefixes.store import Remember
from tests.helpers.tiny import TINY, letters_state, tiny_tokenizer
from tests.prefixes.test_bits import loaded_tiny


def chat(model, **options):
    return ChatSession(model, tiny_tokenizer(), system="You keep plants.", max_new_tokens=40, **options)


@pytest.mark.parametrize("kind", TINY)
@pytest.mark.parametrize("kv_format", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("placement", ["gpu", "half", "disk"])
def test_it_goes_on_to_the_bit(kind, kv_format, placement, tmp_path):
    options = {"placement": placement, "kv_format": kv_format, "ram": None, "disk": None}
    session = chat(loaded_tiny(kind, **options))
    session.ask("what is a fern?")
    size = session.save(tmp_path / "ferns.chat")
    assert size == (tmp_path / "ferns.chat").stat().st_size
    again = ChatSession.load(tmp_path / "ferns.chat", loaded_tiny(kind, **options), tiny_tokenizer(), max_new_tokens=40)
    assert again.history == session.history
    assert again.ask("and a moss?") == session.ask("and a moss?")
    assert again.turns[0].cached_tokens == session.turns[1].cached_tokens >= 60
    caches = [each._live.begun().cache for each in (session, again)]
    for one, other in zip(*(cache.held for cache in caches), strict=True):
        tokens = caches[0].get_seq_length()
        for name, tensor in one.beginning(tokens).items():
            assert torch.equal(tensor, other.beginning(tokens)[name])


def test_nobody_else_may_read_it(tmp_path):
    session = chat(loaded_tiny("llama", ram=None, disk=None))
    session.ask("what is a fern?")
    session.save(tmp_path / "a.chat")
    session.save(tmp_path / "a.chat")  # in the place of the one before
    assert os.stat(tmp_path / "a.chat").st_mode & 0o777 == 0o600
    assert [file.name for file in tmp_path.iterdir()] == ["a.chat"]


def test_nothing_to_save_is_said(tmp_path):
    with pytest.raises(LowvramError, match="one answer or more"):
        chat(loaded_tiny("llama", ram=None, disk=None)).save(tmp_path / "a.chat")


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"kind": "qwen2"}, "config"),
        ({"recipe": "int8"}, "formats"),
        ({"kv_format": "int8"}, "kv_format"),
    ],
)
def test_another_model_or_plan_is_refused_by_name_and_can_read_it_again(other, named, tmp_path):
    session = chat(loaded_tiny("llama", ram=None, disk=None))
    session.ask("what is a fern?")
    session.save(tmp_path / "a.chat")
    model = loaded_tiny(**{"kind": "llama", "ram": None, "disk": None, **other})
    with pytest.raises(LowvramError, match=rf"a\.chat: saved from .*\({named}: .*read_again=True"):
        ChatSession.load(tmp_path / "a.chat", model, tiny_tokenizer())
    again = ChatSession.load(tmp_path / "a.chat", model, tiny_tokenizer(), read_again=True)
    assert again.history == session.history
    assert again.ask("and a moss?") is not None
    assert again.turns[0].cached_tokens == 0


def test_a_shorter_context_is_refused(tmp_path):
    model = loaded_tiny("llama", ram=None, disk=None)
    session = chat(model)
    session.ask("what is a fern?" * 10)
    session.save(tmp_path / "a.chat")
    replan(model, replace(model.lowvram.plan, context=64), progress=False)
    with pytest.raises(LowvramError, match="the plan a context of 64"):
        ChatSession.load(tmp_path / "a.chat", model, tiny_tokenizer())


@pytest.mark.parametrize("read_again", [False, True])
@pytest.mark.parametrize("at", [3, 20, 300, -1000, -1])
def test_a_damaged_one_is_refused(at, read_again, tmp_path):
    model = loaded_tiny("llama", ram=None, disk=None)
    session = chat(model)
    session.ask("what is a fern?")
    session.save(tmp_path / "a.chat")
    data = bytearray((tmp_path / "a.chat").read_bytes())
    data[at] ^= 64
    (tmp_path / "a.chat").write_bytes(data)
    with pytest.raises(LowvramError, match=r"a\.chat: "):
        ChatSession.load(tmp_path / "a.chat", model, tiny_tokenizer(), read_again=read_again)


def test_what_is_no_conversation_is_refused(tmp_path):
    model = loaded_tiny("llama", ram=None, disk=None)
    (tmp_path / "a.chat").write_text("hello")
    for name in ("a.chat", "none.chat", "."):
        with pytest.raises(LowvramError, match="expected a conversation that was saved"):
            ChatSession.load(tmp_path / name, model, tiny_tokenizer())


@pytest.mark.parametrize("read_again", [False, True])
def test_a_history_longer_than_a_header_is_opened_again(read_again, tmp_path):
    model = loaded_tiny("llama", ram=None, disk=None)
    session = chat(model)
    session.ask("what is a fern?")
    session.history[1:1] = [{"role": "user", "content": "é" * (1 << 19)}, {"role": "assistant", "content": "yes"}]
    assert session.save(tmp_path / "a.chat") > 1 << 20
    again = ChatSession.load(tmp_path / "a.chat", model, tiny_tokenizer(), read_again=read_again)
    assert again.history == session.history


def without(said, name):
    return {key: value for key, value in said.items() if key != name}


SAID_OTHERWISE = {
    "a list": lambda said: [said],
    "nothing": lambda said: {},
    "no history": lambda said: without(said, "history"),
    "messages of another kind": lambda said: {**said, "history": [["user", "hello"]]},
    "no turn": lambda said: without(said, "turn"),
    "no dropped turns": lambda said: without(said, "dropped_turns"),
    "fewer than no dropped turns": lambda said: {**said, "dropped_turns": -1},
    "arguments that are a list": lambda said: {**said, "template_arguments": ["a"]},
    "a turn that is a list": lambda said: {**said, "turn": [1, 2]},
    "a turn with a key more": lambda said: {**said, "turn": {**said["turn"], "seconds": 1}},
    "a turn with a key fewer": lambda said: {**said, "turn": without(said["turn"], "rendered")},
    "a turn of texts": lambda said: {**said, "turn": {**said["turn"], "answer": "yes"}},
}


@pytest.mark.parametrize("change", SAID_OTHERWISE.values(), ids=SAID_OTHERWISE)
def test_what_another_version_said_is_refused_in_one_line(change, tmp_path):
    model = loaded_tiny("llama", ram=None, disk=None)
    session = chat(model)
    session.ask("what is a fern?")
    session.save(tmp_path / "a.chat")
    live = session._live
    save_cache(tmp_path / "a.chat", model, live.begun().cache, live._held, change(opened(tmp_path / "a.chat").said))
    for read_again in (False, True):
        with pytest.raises(LowvramError, match=r"^[^\n]*a\.chat: expected a [^\n]*$"):
            ChatSession.load(tmp_path / "a.chat", model, tiny_tokenizer(), read_again=read_again)


def test_a_file_of_another_model_leaves_the_chat_that_is_open_as_it_is(tmp_path):
    other = chat(loaded_tiny("qwen2", ram=None, disk=None))
    other.ask("what is a fern?")
    other.save(tmp_path / "other.chat")
    model = loaded_tiny("llama", ram=None, disk=None)
    session = chat(model)
    session.ask("what is a fern?")
    decoder, plan = session._live._decoder, model.lowvram.plan
    with pytest.raises(LowvramError, match="saved from tiny-qwen2 where other things held"):
        ChatSession.load(tmp_path / "other.chat", model, tiny_tokenizer(), remember="64MiB")
    assert session._live._decoder is decoder and not decoder.released and model.lowvram.plan == plan


def test_what_cannot_be_saved_or_opened_is_one_line(tmp_path):
    model = loaded_tiny("llama", ram=None, disk=None)
    session = chat(model)
    session.ask("what is a fern?")
    with pytest.raises(LowvramError, match="no file is called that"):
        session.save(tmp_path / "a\0.chat")
    with pytest.raises(LowvramError, match="expected a conversation that was saved"):
        ChatSession.load(tmp_path / "a\0.chat", model, tiny_tokenizer())
    history = session.history
    session.history = [*history, {"role": "user", "content": "x", "more": object()}]
    with pytest.raises(LowvramError, match=r"^expected a conversation of plain data, found another \("):
        session.save(tmp_path / "a.chat")
    session.history = [*history, {"role": "user", "content": [{"text": "x"}]}]
    with pytest.raises(LowvramError, match="expected a conversation's messages"):
        session.save(tmp_path / "a.chat")
    assert not list(tmp_path.iterdir())


def test_a_link_of_the_users_own_is_followed(tmp_path):
    model = loaded_tiny("llama", ram=None, disk=None)
    session = chat(model)
    session.ask("what is a fern?")
    session.save(tmp_path / "a.chat")
    (tmp_path / "latest.chat").symlink_to(tmp_path / "a.chat")
    assert ChatSession.load(tmp_path / "latest.chat", model, tiny_tokenizer()).history == session.history


def test_a_card_needs_room_for_a_few_tokens_alone(tmp_path):
    """Whole layers at once would take what no forecast has."""
    model = loaded_tiny("llama", "gpu", ram=None, disk=None)
    session = chat(model)
    session.ask("what is a fern? " * 30)
    gpu, cache = model.lowvram.gpu, session._live.begun().cache
    layer = max(view.nbytes for view in cache.held[0].beginning(cache.get_seq_length()).values())
    held = gpu.meter.allocated["gpu"]
    gpu.reset_peak()
    session.save(tmp_path / "a.chat")
    saved = opened(tmp_path / "a.chat")
    cache.keep(0)
    session._live.open(saved)
    assert 0 < gpu.peak_allocated_bytes - held < layer / 2


def test_a_folder_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    session = chat(loaded_tiny("llama", ram=None, disk=None))
    session.ask("what is a fern?")
    for path in (".", "", "..", "/", tmp_path):
        with pytest.raises(LowvramError, match=r"^cannot write [^\n]*: it is a folder[^\n]*$"):
            session.save(path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kv_format", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("tokens", [20, 0])
def test_ids_that_the_cache_does_not_hold_are_never_written(kv_format, tokens, tmp_path):
    model = loaded_tiny("llama", kv_format=kv_format, ram=None, disk=None)
    session = chat(model)
    session.ask("what is a fern?")
    live = session._live
    with pytest.raises(LowvramError, match="that the cache holds"):
        save_cache(tmp_path / "a.chat", model, live.begun().cache, [*live._held, 1], {})
    live.begun().cache.keep(tokens)  # as a restore that was interrupted leaves it
    session.save(tmp_path / "a.chat")
    again = ChatSession.load(tmp_path / "a.chat", model, tiny_tokenizer(), max_new_tokens=40)
    assert again._live._held == live._held == session._said.prompt[:tokens]
    assert again.ask("and a moss?") == session.ask("and a moss?")
    assert again.turns[0].cached_tokens == tokens


@pytest.mark.parametrize("kv_format", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("remembers", [False, True])
@pytest.mark.parametrize("system", ["You keep plants.", "zebras only"])
def test_what_was_read_beside_it_is_not_in_its_file(kv_format, remembers, system, tmp_path):
    model = loaded_tiny("llama", kv_format=kv_format, ram=None, disk=None)
    remember = Remember(disk="64MiB", folder=tmp_path / "prefixes") if remembers else None
    session = chat(model, remember=remember)
    session.ask("what is a fern? " * 20)
    with session.beside([{"role": "system", "content": system}]):
        session.ask("my secret is 1234 " * 20)
    said = session._said.prompt + session._said.answer
    assert session._live._held != said[: len(session._live._held)]
    session.save(tmp_path / "a.chat")
    kept = opened(tmp_path / "a.chat").tensors[IDS].tolist()
    assert kept == session._live._held == said[: len(kept)]
    assert session._live.begun().cache.get_seq_length() == len(kept)
    assert not remembers or len(kept) >= 128  # its blocks were put back
    again = ChatSession.load(tmp_path / "a.chat", model, tiny_tokenizer(), max_new_tokens=40, remember=remember)
    assert again.ask("and a moss?") == session.ask("and a moss?")
    assert again.history == session.history


def test_one_that_remembered_opens_where_nothing_is_remembered_and_the_other_way_round(tmp_path):
    model = loaded_tiny("qwen2", ram=None, disk=None, state=letters_state())
    wanted = Remember(disk="64MiB", folder=tmp_path / "prefixes")
    for first, then in ((wanted, None), (None, wanted)):
        session = chat(model, remember=first)
        session.ask("what is a fern? " * 20)
        session.save(tmp_path / "a.chat")
        held = session._live.begun().tokens
        again = ChatSession.load(tmp_path / "a.chat", model, tiny_tokenizer(), max_new_tokens=40, remember=then)
        again.ask("and a moss?")
        assert again.turns[0].cached_tokens >= held
