"""Pictures of a chat: each turn's memory, and how far a compressed model is from its original."""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes

from lowvram_lab.chat.answer import TurnStats
from lowvram_lab.chat.fidelity import Fidelity
from lowvram_lab.chat.validation import Limits
from lowvram_lab.faces.plot_memory import BUDGET_COLOUR, COLOURS, legend, new_axes, stack_bars
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
