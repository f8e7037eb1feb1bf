"""bench: our ways of running a model beside other engines, paired, on the same prompt and the same machine.

Engines alternate round by round in a shuffled order, so that a busy moment meets them all alike; what is compared is
the ratio within a round. Every row says how far its text is the 16-bit model's: the speed of wrong output is worth
nothing.

Derived in: notebooks/07_measure_everything.ipynb
"""

import os
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import torch

from lowvram_lab.errors import LowvramError, PlanError, SourceError
from lowvram_lab.machine import cpu_threads, facts, versions
from lowvram_lab.memory.budget import GpuBudget
from lowvram_lab.memory.gpu import Gpu
from lowvram_lab.model.plan import Plan
from lowvram_lab.model.rules import whole_number
from lowvram_lab.model.source import Source, find_source
from lowvram_lab.model.spec import ModelSpec
from lowvram_lab.packaged import sample_text
from lowvram_lab.peers.contest import SEED, Contest, entrants
from lowvram_lab.peers.engines import Question, Task
from lowvram_lab.peers.gguf_file import gguf_file, stated_type
from lowvram_lab.peers.others import ENGINES, OURS
from lowvram_lab.peers.result import FOLLOW_UP_TOKENS, BenchResult
from lowvram_lab.planner.auto import auto_plan
from lowvram_lab.units import GiB, format_bytes

PACKAGES = ("lowvram_lab", "torch", "transformers", "accelerate", "bitsandbytes", "llama-cpp-python", "numpy")

READ_BYTES = GiB // 4
"""Of the block whose reading tells the bandwidth: more than any cache."""


MOST_SEQUENCES = 1024
"""Side by side."""


@dataclass(frozen=True)
class BenchSettings:
    """How engines are measured.

    Attributes:
        prompt_tokens: Length of the prompt, or several to be measured one after the other.
        new_tokens: Decoded after the first token of the answer.
        rounds: How often each engine has its turn.
        threads: CPU threads of every engine; by default the plan's, else torch's number.
        processes: Each engine in a process of its own. Without, all are in this one: ``peak_rss_bytes`` is ``None``,
            and on CUDA a peak has the other engines in it.
        batch_size: Sequences side by side, or several such numbers: each goes with each length of prompt.

    Raises:
        LowvramError: A number out of range.
    """

    prompt_tokens: int | Sequence[int] = 64
    new_tokens: int = 64
    rounds: int = 5
    threads: int | None = None
    processes: bool = True
    batch_size: int | Sequence[int] = 1

    def __post_init__(self) -> None:
        for name, most in (("prompt_tokens", None), ("batch_size", MOST_SEQUENCES)):
            for value in (values := _several(getattr(self, name))):
                whole_number(name, value, 1, most, error=LowvramError)
            if not values:
                raise LowvramError(f"expected {name} of one number or more, found none")
        for name in ("new_tokens", "rounds"):
            whole_number(name, getattr(self, name), 1, error=LowvramError)

    @property
    def cells(self) -> tuple[tuple[int, int], ...]:
        """Length of the prompt and batch size, of every question."""
        return tuple((n, size) for size in _several(self.batch_size) for n in _several(self.prompt_tokens))

    @property
    def context(self) -> int:
        """Tokens of the longest prompt, its answer, second message and the token that answers it."""
        return max(_several(self.prompt_tokens)) + self.new_tokens + 1 + FOLLOW_UP_TOKENS + 1

    def check(self, spec: ModelSpec) -> None:
        """Refuses a prompt that is too long for a model.

        Raises:
            PlanError: Says how long it may be.
        """
        if self.context > (most := spec.longest_context):
            longest = max(_several(self.prompt_tokens))
            rest = self.context - longest
            raise PlanError(
                f"a prompt of {longest} tokens and {rest} behind it go beyond the {most} of {spec.name}; "
                + (f"give it {most - rest} at most" if most > rest else "ask for fewer new tokens")
            )

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
    """Measures our engines and others on the same prompts, alternating: greedy, the end of a text ignored.

    Each engine is opened once. Of several prompt lengths and batch sizes each is measured with each; in a round all
    engines answer one of them before they come to the next.

    Args:
        model: Name, hub id, directory or .gguf file.
        gpu: The card to be. On CUDA the cap holds for every engine that allocates through torch; on the stand-in, which
            is RAM, for ours.
        plan: Ours; by default ``auto_plan``'s for that card (and one sequence), and 16 bits (or the formats stored)
            without one.
        against: Of ``transformers``, ``accelerate``, ``bitsandbytes`` and ``llama.cpp``; by default those
            installed. What cannot run here is a row with the reason.
        gguf: The file for llama.cpp, or a type such as ``"Q4_0"`` that llama.cpp's own tool is to quantise the same
            weights to; by default the type nearest to the plan's format, see ``gguf_file``.
        settings: Lengths, batch sizes, rounds, threads; by default those of ``BenchSettings``.
        progress: Show a progress bar.

    Returns:
        A row for each engine, of each prompt length and batch size.

    Raises:
        LowvramError: An unknown peer, too many threads, or no engine at all could run.
        PlanError: The plan does not fit the model or the prompt.
        SourceError: No such model.
    """
    settings = settings or BenchSettings()
    names = [*OURS, *peer_names(against, gguf)]
    source = find_source(model)
    spec = source.spec()
    settings.check(spec)
    budget = _budget(gpu)
    plan = settings.planned(_plan(plan, spec, budget, settings.context))
    directory = _directory(source, names, progress)
    load_before = _load_average()
    questions, origin = _questions(source, spec, settings)
    total = (budget.total_bytes, budget.context_bytes) if budget else None
    task = Task(source.name, directory, plan.to_json(), total, questions, plan.threads)
    with cpu_threads(plan.threads), tempfile.TemporaryDirectory() as folder:
        reasons = {name: ENGINES[name].absent(torch.cuda.is_available()) for name in names if name not in OURS}
        if not reasons.get("llama.cpp", "not asked for"):
            task, reasons["llama.cpp"] = _with_gguf(task, source, gguf, plan, Path(folder), progress)
        bandwidth = _read_bandwidth(plan)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # what the measurement took is the engines' now
        contest = Contest(task, entrants(names, reasons, task, plan), settings.processes, progress)
        contest.measure(settings.rounds)
    rows = contest.rows(bandwidth)
    if not any(row.ran for row in rows):
        said = dict.fromkeys(f"{row.engine}: {row.reason}" for row in rows)
        raise LowvramError("no engine could run this: " + "; ".join(said))
    return BenchResult(
        model=source.public_name,
        plan=plan.summary(),
        gpu=_card_in_words(budget),
        simulated=not torch.cuda.is_available(),
        rows=rows,
        prompt=origin,
        prompt_tokens=settings.prompt_tokens,
        new_tokens=settings.new_tokens,
        batch_size=settings.batch_size,
        rounds=settings.rounds,
        threads=plan.threads,
        text_reference=contest.reference,
        read_bytes_per_s=bandwidth,
        alternated="loaded together" if contest.together else "loaded anew for every round",
        load_average=(load_before, _load_average()),
        machine=facts(),
        versions=versions(PACKAGES),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _several(value: int | Sequence[int]) -> tuple[int, ...]:
    """Numbers in their order, each once."""
    return tuple(dict.fromkeys(value)) if isinstance(value, Sequence) and not isinstance(value, str) else (value,)


def _with_gguf(
    task: Task, source: Source, stated: str | os.PathLike | None, plan: Plan, folder: Path, progress: bool
) -> tuple[Task, str]:
    """The task with llama.cpp's file; or as it was, and why there is none."""
    try:
        path, origin = gguf_file(source, stated, plan, folder, progress)
    except LowvramError as error:
        if stated:
            raise
        return task, str(error)
    return replace(task, gguf=str(path), gguf_origin=origin), ""


def _load_average() -> float:
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else 0.0


def _card_in_words(budget: GpuBudget | None) -> str:
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "stand-in GPU (simulated)"
    return f"{name}, {format_bytes(budget.total_bytes) if budget else 'no limit'}"


def peer_names(against: tuple[str, ...] | None, gguf: str | os.PathLike | None) -> list[str]:
    """Names of the engines to compare with, each once; by default those installed, and llama.cpp if it has a file.

    Raises:
        LowvramError: An unknown engine, a file or type that is none, or one although llama.cpp is not asked for.
    """
    peers = [name for name in ENGINES if name not in OURS]
    if against is None:
        stated_type(gguf)
        return [name for name in peers if ENGINES[name].installed() or (gguf and name == "llama.cpp")]
    if isinstance(against, str) or not all(isinstance(name, str) for name in against):
        raise LowvramError(f"expected names of engines such as ('transformers', 'llama.cpp'), found {against!r}")
    if unknown := [name for name in against if name not in peers]:
        raise LowvramError(f"unknown engine {unknown[0]!r}: expected some of {', '.join(peers)}")
    if gguf and "llama.cpp" not in against:
        raise LowvramError(
            f"a .gguf file or type is for llama.cpp, found {', '.join(against) or 'no engine'} to compare with"
        )
    stated_type(gguf)
    return list(dict.fromkeys(against))


def _directory(source: Source, names: Sequence[str], progress: bool) -> str:
    """Where the fetched directory lies, if an engine opens one. Weights are brought here anyhow, where that shows."""
    source.checkpoint(progress)
    return str(source.fetch(progress)) if set(names) - {*OURS, "llama.cpp"} else ""


def _budget(gpu: str | int | GpuBudget | Gpu | None) -> GpuBudget | None:
    if isinstance(gpu, Gpu):
        return gpu.budget
    return gpu if gpu is None or isinstance(gpu, GpuBudget) else GpuBudget.parse(gpu)


def _plan(plan: Plan | None, spec: ModelSpec, budget: GpuBudget | None, tokens: int) -> Plan:
    if plan is not None:
        return plan.made_for(spec)
    if budget is None:
        return Plan.uniform(spec, "stored" if spec.as_it_is else "bf16", context=tokens)
    return auto_plan(spec, replace(budget, kernels="cuda" if torch.cuda.is_available() else "cpu"), tokens).plan


def _questions(source: Source, spec: ModelSpec, settings: BenchSettings) -> tuple[tuple[Question, ...], str]:
    """What every engine is asked, and where the prompts' ids come from.

    Shorter prompts are the beginnings of longer ones; sequences of a batch begin one second message apart.
    """
    longest, most = (max(values) for values in zip(*settings.cells, strict=True))
    ids, origin = _ids(source, spec, longest + most * FOLLOW_UP_TOKENS)

    def question(length: int, batch_size: int) -> Question:
        starts = range(0, batch_size * FOLLOW_UP_TOKENS, FOLLOW_UP_TOKENS)
        prompts = tuple(ids[start : start + length] for start in starts)
        follow_ups = tuple(ids[start + length : start + length + FOLLOW_UP_TOKENS] for start in starts)
        return Question(prompts, follow_ups, settings.new_tokens)

    return tuple(question(*cell) for cell in settings.cells), origin


def _ids(source: Source, spec: ModelSpec, tokens: int) -> tuple[tuple[int, ...], str]:
    """So many ids, and where they come from."""
    try:
        ids = source.tokenizer()(sample_text())["input_ids"]
    except SourceError:  # no tokenizer: nothing here needs one
        drawn = random.Random(SEED)
        return tuple(drawn.randrange(spec.vocab_size) for _ in range(tokens)), "random ids: the model has no tokenizer"
    return tuple((ids * -(-tokens // len(ids)))[:tokens]), "the library's own text"


def _read_bandwidth(plan: Plan) -> float:
    """Bytes a second at which the layers' processor sums a block that no cache holds: the best of nine times."""
    on_card = torch.cuda.is_available() and set(plan.layer_places()) == {"gpu"}
    block, best = torch.ones(READ_BYTES // 8, dtype=torch.int64, device="cuda" if on_card else "cpu"), 0.0
    for _ in range(9):
        started = time.perf_counter()
        int(block.sum())  # waits for the card
        best = max(best, READ_BYTES / (time.perf_counter() - started))
    return best
