"""What the faces say and give back on a real card, or on the fake CUDA runtime's."""

import gc

import pytest
import torch

from lowvram_lab.cli.demo import _provoke_oom
from lowvram_lab.evaluation.effects import NOT_HERE, open_case
from lowvram_lab.faces.panel import LayerSplitPanel
from lowvram_lab.memory.cuda import open_gpu
from lowvram_lab.model.plan import Plan
from lowvram_lab.model.spec import ModelSpec
from lowvram_lab.units import MiB
from tests.helpers.checkpoints import RandomCheckpoint, write_model
from tests.helpers.machines import Made
from tests.helpers.tiny import letters_state, tiny_config, tiny_tokenizer

pytestmark = pytest.mark.gpu


@pytest.fixture
def spec():
    """Some 30 MiB in 16 bits."""
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 8}
    return ModelSpec.from_config(tiny_config("qwen2", **sizes), "larger")


def test_a_panel_gives_back_what_a_failed_load_took(spec):
    options = {"tokenizer": tiny_tokenizer(), "checkpoint": RandomCheckpoint(spec), "machine": Made()}
    panel = LayerSplitPanel(spec, open_gpu("16MiB"), **options)
    assert panel.load_and_try() is None
    assert panel.trials == []
    assert "CUDA out of memory" in panel.message.value
    gc.collect()
    assert torch.cuda.memory_reserved() == 0


def test_the_demo_shows_cudas_own_error_and_gives_back_what_it_took(spec):
    plan = Plan.uniform(spec, "bf16", context=256)
    found = _provoke_oom(plan, "16MiB", RandomCheckpoint(spec), progress=False)
    assert found["type"] == "torch.OutOfMemoryError"
    assert "CUDA out of memory" in found["message"] and "Held by: " in found["message"]
    assert found["phase"] == "load" and found["module"].startswith("model.")
    assert 0 < found["allocated_bytes"] <= 16 * MiB
    assert torch.cuda.memory_reserved() == 0
    assert _provoke_oom(plan, "1GiB", RandomCheckpoint(spec), progress=False) is None


def test_a_larger_cards_speed_is_not_passed_off_as_a_small_ones(tmp_path):
    folder = write_model(tmp_path / "a model", "qwen2", letters_state())
    case = open_case(str(folder), "64MiB", 256, None)
    assert case.slow == f"{torch.cuda.get_device_name()} is a larger card than one of 64.0 MiB"
    assert case.timed("decoding", "decoding", "9 tokens/s", [9]).ours.startswith(NOT_HERE)
