"""Bit allocation: a format for every module, so that the summed cost is least within a number of bytes.

Each module offers formats, each with bytes and a cost. Only those on the lower convex hull of (bytes, cost) can be best
for any price of a byte; walking the hulls' edges from the steepest down gives the optimum at every budget where an edge
ends (Shoham and Gersho 1988, doi:10.1109/29.90373), and at most one edge short of it in between. One edge is little
where modules are many and small; the few that are large (an embedding table may be most of a small model) are tried in
every option they have.

Derived in: notebooks/04_compress.ipynb
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

LARGE = 2
"""So many of the largest modules, embedding and head as a rule, are tried in every option."""

SPENT = 8
"""Of the combinations tried, so many of the best are completed with options off the hull."""


@dataclass(frozen=True)
class Option:
    """One format a module may have."""

    format: str
    bytes: int
    cost: float


def lower_hull(options: Sequence[Option]) -> list[Option]:
    """The options on the lower convex hull, from the smallest up; each costs less than the one before it."""
    hull: list[Option] = []
    for option in _sensible(options):
        while len(hull) > 1 and _gain(hull[-2], hull[-1]) <= _gain(hull[-1], option):
            hull.pop()
        hull.append(option)
    return hull


def allocate(modules: Mapping[str, Sequence[Option]], budget_bytes: int) -> dict[str, Option] | None:
    """Chooses one of its options for every module; ``None`` where even the smallest exceed the budget together."""
    if budget_bytes < sum(min(option.bytes for option in options) for options in modules.values()):
        return None
    sizes = {name: max(option.bytes for option in options) for name, options in modules.items()}
    large = sorted(modules, key=lambda name: (-sizes[name], name))[:LARGE]
    hulls = {name: lower_hull(options) for name, options in modules.items() if name not in large}
    edges = [
        (_gain(hull[index], hull[index + 1]), name, index)
        for name, hull in hulls.items()
        for index in range(len(hull) - 1)
    ]
    edges.sort(key=lambda edge: (-edge[0], edge[1], edge[2]))
    found = []
    for picked in itertools.product(*(_sensible(modules[name]) for name in large)):
        left = budget_bytes - sum(option.bytes for option in picked)
        if (rest := _walk(hulls, edges, left)) is not None:
            chosen = dict(zip(large, picked, strict=True)) | rest
            found.append((sum(option.cost for option in chosen.values()), len(found), chosen))
    completed = []
    for _, number, chosen in sorted(found, key=lambda entry: entry[:2])[:SPENT]:
        chosen = _spend(modules, chosen, budget_bytes - sum(option.bytes for option in chosen.values()))
        completed.append((sum(option.cost for option in chosen.values()), number, chosen))
    best = min(completed, key=lambda entry: entry[:2])[2]
    return {name: best[name] for name in modules}


def _sensible(options: Sequence[Option]) -> list[Option]:
    """Options that cost less than every smaller one."""
    kept: list[Option] = []
    for option in sorted(options, key=lambda o: (o.bytes, o.cost, o.format)):
        if not kept or option.cost < kept[-1].cost:
            kept.append(option)
    return kept


def _walk(hulls: dict[str, list[Option]], edges: list[tuple[float, str, int]], left: int) -> dict[str, Option] | None:
    """The hulls' edges from the steepest down, as far as the bytes reach; ``None`` where they do not."""
    chosen = {name: 0 for name in hulls}
    left -= sum(hull[0].bytes for hull in hulls.values())
    if left < 0:
        return None
    for _, name, index in edges:
        step = hulls[name][index + 1].bytes - hulls[name][index].bytes
        if chosen[name] == index and step <= left:  # a module whose edge did not fit stays where it is
            chosen[name], left = index + 1, left - step
    return {name: hulls[name][index] for name, index in chosen.items()}


def _spend(modules: Mapping[str, Sequence[Option]], result: dict[str, Option], left: int) -> dict[str, Option]:
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
