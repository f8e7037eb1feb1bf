"""What ``bench`` found: a row an engine, readable as a table and as plain data."""

import html
from dataclasses import asdict, dataclass, field

import pandas as pd

from lowvram_lab.planner.profile import STAND_IN
from lowvram_lab.units import MiB

FOLLOW_UP_TOKENS = 16
"""Of the second message."""


@dataclass(frozen=True)
class BenchRow:
    """One engine, at one length of prompt and one batch size. Figures are ``None`` where it did not run, or cannot say.

    Attributes:
        engine: Its name.
        reason: Why it did not run, or nothing.
        prompt_tokens: Length of each prompt.
        batch_size: Sequences side by side.
        prefill_tokens_per_s: Tokens of all prompts over ``ttft_s``.
        decode_tokens_per_s: Of each sequence, after the first token: median over rounds.
        total_tokens_per_s: Of all sequences together.
        decode_p10: What nine rounds of ten exceed.
        decode_p90: What one round of ten exceeds.
        ratio: Of decoding speeds to the first row that ran, median over rounds of the ratio within each.
        ttft_s: Seconds from prompts to first tokens, median.
        follow_up_s: The same for a second message of ``FOLLOW_UP_TOKENS``, the conversation before it kept in the KV
            cache.
        peak_bytes: Most GPU memory, loading included, without the CUDA context: without CUDA, of ours what the stand-in
            counted (*simulated*), of others ``None``. What llama.cpp takes is the driver's figure for its process.
        peak_rss_bytes: How far the resident memory of its process rose while it loaded the model and answered once;
            pages of mapped files, and of a compiler where one is needed, are in it.
        weight_bytes: Of all weights in memory.
        bytes_per_token: Weights that a token needs, and keys and values halfway through the answer; the sequences of a
            batch share the weights.
        bandwidth_share: ``bytes_per_token`` times all tokens a second, of the read bandwidth measured with as many
            threads; above 1 where caches hold part of the model. ``None`` for weights in several memories.
        equal_tokens: Share of its greedy answer that is, position by position, ``BenchResult.text_reference``'s. After
            the first difference two texts go their own ways.
        agreement: Share of positions where it finds the reference's token most likely, given those before.
        note: What a reader has to know of it.
        rounds: Tokens a second, round by round.
    """

    engine: str
    reason: str = ""
    prompt_tokens: int = 0
    batch_size: int = 1
    prefill_tokens_per_s: float | None = None
    decode_tokens_per_s: float | None = None
    total_tokens_per_s: float | None = None
    decode_p10: float | None = None
    decode_p90: float | None = None
    ratio: float | None = None
    ttft_s: float | None = None
    follow_up_s: float | None = None
    peak_bytes: int | None = None
    peak_rss_bytes: int | None = None
    weight_bytes: int | None = None
    bytes_per_token: int | None = None
    bandwidth_share: float | None = None
    equal_tokens: float | None = None
    agreement: float | None = None
    note: str = ""
    rounds: tuple[float, ...] = field(default=(), repr=False)

    @property
    def ran(self) -> bool:
        """Whether there are figures."""
        return not self.reason


@dataclass(frozen=True)
class BenchResult:
    """Engines side by side.

    Attributes:
        model: Its name, without the path to it.
        plan: Ours, in words.
        gpu: On what, in words; says *simulated* where it is.
        simulated: Whether the GPU is the stand-in: speeds are then this CPU's.
        rows: One an engine, ours first, for each batch size and each length of prompt.
        prompt: Where the prompt's ids come from.
        prompt_tokens: Its length, or lengths, as asked for.
        new_tokens: Decoded after the first token.
        batch_size: Sequences side by side, one number or several, as asked for.
        rounds: Counted ones; before them each engine ran two of each question that are not counted.
        threads: CPU threads of every engine.
        text_reference: The engine whose text is the others' reference, or nothing if none ran.
        read_bytes_per_s: Read bandwidth measured.
        alternated: ``"loaded together"``, or ``"loaded anew for every round"`` where memory does not hold all engines.
        load_average: Of the machine over a minute, before and after; other work disturbs timings.
        machine: Processor, cores, RAM, GPU.
        versions: Of what ran.
        date: UTC.
    """

    model: str
    plan: str
    gpu: str
    simulated: bool
    rows: tuple[BenchRow, ...]
    prompt: str
    prompt_tokens: int | tuple[int, ...]
    new_tokens: int
    batch_size: int | tuple[int, ...]
    rounds: int
    threads: int
    text_reference: str
    read_bytes_per_s: float | None
    alternated: str
    load_average: tuple[float, ...]
    machine: dict[str, str | int]
    versions: dict[str, str]
    date: str

    def row(self, engine: str, prompt_tokens: int | None = None, batch_size: int | None = None) -> BenchRow:
        """The row of an engine, the first with that length and batch size (``KeyError`` if there is none)."""
        for row in self.rows:
            fits = prompt_tokens in (None, row.prompt_tokens) and batch_size in (None, row.batch_size)
            if row.engine == engine and fits:
                return row
        raise KeyError(engine)

    @property
    def cells(self) -> list[tuple[int, int]]:
        """Length of the prompt and batch size of each question, in order."""
        return list(dict.fromkeys((row.prompt_tokens, row.batch_size) for row in self.rows))

    def table(self) -> pd.DataFrame:
        """Engines that ran, and the reasons of those that did not; sizes in MiB.

        Length and batch size have columns where there are several, and so has what all sequences decode together.
        """
        lines = [self._line(row) for row in self.rows]
        dropped = [] if len(self.cells) > 1 else ["prompt", "batch"]
        dropped += [] if any(row.batch_size > 1 for row in self.rows) else ["total/s"]
        return pd.DataFrame(lines).drop(columns=dropped)

    def _line(self, row: BenchRow) -> dict:
        line = {
            "engine": row.engine,
            "prompt": row.prompt_tokens,
            "batch": row.batch_size,
            "prefill/s": row.prefill_tokens_per_s,
            "decode/s": row.decode_tokens_per_s,
            "total/s": row.total_tokens_per_s,
            "p10": row.decode_p10,
            "p90": row.decode_p90,
            "ratio": row.ratio,
            "first s": row.ttft_s,
            "follow-up s": row.follow_up_s,
            "peak GPU MiB" + (" (simulated)" if self.simulated else ""): _mib(row.peak_bytes),
            "peak RSS MiB": _mib(row.peak_rss_bytes),
            "weights MiB": _mib(row.weight_bytes),
            "MiB/token": _mib(row.bytes_per_token),
            "bandwidth": row.bandwidth_share,
            "equal": row.equal_tokens,
            "agreement": row.agreement,
        }
        digits = {name: 3 if name in ("first s", "follow-up s") else 2 for name in line}
        digits |= {"decode/s": 1, "total/s": 1}
        shown = {
            name: round(value, digits[name]) if isinstance(value, float) else value for name, value in line.items()
        }
        return {**shown, "remark": row.reason or row.note}

    def remarks(self) -> list[str]:
        """What there is to say of each engine, a line each: once where it is the same for every question."""
        said: dict[tuple[str, str], list[str]] = {}
        for row in self.rows:
            if text := row.reason or row.note:
                where = f"prompt {row.prompt_tokens}, batch {row.batch_size}"
                said.setdefault((row.engine, text), []).append(where)
        everywhere = len(self.cells)
        return [
            f"{engine}: {text}" if len(places) == everywhere else f"{engine} ({'; '.join(places)}): {text}"
            for (engine, text), places in said.items()
        ]

    def summary(self) -> str:
        """One line: how fast the first row that ran is, and the others' ratios to it, from the least to the highest."""
        ran = [row for row in self.rows if row.ran]
        first, *others = dict.fromkeys(row.engine for row in ran)
        speeds = _range([row.decode_tokens_per_s for row in ran if row.engine == first], ".1f")
        ratios = [f"{name} {_range([row.ratio for row in ran if row.engine == name], '.2f', 'x')}" for name in others]
        asked = f"{self._asked()}, " if len(self.cells) > 1 or self.cells[0][1] > 1 else ""
        where = STAND_IN if self.simulated else self.gpu
        return (
            f"{self.model}: {first} decodes {speeds} tokens/s"
            + (f" (beside it: {', '.join(ratios)})" if ratios else "")
            + f"; {asked}{_count(self.threads, 'thread')}, median of {_count(self.rounds, 'round')}, on {where}"
        )

    def _asked(self) -> str:
        """Lengths and batch sizes, in words."""
        lengths, sizes = (list(dict.fromkeys(values)) for values in zip(*self.cells, strict=True))
        said = f"{'prompts' if len(lengths) > 1 else 'prompt'} of {_and(lengths)} tokens"
        return said + (f", batch {_and(sizes)}" if sizes != [1] else "")

    def circumstances(self) -> list[str]:
        """What else a reader has to know, a line each."""
        machine = ", ".join(f"{name} {value}" for name, value in self.machine.items())
        versions = ", ".join(f"{name} {value}" for name, value in self.versions.items())
        bandwidth = f"{self.read_bytes_per_s / 1e9:.1f} GB/s" if self.read_bytes_per_s else "unknown"
        load = " to ".join(f"{load:.2f}" for load in self.load_average)
        if self.load_average[0] > self.machine["cpu_cores"] / 2:
            load += ": something else kept the cores busy"
        return [
            f"plan: {self.plan}; GPU: {self.gpu}",
            f"{self._asked()} ({self.prompt}), {self.new_tokens} decoded, "
            f"{_count(self.rounds, 'round')}, engines {self.alternated}; reference of texts: {self.text_reference}",
            f"machine: {machine}; {_count(self.threads, 'thread')}; read bandwidth {bandwidth}; load average {load}",
            f"{versions}; {self.date}",
        ]

    def to_dict(self) -> dict:
        """Plain data."""
        return asdict(self)

    def __repr__(self) -> str:
        table = self.table().to_string(index=False, na_rep="")
        return "\n".join([self.summary(), table, *self.circumstances()])

    def _repr_html_(self) -> str:
        facts = "<br>".join(html.escape(line) for line in self.circumstances())
        table = self.table().to_html(index=False, na_rep="")
        return f"<b>Benchmark</b> {html.escape(self.summary())}{table}<small>{facts}</small>"


def _range(values: list[float], shape: str, unit: str = "") -> str:
    """The least and the highest of some values, or the one that both are."""
    low, high = (f"{value:{shape}}{unit}" for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def _and(values: list[int]) -> str:
    return " and ".join(part for part in (", ".join(map(str, values[:-1])), str(values[-1])) if part)


def _mib(size: int | None) -> float | None:
    return None if size is None else size / MiB


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
