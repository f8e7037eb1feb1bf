"""What a CUDA card's ``Gpu`` does beside forecasts and kernels: refuse, say what is held, page-lock, time."""

import os
import sys
from types import SimpleNamespace

import pytest
import torch

from lowvram_lab.decoding.lean import LeanDecoder, decoder_for
from lowvram_lab.errors import BudgetError
from lowvram_lab.memory import cuda
from lowvram_lab.memory.budget import GpuBudget
from lowvram_lab.memory.cuda import TORCHS_STREAMS, CudaGpu, PinnedBlock, open_gpu, process_bytes
from lowvram_lab.memory.dry_run import DryRunGpu
from lowvram_lab.memory.torch_release import torch_release
from lowvram_lab.rates import machine as measuring
from lowvram_lab.units import MiB
from tests.helpers.card import computes
from tests.helpers.tiny import TOLERANCES, decoded, load_tiny, random_ids, relative_error, tiny_plan

pytestmark = pytest.mark.gpu


def test_a_measurement_beside_a_model_leaves_its_cap():
    gpu = open_gpu("512MiB")
    CudaGpu(None, set_cap=False)
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(600 * MiB, dtype=torch.uint8, device=gpu.device)


def test_weights_that_no_longer_fit_beside_others_are_refused():
    gpu = open_gpu()
    free, total = torch.cuda.mem_get_info()
    held = torch.empty(MiB, dtype=torch.uint8, device=gpu.device)
    gpu.check_room(free // 2)
    gpu.check_room(total + 1)  # more than the card ever has is an out of memory
    with pytest.raises(BudgetError, match="free: other processes, or other models of this one, hold the rest"):
        gpu.check_room(total)
    assert gpu.peak_reserved_bytes >= gpu.peak_allocated_bytes >= held.nbytes


@pytest.mark.parametrize("mine", [True, False])
def test_what_the_driver_says_that_this_process_holds(monkeypatch, mine):
    uuid = torch.cuda.get_device_properties(0).uuid
    shut = []
    driver = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: shut.append(True),
        nvmlDeviceGetHandleByUUID={f"GPU-{uuid}": "handle"}.get,
        nvmlDeviceGetComputeRunningProcesses=lambda handle: [
            SimpleNamespace(pid=os.getpid() if mine else -1, usedGpuMemory=123)
        ],
    )
    monkeypatch.setitem(sys.modules, "pynvml", driver)
    assert process_bytes(0) == (123 if mine else None)
    driver.nvmlDeviceGetComputeRunningProcesses = None  # fails in its own way
    assert process_bytes(0) is None
    assert shut == [True, True]
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert process_bytes(0) is None


def test_memory_that_the_system_does_not_lock_is_said_once(monkeypatch, caplog):
    monkeypatch.setattr(PinnedBlock, "refused", False)
    runtime = SimpleNamespace(cudaHostRegister=lambda *_: 2)
    monkeypatch.setattr(cuda.torch.cuda, "cudart", lambda: runtime)
    blocks = [PinnedBlock(4096) for _ in range(2)]
    assert not any(block.locked for block in blocks)
    assert [record.message for record in caplog.records] == [
        "could not page-lock 4096 bytes of RAM (CUDA error 2): copies are slower"
    ]
    monkeypatch.undo()
    block = PinnedBlock(4096)
    assert block.locked
    block.unlock()
    assert not block.locked


def test_the_link_is_timed(monkeypatch):
    monkeypatch.setattr(measuring, "LINK_BYTES", MiB)
    rates, _ = measuring._link()
    assert all(rate > 0 for rate in vars(rates).values())


def test_where_no_graph_fits_the_layers_run_one_by_one(monkeypatch):
    model, ids = load_tiny("qwen2", tiny_plan("qwen2", "bf16", context=64)), random_ids(24)
    expected = decoded(LeanDecoder(model), ids, 10)

    def full(self, length):
        raise torch.OutOfMemoryError("no room for its pool")

    monkeypatch.setattr("lowvram_lab.decoding.graph.GraphedStep._captured", full)
    decoder = LeanDecoder(model)
    found = decoded(decoder, ids, 10)
    assert decoder.name == "the lean decoder"
    assert not computes() or relative_error(found, expected) < TOLERANCES["fp32"]


@pytest.mark.parametrize("dry", [False, True])
def test_where_capturing_has_no_room_to_begin_the_run_goes_on(dry):
    """Not even for the graph's seed: no failure of the run, and whatever comes next is on the usual stream."""
    budget = GpuBudget(22 * MiB)  # a segment of each kind
    gpu, usual = DryRunGpu(budget) if dry else open_gpu(budget), torch.cuda.current_stream()
    with gpu.active():
        graphs, held = gpu.graphs(), [gpu.buffer(2 * MiB) for _ in range(10)]
        held += [gpu.buffer(512) for _ in range(2 * MiB // 512)]
        if torch_release() < (2, 14):
            with pytest.raises(torch.OutOfMemoryError), graphs.capturing():
                pass
        with pytest.raises(torch.OutOfMemoryError), graphs.capturing():
            gpu.buffer(512)
    assert torch.cuda.current_stream() == usual
    assert gpu.recording.first_oom is None
    assert len(held) == 10 + 4096


def test_decoders_have_streams_of_their_own_however_many_torch_has_handed_out(monkeypatch):
    gpu = open_gpu()
    graphs = [gpu.graphs() for _ in range(3)]
    for _ in range(2 * TORCHS_STREAMS):
        torch.cuda.Stream()
    graphs += [gpu.graphs() for _ in range(10)]
    assert len({each._stream for each in graphs}) == len(graphs)
    graphs.pop()
    monkeypatch.setattr(torch.cuda, "Stream", None)  # the one given back is taken, none is made
    graphs.append(gpu.graphs())
    assert len({each._stream for each in graphs}) == len(graphs)


def test_what_is_no_one_graph_is_left_to_the_modules():
    plan = tiny_plan("qwen2", "bf16", context=64)
    torn = plan.with_modules("model.layers.1.*", device="cpu")
    assert "do not lie side by side" in decoder_for(load_tiny("qwen2", torn)).name
