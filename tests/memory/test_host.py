"""The host's side: what the system says is resident, mapped files told apart, and the forecast of a load."""

import json
import mmap
import os
import subprocess
import sys
import threading
import time

import psutil
import pytest
import torch

from lowvram_lab.memory.host import HostMemory, watch_host
from lowvram_lab.model.host_bytes import forecast_load_bytes
from lowvram_lab.model.plan import Plan
from lowvram_lab.model.spec import ModelSpec
from lowvram_lab.units import MiB
from tests.helpers.tiny import tiny_config

SLACK = 16 * MiB  # other threads of this process, malloc's arenas, the sampler itself
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells file-backed pages apart")


def wait_until(holds, seconds=20):
    """The sampler runs in a thread of its own: gives it time on a busy machine."""
    end = time.monotonic() + seconds
    while not holds() and time.monotonic() < end:
        time.sleep(0.01)


def resident(size):
    """Anonymous memory that is surely new: malloc would hand out what other tests have freed."""
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    block = mmap.mmap(-1, size, **private)
    piece = b"\1" * MiB
    for _ in range(size // MiB):  # the whole at once would be there twice for a moment, and sometimes be seen
        block.write(piece)
    return block


def test_memory_is_seen_though_it_is_gone_at_the_end():
    with watch_host() as seen:
        block = resident(64 * MiB)
        wait_until(lambda: seen.growth_bytes > 60 * MiB)
        block.close()
    assert 64 * MiB - SLACK < seen.growth_bytes < 64 * MiB + SLACK
    assert seen.growth_bytes == seen.peak_rss_bytes - seen.before_rss_bytes
    assert seen.after_rss_bytes < seen.peak_rss_bytes - 64 * MiB + SLACK
    assert json.loads(json.dumps(seen.to_dict()))["growth_bytes"] == seen.growth_bytes


@linux
def test_anonymous_memory_is_not_the_files():
    before = psutil.Process().memory_info()
    with watch_host() as seen:
        block = resident(64 * MiB)
    assert len(block) == 64 * MiB
    assert abs(seen.peak_anonymous_bytes - (before.rss - before.shared) - 64 * MiB) < SLACK
    assert abs(seen.peak_file_bytes - before.shared) < SLACK


@linux
def test_mapped_pages_are_the_files(tmp_path):
    path = tmp_path / "checkpoint"
    path.write_bytes(bytes(48 * MiB))
    before = psutil.Process().memory_info()
    with (
        watch_host() as seen,
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
    ):
        assert sum(mapped[position] for position in range(0, len(mapped), mmap.PAGESIZE)) == 0  # touches every page
        wait_until(lambda: seen.growth_bytes > 40 * MiB)
    assert abs(seen.peak_file_bytes - before.shared - 48 * MiB) < SLACK
    assert seen.peak_anonymous_bytes - (before.rss - before.shared) < SLACK
    assert seen.after_rss_bytes < seen.peak_rss_bytes - 48 * MiB + SLACK


def test_an_error_inside_ends_the_sampling():
    threads = threading.active_count()
    with pytest.raises(ZeroDivisionError), watch_host() as seen:
        _ = 1 / 0
    assert threading.active_count() == threads
    assert seen.after_rss_bytes > 0
    assert seen.peak_rss_bytes >= seen.before_rss_bytes - SLACK


def test_no_growth_without_work():
    with watch_host() as seen:
        pass
    assert abs(seen.growth_bytes) < SLACK
    assert isinstance(seen, HostMemory)


def mid_config():
    """80 M parameters, 153 MiB in bf16: large beside what malloc keeps, small enough to write and read in seconds."""
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4, "vocab_size": 16000}
    return tiny_config("qwen2", **sizes, num_attention_heads=8, num_key_value_heads=4)


LOADING = """
import json, sys
import torch
from lowvram_lab.engine.load import load
from lowvram_lab.memory.gpu import StandInGpu
from lowvram_lab.model.host_bytes import forecast_load_bytes
from lowvram_lab.memory.host import watch_host
from lowvram_lab.model.plan import Plan
from lowvram_lab.model.source import find_source
from lowvram_lab.model.spec import ModelSpec, build_on_meta
torch.set_num_threads(1)
source = find_source(sys.argv[1])
spec = source.spec()
plan = Plan.uniform(spec, sys.argv[2], context=128)
build_on_meta(spec.pretrained_config())  # what it imports is Python's and transformers', not the model's
checkpoint = source.checkpoint()
with watch_host() as seen:
    model = load(plan, StandInGpu(None), checkpoint=checkpoint, progress=False)
print(json.dumps({**seen.to_dict(), "forecast_bytes": forecast_load_bytes(plan, gpu_in_ram=True)}))
"""


def test_a_load_takes_what_was_forecast(tmp_path):
    from safetensors.torch import save_file

    config = mid_config()
    spec, generator = ModelSpec.from_config(config, "mid"), torch.Generator().manual_seed(0)
    state = {
        f"{module.name}.{key}": torch.empty(shape, dtype=torch.bfloat16).uniform_(-0.05, 0.05, generator=generator)
        for module in spec.modules
        for key, shape in module.parameters.items()
    }
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(tmp_path)
    recipes = ("bf16", "int4")
    # By default glibc keeps what it freed by a rule that adapts as it goes: the int4 load then grew by anything from
    # 119 to 200 MiB, the forecast being 119. A fixed threshold makes it give back, so that the load itself is seen.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(MiB)}
    children = [
        subprocess.Popen(
            [sys.executable, "-c", LOADING, str(tmp_path), recipe],
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for recipe in recipes
    ]
    grown = []
    for recipe, child in zip(recipes, children, strict=True):
        output, _ = child.communicate(timeout=300)
        assert child.returncode == 0
        found = json.loads(output.splitlines()[-1])
        # 25 %: the forecast takes two copies of the largest tensor as in flight at once, and the sampler may miss the
        # moment. Measured here: -16 % and -10 %.
        error = abs(found["growth_bytes"] - found["forecast_bytes"])
        assert error <= 0.25 * found["forecast_bytes"] + SLACK, (recipe, found)
        assert found["growth_bytes"] > Plan.uniform(spec, recipe, context=128).weight_bytes()
        grown.append(found["growth_bytes"])
    assert grown[0] > max(grown[1:])


def test_the_forecast_counts_what_stays_in_ram():
    spec = ModelSpec.from_config(mid_config(), "mid")
    whole = Plan.uniform(spec, "int8", context=128)
    half = whole.with_gpu_layers(2)
    flight = 2 * (16000 * 1024 * 2)  # the embedding, twice
    for plan in (whole, half):
        assert forecast_load_bytes(plan, gpu_in_ram=True) == whole.weight_bytes() + flight
    assert forecast_load_bytes(whole, gpu_in_ram=False) == flight
    assert forecast_load_bytes(half, gpu_in_ram=False) == half.weight_bytes("cpu") + flight
