"""Prompts that are read before anybody asks: nothing else changes, neither answers nor the chat that was held."""

import pytest
import torch

from lowvram_lab.chat.dialogues import Dialogue, read_dialogues, warm
from lowvram_lab.chat.prompt import chat_ids, opening_ids
from lowvram_lab.chat.session import ChatSession
from lowvram_lab.engine.load import load
from lowvram_lab.errors import BudgetError, LowvramError
from lowvram_lab.memory.cuda import open_gpu
from lowvram_lab.prefixes.store import Remember
from lowvram_lab.sampling import Sampling
from tests.helpers.tiny import DictCheckpoint, letters_state, tiny_plan, tiny_tokenizer

SYSTEM = "You are a keeper of plants. " * 20
DOCUMENT = "Ferns like shade. " * 10


def session_in(folder, disk="64MiB", ram=None, **options):
    plan = tiny_plan("qwen2", context=1024)
    model = load(plan, open_gpu(), checkpoint=DictCheckpoint(letters_state()), progress=False)
    wanted = Remember(disk=disk, ram=ram, folder=folder)
    return ChatSession(model, tiny_tokenizer(), max_new_tokens=8, progress=False, remember=wanted, **options)


def system(text):
    return {"role": "system", "content": text}


def user(text):
    return {"role": "user", "content": text}


BEGINNINGS = ([], [system("a")], [system("a"), user("b "), {"role": "assistant", "content": "c"}])


@pytest.mark.parametrize("messages", BEGINNINGS)
def test_all_chats_that_begin_so_have_what_they_begin_with(messages):
    tokenizer = tiny_tokenizer()
    begun = opening_ids(tokenizer, messages)
    for question in ("fern", "Why?", "7", " "):
        assert chat_ids(tokenizer, [*messages, user(question)])[: len(begun)] == begun
    assert tokenizer.decode(begun).endswith("<|im_start|>user\n")


def test_a_user_goes_on_behind_a_document():
    tokenizer = tiny_tokenizer()
    dialogue = Dialogue(system="a", document=DOCUMENT)
    assert dialogue.messages == [system("a"), user(f"{DOCUMENT}\n\n")]
    begun = opening_ids(tokenizer, dialogue.messages)
    asked = Dialogue(system="a", document=DOCUMENT, question="why?")
    assert chat_ids(tokenizer, [*asked.before, user(asked.message)])[: len(begun)] == begun
    assert tokenizer.decode(begun).endswith(f"{DOCUMENT}\n\n")


def test_a_chat_answers_the_same_sooner(tmp_path):
    dialogues = [Dialogue(system=SYSTEM), Dialogue(system=SYSTEM, document=DOCUMENT)]
    message = Dialogue(document=DOCUMENT, question="why?").message
    cold = session_in(tmp_path / "cold", system=SYSTEM)
    expected = cold.ask(message)
    table = warm(session_in(tmp_path / "warm"), dialogues, progress=False)
    assert list(table["prompt"]) == [1, 2] and (table["blocks_without_room"] == 0).all()
    warmed = session_in(tmp_path / "warm", system=SYSTEM)
    assert warmed.ask(message) == expected
    assert warmed.turns[0].remembered_tokens == table["tokens"].max() // 128 * 128 > 0
    assert cold.turns[0].remembered_tokens == 0 and len(expected) == 8


def test_the_chat_that_was_held_goes_on_as_it_was(tmp_path, monkeypatch):
    session = session_in(tmp_path, system="You are brief.", sampling=Sampling(temperature=1.0, seed=3))
    session.ask("what is a fern?")
    history, sampling = list(session.history), session.sampling
    greedy = session_in(tmp_path / "other", system=SYSTEM).ask("and a moss?")
    warm(session, [Dialogue(system=SYSTEM, question="and a moss?")], progress=False)
    assert session.history == history and session.sampling == sampling
    assert session.ask("and a moss?") != greedy  # sampled, and of another chat
    assert session.history[:3] == history and len(session.history) == 5
    answered = ChatSession.ask

    def heard(self, text):
        heard.answers.append(answered(self, text))

    heard.answers = []
    monkeypatch.setattr(ChatSession, "ask", heard)
    warm(session, [Dialogue(system=SYSTEM, question="and a moss?")], progress=False)
    assert heard.answers == [greedy]


def test_a_question_is_answered_unless_it_has_an_answer(tmp_path):
    session = session_in(tmp_path)
    asked, answered = Dialogue(question="what is a fern?"), Dialogue(question="what is a moss?", answer="a plant")
    assert asked.asks and not answered.asks
    table = warm(session, [asked, answered], progress=False)
    verifies = session._live.begun().most_tokens > 1
    tokens = session.tokenizer("a plant", add_special_tokens=False)["input_ids"]
    assert list(table["answer_tokens"]) == [session.turns[0].new_tokens if verifies else 0, len(tokens)]
    assert len(session.turns) == 1


def test_what_is_remembered_is_not_read_again(tmp_path):
    first, second = (session_in(tmp_path).read([system(SYSTEM)]) for _ in range(2))
    assert first.cached_tokens == first.remembered_tokens == 0 and first.blocks_added == first.tokens // 128
    assert second.cached_tokens == second.remembered_tokens == second.tokens // 128 * 128
    assert second.blocks_added == second.blocks_without_room == 0


def test_prompts_of_whole_blocks_are_remembered_to_the_last(tmp_path):
    session = session_in(tmp_path)
    fixed = len(session.beginning([system("")]))
    said = [system("x" * (256 - fixed))]
    assert len(session.beginning(said)) == 256
    assert session.read(said).blocks_added == 2
    assert session_in(tmp_path).read(said).cached_tokens == 256


def test_what_is_pinned_stays(tmp_path):
    session = session_in(tmp_path, disk="300KiB")
    kept = session.read([system(SYSTEM[:200])], pin=True)
    assert kept.blocks_added == 1
    for letter in "abc":
        session.read([system(letter * 300)])
    assert session_in(tmp_path, disk="300KiB").read([system(SYSTEM[:200])]).remembered_tokens == 128


def test_in_ram_alone_prompts_are_read_but_none_is_pinned(tmp_path):
    session = session_in(None, disk=None, ram="1MiB")
    assert session.read([system(SYSTEM)]).blocks_added > 0
    assert session.explain("hello").places == ()
    session.history = [system(SYSTEM)]
    found = session.explain("hello")
    assert set(found.places) == {"RAM"} and "in RAM" in found.text and "on disk" not in found.text
    with pytest.raises(LowvramError, match="on disk"):
        session.read([system(SYSTEM)], pin=True)


def test_a_session_that_remembers_nothing_refuses(tmp_path):
    session = session_in(None, disk=None)
    for act in (lambda: session.read("hello"), lambda: session.explain("hello")):
        with pytest.raises(LowvramError, match="expected a session that remembers prompts"):
            act()


def test_what_is_longer_than_the_context_is_refused_before_anything_is_read(tmp_path):
    session = session_in(tmp_path)
    with pytest.raises(BudgetError, match="prompt 2: these messages take .* context is 1024"):
        warm(session, [Dialogue(system=SYSTEM), Dialogue(system=SYSTEM * 3)], progress=False)
    assert not list(tmp_path.glob("*.safetensors")) and session.history == []


def test_a_full_card_steps_down_and_goes_on(tmp_path, monkeypatch):
    session = session_in(tmp_path)
    decoder, failed = session._live.begun(), []

    def full(ids):
        failed.append(ids.shape[1])
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(decoder, "prefill", full)
    done = session.read([system(SYSTEM)])
    assert failed == [done.tokens // 128 * 128] and session._live.given_up
    assert done.blocks_added == done.tokens // 128


def test_a_reading_that_is_cut_off_leaves_a_session_that_answers(tmp_path, monkeypatch):
    session = session_in(tmp_path, system=SYSTEM)
    expected = session_in(tmp_path / "other", system=SYSTEM).ask("hello")
    decoder, calls = session._live.begun(), []
    prefill = decoder.prefill

    def interrupted(ids):
        calls.append(prefill(ids[:, :128]))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(decoder, "prefill", interrupted)
        with pytest.raises(KeyboardInterrupt):
            session.read("hello")
    assert calls and session.ask("hello") == expected
    assert session.turns[0].cached_tokens == 0


def test_an_explanation_is_a_text_data_and_html(tmp_path):
    session_in(tmp_path).read([system(SYSTEM)])
    session = session_in(tmp_path, system=SYSTEM[:300] + "<b>" + SYSTEM[303:])
    found = session.explain("hello")
    assert found.hit_tokens == 256 and found.differs_text == "<"
    assert found.to_dict()["places"] == ["disk", "disk"]
    assert f"token {found.differs_at} is another" in found.text
    assert "'<'" in found.text and "&lt;" in found._repr_html_()


def test_lines_are_read_as_they_stand(tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_text('{"document": "a\u2028b"}\r\n{"question": "q", "answer": "a"}\n\n', encoding="utf-8")
    assert read_dialogues(file) == [Dialogue(document="a\u2028b"), Dialogue(question="q", answer="a")]
