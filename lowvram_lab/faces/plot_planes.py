"""Pictures of weights in two planes: what each leaves of a matrix, who is asked how often, what drafts gain.

Derived in: notebooks/08_precision_on_demand.ipynb
"""

from collections.abc import Mapping, Sequence
from itertools import cycle

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from lowvram_lab.decoding.escalate import Margins
from lowvram_lab.errors import LowvramError
from lowvram_lab.faces.plot_memory import BUDGET_COLOUR, COLOURS, label_point, legend, new_axes
from lowvram_lab.planner.speculation import SpeculationForecast

FLIP_RATES = (0.001, 0.005, 0.01, 0.02)
BINS = 161
"""Of a histogram, over what the high plane leaves."""


def plot_margins(margins: Margins, flip_rates: Sequence[float] = FLIP_RATES, ax: Axes | None = None) -> Axes:
    """A curve: the share of tokens that both planes compute, by how many of the others may flip; thresholds marked.

    Args:
        margins: From ``margins_of``.
        flip_rates: Shares of all tokens, marked with their thresholds.
        ax: Where to draw; a new figure by default.

    Raises:
        LowvramError: A flip rate is none.
    """
    ax = ax or new_axes(width=5.5, height=3.8)
    tokens = len(margins.flips)
    flipped = np.concatenate([[0], margins.flips.cumsum(0).numpy() / tokens])  # of the first so many, believed
    ax.step(flipped, 1 - np.arange(tokens + 1) / tokens, where="post", color=COLOURS["weights"], linewidth=1.2)
    for rate, marker in zip(flip_rates, cycle("osD^vP")):
        threshold = margins.threshold(rate)
        share = margins.escalated(threshold)
        label = f"{rate:.1%} flip: {share:.0%} by both,\nmargin below {threshold:.2f} nats"
        ax.plot(rate, share, marker, color=COLOURS["kv"], markeredgecolor="black", label=label, zorder=3)
    label = f"{margins.flip_rate:.1%} flip: by the\nhigh planes alone"
    ax.plot(margins.flip_rate, 0, "X", color=BUDGET_COLOUR, markersize=9, clip_on=False, label=label, zorder=3)
    ax.set(xlabel="tokens that flip, of all", ylabel="tokens that both planes compute, of all", ylim=(0, 1))
    ax.set_xlim(0, max([margins.flip_rate, *flip_rates]) * 1.05 or 1)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(PercentFormatter(1))
    return legend(ax)


def plot_speculation(
    forecast: SpeculationForecast,
    measured: Mapping[str, tuple[float, float]] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """A curve: what drafting by the high planes gains, by how often a guess is right; each with its draft length.

    Args:
        forecast: From ``forecast_speculation``.
        measured: A name a point: the share of guesses that were right, and the tokens/s over those without guesses.
        ax: Where to draw; a new figure by default.
    """
    ax = ax or new_axes(width=5.5, height=3.8)
    table = forecast.table.sort_values("acceptance")
    ax.axhline(1, color=COLOURS["context"], linestyle="--", linewidth=1, label="one token after the other")
    ax.plot(table["acceptance"], table["gain"], "o-", color=COLOURS["weights"], label=f"forecast,\n{forecast.rates}")
    for row in table.itertuples():
        label_point(ax, f"{row.draft_length}", (row.acceptance, row.gain), xytext=(0, 5), fontsize="small")
    for name, at in (measured or {}).items():
        ax.plot(*at, "D", color=COLOURS["kv"], zorder=4, label="measured" if name == next(iter(measured)) else None)
        label_point(ax, name, at, xytext=(7, 0), ha="left", va="center", fontsize="small")
    ax.set_xlabel("guesses that are right (above a point: how many are best drafted)")
    ax.set_ylabel("tokens/s, times those without drafts")
    ax.set_title(f"a token by the high planes {forecast.draft_s * 1e3:.3g} ms, by both {forecast.token_s * 1e3:.3g} ms")
    ax.title.set_fontsize("medium")
    ax.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    ax.margins(x=0.08, y=0.14)
    return legend(ax)


def plot_planes(weight: torch.Tensor, high: torch.Tensor, low: torch.Tensor, ax: Axes | None = None) -> Axes:
    """Histograms of one matrix: what the high plane leaves of it, and what both leave; with their relative errors.

    Args:
        weight: ``(out_features, in_features)``, float.
        high: What the high plane stands for, of that shape: ``IntegerWeight.dequantize()``.
        low: What the low plane stands for, likewise.
        ax: Where to draw; a new figure by default.

    Raises:
        LowvramError: The shapes differ, or the high plane leaves nothing.
    """
    if not weight.shape == high.shape == low.shape:
        shapes = ", ".join(str(tuple(each.shape)) for each in (weight, high, low))
        raise LowvramError(f"expected a weight and its two planes in one shape, found {shapes}")
    weight, high, low = (each.float().cpu() for each in (weight, high, low))
    spread, rest = weight.std().item(), weight - high
    widest = rest.abs().max().item() / spread
    if not widest > 0:
        raise LowvramError("expected a high plane that is off by something, found one that is the weight itself")
    ax = ax or new_axes(width=6, height=3.8)
    edges = np.linspace(-widest, widest, BINS + 1)
    looks = {"high plane": (rest, COLOURS["weights"], "-"), "both planes": (rest - low, BUDGET_COLOUR, "--")}
    for name, (left, colour, line) in looks.items():
        density, _ = np.histogram((left / spread).flatten().numpy(), edges, density=True)
        label = f"{name}: {(left.norm() / weight.norm()).item():.2%} off"
        ax.stairs(density, edges, color=colour, linestyle=line, linewidth=1.3, label=label)
        ax.stairs(density, edges, color=colour, alpha=0.15, fill=True)
    ax.set(xlabel="what is left of a weight, in standard deviations of the matrix", ylabel="density", yscale="log")
    return legend(ax)
