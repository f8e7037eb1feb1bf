"""What a plan may take on both sides of the card, and the words for what is short when none fits."""

from dataclasses import dataclass

from lowvram_lab.errors import BudgetError
from lowvram_lab.memory.budget import GpuBudget
from lowvram_lab.model.host_bytes import forecast_load_bytes
from lowvram_lab.model.plan import Plan
from lowvram_lab.model.spec import ModelSpec
from lowvram_lab.planner.profile import MemoryProfile
from lowvram_lab.planner.search import least_bytes
from lowvram_lab.planner.suggest import SHORTEST_CONTEXT, suggest
from lowvram_lab.units import format_bytes


@dataclass(frozen=True)
class Room:
    """What a plan may take, on both sides."""

    spec: ModelSpec
    budget: GpuBudget
    ram_bytes: int | None
    disk_bytes: int | None
    kv_format: str | None

    def within_ram(self, plan: Plan) -> Plan | None:
        """The plan, or with the least of its CPU part on disk that makes the rest fit; ``None`` where nothing does."""
        if not self.lacks_ram(plan):
            return plan
        if self.disk_bytes is None:
            return None
        spec = self.spec
        layers = plan.layer_devices()
        bases = [plan]
        if not spec.tied and plan.modules[spec.embedding].device == "cpu":
            # a lookup reads next to nothing; but the table may be more than the disk has room for
            bases.insert(0, plan.with_modules(spec.embedding, device="disk"))
        on_gpu = layers.count("gpu")
        for base in bases:
            splits = (base.with_gpu_layers(on_gpu, disk=count) for count in range(len(layers) - on_gpu + 1))
            found = next((each for each in splits if not self.lacks_ram(each)), None)
            if found and found.weight_bytes("disk") <= self.disk_bytes:
                return found
        return None

    def lacks_ram(self, plan: Plan) -> bool:
        """Whether the CPU's part is more than the RAM."""
        return self.ram_bytes is not None and ram_bytes(plan) > self.ram_bytes


def ram_bytes(plan: Plan) -> int:
    """What a plan takes of the host's memory beside Python and torch: load, KV cache, remembered prompts."""
    return forecast_load_bytes(plan, gpu_in_ram=False) + plan.kv_bytes(plan.context, "cpu") + plan.remembered_ram_bytes


def margin(profile: MemoryProfile) -> str:
    """How much a forecast leaves, in words."""
    free = profile.budget.usable_bytes - profile.peak_reserved_bytes
    held = format_bytes(profile.peak_reserved_bytes)
    return f"peak {format_bytes(profile.peak_allocated_bytes)}, {held} reserved, {format_bytes(free)} to spare"


def shortage(plan: Plan, room: Room) -> str:
    """What a plan is short of, in words."""
    if room.lacks_ram(plan):
        disk = "" if room.disk_bytes is None else f" and {format_bytes(room.disk_bytes)} of disk"
        on_cpu = format_bytes(ram_bytes(plan))
        return f"the CPU's part takes {on_cpu} of RAM, found {format_bytes(room.ram_bytes)}{disk}"
    weights, least = plan.weight_bytes("gpu"), least_bytes(plan)
    beyond = least - room.budget.usable_bytes
    tail = f", {format_bytes(beyond)} too much" if beyond > 0 else " before activations and fragmentation"
    return f"{format_bytes(weights)} of weights + {format_bytes(least - weights)} of {plan.kv_format} KV{tail}"


def refusal(plan: Plan, room: Room) -> BudgetError:
    """The error that says why no plan fits and what would help."""
    spec, budget = room.spec, room.budget
    needed = least_bytes(plan) + budget.context_bytes
    message = (
        f"no plan for {spec.name} at context {plan.context} fits a {format_bytes(budget.total_bytes)} GPU: even "
        f"{plan.summary()}, needs more than {format_bytes(needed)}"
    )
    if room.lacks_ram(plan):
        return BudgetError(
            f"no plan for {spec.name} at context {plan.context} fits a {format_bytes(budget.total_bytes)} GPU and "
            f"{format_bytes(room.ram_bytes)} of RAM: {_ram_refusal(plan, room)}, a larger GPU or a smaller model"
        )
    helps = suggest(plan, budget)
    beyond = f"not even a context of {SHORTEST_CONTEXT} helps: give it a larger GPU or a smaller model"
    return BudgetError(f"{message}; {'what would help: ' + helps[0].text if helps else beyond}")


def _ram_refusal(plan: Plan, room: Room) -> str:
    taken = format_bytes(ram_bytes(plan))
    if room.disk_bytes is None:
        return f"the CPU's part alone takes {taken}, loading included; give it disk for layers or more RAM"
    in_ram = [name for name, assignment in plan.modules.items() if assignment.device == "cpu"]
    plan = plan.with_modules(*in_ram, device="disk")
    if room.lacks_ram(plan):
        rest = format_bytes(ram_bytes(plan))
        return f"even with the CPU's weights on disk it takes {rest}; give it a shorter context, more RAM"
    on_disk = format_bytes(plan.weight_bytes("disk"))
    return f"the CPU's part takes {taken}, {on_disk} of it weights that may lie on disk; give it more disk or RAM"
