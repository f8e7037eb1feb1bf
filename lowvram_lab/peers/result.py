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
    """One engine. Figures are ``None`` where it did not run, or cannot say.

    Attributes:
        engine: Its name.
        reason: Why it did not run, or nothing.
        prefill_tokens_per_s: Prompt tokens over ``ttft_s``.
        decode_tokens_per_s: After the first token: median over rounds.
        decode_p10: What nine rounds of ten exceed.
        decode_p90: What one round of ten exceeds.
        ratio: Of decoding speeds to the first row that ran, median over rounds of the ratio within each.
        ttft_s: Seconds from prompt to first token, median.
        follow_up_s: The same for a second message of ``FOLLOW_UP_TOKENS``, the conversation before it kept in the KV
            cache.
        peak_bytes: Most GPU memory, loading included, without the CUDA context: without CUDA, of ours what the stand-in
            counted (*simulated*), of others ``None``. What llama.cpp takes is the driver's figure for its process.
        peak_rss_bytes: How far the resident memory of its process rose while it loaded the model and answered once;
            pages of mapped files, and of a compiler where one is needed, are in it.
        weight_bytes: Of all weights in memory.
        bytes_per_token: Weights that a token needs, and keys and values halfway through the answer.
        bandwidth_share: ``bytes_per_token`` times tokens a second, of the read bandwidth measured with the same number
            of threads; above 1 where caches hold part of the model. ``None`` for weights in several memories.
        equal_tokens: Share of its greedy answer that is, position by position, ``BenchResult.text_reference``'s. After
            the first difference two texts go their own ways.
        agreement: Share of positions where it finds the reference's token most likely, given those before.
        note: What a reader has to know of it.
        rounds: Tokens a second, round by round.
    """

    engine: str
    reason: str = ""
    prefill_tokens_per_s: float | None = None
    decode_tokens_per_s: float | None = None
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
        rows: One an engine, ours first.
        prompt: Where the prompt's ids come from.
        prompt_tokens: Its length.
        new_tokens: Decoded after the first token.
        rounds: Counted ones; before them each engine ran two that are not counted.
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
    prompt_tokens: int
    new_tokens: int
    rounds: int
    threads: int
    text_reference: str
    read_bytes_per_s: float | None
    alternated: str
    load_average: tuple[float, ...]
    machine: dict[str, str | int]
    versions: dict[str, str]
    date: str

    def row(self, engine: str) -> BenchRow:
        """The row of an engine (``KeyError`` if it has none)."""
        for row in self.rows:
            if row.engine == engine:
                return row
        raise KeyError(engine)

    def table(self) -> pd.DataFrame:
        """Engines that ran, and the reasons of those that did not; sizes in MiB."""
        lines = []
        for row in self.rows:
            line = {
                "engine": row.engine,
                "prefill/s": row.prefill_tokens_per_s,
                "decode/s": row.decode_tokens_per_s,
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
            digits = {name: 3 if name in ("first s", "follow-up s") else 2 for name in line} | {"decode/s": 1}
            shown = {k: round(v, digits[k]) if isinstance(v, float) else v for k, v in line.items()}
            lines.append({**shown, "remark": row.reason or row.note})
        return pd.DataFrame(lines)

    def summary(self) -> str:
        """One line: how fast the first row that ran is, and the others' ratios to it."""
        ran = [row for row in self.rows if row.ran]
        others = ", ".join(f"{row.engine} {row.ratio:.2f}x" for row in ran[1:])
        where = STAND_IN if self.simulated else self.gpu
        return (
            f"{self.model}: {ran[0].engine} decodes {ran[0].decode_tokens_per_s:.1f} tokens/s"
            + (f" (beside it: {others})" if others else "")
            + f"; {_count(self.threads, 'thread')}, median of {_count(self.rounds, 'round')}, on {where}"
        )

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
            f"prompt of {self.prompt_tokens} tokens ({self.prompt}), {self.new_tokens} decoded, "
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


def _mib(size: int | None) -> float | None:
    return None if size is None else size / MiB


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
