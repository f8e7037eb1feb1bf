"""Plans for another machine without a GPU, from its profile: what of RAM a plan takes there, and which fits.

Everything computes on the CPU. What loading takes is arithmetic (``host_bytes``), what a run takes beside weights and
cache is replayed on tensors without data, as ``forecast`` does. Bytes are this library's; the RAM that they are held
against is a profile's, and so every verdict is *assumed*.
"""

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from lowvram_lab.engine.layers import TILE_BYTES
from lowvram_lab.errors import BudgetError, PlanError
from lowvram_lab.memory.dry_run import DryRunGpu
from lowvram_lab.model.formats import get_format
from lowvram_lab.model.host_bytes import in_flight_bytes
from lowvram_lab.model.plan import Plan
from lowvram_lab.model.spec import ModelSpec
from lowvram_lab.planner.auto import AS_FAST, PREFERENCES
from lowvram_lab.planner.forecast import forecast
from lowvram_lab.planner.moves import chunk_sizes, forecast_loss, kv_formats
from lowvram_lab.planner.profile import SpeedProfile, Workload
from lowvram_lab.planner.speed import forecast_speed
from lowvram_lab.planner.suited import RECIPES, not_above_held, quick_recipes
from lowvram_lab.rates.profile import ASSUMED
from lowvram_lab.rates.target import Target
from lowvram_lab.units import MiB, format_bytes, parse_bytes

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True)
class TargetMemory:
    """What of a target's RAM a plan takes.

    Attributes:
        model: Model name.
        target: The machine, in words.
        room_bytes: What of its RAM a model may have.
        weights_bytes: Weights in RAM.
        disk_weights_bytes: Weights that are mapped from disk.
        loading_bytes: The largest tensor on its way, twice (``host_bytes``); gone when the model is loaded.
        kv_bytes: Keys and values of the whole context.
        activation_bytes: Most that a run takes beside them.
        remembered_bytes: Prompts that are remembered in RAM.
        origin: ``"assumed"``.
    """

    model: str
    target: str
    room_bytes: int
    weights_bytes: int
    disk_weights_bytes: int
    loading_bytes: int
    kv_bytes: int
    activation_bytes: int
    remembered_bytes: int = 0
    origin: str = ASSUMED

    @property
    def load_bytes(self) -> int:
        """Most while the model is loaded."""
        return self.weights_bytes + self.loading_bytes

    @property
    def run_bytes(self) -> int:
        """Most while it runs."""
        return self.weights_bytes + self.kv_bytes + self.activation_bytes + self.remembered_bytes

    @property
    def peak_bytes(self) -> int:
        """The larger of both."""
        return max(self.load_bytes, self.run_bytes)

    @property
    def fits(self) -> bool:
        """Whether the peak is within the room."""
        return self.peak_bytes <= self.room_bytes

    def table(self) -> "pandas.DataFrame":
        """Loading and running, by what takes the RAM, in MiB. A DataFrame."""
        import pandas

        running = (self.kv_bytes + self.remembered_bytes, self.activation_bytes, self.run_bytes)
        rows = [
            ("load", self.weights_bytes, 0, self.loading_bytes, self.load_bytes),
            ("run", self.weights_bytes, *running),
        ]
        table = pandas.DataFrame(rows, columns=["phase", "weights", "kv", "beside them", "RAM"])
        return table.set_index("phase").div(MiB).round(1).reset_index().assign(origin=self.origin)

    def summary(self) -> str:
        """One line: fits or not, and by how much."""
        phase = "load" if self.load_bytes >= self.run_bytes else "run"
        spare = self.room_bytes - self.peak_bytes
        verdict = f"fits, {format_bytes(spare)} to spare" if self.fits else f"{format_bytes(-spare)} too much"
        return (
            f"{self.model}: peak {format_bytes(self.peak_bytes)} of RAM in {phase}, of {format_bytes(self.room_bytes)} "
            f"that a model may have: {verdict} ({self.origin}, {self.target})"
        )

    def to_dict(self) -> dict:
        """Plain data for ``--json``."""
        sizes = {name: getattr(self, name) for name in ("load_bytes", "run_bytes", "peak_bytes", "fits")}
        return {**asdict(self), **sizes}

    def _repr_html_(self) -> str:
        return f"<b>{self.origin}</b> {self.summary()}" + self.table().to_html(index=False)


@dataclass(frozen=True)
class TargetChoice:
    """A plan for a target, what it takes there, how fast it is, and why it was chosen. All assumed.

    Attributes:
        target: The machine's profile.
        plan: The plan.
        memory: Its RAM.
        speed: Its speed.
        why: Reasons.
    """

    target: Target
    plan: Plan
    memory: TargetMemory
    speed: SpeedProfile
    why: tuple[str, ...]

    def to_dict(self) -> dict:
        """Plain data for ``--json``."""
        return {
            "origin": ASSUMED,
            "target": self.target.to_dict(),
            "plan": self.plan.to_dict(),
            "memory": self.memory.to_dict(),
            "speed": self.speed.to_dict(),
            "why": list(self.why),
            "assumptions": self.target.machine.assumptions(self.plan),
        }

    def _repr_html_(self) -> str:
        parts = (self.plan, self.memory, self.speed)
        return "".join(each._repr_html_() + "<br>" for each in parts) + "<br>".join(self.why)


def to_cpu(plan: Plan, disk_layers: int = 0) -> Plan:
    """The plan with everything on the CPU, the first layers' weights on disk."""
    around = [module.name for module in plan.spec.modules if module.layer is None]
    return plan.with_gpu_layers(0, disk_layers).with_modules(*around, device="cpu")


def forecast_on(plan: Plan, target: Target, workload: Workload | None = None) -> TargetMemory:
    """Forecasts what of a target's RAM a plan takes. Nothing of this machine's RAM is asked.

    Args:
        plan: The plan, nothing of it on a GPU.
        target: The machine's profile.
        workload: What to run; by default the plan's whole context.

    Raises:
        PlanError: Something of the plan is on a GPU.
    """
    if any("gpu" in assignment.places for assignment in plan.modules.values()):
        raise PlanError(f"{target.title} has no GPU, found {plan.summary()}; make a plan with --target, or on the CPU")
    return replace(_least(plan, target), activation_bytes=_activation_bytes(plan, workload))


def plan_on(
    spec: ModelSpec,
    target: Target,
    context: int = 2048,
    *,
    disk: str | int | None = None,
    prefer: str = "balance",
    kv_format: str | None = None,
    **settings,
) -> TargetChoice:
    """Chooses a plan that fits a target's RAM.

    Args:
        spec: The model.
        target: The machine's profile.
        context: Tokens to plan for.
        disk: What of the weights may lie on disk where RAM is too small; by default nothing.
        prefer: ``"balance"`` and ``"fidelity"``: of the plans that fit, the one that loses least, formats and KV cache
            together; prompts in pieces come before any loss. Where some must lie on disk, ``"balance"`` takes the one
            that leaves least there. ``"speed"``: the fastest by the target's rates; a more precise one that is nearly
            as fast instead.
        kv_format: Keep to this.
        **settings: Other attributes of ``Plan``, such as ``threads``.

    Raises:
        BudgetError: No plan fits; the message says what is lacking.
        PlanError: A preference is unknown, or more threads are asked for than there are cores.
    """
    if prefer not in PREFERENCES:
        raise PlanError(f"expected prefer {', '.join(PREFERENCES)}, found {prefer!r}")
    disk_bytes = None if disk is None else parse_bytes(disk)
    recipes = ("stored",) if spec.stored else quick_recipes(RECIPES)
    recipes = not_above_held(spec, recipes, fidelity=prefer == "fidelity")
    settings["threads"] = threads_of(target, settings.get("threads"))
    bases = [
        replace(to_cpu(Plan.uniform(spec, recipe, context=context)), kv_format=kv, **settings)
        for recipe in recipes
        for kv in ((kv_format,) if kv_format else kv_formats(spec, "bf16"))
    ]
    bases.sort(key=forecast_loss)
    found, why = _fitting(bases, target, None, prefer), []
    if not found and disk_bytes is not None:
        found = _fitting(bases, target, disk_bytes, prefer)
        why = [f"with all weights in RAM nothing fits: {_least(bases[-1], target).summary()}"]
    if not found:
        raise _refusal(bases[-1], target, disk_bytes)
    return _chosen(found, bases, target, prefer, why)


def threads_of(target: Target, asked: int | None) -> int:
    """Threads of a plan for a target: those asked for, or one for each core.

    Raises:
        PlanError: There are not so many cores.
    """
    if asked is not None and asked > target.cores:
        raise PlanError(f"{target.title} computes on {target.cores} cores, found threads {asked}; ask for fewer")
    return asked or target.cores


def _least(plan: Plan, target: Target) -> TargetMemory:
    """What a plan takes without activations, which a replay finds."""
    return TargetMemory(
        model=plan.model,
        target=target.title,
        room_bytes=target.usable_bytes,
        weights_bytes=plan.weight_bytes("cpu"),
        disk_weights_bytes=plan.weight_bytes("disk"),
        loading_bytes=in_flight_bytes(plan.spec.modules),
        kv_bytes=plan.kv_bytes(plan.context, "cpu"),
        activation_bytes=0,
        remembered_bytes=plan.remembered_ram_bytes,
    )


def _activation_bytes(plan: Plan, workload: Workload | None) -> int:
    """Most that a run allocates beside weights and cache: counted on the stand-in, whose kernels are the CPU's.

    And a tile of a dequantised weight, which processors that multiply pairs in bfloat16 need not hold: this one may.
    """
    counted = plan.with_modules("*", device="gpu")
    profile = forecast(counted, DryRunGpu(None, "cpu"), workload=workload)
    held = profile.weights_bytes + counted.kv_bytes(plan.context, "gpu")
    most = max(phase.peak_allocated_bytes for phase in profile.phases if phase.name != "load")
    quantised = any(get_format(assignment.format).kind != "float" for assignment in plan.modules.values())
    return max(0, most - held) + (TILE_BYTES if quantised else 0)


def _fitting(bases: list[Plan], target: Target, disk_bytes: int | None, prefer: str) -> list[tuple[Plan, TargetMemory]]:
    """Plans that fit, in the order of their loss: the first, or where more are to be compared one of each recipe."""
    found, seen = [], set()
    for base in bases:
        formats = tuple(assignment.format for assignment in base.modules.values())
        if formats in seen:
            continue
        if placed := _placed(base, target, disk_bytes):
            found.append(placed)
            seen.add(formats)
            if prefer == "fidelity" or (prefer == "balance" and disk_bytes is None):
                break
    return found


def _placed(base: Plan, target: Target, disk_bytes: int | None) -> tuple[Plan, TargetMemory] | None:
    """A plan in the largest pieces of a prompt that fit, with as few layers on disk as they need."""
    pieces = (base.prefill_chunk,) if base.prefill_chunk else dict.fromkeys((None, chunk_sizes(base.context)[-1]))
    for chunk in pieces:
        plan = replace(base, prefill_chunk=chunk)
        beside = 0
        for layers in range(1 if disk_bytes is None else plan.spec.num_hidden_layers + 1):
            split = to_cpu(plan, layers)
            least = _least(split, target)
            if least.disk_weights_bytes > (disk_bytes or 0):
                break
            if not replace(least, activation_bytes=beside).fits:
                continue
            beside = beside or _activation_bytes(split, None)
            memory = replace(least, activation_bytes=beside)
            if memory.fits:
                return split, memory
    return None


def _chosen(
    found: list[tuple[Plan, TargetMemory]], bases: list[Plan], target: Target, prefer: str, why: list[str]
) -> TargetChoice:
    """The preferred one of some plans that fit, the most precise first."""
    speeds = [forecast_speed(plan, machine=target.machine) for plan, _ in found]
    chosen = 0
    if prefer == "speed":
        fastest = max(speed.decode_tokens_per_s for speed in speeds)
        chosen = next(i for i, speed in enumerate(speeds) if speed.decode_tokens_per_s >= AS_FAST * fastest)
        each = ", ".join(
            f"{plan.weight_formats} {speed.decode_tokens_per_s:.2f}"
            for (plan, _), speed in zip(found, speeds, strict=True)
        )
        why.append(f"assumed tokens/s: {each}")
    elif prefer == "balance":
        chosen = min(range(len(found)), key=lambda i: found[i][1].disk_weights_bytes)
    plan, memory = found[chosen]
    larger = [base for base in bases if forecast_loss(base) < forecast_loss(plan)]
    if larger and prefer != "speed" and not memory.disk_weights_bytes:
        why.append(f"more precise does not fit, such as {_words(larger[-1])}: {_least(larger[-1], target).summary()}")
    why.append(memory.summary())
    return TargetChoice(target, plan, memory, speeds[chosen], tuple(why))


def _words(plan: Plan) -> str:
    return f"{plan.weight_formats} with {plan.kv_format} keys and values"


def _refusal(plan: Plan, target: Target, disk_bytes: int | None) -> BudgetError:
    """The error that says what is lacking, of the plan that takes least."""
    memory = _least(plan, target)
    if memory.fits:  # it is the activations
        memory = forecast_on(replace(plan, prefill_chunk=chunk_sizes(plan.context)[-1]), target)
    lacking = format_bytes(memory.peak_bytes - memory.room_bytes)
    disk = "" if disk_bytes is None else f" and {format_bytes(disk_bytes)} of disk"
    helps = "more disk (--disk)" if disk_bytes is not None else "disk for layers (--disk)"
    helps += "" if memory.load_bytes >= memory.run_bytes else ", a shorter context"  # loading has no context yet
    return BudgetError(
        f"no plan for {plan.model} at context {plan.context} fits the {format_bytes(memory.room_bytes)} of RAM that a "
        f"model may have on the {target.title}{disk}: even {_words(plan)} takes {format_bytes(memory.peak_bytes)}, "
        f"loading included, {lacking} too much (assumed); give it {helps} or a smaller model"
    )
