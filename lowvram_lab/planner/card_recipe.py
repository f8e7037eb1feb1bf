"""recipe: the mixed-precision plan with the least estimated loss that fits a number of bytes, or a GPU and a context.

Derived in: notebooks/04_compress.ipynb
"""

from dataclasses import dataclass, replace

from lowvram_lab.errors import BudgetError, PlanError
from lowvram_lab.memory.budget import GpuBudget
from lowvram_lab.memory.gpu import Gpu
from lowvram_lab.model.formats import DTYPES, get_format
from lowvram_lab.model.plan import Plan
from lowvram_lab.model.spec import ModelSpec, ModuleSpec
from lowvram_lab.planner.forecast import forecast
from lowvram_lab.planner.profile import MemoryProfile
from lowvram_lab.planner.search import resolve
from lowvram_lab.units import format_bytes, parse_bytes
from lowvram_lab.weights.allocate import Option, allocate
from lowvram_lab.weights.sensitivity import Sensitivity

ATTEMPTS = 8
"""Forecasts in search of the bytes that weights may take beside KV cache and workspace; three are usual."""

SPARE = 0.002
"""Of the budget, below which more weights are not worth another forecast."""


@dataclass(frozen=True)
class Recipe:
    """A plan made by bit allocation, and what it is estimated to cost.

    Attributes:
        plan: Everything on the GPU (in the ``gpu`` form, an untied embedding on the CPU).
        estimated_kl: Sum of the modules' estimated costs: nats per token, on text like the calibration text. ``None``
            for a plan that was not estimated.
        weight_bytes: Exact bytes of all weights, norms and biases included.
        source_weight_bytes: The same of the 16-bit model.
        forecast: In the ``gpu`` form, the forecast that says it fits.
        lookup: See ``Sensitivity``; ``convert`` weighs a tied table's two uses by it.
    """

    plan: Plan
    estimated_kl: float | None
    weight_bytes: int
    source_weight_bytes: int
    forecast: MemoryProfile | None = None
    lookup: float = 0.0

    @property
    def reduction(self) -> float:
        """Share of the 16-bit model's bytes that are saved."""
        return 1 - self.weight_bytes / self.source_weight_bytes

    def summary(self) -> str:
        """One line."""
        estimate = "" if self.estimated_kl is None else f", estimated KL {self.estimated_kl:.4f}"
        return (
            f"{format_bytes(self.weight_bytes)} of weights ({self.reduction:.1%} less than "
            f"{format_bytes(self.source_weight_bytes)}){estimate}"
        )

    def _repr_html_(self) -> str:
        return f"<b>Recipe</b> {self.summary()}<br>" + self.plan.table().to_html(index=False)


def recipe(
    spec: ModelSpec,
    sensitivity: Sensitivity,
    *,
    weight_bytes: int | str | None = None,
    gpu: str | int | GpuBudget | Gpu | None = None,
    context: int | None = None,
    formats: tuple[str, ...] | None = None,
    stock: bool = True,
    kv_format: str | None = None,
    kernels: str | None = None,
) -> Recipe:
    """Chooses a format for every module, embedding and head too.

    Args:
        spec: The model.
        sensitivity: From ``estimate_sensitivity``.
        weight_bytes: What the weights may take in memory in all, scales and norms included; or
        gpu: the card that weights, KV cache of ``context`` tokens and workspace are to share.
        context: Tokens to plan for; by default 2048, or what the model has.
        formats: Formats to choose among; by default all that were estimated, and 16 bits.
        stock: Only what stock transformers can open: an embedding of 16 or 8 bits.
        kv_format: See ``Plan``; by default 16 bits.
        kernels: See ``forecast``.

    Raises:
        BudgetError: Even the smallest formats exceed the budget; it says by how much, and what would fit.
        PlanError: Both budgets, or none; a sensitivity of another model.
    """
    if (weight_bytes is None) == (gpu is None):
        raise PlanError("expected weight_bytes or gpu, one of the two: bytes for the weights, or a card to share")
    base = Plan.uniform(spec, "bf16", context=context or min(2048, spec.max_position_embeddings or 2048))
    base = replace(base, kv_format=kv_format or base.kv_format)
    base.validate(spec)
    if gpu is not None and not spec.tied:
        base = base.with_modules(spec.embedding, device="cpu")
    options = _options(spec, base, sensitivity, formats, stock)
    if weight_bytes is not None:
        found = _within(spec, base, options, parse_bytes(weight_bytes))
    else:
        found = _beside_the_cache(spec, base, options, *resolve(gpu, kernels))
    return replace(found, lookup=sensitivity.lookup)


def _options(spec: ModelSpec, base: Plan, sensitivity, formats, stock: bool) -> dict[str, list[Option]]:
    missing = [m.name for m in spec.modules if m.kind != "other" and not m.tied_to and m.name not in sensitivity.costs]
    if missing:
        raise PlanError(f"expected the sensitivity of {spec.name}, found one that lacks {missing[0]}; estimate it anew")
    for name in formats or ():
        get_format(name)
    options = {}
    for module in spec.modules:
        if module.name not in sensitivity.costs:
            continue
        costs = {base.dtype: 0.0} | sensitivity.costs[module.name]
        allowed = [name for name in costs if _allowed(name, module, spec, formats, stock)]
        if not allowed:
            raise PlanError(f"{module.name}: none of the formats {', '.join(formats or costs)} can hold it")
        options[module.name] = [Option(name, _bytes(module, name, base), costs[name]) for name in allowed]
    return options


def _allowed(name: str, module: ModuleSpec, spec: ModelSpec, formats, stock: bool) -> bool:
    fmt = get_format(name)
    if fmt.refuse(module.kind, module.weight_shape):
        return False
    table = module.name == spec.embedding
    if stock and table and fmt.kind not in ("float", "int8"):
        return False
    # an embedding and a shape no given format can hold may always be in int8, as in a uniform plan
    return not formats or name in formats or (name == "int8" and (table or not _holds(module, formats)))


def _holds(module: ModuleSpec, formats) -> bool:
    return any(get_format(name).refuse(module.kind, module.weight_shape) is None for name in formats)


def _bytes(module: ModuleSpec, fmt: str, base: Plan) -> int:
    return get_format(fmt).weight_bytes(module.weight_shape, DTYPES[base.dtype])


def _within(spec, base: Plan, options: dict[str, list[Option]], budget: int, device: str | None = None) -> Recipe:
    """The best within some bytes, of all weights or (``device``) of those on one device."""
    counted = {n: o for n, o in options.items() if device in (None, base.modules[n].device)}
    fixed = base.weight_bytes(spec, device) - sum(_bytes(spec.module(name), base.dtype, base) for name in counted)
    chosen = allocate(counted, budget - fixed)
    if chosen is None:
        least = format_bytes(_least(spec, base, options, device))
        raise BudgetError(
            f"the weights of {spec.name} take {least} at the least in these formats, found a budget of "
            f"{format_bytes(budget)}; allow fewer bits (formats), an embedding below 8 bits (stock=False) or more bytes"
        )
    others = {name: min(choices, key=lambda o: (o.cost > 0, o.cost)) for name, choices in options.items()}
    others = {name: _elsewhere(options[name], option) for name, option in others.items() if name not in chosen}
    plan = base
    for name, option in {**others, **chosen}.items():
        plan = _with_format(plan, spec, name, option.format)
    plan.validate(spec)
    cost = sum(option.cost for option in [*others.values(), *chosen.values()])
    return Recipe(plan, cost, plan.weight_bytes(spec), base.weight_bytes(spec))


def _least(spec, base: Plan, options, device: str | None = None) -> int:
    """The fewest bytes that weights can take, of all or of those on one device."""
    counted = {n: o for n, o in options.items() if device in (None, base.modules[n].device)}
    fixed = base.weight_bytes(spec, device) - sum(_bytes(spec.module(name), base.dtype, base) for name in counted)
    return fixed + sum(min(option.bytes for option in choices) for choices in counted.values())


def _smallest(spec, base: Plan, options, least: int, budget: GpuBudget, kernels: str) -> Recipe | None:
    """The smallest recipe, if it fits."""
    found = _within(spec, base, options, least, "gpu")
    profile = forecast(found.plan, spec, budget, kernels=kernels)
    return replace(found, forecast=profile) if profile.fits else None


def _elsewhere(options: list[Option], best: Option) -> Option:
    """What is not on the GPU is in int8 where it can be: next to no cost, half the RAM."""
    return next((option for option in options if option.format == "int8"), best)


def _with_format(plan: Plan, spec: ModelSpec, name: str, fmt: str) -> Plan:
    modules = dict(plan.modules)
    for module in spec.modules:
        if name in (module.name, module.tied_to):
            modules[module.name] = replace(modules[module.name], format=fmt)
    return replace(plan, modules=modules)


def _beside_the_cache(spec, base: Plan, options, budget: GpuBudget, kernels: str) -> Recipe:
    """Finds how many bytes of weights the forecast leaves room for: the recipe, its forecast, what was over or left."""
    least = _least(spec, base, options, "gpu")
    cache = base.kv_bytes(spec, base.context - 1, "gpu")
    best, weights = None, budget.usable_bytes - cache
    low, high = least - 1, max(least, weights) + 1
    for attempt in range(ATTEMPTS):
        weights = min(max(weights, low + 1), high - 1)
        found = _within(spec, base, options, weights, "gpu")
        profile = forecast(found.plan, spec, budget, kernels=kernels)
        taken = found.plan.weight_bytes(spec, "gpu")
        if profile.fits:
            best, low = replace(found, forecast=profile), max(weights, taken)
        else:
            high = min(weights, taken)  # any budget that gives this plan, or a larger one, fails as well
        if high - low <= max(1, SPARE * budget.usable_bytes):
            break
        # what a plan takes beside its weights hardly depends on them, so this lands close; if not, the middle
        weights = taken + budget.usable_bytes - profile.peak_reserved_bytes
        if not low < weights < high or attempt > 1:
            weights = (low + high) // 2
    best = best or _smallest(spec, base, options, least, budget, kernels)
    if best is None:
        raise BudgetError(
            f"no recipe for {spec.name} at context {base.context} fits a {format_bytes(budget.total_bytes)} GPU whole: "
            f"its weights take {format_bytes(least)} at the least, its KV cache {format_bytes(cache)}; shorten the "
            "context, put layers on the CPU (lowvram plan) or allow an embedding below 8 bits (stock=False)"
        )
    return best
