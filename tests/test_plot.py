"""Each picture draws the bytes it was given, on the Axes it was given, and opens no pyplot figure."""

import subprocess
import sys

import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from models import packaged_spec, tiny_plan, tiny_spec

from lowvram_lab.chat import TurnStats
from lowvram_lab.dry_run import forecast
from lowvram_lab.evaluate import Fidelity
from lowvram_lab.memory.device import GpuBudget
from lowvram_lab.memory.meter import OomEvent
from lowvram_lab.plot import (
    BUDGET_COLOUR,
    LABELS,
    UNUSED,
    plot_fidelity,
    plot_kv,
    plot_oom,
    plot_phases,
    plot_profiles,
    plot_turns,
    plot_weights,
)
from lowvram_lab.report import Limits
from lowvram_lab.units import GiB, MiB

CARD = GpuBudget(8 * MiB, MiB)
EVENT = OomEvent(
    phase="load",
    module="model.layers.2.mlp.up_proj",
    requested_bytes=MiB,
    allocated_bytes=6 * MiB,
    reserved_bytes=6 * MiB + MiB // 2,
    holders=[
        ("model.layers.10.mlp.up_proj", MiB),
        ("model.embed_tokens", 2 * MiB),
        ("model.layers.2.mlp.up_proj", MiB // 2),
        ("model.layers.2.self_attn.q_proj", MiB // 2),
        ("lm_head", MiB),
        ("", MiB),
    ],
)
TURNS = [TurnStats(30, 0, 5, 0.5, 2.0, 3 * MiB, True), TurnStats(60, 34, 8, 0.4, 2.0, 4 * MiB, False)]
RESULTS = {"good": Fidelity(100, 11, 10, 0.01, 0.95, 1, 2), "bad": Fidelity(100, 20, 10, 0.6, 0.4, 1, 4)}


def a_forecast(recipe="int8", card=CARD, kind="qwen2"):
    return forecast(tiny_plan(kind, recipe), tiny_spec(kind), card)


PLOTS = {
    "profiles": lambda ax=None: plot_profiles([a_forecast("bf16"), a_forecast()], ax=ax),
    "phases": lambda ax=None: plot_phases(a_forecast(), ax=ax),
    "weights": lambda ax=None: plot_weights(tiny_spec("qwen2"), ax=ax),
    "kv": lambda ax=None: plot_kv([tiny_spec("llama"), tiny_spec("qwen2")], 512, CARD, ax=ax),
    "oom": lambda ax=None: plot_oom(EVENT, CARD, ax=ax),
    "turns": lambda ax=None: plot_turns(TURNS, ax=ax),
    "fidelity": lambda ax=None: plot_fidelity(RESULTS, ax=ax),
}


def heights(ax: Axes, label: str) -> list[float]:
    """Of the bars drawn under one name in the legend."""
    return [bar.get_height() for container in ax.containers if container.get_label() == label for bar in container]


def totals(ax: Axes, without: str = "") -> list[float]:
    """The height of every stack."""
    stacks = [[bar.get_height() for bar in bars] for bars in ax.containers if bars.get_label() != without]
    return [sum(parts) for parts in zip(*stacks, strict=True)]


def texts(ax: Axes) -> list[str]:
    return [text.get_text().strip() for text in ax.texts]


def legend(ax: Axes) -> list[str]:
    return [text.get_text() for text in ax.get_legend().get_texts()]


def card_lines(ax: Axes) -> list[float]:
    return [
        line.get_ydata()[0] for line in ax.lines if line.get_color() == BUDGET_COLOUR and line.get_label()[0] != "_"
    ]


@pytest.mark.parametrize("name", PLOTS)
def test_each_returns_axes_that_can_be_drawn(name):
    ax = PLOTS[name]()
    assert isinstance(ax, Axes)
    ax.figure.canvas.draw()


@pytest.mark.parametrize("name", PLOTS)
def test_each_draws_where_it_is_told(name):
    ax = Figure().add_subplot()
    assert PLOTS[name](ax) is ax
    assert ax.patches or ax.lines


def test_pyplot_is_never_imported():
    code = "import sys, lowvram_lab.plot; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_library_needs_no_matplotlib_to_be_imported():
    code = "import sys, lowvram_lab, lowvram_lab.report; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_profile_is_as_high_as_its_bytes():
    profiles = [a_forecast("bf16"), a_forecast("int8")]
    ax = plot_profiles(profiles)
    assert totals(ax, without=UNUSED) == pytest.approx(
        [(CARD.context_bytes + p.peak_allocated_bytes) / MiB for p in profiles]
    )
    assert totals(ax) == pytest.approx([(CARD.context_bytes + p.peak_reserved_bytes) / MiB for p in profiles])
    for category in ("weights", "kv", "activations"):
        expected = [p.peak.breakdown[category] / MiB for p in profiles]
        assert heights(ax, LABELS[category]) == pytest.approx(expected)
    assert card_lines(ax) == [CARD.total_bytes / MiB]


def test_a_profile_that_does_not_fit_says_so():
    narrow = GpuBudget(3 * MiB)
    fitting, failing = a_forecast("int8", GpuBudget(100 * MiB)), a_forecast("bf16", narrow)
    assert fitting.fits and not failing.fits
    assert [("does not fit" in text) for text in texts(plot_profiles([fitting, failing]))] == [False, True]


def test_profiles_are_named_as_asked():
    ax = plot_profiles([a_forecast(), a_forecast()], ["before", "after"])
    assert [label.get_text() for label in ax.get_xticklabels()] == ["before", "after"]
    default = plot_profiles([a_forecast()])
    assert [label.get_text() for label in default.get_xticklabels()] == ["tiny-qwen2\nforecast"]


def test_without_a_budget_there_is_no_card():
    ax = plot_profiles([a_forecast(card=None)])
    assert card_lines(ax) == []
    assert LABELS["context"] not in legend(ax)


def test_gigabytes_are_drawn_as_such():
    spec = packaged_spec("qwen1.5-0.5b")
    ax = plot_weights(spec)
    assert sum(bar.get_width() for bar in ax.patches) == pytest.approx(2 * spec.num_parameters / MiB, rel=1e-3)
    large = packaged_spec("qwen1.5-4b")
    ax = plot_weights(large)
    assert sum(bar.get_width() for bar in ax.patches) == pytest.approx(2 * large.num_parameters / GiB, rel=1e-3)
    assert "GiB" in ax.get_xlabel()


def test_a_tied_head_is_drawn_once():
    kinds = [label.get_text() for label in plot_weights(tiny_spec("llama")).get_yticklabels()]
    assert "embed_tokens" in kinds and "lm_head" not in kinds


def test_phases_are_as_high_as_their_bytes():
    profile = a_forecast()
    ax = plot_phases(profile)
    assert totals(ax, without=UNUSED) == pytest.approx(
        [(CARD.context_bytes + phase.peak_allocated_bytes) / MiB for phase in profile.phases]
    )
    assert [label.get_text() for label in ax.get_xticklabels()] == ["load", "prefill", "decode"]
    assert "forecast" in ax.get_title()


def test_kv_lines_end_at_the_full_cache():
    spec = tiny_spec("llama")
    ax = plot_kv([spec], 512)
    assert list(ax.lines[0].get_ydata()) == pytest.approx([0, spec.kv_bytes(512) / MiB])
    assert card_lines(ax) == []
    assert card_lines(plot_kv([spec], 512, CARD)) == [8]


def test_the_oom_staircase_ends_at_what_was_allocated():
    ax = plot_oom(EVENT, CARD)
    assert [label.get_text() for label in ax.get_xticklabels()] == ["embed_tokens", "2", "10", "lm_head", "other"]
    steps = [bar for bar in ax.patches if to_hex(bar.get_facecolor()) == "#4c72b0"]
    assert [bar.get_height() for bar in steps] == [2, 1, 1, 1, 1]  # MiB; the two modules of layer 2 are one step
    assert steps[0].get_y() == CARD.context_bytes / MiB
    assert steps[-1].get_y() + steps[-1].get_height() == (CARD.context_bytes + EVENT.allocated_bytes) / MiB
    assert EVENT.module in ax.get_title() and "1.0 MiB" in ax.get_title()


def test_an_oom_whose_request_is_unknown_names_no_size():
    event = OomEvent("load", "lm_head", None, MiB, MiB, [("lm_head", MiB)])  # CUDA says it only in its message
    assert plot_oom(event, CARD).get_title().endswith("lm_head asked")


def test_turns_are_as_long_as_their_tokens():
    ax = plot_turns(TURNS)
    widths = {bars.get_label(): [bar.get_width() for bar in bars] for bars in ax.containers}
    assert widths == {"already in the KV cache": [0, 34], "prefilled": [30, 26], "generated": [5, 8]}
    assert texts(ax) == ["peak 3.0 MiB", "peak 4.0 MiB"]


def test_fidelity_marks_what_fails():
    ax = plot_fidelity(RESULTS)
    points = {line.get_xdata()[0]: line.get_color() for line in ax.lines}
    assert points[0.6] == BUDGET_COLOUR != points[0.01]
    assert texts(ax) == ["good", "bad"]
    lenient = plot_fidelity(RESULTS, Limits(kl_mean=1.0, top1_agreement=0.3))
    assert all(line.get_color() != BUDGET_COLOUR for line in lenient.lines)
