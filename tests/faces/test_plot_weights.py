"""Each picture of weights draws the numbers it was given, on the Axes it was given."""

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from safetensors.torch import save_file

from lowvram_lab.errors import LowvramError
from lowvram_lab.faces.plot_weights import plot_error_curves, plot_histograms, plot_outliers, pooled_errors
from lowvram_lab.model.checkpoint import Checkpoint
from lowvram_lab.weights.distribution import weight_statistics
from tests.helpers.tiny import seeded, tiny_state


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Checkpoint:
    directory = tmp_path_factory.mktemp("tiny")
    state = tiny_state("qwen2")
    state["model.layers.1.mlp.up_proj.weight"] = state["model.layers.1.mlp.up_proj.weight"].clone()
    state["model.layers.1.mlp.up_proj.weight"][3, 4] = 5.0
    save_file(state, directory / "model.safetensors")
    return Checkpoint(directory)


@pytest.fixture(scope="module")
def stats(checkpoint):
    return weight_statistics(checkpoint, progress=False)


PLOTS = {
    "histograms": lambda checkpoint, stats, **kw: plot_histograms(checkpoint, **kw),
    "outliers": lambda checkpoint, stats, **kw: plot_outliers(stats, **kw),
    "kurtosis": lambda checkpoint, stats, **kw: plot_outliers(stats, "kurtosis", **kw),  # has values below zero
    "error curves": lambda checkpoint, stats, **kw: plot_error_curves(stats, **kw),
}


def labels(ax: Axes) -> list[str]:
    return [text.get_text() for text in ax.get_legend().get_texts()]


@pytest.mark.parametrize("plot", PLOTS.values(), ids=PLOTS)
def test_draws_where_it_is_told_and_can_be_drawn(plot, checkpoint, stats, tmp_path):
    axes = Figure().add_subplot()
    assert plot(checkpoint, stats, ax=axes) is axes
    own = plot(checkpoint, stats)
    assert own is not axes and own.get_xlabel()
    own.figure.savefig(tmp_path / "plot.png")


def test_no_pyplot_and_no_matplotlib_for_the_statistics():
    code = "import sys, lowvram_lab.weights.distribution as d; assert 'matplotlib' not in sys.modules; "
    code += "import lowvram_lab.faces.plot_weights; assert 'matplotlib.pyplot' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_the_heat_map_has_a_cell_a_matrix_and_marks_the_highest(stats):
    ax = plot_outliers(stats)
    cells = np.asarray(ax.get_images()[0].get_array())
    roles = [tick.get_text() for tick in ax.get_yticklabels()]
    assert cells.shape == (7, 3) and set(roles) == set(stats.query("role.str.endswith('_proj')")["role"])
    for _, row in stats[stats["role"].isin(roles)].iterrows():
        assert cells[roles.index(row["role"]), row["layer"]] == row["max_over_std"]
    (mark,) = ax.lines
    assert (mark.get_xdata()[0], mark.get_ydata()[0]) == (1, roles.index("up_proj"))
    assert "up_proj of layer 1" in ax.get_title() and f"{cells.max():.3g}" in ax.get_title()


def test_the_heat_map_needs_matrices_in_layers_and_a_known_column(stats):
    for table, value in ((stats, "no such"), (stats[stats["layer"].isna()], "std")):
        with pytest.raises(LowvramError, match="expected matrices inside layers"):
            plot_outliers(table, value)


def test_histograms_stand_beside_a_normal_curve(checkpoint):
    ax = plot_histograms(checkpoint, ["q_proj", "up_proj"])
    assert labels(ax) == ["normal", "q_proj", "up_proj"] and ax.get_yscale() == "log"
    for line in ax.lines:  # random weights are normal
        assert np.nanmax(line.get_ydata()) == pytest.approx(0.4, abs=0.05)


def test_error_curves_are_pooled_over_matrices(stats, checkpoint):
    pooled = pooled_errors(stats).set_index(["bits", "group_size"])
    weights = [checkpoint.read(name).double() for name in checkpoint if len(checkpoint.shape(name)) == 2]
    energies = [weight.square().sum().item() for weight in weights]
    matrices = stats[stats["shape"].map(len).eq(2)]
    expected = np.sqrt((matrices["error_int4_g64"] ** 2 * energies).sum() / sum(energies))
    assert pooled.loc[(4, 64), "error"] == pytest.approx(expected, rel=1e-9)
    assert pooled.loc[(4, 64), "share"] == 1 and pooled.loc[(4, 128), "share"] < 1  # down_proj has 192 columns
    ax = plot_error_curves(stats)
    names = labels(ax)
    assert names[:2] == ["groups of 32", "groups of 64"] and names[2].startswith("groups of 128 (")
    assert names[3] == "a scale a row" and names[4].startswith("6.02 dB a bit")
    drawn = {line.get_label(): line for line in ax.lines}
    assert list(drawn["groups of 64"].get_ydata()) == list(pooled.xs(64, level="group_size")["error"])
    slope = drawn[names[-1]].get_ydata()
    assert slope[0] / slope[1] == pytest.approx(2)


def test_duplicates_count_once_and_no_errors_are_refused(tmp_path):
    one, two = seeded(8, 64), seeded(8, 64, seed=1) ** 3
    save_file({"a": one, "b": two, "c": two.clone()}, tmp_path / "model.safetensors")
    stats = weight_statistics(Checkpoint(tmp_path), bits=(4,), group_sizes=(64,), progress=False)
    pd.testing.assert_frame_equal(pooled_errors(stats), pooled_errors(stats.iloc[:2]))
    with pytest.raises(LowvramError, match="expected columns such as error_int4_g64"):
        plot_error_curves(stats.drop(columns="error_int4_g64"))
