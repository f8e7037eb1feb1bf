"""Engines taking turns: each opened once, all questions put to it, rounds in shuffled alternation.

Knows engines by what a process says of them, and makes a row of an engine's answers to a question.
"""

import os
import random
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import psutil
import torch
from tqdm.auto import tqdm

from lowvram_lab.model.host_bytes import weights_in_ram
from lowvram_lab.model.plan import Plan
from lowvram_lab.peers.engines import Question, Task
from lowvram_lab.peers.others import ENGINES, MODULES, OURS
from lowvram_lab.peers.process import ChildEngine, EngineError, LocalEngine
from lowvram_lab.peers.result import BenchRow
from lowvram_lab.units import GiB, format_bytes

PROCESS_BYTES = GiB // 2
"""What a process with torch and transformers takes beside its model, for the question whether all fit at once."""

SEED = 0
"""Of the order of engines."""


@dataclass
class Answers:
    """What an engine made of one question.

    Attributes:
        reason: Why there are no figures, or nothing.
        facts: See ``LocalEngine.meet``.
        agreement: Share of positions where it finds the reference's token most likely.
        turns: Its rounds.
    """

    reason: str = ""
    facts: dict = field(default_factory=dict)
    agreement: float = 0.0
    turns: list[dict] = field(default_factory=list)

    @property
    def tokens(self) -> list[list[int]]:
        """Its greedy answer to each prompt; none before it was met."""
        return self.facts.get("tokens", [])


@dataclass
class Entrant:
    """One engine of a benchmark, and what it said and did.

    Attributes:
        name: Key of ``ENGINES``.
        answers: To each question.
        needed_bytes: What it holds of the model and of the largest question's keys and values.
        reason: Why there are no figures at all, or nothing.
        engine: While it is in memory.
        facts: What it says of itself, see ``LocalEngine``.
    """

    name: str
    answers: list[Answers]
    needed_bytes: int = 0
    reason: str = ""
    engine: LocalEngine | ChildEngine | None = None
    facts: dict = field(default_factory=dict)

    def why_not(self, index: int) -> str:
        """Why there are no figures for a question, or nothing."""
        return self.reason or self.answers[index].reason

    def take_turn(self, index: int) -> None:
        """One round that counts."""
        self.answers[index].turns.append(self.engine.turn(index))

    def close(self) -> None:
        """Lets go of the engine, if it is in memory."""
        if self.engine is not None:
            self.engine.close()
            self.engine = None


def entrants(names: list[str], reasons: dict[str, str], task: Task, plan: Plan) -> list[Entrant]:
    """An entrant for each name, in their order; what RAM cannot hold gives that as its reason."""
    free = psutil.virtual_memory().available
    found = [Entrant(name, [Answers() for _ in task.questions], reason=reasons.get(name, "")) for name in names]
    for entrant in found:
        if not entrant.reason:
            _refuse_what_ram_cannot_hold(entrant, task, plan, free)
    return found


def _refuse_what_ram_cannot_hold(entrant: Entrant, task: Task, plan: Plan, free: int) -> None:
    """Our weights have a plan, on disk if need be; keys and values that RAM is to hold are refused to everyone."""
    weights = _weight_bytes(entrant.name, task, plan)
    for answers, question in zip(entrant.answers, task.questions, strict=True):
        kv_bytes = plan.kv_bytes(question.tokens) * question.batch_size
        in_ram = (0 if entrant.name in OURS else weights) + (0 if torch.cuda.is_available() else kv_bytes)
        if in_ram > free:
            answers.reason = f"needs about {format_bytes(in_ram)} of RAM, found {format_bytes(free)} free"
        else:
            entrant.needed_bytes = max(entrant.needed_bytes, weights + kv_bytes)
    if all(answers.reason for answers in entrant.answers):
        entrant.reason = entrant.answers[0].reason


class Contest:
    """The engines of a benchmark taking turns.

    Args:
        task: What they are asked.
        entrants: Who takes part; those with a reason do not.
        processes: See ``BenchSettings``.
        progress: Show a progress bar.

    Attributes:
        together: Whether all engines are in memory at once.
        references: Whose answer to each question is the reference, once there is one.
    """

    def __init__(self, task: Task, entrants: list[Entrant], processes: bool, progress: bool):
        self.task, self.entrants = task, entrants
        self.processes, self.progress = processes, progress
        self.together = _fit_together([entrant.needed_bytes for entrant in entrants if not entrant.reason], task)
        self.references: list[Entrant | None] = [None] * len(task.questions)

    @property
    def reference(self) -> str:
        """Names of those whose answers are the reference: one, unless it did not answer every question."""
        return ", ".join(dict.fromkeys(entrant.name for entrant in self.references if entrant))

    def measure(self, rounds: int) -> None:
        """Opens every engine, compares texts, then lets them take turns."""
        able = [entrant for entrant in self.entrants if not entrant.reason]
        # who gives the reference comes first: the 16-bit model, or the plainest of ours
        order = sorted(able, key=lambda entrant: (entrant.name != "transformers", entrant.name != MODULES))
        shuffled, everything = random.Random(SEED), range(len(self.task.questions))
        total = len(order) * len(everything) * (rounds + 1)
        try:
            with tqdm(total=total, desc="bench", disable=not self.progress, leave=False) as bar:
                for entrant in order:
                    self._let(entrant, everything, self._meet, bar)
                for _ in range(rounds):
                    for entrant, questions in self._round(order, shuffled):
                        self._let(entrant, questions, Entrant.take_turn, bar)
        finally:
            for entrant in self.entrants:
                entrant.close()

    def _round(self, order: list[Entrant], shuffled: random.Random) -> Iterator[tuple[Entrant, range]]:
        """Whose turn it is, and with which questions: one for all engines, or all where engines do not fit at once."""
        count = len(self.task.questions)
        for questions in [range(index, index + 1) for index in range(count)] if self.together else [range(count)]:
            shuffled.shuffle(order)
            for entrant in order:
                yield entrant, questions

    def _let(self, entrant: Entrant, questions: range, act: Callable[[Entrant, int], None], bar: tqdm) -> None:
        """Lets an engine do something with questions, but for those it has failed at before."""
        for index in questions:
            if not entrant.why_not(index):
                self._try(entrant, index, act)
            bar.update()
        if entrant.reason or not self.together:
            entrant.close()

    def _try(self, entrant: Entrant, index: int, act: Callable[[Entrant, int], None]) -> None:
        kind = ChildEngine if self.processes else LocalEngine
        try:
            entrant.engine = entrant.engine or kind(ENGINES[entrant.name], self.task, self.processes)
            entrant.facts = entrant.engine.facts
        except EngineError as error:
            entrant.reason = str(error)
            return
        try:
            act(entrant, index)
        except EngineError as error:
            entrant.answers[index].reason = str(error)
            entrant.close()  # whatever that left of it: it is opened anew for another question

    def _meet(self, entrant: Entrant, index: int) -> None:
        answers = entrant.answers[index]
        answers.facts = entrant.engine.meet(index)
        self.references[index] = self.references[index] or entrant
        reference = self.references[index].answers[index].tokens
        answers.agreement = _share(entrant.engine.likeliest(index, reference), reference)

    def rows(self, bandwidth: float | None) -> tuple[BenchRow, ...]:
        """For each question a row for each engine; ``bandwidth`` is that of reading, in bytes a second."""
        found = []
        for index, question in enumerate(self.task.questions):
            ran = [entrant for entrant in self.entrants if not entrant.why_not(index)]
            first = _speeds(ran[0], index, question) if ran else []
            for entrant in self.entrants:
                sizes = {"prompt_tokens": question.prompt_tokens, "batch_size": question.batch_size}
                reason = entrant.why_not(index)
                figures = {} if reason else self._figures(entrant, index, first, bandwidth)
                found.append(BenchRow(engine=entrant.name, reason=reason, **sizes, **figures))
        return tuple(found)

    def _figures(self, entrant: Entrant, index: int, first: list[float], bandwidth: float | None) -> dict:
        """Those of a row; ``first`` are the speeds of the first row that ran."""
        question, answers = self.task.questions[index], entrant.answers[index]
        batch_size, facts, turns = question.batch_size, answers.facts, answers.turns
        each = _speeds(entrant, index, question)
        ttft = statistics.median(turn["ttft_s"] for turn in turns)
        low, middle, high = (float(value) for value in np.percentile(each, (10, 50, 90)))
        a_token = (entrant.facts["read_bytes"] + facts["kv_bytes"]) / batch_size
        bounded = bandwidth and entrant.facts["one_memory"]
        return {
            "prefill_tokens_per_s": batch_size * question.prompt_tokens / ttft,
            "decode_tokens_per_s": middle,
            "total_tokens_per_s": batch_size * middle,
            "decode_p10": low,
            "decode_p90": high,
            "ratio": statistics.median(mine / other for mine, other in zip(each, first, strict=True)),
            "ttft_s": ttft,
            "follow_up_s": statistics.median(turn["follow_up_s"] for turn in turns),
            "peak_bytes": facts["peak_bytes"],
            "peak_rss_bytes": facts["peak_rss_bytes"],
            "weight_bytes": entrant.facts["weight_bytes"],
            "bytes_per_token": round(a_token),
            "bandwidth_share": a_token * batch_size * middle / bandwidth if bounded else None,
            "equal_tokens": _share(answers.tokens, self.references[index].answers[index].tokens),
            "agreement": answers.agreement,
            "note": self._note(entrant, index),
            "rounds": tuple(each),
        }

    def _note(self, entrant: Entrant, index: int) -> str:
        """The engine's own, or for ours how far its two ways agree: they run the same weights."""
        tokens = entrant.answers[index].tokens
        plain = next((other.answers[index].tokens for other in self.entrants if other.name == MODULES), None)
        if plain and entrant.name in OURS and entrant.name != MODULES:
            same, total = _equal(tokens, plain)
            return f"{same} of {total} tokens of its answer{'s' if len(plain) > 1 else ''} are the modules'"
        return entrant.facts["note"]


def _speeds(entrant: Entrant, index: int, question: Question) -> list[float]:
    """Tokens a second of each sequence, round by round."""
    return [question.new_tokens / turn["decode_s"] for turn in entrant.answers[index].turns]


def _equal(mine: list[list[int]], theirs: list[list[int]]) -> tuple[int, int]:
    """How many tokens are the same, position by position, and of how many."""
    pairs = [pair for both in zip(mine, theirs, strict=True) for pair in zip(*both, strict=True)]
    return sum(a == b for a, b in pairs), len(pairs)


def _share(mine: list[list[int]], theirs: list[list[int]]) -> float:
    same, total = _equal(mine, theirs)
    return same / total


def _weight_bytes(name: str, task: Task, plan: Plan) -> int:
    """About what an engine holds of the model: the 16-bit weights where it makes its own of them."""
    if name in OURS:
        return weights_in_ram(plan, not torch.cuda.is_available())
    return os.path.getsize(task.gguf) if name == "llama.cpp" else 2 * plan.spec.num_parameters


def _fit_together(needed: list[int], task: Task) -> bool:
    """Whether RAM, and a CUDA card if there is one, hold all engines at once; each has a process and a CUDA context."""
    sizes = [size + PROCESS_BYTES for size in needed]
    if sum(sizes) >= psutil.virtual_memory().available:
        return False
    if not torch.cuda.is_available():
        return True
    most = task.budget[0] if task.budget else None
    return sum(min(size, most or size) for size in sizes) < torch.cuda.mem_get_info()[0]
