"""auto_plan: the plan of least cost that fits GPU, RAM and disk, of all that the engine can do.

It searches formats x KV formats x pieces of a prompt x places of embedding, head and layers, and threads. Whether a
plan fits is what its forecast says; what it costs is ``moves.cost``, how fast it is what this machine's rates say.

Derived in: notebooks/05_split_the_layers.ipynb
"""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace

from lowvram_lab.errors import BudgetError, LowvramError, PlanError
from lowvram_lab.memory.budget import GpuBudget
from lowvram_lab.memory.gpu import Gpu
from lowvram_lab.model.plan import Plan
from lowvram_lab.model.rules import BLOCK_TOKENS
from lowvram_lab.model.spec import ModelSpec
from lowvram_lab.planner.cheapest import Cheapest
from lowvram_lab.planner.constraints import Room, margin, ram_bytes, refusal, shortage
from lowvram_lab.planner.moves import (
    forecast_loss,
    head_modules,
    keeps_cache,
    kv_formats,
    low_planes_to_cpu,
    off_card_seconds,
)
from lowvram_lab.planner.profile import MemoryProfile, SpeedProfile, Workload
from lowvram_lab.planner.search import CONTEXT_STEP, budget_of, forecast_if_possible, largest_fitting, most_layers
from lowvram_lab.planner.speed import forecast_speed, stream_threshold
from lowvram_lab.planner.suggest import SHORTEST_CONTEXT
from lowvram_lab.planner.suited import names_its_dtype, not_above_held, quick_recipes, suited
from lowvram_lab.rates.machine import Machine
from lowvram_lab.units import format_bytes, parse_bytes

PREFERENCES = ("balance", "fidelity", "speed")

DEFAULT_CONTEXT = 2048
MOST_REASONS = 5

AS_FAST = 0.97
"""Of the highest forecast speed: a more precise plan that is so fast is taken instead."""


@dataclass(frozen=True)
class PlanChoice:
    """A plan, the forecasts that say it fits and how fast it is, and the reasons in five lines at most.

    Attributes:
        plan: The plan.
        forecast: Its memory.
        why: Reasons.
        recipe: The recipe its formats come from.
        speed: Its forecast speed on this machine, where that was asked for or decided the choice.
    """

    plan: Plan
    forecast: MemoryProfile
    why: tuple[str, ...]
    recipe: str = ""
    speed: SpeedProfile | None = None

    def _repr_html_(self) -> str:
        return self.plan._repr_html_() + "<br>".join(self.why) + self.forecast._repr_html_()


def auto_plan(
    spec: ModelSpec,
    gpu: str | int | GpuBudget | Gpu | dict,
    context: int | None = 2048,
    *,
    ram: str | int | None = None,
    disk: str | int | None = None,
    prefer: str = "balance",
    recipes: tuple[str, ...] | None = None,
    gpu_layers: int | None = None,
    kv_format: str | None = None,
    dtype: str | None = None,
    threads: int | None = None,
    machine: Machine | None = None,
) -> PlanChoice:
    """Chooses a plan that fits.

    Args:
        spec: The model.
        gpu: A budget such as ``"4GiB"``, an opened GPU, or accelerate's ``max_memory``: ``{0: "4GiB", "cpu": "8GiB"}``.
        context: Tokens to plan for; ``None`` for as many as fit the plan that is preferred at 2048 (or at half of
            that, and so on, where nothing fits), if need be with its embedding on the CPU and prompts read in pieces.
            Fewer layers on the GPU (``gpu_layers=``) leave room for more, and so does a smaller ``kv_format=``.
        ram: What the CPU's part may take; by default no limit.
        disk: What of the CPU's part may lie on disk where RAM is too small; by default nothing.
        prefer: ``"balance"``: of the plans whose layers and head are all on the GPU the one that loses least, formats
            and KV cache together, and of those the one of least time: the embedding on the CPU and prompts read in
            pieces come before any loss. If none fits, the one that leaves least for the CPU to compute: the smallest
            recipe, split; codes that files hold are split before they are rounded again. ``"fidelity"``: the most
            precise recipe, however much must go to the CPU; an int4 KV cache only where nothing else fits.
            ``"speed"``: the fastest by this machine's rates, which are measured if they are not known, never one that
            another dominates (``frontier``). ``moves.py`` has the order and its figures.
        recipes: Recipes to try, the most precise first; by default what ``suited`` finds for the card (``"speed"``:
            and int6, int5, int3), or what a converted model holds.
        gpu_layers: Keep to so many layers on the GPU, and choose the rest.
        kv_format: Keep to this, ``"int8"``, ``"int4"`` or the plan's dtype.
        dtype: Compute in this, ``"bf16"``, ``"fp16"`` or ``"fp32"``; by default 16 bits that suit the card.
        threads: CPU threads for the plan; by default torch's number, for ``"speed"`` the fastest of one, half, all.
        machine: Rates for ``"speed"`` and for weights that travel; by default this machine's.

    Returns:
        The plan, its forecast, and why it was chosen.

    Raises:
        BudgetError: No plan fits; the message says what is short and what would help.
        PlanError: The context is beyond the model's, a recipe or preference is unknown, or no plan fits of those that
            this architecture bears.
    """
    if isinstance(gpu, dict):
        gpu, ram, disk = _budgets(gpu, ram, disk)
    budget = budget_of(gpu)
    usual, of_its, of_card = (("stored",), None, "") if spec.stored else suited(spec, budget, context)
    if dtype:
        usual, of_card = tuple(dtype if names_its_dtype(name) else name for name in usual), ""
    quick = prefer == "speed" and not spec.stored
    offered = not_above_held(spec, quick_recipes(usual) if quick else usual, fidelity=prefer == "fidelity")
    if recipes is not None and recipes != usual:
        of_card = ""
    tried = [offered if recipes is None else recipes]
    if recipes is None and spec.held and prefer == "balance":
        tried.insert(0, ("stored",))  # a split costs time, codes that are rounded again far more
    if not tried[0]:
        raise PlanError("expected one recipe or more to choose from, found none")
    if prefer not in PREFERENCES:
        raise PlanError(f"expected prefer {', '.join(PREFERENCES)}, found {prefer!r}")
    if prefer != "balance" and gpu_layers is not None:
        raise PlanError(f"prefer={prefer!r} chooses the split, found gpu_layers={gpu_layers} as well; give one of them")
    sizes = (None if size is None else parse_bytes(size) for size in (ram, disk))
    room, machine = Room(spec, budget, *sizes, kv_format), machine or Machine()
    for recipes in tried:
        wishes = _Wishes(recipes, dtype or of_its, prefer, gpu_layers, threads, machine)
        try:
            if context is not None:
                choice = _at_context(context, room, wishes)
            else:
                choice = _at_longest_context(min(DEFAULT_CONTEXT, spec.longest_context), room, wishes)
            break
        except BudgetError:
            if recipes is tried[-1]:
                raise
    choice = _with_streaming(choice, room, machine)
    return replace(choice, why=(of_card, *choice.why[1 - MOST_REASONS :])) if of_card else choice


@dataclass(frozen=True)
class _Wishes:
    """What ``auto_plan`` is told to prefer and to keep to; see there."""

    recipes: tuple[str, ...]
    dtype: str | None
    prefer: str
    gpu_layers: int | None
    threads: int | None
    machine: Machine


def _at_context(context: int, room: Room, wishes: _Wishes) -> PlanChoice:
    bases = {recipe: _bases(recipe, context, room, wishes) for recipe in wishes.recipes}
    search, why = Cheapest(room, wishes.gpu_layers), []  # one, as it remembers what it has tried
    if wishes.prefer == "speed":
        choice = _fastest(bases, search, why, wishes.machine)
    elif wishes.prefer == "fidelity":
        choice = next(_most_precise(bases, search, why), None)
    else:
        choice = _chosen([plan for plans in bases.values() for plan in plans], bases, search, why)
    if choice is None:
        raise refusal(_least(bases[wishes.recipes[-1]][-1], search), room)
    return choice


def _bases(recipe: str, context: int, room: Room, wishes: _Wishes) -> list[Plan]:
    """A recipe's plans that differ in the KV format, the most precise first."""
    dtype = None if names_its_dtype(recipe) else wishes.dtype
    plan = replace(Plan.uniform(room.spec, recipe, context=context, dtype=dtype), threads=wishes.threads)
    if wishes.gpu_layers is not None:
        plan = plan.with_gpu_layers(wishes.gpu_layers)
    formats = (room.kv_format,) if room.kv_format else kv_formats(room.spec, plan.dtype)
    plans = [plan, low_planes_to_cpu(plan)] if "gpu" in plan.low_planes() else [plan]  # which loses speed alone
    return [replace(each, kv_format=kv_format) for kv_format in formats for each in plans]


def _least(plan: Plan, search: Cheapest) -> Plan:
    """The plan that takes the least of the GPU: what a refusal is about."""
    least = search.gentlest(plan if search.asked_layers is not None else plan.with_gpu_layers(0))
    least = least.with_modules(*head_modules(plan.spec), device="cpu")
    if search.asked_layers is None and search.room.lacks_ram(least):  # what the GPU takes of it, RAM need not
        found = most_layers(least, plan.spec.num_hidden_layers - 1, search.room.budget)
        least = found.plan if found else least
    return least


def _at_longest_context(context: int, room: Room, wishes: _Wishes) -> PlanChoice:
    """What is preferred at a usual context, with as many tokens as then fit GPU and RAM by moves that lose nothing."""
    try:
        choice = _at_context(context, room, wishes)
    except BudgetError:
        if context // 2 < SHORTEST_CONTEXT:
            raise
        return _at_longest_context(context // 2, room, wishes)
    plan, search = choice.plan, Cheapest(room, wishes.gpu_layers)

    def at(step: int) -> tuple[Plan, Workload]:
        longer = search.gentlest(replace(plan, context=step * CONTEXT_STEP))
        if room.lacks_ram(longer):  # of an embedding
            longer = replace(longer, modules=plan.modules)
        return longer, Workload.full_context(longer.context)

    most = room.spec.longest_context // CONTEXT_STEP
    longest = largest_fitting(at, plan.context // CONTEXT_STEP + 1, most, room.budget)
    if longest is None:
        return choice
    tokens = longest.plan.context
    if (on_cpu := plan.kv_bytes(1, "cpu")) and room.ram_bytes is not None:
        spare = room.ram_bytes - ram_bytes(plan)
        tokens = min(tokens, plan.context + spare // on_cpu)
    found = search.placed(replace(plan, context=tokens, prefill_chunk=None)) if tokens > plan.context else None
    if found is None:
        return choice
    moved = _moved(found.plan)
    text = f"context {tokens} is the longest that fits it{moved and ' with ' + moved}: {margin(found.forecast)}"
    return _changed(choice, found.plan, found.forecast, text, room, wishes.machine)


def _changed(
    choice: PlanChoice, plan: Plan, profile: MemoryProfile, text: str, room: Room, machine: Machine
) -> PlanChoice:
    """The choice with another plan, why, and its speed instead of the earlier one's."""
    why, speed = [*choice.why, text], None
    if choice.speed:
        speed = forecast_speed(plan, machine=machine, ram=room.ram_bytes)
        why = [line for line in why if line != choice.speed.summary()] + [speed.summary()]
    return replace(choice, plan=plan, forecast=profile, why=tuple(why[-MOST_REASONS:]), speed=speed)


def _with_streaming(choice: PlanChoice, room: Room, machine: Machine) -> PlanChoice:
    """Lets the CPU layers' weights travel for long prompts, where this machine gains by it and two buffers fit.

    With as many layers on the GPU as fit, they seldom do: ``gpu_layers=`` leaves them room.
    """
    try:
        tokens = stream_threshold(choice.plan, machine)
        plan = replace(choice.plan, stream_from=tokens)
        profile = tokens and forecast_if_possible(plan, room.budget)
    except LowvramError:  # no room to measure rates, or an architecture whose weights cannot travel
        return choice
    if not profile:
        return choice
    return _changed(choice, plan, profile, _travelling(tokens, profile), room, machine)


def _travelling(tokens: int, profile: MemoryProfile) -> str:
    """Why weights travel, in words."""
    return f"prompts of {tokens} tokens or more are faster with weights that travel to the GPU: {margin(profile)}"


def remembering(
    choice: PlanChoice,
    gpu: str | int | GpuBudget | Gpu,
    *,
    disk: str | int | None = None,
    ram: str | int | None = None,
    model_ram: str | int | None = None,
    machine: Machine | None = None,
) -> PlanChoice:
    """The choice with a plan that remembers prompts, and what is said of it true of that plan.

    Such prompts are read 128 tokens at a time: weights that would travel for longer ones alone stay where they are.

    Args:
        choice: From ``auto_plan``.
        gpu: As given to ``auto_plan``.
        disk: Most bytes on disk, as ``"2GiB"``; ``None`` for nothing.
        ram: The same in RAM.
        model_ram: As given to ``auto_plan`` as RAM: what prompts take of it comes on top.
        machine: As given to ``auto_plan``.

    Raises:
        UnitError: A size cannot be read.
        PlanError: No block of 128 tokens fits in one.
        BudgetError: The plan no longer fits the GPU.
    """
    before, budget = choice.plan, budget_of(gpu)
    travels = before.stream_from if before.stream_from is not None and before.stream_from <= BLOCK_TOKENS else None
    sizes = {"remember": disk, "remember_ram": ram}
    sizes = {name: None if size is None else parse_bytes(size) for name, size in sizes.items()}
    plan = replace(before, stream_from=travels, **sizes)
    profile = forecast_if_possible(plan, budget)
    if not profile:
        raise BudgetError(
            f"{plan.summary()} does not fit {format_bytes(budget.total_bytes)}; give more of the GPU, or remember "
            "nothing"
        )
    if travels != before.stream_from:
        stale = _travelling(before.stream_from, choice.forecast)
        choice = replace(choice, why=tuple(line for line in choice.why if line != stale))
    text = f"prompts that are remembered are read {plan.piece_tokens} tokens at a time: {margin(profile)}"
    room = Room(plan.spec, budget, None if model_ram is None else parse_bytes(model_ram), None, plan.kv_format)
    return _changed(choice, plan, profile, text, room, machine or Machine())


def _budgets(max_memory: dict, ram: str | int | None, disk: str | int | None) -> tuple:
    """GPU, RAM and disk of accelerate's dictionary."""
    cards = [key for key in max_memory if key not in ("cpu", "disk")]
    for name, stated in (("cpu", ram), ("disk", disk)):
        if stated is not None and name in max_memory:
            word = "RAM" if name == "cpu" else "disk"
            raise PlanError(f"expected {word} in max_memory or in {word.lower()}, found both")
    if len(cards) != 1:
        raise PlanError(f"expected max_memory with one GPU, such as {{0: '4GiB', 'cpu': '8GiB'}}, found {max_memory}")
    return max_memory[cards[0]], max_memory.get("cpu", ram), max_memory.get("disk", disk)


def _chosen(
    plans: list[Plan], bases: dict[str, list[Plan]], search: Cheapest, why: list[str], below_s: float = math.inf
) -> PlanChoice | None:
    """The cheapest of some plans, see ``Cheapest.of``; notes in ``why`` what would be more precise and does not fit."""
    refused: list[Plan] = []
    found = search.of(plans, refused, below_s)
    # of recipes that come to the same, a model whose sizes no group fits, the most precise names it
    names = {_formats(options[0]): recipe for recipe, options in reversed(bases.items())}
    recipe = names[_formats(found.plan)] if found else ""
    tried = {names[_formats(plan)]: plan for plan in refused}  # of each recipe the last, which takes least
    for name, plan in tried.items():
        if name != recipe:
            done = _moved(plan)
            why.append(f"{name} does not fit: {shortage(plan, search.room)}{done and ', even with ' + done}")
    if not found:
        return None
    away = found.plan.weight_bytes("disk")
    on_disk = f", {format_bytes(away)} on disk" if away else ""
    text = f"{recipe}{_words(found.plan, search.asked_layers)}{on_disk} fits: {margin(found.forecast)}"
    return PlanChoice(found.plan, found.forecast, (*why[1 - MOST_REASONS :], text), recipe)


def _formats(plan: Plan) -> tuple[str, ...]:
    return (plan.dtype, *(assignment.format for assignment in plan.modules.values()))


def _words(plan: Plan, gpu_layers: int | None) -> str:
    """What was done to a recipe's plan so that it fits, beside layers that the user wants where they are."""
    on_gpu, total = plan.layer_devices().count("gpu"), plan.spec.num_hidden_layers
    layers = f"{on_gpu} of {total} layers on the GPU" if on_gpu < total and gpu_layers is None else ""
    done = " and ".join(part for part in (layers, _moved(plan)) if part) if layers else _moved(plan)
    return done and f" with {done}"


def _moved(plan: Plan) -> str:
    """The moves of a plan beside its split, in words."""
    spec = plan.spec
    away = [
        name
        for name, module in (("embedding", spec.embedding), ("head", spec.head))
        if plan.modules[module].device != "gpu"
    ]
    parts = [f"the {' and '.join(away)} on the CPU"] if away else []
    if any(each.device == "gpu" and each.low in ("cpu", "disk") for each in plan.modules.values()):
        parts.append("the low planes on the CPU")
    if plan.prefill_chunk is not None:
        parts.append(f"prompts read {plan.prefill_chunk} tokens at a time")
    if plan.kv_format != plan.dtype:
        parts.append(f"the KV cache in {plan.kv_format}")
    return ", ".join(parts[:-1]) + (" and " if parts[1:] else "") + parts[-1] if parts else ""


def _most_precise(bases: dict[str, list[Plan]], search: Cheapest, why: list[str]) -> Iterator[PlanChoice]:
    """Of each recipe, the most precise first, the cheapest plan; a KV cache that costs much only where it must be."""
    for recipe, plans in bases.items():
        gentle = [plan for plan in plans if keeps_cache(plan)]
        reasons: list[str] = []
        choice = _chosen(gentle, bases, search, reasons) if gentle else None
        if choice is None and len(plans) > len(gentle):
            choice = _chosen(plans[len(gentle) :], bases, search, reasons := [])
        if choice:
            yield replace(choice, why=(*why, *choice.why)[-MOST_REASONS:])
        else:
            lacking = shortage(_least(plans[-1], search), search.room)
            why.append(f"{recipe} does not fit, however it is split: {lacking}")


def _fastest(bases: dict[str, list[Plan]], search: Cheapest, why: list[str], machine: Machine) -> PlanChoice | None:
    """The fastest of each recipe's best; a more precise one that is nearly as fast instead: none dominates it."""
    found = []
    for choice in _most_precise(bases, search, why):
        found.append(_with_threads(choice, search.room, machine))
        lossy = [plan for plan in bases[choice.recipe] if not keeps_cache(plan)]
        seconds = off_card_seconds(choice.plan)  # where there are some, a smaller KV cache may let more layers in
        if lossy and seconds and (other := _chosen(lossy, bases, search, [], seconds)):
            found.append(_with_threads(other, search.room, machine))
    if not found:
        return None
    found.sort(key=lambda each: (forecast_loss(each.plan), -each.speed.decode_tokens_per_s, each.plan.weight_bytes()))
    rising = sorted(found, key=lambda each: each.speed.decode_tokens_per_s)
    best = {each.recipe: each.speed.decode_tokens_per_s for each in rising}
    chosen = next(each for each in found if each.speed.decode_tokens_per_s >= AS_FAST * max(best.values()))
    speeds = ", ".join(f"{recipe} {best[recipe]:.1f}" for recipe in bases if recipe in best)
    if loss := forecast_loss(chosen.plan):
        speeds += f"; {chosen.recipe} costs a small model a KL of {loss:.2g} nats"
    return replace(chosen, why=(*chosen.why[-3:], f"forecast tokens/s: {speeds}", chosen.speed.summary()))


def _with_threads(choice: PlanChoice, room: Room, machine: Machine) -> PlanChoice:
    """A plan with its forecast speed; with the fastest number of threads, where none is stated and it matters."""
    counts, cores = [choice.plan.threads], os.cpu_count() or 1
    if counts == [None] and "cpu" in choice.plan.layer_places():
        counts = sorted({1, max(1, cores // 2), cores})
    plans = [replace(choice.plan, threads=count) for count in counts]
    speeds = [forecast_speed(plan, machine=machine, ram=room.ram_bytes) for plan in plans]
    best = max(range(len(plans)), key=lambda index: speeds[index].decode_tokens_per_s)
    return replace(choice, plan=plans[best], speed=speeds[best])
