"""Machines of made-up rates, in the place of a measured ``Machine``; and what is forecast for the CPU's kernels."""

from dataclasses import replace

from lowvram_lab.memory.budget import GpuBudget
from lowvram_lab.memory.gpu import Gpu, StandInGpu
from lowvram_lab.rates.any_machine import AnyMachine
from lowvram_lab.rates.figures import (
    AttentionRates,
    DiskRates,
    KernelRates,
    LinkRates,
    ProductRates,
    PromptRates,
    TokenRates,
)
from lowvram_lab.rates.target import Target
from lowvram_lab.timing import Circumstances


def stand_in(gpu=None):
    """A size as a budget on which the CPU's kernels run, wherever this is tested; an opened GPU as it is."""
    if gpu is None:
        return StandInGpu(None)
    if isinstance(gpu, dict):
        return {place: stand_in(size) if place == 0 else size for place, size in gpu.items()}
    return gpu if isinstance(gpu, Gpu) else replace(GpuBudget.parse(gpu), kernels="cpu")


class Made(AnyMachine):
    """A machine of made-up rates that notes what it is asked."""

    name = "an imagined machine"

    def __init__(self, link=None):
        self.cuda, self._link, self.asked = link is not None, link, []

    def kernel(self, fmt, place="cpu", threads=None, shared=False):
        self.asked.append(("kernel", fmt, place, threads))
        return KernelRates(1e-6, 2e-9 if place == "cpu" else 1e-9, 1e-11)

    def product(self, engine, fmt, shape, place="cpu", threads=None, shared=False):
        self.asked.append(("product", engine, fmt, place, threads))
        return ProductRates(5e-10 if place == "cpu" else 4e-10)

    def prompt(self, kv_format, dtype="bf16", place="cpu", threads=None):
        self.asked.append(("prompt", kv_format, dtype, place, threads))
        return PromptRates(1e-4, 2e-4, 1e-8, 1e-10)

    def token(self, engine, fmt, kv_format, dtype="bf16", place="cpu", threads=None):
        self.asked.append(("token", engine, fmt, kv_format, dtype, place, threads))
        return TokenRates(5e-5, 3e-5)

    def attention(self, engine, kv_format, dtype="bf16", place="cpu", threads=None, fmt=None):
        self.asked.append(("attention", engine, kv_format, dtype, place, threads))
        return AttentionRates(3e-10, 4e-10)

    def link(self):
        return self._link

    def disk(self):
        return DiskRates(1e9)

    def circumstances(self):
        return Circumstances(measured_at=0.0)


class Flat(Made):
    """A machine whose linear layers take so many nanoseconds a weight in a format, on the GPU a tenth of that."""

    def __init__(self, nanoseconds):
        super().__init__()
        self.nanoseconds = nanoseconds

    def _weight_s(self, fmt, place):
        return 1e-9 * self.nanoseconds.get(fmt, 1.0) * (0.1 if place == "gpu" else 1)

    def kernel(self, fmt, place="cpu", threads=None, shared=False):
        return KernelRates(0.0, self._weight_s(fmt, place), 0.0)

    def product(self, engine, fmt, shape, place="cpu", threads=None, shared=False):
        return ProductRates(self._weight_s(fmt, place))

    def prompt(self, kv_format, dtype="bf16", place="cpu", threads=None):
        return PromptRates(0.0, 1e-9, 0.0, 0.0)

    def token(self, engine, fmt, kv_format, dtype="bf16", place="cpu", threads=None):
        return TokenRates(0.0, 1e-9)

    def attention(self, engine, kv_format, dtype="bf16", place="cpu", threads=None, fmt=None):
        return AttentionRates(0.0, 0.0)


LINK = LinkRates(to_gpu=5e7, to_gpu_pinned=1e8, to_cpu=4e9, to_cpu_pinned=2e10, crossing_s=2e-5)  # for tiny layers


class Card(Made):
    """A machine with a card: its arithmetic is a hundred times the CPU's, its link ``LINK``, its disk 1 GB/s."""

    name = "an imagined card"

    def __init__(self, link=LINK):
        super().__init__(link)

    def kernel(self, fmt, place="cpu", threads=None, shared=False):
        return KernelRates(1e-6, 1e-10, 1e-12 if place == "gpu" else 1e-10)

    def product(self, engine, fmt, shape, place="cpu", threads=None, shared=False):
        return ProductRates(1e-10)

    def prompt(self, kv_format, dtype="bf16", place="cpu", threads=None):
        return PromptRates(1e-4, 2e-4, 1e-9, 1e-11)

    def token(self, engine, fmt, kv_format, dtype="bf16", place="cpu", threads=None):
        return TokenRates(1e-4, 2e-4)


BOARD = Target(
    name="board",
    title="an imagined board",
    processor="2 cores at 1 GHz",
    instructions="neon",
    cores=2,
    clock_hz=10**9,
    lanes=4,
    dense_products_per_s=2 * 10**9,
    memory_bytes_per_s=4 * 10**9,
    disk_bytes_per_s=10**8,
    ram_bytes=4 << 30,
    reserved_bytes=1 << 30,
    sources={"cores": "made up"},
)
"""A target of round figures."""
