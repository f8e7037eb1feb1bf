"""The frontier of bytes, speed and KL: who is on it, by whom the rest are beaten, and what is measured or forecast."""

import itertools
import random

import pandas as pd
import pytest

from lowvram_lab.errors import LowvramError
from lowvram_lab.evaluation.fidelity import Fidelity
from lowvram_lab.evaluation.frontier import dominators, frontier
from lowvram_lab.model.plan import Plan
from lowvram_lab.planner.moves import FORMAT_LOSS, forecast_loss
from lowvram_lab.planner.profile import SpeedProfile
from tests.helpers.machines import Flat
from tests.helpers.tiny import tiny_spec


def points(rows: dict[str, tuple[int, float, float]]) -> pd.DataFrame:
    return pd.DataFrame.from_dict(rows, orient="index", columns=["weight_bytes", "tokens_per_s", "kl"])


def test_worse_in_all_three_is_dominated_and_best_in_one_is_not():
    table = points({"small": (10, 5, 0.9), "quick": (20, 9, 0.5), "close": (30, 5, 0.1), "bad": (30, 4, 0.6)})
    assert dominators(table) == {"small": "", "quick": "", "close": "", "bad": "close"}


def test_of_several_that_dominate_the_closest_of_the_frontier_is_named():
    table = points({"a": (10, 9, 0.5), "b": (15, 9, 0.2), "worse": (20, 8, 0.3), "worst": (20, 7, 0.6)})
    assert dominators(table) == {"a": "", "b": "", "worse": "b", "worst": "b"}


@pytest.mark.parametrize(
    ("other", "beaten"),
    [
        ((10, 5.0, 0.5), ""),  # the same in all three: neither beats the other
        ((10, 5.0, 0.6), "one"),
        ((10, 4.9, 0.5), "one"),
        ((11, 5.0, 0.5), "one"),
        ((11, 5.1, 0.5), ""),
    ],
)
def test_a_tie_in_two_needs_the_third_to_be_better(other, beaten):
    table = points({"one": (10, 5.0, 0.5), "other": other})
    assert dominators(table) == {"one": "", "other": beaten}


def test_whatever_is_off_the_frontier_is_beaten_by_one_that_is_on_it():
    drawn = random.Random(0)
    for _ in range(50):
        rows = {str(i): (drawn.randint(1, 5), float(drawn.randint(1, 5)), drawn.randint(0, 4) / 10) for i in range(9)}
        found = dominators(points(rows))
        signed = {name: (size, -speed, kl) for name, (size, speed, kl) in rows.items()}
        for name, other in itertools.permutations(rows, 2):
            better = all(a <= b for a, b in zip(signed[other], signed[name], strict=True))
            assert not (better and signed[other] != signed[name]) or found[name]
        for name, other in found.items():
            assert not other or (found[other] == "" and signed[other] != signed[name])


def a_fidelity(kl: float) -> Fidelity:
    return Fidelity(100, 20, 10, kl, kl, kl, 0.9, 1, 4, 128, None)


def test_measurements_of_all_plans_are_taken_as_they_are():
    spec = tiny_spec("llama")
    plans = {name: Plan.uniform(spec, name, context=512) for name in ("int8", "bf16", "fp16")}
    speed = SpeedProfile("this CPU", 4, 4, 0.1, 50.0)
    losses = {"int8": a_fidelity(0.2), "bf16": 0.0, "fp16": 0.1}
    table = frontier(plans, speeds={"int8": speed, "bf16": 40, "fp16": 30}, losses=losses)
    assert list(table.index) == ["int8", "bf16", "fp16"]
    assert list(table["weight_bytes"]) == [plans[name].weight_bytes() for name in table.index]
    assert list(table["tokens_per_s"]) == [50, 40, 30]
    assert list(table["kl"]) == [0.2, 0.0, 0.1]
    assert list(table["on_frontier"]) == [True, True, False]
    assert list(table["dominated_by"]) == ["", "", "bf16"]
    assert set(table["kl_origin"]) == set(table["speed_origin"]) == {"measured"}


def test_a_model_alone_is_forecast_in_every_format():
    table = frontier(tiny_spec("llama"), machine=Flat({"nf4": 50.0}))
    assert set(table.index) == {"bf16", *FORMAT_LOSS}
    assert set(table["kl_origin"]) == set(table["speed_origin"]) == {"forecast"}
    assert table.loc["bf16", "kl"] == 0
    expected = forecast_loss(Plan.uniform(tiny_spec("llama"), "int4", context=512))
    assert table.loc["int4", "kl"] == expected
    assert not table.loc["nf4", "on_frontier"]


def test_half_a_comparison_is_refused():
    plans = {name: Plan.uniform(tiny_spec("llama"), name, context=512) for name in ("int8", "bf16")}
    with pytest.raises(LowvramError, match="expected losses of every plan or none at all, found none for bf16"):
        frontier(plans, losses={"int8": 0.1})
    with pytest.raises(LowvramError, match="expected speeds of int8, bf16, found int3 as well"):
        frontier(plans, speeds={"int8": 1, "bf16": 1, "int3": 1})
    with pytest.raises(LowvramError, match="give one of them"):
        frontier(plans, speeds={"int8": 1, "bf16": 1}, machine=Flat({}))
    with pytest.raises(LowvramError, match="expected plans to compare"):
        frontier({})
