"""Pictures of a chat: each turn's memory, how far compressed models are from their original, and at what speed."""

from collections.abc import Mapping, Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.ticker import FuncFormatter

from lowvram_lab.chat.answer import TurnStats
from lowvram_lab.errors import LowvramError
from lowvram_lab.evaluation.fidelity import Fidelity
from lowvram_lab.evaluation.validation import Limits
from lowvram_lab.faces.plot_memory import BUDGET_COLOUR, COLOURS, legend, new_axes, stack_bars, unit_name, unit_of
from lowvram_lab.units import format_bytes


def plot_turns(turns: Sequence[TurnStats], ax: Axes | None = None) -> Axes:
    """Horizontal bars: the tokens of each turn, by whether they were cached, prefilled or generated.

    Args:
        turns: From a ``ChatSession``.
        ax: Where to draw; a new figure by default.
    """
    ax = ax or new_axes(width=7, height=0.6 * len(turns) + 1.2)
    names = [f"turn {index}" for index, _ in enumerate(turns, 1)]
    parts = {
        "already in the KV cache": ([t.cached_tokens for t in turns], {"color": COLOURS["context"]}),
        "prefilled": ([t.prompt_tokens - t.cached_tokens for t in turns], {"color": COLOURS["weights"]}),
        "generated": ([t.new_tokens for t in turns], {"color": COLOURS["kv"]}),
    }
    ends = stack_bars(ax, names, parts, sideways=True)
    for position, (turn, end) in enumerate(zip(turns, ends, strict=True)):
        ax.annotate(f" peak {format_bytes(turn.peak_bytes)}", (end, position), va="center")
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
    ax, limits = ax or new_axes(width=4.5, height=3.8), limits or Limits()
    right = 1.6 * max([limits.kl_mean, *(found.kl_mean for found in results.values())])
    low = min([limits.top1_agreement, *(found.top1_agreement for found in results.values())])
    ax.set(xlim=(0, right), ylim=(max(0.0, low - 0.25 * (1.02 - low)), 1.02))
    ax.fill_between([0, limits.kl_mean], limits.top1_agreement, 1, color="#d9ead3", label="passes", linewidth=0)
    for name, found in results.items():
        inside = found.kl_mean <= limits.kl_mean and found.top1_agreement >= limits.top1_agreement
        ax.plot(found.kl_mean, found.top1_agreement, "o", color=COLOURS["weights"] if inside else BUDGET_COLOUR)
        ax.annotate(name, (found.kl_mean, found.top1_agreement), xytext=(7, 0), textcoords="offset points", va="center")
    ax.set(xlabel="mean KL to the reference, nats (0 = identical)", ylabel="top-1 agreement with the reference")
    return legend(ax)


FLOOR = 4
"""A KL of 0 has no place on a logarithmic axis: it is drawn so many times below the smallest that has one."""

LABEL_ROW, LABEL_LETTER = 0.05, 0.0125
"""About what a line of a label, and a letter of it, take of the axes."""


def plot_frontier(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Points: KL against bytes, the colour is tokens/s; what another plan dominates is pale and says by which.

    Args:
        table: From ``frontier``.
        ax: Where to draw; a new figure by default.

    Raises:
        LowvramError: An empty table.
    """
    if table.empty:
        raise LowvramError("expected a table from frontier, found one without rows")
    ax = ax or new_axes(width=7, height=4.2)
    unit = unit_of(table["weight_bytes"].max())
    floor = table["kl"][table["kl"] > 0].min() / FLOOR if (table["kl"] > 0).any() else 1.0
    at = pd.DataFrame({"x": table["weight_bytes"] / unit, "y": table["kl"].clip(lower=floor)})
    speed = Normalize(table["tokens_per_s"].min(), table["tokens_per_s"].max())
    looks = {True: {"s": 110, "edgecolors": "black"}, False: {"s": 60, "edgecolors": "#707070", "alpha": 0.35}}
    for member, rows in table.groupby("on_frontier"):
        ax.scatter(*at.loc[rows.index].to_numpy().T, c=rows["tokens_per_s"], norm=speed, zorder=3, **looks[member])
    for name, other in table["dominated_by"][~table["on_frontier"]].items():
        ax.plot(*at.loc[[name, other]].to_numpy().T, ":", color="#9e9e9e", linewidth=1, zorder=1)
    ax.set(yscale="log", xlabel=f"bytes of weights, {unit_name(unit)}")
    ax.set_ylabel(f"KL to the original, nats a token, {' and '.join(sorted(set(table['kl_origin'])))}")
    if (table["kl"] <= 0).any():
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}" if value > floor else ""))
    width, height = at["x"].max() - at["x"].min() or 1, at["y"].max() / at["y"].min()
    ax.set_xlim(at["x"].min() - 0.06 * width, at["x"].max() + 0.42 * width)  # labels stand to the right
    ax.set_ylim(at["y"].min() / max(2, height**0.1), at["y"].max() * max(2, height**0.1))
    bar = ax.figure.colorbar(ScalarMappable(speed), ax=ax, pad=0.01)
    bar.set_label(f"tokens/s, {' and '.join(sorted(set(table['speed_origin'])))}")
    _label_points(ax, table, at)
    return ax


def _label_points(ax: Axes, table: pd.DataFrame, at: pd.DataFrame) -> None:
    """Writes each plan's name and speed to the right of its point, or above or below that where it is free."""
    table = table.sort_values("kl", ascending=False)  # from the top, so that labels are in the order of their points
    points = ax.transAxes.inverted().transform(
        ax.transData.transform(at.loc[table.index].to_numpy())
    )  # (plans, 2), 0 to 1
    taken = [(x - 0.012, x + 0.012, y) for x, y in points]
    for (name, row), (x, y) in zip(table.iterrows(), points, strict=True):
        text = f"{name}, {row['tokens_per_s']:.0f}/s"
        text += ", KL 0" if row["kl"] <= 0 else ""
        text += "" if row["on_frontier"] else f"; {row['dominated_by']} beats it"
        left, right = x + 0.025, x + 0.025 + LABEL_LETTER * len(text)
        rows = [y + step * LABEL_ROW / 2 for step in sorted(range(-12, 13), key=abs)]
        free = (
            row_y
            for row_y in rows
            if 0.02 < row_y < 0.98
            and all(left > end or right < begin or abs(row_y - other) >= LABEL_ROW for begin, end, other in taken)
        )
        label_y = next(free, y)
        taken.append((left, right, label_y))
        colour = "black" if row["on_frontier"] else "#707070"
        leader = {"arrowstyle": "-", "relpos": (0, 0.5), "color": "#9e9e9e", "linewidth": 0.7} if label_y != y else None
        place = {"xycoords": "axes fraction", "va": "center", "fontsize": "small", "color": colour, "zorder": 4}
        ax.annotate(text, (x, y), xytext=(left, label_y), arrowprops=leader, **place)
