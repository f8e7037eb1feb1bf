"""Layers on disk: mapped, not held in RAM, and nothing left in the folder."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from lowvram_lab.decoding.decode import prefill
from lowvram_lab.engine import room
from lowvram_lab.engine.kv_cache import PreallocatedCache
from lowvram_lab.engine.layers import INT8_ALIGNMENT, quantized_linear
from lowvram_lab.engine.load import load, replan
from lowvram_lab.errors import CheckpointError, PlanError
from lowvram_lab.files import cache_dir
from lowvram_lab.memory import disk
from lowvram_lab.memory.cuda import open_gpu
from lowvram_lab.model.formats import get_format
from lowvram_lab.model.plan import Plan
from lowvram_lab.model.source import find_source
from lowvram_lab.model.spec import ModelSpec
from lowvram_lab.planner.forecast import forecast
from lowvram_lab.planner.measure import run_workload
from lowvram_lab.planner.profile import Workload
from tests.helpers.checkpoints import write_model
from tests.helpers.tiny import load_tiny, random_ids, relative_error, tiny_config, tiny_plan, tiny_spec

FORMATS = ("bf16", "int8", "int4", "int4+4", "int3", "nf4")
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/maps")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LOWVRAM_CACHE", str(tmp_path / "cache"))


def on_disk(kind="qwen2", recipe="int8", gpu=1, count=2) -> Plan:
    return tiny_plan(kind, recipe).with_gpu_layers(gpu, disk=count)


@torch.no_grad()
def answer(model, tokens=20):
    return prefill(model, random_ids(tokens), PreallocatedCache(model)).cpu()


def mapped_files(tensor: torch.Tensor) -> list[str]:
    """What file, if any, the system says lies at a tensor's address."""
    with open("/proc/self/maps", encoding="utf-8") as maps:
        for line in maps:
            start, end = (int(part, 16) for part in line.split()[0].split("-"))
            if start <= tensor.data_ptr() < end:
                return [name for name in line.split(maxsplit=5)[5:] if name.startswith("/")]
    return []


@linux
@pytest.mark.parametrize("recipe", FORMATS)
def test_weights_on_disk_are_mapped_and_those_in_ram_are_not(recipe):
    model = load_tiny("qwen2", on_disk(recipe=recipe, gpu=0, count=2))
    for index, layer in enumerate(model.model.layers):
        for tensor in (*layer.parameters(), *layer.mlp.up_proj.buffers()):
            assert bool(mapped_files(tensor)) == (index < 2)
            if index < 2:
                assert str(cache_dir()) in mapped_files(tensor)[0]
                assert tensor.data_ptr() % disk.ALIGNMENT == 0
    assert [model.hf_device_map[f"model.layers.{n}"] for n in range(3)] == ["disk", "disk", "cpu"]
    assert list((cache_dir() / "mapped").iterdir()) == []  # their names are gone already


@linux
@pytest.mark.parametrize("layers", [3, 0])
def test_low_planes_alone_can_be_on_disk(layers):
    plan = tiny_plan("qwen2", "int4+4").with_modules("*", low="disk").with_gpu_layers(layers)
    model = load_tiny("qwen2", plan)
    for layer in model.model.layers:
        for projection in (layer.self_attn.q_proj, layer.mlp.up_proj):
            assert all(str(cache_dir()) in mapped_files(tensor)[0] for tensor in projection.low.buffers())
            assert not any(mapped_files(tensor) for tensor in projection.buffers(recurse=False))
        assert not mapped_files(layer.self_attn.q_proj.bias)
    assert list((cache_dir() / "mapped").iterdir()) == []


@linux
def test_a_checkpoints_own_bytes_are_mapped_where_they_are(tmp_path):
    folder = write_model(tmp_path / "model", "qwen2")
    source = find_source(folder)
    spec = source.spec(str(folder))
    plan = Plan.uniform(spec, "bf16", context=64).with_gpu_layers(0, disk=3)
    model = load(plan, open_gpu("64MiB"), progress=False)
    assert "model.safetensors" in mapped_files(model.model.layers[0].mlp.up_proj.weight)[0]
    assert not (cache_dir() / "mapped").exists()
    other = load(replace(plan, dtype="bf16").with_gpu_layers(0, disk=0), open_gpu("64MiB"), progress=False)
    assert relative_error(answer(model), answer(other)) == 0


@pytest.mark.parametrize("recipe", FORMATS)
def test_the_gpus_forecast_knows_nothing_of_the_disk(recipe):
    spec, plan, gpu = tiny_spec("qwen2"), on_disk(recipe=recipe), open_gpu("64MiB")
    foretold = forecast(plan, gpu, workload=Workload(30, 2))
    measured = run_workload(load_tiny("qwen2", plan, gpu), Workload(30, 2))
    if gpu.simulated:
        assert foretold.peak_allocated_bytes == measured.peak_allocated_bytes
        assert foretold.transferred_bytes == measured.transferred_bytes
    size = sum(plan.module_bytes(module) for module in spec.modules if module.layer in (0, 1))
    assert foretold.disk_weights_bytes == measured.disk_weights_bytes == size
    assert foretold.to_dict()["disk_weights_bytes"] == size
    assert sum(plan.weight_bytes(device) for device in ("gpu", "cpu", "disk")) == plan.weight_bytes()


def test_replan_moves_layers_to_disk_and_back():
    model, ram = load_tiny("qwen2", on_disk(count=0)), None
    ram = answer(model)
    for plan in (on_disk(count=1), on_disk(count=2), on_disk(gpu=3, count=0), on_disk(gpu=0, count=3)):
        replan(model, plan, progress=False)
        assert relative_error(answer(model), ram) < 1e-6
        assert list(model.hf_device_map.values()).count("disk") == plan.layer_devices().count("disk")


def test_layers_stay_on_disk_when_others_move():
    spec, plan = tiny_spec("qwen2"), on_disk(gpu=1, count=1)
    assert plan.layer_devices() == ["disk", "cpu", "gpu"]
    assert plan.with_gpu_layers(2).layer_devices() == ["disk", "gpu", "gpu"]
    assert plan.with_gpu_layers(0).layer_devices() == ["disk", "cpu", "cpu"]
    assert plan.with_gpu_layers(3).layer_devices() == ["gpu"] * 3
    assert plan.layer_places() == ["cpu", "cpu", "gpu"]
    assert plan.kv_bytes(10, "cpu") == 2 * plan.kv_bytes(10, "gpu")
    for count in (3, -1, True, 1.0):
        with pytest.raises(PlanError, match="expected disk layers for tiny-qwen2 beside 1 on the GPU from 0 to 2"):
            plan.with_gpu_layers(1, disk=count)
    assert "on disk" not in plan.summary()
    assert plan.summary().endswith("+ 0.1 MiB disk")
    assert "embedding on disk" in plan.with_modules(spec.embedding, device="disk").summary()
    assert Plan.from_json(plan.to_json(), plan.spec) == plan
    mapped = tiny_plan("qwen2").with_device_map({"": 0, "model.layers.0": "disk"})
    assert mapped.layer_devices() == ["disk", "gpu", "gpu"]


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(monkeypatch):
    monkeypatch.setattr(room.shutil, "disk_usage", lambda path: type("", (), {"free": 1000}))
    for plan in (on_disk(), tiny_plan("qwen2", "int4+4").with_modules("*", low="disk")):
        with pytest.raises(CheckpointError, match=r"take 0.2 MiB, found 1000 B free; set LOWVRAM_CACHE"):
            load_tiny("qwen2", plan)
    assert list((cache_dir() / "mapped").iterdir()) == []


def test_a_disk_that_fails_is_named_and_leaves_nothing(monkeypatch):
    def full(file, tensor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(disk, "_append", full)
    with pytest.raises(CheckpointError, match="cannot be written: .*No space left"):
        load_tiny("qwen2", on_disk())
    assert list((cache_dir() / "mapped").iterdir()) == []


def test_where_open_files_keep_their_names_they_go_with_the_model(monkeypatch):
    monkeypatch.setattr(disk, "UNNAMED", False)
    held = disk.WeightsOnDisk()
    modules = [torch.nn.Linear(8, 8), torch.nn.Linear(4, 4, bias=False)]
    expected = [{key: value.clone() for key, value in module.state_dict().items()} for module in modules]
    for module in modules:
        held.map(module)
    for module, weights in zip(modules, expected, strict=True):
        assert all(torch.equal(weights[key], value) for key, value in module.state_dict().items())
        assert not any(parameter.requires_grad for parameter in module.parameters())
    files = list((cache_dir() / "mapped").iterdir())
    assert len(files) == 2
    del held, modules, module
    assert not any(file.exists() for file in files)


def test_an_int8_weight_that_the_kernel_could_not_read_is_copied():
    """Mapped from safetensors it may begin at any multiple of 8 bytes; several rows would then end the process."""
    layer = quantized_linear(128, 64, get_format("int8"), "cpu")
    block = torch.zeros(64 * 128 + 64, dtype=torch.int8)
    start = 8 + -block.data_ptr() % INT8_ALIGNMENT
    weight = block[start : start + 64 * 128].view(64, 128)
    weight.copy_(torch.randint(-127, 127, (64, 128)))
    layer.fill({"weight": weight, "scale": torch.full((64,), 0.5, dtype=torch.bfloat16)}, lambda tensor: tensor)
    assert layer.weight.data_ptr() % INT8_ALIGNMENT == 0
    x = torch.randn(20, 128)
    assert relative_error(layer(x), x @ weight.float().T * 0.5) < 0.02


RUN = """
import sys
import torch
torch.set_num_threads(1)
from lowvram_lab.engine.load import load
from lowvram_lab.memory import disk
from lowvram_lab.memory.cuda import open_gpu
from lowvram_lab.memory.host import give_back_heap
from lowvram_lab.model.plan import Plan
from lowvram_lab.model.source import find_source
from lowvram_lab.model.spec import ModelSpec
source = find_source(sys.argv[1])
spec = source.spec()
plan = Plan.uniform(spec, "int8", context=64).with_modules("*", device="cpu")
plan = plan.with_gpu_layers(0, disk=int(sys.argv[2]))
model = load(plan, open_gpu("64MiB"), progress=False)
give_back_heap()
with open("/proc/self/status") as status:
    print(next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon")))
"""


@linux
def test_what_lies_on_disk_takes_no_anonymous_memory(tmp_path):
    changes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 4, "num_attention_heads": 8}
    folder = write_model(tmp_path / "model", "qwen2", **changes)
    spec = ModelSpec.from_config(tiny_config("qwen2", **changes), "wide")
    layers = sum(Plan.uniform(spec, "int8", context=64).module_bytes(m) for m in spec.modules if m.layer is not None)
    held = [
        int(
            json.loads(
                subprocess.run([sys.executable, "-c", RUN, folder, str(n)], capture_output=True, check=True).stdout
            )
        )
        for n in (0, 4)
    ]
    assert held[0] - held[1] > 0.8 * layers
