"""bench: our ways of running a model beside other engines, paired, on the same prompt and the same machine.

Engines alternate round by round in a shuffled order, so that a busy moment meets them all alike; what is compared is
the ratio within a round. Every row says how far its text is the 16-bit model's: the speed of wrong output is worth
nothing.

Derived in: notebooks/07_measure_everything.ipynb
"""

import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import psutil
import torch
from tqdm.auto import tqdm

from lowvram_lab.errors import LowvramError, SourceError
from lowvram_lab.machine import cpu_threads, facts, versions
from lowvram_lab.memory.budget import GpuBudget
from lowvram_lab.memory.gpu import Gpu
from lowvram_lab.model.host_bytes import weights_in_ram
from lowvram_lab.model.plan import Plan
from lowvram_lab.model.rules import whole_number
from lowvram_lab.model.source import Source, find_source
from lowvram_lab.model.spec import ModelSpec
from lowvram_lab.packaged import sample_text
from lowvram_lab.peers.engines import Task
from lowvram_lab.peers.others import ENGINES, MODULES, OURS, gguf_file
from lowvram_lab.peers.process import ChildEngine, EngineError, LocalEngine
from lowvram_lab.peers.result import FOLLOW_UP_TOKENS, BenchResult, BenchRow
from lowvram_lab.planner.auto import auto_plan
from lowvram_lab.units import GiB, format_bytes

PROCESS_BYTES = GiB // 2
"""What a process with torch and transformers takes beside its model, for the question whether all fit at once."""

PACKAGES = ("lowvram_lab", "torch", "transformers", "accelerate", "bitsandbytes", "llama-cpp-python", "numpy")
SEED = 0
"""Of the order of engines, and of a prompt of random ids."""

READ_BYTES = GiB // 4
"""Of the block whose reading tells the bandwidth: more than any cache."""


@dataclass(frozen=True)
class BenchSettings:
    """How engines are measured.

    Attributes:
        prompt_tokens: Length of the prompt.
        new_tokens: Decoded after the first token of the answer.
        rounds: How often each engine has its turn.
        threads: CPU threads of every engine; by default the plan's, else torch's number.
        processes: Each engine in a process of its own. Without, all are in this one: ``peak_rss_bytes`` is ``None``,
            and on CUDA a peak has the other engines in it.

    Raises:
        LowvramError: A number out of range.
    """

    prompt_tokens: int = 64
    new_tokens: int = 64
    rounds: int = 5
    threads: int | None = None
    processes: bool = True

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "new_tokens", "rounds"):
            whole_number(name, getattr(self, name), 1, error=LowvramError)

    @property
    def context(self) -> int:
        """Tokens of prompt, answer, second message and the token that answers it."""
        return self.prompt_tokens + self.new_tokens + 1 + FOLLOW_UP_TOKENS + 1

    def planned(self, plan: Plan) -> Plan:
        """A plan with room for this, and with the threads.

        Raises:
            LowvramError: More threads than there are.
            PlanError: The plan does not fit the model or the prompt.
        """
        threads = self.threads or plan.threads or torch.get_num_threads()
        if threads > (cores := os.cpu_count() or 1):
            raise LowvramError(f"expected 1 to {cores} threads on this machine, found {threads}")
        return replace(plan, threads=threads, context=max(plan.context, self.context))


def bench(
    model: str | os.PathLike,
    gpu: str | int | GpuBudget | Gpu | None = None,
    *,
    plan: Plan | None = None,
    against: tuple[str, ...] | None = None,
    gguf: str | os.PathLike | None = None,
    settings: BenchSettings | None = None,
    progress: bool = True,
) -> BenchResult:
    """Measures our engines and others on one prompt, alternating: batch 1, greedy, the end of a text ignored.

    Args:
        model: Name, hub id, directory or .gguf file.
        gpu: The card to be. On CUDA the cap holds for every engine that allocates through torch; on the stand-in, which
            is RAM, for ours.
        plan: Ours; by default ``auto_plan``'s for that card, and 16 bits (or the formats stored) without one.
        against: Of ``transformers``, ``accelerate``, ``bitsandbytes`` and ``llama.cpp``; by default those
            installed. What cannot run here is a row with the reason.
        gguf: The file for llama.cpp; by default see ``gguf_file``.
        settings: Lengths, rounds, threads; by default those of ``BenchSettings``.
        progress: Show a progress bar.

    Returns:
        A row for each engine.

    Raises:
        LowvramError: An unknown peer, too many threads, or no engine at all could run.
        PlanError: The plan does not fit the model or the prompt.
        SourceError: No such model.
    """
    settings = settings or BenchSettings()
    names = [*OURS, *_peers(against, gguf)]
    source = find_source(model)
    spec = source.spec()
    budget = _budget(gpu)
    plan = settings.planned(_plan(plan, spec, budget, settings.context))
    directory = source.fetch(progress)
    load_before = _load_average()
    prompt, origin = _prompt(source, spec, settings.prompt_tokens + FOLLOW_UP_TOKENS)
    task = _task(source, directory, plan, budget, prompt, settings)
    with cpu_threads(plan.threads), tempfile.TemporaryDirectory() as folder:
        task, reasons = _with_gguf(task, source, gguf, names, Path(folder), progress)
        bandwidth = _read_bandwidth(plan)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # what the measurement took is the engines' now
        contest = _Contest(task, _entrants(names, reasons, task, plan), settings.processes, progress)
        contest.measure(settings.rounds)
    rows = contest.rows(bandwidth)
    if not any(row.ran for row in rows):
        raise LowvramError("no engine could run this: " + "; ".join(f"{row.engine}: {row.reason}" for row in rows))
    return BenchResult(
        model=source.public_name,
        plan=plan.summary(),
        gpu=_card_in_words(budget),
        simulated=not torch.cuda.is_available(),
        rows=rows,
        prompt=origin,
        prompt_tokens=settings.prompt_tokens,
        new_tokens=settings.new_tokens,
        rounds=settings.rounds,
        threads=plan.threads,
        text_reference=contest.reference.name,
        read_bytes_per_s=bandwidth,
        alternated="loaded together" if contest.together else "loaded anew for every round",
        load_average=(load_before, _load_average()),
        machine=facts(),
        versions=versions(PACKAGES),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _task(
    source: Source,
    directory: Path,
    plan: Plan,
    budget: GpuBudget | None,
    prompt: tuple[int, ...],
    settings: BenchSettings,
) -> Task:
    return Task(
        model=source.name,
        directory=str(directory),
        plan=plan.to_json(),
        budget=(budget.total_bytes, budget.context_bytes) if budget else None,
        prompt=prompt[: settings.prompt_tokens],
        follow_up=prompt[settings.prompt_tokens :],
        new_tokens=settings.new_tokens,
        threads=plan.threads,
    )


def _with_gguf(
    task: Task, source: Source, stated: str | os.PathLike | None, names: list[str], folder: Path, progress: bool
) -> tuple[Task, dict[str, str]]:
    """The task with llama.cpp's file, if it is among the engines; and engines that cannot run, with the reason."""
    reasons = {name: ENGINES[name].absent(torch.cuda.is_available()) for name in names if name not in OURS}
    if not reasons.get("llama.cpp", "not asked for"):
        try:
            task = replace(task, gguf=str(gguf_file(source, stated, folder, progress)))
        except LowvramError as error:
            if stated:
                raise
            reasons["llama.cpp"] = str(error)
    return task, {name: reason for name, reason in reasons.items() if reason}


def _load_average() -> float:
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else 0.0


def _card_in_words(budget: GpuBudget | None) -> str:
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "stand-in GPU (simulated)"
    return f"{name}, {format_bytes(budget.total_bytes) if budget else 'no limit'}"


@dataclass
class _Entrant:
    """One engine of a benchmark, and what it said and did.

    Attributes:
        name: Key of ``ENGINES``.
        needed_bytes: See ``_needed_bytes``.
        reason: Why there are no figures, or nothing.
        engine: While it is in memory.
        facts: What it says of itself, see ``LocalEngine``.
        tokens: Its greedy answer.
        agreement: Share of positions where it finds the reference's token most likely.
        turns: Its rounds.
    """

    name: str
    needed_bytes: int = 0
    reason: str = ""
    engine: LocalEngine | ChildEngine | None = None
    facts: dict = field(default_factory=dict)
    tokens: list[int] = field(default_factory=list)
    agreement: float = 0.0
    turns: list[dict] = field(default_factory=list)

    def take_turn(self) -> None:
        """One round that counts."""
        self.turns.append(self.engine.turn())

    def close(self) -> None:
        """Lets go of the engine, if it is in memory."""
        if self.engine is not None:
            self.engine.close()
            self.engine = None


def _entrants(names: list[str], reasons: dict[str, str], task: Task, plan: Plan) -> list[_Entrant]:
    """An entrant for each name, in their order; what RAM cannot hold gives that as its reason."""
    free = psutil.virtual_memory().available
    found = [_Entrant(name, reason=reasons.get(name, "")) for name in names]
    for entrant in found:
        if not entrant.reason:
            entrant.needed_bytes = _needed_bytes(entrant.name, task, plan)
            if entrant.name not in OURS and entrant.needed_bytes > free:
                needed = format_bytes(entrant.needed_bytes)
                entrant.reason = f"needs about {needed} of RAM, found {format_bytes(free)} free"
    return found


class _Contest:
    """The engines of a benchmark taking turns.

    Attributes:
        together: Whether all engines are in memory at once.
        reference: Whose answer is the reference, once there is one.
    """

    def __init__(self, task: Task, entrants: list[_Entrant], processes: bool, progress: bool):
        self.task, self.entrants = task, entrants
        self.processes, self.progress = processes, progress
        self.together = _fit_together([entrant.needed_bytes for entrant in entrants if not entrant.reason], task)
        self.reference: _Entrant | None = None

    def measure(self, rounds: int) -> None:
        """Opens every engine, compares texts, then lets them take turns."""
        able = [entrant for entrant in self.entrants if not entrant.reason]
        # who gives the reference comes first: the 16-bit model, or the plainest of ours
        order = sorted(able, key=lambda entrant: (entrant.name != "transformers", entrant.name != MODULES))
        shuffled = random.Random(SEED)
        try:
            with tqdm(total=len(order) * (rounds + 1), desc="bench", disable=not self.progress, leave=False) as bar:
                for entrant in order:
                    self._let(entrant, self._meet, weigh=self.processes)
                    bar.update()
                for _ in range(rounds):
                    shuffled.shuffle(order)
                    for entrant in order:
                        self._let(entrant, _Entrant.take_turn)
                        bar.update()
        finally:
            for entrant in self.entrants:
                entrant.close()

    def _let(self, entrant: _Entrant, act: Callable[[_Entrant], None], weigh: bool = False) -> None:
        """Lets an engine do something, unless it has failed before."""
        if entrant.reason:
            return
        kind = ChildEngine if self.processes else LocalEngine
        try:
            entrant.engine = entrant.engine or kind(ENGINES[entrant.name], self.task, weigh)
            act(entrant)
        except EngineError as error:
            entrant.reason = str(error)
        if entrant.reason or not self.together:
            entrant.close()

    def _meet(self, entrant: _Entrant) -> None:
        entrant.facts, entrant.tokens = entrant.engine.facts, entrant.engine.tokens
        self.reference = self.reference or entrant
        answer = self.reference.tokens
        entrant.agreement = _share(entrant.engine.likeliest(answer), answer)

    def rows(self, bandwidth: float | None) -> tuple[BenchRow, ...]:
        """A row for each engine; ``bandwidth`` is that of reading, in bytes a second."""
        first = next((self._speeds(entrant) for entrant in self.entrants if not entrant.reason), [])
        return tuple(
            BenchRow(entrant.name, reason=entrant.reason) if entrant.reason else self._row(entrant, first, bandwidth)
            for entrant in self.entrants
        )

    def _speeds(self, entrant: _Entrant) -> list[float]:
        """Tokens a second, round by round."""
        return [self.task.new_tokens / turn["decode_s"] for turn in entrant.turns]

    def _row(self, entrant: _Entrant, first: list[float], bandwidth: float | None) -> BenchRow:
        facts, turns = entrant.facts, entrant.turns
        each = self._speeds(entrant)
        ttft = statistics.median(turn["ttft_s"] for turn in turns)
        low, middle, high = (float(value) for value in np.percentile(each, (10, 50, 90)))
        a_token = facts["read_bytes"] + facts["kv_bytes"]
        bounded = bandwidth and facts["one_memory"]
        return BenchRow(
            engine=entrant.name,
            prefill_tokens_per_s=len(self.task.prompt) / ttft,
            decode_tokens_per_s=middle,
            decode_p10=low,
            decode_p90=high,
            ratio=statistics.median(mine / other for mine, other in zip(each, first, strict=True)),
            ttft_s=ttft,
            follow_up_s=statistics.median(turn["follow_up_s"] for turn in turns),
            peak_bytes=facts["peak_bytes"],
            peak_rss_bytes=facts["peak_rss_bytes"],
            weight_bytes=facts["weight_bytes"],
            bytes_per_token=a_token,
            bandwidth_share=a_token * middle / bandwidth if bounded else None,
            equal_tokens=_share(entrant.tokens, self.reference.tokens),
            agreement=entrant.agreement,
            note=self._note(entrant),
            rounds=tuple(each),
        )

    def _note(self, entrant: _Entrant) -> str:
        """The engine's own, or for ours how far its two ways agree: they run the same weights."""
        plain = next((other for other in self.entrants if other.name == MODULES and other.tokens), None)
        if plain and entrant is not plain and entrant.name in OURS:
            same = _equal(entrant.tokens, plain.tokens)
            return f"{same} of {len(entrant.tokens)} tokens of its answer are the modules'"
        return entrant.facts["note"]


def _equal(mine: list[int], theirs: list[int]) -> int:
    return sum(a == b for a, b in zip(mine, theirs, strict=True))


def _share(mine: list[int], theirs: list[int]) -> float:
    return _equal(mine, theirs) / len(theirs)


def _peers(against: tuple[str, ...] | None, gguf: str | os.PathLike | None) -> list[str]:
    """Names that are known, each once; by default those installed, and llama.cpp where it was given a file."""
    peers = [name for name in ENGINES if name not in OURS]
    if against is None:
        return [name for name in peers if ENGINES[name].installed() or (gguf and name == "llama.cpp")]
    if isinstance(against, str) or not all(isinstance(name, str) for name in against):
        raise LowvramError(f"expected names of engines such as ('transformers', 'llama.cpp'), found {against!r}")
    if unknown := [name for name in against if name not in peers]:
        raise LowvramError(f"unknown engine {unknown[0]!r}: expected some of {', '.join(peers)}")
    if gguf and "llama.cpp" not in against:
        raise LowvramError(f"a .gguf file is for llama.cpp, found {', '.join(against) or 'no engine'} to compare with")
    return list(dict.fromkeys(against))


def _budget(gpu: str | int | GpuBudget | Gpu | None) -> GpuBudget | None:
    if isinstance(gpu, Gpu):
        return gpu.budget
    return gpu if gpu is None or isinstance(gpu, GpuBudget) else GpuBudget.parse(gpu)


def _plan(plan: Plan | None, spec: ModelSpec, budget: GpuBudget | None, tokens: int) -> Plan:
    if plan is not None:
        return plan.made_for(spec)
    if budget is None:
        return Plan.uniform(spec, "stored" if spec.stored else "bf16", context=tokens)
    return auto_plan(spec, replace(budget, kernels="cuda" if torch.cuda.is_available() else "cpu"), tokens).plan


def _prompt(source: Source, spec: ModelSpec, tokens: int) -> tuple[tuple[int, ...], str]:
    """Ids that every engine is given, and where they come from."""
    try:
        ids = source.tokenizer()(sample_text())["input_ids"]
    except SourceError:  # no tokenizer: nothing here needs one
        drawn = random.Random(SEED)
        return tuple(drawn.randrange(spec.vocab_size) for _ in range(tokens)), "random ids: the model has no tokenizer"
    return tuple((ids * -(-tokens // len(ids)))[:tokens]), "the library's own text"


def _needed_bytes(name: str, task: Task, plan: Plan) -> int:
    """About what an engine holds of the model: the 16-bit weights where it makes its own of them."""
    if name in OURS:
        return weights_in_ram(plan, not torch.cuda.is_available()) + plan.kv_bytes(plan.context)
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


def _read_bandwidth(plan: Plan) -> float:
    """Bytes a second at which the layers' processor sums a block that no cache holds: the best of nine times."""
    on_card = torch.cuda.is_available() and set(plan.layer_places()) == {"gpu"}
    block, best = torch.ones(READ_BYTES // 8, dtype=torch.int64, device="cuda" if on_card else "cpu"), 0.0
    for _ in range(9):
        started = time.perf_counter()
        int(block.sum())  # waits for the card
        best = max(best, READ_BYTES / (time.perf_counter() - started))
    return best
