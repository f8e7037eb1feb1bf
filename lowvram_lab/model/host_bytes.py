"""What loading a plan takes of the host's memory, from the plan alone."""

import math
from collections.abc import Iterable

from lowvram_lab.model.plan import Plan
from lowvram_lab.model.spec import ModuleSpec


def forecast_load_bytes(plan: Plan, *, gpu_in_ram: bool) -> int:
    """Forecasts how far resident memory rises while a plan loads, above what Python and torch already take.

    The weights that stay in RAM (what lies on disk does not), and beside them the largest tensor in flight: mapped from
    its file, plus the quantised copy on its way.

    Args:
        plan: The plan.
        gpu_in_ram: Whether "gpu" is the stand-in, whose tensors lie in RAM too.
    """
    return weights_in_ram(plan, gpu_in_ram) + in_flight_bytes(plan.spec.modules)


def in_flight_bytes(modules: Iterable[ModuleSpec]) -> int:
    """The largest tensor, twice: mapped from its file in 16 bits, and the copy on its way."""
    return 2 * max((2 * math.prod(shape) for module in modules for shape in module.parameters.values()), default=0)


def weights_in_ram(plan: Plan, gpu_in_ram: bool) -> int:
    """Bytes of weights that stay in RAM; what lies on disk does not."""
    return plan.weight_bytes("cpu") + (plan.weight_bytes("gpu") if gpu_in_ram else 0)
