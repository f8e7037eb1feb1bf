"""What each plane of a plan's weights takes, and where."""

from lowvram_lab.model.formats import get_format
from lowvram_lab.model.plan import Plan
from lowvram_lab.model.rules import DEVICES

PARTS = ("high planes", "low planes", "other weights", "KV cache")


def plane_bytes(plan: Plan) -> dict[str, dict[str, int]]:
    """Bytes of a plan by device and by ``PARTS``, on the devices that hold any; the KV cache is a full context's."""
    found = {device: dict.fromkeys(PARTS, 0) for device in DEVICES}
    for module in plan.spec.modules:
        assignment = plan.modules[module.name]
        in_two = assignment.low and "weight" in module.own
        sizes = get_format(assignment.format).bytes_by_plane(module.weight_shape) if in_two else []
        for device, part, size in zip(assignment.places, PARTS, sizes, strict=False):
            found[device][part] += size
            found[device]["other weights"] -= size  # of what is added below
        for device in DEVICES:
            found[device]["other weights"] += plan.module_bytes(module, device)
    for device in ("gpu", "cpu"):
        found[device]["KV cache"] = plan.kv_bytes(plan.context, device)
    return {device: parts for device, parts in found.items() if any(parts.values())}
