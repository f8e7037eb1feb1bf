"""The doctor says what the machine can do, in plain data, and survives what is missing."""

import json

import pytest
import torch

from lowvram_lab import __version__
from lowvram_lab.cli import doctor


@pytest.fixture(scope="module")
def found():
    return doctor.examine()


def test_it_is_plain_data(found):
    assert json.loads(json.dumps(found)) == found
    assert found["lowvram_lab"] == __version__
    assert found["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert found["cpu_cores"] >= 1
    assert found["ram"].endswith("GiB")
    assert found["gpu"] if torch.cuda.is_available() else found["gpu"].endswith("simulated in RAM")


@pytest.mark.parametrize("name", ["int8", "int4", "nf4"])
def test_every_format_has_a_kernel_that_is_right_here(found, name):
    assert found[f"{name} kernel, cpu"].startswith("works (relative error 0.")


def test_a_package_that_is_missing(monkeypatch):
    monkeypatch.setattr("lowvram_lab.machine.PACKAGES", ("torch", "no-such-package"))
    assert doctor.examine()["no-such-package"] == "not installed"


def broken(weight, fmt):
    raise RuntimeError("no kernel image is available\nfor execution on the device")


def broken_without_a_word(weight, fmt):
    raise AssertionError


@pytest.mark.parametrize(
    ("multiply", "said"), [(broken, "no kernel image is available"), (broken_without_a_word, "AssertionError")]
)
def test_a_kernel_that_fails_is_reported(monkeypatch, multiply, said):
    from lowvram_lab.engine import layers as linear

    monkeypatch.setattr(linear.Int4Linear, "multiply", multiply)
    found = doctor.examine()
    assert found["int4 kernel, cpu"] == f"fails: {said}"
    assert found["int8 kernel, cpu"].startswith("works")


def test_a_kernel_that_is_wrong_is_reported(monkeypatch):
    from lowvram_lab.engine import layers as linear

    right = linear.Int8Linear.multiply
    monkeypatch.setattr(linear.Int8Linear, "multiply", lambda self, rows: 2 * right(self, rows))
    assert doctor.examine()["int8 kernel, cpu"].startswith("wrong (1.0")
