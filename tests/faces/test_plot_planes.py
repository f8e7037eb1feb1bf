"""Each picture of planes draws the numbers it was given, on the Axes it was given."""

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lowvram_lab.decoding.escalate import Margins
from lowvram_lab.errors import LowvramError
from lowvram_lab.faces.plot_planes import plot_margins, plot_planes, plot_speculation
from lowvram_lab.model.formats import get_format
from lowvram_lab.planner.speculation import SpeculationForecast
from lowvram_lab.weights.solvers import round_to_nearest
from tests.helpers.tiny import relative_error, seeded

MARGINS = Margins(torch.linspace(5, 0, 1000), torch.arange(1000) % 100 == 99)
TABLE = pd.DataFrame(
    {"acceptance": [0.8, 0.5], "draft_length": [5, 2], "tokens_per_pass": [3.7, 1.8], "gain": [2.3, 1.4]}
)
FORECAST = SpeculationForecast(0.01, 0.09, 0.0, "made-up rates", TABLE)
WEIGHT = seeded(64, 128)
HIGH = round_to_nearest(WEIGHT, get_format("int4"), symmetric=False).dequantize()
LOW = round_to_nearest(WEIGHT - HIGH, get_format("int4-g32"), symmetric=False).dequantize()

PLOTS = {
    "margins": lambda **kw: plot_margins(MARGINS, **kw),
    "speculation": lambda **kw: plot_speculation(FORECAST, {"prose": (0.6, 1.2)}, **kw),
    "planes": lambda **kw: plot_planes(WEIGHT, HIGH, LOW, **kw),
}


def labels(ax: Axes) -> list[str]:
    return [text.get_text() for text in ax.get_legend().get_texts()]


@pytest.mark.parametrize("plot", PLOTS.values(), ids=PLOTS)
def test_draws_where_it_is_told_and_can_be_drawn(plot, tmp_path):
    axes = Figure().add_subplot()
    assert plot(ax=axes) is axes
    own = plot()
    assert own is not axes and own.get_xlabel()
    own.figure.savefig(tmp_path / "plot.png")


def test_no_pyplot():
    code = "import sys, lowvram_lab.faces.plot_planes; assert 'matplotlib.pyplot' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_marked_thresholds_lie_on_the_curve():
    ax = plot_margins(MARGINS, [0.002, 0.005])
    curve, *marks, alone = ax.lines
    x, y = curve.get_data()
    assert (x[0], y[0], x[-1], y[-1]) == (0, 1, pytest.approx(MARGINS.flip_rate), 0)
    for mark, rate in zip(marks, (0.002, 0.005), strict=True):
        (at,), (share,) = mark.get_data()
        assert at == rate and share == MARGINS.escalated(MARGINS.threshold(rate))
        assert share == pytest.approx(y[np.searchsorted(x, rate + 1e-9, "right") - 1], abs=2e-3)
    assert alone.get_xdata()[0] == MARGINS.flip_rate
    assert labels(ax)[0].startswith("0.2% flip: ") and "nats" in labels(ax)[0]
    with pytest.raises(LowvramError, match="flip rate"):
        plot_margins(MARGINS, [2])


def test_weights_whose_planes_never_differ_can_be_drawn():
    ax = plot_margins(Margins(torch.tensor([1.0, 0.5]), torch.tensor([False, False])), [])
    assert ax.get_xlim() == (0, 1)


def test_gain_by_acceptance_with_what_was_measured():
    ax = plot_speculation(FORECAST, {"code": (0.9, 2.5), "prose": (0.6, 1.2)})
    _, curve, *points = ax.lines
    assert list(curve.get_xdata()) == [0.5, 0.8] and list(curve.get_ydata()) == [1.4, 2.3]
    assert [tuple(point.get_data()) for point in points] == [([0.9], [2.5]), ([0.6], [1.2])]
    assert [text.get_text() for text in ax.texts] == ["2", "5", "code", "prose"]
    assert labels(ax) == ["one token after the other", "forecast,\nmade-up rates", "measured"]
    assert len(plot_speculation(FORECAST).lines) == 2


def test_both_planes_leave_less_than_the_high_one():
    ax = plot_planes(WEIGHT, HIGH, LOW)
    errors = relative_error(HIGH, WEIGHT), relative_error(HIGH + LOW, WEIGHT)
    assert errors[1] < errors[0] / 8
    assert labels(ax) == [f"high plane: {errors[0]:.2%} off", f"both planes: {errors[1]:.2%} off"]
    for patch in ax.patches:
        values, edges, _ = patch.get_data()
        assert (values * np.diff(edges)).sum() == pytest.approx(1)
    with pytest.raises(LowvramError, match="in one shape"):
        plot_planes(WEIGHT, HIGH, LOW[:3])
    with pytest.raises(LowvramError, match="the weight itself"):
        plot_planes(WEIGHT, WEIGHT, LOW)
