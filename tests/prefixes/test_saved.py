"""A conversation goes on after a restart as if it had never been closed, or is refused by name."""

import os
from dataclasses import replace

import pytest
import torch

from lowvram_lab.chat.session import ChatSession
from lowvram_lab.engine.load import replan
from lowvram_lab.errors import LowvramError
from tests.helpers.tiny import TINY, tiny_tokenizer
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
    opened = ChatSession.load(
        tmp_path / "ferns.chat", loaded_tiny(kind, **options), tiny_tokenizer(), max_new_tokens=40
    )
    assert opened.history == session.history
    assert opened.ask("and a moss?") == session.ask("and a moss?")
    assert opened.turns[0].cached_tokens == session.turns[1].cached_tokens >= 60
    caches = [each._live.begun().cache for each in (session, opened)]
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


@pytest.mark.parametrize("at", [3, 20, 300, -1000, -1])
def test_a_damaged_one_is_refused(at, tmp_path):
    model = loaded_tiny("llama", ram=None, disk=None)
    session = chat(model)
    session.ask("what is a fern?")
    session.save(tmp_path / "a.chat")
    data = bytearray((tmp_path / "a.chat").read_bytes())
    data[at] ^= 64
    (tmp_path / "a.chat").write_bytes(data)
    with pytest.raises(LowvramError, match=r"a\.chat: "):
        ChatSession.load(tmp_path / "a.chat", model, tiny_tokenizer())


def test_what_is_no_conversation_is_refused(tmp_path):
    model = loaded_tiny("llama", ram=None, disk=None)
    (tmp_path / "a.chat").write_text("hello")
    for name in ("a.chat", "none.chat", "."):
        with pytest.raises(LowvramError, match="expected a saved conversation"):
            ChatSession.load(tmp_path / name, model, tiny_tokenizer())
