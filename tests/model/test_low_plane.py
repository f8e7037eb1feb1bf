"""What a config says of a low plane's file, and when a directory is an int4 model after all."""

import logging

import pytest

from lowvram_lab.errors import CheckpointError
from lowvram_lab.model import low_plane, source
from lowvram_lab.model.low_plane import FILE, KEY, block, checked_block, in_two_planes, is_missing
from lowvram_lab.model.source import read_config
from tests.helpers.checkpoints import write_model

GOOD = block("ab" * 32, ["model.layers.0.mlp.up_proj"])
BAD = {
    "text": "yes",
    "a list": [GOOD],
    "empty": {},
    "another file": {**GOOD, "file": "../low_plane.safetensors"},
    "no hash": {key: value for key, value in GOOD.items() if key != "sha256"},
    "a hash that is a number": {**GOOD, "sha256": 5},
    "no modules": {**GOOD, "modules": None},
    "modules as text": {**GOOD, "modules": "model.layers.0.mlp.up_proj"},
    "a module that is a number": {**GOOD, "modules": [0]},
}


def test_what_is_written_is_read():
    assert checked_block({KEY: GOOD}, "here") == GOOD
    assert checked_block({}, "here") is None
    assert checked_block({KEY: None}, "here") is None


@pytest.mark.parametrize("how", BAD)
def test_anything_else_is_refused_in_one_line(how):
    with pytest.raises(CheckpointError) as error:
        checked_block({KEY: BAD[how]}, "some/config.json")
    assert str(error.value).startswith(f"some/config.json: expected {KEY} with file {FILE}, sha256 and modules, found ")
    assert str(error.value).endswith("; convert again")
    assert "\n" not in str(error.value)


def test_a_refusal_stays_short():
    with pytest.raises(CheckpointError) as error:
        checked_block({KEY: {"modules": ["model.layers.0.mlp.up_proj"] * 1000}}, "here")
    assert len(str(error.value)) < 400


def test_named_modules_in_int4_are_in_two_planes():
    stored = {"a": "int4", "b": "int4-g128", "c": "int8", "d": "int4", "e": "int4-g192"}
    found = in_two_planes(stored, block("", ["a", "b", "c", "e", "nobody"]))
    assert found == {"a": "int4+4", "b": "int4+4-g128", "c": "int8", "d": "int4", "e": "int4-g192"}
    assert in_two_planes(stored, None) == stored


def test_the_file_is_missing_only_beside_weights(tmp_path):
    assert not is_missing(tmp_path)
    (tmp_path / "model.safetensors").touch()
    assert is_missing(tmp_path)
    (tmp_path / FILE).touch()
    assert not is_missing(tmp_path)


def test_without_the_file_the_config_says_nothing_of_it_and_one_line_does(tmp_path, caplog, monkeypatch):
    folder = write_model(tmp_path / "model", "qwen2")
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace("{", f'{{"{KEY}": {{"file": "{FILE}"}},', 1))
    source._say_without_low_plane.cache_clear()
    with caplog.at_level(logging.WARNING):
        configs = [read_config(folder) for _ in range(3)]
    assert not any(hasattr(config, KEY) for config in configs)
    assert caplog.messages == [f"{folder}: {FILE} is not there, so this is an int4 model"]
    (folder / low_plane.FILE).touch()
    assert getattr(read_config(folder), KEY) == {"file": FILE}
