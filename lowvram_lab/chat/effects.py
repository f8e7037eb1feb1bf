"""An article's effect table, measured again: each of its figures beside ours, or beside why this machine cannot say."""

import datetime
import gc
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from html import escape
from pathlib import Path

import torch

from lowvram_lab import machine
from lowvram_lab.chat.fidelity import WINDOW, fidelity, load_reference
from lowvram_lab.chat.session import ChatSession
from lowvram_lab.engine.lean import LeanDecoder
from lowvram_lab.engine.load import load
from lowvram_lab.engine.sampling import Sampling, choose
from lowvram_lab.errors import BudgetError, LowvramError
from lowvram_lab.files import read_marker
from lowvram_lab.memory.budget import GpuBudget
from lowvram_lab.memory.cuda import open_gpu
from lowvram_lab.memory.gpu import StandInGpu
from lowvram_lab.model.plan import Plan
from lowvram_lab.model.source import find_source
from lowvram_lab.model.spec import ModelSpec
from lowvram_lab.packaged import calibration_text
from lowvram_lab.planner.auto import DEFAULT_CONTEXT, auto_plan
from lowvram_lab.planner.forecast import forecast
from lowvram_lab.planner.measure import run_speed, run_workload, where_it_runs
from lowvram_lab.planner.profile import STAND_IN, Workload
from lowvram_lab.planner.speed import forecast_speed
from lowvram_lab.units import GiB, format_bytes
from lowvram_lab.weights.calibration import calibration_windows
from lowvram_lab.weights.recipe import recipe
from lowvram_lab.weights.sensitivity import estimate_sensitivity


@dataclass(frozen=True)
class Claim:
    """A figure of the article, and the ``limit`` (bytes, tokens/s, seconds, a share) to keep or, ``at_least``, reach.

    ``saved``: the share of the weights' 16-bit bytes that a claim about loss speaks of.
    """

    name: str
    text: str
    limit: float
    at_least: bool = False
    saved: float = 0.0


MODEL, CARD = "qwen1.5-4b", 4 * GiB
"""What the article's table, the source of ``CLAIMS``, is about. Its GB are read as GiB, as cards are sold."""

CLAIMS = {
    "before": Claim("memory in 16 bits", "8 GB or more", 8 * GiB, at_least=True),
    "after": Claim("memory compressed", "3.5 to 3.8 GB", 3.8 * GiB),
    "decoding": Claim("decoding speed", "5 to 10 tokens/s", 5, at_least=True),
    "first": Claim("first response", "3 to 6 s", 6),
    "later": Claim("later responses", "1 to 3 s", 3),
    "medium": Claim("medium compression", "-60% memory, 15% loss", 0.15, saved=0.6),
    "deep": Claim("deep compression", "-70% memory, 25% loss", 0.25, saved=0.7),
}
LOSS = (
    "The article does not define its loss; here it is the increase of perplexity, with the mean KL divergence and the "
    "share of most likely tokens that change, against the 16-bit model."
)
VERDICTS = {True: "held", False: "did not hold", None: "not checked"}
EXPECTED = (LowvramError, MemoryError, OSError, torch.OutOfMemoryError)
NOT_HERE = "not reproducible on this hardware"
QUESTIONS = ("What is the capital of France?", "Write one sentence about its most famous museum.")
ANSWER_TOKENS, CALIBRATION_TOKENS = 64, 1024
FORMATS = ("int8", "int5-g32", "int4", "int4-g32", "int3-g32")
"""For recipes: a third of those that ``convert`` weighs up, and so a third of its time."""


@dataclass(frozen=True)
class Effect:
    """One row: ``claim`` (key of ``CLAIMS``), what is compared, the article's figure and ours, and how ours came about.

    ``held`` says whether the claim holds, ``None`` that this is ``unchecked`` for that reason. ``figures``: ours in
    plain numbers, in bytes, seconds, tokens a second and shares.
    """

    claim: str
    quantity: str
    article: str
    ours: str
    how: str = ""
    note: str = ""
    held: bool | None = None
    unchecked: str = ""
    figures: dict = field(default_factory=dict)


@dataclass(frozen=True)
class EffectReport:
    """The table and what it was made on.

    Attributes:
        model: Model name.
        gpu: The card to be, in words; ``context``: tokens planned for it.
        effects: The rows.
        weights_from: Where the weights come from, or ``""`` where they could not be had.
        machine: Versions, cores, RAM, GPU.
        stages: Name → seconds; ``date``, when it was begun, ISO 8601, and ``seconds`` are those of all.
    """

    model: str
    gpu: str
    context: int
    effects: tuple[Effect, ...]
    weights_from: str
    machine: dict
    stages: dict[str, float]
    date: str
    seconds: float

    def summary(self) -> str:
        """One paragraph made from the rows: claims that held here, that did not, that could not be checked, and why."""
        held, broken, unknown = [], [], {}
        for key, claim in CLAIMS.items():
            rows = [effect for effect in self.effects if effect.claim == key]
            judged = [effect for effect in rows if effect.held is not None]
            if judged:  # what was measured comes after what was forecast
                text = f"{claim.name} (article: {claim.text}; here: {judged[-1].ours}, {judged[-1].how})"
                (held if judged[-1].held else broken).append(text)
            elif rows:
                unknown.setdefault(rows[0].unchecked, []).append(claim.name)
        reasons = [f"{', '.join(names)} ({reason})" for reason, names in unknown.items()]
        before = f"The weights were quantised once before ({self.weights_from}): losses are beside those."
        parts = [
            f"{self.model}, {self.gpu}, context {self.context}.",
            f"Held: {'; '.join(held)}." if held else "No claim was found to hold.",
            f"Did not hold: {'; '.join(broken)}." if broken else "None was found not to hold.",
            f"Could not be checked: {'; '.join(reasons)}." if reasons else "",
            LOSS if any("kl_mean" in effect.figures for effect in self.effects) else "",
            before if ".gguf" in self.weights_from.lower() else "",
        ]
        return " ".join(filter(None, parts))

    def table(self):
        """One row a figure. A DataFrame."""
        import pandas as pd

        rows = [(e.quantity, e.article, e.ours, e.how, VERDICTS[e.held], e.note) for e in self.effects]
        return pd.DataFrame(rows, columns=["quantity", "article", "here", "how", "verdict", "note"])

    def to_dict(self) -> dict:
        """Plain data."""
        return {
            **asdict(self),
            "claims": {key: asdict(claim) for key, claim in CLAIMS.items()},
            "summary": self.summary(),
        }

    def to_markdown(self) -> str:
        """A page: paragraph, table, machine."""
        table = self.table()
        rows = [table.columns, ["---"] * len(table.columns), *table.itertuples(index=False)]
        lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
        return "\n".join(["# Effect table", "", self.summary(), "", *lines, "", self.made_on(), ""])

    def made_on(self) -> str:
        """When, how long, which weights, which machine; one line."""
        stages = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in self.stages.items())
        weights = f" Weights: {self.weights_from}." if self.weights_from else ""
        facts = ", ".join(f"{key} {value}" for key, value in self.machine.items())
        return f"{self.date}, {self.seconds:.0f} s ({stages}).{weights} Machine: {facts}."

    def __repr__(self) -> str:
        table = self.table()
        notes = [f"- {row.quantity}: {row.note}" for row in table.itertuples() if row.note]
        rows = table.drop(columns="note").to_string(index=False, max_colwidth=None, line_width=10**6)
        return "\n".join([rows, *notes, self.made_on(), self.summary()])

    def _repr_html_(self) -> str:
        table = self.table().to_html(index=False)
        return f"<p><b>Effect table.</b> {escape(self.summary())}</p>\n{table}\n<p>{escape(self.made_on())}</p>"


def effects(
    model: str,
    gpu: str | int | GpuBudget,
    *,
    context: int | None = None,
    converted: Mapping[str, str | Path | None] | None = None,
    formats: tuple[str, ...] = FORMATS,
    calibration_tokens: int = CALIBRATION_TOKENS,
    progress: bool = True,
    say: Callable[[str], None] | None = None,
) -> EffectReport:
    """Forecasts, loads, runs, chats and compresses. A stage that fails leaves the reason in its rows.

    Args:
        model: Name, hub id, directory or .gguf file of a 16-bit model.
        gpu: The card to be, such as ``"4GiB"``.
        context: Tokens to plan for; by default 2048, or what the model has.
        converted: ``"medium"`` or ``"deep"`` → a directory from ``convert`` to measure for that claim; by default a
            recipe of that size is rounded to nearest while loading, which loses more than ``convert`` does.
        formats: For recipes to choose among.
        calibration_tokens: Read so many to estimate what the formats cost.
        progress: Show the progress bars of the stages.
        say: Told of each stage as it begins.

    Raises:
        LowvramError: An unknown or converted model, one without a chat template, a context or card that cannot be, a
            directory of another model.
    """
    began, date = time.monotonic(), datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    run = _Run(model, gpu, context, converted or {}, progress)
    run.formats, run.calibration_tokens = formats, calibration_tokens
    stages = run.stages()
    for number, (name, rows, work) in enumerate(stages, start=1):
        if say:
            say(f"{number}/{len(stages)} {name}")
        run.stage(name, rows, work)
    made_on = run.weights_from, machine.facts(), run.seconds, date, time.monotonic() - began
    return EffectReport(run.spec.name, f"{run.card} of {run.gpu.name}", run.context, tuple(run.rows), *made_on)


def _opened(model: str | Path, converted: bool = False) -> tuple:
    """Source and spec of a model in 16 bits, or of one from ``convert``."""
    source = find_source(model)
    name = source.public_name if source.kind in ("directory", "gguf") else source.name  # no paths in a report
    spec = ModelSpec.from_config(source.config(), name)
    if bool(spec.stored) != converted:
        kinds = "a 16-bit model", "a directory from lowvram convert"
        raise LowvramError(f"{model}: expected {kinds[converted]}, found {kinds[not converted]}")
    return source, spec


class _Run:
    """What the stages share. A stage takes what earlier ones made from ``made`` and yields its rows."""

    def __init__(self, model: str, gpu, context: int | None, converted: dict, progress: bool):
        self.source, self.spec = _opened(model)
        self.source.require_chat_template()  # two of the claims are about chats
        self.budget, self.progress, self.weights_from = GpuBudget.parse(gpu), progress, ""
        self.rows, self.seconds, self.made, self.lost = [], {}, {}, {}
        self.formats, self.calibration_tokens = FORMATS, CALIBRATION_TOKENS
        self.context = context or min(DEFAULT_CONTEXT, self.spec.longest_context)
        self.naive = Plan.uniform(self.spec, "bf16", context=self.context)
        self.naive.validate(self.spec)
        self.converted = {key: _opened(path, converted=True) for key, path in converted.items() if path}
        for source, spec in self.converted.values():
            if (found := spec.vocab_size) != (wanted := self.spec.vocab_size):
                raise LowvramError(f"{source.name}: expected {model} converted, {wanted} words, found {found} of them")
        self.gpu, self.card = open_gpu(self.budget), format_bytes(self.budget.total_bytes)
        same = self.spec.fingerprint == _opened(MODEL)[1].fingerprint and self.budget.total_bytes == CARD
        self.other = "" if same else f"the article's is that of {MODEL} on a {format_bytes(CARD)} card"
        self.slow = f"no CUDA card here, so no {self.card} one to time" if self.gpu.simulated else ""
        if not self.gpu.simulated and torch.cuda.mem_get_info(self.gpu.device)[1] > 1.25 * self.budget.total_bytes:
            self.slow = f"{self.gpu.name} is a larger card than one of {self.card}"

    def stages(self) -> list[tuple]:
        """Name, rows as (claim, quantity), and work of each stage."""
        return [
            ("forecast", [("before", "GPU memory, 16 bits")], self.forecast),
            ("plan", [("after", "GPU memory, planned")], self.plan),
            ("fetch", [], self.fetch),
            ("run", [("after", "GPU memory, run")], self.run),
            ("chat", [("first", "first response"), ("later", "later response")], self.chat),
            ("decode", [("decoding", "decoding"), ("decoding", "decoding, LeanDecoder")], self.decode),
            ("sensitivity", [], self.sensitivity),
            *((key, [(key, CLAIMS[key].name)], lambda key=key: self.compress(key)) for key in ("medium", "deep")),
        ]

    def stage(self, name: str, rows: list, work: Callable[[], Iterator[tuple] | None]) -> None:
        """Runs a stage, a tuple from it being a row. Rows it fails to yield say why."""
        began = time.monotonic()
        try:
            for values in work() or ():
                self._add(*rows.pop(0), *values)
        except Exception as error:
            compiler = type(error).__module__.startswith(("torch._dynamo", "torch._inductor"))
            if not (isinstance(error, EXPECTED) or compiler or "allocate memory" in str(error)):
                raise
            self.lost[name] = reason = (str(error).strip() or type(error).__name__).splitlines()[0].split("; ")[0]
            ours = "does not fit" if isinstance(error, BudgetError) else "not measured"
            lacking = "fetch" in self.lost or not isinstance(error, LowvramError)
            for row in rows:
                self._add(*row, NOT_HERE if lacking else ours, (), "", reason, reason)
        gc.collect()  # an error's frames held what it had made
        self.seconds[name] = time.monotonic() - began

    def _add(self, claim: str, quantity: str, ours: str, values, how, note, unchecked: str, figures=None) -> None:
        """Adds a row. Its claim holds if all ``values``, its possible readings, keep to the limit; not if none does."""
        stated = CLAIMS[claim]
        verdicts = {value >= stated.limit if stated.at_least else value <= stated.limit for value in values}
        held = None if unchecked or len(verdicts) != 1 else verdicts.pop()
        if held is None:
            unchecked = unchecked or f"it depends on what the article means; here: {ours}"
        self.rows.append(Effect(claim, quantity, stated.text, ours, how, note, held, unchecked, figures or {}))

    def need(self, name: str, stage: str):
        """What an earlier stage made."""
        if name not in self.made:
            raise LowvramError(self.lost[stage])
        return self.made[name]

    def forecast(self):
        profile = forecast(self.naive, self.spec, self.budget)
        self.made["16 bits"], oom = profile.device_peak_bytes, profile.first_oom
        yield self._memory(profile, "forecast", f"out of memory in {oom.phase}, at {oom.module}" if oom else "it fits")

    def plan(self):
        self.made["plan"] = choice = auto_plan(self.spec, self.budget, self.context)
        yield self._memory(choice.forecast, "forecast", choice.plan.summary(self.spec))

    def _memory(self, profile, how: str, note: str) -> tuple:
        peak, before = profile.device_peak_bytes, self.made.get("16 bits")
        ours = format_bytes(peak) + (f" ({peak / before - 1:+.0%})" if before not in (None, peak) else "")
        return ours, [peak], how, note, self.other, {"peak_bytes": peak, "fits": profile.fits}

    def fetch(self) -> None:
        marker = read_marker(self.source.fetch(self.progress)) or {}
        self.made["weights"], self.made["tokenizer"] = self.source.checkpoint(), self.source.tokenizer()
        self.weights_from = marker.get("source", self.source.public_name)

    def run(self):
        checkpoint, choice = self.need("weights", "fetch"), auto_plan(self.spec, self.gpu, self.context)
        model = load(choice.plan, self.gpu, checkpoint=checkpoint, spec=self.spec, progress=self.progress)
        where = where_it_runs(choice.plan, self.spec, STAND_IN if self.gpu.simulated else self.gpu.name)
        self.made["model"], self.made["where"] = model, f"measured, {where}"
        profile = run_workload(model, choice.forecast.workload)
        note = f"{format_bytes(choice.forecast.device_peak_bytes)} by forecast for it; {choice.plan.summary(self.spec)}"
        yield self._memory(profile, f"measured, {self.gpu.name}", note)

    def _speed(self, text: str, values: list[float], how: str, note: str, figures: dict) -> tuple:
        return f"{NOT_HERE}; {text}" if self.slow else text, values, how, note, self.slow or self.other, figures

    def chat(self):
        session = ChatSession(self.need("model", "run"), self.made["tokenizer"], max_new_tokens=ANSWER_TOKENS)
        for question in QUESTIONS:
            session.ask(question)
            turn = session.turns[-1]
            last = turn.ttft_s + ((turn.new_tokens - 1) / turn.tokens_per_s if turn.tokens_per_s else 0)
            text = f"{turn.ttft_s:.2f} s to the first token, {last:.2f} s to the last"
            note = f"{turn.prompt_tokens} tokens, {turn.cached_tokens} of them cached; {turn.new_tokens} answered"
            note += "".join(f"; given up: {text}" for text in turn.given_up)
            yield self._speed(text, [turn.ttft_s, last], self.made["where"], note, turn.to_dict())

    def decode(self):
        prompt = max(1, min(64, self.context // 2))
        workload = Workload(prompt, max(1, min(32, self.context - prompt - 1)))
        if "model" in self.made:
            speed = run_speed(self.made["model"], workload)
        else:
            speed = forecast_speed(self.need("plan", "plan").plan, self.spec, workload)
        rate, note = speed.decode_tokens_per_s, f"{workload.new_tokens} tokens after {prompt}"
        yield self._speed(f"{rate:.1f} tokens/s", [rate], f"{speed.origin}, {speed.where}", note, speed.to_dict())
        decoder = LeanDecoder(self.need("model", "run"), max_tokens=prompt + workload.new_tokens + 1)
        token = choose(decoder.prefill(torch.ones(1, prompt, dtype=torch.long)), Sampling())
        token, began = choose(decoder.decode(token), Sampling()), time.perf_counter()  # the first one compiles
        for _ in range(workload.new_tokens):
            token = choose(decoder.decode(token), Sampling())
            int(token)  # waits for the device
        rate = workload.new_tokens / (time.perf_counter() - began)
        note, figures = f"{note}, {'' if decoder.compiled else 'not '}compiled", {"decode_tokens_per_s": rate}
        yield self._speed(f"{rate:.1f} tokens/s", [rate], self.made["where"], note, figures)

    def sensitivity(self) -> None:
        self.made.pop("model", None)
        checkpoint, tokenizer = self.need("weights", "fetch"), self.made["tokenizer"]
        self.made["reference"] = load_reference(self.naive, self.spec, checkpoint=checkpoint, progress=self.progress)
        if len(self.converted) < 2:
            ids = calibration_windows(tokenizer, calibration_text(), self.calibration_tokens, self.spec.longest_context)
            found = estimate_sensitivity(self.spec, checkpoint, ids, formats=self.formats, progress=self.progress)
            self.made["sensitivity"] = found

    def compress(self, key: str):
        saved, whole = CLAIMS[key].saved, 2 * self.spec.num_parameters
        if "weights" not in self.made:
            yield self._foretold(saved, whole)
            return
        source, spec = self.converted.get(key, (self.source, self.spec))
        if key in self.converted:
            plan, how = Plan.uniform(spec, "stored", context=self.context), "measured, as converted"
            note = f"directory {source.public_name}"
        else:
            sensitivity, size = self.need("sensitivity", "sensitivity"), int(whole * (1 - saved))
            plan = recipe(spec, sensitivity, weight_bytes=size, context=self.context, stock=False).plan
            how, note = "measured, rounded to nearest", f"--{key} DIR measures what lowvram convert made instead"
        reference, plan = self.need("reference", "sensitivity"), plan.with_modules("*", device="cpu")
        model = load(plan, StandInGpu(None), checkpoint=source.checkpoint(), spec=spec, progress=self.progress)
        found = fidelity(model, reference, self.made["tokenizer"], slice_tokens=WINDOW, progress=self.progress)
        less, more, changed = 1 - found.weight_bytes / whole, found.perplexity_increase, 1 - found.top1_agreement
        text = f"{-less:.1%} weights: perplexity {more:+.1%}, KL {found.kl_mean:.3f}, top-1 changed {changed:.1%}"
        why = "" if less > saved - 0.005 else f"{less:.1%} saved, not {saved:.0%}"
        figures = {**found.to_dict(), "saved": less, "perplexity_increase": more}
        yield text, [more, changed], how, f"{note}; {found.tokens} tokens on this CPU", why, figures

    def _foretold(self, saved: float, whole: int) -> tuple:
        """What can be said of a compression without weights: what a uniform format of that size takes of the card."""
        plans = {name: Plan.uniform(self.spec, name, context=self.context) for name in FORMATS}
        saves = {name: 1 - plan.weight_bytes(self.spec) / whole for name, plan in plans.items()}
        name = next((name for name in FORMATS if saves[name] >= saved), FORMATS[-1])
        profile = forecast(plans[name], self.spec, self.budget)
        text = f"{NOT_HERE}; {-saves[name]:.1%} weights: peak {format_bytes(profile.device_peak_bytes)}"
        note = f"all {name}, on the GPU whole: {'fits' if profile.fits else 'does not fit'}; loss unknown"
        figures = {"peak_bytes": profile.device_peak_bytes, "saved": saves[name]}
        return text, [], "forecast", note, self.lost["fetch"], figures
