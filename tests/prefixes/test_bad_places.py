"""A chat answers the same, whatever became of the folder in which it remembers, and says what is wrong in one line."""

import os
import resource
import shutil

import pytest

from lowvram_lab.chat.session import ChatSession
from lowvram_lab.errors import LowvramError, PlanError
from lowvram_lab.prefixes import store as store_module
from lowvram_lab.prefixes.layout import Layout
from lowvram_lab.prefixes.store import Remember
from tests.helpers.tiny import letters_state, tiny_tokenizer
from tests.prefixes.test_bits import loaded_tiny
from tests.prefixes.test_chat import SYSTEM, said

QUESTIONS = ("what is a fern?", "and a moss?", "what is a fern?")


def session(folder, disk="64MiB", system=SYSTEM, state=None):
    kind = "qwen2" if state else "llama"
    model = loaded_tiny(kind, ram=None, disk=None, state=state)
    wanted = Remember(disk=disk, folder=folder)
    options = {"max_new_tokens": 12, "progress": False}
    return ChatSession(model, tiny_tokenizer(), system=system, remember=wanted, **options)


@pytest.fixture(scope="module")
def cold(tmp_path_factory):
    chat = session(tmp_path_factory.mktemp("cold") / "prefixes")
    return [said(chat, question) for question in QUESTIONS]


@pytest.fixture
def folder(tmp_path):
    """One in which a chat remembered its prompts."""
    chat = session(tmp_path / "prefixes")
    chat.ask(QUESTIONS[0])
    return tmp_path / "prefixes"


def removed(folder):
    shutil.rmtree(folder)


def a_file(folder):
    shutil.rmtree(folder)
    folder.touch()


def open_to_others(folder):
    folder.chmod(0o755)


def links(folder):
    for file in folder.glob("*.safetensors"):
        file.rename(folder.parent / file.name)
        file.symlink_to(folder.parent / file.name)


def folders(folder):
    for file in folder.glob("*.safetensors"):
        file.unlink()
        file.mkdir()


def pipes(folder):
    for file in folder.glob("*.safetensors"):
        file.unlink()
        os.mkfifo(file)


def emptied(folder):
    for file in folder.iterdir():
        file.write_bytes(b"")


def another_clock(folder):
    for at, file in enumerate(folder.iterdir()):
        os.utime(file, (at % 2 * 2**32, at % 2 * 2**32))


FATES = {"removed": removed, "a file": a_file, "open to others": open_to_others, "links": links, "folders": folders}
FATES |= {"pipes": pipes, "emptied": emptied, "another clock": another_clock}


@pytest.mark.parametrize("fate", FATES)
def test_whatever_becomes_of_the_folder_a_chat_goes_on(fate, folder, cold, caplog):
    chat = session(folder)
    FATES[fate](folder)
    answers = [said(chat, QUESTIONS[0])]
    if fate in ("removed", "emptied", "another clock"):  # and again
        FATES[fate](folder)
    answers += [said(chat, question) for question in QUESTIONS[1:]]
    assert answers == cold
    assert all("\n" not in message for message in caplog.messages)
    assert len(caplog.messages) <= 2
    hit = chat.turns[0].remembered_tokens
    assert (hit > 256) == (fate in ("another clock", "open to others"))  # what is there is this user's all the same


@pytest.mark.parametrize("fate", ["links", "pipes", "emptied", "removed"])
def test_the_next_chat_finds_it_mended(fate, folder, cold):
    FATES[fate](folder)
    assert said(session(folder), QUESTIONS[0]) == cold[0]
    chat = session(folder)
    assert said(chat, QUESTIONS[0]) == cold[0]
    assert chat.turns[0].remembered_tokens > 256


def test_a_full_disk_is_one_line_and_the_same_answer(tmp_path, cold, caplog):
    chat, before = session(tmp_path / "prefixes"), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        answers = [said(chat, question) for question in QUESTIONS]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert answers == cold
    assert len([message for message in caplog.messages if "not remembered: File too large" in message]) == 1
    assert not list((tmp_path / "prefixes").glob("*partial"))
    assert not list((tmp_path / "prefixes").glob(".*partial"))


@pytest.mark.parametrize("disk", ["1KiB", 1, 98_303])
def test_a_budget_below_a_block_is_refused_in_one_line(disk, tmp_path):
    with pytest.raises(PlanError, match=r"^remember: a block of 128 tokens takes 96\.0 KiB[^\n]*found room for[^\n]*$"):
        session(tmp_path / "prefixes", disk)
    assert not (tmp_path / "prefixes").exists()


def test_a_folder_that_others_can_open_is_refused_before_the_first_answer(tmp_path):
    (tmp_path / "prefixes").mkdir(mode=0o755)
    with pytest.raises(LowvramError, match=r"^[^\n]*chmod 700[^\n]*$"):
        session(tmp_path / "prefixes")


@pytest.mark.parametrize("become", ["open to others", "without weights"])
def test_a_decoder_made_anew_within_a_chat_goes_on_without(become, folder, cold, monkeypatch, caplog):
    """As after a step down: what stops a chat from remembering at its beginning does not stop it later."""
    chat = session(folder)
    assert said(chat, QUESTIONS[0]) == cold[0]
    if become == "open to others":
        folder.chmod(0o755)
    else:

        def gone(*_):
            raise FileNotFoundError(2, "No such file or directory", "model.safetensors")

        monkeypatch.setattr(store_module, "root_of", gone)
    chat._live.forget()
    chat.history = chat.history[:1]
    assert said(chat, QUESTIONS[0]) == cold[0]
    assert chat.turns[-1].remembered_tokens == 0
    assert len(caplog.messages) == 1
    assert "no longer remembered" in caplog.text


def interrupt(monkeypatch, chat, block):
    """Ctrl-C while a prompt is put back, in the middle of a block."""
    put, calls = Layout.put, []

    def interrupted(*arguments):
        calls.append(arguments)
        put(*arguments)
        if len(calls) == block + 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Layout, "put", interrupted)
        with pytest.raises(KeyboardInterrupt):
            chat.ask(QUESTIONS[0])


@pytest.mark.parametrize("block", [0, 2])
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_ctrl_c_while_a_prompt_is_put_back(block, order, tmp_path, monkeypatch):
    """The cache held another prompt, of which it may still hold a part: nobody takes it for the new one's."""
    systems = [SYSTEM, SYSTEM[:300] + "You like stones. " * 20]
    answers = []
    for at, system in enumerate(systems):
        answers.append(said(session(tmp_path / "apart" / str(at), system=system), QUESTIONS[0]))
        said(session(tmp_path / "prefixes", system=system), QUESTIONS[0])
    chat = session(tmp_path / "prefixes", system=systems[0])
    assert said(chat, QUESTIONS[0]) == answers[0]
    chat.history = [{"role": "system", "content": systems[1]}]
    interrupt(monkeypatch, chat, block)
    for at in order:
        chat.history = [{"role": "system", "content": systems[at]}]
        assert said(chat, QUESTIONS[0]) == answers[at]
        assert chat.turns[-1].cached_tokens > 256


def test_after_ctrl_c_the_earlier_chat_goes_on(tmp_path, monkeypatch):
    """Its question begins with all that the cache held, and no longer holds."""
    other = SYSTEM[:300] + "You like stones. " * 20
    chat = session(tmp_path / "prefixes", state=letters_state())
    said(chat, QUESTIONS[0])
    history = list(chat.history)
    chat.history = [{"role": "system", "content": other}]
    said(session(tmp_path / "prefixes", state=letters_state(), system=other), QUESTIONS[0])
    interrupt(monkeypatch, chat, 0)
    fresh = session(tmp_path / "prefixes", state=letters_state())
    chat.history, fresh.history = list(history), list(history)
    assert said(chat, QUESTIONS[1]) == said(fresh, QUESTIONS[1])


def test_ctrl_c_while_a_block_is_written_to_ram(tmp_path, monkeypatch, cold):
    """Its slot is free again, and no other block's bytes are taken for it."""
    chat = session(tmp_path / "prefixes")
    take, calls = Layout.take, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        take(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Layout, "take", interrupted)
        with pytest.raises(KeyboardInterrupt):
            chat.ask(QUESTIONS[0])
    chat.history = chat.history[:1]
    assert said(chat, QUESTIONS[0]) == cold[0]
