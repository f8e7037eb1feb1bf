"""The panel shows what its pure parts say, is heard while it answers, and tells of trouble in words."""

import sys
import threading

import pytest

import lowvram_lab
from lowvram_lab.chat.completion import CompletionSession
from lowvram_lab.chat.provenance import progress_line, token_html
from lowvram_lab.chat.session import ChatSession
from lowvram_lab.decoding.decision import BOTH_PLANES, HIGH_PLANE
from lowvram_lab.errors import LowvramError
from lowvram_lab.faces.precision_panel import RATES, PrecisionPanel, memory_html
from lowvram_lab.planner.planes import PARTS, plane_bytes
from lowvram_lab.units import format_bytes
from tests.helpers.tiny import letters_state, load_tiny, tiny_plan, tiny_tokenizer

WAIT_S = 60


@pytest.fixture(scope="module")
def model():
    return load_tiny("qwen2", tiny_plan("qwen2", "int4+4"), state=letters_state())


def a_session(model, **options):
    return ChatSession(
        model, tiny_tokenizer(), **{"max_new_tokens": 40, "compiled": False, "progress": False, **options}
    )


@pytest.fixture
def panel(model, monkeypatch):
    found = PrecisionPanel(a_session(model))
    monkeypatch.setattr(found.session._live, "_threshold", lambda: 0.3)
    return found


def test_the_button_answers_beside_and_shows_it_in_colours(panel):
    panel.prompt.value = "abc"
    panel.button.click()
    panel.thread.join(WAIT_S)
    session = panel.session
    assert [message["content"] for message in session.history][0] == "abc"
    assert panel.answer.value == token_html(session) != ""
    decoded = session.turns[-1].tokens_per_s
    assert decoded and "40 tokens, " in panel.message.value and "computed by both planes" in panel.message.value
    assert panel.button.description == "Send" and panel.thread is not threading.current_thread()
    assert progress_line(session.decisions, None, session.drafting) in repr(panel)


@pytest.mark.parametrize("precision", ["fast", "precise", "auto"])
def test_every_precision_is_shown_like_its_static_twin(panel, precision):
    panel.precision.value = precision
    assert panel.session.precision == precision
    answer = panel.ask("abcabc")
    assert answer == panel.session.history[-1]["content"]
    assert panel.answer.value == token_html(panel.session)


def test_the_toggle_is_heard_while_it_answers(panel, monkeypatch):
    monkeypatch.setattr("lowvram_lab.faces.precision_panel.REFRESH_S", 0.0)
    seen, turned, show = threading.Event(), threading.Event(), panel._show

    def watched(*given):
        show(*given)
        seen.set()
        assert turned.wait(WAIT_S)

    monkeypatch.setattr(panel, "_show", watched)
    panel.precision.value = "precise"
    panel.button.click()
    assert seen.wait(WAIT_S) and panel.thread.is_alive()
    assert panel.button.description == "Stop" and "tokens" in panel.message.value
    panel.precision.value = "fast"
    turned.set()
    panel.thread.join(WAIT_S)
    by = [decision.by for decision in panel.session.decisions]
    assert by[0] == BOTH_PLANES and by[-1] == HIGH_PLANE and len(by) == 40


def test_the_button_stops_the_answer_on_its_way(panel, monkeypatch):
    monkeypatch.setattr("lowvram_lab.faces.precision_panel.REFRESH_S", 0.0)
    show = panel._show
    monkeypatch.setattr(panel, "_show", lambda *given: (show(*given), panel.button.click()))
    panel.button.click()
    panel.thread.join(WAIT_S)
    assert len(panel.session.decisions) < 10
    assert panel.session.history[-1]["role"] == "assistant"
    monkeypatch.setattr(panel, "_show", show)
    panel.ask("abc")
    assert len(panel.session.decisions) == 40  # the next one goes on to its end


def test_the_flip_rate_is_the_sessions(model, panel):
    assert panel.flip_rate.value == panel.session.flip_rate == 0.01
    panel.flip_rate.value = 0.05
    assert panel.session.flip_rate == 0.05
    session = a_session(model)
    session.flip_rate = 0.03
    shown = PrecisionPanel(session).flip_rate
    assert shown.value == 0.03 and [rate for _, rate in shown.options] == sorted({*RATES, 0.03})


def test_a_precision_set_in_a_cell_is_shown_from_the_next_answer_on(panel):
    panel.session.precision = "auto"
    panel.ask("abc")
    assert panel.precision.value == "auto"


def test_trouble_is_said_in_red_and_the_panel_goes_on(panel):
    panel.prompt.value = "<" * 600
    panel.button.click()
    panel.thread.join(WAIT_S)
    assert "the plan&#x27;s context is 512" in panel.message.value and "<b style" in panel.message.value
    panel.message.value = ""
    assert panel.ask("") == "" and "a message" in panel.message.value and "<b style" in panel.message.value
    panel.session.history.clear()
    assert len(panel.ask("abc")) == 40 and "context" not in panel.message.value


def test_answers_wait_for_one_another(panel, monkeypatch):
    inside, most, send = [], [], panel.session.send

    def watched(text):
        inside.append(text)
        most.append(len(inside))
        yield from send(text)
        inside.remove(text)

    monkeypatch.setattr(panel.session, "send", watched)
    threads = [threading.Thread(target=panel.ask, args=(text,)) for text in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert most == [1, 1, 1]


def test_of_what_a_panel_can_be_made(model):
    assert isinstance(PrecisionPanel(model, tiny_tokenizer()).session, ChatSession)
    bare = tiny_tokenizer().__class__(tokenizer_object=tiny_tokenizer().backend_tokenizer)
    assert isinstance(PrecisionPanel(model, bare).session, CompletionSession)
    with pytest.raises(LowvramError, match="expected a model's tokenizer"):
        PrecisionPanel(model)
    with pytest.raises(LowvramError, match=r"expected weights in two planes \(int4\+4\)"):
        PrecisionPanel(load_tiny("qwen2"), tiny_tokenizer())


@pytest.mark.parametrize("low", ["gpu", "cpu"])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_bytes_by_plane_add_up_to_the_plans(kind, low):
    plan = tiny_plan(kind, "int4+4").with_gpu_layers(2).with_modules("model.layers.2.*", low=low)
    found = plane_bytes(plan)
    for device, parts in found.items():
        assert set(parts) == set(PARTS) and min(parts.values()) >= 0
        assert sum(parts.values()) == plan.weight_bytes(device) + plan.kv_bytes(plan.context, device)
    assert sum(parts["high planes"] for parts in found.values()) > 0
    in_one = plane_bytes(tiny_plan(kind, "int4"))
    assert list(in_one) == ["gpu"] and in_one["gpu"]["high planes"] == in_one["gpu"]["low planes"] == 0
    page = memory_html(plan)
    assert format_bytes(found["gpu"]["high planes"]) in page and "<th>cpu</th>" in page


def test_it_is_displayed_as_its_widget(panel):
    bundle = panel._repr_mimebundle_()
    assert bundle["application/vnd.jupyter.widget-view+json"]["model_id"] == panel.widget.model_id
    assert bundle["text/plain"] == repr(panel)


def test_without_ipywidgets_one_line_says_what_to_install(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    with pytest.raises(
        LowvramError, match=r"PrecisionPanel needs ipywidgets; run pip install 'lowvram_lab\[notebook\]'"
    ):
        lowvram_lab.PrecisionPanel(model, tiny_tokenizer())
