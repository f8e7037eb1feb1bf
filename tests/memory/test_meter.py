"""The meter and the stand-in GPU: what is counted, where, for whom, and what happens when it is too much."""

import gc
import threading

import pytest
import torch

from lowvram_lab.errors import BudgetError, UnitError
from lowvram_lab.memory.budget import GpuBudget
from lowvram_lab.memory.cuda import open_gpu
from lowvram_lab.memory.gpu import StandInOutOfMemoryError, describe_holders
from lowvram_lab.units import GiB, KiB, MiB

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the stand-in takes the place of a missing CUDA")


@pytest.fixture
def gpu():
    return open_gpu("64MiB")


def on_gpu(gpu, *shape, **scope):
    with gpu.active(), gpu.meter.scope(place="gpu", **scope):
        return torch.zeros(*shape)


def live(gpu) -> int:
    gc.collect()
    return gpu.meter.allocated["gpu"]


def test_bytes_are_counted_in_blocks_and_released_with_the_last_reference(gpu):
    one, big = on_gpu(gpu, 1), on_gpu(gpu, 1000)
    assert live(gpu) == 512 + 4096
    alias = big[5:7]
    del big
    assert live(gpu) == 512 + 4096  # the view keeps the storage
    del alias, one
    assert live(gpu) == 0
    assert gpu.meter.allocator.allocated == 0
    assert gpu.meter.holders() == []
    assert gpu.peak_allocated_bytes == 512 + 4096


def test_views_and_in_place_results_are_not_counted_twice(gpu):
    x = on_gpu(gpu, 32, 32)
    with gpu.active():
        views = [x.T, x.reshape(4, 256), x[3], x.detach(), *x.chunk(4), x.add_(1)]
        assert live(gpu) == 4096
        copy = x.T.contiguous()
    assert live(gpu) == 2 * 4096
    assert {gpu.meter.place_of(value) for value in [*views, copy]} == {"gpu"}


def test_a_result_is_where_its_inputs_are(gpu):
    x, y = on_gpu(gpu, 8), torch.ones(8)
    with gpu.active():
        results = [x + 1, x.exp(), torch.stack([x, x]), x.split(4)[1], torch.zeros_like(x), x.to(torch.bfloat16)]
        others = [y + 1, torch.cat([y, y]), torch.arange(3), y.new_zeros(3)]
    assert {gpu.meter.place_of(value) for value in results} == {"gpu"}
    assert {gpu.meter.place_of(value) for value in others} == {"cpu"}


@pytest.mark.parametrize("operation", [torch.add, torch.matmul, lambda a, b: torch.cat([a, b]), torch.where])
def test_mixing_places_is_refused(gpu, operation):
    x, y = on_gpu(gpu, 8), torch.ones(8)
    arguments = (x > 0, x, y) if operation is torch.where else (x, y)
    with gpu.active(), pytest.raises(RuntimeError, match="at least two, gpu and cpu.*simulated"):
        operation(*arguments)


def test_scalars_copies_and_indices_may_mix(gpu):
    x = on_gpu(gpu, 8)
    with gpu.active():
        results = [x + torch.tensor(2.0), torch.tensor(2.0) * x, x[torch.tensor([1, 2])]]
        x.copy_(torch.ones(8))
    assert {gpu.meter.place_of(value) for value in results} == {"gpu"}
    assert x.sum() == 8


def test_nothing_is_counted_outside(gpu):
    with gpu.meter.scope(place="gpu"):
        x = torch.zeros(1000)
    assert live(gpu) == 0
    assert gpu.meter.place_of(x) == "cpu"


def test_nested_active_counts_once_and_ends_with_the_outer(gpu):
    with gpu.active(), gpu.active(), gpu.meter.scope(place="gpu"):
        x = torch.zeros(1000)
    with gpu.active():
        with gpu.active():
            pass
        y = x + 1  # still metered after the inner block
    assert x.nbytes == y.nbytes == 4000
    assert live(gpu) == 2 * 4096


def test_phases_have_their_own_peaks_and_the_breakdown_sums_to_them(gpu):
    with gpu.phase("load") as load:
        weights = on_gpu(gpu, 4096, category="weights")
        del_me = on_gpu(gpu, 1024)
        del del_me
    with gpu.phase("run") as run:
        cache = on_gpu(gpu, 2048, category="kv")
        with gpu.active():
            double = weights * 2
        del double
    assert load.peak_allocated_bytes == 20 * KiB
    assert load.breakdown == {"weights": 16 * KiB, "activations": 4 * KiB}
    assert load.end_allocated_bytes == 16 * KiB
    assert run.peak_allocated_bytes == sum(run.breakdown.values()) == 40 * KiB
    assert run.breakdown["kv"] == cache.nbytes == gpu.meter.category_bytes("kv")
    assert run.end_allocated_bytes == live(gpu) == 24 * KiB
    assert [phase.name for phase in gpu.recording.phases] == ["load", "run"]
    assert run.peak_reserved_bytes == 2 * MiB


def test_a_phase_that_fails_is_complete(gpu):
    with pytest.raises(ZeroDivisionError), gpu.phase("broken") as record:
        kept = on_gpu(gpu, 1024)
        _ = 1 / 0
    assert record.peak_allocated_bytes == record.end_allocated_bytes == kept.nbytes


def test_owners_hold_what_they_made(gpu):
    a, b = on_gpu(gpu, 4096, owner="model.layers.0"), on_gpu(gpu, 1024, owner="model.layers.1")
    with gpu.active(), gpu.meter.scope(owner="outer"), gpu.meter.scope(category="kv"):
        c = a * 2
    assert gpu.meter.holders() == [("model.layers.0", 16384), ("outer", c.nbytes), ("model.layers.1", b.nbytes)]
    assert gpu.meter.holders("cpu") == []


def test_holders_in_one_line_join_the_layers():
    line = describe_holders([("model.layers.0.mlp", MiB), ("model.layers.2.mlp", MiB), ("head", MiB), ("x.1", KiB)])
    assert line == "model.layers.0-2 (2.0 MiB), head (1.0 MiB), x.1 (1.0 KiB)"
    assert describe_holders([]) == "nothing"


def test_inference_mode_counts_the_same(gpu):
    def work():
        x = torch.ones(64, 64)
        return torch.nn.functional.linear(x, x).softmax(-1).reshape(-1)

    peaks = []
    for mode in (torch.no_grad, torch.inference_mode):
        gpu.reset_peak()
        with mode(), gpu.active(), gpu.meter.scope(place="gpu"):
            result = work()
        peaks.append(gpu.peak_allocated_bytes)
        assert live(gpu) == result.nbytes
        del result
        assert live(gpu) == 0
    assert peaks[0] == peaks[1] > 64 * 64 * 4


def test_out_of_memory_is_torchs_and_says_who_held_it(gpu):
    held = on_gpu(gpu, 40, MiB // 4, owner="model.layers.3.mlp")
    with pytest.raises(torch.OutOfMemoryError) as error, gpu.phase("prefill"):
        on_gpu(gpu, 30, MiB // 4, owner="lm_head")
    event = error.value.lowvram.event
    assert isinstance(error.value, StandInOutOfMemoryError)
    assert (event.phase, event.module, event.requested_bytes) == ("prefill", "lm_head", 30 * MiB)
    assert event.allocated_bytes == held.nbytes
    assert event is gpu.recording.first_oom
    for words in ("simulated", "30.0 MiB", "lm_head", "prefill", "64.0 MiB", "model.layers.3 (40.0 MiB)"):
        assert words in str(error.value)
    del error, event
    assert live(gpu) == 40 * MiB  # what did not fit is not counted ...
    assert gpu.meter.allocated["gpu"] == gpu.meter.allocator.allocated
    del held
    again = on_gpu(gpu, 60, MiB // 4)  # ... and the GPU goes on
    assert live(gpu) == again.nbytes


def test_moves_are_counted_copies(gpu):
    x = torch.arange(1000.0)
    there = gpu.move(x, "gpu")
    assert gpu.move(there, "gpu") is there
    assert gpu.move(x, "cpu") is x
    back = gpu.move(there, "cpu")
    assert torch.equal(back, x)
    assert gpu.recording.transfers == {("cpu", "gpu"): 4000, ("gpu", "cpu"): 4000}
    assert live(gpu) == 4096
    assert there.data_ptr() != x.data_ptr()


def test_a_second_thread_meters_for_itself(gpu):
    results = {}

    def work():
        results["there"] = on_gpu(gpu, 1000)
        results["unmetered"] = torch.zeros(1000)

    with gpu.active():
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert live(gpu) == 4096
    assert gpu.meter.place_of(results["there"]) == "gpu"
    results.clear()
    assert live(gpu) == 0


@pytest.mark.parametrize(
    ("size", "context", "usable"),
    [
        ("4GiB", None, 4 * GiB - 384 * MiB),
        ("1GiB", None, GiB - 384 * MiB),
        ("1000MiB", None, 1000 * MiB),
        ("4GiB", "0.5GiB", 4 * GiB - 512 * MiB),
        (2 * GiB, 0, 2 * GiB),
        ("2GiB", "0", 2 * GiB),
    ],
)
def test_budgets(size, context, usable):
    budget = GpuBudget.parse(size, context)
    assert budget.usable_bytes == usable == budget.total_bytes - budget.context_bytes
    assert GpuBudget.parse(budget) is budget


@pytest.mark.parametrize(
    ("size", "context", "error"),
    [("4", None, UnitError), (4, None, BudgetError), ("1GiB", "1GiB", BudgetError), ("lots", None, UnitError)],
)
def test_budgets_refused(size, context, error):
    with pytest.raises(error) as raised:
        GpuBudget.parse(size, context)
    assert "\n" not in str(raised.value)


def test_no_budget_is_no_limit():
    gpu = open_gpu()
    x = on_gpu(gpu, 64, MiB // 4)
    assert live(gpu) == x.nbytes
    assert gpu.simulated
    assert "simulated" in gpu.name
