"""Machines of made-up rates, in the place of a measured ``Machine``."""

from lowvram_lab.planner.rates import DiskRates, KernelRates, LayerRates, LinkRates


class Made:
    """A machine of made-up rates that notes what it is asked."""

    name = "an imagined machine"

    def __init__(self, link=None):
        self.cuda, self._link, self.asked = link is not None, link, []

    def kernel(self, fmt, place="cpu", threads=None, shared=False):
        self.asked.append((fmt, place, threads))
        return KernelRates(1e-6, 2e-9 if place == "cpu" else 1e-9, 1e-11)

    def layer(self, kv_format, dtype="bf16", place="cpu", threads=None):
        self.asked.append((kv_format, dtype, place, threads))
        return LayerRates(1e-4, 2e-4, 1e-8, 1e-10, 3e-10, 4e-10)

    def link(self):
        return self._link


class Flat:
    """A machine whose linear layers take so many nanoseconds a weight in a format, on the GPU a tenth of that."""

    cuda, name = False, "an imagined machine"

    def __init__(self, nanoseconds):
        self.nanoseconds = nanoseconds

    def kernel(self, fmt, place="cpu", threads=None, shared=False):
        return KernelRates(0.0, 1e-9 * self.nanoseconds.get(fmt, 1.0) * (0.1 if place == "gpu" else 1), 0.0)

    def layer(self, kv_format, dtype="bf16", place="cpu", threads=None):
        return LayerRates(0.0, 1e-9, 0.0, 0.0, 0.0, 0.0)

    def link(self):
        return None

    def disk(self):
        return DiskRates(1e9)


LINK = LinkRates(to_gpu=5e7, to_gpu_pinned=1e8, to_cpu=4e9, to_cpu_pinned=2e10, crossing_s=2e-5)  # for tiny layers


class Card:
    """A machine with a card: its arithmetic is a hundred times the CPU's, its link ``LINK``, its disk 1 GB/s."""

    cuda, name = True, "an imagined card"

    def __init__(self, link=LINK):
        self._link = link

    def kernel(self, fmt, place="cpu", threads=None, shared=False):
        return KernelRates(1e-6, 1e-10, 1e-12 if place == "gpu" else 1e-10)

    def layer(self, kv_format, dtype="bf16", place="cpu", threads=None):
        return LayerRates(1e-4, 2e-4, 1e-9, 1e-11, 3e-10, 4e-10)

    def link(self):
        return self._link

    def disk(self):
        return DiskRates(1e9)
