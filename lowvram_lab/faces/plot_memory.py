"""Pictures of specs, forecasts, runs and chats. Each takes ``ax=None`` and returns the Axes; none opens a window.

matplotlib is imported only here, in the other ``plot_`` files and in panel.py, and pyplot nowhere.

Derived in: notebooks/01_analyze_the_oom.ipynb, notebooks/02_watch_memory.ipynb, notebooks/09_validated_chat.ipynb
"""

from collections import Counter
from collections.abc import Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lowvram_lab.errors import LowvramError
from lowvram_lab.memory.allocator import LARGE_SEGMENT
from lowvram_lab.memory.budget import GpuBudget
from lowvram_lab.memory.recording import OomEvent
from lowvram_lab.memory.timeline import CATEGORIES, Timeline
from lowvram_lab.model.spec import ModelSpec
from lowvram_lab.planner.profile import MemoryProfile
from lowvram_lab.units import GiB, MiB, format_bytes

COLOURS = {
    "context": "#9e9e9e",
    "weights": "#4c72b0",
    "kv": "#dd8452",
    "activations": "#55a868",
    "workspace": "#8172b3",
}
"""One colour a category in every picture of the library."""

UNUSED = "reserved, unused"
LABELS = {**{key: key for key in COLOURS}, "context": "CUDA context", "kv": "KV cache", "fragmentation": UNUSED}
BUDGET_COLOUR = "#c44e52"
MEASURED_COLOUR = "#b8c9e1"
UNUSED_STYLE = {"facecolor": "white", "edgecolor": "#9e9e9e", "hatch": "////", "linewidth": 0.5}
STYLES = {**{category: {"color": colour} for category, colour in COLOURS.items()}, "fragmentation": UNUSED_STYLE}

POINTS = 240
"""Stretches a phase of a long timeline is cut into; of each its highest and lowest moments are drawn."""


def plot_profiles(
    profiles: Sequence[MemoryProfile], labels: Sequence[str] | None = None, ax: Axes | None = None
) -> Axes:
    """Stacked bars: the breakdown of each profile when its allocator held most, against the card.

    The figure above a bar is CUDA context + reserved: what the card must have. Of a forecast that does not fit it is
    what it would be without a limit.

    Args:
        profiles: Forecast or measured, on one budget.
        labels: A name a bar; by default model and origin.
        ax: Where to draw; a new figure by default.
    """
    ax = ax or new_axes(width=2.6 + 1.2 * len(profiles))
    names = labels or [f"{p.model}\n{p.origin}" for p in profiles]
    unit, tops = _draw_stacks(ax, names, [p.breakdown for p in profiles], profiles[0].budget)
    for position, (profile, top) in enumerate(zip(profiles, tops, strict=True)):
        verdict = "" if profile.fits else "\nwithout a limit:\ndoes not fit"
        colour = "black" if profile.fits else BUDGET_COLOUR
        label_point(ax, f"{in_unit(top, unit)}{verdict}", (position, top / unit), colour)
    ax.set_ylabel(f"GPU memory at the peak, {unit_name(unit)}")
    ax.margins(y=0.24)
    return legend(ax)


def plot_phases(profile: MemoryProfile, ax: Axes | None = None) -> Axes:
    """Stacked bars: each phase of one profile when its allocator held most, by category, against the card.

    Args:
        profile: Forecast or measured.
        ax: Where to draw; a new figure by default.
    """
    ax = ax or new_axes(width=2.6 + 1.2 * len(profile.phases))
    stacks = [{**phase.reserved_breakdown, "context": profile.overhead_bytes} for phase in profile.phases]
    unit, tops = _draw_stacks(ax, [phase.name for phase in profile.phases], stacks, profile.budget)
    for position, top in enumerate(tops):
        label_point(ax, in_unit(top, unit), (position, top / unit))
    ax.set_ylabel(f"peak GPU memory, {unit_name(unit)}")
    ax.set_title(_title(profile), fontsize="medium")
    ax.margins(y=0.12)
    return legend(ax)


def plot_breakdown(profile: MemoryProfile, ax: Axes | None = None) -> Axes:
    """A waterfall: what the card must have, part by part, up to CUDA context + reserved peak.

    Args:
        profile: Forecast or measured.
        ax: Where to draw; a new figure by default.
    """
    parts = {category: profile.breakdown[category] for category in STYLES if profile.breakdown[category]}
    whole, left = sum(parts.values()), 0
    unit = unit_of(whole)
    ax = ax or new_axes(width=6.5, height=0.36 * len(parts) + 1.2)
    _draw_card(ax, profile.budget, unit, upright=True)
    for category, size in parts.items():
        ax.barh(LABELS[category], size / unit, left=left / unit, height=0.7, **STYLES[category])
        left += size
        text = f"{format_bytes(size)} ({size / whole:.0%})"
        label_point(ax, text, (left / unit, LABELS[category]), xytext=(4, 0), ha="left", va="center")
    ax.invert_yaxis()
    ax.set_xlim(0, 1.4 * whole / unit)
    ax.set_xlabel(f"GPU memory at the peak, {unit_name(unit)}: {in_unit(whole, unit)} in all")
    ax.set_title(_title(profile), fontsize="medium")
    return legend(ax) if profile.budget else ax


def plot_timeline(source: MemoryProfile | Timeline, budget: GpuBudget | None = None, ax: Axes | None = None) -> Axes:
    """Stacked areas: bytes live on the GPU after every allocation and release, by category, below what is reserved.

    Args:
        source: A profile with a timeline, or a timeline. The first allocation of a forecast that fails is marked.
            One that began on a card in use is drawn without the reserve and without the card.
        budget: The card; what it leaves for tensors is drawn. By default the profile's own.
        ax: Where to draw; a new figure by default.

    Raises:
        LowvramError: No timeline was kept, or nothing was allocated on the GPU.
    """
    profile = source if isinstance(source, MemoryProfile) else None
    timeline = profile.timeline if profile else source
    table = timeline.table() if timeline is not None else ()
    if not len(table):
        raise LowvramError("expected a timeline with GPU memory in it; forecast with timeline=True, or watch a run")
    from_empty = table["reserved"][0] - table["allocated"][0] <= LARGE_SEGMENT  # else it tells only what came on top
    budget = (budget or (profile.budget if profile else None)) if from_empty else None
    reserved = table["reserved"] * from_empty
    unit = unit_of(max(table["allocated"].max(), reserved.max(), budget.usable_bytes if budget else 0))
    failed = _failure(table, profile.first_oom) if profile and profile.first_oom else []
    ax = ax or new_axes(width=8.5, height=4)
    at, rows = _draw_phases(ax, table, keep=failed)
    shown = [category for category in CATEGORIES if table[category].any()]
    areas = [table[category][rows] / unit for category in shown]
    names, colours = [LABELS[category] for category in shown], [COLOURS[category] for category in shown]
    ax.stackplot(at[rows], *areas, labels=names, colors=colours, step="post", linewidth=0)
    if reserved.any():
        ax.step(at[rows], reserved[rows] / unit, where="post", color="#303030", label="reserved", linewidth=1)
    _draw_tensor_room(ax, budget, unit)
    ax.set_title(_title(profile) if profile else "", fontsize="medium")
    for row in failed:
        ax.axvspan(at[row], at.max(), color="white", alpha=0.5, linewidth=0, zorder=2.2)
        _mark_failure(ax, profile.first_oom, (at[row], reserved[row] / unit), late=at[row] > at.max() / 3)
    above = "without CUDA context" if from_empty else "above what was live before"
    ax.set(ylabel=f"GPU memory {above}, {unit_name(unit)}", ylim=(0, None))
    ax.margins(y=0.12)
    return legend(ax)


def plot_comparison(forecast: MemoryProfile, measured: MemoryProfile, ax: Axes | None = None) -> Axes:
    """Forecast over measured, phase by phase: two curves where both kept a timeline of it all, else two bars a phase.

    The figures above are the allocated peak measured and how far the forecast is from it.

    Args:
        forecast: A profile.
        measured: Another of the same workload.
        ax: Where to draw; a new figure by default.
    """
    compared = forecast.compare(measured)
    names, unit = list(compared["phase"]), unit_of(max(compared[[forecast.origin, measured.origin]].max()))
    ax = ax or new_axes(width=2.6 + 1.5 * len(compared), height=4)
    tables = [profile.timeline.table() if profile.timeline else None for profile in (measured, forecast)]
    if all(table is not None and list(table["phase"].unique()) == names for table in tables):
        (at, measured_bytes), (forecast_at, forecast_bytes) = (_curve(ax, table) for table in tables)
        ax.fill_between(at, measured_bytes / unit, step="post", color=MEASURED_COLOUR, label=measured.origin)
        ax.step(forecast_at, forecast_bytes / unit, "k", where="post", label=forecast.origin, linewidth=0.7)
    else:
        middles = [position + 0.5 for position in range(len(names))]
        ax.bar(middles, compared[measured.origin] / unit, width=0.6, color=MEASURED_COLOUR, label=measured.origin)
        ax.bar(middles, compared[forecast.origin] / unit, width=0.75, fill=False, label=forecast.origin)
        ax.set_xticks(middles, names)
    for position, row in compared.iterrows():
        peak = row[measured.origin]
        text = f"{in_unit(peak, unit)} {unit_name(unit)}\noff by {row['difference']:,} bytes"
        label_point(ax, text, (position + 0.5, peak / unit))
    _draw_tensor_room(ax, measured.budget, unit)
    ax.set_ylabel(f"allocated, without CUDA context, {unit_name(unit)}")
    ax.set_title(_title(measured), fontsize="medium")
    ax.set_ylim(bottom=0)
    ax.margins(y=0.2)
    return legend(ax)


def plot_weight_bytes(spec: ModelSpec, ax: Axes | None = None) -> Axes:
    """Horizontal bars: 16-bit bytes by kind of module, all layers added up.

    Args:
        spec: The model.
        ax: Where to draw; a new figure by default.
    """
    totals: Counter = Counter()
    for row in spec.table().itertuples():
        totals[row.module.rpartition(".")[2]] += row.fp16_bytes
    kinds = [kind for kind, size in totals.most_common() if size > max(totals.values()) / 1000][::-1]
    ax = ax or new_axes(width=6.5, height=0.3 * len(kinds) + 1)
    unit, whole = unit_of(sum(totals.values())), sum(totals.values())
    ax.barh(kinds, [totals[kind] / unit for kind in kinds], color=COLOURS["weights"])
    for position, kind in enumerate(kinds):
        text = f" {in_unit(totals[kind], unit)} ({totals[kind] / whole:.0%})"
        ax.annotate(text, (totals[kind] / unit, position), va="center")
    ax.set_xlabel(f"weights in 16 bits, {unit_name(unit)} (all layers)")
    ax.margins(x=0.2)
    return ax


def plot_kv(specs: Sequence[ModelSpec], context: int, budget: GpuBudget | None = None, ax: Axes | None = None) -> Axes:
    """Lines: the 16-bit KV cache of each model over the tokens it has cached, against the card.

    Args:
        specs: The models.
        context: Longest context to draw, in tokens.
        budget: The card, drawn if given.
        ax: Where to draw; a new figure by default.
    """
    ax = ax or new_axes(width=6.5)
    unit = unit_of(max([spec.kv_bytes(context) for spec in specs] + [budget.total_bytes if budget else 0]))
    for spec, style in zip(specs, ["-", "--", "-.", ":"] * len(specs), strict=False):
        label = f"{spec.name}: {spec.kv_bytes(1) / 1024:g} KiB a token"
        ax.plot([0, context], [0, spec.kv_bytes(context) / unit], style, label=label, linewidth=2)
    _draw_card(ax, budget, unit)
    ax.set(xlabel="tokens in the cache", ylabel=f"KV cache in 16 bits, {unit_name(unit)}")
    ax.set(xlim=(0, context), ylim=(0, None))
    return legend(ax)


def new_axes(width: float = 6.4, height: float = 3.6) -> Axes:
    """Axes of a new figure, with room for a legend beside them; inches."""
    return Figure(figsize=(width + 1.5, height), dpi=80, layout="constrained").add_subplot()


def _title(profile: MemoryProfile) -> str:
    where = f" on {profile.gpu}" if profile.origin == "measured" else "" if profile.fits else ", without a limit"
    return f"{profile.model}, {profile.origin}{where}"


def memory_parts(stacks: Sequence[dict], unit: int) -> dict[str, tuple[list[float], dict]]:
    """What ``stack_bars`` draws of some breakdowns, a bar each: the categories that there are, in a unit."""
    sizes = {category: [stack.get(category, 0) / unit for stack in stacks] for category in STYLES}
    return {LABELS[name]: (size, STYLES[name]) for name, size in sizes.items() if any(size)}


def stack_bars(
    ax: Axes, names: Sequence, parts: dict[str, tuple[list[float], dict]], *, sideways: bool = False
) -> list[float]:
    """Draws bars of several parts: label → its size in every bar, and its style. Returns where each bar ends."""
    ends = [0.0] * len(names)
    for label, (sizes, style) in parts.items():
        if sideways:
            ax.barh(names, sizes, left=ends, height=0.6, label=label, **style)
        else:
            ax.bar(names, sizes, bottom=ends, width=0.6, label=label, **style)
        ends = [end + size for end, size in zip(ends, sizes, strict=True)]
    return ends


def _draw_stacks(
    ax: Axes, names: Sequence[str], stacks: Sequence[dict], budget: GpuBudget | None
) -> tuple[int, list[int]]:
    """Draws a breakdown a bar, and the card; returns the unit and every bar's height in bytes."""
    tops = [sum(stack.values()) for stack in stacks]
    unit = unit_of(max(tops))
    stack_bars(ax, range(len(stacks)), memory_parts(stacks, unit))
    ax.set_xticks(range(len(names)), names)
    _draw_card(ax, budget, unit)
    return unit, tops


def _draw_phases(ax: Axes, table: pd.DataFrame, keep: Sequence[int] = ()):
    """Gives every phase a width of one, so that a short load can be read beside a long decode, and names it.

    Returns where each event of a timeline's table is drawn, and the rows to draw: all of a short timeline, of a long
    one every stretch's highest and lowest.
    """
    begins = table["phase"].ne(table["phase"].shift())
    phase = begins.cumsum() - 1
    at = phase + table.groupby(phase).cumcount() / (phase.map(phase.value_counts()) - 1).clip(lower=1)
    stretches = table.groupby((at * POINTS).astype(int))
    rows = {0, len(table) - 1, *keep, *stretches["reserved"].idxmax()}
    rows |= {*stretches["allocated"].idxmax(), *stretches["allocated"].idxmin()}
    names = [name or "run" for name in table["phase"][begins]]
    for position in range(1, len(names)):
        ax.axvline(position, color="#707070", linestyle=":", linewidth=1)
    ax.set_xticks([position + 0.5 for position in range(len(names))], names)
    ax.set_xlim(0, len(names))
    equally = "; each phase is drawn equally wide" if len(names) > 1 else ""
    ax.set_xlabel(f"allocations and releases in order{equally}")
    return at, sorted(rows)


def _curve(ax: Axes, table: pd.DataFrame):
    """Where and how much was allocated, thinned for drawing."""
    at, rows = _draw_phases(ax, table)
    return at[rows], table["allocated"][rows]


def _failure(table: pd.DataFrame, oom: OomEvent) -> list[int]:
    """The row of the allocation that failed, if it is there; its block may be larger than what was asked for."""
    asked = table["owner"].eq(oom.module) & table["phase"].eq(oom.phase) & table["size"].ge(oom.requested_bytes or 1)
    return list(table.index[asked & (table["allocated"] - table["size"]).eq(oom.allocated_bytes)][:1])


def _mark_failure(ax: Axes, oom: OomEvent, at: tuple[float, float], late: bool) -> None:
    ax.plot(*at, "X", color=BUDGET_COLOUR, markersize=9, zorder=5, label="out of memory\n(pale: had it gone on)")
    text = f"{oom.module.removeprefix('model.')}\nasks for {format_bytes(oom.requested_bytes)}"
    side = {"xytext": (-12, 6), "ha": "right"} if late else {"xytext": (12, -20), "ha": "left", "va": "top"}
    label_point(ax, text, at, BUDGET_COLOUR, **side)


def _draw_card(ax: Axes, budget: GpuBudget | None, unit: int, *, upright: bool = False) -> None:
    if budget:
        line, label = ax.axvline if upright else ax.axhline, f"the card, {format_bytes(budget.total_bytes)}"
        line(budget.total_bytes / unit, color=BUDGET_COLOUR, linestyle="--", label=label, zorder=3)


def _draw_tensor_room(ax: Axes, budget: GpuBudget | None, unit: int) -> None:
    """The card's line where the CUDA context is not drawn."""
    if budget:
        label = f"room for tensors,\n{format_bytes(budget.total_bytes)}"
        label += f" - {format_bytes(budget.context_bytes)} context" if budget.context_bytes else ""
        ax.axhline(budget.usable_bytes / unit, color=BUDGET_COLOUR, linestyle="--", label=label, zorder=3)


def label_point(ax: Axes, text: str, at: tuple, colour: str = "black", **where) -> None:
    """Text beside a point, by default just above it, readable where the card's line crosses it."""
    box = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
    style = {"xytext": (0, 2), "ha": "center", "va": "bottom", **where}
    ax.annotate(text, at, textcoords="offset points", color=colour, bbox=box, zorder=4, **style)


def legend(ax: Axes) -> Axes:
    """Puts the legend beside the axes."""
    ax.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return ax


def unit_of(largest: int) -> int:
    """The unit in which sizes up to this one are drawn."""
    return GiB if largest >= GiB else MiB


def unit_name(unit: int) -> str:
    """Its name."""
    return "GiB" if unit == GiB else "MiB"


def in_unit(size: int, unit: int) -> str:
    """A size in it, as text."""
    return f"{size / unit:.2f}" if unit == GiB else f"{size / unit:.0f}"
