"""What is given up first: leaves before what they follow, cheap before costly, and nothing stays for ever."""

import math
import random

import pytest

from lowvram_lab.prefixes.worth import Worth


def test_a_block_goes_before_the_one_it_follows_and_kept_ones_stay():
    worth, parents = Worth(), {"a": "", "b": "a", "c": "b", "d": "a"}
    for name, seconds in {"a": 1, "b": 2, "c": 9, "d": 3}.items():
        worth.used(name, seconds, 1)
    order = []
    while (name := worth.least(parents, {"a"})) is not None:
        order.append(name)
        worth.given_up(name)
        parents.pop(name)
    assert order == ["d", "c", "b"]


def test_costly_blocks_stay_longer_and_none_for_ever():
    worth, parents = Worth(), {"costly": ""}
    worth.used("costly", 10.0, 1)
    lasted = {"costly": 0, "cheap": []}
    for at in range(100):
        name = f"cheap {at}"
        parents[name] = ""
        worth.used(name, 1.0, 1)
        if len(parents) > 4:
            gone = worth.least(parents, {name})
            worth.given_up(gone)
            parents.pop(gone)
            if gone == "costly":
                lasted["costly"] = at
            else:
                lasted["cheap"].append(at - int(gone.split()[1]))
    assert max(lasted["cheap"]) < lasted["costly"] < 50


@pytest.mark.parametrize("seconds", [math.nan, math.inf, -1.0, -math.inf])
def test_no_block_stays_for_ever_by_what_its_file_says(seconds):
    worth = Worth()
    worth.used("odd", seconds, 0)
    worth.used("plain", 1.0, 10)
    assert worth.least({"odd": "", "plain": ""}, ()) == "odd"
    worth.given_up("odd")
    assert worth.level == 0


@pytest.mark.parametrize("parents", [{"a": "a"}, {"a": "b", "b": "a"}, {"a": "c", "b": "a", "c": "b"}])
def test_blocks_that_follow_each_other_in_a_ring_can_go(parents):
    worth = Worth()
    for _ in range(len(parents)):
        parents.pop(worth.least(parents, ()))
    assert worth.least(parents, ()) is None


def test_whatever_is_used_is_soon_not_the_least():
    draw, worth, parents = random.Random(0), Worth(), {str(at): "" for at in range(8)}
    for _ in range(2000):
        name = draw.choice(list(parents))
        worth.used(name, draw.random(), draw.randint(1, 10))
        if draw.random() < 0.5:
            worth.given_up(worth.least(parents, {name}))
    assert set(worth.of) <= set(parents)
    assert all(value >= 0 for value in worth.of.values())
    assert worth.level <= max(worth.of.values())
