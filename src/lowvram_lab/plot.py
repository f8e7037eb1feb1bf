"""Pictures of plans, forecasts and models. Each takes ``ax=None`` and returns the Axes. matplotlib is imported only here.

Derived in: notebooks/01_analyze_the_oom.ipynb
"""

from collections import Counter
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lowvram_lab.profile import MemoryProfile
from lowvram_lab.spec import ModelSpec
from lowvram_lab.units import GiB, MiB

COLOURS = {"context": "#9e9e9e", "weights": "#4c72b0", "kv": "#dd8452", "activations": "#55a868"}
"""One colour a category in every picture of the library; distinguishable to colour-blind readers by lightness too."""

BUDGET_COLOUR = "#c44e52"


def plot_profiles(
    profiles: Sequence[MemoryProfile], labels: Sequence[str] | None = None, ax: Axes | None = None
) -> Axes:
    """Stacked bars: what each profile holds at its peak, against the card.

    Args:
        profiles: Forecast or measured, on one budget.
        labels: A name a bar; by default model and origin.
        ax: Where to draw; a new figure by default.
    """
    ax = ax or _new_axes(width=1.5 + 1.4 * len(profiles))
    labels = labels or [f"{p.model}\n{p.origin}" for p in profiles]
    unit, name = _unit(max(p.peak_allocated_bytes + p.overhead_bytes for p in profiles))
    bottoms = [0.0] * len(profiles)
    for category, colour in COLOURS.items():
        sizes = [p.overhead_bytes if category == "context" else p.peak.breakdown.get(category, 0) for p in profiles]
        if any(sizes):
            heights = [size / unit for size in sizes]
            ax.bar(range(len(profiles)), heights, bottom=bottoms, color=colour, label=category, width=0.6)
            bottoms = [low + height for low, height in zip(bottoms, heights, strict=True)]
    for position, (profile, top) in enumerate(zip(profiles, bottoms, strict=True)):
        ax.annotate(f"{top:.2f}" if unit == GiB else f"{top:.0f}", (position, top), ha="center", va="bottom")
        if not profile.fits:
            ax.annotate("does not fit", (position, top / 2), ha="center", color="white", weight="bold", rotation=90)
    _budget_line(ax, profiles[0], unit)
    ax.set_xticks(range(len(profiles)), labels)
    ax.set_ylabel(f"GPU memory at the peak, {name}")
    ax.margins(y=0.12)
    ax.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return ax


def plot_phases(profile: MemoryProfile, ax: Axes | None = None) -> Axes:
    """Stacked bars: the peak of each phase of one profile, by category, against the card.

    Args:
        profile: Forecast or measured.
        ax: Where to draw; a new figure by default.
    """
    ax = ax or _new_axes(width=5)
    unit, name = _unit(profile.peak_allocated_bytes + profile.overhead_bytes)
    names = [phase.name for phase in profile.phases]
    bottoms = [0.0] * len(names)
    for category, colour in COLOURS.items():
        sizes = [
            profile.overhead_bytes if category == "context" else phase.breakdown.get(category, 0)
            for phase in profile.phases
        ]
        if any(sizes):
            heights = [size / unit for size in sizes]
            ax.bar(names, heights, bottom=bottoms, color=colour, label=category, width=0.6)
            bottoms = [low + height for low, height in zip(bottoms, heights, strict=True)]
    _budget_line(ax, profile, unit)
    ax.set_ylabel(f"peak GPU memory, {name}")
    ax.set_title(f"{profile.model}, {profile.origin}")
    ax.margins(y=0.12)
    ax.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return ax


def plot_weights(spec: ModelSpec, ax: Axes | None = None) -> Axes:
    """Horizontal bars: 16-bit bytes by kind of module, all layers added up.

    Args:
        spec: The model.
        ax: Where to draw; a new figure by default.
    """
    totals: Counter = Counter()
    for row in spec.table().itertuples():
        totals[row.module.rpartition(".")[2]] += row.fp16_bytes
    kinds = [kind for kind, size in totals.most_common() if size > max(totals.values()) / 1000][::-1]
    ax = ax or _new_axes(width=6.5, height=0.3 * len(kinds) + 1)
    unit, name = _unit(sum(totals.values()))
    ax.barh(kinds, [totals[kind] / unit for kind in kinds], color=COLOURS["weights"])
    for position, kind in enumerate(kinds):
        ax.annotate(f" {totals[kind] / sum(totals.values()):.0%}", (totals[kind] / unit, position), va="center")
    ax.set_xlabel(f"weights in 16 bits, {name} (all layers)")
    ax.margins(x=0.12)
    return ax


def _new_axes(width: float = 6.4, height: float = 3.6) -> Axes:
    return Figure(figsize=(width + 1.5, height), layout="constrained").add_subplot()


def _unit(largest: int) -> tuple[int, str]:
    return (GiB, "GiB") if largest >= GiB else (MiB, "MiB")


def _budget_line(ax: Axes, profile: MemoryProfile, unit: int) -> None:
    if profile.budget:
        ax.axhline(profile.budget.total_bytes / unit, color=BUDGET_COLOUR, linestyle="--", label="the card")
