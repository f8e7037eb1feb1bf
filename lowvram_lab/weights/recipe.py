"""recipe: the mixed-precision plan with the least estimated loss within a number of bytes.

Knows no card: ``planner/card_recipe.py`` finds out how many bytes one leaves to the weights.

Derived in: notebooks/04_compress.ipynb
"""

from dataclasses import dataclass, replace
from typing import Protocol

from lowvram_lab.errors import BudgetError, PlanError
from lowvram_lab.model.formats import DTYPES, get_format
from lowvram_lab.model.plan import Plan
from lowvram_lab.model.spec import ModelSpec, ModuleSpec
from lowvram_lab.units import format_bytes, parse_bytes
from lowvram_lab.weights.allocate import Option, allocate
from lowvram_lab.weights.sensitivity import Sensitivity, formats_to_choose_among


@dataclass(frozen=True)
class Recipe:
    """A plan made by bit allocation, and what it is estimated to cost.

    Attributes:
        plan: Everything on the GPU (made for a card, an untied embedding is on the CPU).
        estimated_kl: Sum of the modules' estimated costs: nats per token, on text like the calibration text. ``None``
            for a plan that was not estimated.
        weight_bytes: Exact bytes of all weights, norms and biases included.
        source_weight_bytes: The same of the 16-bit model.
        lookup: See ``Sensitivity``; ``convert`` weighs a tied table's two uses by it.
    """

    plan: Plan
    estimated_kl: float | None
    weight_bytes: int
    source_weight_bytes: int
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


class RecipeMaker(Protocol):
    """What chooses the formats once the sensitivity is known: ``WeightBudget``, or ``planner``'s ``CardBudget``.

    Its ``repr`` names everything that the choice depends on: a conversion that was interrupted goes on only where the
    same maker is given again.
    """

    @property
    def formats(self) -> tuple[str, ...] | None:
        """Formats to choose among, see ``recipe``."""

    def recipe(self, spec: ModelSpec, sensitivity: Sensitivity) -> Recipe:
        """Chooses. Called with free costs too, to learn early whether anything would be small enough."""


@dataclass(frozen=True)
class WeightBudget:
    """Makes the best recipe within a number of bytes or a share of the 16-bit model's; one of the two is given.

    Attributes:
        weight_bytes: What the weights may take in memory, such as ``"1.9GiB"``.
        reduction: Share of the 16-bit model's bytes to save, such as 0.7.
        formats: See ``recipe``.
        stock: See ``recipe``.

    Raises:
        PlanError: Both, or none; a reduction that is no share.
        UnitError: Bytes that cannot be read.
    """

    weight_bytes: int | str | None = None
    reduction: float | None = None
    formats: tuple[str, ...] | None = None
    stock: bool = True

    def __post_init__(self) -> None:
        if (self.weight_bytes is None) == (self.reduction is None):
            raise PlanError("expected weight_bytes or reduction, one of the two: it says how small the result is to be")
        if self.reduction is not None and not 0 < self.reduction < 1:
            raise PlanError(f"expected a reduction between 0 and 1, such as 0.7, found {self.reduction!r}")
        if self.weight_bytes is not None:  # in the repr, 1GiB and 1024MiB are the same budget
            object.__setattr__(self, "weight_bytes", parse_bytes(self.weight_bytes))

    def bytes_for(self, spec: ModelSpec) -> int:
        """What this model's weights may take."""
        if self.weight_bytes is not None:
            return self.weight_bytes
        return int(2 * spec.num_parameters * (1 - self.reduction))

    def recipe(self, spec: ModelSpec, sensitivity: Sensitivity) -> Recipe:
        """See ``RecipeMaker``."""
        size = self.bytes_for(spec)
        return recipe(spec, sensitivity, weight_bytes=size, formats=self.formats, stock=self.stock)


def recipe(
    spec: ModelSpec,
    sensitivity: Sensitivity,
    *,
    weight_bytes: int | str,
    context: int | None = None,
    formats: tuple[str, ...] | None = None,
    stock: bool = True,
    kv_format: str | None = None,
) -> Recipe:
    """Chooses a format for every module, embedding and head too.

    No module gets a format that another of its formats is as small as and as close as: what is dominated in bytes and
    cost alone is so whatever its speed. Speed itself is not asked; ``frontier`` puts a recipe beside other plans.

    Args:
        spec: The model.
        sensitivity: From ``estimate_sensitivity``.
        weight_bytes: What the weights may take in memory in all, scales and norms included.
        context: Tokens to plan for; by default 2048, or what the model has.
        formats: Formats to choose among; by default all that were estimated, and 16 bits.
        stock: Only what stock transformers can open: an embedding of 16 or 8 bits.
        kv_format: See ``Plan``; by default 16 bits.

    Raises:
        BudgetError: Even the smallest formats exceed the bytes; it says by how much, and what would fit.
        PlanError: A sensitivity of another model, or a plan that this model cannot have.
    """
    choices = choices_for(spec, sensitivity, context=context, formats=formats, stock=stock, kv_format=kv_format)
    return choices.within(parse_bytes(weight_bytes))


@dataclass(frozen=True)
class Choices:
    """What bit allocation chooses from.

    Attributes:
        spec: The model.
        base: The plan in 16 bits that a recipe changes: dtype, context, KV format, devices.
        options: The formats of every module that may have several, in bytes and estimated cost.
        lookup: See ``Recipe``.
    """

    spec: ModelSpec
    base: Plan
    options: dict[str, list[Option]]
    lookup: float

    def least_bytes(self, device: str | None = None) -> int:
        """The fewest bytes that weights can take, of all or of those on one device."""
        counted = self._on(device)
        return self._fixed_bytes(counted, device) + sum(min(o.bytes for o in options) for options in counted.values())

    def within(self, budget: int, device: str | None = None) -> Recipe:
        """The best recipe within some bytes, of all weights or of those on one device.

        Raises:
            BudgetError: Even the smallest formats exceed them.
        """
        counted = self._on(device)
        chosen = allocate(counted, budget - self._fixed_bytes(counted, device))
        if chosen is None:
            raise BudgetError(
                f"the weights of {self.spec.name} take {format_bytes(self.least_bytes(device))} at the least in these "
                f"formats, found a budget of {format_bytes(budget)}; allow fewer bits (formats), an embedding below 8 "
                "bits (stock=False) or more bytes"
            )
        elsewhere = {name: _off_the_card(options) for name, options in self.options.items() if name not in counted}
        chosen = {**elsewhere, **chosen}
        plan = self.base
        for name, option in chosen.items():
            plan = _with_format(plan, name, option.format)
        return Recipe(
            plan,
            estimated_kl=sum(option.cost for option in chosen.values()),
            weight_bytes=plan.weight_bytes(),
            source_weight_bytes=self.base.weight_bytes(),
            lookup=self.lookup,
        )

    def _on(self, device: str | None) -> dict[str, list[Option]]:
        modules = self.base.modules
        return {name: options for name, options in self.options.items() if device in (None, modules[name].device)}

    def _fixed_bytes(self, counted: dict[str, list[Option]], device: str | None) -> int:
        """What nothing can be chosen for: norms, biases."""
        chosen_for = sum(_bytes(self.spec.module(name), self.base.dtype, self.base) for name in counted)
        return self.base.weight_bytes(device) - chosen_for


def choices_for(
    spec: ModelSpec,
    sensitivity: Sensitivity,
    *,
    context: int | None = None,
    formats: tuple[str, ...] | None = None,
    stock: bool = True,
    kv_format: str | None = None,
) -> Choices:
    """Checks what a recipe is to be made from. Arguments and errors as ``recipe``."""
    base = Plan.uniform(spec, "bf16", context=context or min(2048, spec.max_position_embeddings or 2048))
    base = replace(base, kv_format=kv_format or base.kv_format)
    missing = [m.name for m in spec.modules if m.kind != "other" and not m.tied_to and m.name not in sensitivity.costs]
    if missing:
        raise PlanError(f"expected the sensitivity of {spec.name}, found one that lacks {missing[0]}; estimate it anew")
    formats = tuple(fmt.name for fmt in formats_to_choose_among(formats or ()))
    options = {}
    for module in spec.modules:
        if module.name not in sensitivity.costs:
            continue
        costs = {base.dtype: 0.0} | sensitivity.costs[module.name]
        allowed = [name for name in costs if _allowed(name, module, spec, formats, stock)]
        if not allowed:
            raise PlanError(f"{module.name}: none of the formats {', '.join(formats or costs)} can hold it")
        options[module.name] = [Option(name, _bytes(module, name, base), costs[name]) for name in allowed]
    return Choices(spec, base, options, sensitivity.lookup)


def _allowed(name: str, module: ModuleSpec, spec: ModelSpec, formats: tuple[str, ...] | None, stock: bool) -> bool:
    fmt = get_format(name)
    if fmt.refuse(module.kind, module.weight_shape):
        return False
    table = module.name == spec.embedding
    if stock and table and fmt.kind not in ("float", "int8"):
        return False
    # an embedding and a shape no given format can hold may always be in int8, as in a uniform plan
    return not formats or name in formats or (name == "int8" and (table or not _holds(module, formats)))


def _holds(module: ModuleSpec, formats: tuple[str, ...]) -> bool:
    return any(get_format(name).refuse(module.kind, module.weight_shape) is None for name in formats)


def _bytes(module: ModuleSpec, fmt: str, base: Plan) -> int:
    return get_format(fmt).weight_bytes(module.weight_shape, DTYPES[base.dtype])


def _off_the_card(options: list[Option]) -> Option:
    """What is not counted, since it is not on the GPU, is in int8 where it can be: next to no cost, half the RAM."""
    for option in options:
        if option.format == "int8":
            return option
    return min(options, key=lambda option: option.cost)


def _with_format(plan: Plan, name: str, fmt: str) -> Plan:
    modules = dict(plan.modules)
    for module in plan.spec.modules:
        if name in (module.name, module.tied_to):
            modules[module.name] = replace(modules[module.name], format=fmt)
    return replace(plan, modules=modules)
