"""Shows that the fake works with the torch at hand: ``fakecuda python check.py``, FAKE_CUDA_ARITHMETIC=1 or not."""

import ctypes
import os

import torch
from torch.nn import functional as F

library = ctypes.CDLL(None)
library.fakecuda_get.restype = ctypes.c_longlong
GiB, computes = 1 << 30, os.environ.get("FAKE_CUDA_ARITHMETIC") == "1"


def counter(name):
    """One of the fake's counters."""
    return library.fakecuda_get(name.encode())


def raises(kind, call):
    """Whether the call raises."""
    try:
        call()
    except kind as error:
        return str(error)
    raise AssertionError(f"no {kind.__name__}")


assert torch.cuda.is_available() and "fake" in torch.cuda.get_device_name()
free, total = torch.cuda.mem_get_info()
assert free <= total

held = torch.empty(64 << 20, dtype=torch.uint8, device="cuda")
assert torch.cuda.memory_allocated() == torch.cuda.memory_reserved() == counter("device_bytes") == 64 << 20
del held
torch.cuda.empty_cache()
assert counter("device_bytes") == 0
too_much = raises(torch.OutOfMemoryError, lambda: torch.empty(total + GiB, dtype=torch.uint8, device="cuda"))
assert "CUDA out of memory" in too_much
torch.cuda.set_per_process_memory_fraction(0.25)
assert "allowed" in raises(torch.OutOfMemoryError, lambda: torch.empty(total // 2, dtype=torch.uint8, device="cuda"))
torch.cuda.set_per_process_memory_fraction(1.0)

back = torch.arange(10).cuda().cpu()  # copies are real, with and without arithmetic
assert back.tolist() == list(range(10))
pinned, before = torch.ones(1 << 20).pin_memory(), counter("h2d_pinned_bytes")
stream, done = torch.cuda.Stream(), torch.cuda.Event()
with torch.cuda.stream(stream):
    there = pinned.to("cuda", non_blocking=True)
    done.record()
torch.cuda.current_stream().wait_event(done)
assert counter("h2d_pinned_bytes") - before == pinned.nbytes and there.cpu().sum() == 1 << 20

torch.cuda.empty_cache()
torch.cuda.memory._set_allocator_settings("expandable_segments:True")  # a tensor over several mapped pages
many = torch.arange(50 << 20, dtype=torch.uint8)
assert torch.equal(many.cuda().cpu(), many) and counter("device_bytes") >= 3 * 20 << 20
torch.cuda.empty_cache()
torch.cuda.memory._set_allocator_settings("expandable_segments:False")

a, b = torch.randn(64, 64), torch.randn(64, 64)
q = torch.randn(1, 4, 32, 64, dtype=torch.float16)
with torch.no_grad():
    products = {
        "mm": (lambda: a.cuda() @ b.cuda(), a @ b),
        "layer_norm": (lambda: F.layer_norm(a.cuda(), (64,)), F.layer_norm(a, (64,))),
        "mask": (lambda: a.cuda()[a.cuda() > 0], a[a > 0]),
        "attention": (lambda: F.scaled_dot_product_attention(*[q.cuda()] * 3, is_causal=True).float(),
                      F.scaled_dot_product_attention(*[q.float()] * 3, is_causal=True)),
    }  # fmt: skip
    if not computes:
        del products["mask"]  # its size would be arbitrary
    for name, (call, expected) in products.items():
        found = call().cpu()
        assert not computes or torch.allclose(found, expected, atol=2e-3), name

    layer, x = torch.nn.Linear(64, 64, device="cuda"), torch.zeros(4, 64, device="cuda")
    with torch.cuda.stream(stream):
        layer(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        y = layer(x).relu()
    x.copy_(torch.randn(4, 64))
    launched = counter("launches")
    graph.replay()
    assert counter("launches") - launched == 2
    expected = F.linear(x.cpu(), layer.weight.cpu(), layer.bias.cpu()).relu()
    assert not computes or torch.allclose(y.cpu(), expected, atol=1e-5)

torch.cuda.memory._record_memory_history(enabled="all", context=None)
torch.empty(3 << 20, device="cuda")
actions = [entry["action"] for entry in torch.cuda.memory._snapshot()["device_traces"][0]]
assert actions[-3:] == ["alloc", "free_requested", "free_completed"], actions
print("all is as it should be", {name: counter(name) for name in ("launches", "library_calls", "mallocs", "stubs")})
