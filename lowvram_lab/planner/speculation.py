"""What drafting by the high planes promises: arithmetic from three times and a rate of acceptance.

A pass that verifies ``k`` guesses takes little longer than one token, and gives ``1 + a + a^2 + ... + a^k`` of them
where each guess comes true with a chance of ``a``; the guesses take ``k`` passes by the high planes. So it pays where
those are cheap beside a pass by both: where half of the bytes is half of the time, a little; where the low planes are
off the card, much.

Derived in: notebooks/08_precision_on_demand.ipynb
Source: Leviathan et al. 2023, arXiv:2211.17192, theorem 3.8.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import pandas

from lowvram_lab.decoding.bind import SHORT_HEAD, short_head_pays
from lowvram_lab.decoding.speculate import expected_tokens
from lowvram_lab.errors import PlanError
from lowvram_lab.kernels.product import MOST_ROWS
from lowvram_lab.model.formats import get_format
from lowvram_lab.model.plan import Plan
from lowvram_lab.planner.moves import BYTES_PER_S, CROSSING_S
from lowvram_lab.planner.profile import Workload
from lowvram_lab.planner.speed import FEW_TOKENS, token_parts
from lowvram_lab.rates.machine import Machine

ACCEPTANCES = (0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True)
class SpeculationForecast:
    """What drafting promises.

    Attributes:
        draft_s: Seconds of a token by the high planes.
        token_s: Seconds of a token by both.
        row_share: What each further token of a pass adds, as a share of ``token_s``.
        rates: Where the times come from, in words.
        table: By ``acceptance``: the best ``draft_length``, ``tokens_per_pass``, ``tokens_per_s``, and ``gain`` over
            one token after the other. A DataFrame.
    """

    draft_s: float
    token_s: float
    row_share: float
    rates: str
    table: pandas.DataFrame

    def _repr_html_(self) -> str:
        times = f"a token by the high planes {self.draft_s * 1e3:.2f} ms, by both {self.token_s * 1e3:.2f} ms"
        shown = self.table.to_html(index=False, float_format="{:.2f}".format)
        return f"<b>Speculation</b> {times} ({self.rates})<br>{shown}"


def forecast_speculation(
    plan: Plan,
    acceptances: Iterable[float] = ACCEPTANCES,
    *,
    workload: Workload | None = None,
    machine: Machine | None = None,
    assumed: bool = False,
) -> SpeculationForecast:
    """Forecasts what drafting by the high planes gains, by how often its guesses come true.

    Args:
        plan: Its weights are in two planes.
        acceptances: Chances that a guess comes true.
        workload: See ``forecast_speed``.
        machine: See ``forecast_speed``.
        assumed: Not at this machine's rates, but at those that plans are weighed by (``moves.py``): a card of 200 GB/s
            beside a CPU that reads 25, and 20 us for each crossing. For a card that is not here.

    Raises:
        PlanError: The plan has no low planes.
    """
    if not plan.low_planes():
        raise PlanError(f"expected a plan with weights in two planes (int4+4), found {plan.summary()}")
    if assumed:
        draft_s, token_s, row_share, words = _assumed(plan, False), _assumed(plan, True), 0.0, "assumed rates"
    else:
        machine = machine or Machine()
        few = Workload(max(1, plan.context // 2), max(1, min(FEW_TOKENS, plan.context - plan.context // 2)))
        cached = (workload or few).prompt_tokens + (workload or few).new_tokens // 2
        drafting, verifying = (token_parts(plan, machine, cached, both=both) for both in (False, True))
        if short_head_pays(plan):
            drafting["head"] *= SHORT_HEAD / plan.spec.vocab_size
        draft_s, token_s = sum(drafting.values()), sum(verifying.values())
        row_share = 0.0 if machine.cuda else machine.rows("int4", plan.threads).row_share
        words = "this machine's rates"
    rows = [_promised(acceptance, draft_s, token_s, row_share) for acceptance in acceptances]
    return SpeculationForecast(draft_s, token_s, row_share, words, pandas.DataFrame(rows))


def _promised(acceptance: float, draft_s: float, token_s: float, row_share: float) -> dict:
    """A row of the table."""
    best = {"tokens_per_s": 0.0}
    for length in range(MOST_ROWS):
        tokens = expected_tokens(acceptance, length)
        seconds = length * draft_s + token_s * (1 + row_share * length)
        if tokens / seconds > best["tokens_per_s"]:
            found = {"acceptance": acceptance, "draft_length": length, "tokens_per_pass": tokens}
            best = found | {"tokens_per_s": tokens / seconds, "gain": tokens / seconds * token_s}
    return best


def _assumed(plan: Plan, both: bool) -> float:
    """Seconds of a token at assumed rates: card and CPU read beside each other what lies on them."""
    spec, read = plan.spec, dict.fromkeys(BYTES_PER_S, 0.0)
    for module in spec.modules:
        assignment = plan.modules[module.name]
        if module.name == spec.embedding and not spec.tied or not module.weight_shape:
            continue
        sizes = get_format(assignment.format).bytes_by_plane(module.weight_shape)
        for place, size in zip(assignment.places[: 1 + both], sizes, strict=False):
            read[place] += size / BYTES_PER_S[place]
    crossings = 2 * len(plan.apart()) if both else 0
    return max(read["gpu"], read["cpu"]) + read["disk"] + crossings * CROSSING_S
