"""One split of a model between GPU and CPU: from a few settings to plan, forecast and speed, and one try of it.

Pure functions over frozen data; what draws and clicks is ``panel.py``.

Derived in: notebooks/05_split_the_layers.ipynb
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import pandas as pd
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowvram_lab.chat.prompt import chat_ids, stop_ids, text_ids
from lowvram_lab.decoding.decode import generate
from lowvram_lab.decoding.lean import decoder_for
from lowvram_lab.errors import BudgetError, LowvramError, PlanError
from lowvram_lab.memory.budget import GpuBudget
from lowvram_lab.memory.gpu import Gpu
from lowvram_lab.model.plan import Plan
from lowvram_lab.model.source import find_source
from lowvram_lab.model.spec import ModelSpec
from lowvram_lab.planner.forecast import forecast
from lowvram_lab.planner.measure import run_speed
from lowvram_lab.planner.profile import MemoryProfile, SpeedProfile, Workload
from lowvram_lab.planner.speed import forecast_speed
from lowvram_lab.planner.suggest import SHORTEST_CONTEXT
from lowvram_lab.planner.suited import RECIPES
from lowvram_lab.rates.machine import Machine
from lowvram_lab.repository import hub
from lowvram_lab.units import format_bytes

AS_LOADED = "as loaded"
"""The recipe of a plan whose formats are no uniform recipe's: those it has."""

UNSTATED_CONTEXT = 32768
"""Longest context offered for a model whose config does not state one."""

NEW_TOKENS = 24
"""Longest answer of a try."""


@dataclass(frozen=True)
class SplitState:
    """The settings of one split.

    Attributes:
        gpu_layers: Decoder layers on the GPU; the first ones go to the CPU.
        context: Tokens, prompt and answer together.
        kv_format: The plan's dtype, or ``"int8"``.
        recipe: One of ``recipes_of``.
        threads: CPU threads, or ``None`` for torch's choice.
        embedding_on_cpu: Whether the embedding (and a head that shares its weight) is on the CPU.
    """

    gpu_layers: int
    context: int
    kv_format: str = "bf16"
    recipe: str = "bf16"
    threads: int | None = None
    embedding_on_cpu: bool = False


@dataclass(frozen=True)
class SplitResult:
    """What a split comes to: its plan, the forecast of its memory and of its speed."""

    plan: Plan
    forecast: MemoryProfile
    speed: SpeedProfile

    @property
    def fits(self) -> bool:
        """Whether the whole context can be run."""
        return self.forecast.fits

    def verdict(self) -> str:
        """Fits or not, in a sentence: phase and module of the first failure, what it takes, what the card has."""
        taken = self.forecast.device_peak_bytes
        budget = self.forecast.budget
        oom = self.forecast.first_oom
        if budget is None:
            return f"takes {format_bytes(taken)} of a GPU without a limit"
        if oom is None:
            free = format_bytes(budget.total_bytes - taken)
            return f"fits: takes {format_bytes(taken)} of {format_bytes(budget.total_bytes)}, {free} to spare"
        return (
            f"out of memory in {oom.phase} at {oom.module or 'the model'}: does not fit, would take "
            f"{format_bytes(taken)} on a card without a limit; this one has {format_bytes(budget.total_bytes)}"
        )

    def to_dict(self) -> dict:
        """Plain data."""
        return {"plan": self.plan.to_dict(), "forecast": self.forecast.to_dict(), "speed": self.speed.to_dict()}

    def __repr__(self) -> str:
        return f"{self.verdict()}\n{self.speed.summary()}"

    def _repr_html_(self) -> str:
        return f"{self.verdict()}<br>{self.speed.summary()}{self.plan._repr_html_()}"


@dataclass(frozen=True)
class Trial:
    """One answer of a loaded plan: measured, and beside it the forecast for the very same numbers of tokens.

    Attributes:
        plan: What was loaded.
        gpu: On what, in words; says *simulated* where it is.
        answer: What the model said.
        predicted_bytes: Forecast of the highest allocated GPU memory while answering, without the CUDA context.
        measured_bytes: The same, measured.
        predicted: Forecast of the speed.
        measured: Speed measured with no meter beside it, over as many tokens.
    """

    plan: Plan
    gpu: str
    answer: str
    predicted_bytes: int
    measured_bytes: int
    predicted: SpeedProfile
    measured: SpeedProfile

    def to_dict(self) -> dict:
        """Plain data."""
        return {**asdict(replace(self, plan=None)), "plan": self.plan.to_dict()}

    def __repr__(self) -> str:
        memory = f"{format_bytes(self.predicted_bytes)} predicted, {format_bytes(self.measured_bytes)} measured"
        return f"{self.answer!r} on {self.gpu}: {memory}\n{self.predicted.summary()}\n{self.measured.summary()}"


def recipes_of(spec: ModelSpec, plan: Plan | None = None) -> tuple[str, ...]:
    """The recipes a model can be split with: 16 bits, int8, int4; of a converted model what it holds, of a GGUF first.

    Args:
        spec: The model.
        plan: What is loaded, or to be started from: its dtype is kept, and its formats are offered too where they are
            no recipe's.
    """
    if spec.stored:
        return ("stored",)
    dtype = plan.dtype if plan else RECIPES[0]
    recipes = (*(["stored"] if spec.held else []), dtype, *RECIPES[1:])
    known = plan is None or any(_formats(plan) == _formats(_uniform(spec, recipe, plan)) for recipe in recipes)
    return recipes if known else (AS_LOADED, *recipes)


def contexts_of(spec: ModelSpec, given: int) -> tuple[int, ...]:
    """Powers of two up to the model's longest context, and the given one."""
    longest = longest_context(spec)
    powers = {2**power for power in range(SHORTEST_CONTEXT.bit_length() - 1, longest.bit_length())}
    return tuple(sorted(powers | {given}))


def longest_context(spec: ModelSpec) -> int:
    """Most tokens a plan of the model is offered."""
    return spec.longest_context if spec.max_position_embeddings else min(spec.longest_context, UNSTATED_CONTEXT)


def state_of(plan: Plan) -> SplitState:
    """The settings that ``split_plan`` makes this plan of."""
    spec = plan.spec
    named = (recipe for recipe in recipes_of(spec, plan) if recipe != AS_LOADED)
    recipe = next((r for r in named if _formats(_uniform(spec, r, plan)) == _formats(plan)), AS_LOADED)
    layers, on_cpu = plan.layer_devices().count("gpu"), plan.modules[spec.embedding].device == "cpu"
    return SplitState(layers, plan.context, plan.kv_format, recipe, plan.threads, on_cpu)


def split_plan(state: SplitState, spec: ModelSpec, base: Plan | None = None) -> Plan:
    """The plan of a split.

    Args:
        state: The settings.
        spec: The model.
        base: A plan to start from: its dtype is kept, and the places of whatever the settings do not move.

    Raises:
        PlanError: A setting the model or the library does not have.
    """
    if state.recipe != AS_LOADED:
        plan = _uniform(spec, state.recipe, base)
    elif base is None:
        raise PlanError(f"recipe {AS_LOADED!r} keeps a plan's formats, found no plan; name a recipe")
    else:
        plan = base
    if base is not None:
        modules = {name: kept.moved(base.modules[name].device) for name, kept in plan.modules.items()}
        plan = replace(plan, modules=modules)
    if plan.layer_devices().count("gpu") != state.gpu_layers:
        plan = plan.with_gpu_layers(state.gpu_layers)
    if (plan.modules[spec.embedding].device == "cpu") != state.embedding_on_cpu:
        names = (spec.embedding, spec.head) if spec.tied else (spec.embedding,)
        plan = plan.with_modules(*names, device="cpu" if state.embedding_on_cpu else "gpu")
    plan = replace(plan, context=state.context, kv_format=state.kv_format, threads=state.threads)
    if base is not None:
        kept = "stream_from", "prefill_chunk", "remember", "remember_ram", "solver"
        plan = replace(plan, **{name: getattr(base, name) for name in kept})
    return plan


def evaluate_split(
    state: SplitState,
    spec: ModelSpec,
    gpu: GpuBudget | Gpu,
    machine: Machine | None = None,
    base: Plan | None = None,
) -> SplitResult:
    """Forecasts memory and speed of a split. Takes half a second for a 4 B model, and loads nothing.

    Args:
        state: The settings.
        spec: The model.
        gpu: See ``forecast``.
        machine: Rates for the speed; by default this machine's, measured now where they are not known.
        base: See ``split_plan``.

    Raises:
        PlanError: A setting the model or the library does not have.
    """
    plan = split_plan(state, spec, base)
    return SplitResult(plan, forecast(plan, gpu), forecast_speed(plan, machine=machine))


def try_split(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, machine: Machine | None = None
) -> Trial:
    """Lets a loaded model answer a prompt, measures it, and forecasts the same run.

    Args:
        model: From ``load``.
        tokenizer: Its tokenizer; a chat template is used where it has one.
        prompt: The user's message.
        machine: See ``evaluate_split``.

    Raises:
        BudgetError: The prompt is longer than the plan's context.
        PlanError: The prompt has no tokens.
        torch.OutOfMemoryError: The GPU is too small for it.
    """
    plan = model.lowvram.plan
    gpu = model.lowvram.gpu
    ids = _prompt_ids(tokenizer, prompt)
    if not ids:
        raise PlanError("expected a prompt of one token or more, found none; write something")
    if len(ids) >= plan.context:
        raise BudgetError(f"the prompt takes {len(ids)} tokens, the plan's context is {plan.context}; shorten it")
    room, stop = min(NEW_TOKENS, plan.context - len(ids)), stop_ids(model, tokenizer)
    with gpu.lock:  # no other thread's forward pass in between: it would be in the peak
        gpu.reset_peak()
        decoder = decoder_for(model, len(ids) + room, progress=False)
        tokens = list(generate(decoder, torch.tensor([ids]), max_new_tokens=room, stop_ids=stop))
        peak_bytes, fed = gpu.peak_allocated_bytes, decoder.cache.get_seq_length() - len(ids)
        workload = Workload(len(ids), max(1, fed))
        measured = run_speed(model, workload, decoder)  # once more: the meter above slows a small model down
        del decoder
    dry = forecast(plan, gpu, workload=Workload(len(ids), room))
    return Trial(
        plan=plan,
        gpu=gpu.name,
        answer=tokenizer.decode(tokens, skip_special_tokens=True),
        predicted_bytes=max(phase.peak_allocated_bytes for phase in dry.phases if phase.name != "load"),
        measured_bytes=peak_bytes,
        predicted=forecast_speed(plan, workload, machine),
        measured=measured,
    )


def trials_table(trials: Sequence[Trial]) -> pd.DataFrame:
    """One row a try: what was predicted and, after it, what was measured. Bytes, tokens a second, seconds."""
    rows = [
        {
            "gpu_layers": trial.plan.layer_devices().count("gpu"),
            "weights": "/".join(dict.fromkeys(a.format for a in trial.plan.modules.values())),
            "kv_format": trial.plan.kv_format,
            "predicted_bytes": trial.predicted_bytes,
            "measured_bytes": trial.measured_bytes,
            "predicted_tokens_per_s": trial.predicted.decode_tokens_per_s,
            "measured_tokens_per_s": trial.measured.decode_tokens_per_s,
            "predicted_ttft_s": trial.predicted.ttft_s,
            "measured_ttft_s": trial.measured.ttft_s,
        }
        for trial in trials
    ]
    return pd.DataFrame(rows)


def why_no_weights(spec: ModelSpec) -> str:
    """Why a model's source has nothing to load, or nothing. Asks no network: a download shows at the first try."""
    try:
        source = find_source(spec.name)
        if source.kind in ("config", "hub") and hub.offline():
            source.fetch(progress=False)
    except LowvramError as error:
        return str(error)
    return ""


def _prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    if getattr(tokenizer, "chat_template", None):
        message = [{"role": "user", "content": prompt}]
        return chat_ids(tokenizer, message)
    return text_ids(tokenizer, prompt)


def _uniform(spec: ModelSpec, recipe: str, base: Plan | None) -> Plan:
    # the context is only a placeholder: the settings state their own, and a short one is always allowed
    return Plan.uniform(spec, recipe, context=2, dtype=base.dtype if base else None)


def _formats(plan: Plan) -> dict[str, str]:
    return {name: assignment.format for name, assignment in plan.modules.items()}
