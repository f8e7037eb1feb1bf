"""PrecisionPanel: a chat whose precision is changed while it answers, each token coloured by who decided it.

A thin face of ``chat/provenance.py``, whose ``token_html`` shows the same without widgets.

Derived in: notebooks/08_precision_on_demand.ipynb
"""

import contextlib
import threading
import time

import pandas
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowvram_lab.chat.answer import Session
from lowvram_lab.chat.completion import CompletionSession
from lowvram_lab.chat.provenance import TokenTexts, progress_line, tokens_html
from lowvram_lab.chat.session import ChatSession
from lowvram_lab.engine.loaded import loaded
from lowvram_lab.errors import LowvramError
from lowvram_lab.faces.panel import PROMPT, coloured, import_widgets
from lowvram_lab.model.plan import Plan
from lowvram_lab.model.rules import PRECISIONS
from lowvram_lab.planner.planes import plane_bytes
from lowvram_lab.units import format_bytes

RATES = (0.0, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1)
"""Flip rates offered."""

REFRESH_S = 0.2
"""Seconds between two looks at an answer on its way: each sends all of it to the page."""

HINT = "of auto: tokens that may differ from what both planes would say; holds from the next answer on"


class PrecisionPanel:
    """A text field, a precision that may be changed while the model answers, and the answer in colours.

    An answer is made in a thread of its own, so that the page is heard meanwhile; ``ask`` makes one in a cell.

    Args:
        session_or_model: A session, which goes on, or a model from ``load``: of weights in two planes.
        tokenizer: Of a model; without a chat template texts are gone on with, not answered.

    Attributes:
        session: What is asked.
        widget: The ``VBox`` that is displayed.
        prompt: What is sent.
        button: Sends it; stops the answer on its way.
        precision: Fast, precise or auto; sets ``session.precision`` at once.
        flip_rate: Of auto; sets ``session.flip_rate``.
        answer: The answer in colours, with a legend: HTML.
        message: How it goes, or why it failed: HTML.
        memory: What each plane takes, on which device: HTML.
        thread: What makes the answer on its way, or made the latest; ``None`` before.

    Raises:
        LowvramError: ipywidgets is not installed, weights are in one plane, or a model comes without its tokenizer.
    """

    def __init__(self, session_or_model: Session | PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None):
        widgets = import_widgets("PrecisionPanel")
        self.session = _session(session_or_model, tokenizer)
        self._lock, self._stop = threading.RLock(), threading.Event()  # JupyterLab runs callbacks beside cells
        self.thread = None
        rates = sorted({*RATES, self.session.flip_rate})
        narrow = {"style": {"description_width": "6em"}, "layout": widgets.Layout(width="34em", max_width="100%")}
        self.prompt = widgets.Text(description="message", value=PROMPT, **narrow)
        self.button = widgets.Button(description="Send")
        self.precision = widgets.ToggleButtons(description="precision", options=PRECISIONS, **narrow)
        self.precision.style.button_width = "7em"
        self.precision.add_class("widget-inline-hbox")  # ipywidgets forgets it: the label beside, not above
        options = [(f"{rate:.2%}", rate) for rate in rates]
        self.flip_rate = widgets.SelectionSlider(description="flip rate", options=options, tooltip=HINT, **narrow)
        self.answer, self.message, self.memory = widgets.HTML(), widgets.HTML(), widgets.HTML(memory_html(self._plan))
        self.precision.value, self.flip_rate.value = self.session.precision, self.session.flip_rate
        self.precision.observe(lambda change: setattr(self.session, "precision", change.new), names="value")
        self.flip_rate.observe(lambda change: setattr(self.session, "flip_rate", change.new), names="value")
        self.button.on_click(lambda _: self.send())
        asking = widgets.Box([self.prompt, self.button], layout=widgets.Layout(flex_flow="row wrap"))
        shown = [asking, self.precision, self.flip_rate, self.answer, self.message, self.memory]
        self.widget = widgets.VBox(shown)

    def send(self) -> None:
        """What the button does: has the message answered beside; or stops the answer that is on its way."""
        if self.thread is not None and self.thread.is_alive():
            self._stop.set()
            return
        self.thread = threading.Thread(target=self.ask, args=(self.prompt.value,), daemon=True)
        self.thread.start()

    def ask(self, text: str) -> str:
        """Answers a text, shown as it is made; returns the answer, as far as it came.

        Where it fails the panel says why, in red.
        """
        with self._lock:
            pieces, failure = [], ""
            self.precision.value = self.session.precision  # set in a cell, perhaps
            self.button.description, self.answer.value = "Stop", ""
            self.message.value = "reading" + (", in auto once also a text" if self.session.precision == "auto" else "")
            try:
                self._stream(text, pieces)
            except (LowvramError, torch.OutOfMemoryError) as error:
                failure = str(error) or type(error).__name__
            finally:
                self._stop.clear()
                self.button.description = "Send"
                self.message.value = coloured(failure, fits=False) if failure else self.message.value
                self.memory.value = memory_html(self._plan)  # planes may have had to move
            return "".join(pieces)

    def _stream(self, text: str, pieces: list[str]) -> None:
        """Shows an answer now and then while it is made."""
        texts, first, shown = TokenTexts(self.session.tokenizer), None, 0.0
        with contextlib.closing(self.session.send(text)) as answer:
            for piece in answer:
                pieces.append(piece)
                now = time.perf_counter()
                first = first or now
                if now - shown > REFRESH_S:
                    self._show(texts, now - first)
                    shown = time.perf_counter()
                if self._stop.is_set():
                    break
        self._show(texts, time.perf_counter() - first if first else None)

    def _show(self, texts: TokenTexts, seconds: float | None) -> None:
        decisions, told = self.session.decisions, len(texts.texts)
        self.answer.value = tokens_html(texts.read(each.token for each in decisions[told:]), decisions)
        self.message.value = progress_line(decisions, seconds, self.session.drafting)

    @property
    def _plan(self) -> Plan:
        return loaded(self.session.model).plan

    def __repr__(self) -> str:
        session = self.session
        progress = progress_line(session.decisions, None, session.drafting)
        return f"{self._plan.summary()}\n{session.precision}: {progress}"

    def _repr_mimebundle_(self, **options) -> dict:
        return {**self.widget._repr_mimebundle_(**options), "text/plain": repr(self)}


def memory_html(plan: Plan) -> str:
    """What the planes of a plan's weights take, a row a device: HTML."""
    table = pandas.DataFrame.from_dict(plane_bytes(plan), orient="index")
    table["in all"] = table.sum(axis=1)
    return f'<div class="jp-RenderedHTMLCommon">{table.map(format_bytes).to_html(border=0)}</div>'


def _session(given: Session | PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> Session:
    """The session to show."""
    plan = loaded(given.model if isinstance(given, Session) else given).plan
    if not plan.low_planes():
        raise LowvramError(f"expected weights in two planes (int4+4), found {plan.model} in {plan.summary()}")
    if isinstance(given, Session):
        return given
    if tokenizer is None:
        raise LowvramError("expected a model's tokenizer beside it, found none; give one, or a session")
    kind = ChatSession if getattr(tokenizer, "chat_template", None) else CompletionSession
    return kind(given, tokenizer, progress=False)
