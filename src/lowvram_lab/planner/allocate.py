"""Bit allocation: a format for every module, so that the summed cost is least within a number of bytes.

Each module offers formats, each with bytes and a cost. Only those on the lower convex hull of (bytes, cost) can be best
for any price of a byte; walking the hulls' edges from the steepest down gives the optimum at every budget where an edge
ends (Shoham and Gersho 1988, doi:10.1109/29.90373), and at most one edge short of it in between.

Derived in: notebooks/04_compress.ipynb
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Option:
    """One format a module may have."""

    format: str
    bytes: int
    cost: float


def lower_hull(options: Sequence[Option]) -> list[Option]:
    """The options on the lower convex hull, from the smallest up; each costs less than the one before it."""
    hull: list[Option] = []
    for option in sorted(options, key=lambda o: (o.bytes, o.cost, o.format)):
        if hull and option.cost >= hull[-1].cost:
            continue
        while len(hull) > 1 and _gain(hull[-2], hull[-1]) <= _gain(hull[-1], option):
            hull.pop()
        hull.append(option)
    return hull


def allocate(modules: Mapping[str, Sequence[Option]], budget_bytes: int) -> dict[str, Option] | None:
    """Chooses an option for every module.

    Args:
        modules: Module name → its options, at least one.
        budget_bytes: What the chosen options may take together.

    Returns:
        Module name → option, or ``None`` where even the smallest options exceed the budget.
    """
    hulls = {name: lower_hull(options) for name, options in modules.items()}
    chosen = {name: 0 for name in hulls}
    left = budget_bytes - sum(hull[0].bytes for hull in hulls.values())
    if left < 0:
        return None
    edges = [
        (_gain(hull[index], hull[index + 1]), name, index)
        for name, hull in hulls.items()
        for index in range(len(hull) - 1)
    ]
    for _, name, index in sorted(edges, key=lambda edge: (-edge[0], edge[1], edge[2])):
        step = hulls[name][index + 1].bytes - hulls[name][index].bytes
        if chosen[name] == index and step <= left:  # a module whose edge did not fit stays where it is
            chosen[name], left = index + 1, left - step
    result = {name: hulls[name][index] for name, index in chosen.items()}
    return _spend(modules, result, left)


def _spend(modules, result: dict[str, Option], left: int) -> dict[str, Option]:
    """Spends what is left between two points of the hull: on options off it, the best gain a byte first."""
    while True:
        better = [
            (_gain(result[name], option), name, option)
            for name, options in modules.items()
            for option in options
            if option.cost < result[name].cost and option.bytes - result[name].bytes <= left
        ]
        if not better:
            return result
        _, name, option = max(better, key=lambda entry: (entry[0], entry[1], -entry[2].bytes))
        left -= option.bytes - result[name].bytes
        result[name] = option


def _gain(smaller: Option, larger: Option) -> float:
    """Cost saved for every byte more; infinite where it is saved for nothing."""
    more = larger.bytes - smaller.bytes
    return (smaller.cost - larger.cost) / more if more > 0 else float("inf")
