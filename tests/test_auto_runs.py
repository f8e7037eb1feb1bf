"""What auto_plan chooses really runs inside its budget: random models, cards, contexts and preferences."""

import functools
import random

import pytest
import torch
from models import DictCheckpoint, random_state, tiny_config
from test_planner import Flat

from lowvram_lab.dry_run import forecast
from lowvram_lab.errors import BudgetError
from lowvram_lab.loader import load
from lowvram_lab.memory.device import open_gpu
from lowvram_lab.planner.auto import PREFERENCES, auto_plan, ram_bytes
from lowvram_lab.profile import Workload, run_workload
from lowvram_lab.spec import ModelSpec
from lowvram_lab.units import MiB

SHAPES = (
    {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 6, "vocab_size": 4096},
    {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4, "vocab_size": 2048},
    {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 8, "vocab_size": 8192},
)
MACHINE = Flat({"bf16": 4.0, "int8": 2.0, "int4": 1.0})


@functools.cache
def model(kind: str, shape: int) -> tuple[ModelSpec, DictCheckpoint]:
    spec = ModelSpec.from_config(tiny_config(kind, **SHAPES[shape]), f"{kind} {shape}")
    return spec, DictCheckpoint(random_state(spec))


def drawn(seed: int) -> dict:
    """A model, and a card between what is hopeless and what holds it all in 16 bits."""
    draw = random.Random(seed)
    kind, shape = draw.choice(("llama", "qwen2")), draw.randrange(len(SHAPES))
    spec, _ = model(kind, shape)
    whole = 2 * spec.num_parameters
    return {
        "model": (kind, shape),
        "budget": 2 * MiB + int(draw.uniform(0.05, 1.5) * whole),
        "context": draw.choice((64, 200, 512, 1000)),
        "prefer": draw.choice(PREFERENCES),
        "ram": draw.choice((None, int(draw.uniform(0.3, 3) * whole))),
    }


@pytest.mark.skipif(torch.cuda.is_available(), reason="about the simulated GPU")
@pytest.mark.parametrize("seed", [*range(4), *(pytest.param(n, marks=pytest.mark.slow) for n in range(4, 60))])
def test_a_chosen_plan_runs_its_whole_context_inside_the_budget(seed):
    case = drawn(seed)
    spec, checkpoint = model(*case["model"])
    gpu = open_gpu(case["budget"])
    try:
        choice = auto_plan(spec, gpu, case["context"], ram=case["ram"], prefer=case["prefer"], machine=MACHINE)
    except BudgetError as error:
        assert "no plan for" in str(error)  # noqa: PT017
        return
    loaded = load(choice.plan, gpu, spec=spec, checkpoint=checkpoint, progress=False)
    measured = run_workload(loaded, Workload.full_context(case["context"]))
    assert measured.fits
    assert measured.peak_reserved_bytes <= case["budget"]
    again = forecast(choice.plan, spec, gpu)
    assert [p.peak_allocated_bytes for p in again.phases] == [p.peak_allocated_bytes for p in measured.phases]
    assert case["ram"] is None or ram_bytes(choice.plan, spec) <= case["ram"]
