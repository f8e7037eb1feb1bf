"""Pictures of what a model can do without: its layers, and bytes against divergence for slimming and quantising.

Derived in: notebooks/11_the_edge.ipynb
"""

from matplotlib.axes import Axes
from pandas import DataFrame

from lowvram_lab.faces.plot_memory import BUDGET_COLOUR, COLOURS, label_point, legend, new_axes
from lowvram_lab.slimming.choice import LayerChoice
from lowvram_lab.slimming.influence import Influence
from lowvram_lab.units import MiB

LOOKS = ("o-", "s-", "^--", "d:")


def plot_influence(influence: Influence, choice: LayerChoice | None = None, ax: Axes | None = None) -> Axes:
    """How far each layer turns the hidden states, and which of them were left out.

    Args:
        influence: From ``layer_influence``.
        choice: From ``choose_layers``; its layers are marked, with the KL after each.
        ax: Where to draw; a new figure by default.
    """
    ax = ax or new_axes(width=7.5, height=3.2)
    table = influence.table
    gone = set(choice.removed) if choice else set()
    for name, colour, rows in (
        ("stays", COLOURS["weights"], table[~table["layer"].isin(gone)]),
        ("left out", COLOURS["kv"], table[table["layer"].isin(gone)]),
    ):
        if len(rows):
            ax.bar(rows["layer"], rows["influence"], color=colour, label=name)
    if choice:
        for step, (layer, kl) in enumerate(zip(choice.removed, choice.kl, strict=True), 1):
            height = table.set_index("layer")["influence"][layer]
            label_point(ax, f"{step}: KL {kl:.2f}", (layer, height), xytext=(0, 4), fontsize="small")
    ax.set(xlabel="layer", ylabel="influence (1 less cosine)", yscale="log")
    ax.margins(y=0.15)
    return legend(ax)


def plot_referee(table: DataFrame, ax: Axes | None = None) -> Axes:
    """Bytes against divergence, a line for each way of making a model smaller.

    Args:
        table: ``way``, ``name``, ``weight_bytes`` and ``kl`` (nats a token, above 0), a row a model.
        ax: Where to draw; a new figure by default.
    """
    ax = ax or new_axes(width=7.5, height=4)
    colours = [COLOURS["weights"], COLOURS["kv"], COLOURS["activations"], BUDGET_COLOUR]
    for (way, rows), looks, colour in zip(table.groupby("way", sort=False), LOOKS, colours, strict=False):
        rows = rows.sort_values("weight_bytes")
        ax.plot(rows["weight_bytes"] / MiB, rows["kl"], looks, color=colour, label=way)
        for row in rows.itertuples():
            label_point(ax, row.name, (row.weight_bytes / MiB, row.kl), xytext=(3, 4), fontsize="x-small")
    ax.set(xlabel="weights, MiB", ylabel="nats a token from the whole model", yscale="log")
    ax.margins(x=0.08, y=0.12)
    return legend(ax)
