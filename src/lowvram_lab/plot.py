"""Pictures of specs, forecasts, runs and chats. Each takes ``ax=None`` and returns the Axes; none opens a window.

matplotlib is imported only here, and pyplot nowhere.

Derived in: notebooks/01_analyze_the_oom.ipynb, notebooks/09_validated_chat.ipynb
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lowvram_lab.chat import TurnStats
from lowvram_lab.evaluate import Fidelity
from lowvram_lab.memory.device import GpuBudget
from lowvram_lab.memory.meter import OomEvent
from lowvram_lab.profile import MemoryProfile
from lowvram_lab.report import Limits
from lowvram_lab.spec import ModelSpec
from lowvram_lab.units import GiB, MiB, format_bytes

COLOURS = {
    "context": "#9e9e9e",
    "weights": "#4c72b0",
    "kv": "#dd8452",
    "activations": "#55a868",
    "workspace": "#8172b3",
}
"""One colour a category in every picture of the library."""

LABELS = {**{category: category for category in COLOURS}, "context": "CUDA context", "kv": "KV cache"}
BUDGET_COLOUR = "#c44e52"
UNUSED = "reserved, unused"
UNUSED_STYLE = {"facecolor": "white", "edgecolor": "#9e9e9e", "hatch": "////", "linewidth": 0.5}


def plot_profiles(
    profiles: Sequence[MemoryProfile], labels: Sequence[str] | None = None, ax: Axes | None = None
) -> Axes:
    """Stacked bars: what each profile holds at its peak, and what the allocator reserved beyond it, against the card.

    The figure above a bar is CUDA context + reserved: what the card must have.

    Args:
        profiles: Forecast or measured, on one budget.
        labels: A name a bar; by default model and origin.
        ax: Where to draw; a new figure by default.
    """
    ax = ax or _new_axes(width=2.6 + 1.2 * len(profiles))
    stacks = [(p.overhead_bytes, p.peak.breakdown, p.peak_reserved_bytes) for p in profiles]
    unit, tops = _draw_stacks(ax, labels or [f"{p.model}\n{p.origin}" for p in profiles], stacks)
    for position, (profile, top) in enumerate(zip(profiles, tops, strict=True)):
        verdict = "" if profile.fits else "\ndoes not fit"
        colour = "black" if profile.fits else BUDGET_COLOUR
        _label(ax, f"{_number(top, unit)}{verdict}", (position, top / unit), colour)
    _draw_card(ax, profiles[0].budget, unit)
    ax.set_ylabel(f"GPU memory at the peak, {_name(unit)}")
    ax.margins(y=0.18)
    return _legend(ax)


def plot_phases(profile: MemoryProfile, ax: Axes | None = None) -> Axes:
    """Stacked bars: the peak of each phase of one profile, by category, against the card.

    Args:
        profile: Forecast or measured.
        ax: Where to draw; a new figure by default.
    """
    ax = ax or _new_axes(width=2.6 + 1.2 * len(profile.phases))
    stacks = [(profile.overhead_bytes, phase.breakdown, phase.peak_reserved_bytes) for phase in profile.phases]
    unit, tops = _draw_stacks(ax, [phase.name for phase in profile.phases], stacks)
    for position, top in enumerate(tops):
        _label(ax, _number(top, unit), (position, top / unit))
    _draw_card(ax, profile.budget, unit)
    ax.set_ylabel(f"peak GPU memory, {_name(unit)}")
    ax.set_title(f"{profile.model}, {profile.origin}", fontsize="medium")
    ax.margins(y=0.12)
    return _legend(ax)


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
    unit, whole = _unit(sum(totals.values())), sum(totals.values())
    ax.barh(kinds, [totals[kind] / unit for kind in kinds], color=COLOURS["weights"])
    for position, kind in enumerate(kinds):
        text = f" {_number(totals[kind], unit)} ({totals[kind] / whole:.0%})"
        ax.annotate(text, (totals[kind] / unit, position), va="center")
    ax.set_xlabel(f"weights in 16 bits, {_name(unit)} (all layers)")
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
    ax = ax or _new_axes(width=6.5)
    unit = _unit(max([spec.kv_bytes(context) for spec in specs] + [budget.total_bytes if budget else 0]))
    for spec, style in zip(specs, ["-", "--", "-.", ":"] * len(specs), strict=False):
        label = f"{spec.name}: {spec.kv_bytes(1) / 1024:g} KiB a token"
        ax.plot([0, context], [0, spec.kv_bytes(context) / unit], style, label=label, linewidth=2)
    _draw_card(ax, budget, unit)
    ax.set_xlabel("tokens in the cache")
    ax.set_ylabel(f"KV cache in 16 bits, {_name(unit)}")
    ax.set_xlim(0, context)
    ax.set_ylim(bottom=0)
    return _legend(ax)


def plot_oom(event: OomEvent, budget: GpuBudget, ax: Axes | None = None) -> Axes:
    """A staircase: who held the memory when it ran out, in forward order, up to the card's edge.

    Args:
        event: From the error, or a forecast's ``first_oom``.
        budget: The card.
        ax: Where to draw; a new figure by default.
    """
    totals: Counter = Counter()
    for owner, size in event.holders:
        totals[_block(owner)] += size
    blocks = sorted(totals, key=_forward_order)
    unit, top = _unit(budget.total_bytes), budget.context_bytes
    ax = ax or _new_axes(width=max(5.0, 0.3 * len(blocks) + 2), height=4.4)
    if top:
        ax.axhspan(0, top / unit, color=COLOURS["context"], label=LABELS["context"], linewidth=0)
    for position, block in enumerate(blocks):
        ax.bar(position, top / unit, color="#e5e5e5", width=0.9, zorder=0)
        ax.bar(position, totals[block] / unit, bottom=top / unit, color=COLOURS["weights"], width=0.9)
        top += totals[block]
    ax.plot([], [], "s", color=COLOURS["weights"], label="added by this block")
    reserved = budget.context_bytes + event.reserved_bytes
    ax.axhspan(top / unit, reserved / unit, label=UNUSED, zorder=0, **UNUSED_STYLE)
    _draw_card(ax, budget, unit)
    short = [re.sub(r"^model\.(layers\.)?", "", block) for block in blocks]
    ax.set_xticks(range(len(blocks)), short, rotation=90)
    ax.set_ylabel(f"GPU memory, {_name(unit)}")
    asked = "" if event.requested_bytes is None else f" for {format_bytes(event.requested_bytes)}"
    ax.set_title(f"out of memory in {event.phase}: {event.module} asked{asked}", fontsize="medium")
    ax.set_ylim(0, budget.total_bytes / unit * 1.08)
    return _legend(ax)


def plot_turns(turns: Sequence[TurnStats], ax: Axes | None = None) -> Axes:
    """Horizontal bars: the tokens of each turn, by whether they were cached, prefilled or generated.

    Args:
        turns: From a ``ChatSession``.
        ax: Where to draw; a new figure by default.
    """
    ax = ax or _new_axes(width=7, height=0.6 * len(turns) + 1.2)
    names = [f"turn {index}" for index, _ in enumerate(turns, 1)]
    parts = {
        "already in the KV cache": ([t.cached_tokens for t in turns], COLOURS["context"]),
        "prefilled": ([t.prompt_tokens - t.cached_tokens for t in turns], COLOURS["weights"]),
        "generated": ([t.new_tokens for t in turns], COLOURS["kv"]),
    }
    lefts = [0] * len(turns)
    for label, (counts, colour) in parts.items():
        ax.barh(names, counts, left=lefts, color=colour, label=label, height=0.6)
        lefts = [left + count for left, count in zip(lefts, counts, strict=True)]
    for position, (turn, left) in enumerate(zip(turns, lefts, strict=True)):
        ax.annotate(f" peak {format_bytes(turn.peak_bytes)}", (left, position), va="center")
    ax.set_xlabel("tokens")
    ax.invert_yaxis()
    ax.margins(x=0.25)
    ax.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
    return ax


def plot_fidelity(results: Mapping[str, Fidelity], limits: Limits | None = None, ax: Axes | None = None) -> Axes:
    """Points: mean KL against top-1 agreement, with the region that passes shaded.

    Args:
        results: A name a point, e.g. of the plan's format.
        limits: What passes; by default the report's own limits.
        ax: Where to draw; a new figure by default.
    """
    ax, limits = ax or _new_axes(width=4.5, height=3.8), limits or Limits()
    right = 1.6 * max([limits.kl_mean, *(found.kl_mean for found in results.values())])
    low = min([limits.top1_agreement, *(found.top1_agreement for found in results.values())])
    ax.set_xlim(0, right)
    ax.set_ylim(max(0.0, low - 0.25 * (1.02 - low)), 1.02)
    ax.fill_between([0, limits.kl_mean], limits.top1_agreement, 1, color="#d9ead3", label="passes", linewidth=0)
    for name, found in results.items():
        inside = found.kl_mean <= limits.kl_mean and found.top1_agreement >= limits.top1_agreement
        ax.plot(found.kl_mean, found.top1_agreement, "o", color=COLOURS["weights"] if inside else BUDGET_COLOUR)
        ax.annotate(name, (found.kl_mean, found.top1_agreement), xytext=(7, 0), textcoords="offset points", va="center")
    ax.set_xlabel("mean KL to the reference, nats (0 = identical)")
    ax.set_ylabel("top-1 agreement with the reference")
    return _legend(ax)


def _new_axes(width: float = 6.4, height: float = 3.6) -> Axes:
    return Figure(figsize=(width + 1.5, height), layout="constrained").add_subplot()


def _draw_stacks(ax: Axes, names: Sequence[str], stacks) -> tuple[int, list[int]]:
    """Draws (context, breakdown, reserved) a bar; returns the unit and every bar's height in bytes."""
    tops = [0] * len(stacks)
    unit = _unit(max(context + max(sum(breakdown.values()), reserved) for context, breakdown, reserved in stacks))

    def add(sizes: list[int], label: str, **style) -> None:
        heights, bottoms = [size / unit for size in sizes], [top / unit for top in tops]
        ax.bar(range(len(stacks)), heights, bottom=bottoms, label=label, width=0.6, **style)
        tops[:] = [top + size for top, size in zip(tops, sizes, strict=True)]

    for category, colour in COLOURS.items():
        sizes = [context if category == "context" else parts.get(category, 0) for context, parts, _ in stacks]
        if any(sizes):
            add(sizes, LABELS[category], color=colour)
    unused = [max(0, context + reserved - top) for (context, _, reserved), top in zip(stacks, tops, strict=True)]
    if any(unused):
        add(unused, UNUSED, **UNUSED_STYLE)
    ax.set_xticks(range(len(names)), names)
    return unit, tops


def _draw_card(ax: Axes, budget: GpuBudget | None, unit: int) -> None:
    if budget:
        label = f"the card, {format_bytes(budget.total_bytes)}"
        ax.axhline(budget.total_bytes / unit, color=BUDGET_COLOUR, linestyle="--", label=label, zorder=3)


def _label(ax: Axes, text: str, at: tuple[float, float], colour: str = "black") -> None:
    """Text just above a point, readable where the card's line crosses it."""
    box = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
    style = {"ha": "center", "va": "bottom", "color": colour, "bbox": box, "zorder": 4}
    ax.annotate(text, at, xytext=(0, 2), textcoords="offset points", **style)


def _legend(ax: Axes) -> Axes:
    ax.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return ax


def _block(owner: str) -> str:
    """The decoder layer a module belongs to, or the module itself: ``model.layers.3``, ``model.embed_tokens``."""
    found = re.match(r".*?\.\d+(?=\.|$)", owner)
    return found.group() if found else owner or "other"


def _forward_order(block: str) -> tuple[int, int]:
    """Embedding first, then layers by index, then the head and whatever has no name."""
    index = block.rpartition(".")[2]
    return (1, int(index)) if index.isdigit() else (0, 0) if "embed" in block else (2, 0)


def _unit(largest: int) -> int:
    return GiB if largest >= GiB else MiB


def _name(unit: int) -> str:
    return "GiB" if unit == GiB else "MiB"


def _number(size: int, unit: int) -> str:
    return f"{size / unit:.2f}" if unit == GiB else f"{size / unit:.0f}"
