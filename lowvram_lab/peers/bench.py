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
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import psutil
import torch
from tqdm.auto import tqdm

from lowvram_lab.engine.room import weights_in_ram
from lowvram_lab.errors import LowvramError, SourceError
from lowvram_lab.machine import cpu_threads, facts, versions
from lowvram_lab.memory.budget import GpuBudget
from lowvram_lab.memory.gpu import Gpu
from lowvram_lab.model.plan import Plan
from lowvram_lab.model.rules import whole_number
from lowvram_lab.model.source import Source, find_source
from lowvram_lab.model.spec import ModelSpec
from lowvram_lab.packaged import sample_text
from lowvram_lab.peers.engines import Task
from lowvram_lab.peers.others import ENGINES, OURS, gguf_file
from lowvram_lab.peers.process import ChildEngine, EngineError, LocalEngine
from lowvram_lab.peers.result import FOLLOW_UP_TOKENS, BenchResult, BenchRow
from lowvram_lab.planner.auto import auto_plan
from lowvram_lab.planner.measure_rates import Machine
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
    machine: Machine | None = None,
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
        machine: Its read bandwidth; by default this machine's, measured now.
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
        machine = machine or Machine(anew=True)
        bandwidth = _read_bandwidth(plan, plan.threads)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # what the measurement took is the engines' now
        run = _Run(task, plan, spec, names, reasons, settings.processes, progress)
        run.measure(settings.rounds)
    rows = _rows(run, names, bandwidth)
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
        text_reference=run.reference,
        read_bytes_per_s=bandwidth,
        alternated="loaded together" if run.together else "loaded anew for every round",
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


class _Run:
    """All engines of a benchmark, and what they said and did.

    Attributes:
        facts: Name → what the engine says of itself, see ``LocalEngine``.
        texts: Name → its greedy answer.
        agreement: Name → share of positions where it finds the reference's token most likely.
        turns: Name → its rounds.
        reasons: Name → why there are no figures.
        reference: Whose answer is the reference.
        together: Whether all engines are in memory at once.
    """

    def __init__(
        self, task: Task, plan: Plan, spec: ModelSpec, names: list[str], reasons: dict[str, str], processes, progress
    ):
        self.task = task
        self.kinds = ENGINES
        self.reasons = reasons
        self.progress = progress
        self.names = [name for name in names if name not in reasons]
        self.open = ChildEngine if processes else LocalEngine
        self.processes, self._held = processes, {}
        self.facts = {}
        self.texts = {}
        self.agreement = {}
        self.reference = ""
        self.turns: dict[str, list[dict]] = {name: [] for name in names}
        needed = {name: _needed_bytes(name, task, plan) for name in self.names}
        free = psutil.virtual_memory().available
        for name in self.names:
            if name not in OURS and needed[name] > free:
                self.reasons[name] = f"needs about {format_bytes(needed[name])} of RAM, found {format_bytes(free)} free"
        self.together = sum(needed[name] + PROCESS_BYTES for name in self._left()) < free and _card_holds(
            [needed[name] for name in self._left()], task
        )

    def _left(self) -> list[str]:
        return [name for name in self.names if name not in self.reasons]

    def measure(self, rounds: int) -> None:
        """Opens every engine, compares texts, then lets them take turns."""
        # who gives the reference comes first: the 16-bit model, or the plainest of ours
        order = sorted(self.names, key=lambda name: (name != "transformers", name != "lowvram (modules)"))
        shuffled = random.Random(SEED)
        try:
            with tqdm(total=len(order) * (rounds + 1), desc="bench", disable=not self.progress, leave=False) as bar:
                for name in order:
                    self._let(name, self._meet, first=True)
                    bar.update()
                for _ in range(rounds):
                    shuffled.shuffle(order)
                    for name in order:
                        self._let(name, lambda name, engine: self.turns[name].append(engine.turn()))
                        bar.update()
        finally:
            for engine in self._held.values():
                engine.close()

    def _let(self, name: str, act, first: bool = False) -> None:
        """Lets an engine do something, unless it has failed before."""
        if name in self.reasons:
            return
        engine = self._held.pop(name, None)
        try:
            engine = engine or self.open(self.kinds[name], self.task, first and self.processes)
            act(name, engine)
            if self.together:
                self._held[name] = engine
        except EngineError as error:
            self.reasons[name] = str(error)
        finally:
            if engine is not None and name not in self._held:
                engine.close()

    def _meet(self, name: str, engine) -> None:
        self.facts[name], self.texts[name] = engine.facts, engine.tokens
        self.reference = self.reference or name
        answer = self.texts[self.reference]
        self.agreement[name] = _share(engine.likeliest(answer), answer)


def _rows(run: _Run, names: list[str], bandwidth: float | None) -> tuple[BenchRow, ...]:
    speeds = {
        name: [run.task.new_tokens / turn["decode_s"] for turn in run.turns[name]]
        for name in names
        if name not in run.reasons
    }
    first = next(iter(speeds.values()), [])
    rows = []
    for name in names:
        if name in run.reasons:
            rows.append(BenchRow(name, reason=run.reasons[name]))
            continue
        facts = run.facts[name]
        turns = run.turns[name]
        each = speeds[name]
        ttft = statistics.median(turn["ttft_s"] for turn in turns)
        low, middle, high = (float(value) for value in np.percentile(each, (10, 50, 90)))
        a_token = facts["read_bytes"] + facts["kv_bytes"]
        bounded = bandwidth and facts["one_memory"]
        rows.append(
            BenchRow(
                engine=name,
                prefill_tokens_per_s=len(run.task.prompt) / ttft,
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
                equal_tokens=_share(run.texts[name], run.texts[run.reference]),
                agreement=run.agreement[name],
                note=_note(name, run),
                rounds=tuple(each),
            )
        )
    return tuple(rows)


def _note(name: str, run: _Run) -> str:
    """The engine's own, or for ours how far its two ways agree: they run the same weights."""
    other = "lowvram (modules)"
    if name != other and name in OURS and other in run.texts:
        same, all_tokens = _equal(run.texts[name], run.texts[other]), len(run.texts[name])
        return f"{same} of {all_tokens} tokens of its answer are the modules'"
    return run.facts[name]["note"]


def _equal(mine: list[int], theirs: list[int]) -> int:
    return sum(a == b for a, b in zip(mine, theirs, strict=True))


def _share(mine: list[int], theirs: list[int]) -> float:
    return _equal(mine, theirs) / len(theirs)


def _peers(against: tuple[str, ...] | None, gguf) -> list[str]:
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


def _budget(gpu) -> GpuBudget | None:
    if isinstance(gpu, Gpu):
        return gpu.budget
    return gpu if gpu is None or isinstance(gpu, GpuBudget) else GpuBudget.parse(gpu)


def _plan(plan: Plan | None, spec: ModelSpec, budget: GpuBudget | None, tokens: int) -> Plan:
    if plan is not None:
        plan.check_made_for(spec)
        return plan
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


def _card_holds(sizes: list[int], task: Task) -> bool:
    """Whether a CUDA card, if there is one, holds all engines at once, each with a CUDA context of its own."""
    if not torch.cuda.is_available():
        return True
    most = task.budget[0] if task.budget else None
    wanted = sum(min(size + PROCESS_BYTES, most or size + PROCESS_BYTES) for size in sizes)
    return wanted < torch.cuda.mem_get_info()[0]


def _read_bandwidth(plan: Plan, threads: int) -> float:
    """Bytes a second at which the layers' processor sums a block that no cache holds: the best of nine times."""
    on_card = torch.cuda.is_available() and set(plan.layer_places()) == {"gpu"}
    block, best = torch.ones(READ_BYTES // 8, dtype=torch.int64, device="cuda" if on_card else "cpu"), 0.0
    with cpu_threads(threads):
        for _ in range(9):
            started = time.perf_counter()
            int(block.sum())  # waits for the card
            best = max(best, READ_BYTES / (time.perf_counter() - started))
    return best
