"""A card that is not there, too old, shared, sliced, or one of two: said in one line by the doctor and by open_gpu."""

import pytest
import torch

from lowvram_lab.cli import doctor
from lowvram_lab.memory import odd_cards
from tests.helpers.fake_card import on_fake_card

SCRIPT = """
import json, logging, warnings
warnings.simplefilter("ignore")
said = []
class Kept(logging.Handler):
    def emit(self, record):
        said.append(record.getMessage())
logging.getLogger("lowvram_lab").addHandler(Kept())
from lowvram_lab import LowvramError, open_gpu
from lowvram_lab.cli import doctor
doctor.KERNELS = ()  # without arithmetic a product says nothing
try:
    opened = open_gpu("4GiB").name
    open_gpu("4GiB")
except LowvramError as error:
    opened = f"refused: {error}"
found = {key: text for key, text in doctor.examine().items() if key.startswith("gpu")}
print(json.dumps({"opened": opened, "said": said, "doctor": found}))
"""

CASES = {
    "usual": ({}, "fake CUDA", None, None),
    "none": ({"FAKE_CUDA_DEVICES": "0"}, "stand-in", "why none", "no CUDA GPUs are available"),
    "hidden": ({"CUDA_VISIBLE_DEVICES": "3"}, "stand-in", "why none", "CUDA_VISIBLE_DEVICES='3' shows no card of this"),
    "old driver": ({"FAKE_CUDA_DRIVER": "12.4"}, "stand-in", "why none", "the driver knows CUDA 12.4, torch 2."),
    "shared": ({"FAKE_CUDA_CONTEXT": "3GiB"}, "fake CUDA", "others", "other processes hold some 2.62 GiB of fake CUDA"),
    "two": ({"FAKE_CUDA_DEVICES": "2"}, "fake CUDA", "cards", "is used; CUDA_VISIBLE_DEVICES chooses another"),
    "the other": ({"FAKE_CUDA_DEVICES": "2", "CUDA_VISIBLE_DEVICES": "1"}, "fake CUDA", None, None),
    "turing": ({"FAKE_CUDA_CC": "7.5"}, "fake CUDA", "formats", "has capability 7.5: no bf16 units and no int4 kernel"),
    "pascal": ({"FAKE_CUDA_CC": "6.1"}, "refused", "kernels", "has capability 6.1, torch 2."),
    "slice": (
        {"FAKE_CUDA_MIG": "1", "CUDA_VISIBLE_DEVICES": "MIG-0", "FAKE_CUDA_MEMORY": "5GiB"},
        "fake CUDA",
        "slice",
        "MIG 1g.5gb is a slice of a card: its 5.00 GiB are all there is",
    ),
    "small slice": ({"FAKE_CUDA_MIG": "1", "FAKE_CUDA_MEMORY": "2GiB"}, "refused", "slice", "its 2.00 GiB are all"),
    "no slice": (
        {"CUDA_VISIBLE_DEVICES": "MIG-0"},
        "stand-in",
        "why none",
        "CUDA_VISIBLE_DEVICES='MIG-0' shows no card",
    ),
}
SILENT = {"none", "hidden", "no slice"}  # a stand-in is what such users expect


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_an_odd_card_is_answered_in_a_line(name):
    settings, opened, kind, line = CASES[name]
    found = on_fake_card(SCRIPT, **{"FAKE_CUDA_CC": "8.6", "FAKE_CUDA_MEMORY": "8GiB"} | settings)
    assert found["opened"].startswith(opened), found["opened"]
    if name == "the other":
        assert found["opened"].endswith("the other")
    if kind is None:
        assert set(found["doctor"]) == {"gpu"}
        assert found["said"] == []
        return
    told = found["doctor"][f"gpu, {kind}"]
    assert line in told
    if opened == "refused" and kind == "kernels":
        assert found["opened"] == f"refused: {told}"
    elif opened == "refused":
        assert f"found {torch.cuda.get_device_name()} MIG 1g.5gb with 2.00 GiB" in found["opened"]
    elif name not in SILENT:
        assert sum(told in text for text in found["said"]) == 1  # opened twice, said once
    else:
        assert found["said"] == []
    assert "\n" not in told + found["opened"]
    if opened == "stand-in":
        assert found["doctor"]["gpu"] == "none: GPU budgets are simulated in RAM"


def test_why_a_torch_without_cuda_has_no_card(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert doctor.examine()["gpu, why none"] == f"torch {torch.__version__} is built without CUDA"
    assert not odd_cards.shut_out()


def test_a_driver_that_is_too_old(monkeypatch):
    def init():
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040). Please update\nyour GPU")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", init)
    assert odd_cards.shut_out()
    told = odd_cards.why_no_card()
    assert told.startswith("the driver knows CUDA 11.4, torch")
    assert told.endswith("wants 13.0: update the driver, or install torch for CUDA 11.4")
