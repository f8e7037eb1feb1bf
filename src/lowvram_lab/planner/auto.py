"""auto_plan: searches format x placement x KV format (x threads) for the plan that fits a GPU and RAM and is preferred.

Whether a plan fits is what its forecast says, how fast it is what the measured rates of this machine say.

Derived in: notebooks/05_split_the_layers.ipynb
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from lowvram_lab.errors import BudgetError, PlanError
from lowvram_lab.memory.budget import GpuBudget
from lowvram_lab.memory.device import Gpu
from lowvram_lab.memory.host import forecast_load_bytes
from lowvram_lab.plan import Plan
from lowvram_lab.planner.cost import forecast_speed
from lowvram_lab.planner.rates import Machine
from lowvram_lab.planner.search import forecast_if_possible, largest_fitting, least_bytes, resolve
from lowvram_lab.planner.suggest import SHORTEST_CONTEXT, suggest
from lowvram_lab.profile import MemoryProfile, SpeedProfile, Workload
from lowvram_lab.spec import ModelSpec
from lowvram_lab.units import format_bytes, parse_bytes

RECIPES = ("bf16", "int8", "int4")
"""From the most precise. nf4 runs well on CUDA only, and leaves both ends in 16 bits: ask for it by name."""

PREFERENCES = ("balance", "fidelity", "speed")

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


@dataclass(frozen=True)
class _Room:
    """What a plan may take, on both sides."""

    spec: ModelSpec
    budget: GpuBudget
    kernels: str
    ram_bytes: int | None
    kv_format: str | None

    def forecast(self, plan: Plan) -> MemoryProfile | None:
        """The forecast of a plan that fits."""
        return None if self.lacks_ram(plan) else forecast_if_possible(plan, self.spec, self.budget, self.kernels)

    def lacks_ram(self, plan: Plan) -> bool:
        """Whether the CPU's part is more than the RAM."""
        return self.ram_bytes is not None and ram_bytes(plan, self.spec) > self.ram_bytes

    def most_layers(self, plan: Plan) -> tuple[int, Plan, MemoryProfile] | None:
        """The plan with as many layers on the GPU as fit, but not all."""
        workload = Workload.full_context(plan.context)
        high = self.spec.num_hidden_layers - 1
        found = largest_fitting(
            lambda n: (plan.with_gpu_layers(self.spec, n), workload), 0, high, self.spec, self.budget, self.kernels
        )
        return None if found is None or self.lacks_ram(found.plan) else (found.number, found.plan, found.forecast)


def ram_bytes(plan: Plan, spec: ModelSpec) -> int:
    """What a plan takes of the host's memory beside Python and torch: weights, the load's transient, KV cache."""
    return forecast_load_bytes(plan, spec, gpu_in_ram=False) + plan.kv_bytes(spec, plan.context, "cpu")


def auto_plan(
    spec: ModelSpec,
    gpu: str | int | GpuBudget | Gpu | dict,
    context: int = 2048,
    *,
    ram: str | int | None = None,
    prefer: str = "balance",
    recipes: tuple[str, ...] | None = None,
    gpu_layers: int | None = None,
    kv_format: str | None = None,
    kernels: str | None = None,
    threads: int | None = None,
    machine: Machine | None = None,
) -> PlanChoice:
    """Chooses a plan that fits.

    Args:
        spec: The model.
        gpu: A budget such as ``"4GiB"``, an opened GPU, or accelerate's ``max_memory``: ``{0: "4GiB", "cpu": "8GiB"}``.
        context: Tokens to plan for.
        ram: What the CPU's part may take; by default no limit.
        prefer: ``"balance"``: the most precise recipe that fits whole, with the embedding on the CPU and the KV cache
            in int8 if need be; if none does, the smallest recipe, split. ``"fidelity"``: the most precise recipe,
            however many layers must go to the CPU. ``"speed"``: the fastest by this machine's rates, which are
            measured if they are not known.
        recipes: Recipes to try, the most precise first; by default ``RECIPES``, or what a converted model holds.
        gpu_layers: Keep to so many layers on the GPU, and choose the rest.
        kv_format: Keep to this, ``"int8"`` or the plan's dtype.
        kernels: See ``forecast``.
        threads: CPU threads for the plan.
        machine: Rates for ``"speed"``; by default this machine's.

    Returns:
        The plan, its forecast, and why it was chosen.

    Raises:
        BudgetError: No plan fits; the message says what is short and what would help.
        PlanError: The context is beyond the model's, or a recipe or preference is unknown.
    """
    if isinstance(gpu, dict):
        gpu, ram = _budgets(gpu, ram)
    budget, kernels = resolve(gpu, kernels)
    if recipes is None:
        recipes = ("stored",) if spec.stored else RECIPES
    if not recipes:
        raise PlanError("expected one recipe or more to choose from, found none")
    if prefer not in PREFERENCES:
        raise PlanError(f"expected prefer {', '.join(PREFERENCES)}, found {prefer!r}")
    if prefer != "balance" and gpu_layers is not None:
        raise PlanError(f"prefer={prefer!r} chooses the split, found gpu_layers={gpu_layers} as well; give one of them")
    room = _Room(spec, budget, kernels, None if ram is None else parse_bytes(ram), kv_format)
    plans = {recipe: replace(Plan.uniform(spec, recipe, context=context), threads=threads) for recipe in recipes}
    for recipe, plan in plans.items():
        if gpu_layers is not None:
            plan = plan.with_gpu_layers(spec, gpu_layers)
        plans[recipe] = plan = replace(plan, kv_format=kv_format or plan.kv_format)
        plan.validate(spec)
    why: list[str] = []
    if gpu_layers is not None:
        choice = next(_whole(plans, room, why), None)
    elif prefer == "speed":
        choice = _fastest(plans, room, why, machine or Machine())
    elif prefer == "fidelity":
        choice = next(_splits(plans, room, why), None)
    else:
        choice = next(_whole(plans, room, why), None) or _smallest_split(plans, room, why)
    if choice is None:
        least = plans[recipes[-1]]
        *_, (_, least) = _variants(least if gpu_layers is not None else least.with_gpu_layers(spec, 0), room)
        raise _refusal(least, room)
    return choice


def _budgets(max_memory: dict, ram) -> tuple:
    """GPU and RAM of accelerate's dictionary."""
    cards = [key for key in max_memory if key not in ("cpu", "disk")]
    if ram is not None and "cpu" in max_memory:
        raise PlanError("expected RAM in max_memory or in ram, found both")
    if len(cards) != 1:
        raise PlanError(f"expected max_memory with one GPU, such as {{0: '4GiB', 'cpu': '8GiB'}}, found {max_memory}")
    return max_memory[cards[0]], max_memory.get("cpu", ram)


def _variants(plan: Plan, room: _Room) -> Iterator[tuple[str, Plan]]:
    """A recipe's plans that differ in what costs next to nothing, gentlest first."""
    spec = room.spec
    yield "", plan
    if not spec.tied:
        plan = plan.with_modules(spec.embedding, device="cpu")
        yield " with the embedding on the CPU", plan
    if plan.kv_format != "int8" and room.kv_format is None:
        beside = "" if spec.tied else " with the embedding on the CPU and"
        yield f"{beside or ' with'} the KV cache in int8", replace(plan, kv_format="int8")


def _whole(plans: dict[str, Plan], room: _Room, why: list[str]) -> Iterator[PlanChoice]:
    """Plans whose layers stay where they are, the most precise first; notes in ``why`` what does not fit."""
    for recipe, base in plans.items():
        for where, plan in _variants(base, room):
            if profile := room.forecast(plan):
                yield PlanChoice(plan, profile, (*why, f"{recipe}{where} fits: {_margin(profile)}"), recipe)
                break
        else:
            why.append(f"{recipe} does not fit: {_shortage(plan, room)}{where and ', even' + where}")


def _split(recipe: str, base: Plan, room: _Room, why: list[str]) -> PlanChoice | None:
    """A recipe with the most layers on the GPU; in 16 bits of KV cache unless int8 lets more layers in."""
    found = []
    *_, plan = (plan for text, plan in _variants(base, room) if "KV" not in text)
    for kv_format in dict.fromkeys((plan.kv_format, room.kv_format or "int8")):
        if split := room.most_layers(replace(plan, kv_format=kv_format)):
            found.append(split)
    if not found:
        return None
    number, plan, profile = max(found, key=lambda split: split[0])  # the first of equals
    kv = ", KV cache in int8," if plan.kv_format == "int8" else ""
    text = f"{recipe} with {number} of {room.spec.num_hidden_layers} layers on the GPU{kv} fits: {_margin(profile)}"
    return PlanChoice(plan, profile, (*why, text), recipe)


def _smallest_split(plans: dict[str, Plan], room: _Room, why: list[str]) -> PlanChoice | None:
    recipe = list(plans)[-1]
    return _split(recipe, plans[recipe], room, why)


def _splits(plans: dict[str, Plan], room: _Room, why: list[str]) -> Iterator[PlanChoice]:
    """Of each recipe, the most precise first, the plan with the most layers on the GPU."""
    for recipe, base in plans.items():
        reasons: list[str] = []
        choice = next(_whole({recipe: base}, room, reasons), None) or _split(recipe, base, room, reasons)
        if choice:
            yield replace(choice, why=(*why, *choice.why))
        else:
            *_, (_, least) = _variants(base.with_gpu_layers(room.spec, 0), room)
            why.append(f"{recipe} does not fit, however it is split: {_shortage(least, room)}")


def _fastest(plans: dict[str, Plan], room: _Room, why: list[str], machine: Machine) -> PlanChoice | None:
    """The fastest of each recipe's best; a more precise one that is nearly as fast instead."""
    found = [
        replace(choice, speed=forecast_speed(choice.plan, room.spec, machine=machine))
        for choice in _splits(plans, room, why)
    ]
    if not found:
        return None
    fastest = max(choice.speed.decode_tokens_per_s for choice in found)
    chosen = next(choice for choice in found if choice.speed.decode_tokens_per_s >= AS_FAST * fastest)
    speeds = ", ".join(f"{choice.recipe} {choice.speed.decode_tokens_per_s:.1f}" for choice in found)
    return replace(chosen, why=(*chosen.why[-3:], f"forecast tokens/s: {speeds}", chosen.speed.summary()))


def _margin(profile: MemoryProfile) -> str:
    free = profile.budget.usable_bytes - profile.peak_reserved_bytes
    return f"peak {format_bytes(profile.peak_allocated_bytes)}, {format_bytes(free)} to spare"


def _shortage(plan: Plan, room: _Room) -> str:
    if room.lacks_ram(plan):
        return _short_of_ram(plan, room)
    weights, least = plan.weight_bytes(room.spec, "gpu"), least_bytes(plan, room.spec)
    beyond = least - room.budget.usable_bytes
    tail = f", {format_bytes(beyond)} too much" if beyond > 0 else " before activations and fragmentation"
    return f"{format_bytes(weights)} of weights + {format_bytes(least - weights)} of KV{tail}"


def _short_of_ram(plan: Plan, room: _Room) -> str:
    on_cpu = format_bytes(ram_bytes(plan, room.spec))
    return f"the CPU's part takes {on_cpu} of RAM, found {format_bytes(room.ram_bytes)}"


def _refusal(plan: Plan, room: _Room) -> BudgetError:
    spec, budget = room.spec, room.budget
    needed = least_bytes(plan, spec) + budget.context_bytes
    message = (
        f"no plan for {spec.name} at context {plan.context} fits a {format_bytes(budget.total_bytes)} GPU: even "
        f"{plan.summary(spec)}, needs more than {format_bytes(needed)}"
    )
    if room.lacks_ram(plan):
        return BudgetError(
            f"no plan for {spec.name} at context {plan.context} fits a {format_bytes(budget.total_bytes)} GPU and "
            f"{format_bytes(room.ram_bytes)} of RAM: the CPU's part alone takes {format_bytes(ram_bytes(plan, spec))}; "
            "give it more RAM, a larger GPU or a smaller model"
        )
    helps = suggest(plan, spec, budget, room.kernels)
    if helps:
        return BudgetError(f"{message}; what would help: {helps[0].text}")
    return BudgetError(
        f"{message}; not even a context of {SHORTEST_CONTEXT} helps: give it a larger GPU or a smaller model"
    )
