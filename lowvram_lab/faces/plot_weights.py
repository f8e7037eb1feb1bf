"""Pictures of weights: their distributions, who has outliers, what rounding costs. Drawn as in plot_memory.py.

Derived in: notebooks/03_know_your_weights.ipynb
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize, SymLogNorm
from matplotlib.ticker import LogLocator, NullFormatter

from lowvram_lab.errors import LowvramError
from lowvram_lab.faces.plot_memory import BUDGET_COLOUR, legend, new_axes
from lowvram_lab.model.checkpoint import Checkpoint
from lowvram_lab.weights.distribution import weight_histograms

TITLES = {
    "max_over_std": "largest weight, in standard deviations",
    "kurtosis": "excess kurtosis (normal: 0)",
    "row_spread": "rms of rows, 99th percentile / median",
    "column_spread": "rms of columns, 99th percentile / median",
}


def plot_histograms(checkpoint: Checkpoint, roles: Sequence[str] = (), ax: Axes | None = None) -> Axes:
    """Densities of weights over their tensor's standard deviation, a curve a kind of matrix, beside the normal curve.

    Args:
        checkpoint: An open checkpoint of float weights; it is read once.
        roles: Such as ``("q_proj", "down_proj")``; by default all there are.
        ax: Where to draw; a new figure by default.

    Raises:
        LowvramError: A role without a matrix.
    """
    densities = weight_histograms(checkpoint, roles)
    ax = ax or new_axes(width=6.5, height=3.8)
    at = densities.index.to_numpy()
    normal = np.exp(-(at**2) / 2) / np.sqrt(2 * np.pi)
    lowest = densities[densities > 0].min().min()
    ax.fill_between(at, normal, lowest / 2, where=normal > lowest / 2, color="#dddddd", label="normal")
    for role, density in densities.items():
        ax.step(at, density.where(density > 0), where="mid", label=role, linewidth=1)
    edge = f"beyond {at[-1]:.0f} counted at the edge"
    ax.set(xlabel=f"(weight - mean) / standard deviation of its tensor; {edge}", ylabel="density")
    ax.set(yscale="log", ylim=(lowest / 2, None))
    return legend(ax)


def plot_outliers(stats: pd.DataFrame, value: str = "max_over_std", ax: Axes | None = None) -> Axes:
    """A heat map, projections x layers, of a column of ``weight_statistics``; the highest is marked.

    Args:
        stats: From ``weight_statistics``.
        value: The column, such as ``"kurtosis"`` or ``"error_int4_g64"``.
        ax: Where to draw; a new figure by default.

    Raises:
        LowvramError: No such column, or no matrices inside layers.
    """
    matrices = stats[stats["shape"].map(len).eq(2) & stats["layer"].notna()]
    if value not in stats or matrices.empty:
        raise LowvramError(f"expected matrices inside layers and a column {value!r}, found {', '.join(stats)}")
    order = list(dict.fromkeys(matrices["role"]))
    table = matrices.pivot_table(index="role", columns="layer", values=value, aggfunc="max", dropna=False).loc[order]
    cells = table.to_numpy(dtype=float)
    ax = ax or new_axes(width=7, height=1.2 + 0.3 * len(table))
    low, high = np.nanmin(cells), np.nanmax(cells)
    if high < 4 * low:
        norm = Normalize(low, high)
    else:  # a few cells may be far above the rest
        norm = LogNorm(low, high) if low > 0 else SymLogNorm(max(-low, high / 1000) or 1, vmin=low, vmax=high)
    image = ax.imshow(cells, aspect="auto", cmap="viridis", norm=norm, interpolation="nearest")
    row, column = np.unravel_index(np.nanargmax(cells), cells.shape)
    ax.plot(column, row, "s", markerfacecolor="none", markeredgecolor=BUDGET_COLOUR, markersize=9)
    ax.set_yticks(range(len(table)), table.index)
    ax.set_xticks(range(0, len(table.columns), 5), table.columns[::5])
    ax.set_xlabel("layer")
    where = f"{table.index[row]} of layer {table.columns[column]}"
    ax.set_title(f"{TITLES.get(value, value)}; highest {high:.3g}, {where}", fontsize="medium")
    ticks = norm.inverse(np.linspace(0, 1, 5))
    ax.figure.colorbar(image, ax=ax, pad=0.01, ticks=ticks, format="%.3g").minorticks_off()
    return ax


def plot_error_curves(stats: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Relative round-trip error over bits, a curve a group size, and the slope of 6.02 dB a bit.

    A point is all matrices together: the root of summed squared errors over that of summed squared weights. Duplicates
    count once. A group size that does not divide every matrix is drawn for those it does, and says so.

    Args:
        stats: From ``weight_statistics``.
        ax: Where to draw; a new figure by default.

    Raises:
        LowvramError: No errors in the table.
    """
    errors = pooled_errors(stats)
    if errors.empty:
        raise LowvramError("expected columns such as error_int4_g64 with numbers in them, found none")
    ax = ax or new_axes(width=5.5, height=3.8)
    curves = sorted(errors.groupby("group_size"), key=lambda item: item[0] or np.inf)
    for size, curve in curves:
        covered = "" if curve["share"].min() == 1 else f" ({curve['share'].min():.0%} of the weights)"
        label, style = (f"groups of {size}", {}) if size else ("a scale a row", {"marker": "s", "color": "#707070"})
        ax.plot(curve["bits"], curve["error"], **{"marker": "o", "markersize": 5, "label": label + covered, **style})
    steps = np.array(sorted(errors["bits"].unique()))
    start = errors.sort_values(["bits", "error"]).iloc[0]
    slope = start["error"] * 2.0 ** (start["bits"] - steps)  # 20 log10(2) = 6.02
    ax.plot(steps, slope, ":", color="#707070", label="6.02 dB a bit: half the error", zorder=1)
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.set_xticks(steps)
    ax.set(xlabel="bits of a code", ylabel="relative error")
    return legend(ax)


def pooled_errors(stats: pd.DataFrame):
    """The errors of ``weight_statistics`` over all matrices together.

    Returns:
        A DataFrame, a row an error column: ``bits``, ``group_size`` (0: a scale a row), ``error``, and ``share`` of the
        matrices' weights that it covers.
    """
    matrices = stats[stats["shape"].map(len).gt(1) & stats["duplicate_of"].isna()]
    count = matrices["shape"].map(np.prod)
    energy = count * (matrices["std"] ** 2 + matrices["mean"] ** 2)
    rows = []
    for column in [name for name in stats if name.startswith("error_int") and matrices[name].notna().any()]:
        bits, _, size = column.removeprefix("error_int").partition("_g")
        known = matrices[column].notna()
        error = np.sqrt((matrices[column] ** 2 * energy)[known].sum() / energy[known].sum())
        rows.append((int(bits), int(size or 0), error, count[known].sum() / count.sum()))
    return pd.DataFrame(rows, columns=["bits", "group_size", "error", "share"])
