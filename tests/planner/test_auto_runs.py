"""What auto_plan chooses really runs inside its budget: random models, cards, RAM, disk, contexts, preferences."""

import functools
import random

import pytest
import torch

from lowvram_lab.engine.load import load
from lowvram_lab.errors import BudgetError
from lowvram_lab.memory.cuda import open_gpu
from lowvram_lab.model.spec import ModelSpec
from lowvram_lab.planner.auto import PREFERENCES, auto_plan
from lowvram_lab.planner.constraints import ram_bytes
from lowvram_lab.planner.forecast import forecast
from lowvram_lab.planner.measure import run_workload
from lowvram_lab.planner.profile import Workload
from lowvram_lab.units import MiB
from tests.helpers.machines import Card, Flat
from tests.helpers.tiny import DictCheckpoint, random_state, tiny_config

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
    """A model, a card between what is hopeless and what holds it all in 16 bits, RAM for a part of it, a preference."""
    draw = random.Random(seed)
    kind, shape = draw.choice(("llama", "qwen2")), draw.randrange(len(SHAPES))
    spec, _ = model(kind, shape)
    whole = 2 * spec.num_parameters
    in_flight = 4 * spec.vocab_size * spec.hidden_size  # a load holds its largest tensor twice
    case = {
        "model": (kind, shape),
        "budget": 2 * MiB + int(draw.choice((draw.uniform(0.05, 0.4), draw.uniform(0.4, 1.5))) * whole),
        "context": draw.choice((64, 200, 512, 1000, None)),
        "ram": draw.choice((None, in_flight + int(draw.uniform(0.05, 0.8) * whole))),
        "disk": draw.choice((None, 2 * whole)),
        "machine": draw.choice((MACHINE, Card())),  # with a card, weights travel where that is faster
        "prefer": draw.choice(PREFERENCES),
    }
    if draw.random() < 0.3:  # fewer layers than would fit leave room for weights that travel
        case |= {"gpu_layers": draw.randrange(3), "prefer": "balance"}
    return case


@pytest.mark.skipif(torch.cuda.is_available(), reason="about the simulated GPU")
@pytest.mark.parametrize("seed", [*range(4), *(pytest.param(n, marks=pytest.mark.slow) for n in range(4, 115))])
def test_a_chosen_plan_runs_its_whole_context_inside_the_budget(seed):
    case = drawn(seed)
    spec, checkpoint = model(*case.pop("model"))
    gpu = open_gpu(case.pop("budget"))
    try:
        choice = auto_plan(spec, gpu, **case)
    except BudgetError as error:
        assert "no plan for" in str(error)  # noqa: PT017
        return
    loaded = load(choice.plan, gpu, checkpoint=checkpoint, progress=False)
    measured = run_workload(loaded, Workload.full_context(choice.plan.context))
    assert measured.fits
    assert measured.peak_reserved_bytes <= gpu.budget.total_bytes
    again = forecast(choice.plan, gpu)
    assert [p.peak_allocated_bytes for p in again.phases] == [p.peak_allocated_bytes for p in measured.phases]
    assert case["disk"] or not choice.plan.weight_bytes("disk")
    assert case["ram"] is None or ram_bytes(choice.plan) <= case["ram"]
