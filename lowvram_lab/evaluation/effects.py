"""effects: an article's effect table, measured again; each of its figures beside ours, or beside why we cannot say.

Derived in: notebooks/07_measure_everything.ipynb
"""

import datetime
import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowvram_lab import machine
from lowvram_lab.chat.session import ChatSession
from lowvram_lab.decoding.lean import decoder_for
from lowvram_lab.engine.load import load
from lowvram_lab.errors import BudgetError, LowvramError, first_line
from lowvram_lab.evaluation.effect_report import CARD, CLAIMS, MODEL, Effect, EffectReport, judged
from lowvram_lab.evaluation.fidelity import Fidelity, fidelity, load_reference
from lowvram_lab.files import read_marker
from lowvram_lab.memory.budget import GpuBudget
from lowvram_lab.memory.cuda import open_gpu
from lowvram_lab.memory.gpu import Gpu, StandInGpu
from lowvram_lab.model.checkpoint import Checkpoint
from lowvram_lab.model.plan import Plan
from lowvram_lab.model.source import Source, find_source
from lowvram_lab.model.spec import ModelSpec
from lowvram_lab.packaged import calibration_text
from lowvram_lab.planner.auto import DEFAULT_CONTEXT, PlanChoice, auto_plan
from lowvram_lab.planner.forecast import forecast
from lowvram_lab.planner.measure import run_speed, run_workload, where_it_runs
from lowvram_lab.planner.profile import STAND_IN, MemoryProfile, Workload
from lowvram_lab.planner.speed import forecast_speed
from lowvram_lab.repository.text import windows_in_words
from lowvram_lab.units import format_bytes
from lowvram_lab.weights.calibration import calibration_windows
from lowvram_lab.weights.recipe import recipe
from lowvram_lab.weights.sensitivity import Sensitivity, estimate_sensitivity

EXPECTED = (LowvramError, MemoryError, OSError, torch.OutOfMemoryError)
"""What may go wrong on a machine; anything else is a mistake of ours."""

NOT_HERE = "not reproducible on this hardware"
QUESTIONS = ("Name the capital of France.", "Write one sentence about its most famous museum.")
"""The smallest model is sure of what it answers: "What is …?" hangs on 0.07 nats there, less than rounding moves."""

ANSWER_TOKENS = 64
CALIBRATION_TOKENS = 1024
FORMATS = ("int8", "int5-g32", "int4", "int4-g32", "int3-g32")
"""For recipes: a third of those that ``convert`` weighs up, and so a third of its time."""

LARGER = 1.25
"""A card with so many times the budget is another card: its speed says nothing of the one to be."""


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
    """Forecasts, loads, runs, chats and compresses. A stage that fails leaves the reason in its row.

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
    began = time.monotonic()
    date = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    case = open_case(model, gpu, context, converted)
    case.formats = formats
    case.calibration_tokens = calibration_tokens
    case.progress = progress
    rows: list[Effect] = []
    seconds: dict[str, float] = {}
    for number, stage in enumerate(STAGES, start=1):
        if say:
            say(f"{number}/{len(STAGES)} {stage.name}")
        stage_began = time.monotonic()
        rows += run_stage(stage, case)
        gc.collect()  # an error's frames held what it had made
        seconds[stage.name] = time.monotonic() - stage_began
    return EffectReport(
        model=case.spec.name,
        gpu=f"{case.card} of {case.gpu.name}",
        context=case.context,
        effects=tuple(rows),
        weights_from=case.weights_from,
        machine=machine.facts(),
        stages=seconds,
        date=date,
        seconds=time.monotonic() - began,
    )


@dataclass
class Case:
    """What the stages share: what is measured, and what earlier stages made (``None`` where they have not).

    Attributes:
        source: The 16-bit model's.
        spec: The model.
        budget: The card to be.
        gpu: What stands for it.
        context: Tokens to plan for.
        converted: Claim → source and spec of a directory to measure for it.
        other: Why the article's figure is another's, or nothing.
        slow: Why no speed measured here is that of the card, or nothing.
        formats: For recipes to choose among.
        calibration_tokens: Read so many to estimate what formats cost.
        progress: Whether to show progress bars.
        lost: Stage → why it failed.
        bytes_in_16_bits: Peak of the model as it is, by forecast.
        choice: The plan for the card.
        checkpoint: The model's weights.
        tokenizer: The model's.
        weights_from: Where the weights come from, in words.
        model: Loaded by a plan for what stands for the card.
        how: How figures of that model came about.
        session: A chat with it that has had its first turn.
        reference: The 16-bit model.
        sensitivity: What formats cost.
    """

    source: Source
    spec: ModelSpec
    budget: GpuBudget
    gpu: Gpu
    context: int
    converted: dict[str, tuple[Source, ModelSpec]]
    other: str
    slow: str
    formats: tuple[str, ...] = FORMATS
    calibration_tokens: int = CALIBRATION_TOKENS
    progress: bool = False
    lost: dict[str, str] = field(default_factory=dict)

    bytes_in_16_bits: int | None = None
    choice: PlanChoice | None = None
    checkpoint: Checkpoint | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    weights_from: str = ""
    model: PreTrainedModel | None = None
    how: str = ""
    session: ChatSession | None = None
    reference: PreTrainedModel | None = None
    sensitivity: Sensitivity | None = None

    @property
    def card(self) -> str:
        """The card's size in words."""
        return format_bytes(self.budget.total_bytes)

    @property
    def naive(self) -> Plan:
        """The whole model in 16 bits on the GPU."""
        return Plan.uniform(self.spec, "bf16", context=self.context)

    def saved(self, weight_bytes: int) -> float:
        """Share of the weights' 16-bit bytes that so many save."""
        return 1 - weight_bytes / (2 * self.spec.num_parameters)

    def need(self, made: str, stage: str):
        """What an earlier stage made.

        Raises:
            LowvramError: It failed; the message is its reason.
        """
        found = getattr(self, made)
        if found is None:
            raise LowvramError(self.lost[stage])
        return found

    def memory(self, claim: str, quantity: str, profile: MemoryProfile, how: str, note: str) -> Effect:
        """A row about a peak."""
        peak = profile.device_peak_bytes
        ours = format_bytes(peak)
        if self.bytes_in_16_bits not in (None, peak):
            ours += f" ({peak / self.bytes_in_16_bits - 1:+.0%})"
        figures = {"peak_bytes": peak, "fits": profile.fits}
        return judged(claim, quantity, ours, [peak], how=how, note=note, unchecked=self.other, figures=figures)

    def timed(self, claim: str, quantity: str, ours: str, values: list[float], **told) -> Effect:
        """A row about time: not that of the card unless it is the card. ``told`` as ``judged``."""
        ours = f"{NOT_HERE}; {ours}" if self.slow else ours
        return judged(claim, quantity, ours, values, unchecked=self.slow or self.other, **told)


def open_case(
    model: str, gpu: str | int | GpuBudget, context: int | None, converted: Mapping[str, str | Path | None] | None
) -> Case:
    """Checks all that can be known before the first stage. Arguments and errors as ``effects``."""
    source, spec = _opened(model)
    source.require_chat_template()  # two of the claims are about chats
    budget = GpuBudget.parse(gpu)
    context = context or min(DEFAULT_CONTEXT, spec.longest_context)
    Plan.uniform(spec, "bf16", context=context)  # refuses a context that the model does not have
    made = {key: _opened(path, converted=True) for key, path in (converted or {}).items() if path}
    for its_source, its_spec in made.values():
        if its_spec.vocab_size != spec.vocab_size:
            raise LowvramError(
                f"{its_source.name}: expected {model} converted, {spec.vocab_size} words, found "
                f"{its_spec.vocab_size} of them"
            )
    opened, card = open_gpu(budget), format_bytes(budget.total_bytes)
    same = spec.fingerprint == _opened(MODEL)[1].fingerprint and budget.total_bytes == CARD
    other = "" if same else f"the article's is that of {MODEL} on a {format_bytes(CARD)} card"
    return Case(source, spec, budget, opened, context, made, other, _why_slow(opened, budget, card))


def _why_slow(gpu: Gpu, budget: GpuBudget, card: str) -> str:
    if gpu.simulated:
        return f"no CUDA card here, so no {card} one to time"
    _, total_bytes = torch.cuda.mem_get_info(gpu.device)
    return f"{gpu.name} is a larger card than one of {card}" if total_bytes > LARGER * budget.total_bytes else ""


def _opened(model: str | Path, converted: bool = False) -> tuple[Source, ModelSpec]:
    """Source and spec of a model in 16 bits, or of one from ``convert``."""
    source = find_source(model)
    name = source.public_name if source.kind in ("directory", "gguf") else source.name  # no paths in a report
    spec = source.spec(name)
    if bool(spec.stored) != converted:
        kinds = "a 16-bit model", "a directory from lowvram convert"
        raise LowvramError(f"{model}: expected {kinds[converted]}, found {kinds[not converted]}")
    return source, spec


# --- the stages: each takes the case, keeps in it what later ones need, and returns its row


def forecast_16_bits(case: Case) -> Effect:
    """What the model takes as it is."""
    profile = forecast(case.naive, case.budget)
    case.bytes_in_16_bits = profile.device_peak_bytes
    oom = profile.first_oom
    note = f"what it would take without a limit: out of memory in {oom.phase}, at {oom.module}" if oom else "it fits"
    return case.memory("before", "GPU memory, 16 bits", profile, "forecast", note)


def plan(case: Case) -> Effect:
    """What it takes by the plan for that card."""
    case.choice = auto_plan(case.spec, case.budget, case.context)
    summary = case.choice.plan.summary()
    return case.memory("after", "GPU memory, planned", case.choice.forecast, "forecast", summary)


def fetch(case: Case) -> None:
    """Weights and tokenizer."""
    marker = read_marker(case.source.small_files(case.progress)) or {}
    case.checkpoint, case.tokenizer = case.source.checkpoint(), case.source.tokenizer()
    case.spec = case.source.spec(case.spec.name)  # the files decide, now that they are here
    case.weights_from = marker.get("source", case.source.public_name)


def run(case: Case) -> Effect:
    """Loads the plan for what stands for the card, and fills the context."""
    checkpoint = case.need("checkpoint", "fetch")
    choice = auto_plan(case.spec, case.gpu, case.context)
    case.model = load(choice.plan, case.gpu, checkpoint=checkpoint, progress=case.progress)
    where = where_it_runs(choice.plan, STAND_IN if case.gpu.simulated else case.gpu.name)
    case.how = f"measured, {where}"
    profile = run_workload(case.model, choice.forecast.workload)
    foretold = format_bytes(choice.forecast.device_peak_bytes)
    note = f"{foretold} by forecast for it; {choice.plan.summary()}"
    return case.memory("after", "GPU memory, run", profile, f"measured, {case.gpu.name}", note)


def ask_first(case: Case) -> Effect:
    """The first question of a chat."""
    model = case.need("model", "run")
    session = ChatSession(model, case.tokenizer, max_new_tokens=ANSWER_TOKENS)
    row = _answered(case, session, "first", QUESTIONS[0])
    case.session = session
    return row


def ask_later(case: Case) -> Effect:
    """Its second question."""
    return _answered(case, case.need("session", "chat"), "later", QUESTIONS[1])


def _answered(case: Case, session: ChatSession, claim: str, question: str) -> Effect:
    session.ask(question)
    turn = session.turns[-1]
    last_s = turn.ttft_s
    if turn.tokens_per_s:
        last_s += (turn.new_tokens - 1) / turn.tokens_per_s
    ours = f"{turn.ttft_s:.2f} s to the first token, {last_s:.2f} s to the last"
    note = f"{turn.prompt_tokens} tokens, {turn.cached_tokens} of them cached; {turn.new_tokens} answered"
    note += "".join(f"; given up: {what}" for what in turn.given_up)
    told = {"how": case.how, "note": note, "figures": turn.to_dict()}
    return case.timed(claim, f"{claim} response", ours, [turn.ttft_s, last_s], **told)


def decode(case: Case) -> Effect:
    """Tokens a second; by forecast where there is no model."""
    prompt = max(1, min(64, case.context // 2))
    workload = Workload(prompt, max(1, min(32, case.context - prompt - 1)))
    if case.model is None:
        speed = forecast_speed(case.need("choice", "plan").plan, workload)
    else:
        decoder = decoder_for(case.model, workload.tokens, progress=False)
        run_speed(case.model, Workload(1, 1), decoder)  # the first token makes what is made once
        speed = run_speed(case.model, workload, decoder)
    rate = speed.decode_tokens_per_s
    how = f"{speed.origin}, {speed.where}"
    note = f"{workload.new_tokens} tokens after {prompt}, by {speed.engine}"
    ours = f"{rate:.1f} tokens/s"
    return case.timed("decoding", "decoding", ours, [rate], how=how, note=note, figures=speed.to_dict())


def estimate(case: Case) -> None:
    """What formats would cost, for the recipes of the two compressions; and the original to compare them with."""
    case.model = case.session = None
    checkpoint = case.need("checkpoint", "fetch")
    case.reference = load_reference(case.naive, checkpoint=checkpoint, progress=case.progress)
    if len(case.converted) < 2:
        text = calibration_text()
        ids = calibration_windows(case.tokenizer, text, case.calibration_tokens, case.spec.longest_context)
        options = {"formats": case.formats, "progress": case.progress}
        case.sensitivity = estimate_sensitivity(case.spec, checkpoint, ids, **options)


def compress(case: Case, claim: str) -> Effect:
    """What a model so much smaller loses; without weights, what it would take."""
    if case.checkpoint is None:
        return _foretold(case, claim)
    if claim in case.converted:
        source, spec = case.converted[claim]
        plan = Plan.uniform(spec, "stored", context=case.context)
        how = "measured, as converted"
        note = f"directory {source.public_name}"
    else:
        source, spec = case.source, case.spec
        size = int(2 * spec.num_parameters * (1 - CLAIMS[claim].saved))
        sensitivity = case.need("sensitivity", "sensitivity")
        plan = recipe(spec, sensitivity, weight_bytes=size, context=case.context, stock=False).plan
        plan = replace(plan, solver="rtn")  # what the recipe's estimates are of
        how = "measured, rounded to nearest"
        note = f"--{claim} DIR measures what lowvram convert made instead"
    reference = case.need("reference", "sensitivity")
    plan = plan.with_modules("*", device="cpu")
    model = load(plan, StandInGpu(None), checkpoint=source.checkpoint(), progress=case.progress)
    found = fidelity(model, reference, case.tokenizer, progress=case.progress)
    return _loss(case, claim, found, how, note)


def _loss(case: Case, claim: str, found: Fidelity, how: str, note: str) -> Effect:
    wanted = CLAIMS[claim].saved
    saved = case.saved(found.weight_bytes)
    changed = 1 - found.top1_agreement
    increase = found.perplexity_increase
    return judged(
        claim,
        CLAIMS[claim].name,
        f"{-saved:.1%} weights: perplexity {increase:+.1%}, KL {found.kl_mean:.3f}, top-1 changed {changed:.1%}",
        [increase, changed],
        how=how,
        note=f"{note}; {found.tokens} tokens {windows_in_words(found.window, found.begins_with)}, on this CPU",
        unchecked="" if saved > wanted - 0.005 else f"{saved:.1%} saved, not {wanted:.0%}",
        figures={**found.to_dict(), "saved": saved, "perplexity_increase": increase},
    )


def _foretold(case: Case, claim: str) -> Effect:
    """What can be said of a compression without weights: what a uniform format of that size takes of the card."""
    for name in case.formats:
        plan = Plan.uniform(case.spec, name, context=case.context)
        saved = case.saved(plan.weight_bytes())
        if saved >= CLAIMS[claim].saved:
            break
    profile = forecast(plan, case.budget)
    verdict = "fits" if profile.fits else "does not fit, so the peak is without a limit"
    return judged(
        claim,
        CLAIMS[claim].name,
        f"{NOT_HERE}; {-saved:.1%} weights: peak {format_bytes(profile.device_peak_bytes)}",
        [],
        how="forecast",
        note=f"all {name}, on the GPU whole: {verdict}; loss unknown",
        unchecked=case.lost["fetch"],
        figures={"peak_bytes": profile.device_peak_bytes, "saved": saved},
    )


@dataclass(frozen=True)
class Stage:
    """One step of the report.

    Attributes:
        name: As it is announced and timed.
        work: Takes the case; returns a row, or nothing.
        owes: Claim and quantity of the row that says why where the stage fails.
    """

    name: str
    work: Callable[[Case], Effect | None]
    owes: tuple[str, str] | None = None


STAGES = (
    Stage("forecast", forecast_16_bits, owes=("before", "GPU memory, 16 bits")),
    Stage("plan", plan, owes=("after", "GPU memory, planned")),
    Stage("fetch", fetch),
    Stage("run", run, owes=("after", "GPU memory, run")),
    Stage("chat", ask_first, owes=("first", "first response")),
    Stage("chat on", ask_later, owes=("later", "later response")),
    Stage("decode", decode, owes=("decoding", "decoding")),
    Stage("sensitivity", estimate),
    Stage("medium", partial(compress, claim="medium"), owes=("medium", CLAIMS["medium"].name)),
    Stage("deep", partial(compress, claim="deep"), owes=("deep", CLAIMS["deep"].name)),
)


def run_stage(stage: Stage, case: Case) -> list[Effect]:
    """The row of a stage, if it has one; where the stage fails, the case notes why and the row says so.

    Raises:
        Exception: What is no failure of a machine, a model or its weights.
    """
    try:
        row = stage.work(case)
        return [row] if row else []
    except Exception as error:
        if not _is_expected(error):
            raise
        reason = first_line(error).split("; ")[0]
        case.lost[stage.name] = reason
        if stage.owes is None:
            return []
        ours = "does not fit" if isinstance(error, BudgetError) else "not measured"
        if "fetch" in case.lost or not isinstance(error, LowvramError):
            ours = NOT_HERE
        return [judged(*stage.owes, ours, [], note=reason, unchecked=reason)]


def _is_expected(error: Exception) -> bool:
    from_compiler = type(error).__module__.startswith(("torch._dynamo", "torch._inductor"))
    return isinstance(error, EXPECTED) or from_compiler or "allocate memory" in str(error)
