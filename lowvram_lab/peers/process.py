"""An engine in a process of its own, or in this one; ``bench`` speaks to both alike.

A process of its own gives an engine its own resident memory to measure and its own card to be, lets it crash without
taking the others along (a peer compiled for another processor does), and keeps the engines' thread pools apart. It
waits without computing while another engine has its turn.
"""

import importlib.util
import os
import pickle
import subprocess
import sys
import tempfile
from contextlib import contextmanager, nullcontext, suppress

import torch

from lowvram_lab.errors import LowvramError
from lowvram_lab.machine import cpu_threads, fresh_python, why_ended
from lowvram_lab.memory.host import watch_host
from lowvram_lab.peers.engines import Engine, Task

FACTS = ("note", "weight_bytes", "read_bytes", "one_memory")

WARM_TOKENS = 4
"""Decoded before a round where the batch size is another than in the one before."""


class EngineError(LowvramError):
    """An engine that could not do what was asked; the message is the reason its row gives."""


class LocalEngine:
    """An engine in this process. Questions are named by their place in ``Task.questions``.

    Args:
        kind: Which.
        task: What it is to run.
        weigh: Whether to watch resident memory; it has to be one's own.

    Attributes:
        facts: What the engine says of itself.

    Raises:
        EngineError: It cannot open the model or run it.
    """

    def __init__(self, kind: type[Engine], task: Task, weigh: bool = False):
        self.task, self._weigh = task, weigh
        self._warm: set[int] = set()
        self._batch_size = 0
        if weigh:
            _import_first(kind)
        with self._watched() as self._loading, self._guarded():
            self.engine = kind(task)
            self.facts = {name: getattr(self.engine, name) for name in FACTS}
            self._loading_peak = self.engine.peak_bytes()

    def meet(self, index: int) -> dict:
        """Two rounds of a question that are not timed: the first is metered, the second warm as it will be.

        Returns:
            ``tokens`` of each sequence, ``kv_bytes``, ``peak_bytes``, and ``peak_rss_bytes``: how far resident memory
            rose while it opened the model and answered (``None`` unless weighed; what earlier questions left in memory
            is in it).
        """
        question = self.task.questions[index]
        with self._watched() as host, self._guarded():
            self.engine.reset_peak()
            with self.engine.metered():
                self.engine.turn(question)
            peak = self.engine.peak_bytes()
        with self._guarded():
            tokens = self.engine.turn(question)["tokens"]
            kv_bytes = self.engine.kv_bytes(question)
        self._warm.add(index)
        self._batch_size = question.batch_size
        highest = max(self._loading.peak_rss_bytes, host.peak_rss_bytes) if host else None
        return {
            "tokens": tokens,
            "kv_bytes": kv_bytes,
            "peak_bytes": None if peak is None else max(peak, self._loading_peak),
            "peak_rss_bytes": highest - self._loading.before_rss_bytes if host else None,
        }

    def turn(self, index: int) -> dict:
        """One round; see ``Engine.turn``. What this process has not answered yet it answers once before."""
        question = self.task.questions[index]
        with self._guarded():
            if index not in self._warm:
                self.engine.turn(question)
            elif self._batch_size != question.batch_size:  # its KV cache is a new one, whose pages nobody has touched
                self.engine.forget(question.batch_size)
                self.engine.answer([list(prompt) for prompt in question.prompts], min(WARM_TOKENS, question.new_tokens))
            self._warm.add(index)
            self._batch_size = question.batch_size
            return self.engine.turn(question)

    def likeliest(self, index: int, answers: list[list[int]]) -> list[list[int]]:
        """See ``Engine.likeliest``."""
        with self._guarded():
            return self.engine.likeliest(self.task.questions[index], answers)

    def close(self) -> None:
        """Lets go of the model."""
        self.engine = None

    def _watched(self):
        return watch_host() if self._weigh else nullcontext()

    @contextmanager
    def _guarded(self):
        """So many threads; whatever goes wrong is an ``EngineError`` of one line."""
        with cpu_threads(self.task.threads):
            try:
                yield
            except Exception as error:  # other people's code fails in any way; a row gives the reason
                raise EngineError(_reason(error)) from error


class ChildEngine:
    """An engine in a new process. Arguments, attributes and errors as ``LocalEngine``."""

    def __init__(self, kind: type[Engine], task: Task, weigh: bool = False):
        threads = str(task.threads)
        quiet = {"TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
        self._errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 (``close`` closes it)
        self._process = subprocess.Popen(
            fresh_python("lowvram_lab.peers.process:serve"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={**os.environ, **quiet, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads},
        )
        try:
            self.facts = self._ask(kind.name, task, weigh)
        except BaseException:
            self.close()
            raise

    def meet(self, index: int) -> dict:
        """See ``LocalEngine``."""
        return self._ask("meet", index)

    def turn(self, index: int) -> dict:
        """See ``LocalEngine``."""
        return self._ask("turn", index)

    def likeliest(self, index: int, answers: list[list[int]]) -> list[list[int]]:
        """See ``LocalEngine``."""
        return self._ask("likeliest", index, answers)

    def close(self) -> None:
        """Ends the process."""
        with suppress(OSError):  # it may have ended by itself
            self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._errors.close()

    def _ask(self, *request):
        try:
            pickle.dump(request, self._process.stdin)
            self._process.stdin.flush()
            reply = pickle.load(self._process.stdout)
        except (OSError, EOFError, pickle.UnpicklingError):
            raise EngineError(self._why_ended()) from None
        if isinstance(reply, EngineError):
            raise reply
        return reply

    def _why_ended(self) -> str:
        status = self._process.wait()
        self._errors.seek(0)
        return f"its process {why_ended(status, self._errors.read())}"


def serve() -> None:
    """The other end of ``ChildEngine``: opens the engine it is told, then calls its methods until stdin ends."""
    requests, replies = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints is not a reply
    from lowvram_lab.peers.others import ENGINES

    engine = None
    with suppress(EOFError, BrokenPipeError):
        while True:
            request = pickle.load(requests)
            try:
                if engine is None:
                    name, task, weigh = request
                    engine = LocalEngine(ENGINES[name], task, weigh)
                    reply = engine.facts
                else:
                    method, *arguments = request
                    reply = getattr(engine, method)(*arguments)
            except EngineError as error:
                reply = error
            pickle.dump(reply, replies)
            replies.flush()


def _import_first(kind: type[Engine]) -> None:
    """Imports what an engine needs, so that libraries are not counted as its memory."""
    import transformers.models.auto.modeling_auto  # noqa: F401

    if kind.package and importlib.util.find_spec(kind.package[0]):
        importlib.import_module(kind.package[0])


def _reason(error: Exception) -> str:
    """An error in one line; its kind too where the library did not raise it on purpose."""
    said = " ".join(str(error).split())[:300]
    on_purpose = isinstance(error, LowvramError | torch.OutOfMemoryError)
    return said if on_purpose and said else f"{type(error).__name__}: {said}".rstrip(": ")
