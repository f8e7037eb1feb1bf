"""Pictures of what is remembered: the first token cold and warm, by length.

Derived in: notebooks/10_remember.ipynb
"""

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullFormatter
from pandas import DataFrame

from lowvram_lab.chat.first_token import break_even
from lowvram_lab.faces.plot_memory import BUDGET_COLOUR, COLOURS, label_point, legend, new_axes

LOOKS = {
    "cold": ("o-", COLOURS["weights"], "read"),
    "disk": ("s-", COLOURS["kv"], "put back from disk"),
    "RAM": ("^--", COLOURS["activations"], "put back from RAM"),
}


def plot_first_token(table: DataFrame, ax: Axes | None = None) -> Axes:
    """Seconds to the first token by length of what is remembered, read and put back; where both take equally long.

    Args:
        table: From ``first_token_table``.
        ax: Where to draw; a new figure by default.
    """
    ax = ax or new_axes(width=5.5, height=3.8)
    for name, (looks, colour, label) in LOOKS.items():
        ax.plot(table["tokens"], table[name] * 1e3, looks, color=colour, label=label)
    for row in table.itertuples():
        label_point(ax, f"{row.cold / row.disk:.0f} x", (row.tokens, row.cold * 1e3), xytext=(0, 5), fontsize="small")
    even = break_even(table)
    if 0 < even < float("inf"):
        label = f"equally long from\n{even:.0f} tokens on (by lines)"
        ax.axvline(max(even, 1), color=BUDGET_COLOUR, linestyle=":", linewidth=1, label=label)
    ax.set(xscale="log", yscale="log", xlabel="tokens remembered", ylabel="first token, ms")
    ax.set_xticks(table["tokens"], [f"{tokens}" for tokens in table["tokens"]])
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.margins(x=0.08, y=0.14)
    return legend(ax)
