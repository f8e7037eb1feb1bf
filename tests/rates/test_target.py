"""Profiles of other machines: every field is checked, and every shipped one says where its figures are from."""

import json
from dataclasses import replace

import pytest

from lowvram_lab.errors import LowvramError
from lowvram_lab.packaged import data_path
from lowvram_lab.rates.profile import BOUNDS
from lowvram_lab.rates.target import find_target, read_target, targets
from tests.helpers.machines import BOARD

SHIPPED = ("laptop2013-8gb", "n100-16gb", "orangepi5-8gb", "pi4-4gb", "pi5-8gb")


def written(tmp_path, **changes):
    """A profile in a file; ``None`` removes a field."""
    values = {key: value for key, value in BOARD.to_dict().items() if key not in ("usable_bytes", "origin")}
    values = {key: value for key, value in {**values, **changes}.items() if value is not None}
    path = tmp_path / "board.json"
    path.write_text(json.dumps(values), encoding="utf-8")
    return path


def test_the_shipped_ones_are_listed():
    table = targets()
    assert tuple(table["target"]) == SHIPPED
    assert set(table["origin"]) == {"assumed"}
    assert table["usable_bytes"].dtype == int


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_profile_says_the_source_of_every_figure(name):
    target = find_target(name)
    assert set(target.sources) == set(BOUNDS)
    assert target == read_target(str(data_path("targets", f"{name}.json")))
    assert target.name == name
    assert "assumed" in target.summary() and "assumed" in target._repr_html_()
    assert target.to_dict()["origin"] == "assumed"
    # slips of units: no such board reads more a second than all of its RAM, or fills a product in a cycle on every lane
    assert target.memory_bytes_per_s < 4 * target.ram_bytes
    assert target.disk_bytes_per_s < target.memory_bytes_per_s
    assert target.dense_products_per_s <= target.cores * target.clock_hz * target.lanes


def test_names_are_read_as_people_type_them():
    assert find_target("Raspberry Pi 5 8GB") == find_target("pi5_8gb") == find_target("pi5-8gb")


def test_an_unknown_name_is_answered_with_the_nearest_and_all():
    with pytest.raises(LowvramError) as error:
        find_target("raspberry-pi5")
    assert "the nearest is pi5-8gb" in str(error.value)
    assert all(name in str(error.value) for name in SHIPPED)


def test_a_profile_of_ones_own_is_read(tmp_path):
    assert read_target(written(tmp_path)) == BOARD
    assert find_target(str(written(tmp_path))) == BOARD
    assert read_target(written(tmp_path, sources=None)).sources == {}


WRONG = {
    "no field": ({"lanes": None}, "lanes"),
    "a field too many": ({"memory_gb_per_s": 12}, "memory_bytes_per_s"),
    "a size in words": ({"ram_bytes": "8GiB"}, "ram_bytes: expected a whole number"),
    "bandwidth in GB": ({"memory_bytes_per_s": 12}, "memory_bytes_per_s: expected a whole number"),
    "half a core": ({"cores": 2.5}, "cores: expected a whole number"),
    "no core": ({"cores": 0}, "cores: expected a whole number"),
    "yes": ({"cores": True}, "cores: expected a whole number"),
    "instructions": ({"instructions": "sve"}, "instructions: expected neon or avx2"),
    "no name": ({"name": " "}, "name: expected words"),
    "all reserved": ({"reserved_bytes": 4 << 30}, "reserved_bytes: expected less than ram_bytes"),
    "sources": ({"sources": {"speed": "a friend"}}, "sources"),
    "a list of sources": ({"sources": ["a friend"]}, "sources"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_damaged_profile_names_file_and_field(tmp_path, case):
    changes, said = WRONG[case]
    path = written(tmp_path, **changes)
    with pytest.raises(LowvramError) as error:
        read_target(path)
    assert str(path) in str(error.value) and said in str(error.value)


@pytest.mark.parametrize("text", ["{", "[]", "7", "[" * 100_000])
def test_what_is_no_profile_at_all(tmp_path, text):
    path = tmp_path / "board.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(LowvramError, match="expected a profile"):
        read_target(path)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(LowvramError, match="nothing.json"):
        find_target(str(tmp_path / "nothing.json"))


def test_what_a_model_may_have_is_what_is_not_reserved():
    assert replace(BOARD, ram_bytes=1000 << 20, reserved_bytes=100 << 20).usable_bytes == 900 << 20
