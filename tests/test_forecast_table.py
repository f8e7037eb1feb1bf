"""The forecast's table: its rows cover every pair of settings, and the kept results are what is said of them."""

import importlib
import itertools
from dataclasses import astuple, fields
from pathlib import Path

import pytest

from lowvram_lab.packaged import forecast_table

ROOT = Path(__file__).resolve().parent.parent
CAPABILITIES = ("7.5", "8.6", "9.0", "12.0")


@pytest.fixture(scope="module")
def script():
    """benchmarks/forecast_table.py, which is run from its folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        yield importlib.import_module("forecast_table")


@pytest.fixture(scope="module")
def cards():
    return forecast_table()["cards"]


@pytest.mark.parametrize("turn", range(12))
def test_any_two_settings_meet_in_a_row(script, turn):
    rows = [astuple(row) for row in script.rows(turn)]
    assert len(rows) == len(set(rows)) == 120
    settings = [field.name for field in fields(script.Row)]
    for one, other in itertools.combinations(range(len(settings)), 2):
        pairs = {(row[one], row[other]) for row in rows}
        possible = len({row[one] for row in rows}) * len({row[other] for row in rows})
        assert len(pairs) == possible, (settings[one], settings[other])


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_kept_table_is_as_exact_as_is_said(script, cards, capability):
    card = cards[capability]
    assert card["mode"] == "fake CUDA"
    found = script.summary(card["rows"])
    assert found == card["summary"]
    assert found["rows"] >= 120
    assert found["failed"] == found["oom_disagrees"] == found["median_allocated_bytes"] == 0
    assert abs(found["worst_allocated_percent"]) <= 0.1
    assert abs(found["worst_reserved_percent"]) <= 1
    assert found["ran_out_of_memory"] >= 20
    assert capability == "7.5" or found["decoded_by_graphs"] >= 20


def test_a_wrong_row_is_told(script):
    row = {"model": "m", "format": "int8", "placement": "whole", "segments": "default", "cap_gib": 4}
    row |= {"workload": "chat", "decoder": "modules", "forecast_oom": None, "measured_oom": None}
    exact, off = {"load": [100, 100, 200, 200]}, {"load": [99, 100, 200, 200]}
    assert script.what_is_wrong({**row, "phases": exact}) == ""
    assert "-1" in script.what_is_wrong({**row, "phases": off})
    assert script.summary([{**row, "phases": off}])["worst_allocated_percent"] == -1.0
    elsewhere = {**row, "phases": exact, "measured_oom": {"phase": "load", "module": "lm_head"}}
    assert "lm_head" in script.what_is_wrong(elsewhere)
    assert script.summary([elsewhere])["oom_disagrees"] == 1
