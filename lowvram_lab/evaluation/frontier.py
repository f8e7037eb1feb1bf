"""Bytes against tokens/s against KL: which plans are worth their place, and which other one beats each of the rest.

Derived in: notebooks/04_compress.ipynb, notebooks/06_the_engine.ipynb
"""

from collections.abc import Mapping

import pandas as pd

from lowvram_lab.errors import LowvramError
from lowvram_lab.evaluation.fidelity import Fidelity
from lowvram_lab.model.plan import Plan
from lowvram_lab.model.spec import ModelSpec
from lowvram_lab.planner.auto import DEFAULT_CONTEXT
from lowvram_lab.planner.moves import FORMAT_LOSS, forecast_loss
from lowvram_lab.planner.profile import SpeedProfile
from lowvram_lab.planner.speed import forecast_speed
from lowvram_lab.rates.machine import Machine


def frontier(
    plans: ModelSpec | Mapping[str, Plan],
    *,
    speeds: Mapping[str, SpeedProfile | float] | None = None,
    losses: Mapping[str, Fidelity | float] | None = None,
    machine: Machine | None = None,
) -> pd.DataFrame:
    """Compares plans of one model in bytes, speed and loss at once.

    A plan is *dominated* where another takes no more bytes, is no slower and no farther from the original, and better
    in one of the three. What no other dominates is on the frontier: there is somebody for whom it is the best.

    Args:
        plans: Name → plan; or a model: bf16 and each format everywhere.
        speeds: Name → measured speed of every plan, from ``run_speed`` or in tokens/s. By default ``forecast_speed``,
            by rates of this machine that are measured where they are not known (half a minute a format).
        losses: Name → measured KL of every plan, from ``fidelity`` or in nats. By default the planner's table of
            formats (``moves.FORMAT_LOSS``): a small model's, rounded to nearest; it ranks formats, no more.
        machine: Rates for the forecast; by default this machine's.

    Returns:
        A row a plan, the fewest bytes first, with ``weight_bytes`` (exact), ``tokens_per_s``, ``kl`` (nats a token),
        ``on_frontier``, ``dominated_by`` (the name of a plan on the frontier, of several the closest to the original;
        else empty), ``speed_origin`` and ``kl_origin`` (``"measured"`` or ``"forecast"``).

    Raises:
        LowvramError: No plans; measurements of some plans only, or of a name that is no plan's; a machine beside
            measured speeds; a converted model without measured losses: the table knows formats, not what a conversion
            made of them.
    """
    if isinstance(plans, ModelSpec):
        context = min(DEFAULT_CONTEXT, plans.longest_context)
        plans = {name: Plan.uniform(plans, name, context=context) for name in ("bf16", *FORMAT_LOSS)}
    if not plans:
        raise LowvramError("expected plans to compare, found none")
    if machine is not None and speeds is not None:
        raise LowvramError("speeds are given, found a machine to forecast them by as well; give one of them")
    if losses is None and (converted := [name for name, plan in plans.items() if plan.spec.stored]):
        raise LowvramError(f"{converted[0]} is of a converted model: measure its KL with fidelity, and give losses=")
    _check_names("speeds", speeds, plans)
    _check_names("losses", losses, plans)
    rows = {}
    for name, plan in plans.items():
        speed = speeds[name] if speeds is not None else forecast_speed(plan, machine=machine)
        loss = losses[name] if losses is not None else forecast_loss(plan)
        rows[name] = {
            "weight_bytes": plan.weight_bytes(),
            "tokens_per_s": speed.decode_tokens_per_s if isinstance(speed, SpeedProfile) else float(speed),
            "kl": loss.kl_mean if isinstance(loss, Fidelity) else float(loss),
            "speed_origin": speed.origin if isinstance(speed, SpeedProfile) else "measured",
            "kl_origin": "measured" if losses is not None else "forecast",
        }
    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("plan")
    beaten = dominators(table)
    table.insert(3, "on_frontier", [not beaten[name] for name in table.index])
    table.insert(4, "dominated_by", [beaten[name] for name in table.index])
    return table.sort_values(["weight_bytes", "kl"], kind="stable")


def dominators(table: pd.DataFrame) -> dict[str, str]:
    """By which other row each row of a table is dominated, see ``frontier``; equal rows do not beat each other.

    Args:
        table: A row a plan, with ``weight_bytes``, ``tokens_per_s`` and ``kl``.

    Returns:
        Name → the closest to the original of the frontier's members that dominate it, or ``""``.
    """
    points = {row.Index: (row.weight_bytes, -row.tokens_per_s, row.kl) for row in table.itertuples()}

    def beats(other: str, name: str) -> bool:
        no_worse = all(a <= b for a, b in zip(points[other], points[name], strict=True))
        return no_worse and points[other] != points[name]

    better = {name: [other for other in points if beats(other, name)] for name in points}
    return {
        name: min((each for each in found if not better[each]), key=lambda each: points[each][::-1], default="")
        for name, found in better.items()
    }


def _check_names(what: str, given: Mapping | None, plans: Mapping[str, Plan]) -> None:
    """Refuses measurements that leave a plan out, and so would put measured beside forecast, or that are of no plan."""
    if given is None:
        return
    if missing := [name for name in plans if name not in given]:
        raise LowvramError(f"expected {what} of every plan or none at all, found none for {missing[0]}")
    if unknown := [name for name in given if name not in plans]:
        raise LowvramError(f"expected {what} of {', '.join(plans)}, found {unknown[0]} as well")
