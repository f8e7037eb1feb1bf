"""The validation report: what was promised, what was measured, and whether that is good enough. It can fail.

Derived in: notebooks/09_validated_chat.ipynb
"""

from dataclasses import asdict, dataclass

import pandas as pd
from transformers import PreTrainedModel

from lowvram_lab.chat.session import ChatSession
from lowvram_lab.evaluation.battery import battery as run_battery
from lowvram_lab.evaluation.battery_report import Battery
from lowvram_lab.evaluation.fidelity import Fidelity, fidelity, repetition
from lowvram_lab.planner.profile import MemoryProfile, SpeedProfile
from lowvram_lab.repository.text import windows_in_words
from lowvram_lab.units import format_bytes


@dataclass(frozen=True)
class Limits:
    """What a compressed model must keep to pass.

    Attributes:
        forecast_error: Largest |forecast - measured| / measured of any phase's allocated peak.
        perplexity_increase: Largest loss against the reference, as a fraction.
        kl_mean: Largest mean KL(reference || model), in nats.
        top1_agreement: Smallest share of equal most likely tokens.
        repetition: Largest share of repeated 4-grams in an answer.
    """

    forecast_error: float = 0.02
    perplexity_increase: float = 0.05
    kl_mean: float = 0.05
    top1_agreement: float = 0.9
    repetition: float = 0.5


@dataclass(frozen=True)
class Check:
    """One line of the report.

    Attributes:
        name: What was looked at.
        value: What was found, as text with its unit.
        limit: What was demanded, or ``""`` for a figure that is only reported.
        passed: The verdict, or ``None`` for a figure that is only reported.
    """

    name: str
    value: str
    limit: str = ""
    passed: bool | None = None


@dataclass(frozen=True)
class ValidationReport:
    """Checks and figures of one model, plan and GPU.

    Attributes:
        model: Model name.
        gpu: Where it ran, in words.
        checks: One line each.
        fidelity: The comparison with the reference, if one was made.
        battery: The generation battery, if it was asked; beside the reference's, if there is one.
    """

    model: str
    gpu: str
    checks: tuple[Check, ...]
    fidelity: Fidelity | None = None
    battery: Battery | None = None

    @property
    def passed(self) -> bool:
        """Whether no check failed, and at least one was made."""
        verdicts = [check.passed for check in self.checks if check.passed is not None]
        return bool(verdicts) and all(verdicts)

    def summary(self) -> str:
        """The verdict in one line, with the failed checks named."""
        failed = [check.name for check in self.checks if check.passed is False]
        made = sum(check.passed is not None for check in self.checks)
        if self.passed:
            return f"PASS: {made} of {made} checks, {self.model} on {self.gpu}"
        return f"FAIL: {', '.join(failed) or 'no check was made'} ({self.model} on {self.gpu})"

    def table(self) -> pd.DataFrame:
        """One row a check."""
        verdict = {True: "pass", False: "FAIL", None: ""}
        rows = [(c.name, c.value, c.limit, verdict[c.passed]) for c in self.checks]
        return pd.DataFrame(rows, columns=["check", "measured", "demanded", "verdict"])

    def to_dict(self) -> dict:
        """Plain data."""
        return {
            "model": self.model,
            "gpu": self.gpu,
            "passed": self.passed,
            "checks": [asdict(check) for check in self.checks],
            "fidelity": self.fidelity and self.fidelity.to_dict(),
            "battery": self.battery and self.battery.to_dict(),
        }

    def __repr__(self) -> str:
        return f"{self.summary()}\n{self.table().to_string(index=False)}"

    def _repr_html_(self) -> str:
        return f"<b>{self.summary()}</b>" + self.table().to_html(index=False)


def validate(  # noqa: PLR0913  (each a part of the report)
    session: ChatSession,
    *,
    reference: PreTrainedModel | None = None,
    forecast: MemoryProfile | None = None,
    measured: MemoryProfile | None = None,
    speed: SpeedProfile | None = None,
    text: str | None = None,
    limits: Limits | None = None,
    battery: bool = False,
    progress: bool = True,
) -> ValidationReport:
    """Checks a chat that has had at least one turn. Each argument left out leaves its checks out.

    Args:
        session: The chat; its answers are checked for repetition, its turns for memory.
        reference: From ``load_reference``: fidelity is measured against it.
        forecast: What the plan was forecast to take for a workload.
        measured: What ``run_workload`` found for the same workload.
        speed: From ``run_speed``.
        text: Text for the fidelity; by default the library's own.
        limits: What to demand.
        battery: Ask ``battery_items`` as well (sixty short answers): how many pass is reported, and with a reference,
            which is asked the same, the model must not be worse by more than chance.
        progress: Show progress bars.
    """
    limits, model = limits or Limits(), session.model
    checks = [*_memory_checks(session, measured), *_forecast_checks(forecast, measured, limits)]
    found = None
    if reference is not None:
        found = fidelity(model, reference, session.tokenizer, text, progress=progress)
        checks += _fidelity_checks(found, limits)
    answers = [message["content"] for message in session.history if message["role"] == "assistant"]
    worst = max((repetition(answer) for answer in answers), default=0.0)
    said = bool(answers) and all(answer.strip() for answer in answers)
    checks.append(Check("every turn answered", f"{sum(map(bool, answers))} of {len(answers)}", "all", said))
    checks.append(
        Check("repeated 4-grams", f"{worst:.0%}", f"at most {limits.repetition:.0%}", worst <= limits.repetition)
    )
    checks += _speed_figures(session, speed)
    asked = None
    if battery:  # last: it gives up what the chat's KV cache held, and has peaks of its own
        options = {"template_arguments": session.template_arguments, "precision": session.precision}
        asked = run_battery(model, session.tokenizer, compare=reference, **options, progress=progress)
        checks += _battery_checks(asked)
    return ValidationReport(model.lowvram.plan.model, model.lowvram.gpu.name, tuple(checks), found, asked)


def _memory_checks(session: ChatSession, measured: MemoryProfile | None) -> list[Check]:
    gpu = session.model.lowvram.gpu
    if gpu.budget is None:
        return []
    allocated = max([t.peak_bytes for t in session.turns] + ([measured.peak_allocated_bytes] if measured else []))
    held = gpu.peak_reserved_bytes + gpu.budget.context_bytes
    value = f"{format_bytes(allocated)} allocated, {format_bytes(held)} held"
    limit = f"at most {format_bytes(gpu.budget.total_bytes)}"
    return [Check("peak GPU memory", value, limit, held <= gpu.budget.total_bytes)]


def _forecast_checks(forecast: MemoryProfile | None, measured: MemoryProfile | None, limits: Limits) -> list[Check]:
    if forecast is None or measured is None:
        return []
    checks = []
    for row in forecast.compare(measured).itertuples():
        value = f"{format_bytes(row.forecast)} forecast, {format_bytes(row.measured)} measured"
        close = abs(row.difference) <= limits.forecast_error * row.measured
        checks.append(Check(f"{row.phase} peak", value, f"within {limits.forecast_error:.0%}", close))
    return checks


def _fidelity_checks(found: Fidelity, limits: Limits) -> list[Check]:
    smaller = 1 - found.weight_bytes / found.reference_weight_bytes
    return [
        Check("weights, all", f"{format_bytes(found.weight_bytes)} ({smaller:.0%} less than 16-bit)"),
        Check("text scored", f"{found.tokens} tokens {windows_in_words(found.window, found.begins_with)}"),
        Check(
            "perplexity",
            f"{found.perplexity:.2f} against {found.reference_perplexity:.2f} ({found.perplexity_increase:+.1%})",
            f"at most {limits.perplexity_increase:+.0%}",
            found.perplexity_increase <= limits.perplexity_increase,
        ),
        Check("mean KL", f"{found.kl_mean:.4f} nats", f"at most {limits.kl_mean}", found.kl_mean <= limits.kl_mean),
        Check(
            "top-1 agreement",
            f"{found.top1_agreement:.1%} of {found.tokens} tokens",
            f"at least {limits.top1_agreement:.0%}",
            found.top1_agreement >= limits.top1_agreement,
        ),
    ]


def _battery_checks(asked: Battery) -> list[Check]:
    checks = [Check("generation battery", f"{asked.score()}, by {asked.way}")]
    if compared := asked.comparison:
        value = (
            f"{compared.difference:+.1%}: {len(compared.lost)} lost, {len(compared.gained)} gained, "
            f"p = {compared.p_value:.2g}"
        )
        not_worse = compared.verdict != "worse"
        checks.append(Check("battery against the reference", value, "not worse by more than chance", not_worse))
    return checks


def _speed_figures(session: ChatSession, speed: SpeedProfile | None) -> list[Check]:
    figures = []
    if session.turns:
        figures.append(Check("first token, first turn", f"{session.turns[0].ttft_s:.2f} s"))
    if len(session.turns) > 1:
        figures.append(Check("first token, later turns", f"{max(t.ttft_s for t in session.turns[1:]):.2f} s"))
    if speed is not None:
        figures.append(Check("decoding", f"{speed.decode_tokens_per_s:.1f} tokens/s ({speed.where})"))
    return figures
