"""The plan of least cost that fits GPU, RAM and disk, of all the moves that there are: what ``auto_plan`` asks.

The space is formats x KV format x pieces of a prompt x place of embedding and head x layers on the GPU; the order is
``moves.cost``. Plans are told to fit by sketches, which are cheap, and by a forecast in full before one is given back.
More pieces and fewer modules on the card never take more of it, so each of those is found by bisection. What RAM and
weights take is exact, and rules out what it can before anything is replayed; no sketch that fits is made twice.

Derived in: notebooks/05_split_the_layers.ipynb
"""

import bisect
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from lowvram_lab.errors import PlanError
from lowvram_lab.model.plan import Plan
from lowvram_lab.planner.constraints import Room
from lowvram_lab.planner.forecast import in_full, sketch, sketch_if_fits
from lowvram_lab.planner.moves import chunk_sizes, cost, forecast_loss, head_modules, off_card_seconds
from lowvram_lab.planner.profile import MemoryProfile, Workload
from lowvram_lab.planner.search import largest_sketched, last_that_holds, least_bytes

SINGLE_STEPS = 3
"""Layers that are taken off the card one by one before the steps grow."""


@dataclass(frozen=True)
class Found:
    """A plan that fits, and its forecast."""

    plan: Plan
    forecast: MemoryProfile


class Cheapest:
    """Searches plans that fit a room, and remembers what it has tried.

    Args:
        room: What a plan may take.
        asked_layers: Keep to so many layers on the GPU; by default as many as fit.
    """

    def __init__(self, room: Room, asked_layers: int | None = None):
        self.room, self.asked_layers = room, asked_layers
        self._sketches: dict[Plan, MemoryProfile | None] = {}
        self._refused: PlanError | None = None
        self._forecasts: dict[Plan, MemoryProfile | None] = {}
        self._too_large: list[Plan] = []

    def of(self, bases: list[Plan], refused: list[Plan] | None = None, below_s: float = math.inf) -> Found | None:
        """The plan of least cost.

        Args:
            bases: Plans to start from, one for each pair of weights' formats and KV format, all on the GPU (or with
                ``asked_layers`` there) and prompts read at once.
            refused: Takes those of them that do not fit without layers or head on the CPU, in the order tried.
            below_s: Look for a plan of which the CPU computes less than so many seconds (``off_card_seconds``).

        Raises:
            PlanError: Nothing fits, and not every plan could be replayed.
        """
        self._refused = None
        for base in sorted(bases, key=forecast_loss):
            if found := self.placed(base):
                return found
            if refused is not None:
                refused.append(self.gentlest(base))
        found = self._computed_by_both(bases, below_s)
        if found is None and self._refused is not None and below_s == math.inf:
            raise self._refused
        return found

    def gentlest(self, base: Plan) -> Plan:
        """The plan with all moves that leave layers and head where they are."""
        return replace(self._lookups(base)[0], prefill_chunk=_chunks(base)[-1])

    def _fits_gpu(self, plan: Plan) -> bool:
        """Whether a plan fits the GPU, whatever RAM there is, by its sketch."""
        known = least_bytes(plan) > self.room.budget.usable_bytes
        if known or any(_takes_no_less(plan, other) for other in self._too_large):
            return False
        if plan not in self._sketches:
            try:
                self._sketches[plan] = sketch_if_fits(plan, self.room.budget)
            except PlanError as error:  # a move that this architecture does not bear; or none of its plans runs
                self._sketches[plan], self._refused = None, error
            else:
                self._too_large += [] if self._sketches[plan] else [plan]
        return self._sketches[plan] is not None and self._sketches[plan].fits

    def _sketched(self, plan: Plan, *given) -> MemoryProfile:
        """See ``sketch``, which says too by how much a plan does not fit."""
        if not self._sketches.get(plan):
            self._sketches[plan] = sketch(plan, *given)
            self._too_large += [] if self._sketches[plan].fits else [plan]
        return self._sketches[plan]

    def _may_fit(self, plan: Plan) -> bool:
        """Whether a plan fits GPU, RAM and disk, by its sketch."""
        within = self.room.within_ram(plan)
        return within is not None and self._fits_gpu(within)

    def _confirmed(self, plan: Plan) -> Found | None:
        """The plan with as much of it on disk as RAM has no room for, and its forecast in full."""
        if not self._may_fit(plan):
            return None
        plan = self.room.within_ram(plan)
        if plan not in self._forecasts:
            self._forecasts[plan] = in_full(plan, self._sketches[plan])
        profile = self._forecasts[plan]
        return profile and Found(plan, profile)

    def _lookups(self, base: Plan) -> list[Plan]:
        """The plan by where its embedding is, the CPU first; one where the head decides, or RAM is short of it."""
        spec = base.spec
        if spec.tied or base.modules[spec.embedding].device != "gpu":
            return [base]
        return [base.with_modules(spec.embedding, device="cpu"), base]

    def placed(self, base: Plan) -> Found | None:
        """The cheapest place of the embedding and size of pieces with which a plan fits."""
        lookups = [plan for plan in self._lookups(base) if self.room.within_ram(plan)]
        if lookups and (found := self._confirmed(min(lookups, key=self._place_cost))):
            return found  # at once, and where it takes the least time
        variants = [plan for lookup in lookups for plan in self._in_pieces(lookup)]
        for plan in sorted(variants, key=self._place_cost):
            if found := self._confirmed(plan):
                return found
        return None

    def _place_cost(self, plan: Plan) -> tuple[float, ...]:
        return cost(self.room.within_ram(plan) or plan)

    def _in_pieces(self, plan: Plan) -> list[Plan]:
        """The plan with those sizes of pieces that fit, the largest first."""
        sized = [replace(plan, prefill_chunk=chunk) for chunk in _chunks(plan)]
        if not self._may_fit(sized[-1]):
            return []
        return sized[bisect.bisect_left(sized[:-1], True, key=self._may_fit) :]

    def _computed_by_both(self, bases: list[Plan], below_s: float) -> Found | None:
        """The plan of least cost with layers or the head on the CPU."""
        best, beaten, bounds = None, (below_s,), []
        for split in (split for base in bases for split in self._splits(base)):
            most = split.last(lambda plan: least_bytes(plan) <= self.room.budget.usable_bytes)
            least = 1 + split.last(lambda plan: not self.room.within_ram(plan))  # fewer on the GPU take more
            if most >= least:
                bounds.append((self._rough_cost(split.at(most)), len(bounds), replace(split, least=least, most=most)))
        for bound, _, split in sorted(bounds, key=lambda entry: entry[:2]):
            if bound < beaten and (found := self._best_split(split, beaten)):
                best, beaten = found, self._rough_cost(found.plan)
        return best

    def _splits(self, base: Plan) -> Iterator["Split"]:
        """Where the layers' number is open: by place of the head, and of the embedding where RAM is short."""
        total = base.spec.num_hidden_layers
        low, high = (0, total) if self.asked_layers is None else (self.asked_layers, self.asked_layers)
        base = replace(base, prefill_chunk=_chunks(base)[-1])
        with_head = base.with_modules(*head_modules(base.spec), device="cpu")
        for plan, most in ((base, high - 1), (with_head, high)):
            lookups = self._lookups(plan)
            for placed in lookups if self.room.ram_bytes is not None else lookups[:1]:
                yield Split(placed, low, most, lookup=plan.modules[plan.spec.embedding].device)

    def _best_split(self, split: "Split", beaten: tuple[float, ...]) -> Found | None:
        """A split's cheapest plan that fits, where it can be cheaper than the best so far.

        As rough as the best is only the same split with its embedding elsewhere, and ``placed`` has tried both.
        """
        least = 1 + split.last(lambda plan: self._rough_cost(plan) >= beaten)
        if least > split.most or (least > 0 and not self._fits_gpu(split.at(least))):
            return None
        try:
            at, budget = (lambda count: (split.at(count), None)), self.room.budget
            fitting = largest_sketched(at, least, split.most, budget, self._sketched)
        except PlanError as error:
            self._refused = error
            return None
        for count in _fewer_and_fewer(fitting.number, least) if fitting else ():
            plan = split.at(count)
            # pieces of a prompt and the embedding's place are open again
            gentle = replace(plan.with_modules(plan.spec.embedding, device=split.lookup), prefill_chunk=None)
            if found := self.placed(gentle) or self._confirmed(plan):
                return found
        return None

    def _rough_cost(self, plan: Plan) -> tuple[float, float]:
        """What of a plan's cost neither its embedding's place nor pieces of a prompt change."""
        return off_card_seconds(plan, self.asked_layers), forecast_loss(plan)


@dataclass(frozen=True)
class Split:
    """A plan whose number of layers on the GPU is open, within bounds."""

    base: Plan
    least: int
    most: int
    lookup: str  # where the embedding is in the plan that it comes from; the base has it on the CPU where that is less

    def at(self, count: int) -> Plan:
        """The plan with so many layers on the GPU."""
        return self.base.with_gpu_layers(count)

    def last(self, holds) -> int:
        """The largest count for which a condition holds that holds for all smaller ones; ``least - 1`` for none."""
        return last_that_holds(lambda count: holds(self.at(count)), self.least, self.most)


def _takes_no_less(plan: Plan, other: Plan) -> bool:
    """Whether a plan is another in larger pieces or with more on the card: what does not fit there does not here."""
    alike = [(each.context, each.kv_format, each.modules[each.spec.head].device) for each in (plan, other)]
    sizes = [each.prefill_chunk or each.context for each in (plan, other)]
    pairs = zip(plan.modules.values(), other.modules.values(), strict=True)
    more = (
        mine.format == its.format
        and (mine.device == "gpu" or its.device != "gpu")
        and (mine.low == "gpu" or its.low != "gpu")
        for mine, its in pairs
    )
    return alike[0] == alike[1] and sizes[0] >= sizes[1] and all(more)


def _fewer_and_fewer(most: int, least: int) -> Iterator[int]:
    """One less a few times, as where an allocator's gaps decide; then in longer and longer steps."""
    count, step = most, 1
    while count >= least:
        yield count
        if most - count >= SINGLE_STEPS:
            step *= 2
        count -= step


def _chunks(plan: Plan) -> list[int | None]:
    """Sizes of pieces that differ for the plan's longest prompt, the largest first."""
    return chunk_sizes(Workload.full_context(plan.context).prompt_tokens)
