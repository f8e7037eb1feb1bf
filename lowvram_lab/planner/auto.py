"""auto_plan: searches format x placement x KV format x context x threads for a plan that fits GPU, RAM and disk.

Whether a plan fits is what its forecast says, how fast it is what the measured rates of this machine say.

Derived in: notebooks/05_split_the_layers.ipynb
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace

from lowvram_lab.engine.kinds import engine_of
from lowvram_lab.errors import BudgetError, LowvramError, PlanError
from lowvram_lab.memory.budget import GpuBudget
from lowvram_lab.memory.gpu import Gpu
from lowvram_lab.model.plan import Plan
from lowvram_lab.model.spec import ModelSpec
from lowvram_lab.planner.constraints import Room, margin, ram_bytes, refusal, shortage
from lowvram_lab.planner.forecast import forecast
from lowvram_lab.planner.measure_rates import Machine
from lowvram_lab.planner.profile import MemoryProfile, SpeedProfile
from lowvram_lab.planner.search import budget_of, forecast_if_possible, max_context
from lowvram_lab.planner.speed import forecast_speed, stream_threshold
from lowvram_lab.planner.suggest import SHORTEST_CONTEXT
from lowvram_lab.units import format_bytes, parse_bytes

RECIPES = ("bf16", "int8", "int4")
"""From the most precise. nf4 runs well on CUDA only, and leaves both ends in 16 bits: ask for it by name."""

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
    threads: int | None = None,
    machine: Machine | None = None,
) -> PlanChoice:
    """Chooses a plan that fits.

    Args:
        spec: The model.
        gpu: A budget such as ``"4GiB"``, an opened GPU, or accelerate's ``max_memory``: ``{0: "4GiB", "cpu": "8GiB"}``.
        context: Tokens to plan for; ``None`` for as many as fit the plan that is preferred at 2048 (or at half of
            that, and so on, where nothing fits). Fewer layers on the GPU (``gpu_layers=``) leave room for more.
        ram: What the CPU's part may take; by default no limit.
        disk: What of the CPU's part may lie on disk where RAM is too small; by default nothing.
        prefer: ``"balance"``: the most precise recipe that fits whole, with the embedding on the CPU and the KV cache
            in int8 if need be; if none does, the smallest recipe, split. ``"fidelity"``: the most precise recipe,
            however many layers must go to the CPU. ``"speed"``: the fastest by this machine's rates, which are
            measured if they are not known.
        recipes: Recipes to try, the most precise first; by default ``RECIPES``, or what a converted model holds.
        gpu_layers: Keep to so many layers on the GPU, and choose the rest.
        kv_format: Keep to this, ``"int8"`` or the plan's dtype.
        threads: CPU threads for the plan; by default torch's number, for ``"speed"`` the fastest of one, half, all.
        machine: Rates for ``"speed"`` and for weights that travel; by default this machine's.

    Returns:
        The plan, its forecast, and why it was chosen.

    Raises:
        BudgetError: No plan fits; the message says what is short and what would help.
        PlanError: The context is beyond the model's, or a recipe or preference is unknown.
    """
    if isinstance(gpu, dict):
        gpu, ram, disk = _budgets(gpu, ram, disk)
    budget = budget_of(gpu)
    if recipes is None:
        recipes = ("stored",) if spec.stored else RECIPES
    if not recipes:
        raise PlanError("expected one recipe or more to choose from, found none")
    if prefer not in PREFERENCES:
        raise PlanError(f"expected prefer {', '.join(PREFERENCES)}, found {prefer!r}")
    if prefer != "balance" and gpu_layers is not None:
        raise PlanError(f"prefer={prefer!r} chooses the split, found gpu_layers={gpu_layers} as well; give one of them")
    sizes = (None if size is None else parse_bytes(size) for size in (ram, disk))
    room, machine = Room(spec, budget, *sizes, kv_format), machine or Machine()
    wishes = _Wishes(recipes, prefer, gpu_layers, threads, machine)
    if context is not None:
        choice = _at_context(context, room, wishes)
    else:
        choice = _at_longest_context(min(DEFAULT_CONTEXT, spec.longest_context), room, wishes)
    return _with_streaming(choice, room, machine)


@dataclass(frozen=True)
class _Wishes:
    """What ``auto_plan`` is told to prefer and to keep to; see there."""

    recipes: tuple[str, ...]
    prefer: str
    gpu_layers: int | None
    threads: int | None
    machine: Machine


def _at_context(context: int, room: Room, wishes: _Wishes) -> PlanChoice:
    gpu_layers, smallest = wishes.gpu_layers, wishes.recipes[-1]
    why = []
    plans = {}
    for recipe in wishes.recipes:
        plan = replace(Plan.uniform(room.spec, recipe, context=context), threads=wishes.threads)
        if gpu_layers is not None:
            plan = plan.with_gpu_layers(gpu_layers)
        plans[recipe] = replace(plan, kv_format=room.kv_format or plan.kv_format)
    if gpu_layers is not None:
        choice = next(_whole(plans, room, why), None)
    elif wishes.prefer == "speed":
        choice = _fastest(plans, room, why, wishes.machine)
    elif wishes.prefer == "fidelity":
        choice = next(_splits(plans, room, why), None)
    else:
        choice = next(_whole(plans, room, why), None) or _split(smallest, plans[smallest], room, why)
    if choice is None:
        least = plans[smallest] if gpu_layers is not None else plans[smallest].with_gpu_layers(0)
        *_, (_, least) = _variants(least, room)
        if gpu_layers is None and room.lacks_ram(least):  # what the GPU takes of it, RAM need not
            most = replace(room, ram_bytes=None).most_layers(least)
            least = most[1] if most else least
        raise refusal(least, room)
    return choice


def _at_longest_context(context: int, room: Room, wishes: _Wishes) -> PlanChoice:
    """What is preferred at a usual context, with as many tokens as then fit GPU and RAM."""
    try:
        choice = _at_context(context, room, wishes)
    except BudgetError:
        if context // 2 < SHORTEST_CONTEXT:
            raise
        return _at_longest_context(context // 2, room, wishes)
    plan = choice.plan
    tokens = (longest := max_context(plan, room.budget)).value
    if (on_cpu := plan.kv_bytes(1, "cpu")) and room.ram_bytes is not None:
        spare = room.ram_bytes - ram_bytes(plan)
        tokens = min(tokens, plan.context + spare // on_cpu)
    if tokens <= plan.context:
        return choice
    plan = replace(plan, context=tokens)
    profile = longest.forecast if tokens == longest.value else forecast(plan, room.budget)
    text = f"context {tokens} is the longest that fits it: {margin(profile)}"
    return _changed(choice, plan, profile, text, room, wishes.machine)


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
    if engine_of(plan, "cuda")[0] != engine_of(choice.plan, "cuda")[0]:
        return choice  # every decoded token would pay for what a long prompt gains
    text = f"prompts of {tokens} tokens or more are faster with weights that travel to the GPU: {margin(profile)}"
    return _changed(choice, plan, profile, text, room, machine)


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


def _variants(plan: Plan, room: Room) -> Iterator[tuple[str, Plan]]:
    """A recipe's plans that differ in what costs next to nothing, gentlest first."""
    spec = room.spec
    yield "", plan
    if not spec.tied:
        plan = plan.with_modules(spec.embedding, device="cpu")
        yield " with the embedding on the CPU", plan
    if plan.kv_format != "int8" and room.kv_format is None:
        beside = "" if spec.tied else " with the embedding on the CPU and"
        yield f"{beside or ' with'} the KV cache in int8", replace(plan, kv_format="int8")


def _whole(plans: dict[str, Plan], room: Room, why: list[str]) -> Iterator[PlanChoice]:
    """Plans whose layers stay where they are, the most precise first; notes in ``why`` what does not fit."""
    for recipe, base in plans.items():
        for where, plan in _variants(base, room):
            if fitting := room.fit(plan):
                text = f"{recipe}{where}{_on_disk(fitting[0])} fits: {margin(fitting[1])}"
                yield PlanChoice(*fitting, (*why, text), recipe)
                break
        else:
            why.append(f"{recipe} does not fit: {shortage(plan, room)}{where and ', even' + where}")


def _split(recipe: str, base: Plan, room: Room, why: list[str]) -> PlanChoice | None:
    """A recipe with the most layers on the GPU; in 16 bits of KV cache unless int8 lets more layers in."""
    found = []
    *_, plan = (plan for text, plan in _variants(base, room) if "KV" not in text)
    for kv_format in dict.fromkeys((plan.kv_format, room.kv_format or "int8")):
        if split := room.most_layers(replace(plan, kv_format=kv_format)):
            found.append(split)
    if not found:
        return None
    number, plan, profile = max(found, key=lambda split: split[0])  # the first of equals
    kv = ", KV cache in int8" if plan.kv_format == "int8" else ""
    layers = f"{number} of {room.spec.num_hidden_layers} layers on the GPU{kv}{_on_disk(plan)}"
    text = f"{recipe} with {layers} fits: {margin(profile)}"
    return PlanChoice(plan, profile, (*why, text), recipe)


def _splits(plans: dict[str, Plan], room: Room, why: list[str]) -> Iterator[PlanChoice]:
    """Of each recipe, the most precise first, the plan with the most layers on the GPU."""
    for recipe, base in plans.items():
        reasons: list[str] = []
        choice = next(_whole({recipe: base}, room, reasons), None) or _split(recipe, base, room, reasons)
        if choice:
            yield replace(choice, why=(*why, *choice.why))
        else:
            *_, (_, least) = _variants(base.with_gpu_layers(0), room)
            why.append(f"{recipe} does not fit, however it is split: {shortage(least, room)}")


def _fastest(plans: dict[str, Plan], room: Room, why: list[str], machine: Machine) -> PlanChoice | None:
    """The fastest of each recipe's best; a more precise one that is nearly as fast instead."""
    found = [_with_threads(choice, room, machine) for choice in _splits(plans, room, why)]
    if not found:
        return None
    fastest = max(choice.speed.decode_tokens_per_s for choice in found)
    chosen = next(choice for choice in found if choice.speed.decode_tokens_per_s >= AS_FAST * fastest)
    speeds = ", ".join(f"{choice.recipe} {choice.speed.decode_tokens_per_s:.1f}" for choice in found)
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


def _on_disk(plan: Plan) -> str:
    on_disk = plan.weight_bytes("disk")
    return f", {format_bytes(on_disk)} on disk" if on_disk else ""
