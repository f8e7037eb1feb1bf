"""Each picture draws the bytes it was given, on the Axes it was given, and opens no pyplot figure."""

import itertools
import subprocess
import sys
from dataclasses import replace

import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from lowvram_lab.chat.answer import TurnStats
from lowvram_lab.errors import LowvramError
from lowvram_lab.evaluation.fidelity import Fidelity
from lowvram_lab.evaluation.frontier import frontier
from lowvram_lab.evaluation.validation import Limits
from lowvram_lab.faces.plot_chat import plot_fidelity, plot_frontier, plot_turns
from lowvram_lab.faces.plot_memory import (
    BUDGET_COLOUR,
    LABELS,
    POINTS,
    UNUSED,
    plot_breakdown,
    plot_comparison,
    plot_kv,
    plot_phases,
    plot_profiles,
    plot_timeline,
    plot_weight_bytes,
)
from lowvram_lab.memory.budget import GpuBudget
from lowvram_lab.memory.timeline import Timeline
from lowvram_lab.model.plan import Plan
from lowvram_lab.planner.forecast import forecast
from lowvram_lab.planner.profile import Workload
from lowvram_lab.units import GiB, MiB
from tests.helpers.tiny import packaged_spec, tiny_plan, tiny_spec

CARD = GpuBudget(8 * MiB, MiB)
TURNS = [TurnStats(30, 0, 5, 0.5, 2.0, 3 * MiB, True), TurnStats(60, 34, 8, 0.4, 2.0, 4 * MiB, False)]
RESULTS = {
    "good": Fidelity(100, 11, 10, 0.01, 0.005, 0.1, 0.95, 1, 2, 128, None),
    "bad": Fidelity(100, 20, 10, 0.6, 0.5, 3.0, 0.4, 1, 4, 128, None),
}


def a_forecast(recipe="int8", card=CARD, kind="qwen2", **options):
    return forecast(tiny_plan(kind, recipe), card, **options)


def a_measurement(profile):
    """The same figures under the other origin; measured runs themselves are test_forecast.py's."""
    return replace(profile, origin="measured", gpu="stand-in GPU (simulated)")


PLOTS = {
    "profiles": lambda ax=None: plot_profiles([a_forecast("bf16"), a_forecast()], ax=ax),
    "phases": lambda ax=None: plot_phases(a_forecast(), ax=ax),
    "weights": lambda ax=None: plot_weight_bytes(tiny_spec("qwen2"), ax=ax),
    "kv": lambda ax=None: plot_kv([tiny_spec("llama"), tiny_spec("qwen2")], 512, CARD, ax=ax),
    "breakdown": lambda ax=None: plot_breakdown(a_forecast(), ax=ax),
    "timeline": lambda ax=None: plot_timeline(a_forecast(timeline=True), ax=ax),
    "comparison": lambda ax=None: plot_comparison(a_forecast(), a_measurement(a_forecast()), ax=ax),
    "turns": lambda ax=None: plot_turns(TURNS, ax=ax),
    "fidelity": lambda ax=None: plot_fidelity(RESULTS, ax=ax),
    "frontier": lambda ax=None: plot_frontier(compared(), ax=ax),
}


def compared() -> pd.DataFrame:
    """Four plans of which one is dominated, one is the 16-bit original, and two take the same bytes."""
    plans = {name: Plan.uniform(tiny_spec("llama"), name, context=512) for name in ("bf16", "fp16", "int8", "int4")}
    speeds = {"bf16": 90, "fp16": 80, "int8": 150, "int4": 200}
    return frontier(plans, speeds=speeds, losses={"bf16": 0.0, "fp16": 0.001, "int8": 0.01, "int4": 0.4})


def heights(ax: Axes, label: str) -> list[float]:
    """Of the bars drawn under one name in the legend."""
    return [bar.get_height() for container in ax.containers if container.get_label() == label for bar in container]


def totals(ax: Axes) -> list[float]:
    """The height of every stack."""
    return [sum(parts) for parts in zip(*([bar.get_height() for bar in bars] for bars in ax.containers), strict=True)]


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
    code = "import sys, lowvram_lab.faces.plot_memory; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_library_needs_no_matplotlib_to_be_imported():
    code = "import sys, lowvram_lab, lowvram_lab.evaluation.validation; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_profile_is_as_high_as_its_bytes():
    profiles = [a_forecast("bf16"), a_forecast("int8")]
    ax = plot_profiles(profiles)
    assert totals(ax) == pytest.approx([p.device_peak_bytes / MiB for p in profiles])
    for category in ("context", "weights", "kv", "activations", "fragmentation"):
        expected = [p.breakdown[category] / MiB for p in profiles]
        assert heights(ax, LABELS[category]) == pytest.approx(expected)
    assert card_lines(ax) == [CARD.total_bytes / MiB]


def test_a_profile_that_does_not_fit_says_so():
    narrow = GpuBudget(3 * MiB)
    fitting, failing = a_forecast("int8", GpuBudget(100 * MiB)), a_forecast("bf16", narrow)
    assert fitting.fits and not failing.fits
    said = texts(plot_profiles([fitting, failing]))
    assert [("without a limit:\ndoes not fit" in text) for text in said] == [False, True]
    titles = [plot(each).get_title() for plot in (plot_phases, plot_breakdown) for each in (fitting, failing)]
    assert [title.endswith(", without a limit") for title in titles] == [False, True] * 2


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
    ax = plot_weight_bytes(spec)
    assert sum(bar.get_width() for bar in ax.patches) == pytest.approx(2 * spec.num_parameters / MiB, rel=1e-3)
    large = packaged_spec("qwen1.5-4b")
    ax = plot_weight_bytes(large)
    assert sum(bar.get_width() for bar in ax.patches) == pytest.approx(2 * large.num_parameters / GiB, rel=1e-3)
    assert "GiB" in ax.get_xlabel()


def test_a_tied_head_is_drawn_once():
    kinds = [label.get_text() for label in plot_weight_bytes(tiny_spec("llama")).get_yticklabels()]
    assert "embed_tokens" in kinds and "lm_head" not in kinds


def test_phases_are_as_high_as_their_bytes():
    profile = a_forecast()
    ax = plot_phases(profile)
    assert totals(ax) == pytest.approx(
        [(CARD.context_bytes + phase.peak_reserved_bytes) / MiB for phase in profile.phases]
    )
    assert heights(ax, UNUSED) == pytest.approx([p.reserved_breakdown["fragmentation"] / MiB for p in profile.phases])
    assert [label.get_text() for label in ax.get_xticklabels()] == ["load", "prefill", "decode"]
    assert "forecast" in ax.get_title()


def test_a_measured_profile_says_on_what():
    assert plot_phases(a_measurement(a_forecast())).get_title().endswith("measured on stand-in GPU (simulated)")


def test_the_parts_of_a_breakdown_follow_each_other_up_to_the_peak():
    profile = a_forecast()
    bars = plot_breakdown(profile).patches
    ends = [bar.get_x() + bar.get_width() for bar in bars]
    assert [bar.get_x() for bar in bars] == pytest.approx([0, *ends[:-1]])
    assert ends[-1] == pytest.approx(profile.device_peak_bytes / MiB)
    assert len(bars) == sum(size > 0 for size in profile.breakdown.values())


def areas(ax: Axes) -> dict[str, list[float]]:
    """Height of every stacked area at each x it is drawn for."""
    found = {}
    for area in ax.collections:
        edges: dict[float, list[float]] = {}
        for x, y in area.get_paths()[0].vertices:
            edges.setdefault(x, []).append(y)
        found[area.get_label()] = [max(ys) for ys in edges.values()]
    return found


@pytest.mark.parametrize("recipe", ["bf16", "int8"])
def test_the_areas_of_a_timeline_add_up_to_the_allocated_peak(recipe):
    profile = a_forecast(recipe, card=None, timeline=True)
    ax = plot_timeline(profile)
    tops = areas(ax)
    assert list(tops)[0] == LABELS["weights"] and LABELS["kv"] in tops
    assert max(list(tops.values())[-1]) == pytest.approx(profile.peak_allocated_bytes / MiB)
    reserved = next(line for line in ax.lines if line.get_label() == "reserved")
    assert max(reserved.get_ydata()) == pytest.approx(profile.peak_reserved_bytes / MiB)
    assert [label.get_text() for label in ax.get_xticklabels()] == ["load", "prefill", "decode"]


def test_a_long_timeline_is_thinned_and_keeps_its_peak():
    plan = replace(tiny_plan("qwen2", "int8"), kv_format="int4")  # by the model's modules: many events a token
    profile = forecast(plan, timeline=True, workload=Workload(8, 24))
    events, ax = len(profile.timeline.table()), plot_timeline(profile)
    reserved = next(line for line in ax.lines if line.get_label() == "reserved")
    assert len(reserved.get_ydata()) <= 3 * 3 * (POINTS + 1) < events
    assert max(list(areas(ax).values())[-1]) == pytest.approx(profile.peak_allocated_bytes / MiB)


@pytest.mark.parametrize("expandable", [False, True])
def test_the_failing_allocation_is_marked_with_its_module(expandable):
    profile = a_forecast("bf16", GpuBudget(3 * MiB), timeline=True, expandable_segments=expandable)
    ax = plot_timeline(profile)
    (mark,) = [line for line in ax.lines if line.get_marker() == "X"]
    (said,) = texts(ax)
    assert profile.first_oom.module.removeprefix("model.") in said
    table = profile.timeline.table()
    names = list(dict.fromkeys(table["phase"]))
    assert int(mark.get_xdata()[0]) == names.index(profile.first_oom.phase)
    assert mark.get_ydata()[0] * MiB > profile.first_oom.reserved_bytes


def test_every_phase_of_a_timeline_is_drawn_to_its_end():
    profile = a_forecast(card=GpuBudget(100 * MiB, kernels="cpu"), timeline=True)
    assert profile.timeline.table()["phase"].eq("decode").sum() < 100  # few events: an end left out would be seen
    ax = plot_timeline(profile)
    for area in ax.collections:
        assert area.get_datalim(ax.transData).x1 == pytest.approx(len(profile.phases))


def test_a_timeline_that_fits_has_no_mark_and_shows_the_room_for_tensors():
    ax = plot_timeline(a_forecast(card=GpuBudget(100 * MiB, MiB), timeline=True))
    assert not [line for line in ax.lines if line.get_marker() == "X"]
    assert card_lines(ax) == [99]


def test_a_timeline_begun_on_a_card_in_use_shows_only_what_came_on_top():
    whole = a_forecast(timeline=True).timeline
    table = whole.table()
    first = int((table["phase"] != "load").to_numpy().argmax())
    later = Timeline(
        [replace(e, reserved_bytes=e.reserved_bytes + 100 * MiB) for e in whole.events if e.place == "gpu"][first:]
    )
    ax = plot_timeline(later, CARD)
    assert "reserved" not in legend(ax) and card_lines(ax) == []
    assert "above" in ax.get_ylabel()


@pytest.mark.parametrize("source", [Timeline(), None])
def test_without_a_timeline_it_says_how_to_get_one(source):
    with pytest.raises(LowvramError, match="timeline=True"):
        plot_timeline(a_forecast() if source is None else source)


def test_compared_phases_stand_over_each_other():
    predicted = a_forecast()
    measured = a_measurement(predicted)
    ax = plot_comparison(predicted, measured)
    peaks = [phase.peak_allocated_bytes / MiB for phase in predicted.phases]
    assert heights(ax, "forecast") == heights(ax, "measured") == pytest.approx(peaks)
    assert all(text.endswith("off by 0 bytes") for text in texts(ax)) and len(texts(ax)) == 3


def test_compared_timelines_are_two_curves():
    predicted = a_forecast(timeline=True)
    ax = plot_comparison(predicted, a_measurement(predicted))
    (curve,) = [line for line in ax.lines if line.get_label() == "forecast"]
    assert max(curve.get_ydata()) == pytest.approx(predicted.peak_allocated_bytes / MiB)
    assert max(areas(ax)["measured"]) == pytest.approx(predicted.peak_allocated_bytes / MiB)
    watched = replace(a_measurement(predicted), timeline=Timeline(predicted.timeline.events[-5:]))
    assert heights(plot_comparison(predicted, watched), "measured")  # watched from the middle on: bars


def test_a_wrong_forecast_says_by_how_much():
    predicted = a_forecast()
    worse = replace(predicted.phases[1], peak_allocated_bytes=predicted.phases[1].peak_allocated_bytes - 1024)
    measured = a_measurement(replace(predicted, phases=(predicted.phases[0], worse, predicted.phases[2])))
    assert texts(plot_comparison(predicted, measured))[1].endswith("off by 1,024 bytes")


def test_kv_lines_end_at_the_full_cache():
    spec = tiny_spec("llama")
    ax = plot_kv([spec], 512)
    assert list(ax.lines[0].get_ydata()) == pytest.approx([0, spec.kv_bytes(512) / MiB])
    assert card_lines(ax) == []
    assert card_lines(plot_kv([spec], 512, CARD)) == [8]


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


def test_the_frontier_names_speeds_and_who_beats_whom():
    table = compared()
    ax = plot_frontier(table)
    assert texts(ax) == ["int4, 200/s", "int8, 150/s", "fp16, 80/s; bf16 beats it", "bf16, 90/s, KL 0"]
    pale, marked = ax.collections
    assert (len(pale.get_offsets()), len(marked.get_offsets())) == (1, 3)
    assert pale.get_alpha() < 1 and ax.get_yscale() == "log"
    (link,) = ax.lines
    bottom = min(marked.get_offsets()[:, 1])
    assert list(link.get_ydata()) == [0.001, bottom] and 0 < bottom < 0.001  # a KL of 0 below the smallest
    assert ax.get_xlabel() == "bytes of weights, MiB"
    assert ax.get_ylabel().endswith("measured")
    with pytest.raises(LowvramError, match="without rows"):
        plot_frontier(table.iloc[:0])


def test_labels_of_near_points_do_not_lie_on_each_other():
    plans = {f"recipe {n}": Plan.uniform(tiny_spec("llama"), "int4", context=512) for n in range(5)}
    speeds = dict(zip(plans, range(5), strict=True))
    ax = plot_frontier(frontier(plans, speeds=speeds, losses={name: 0.3 + n / 100 for name, n in speeds.items()}))
    renderer = FigureCanvasAgg(ax.figure).get_renderer()
    for text in ax.texts:
        text.update_positions(renderer)
    boxes = [Text.get_window_extent(text, renderer) for text in ax.texts]  # without the line to the point
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
