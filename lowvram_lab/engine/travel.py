"""Bring the weights of CPU layers to the GPU for a long prompt: one layer ahead of the computation.

A layer on the CPU reads its weights once, whatever the length of the prompt, but its arithmetic grows with every token;
on the GPU the arithmetic is next to nothing, and the weights have to travel. So from some length on it is cheaper to
send weights than to compute where they are (``planner.speed.stream_threshold`` says from which).

Two buffers on the GPU take turns: while one layer computes in the first, the next one's weights arrive in the second.
The layer's keys and values go back to the CPU, where its decoding finds them.

Derived in: notebooks/05_split_the_layers.ipynb
"""

import contextlib
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from transformers import Cache

from lowvram_lab.engine.layers import QuantizedLinear
from lowvram_lab.memory.cuda import PinnedBlock
from lowvram_lab.memory.gpu import Gpu
from lowvram_lab.model.plan import Plan

BUFFERS = 2
ALIGNMENT = 512
"""Bytes; where a tensor may begin in a buffer: as CUDA's allocator has it, so that every kernel is content."""


class _Travelling:
    """The weights of one layer: where they are, and where they go in a buffer.

    Attributes:
        index: Which decoder layer it is.
        slots: Of each tensor: the dictionary of its module that holds it, its key, and its first byte in the buffer.
        size_bytes: Of the whole layer in a buffer.
    """

    def __init__(self, block: torch.nn.Module, index: int):
        self.index, self.slots, self.size_bytes = index, [], 0
        self.pinned: PinnedBlock | None = None
        # weakly: what ``Placement`` wraps around a block must not hold it, or a deleted model would keep its memory
        self._quantised = [weakref.ref(module) for module in block.modules() if isinstance(module, QuantizedLinear)]
        for module in block.modules():
            for held in (module._parameters, module._buffers):
                for key, tensor in held.items():
                    if tensor is not None:
                        self.slots.append((held, key, self.size_bytes))
                        self.size_bytes += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT

    def gather(self, blocks: list[PinnedBlock]) -> None:
        """Lays the layer's tensors side by side in page-locked memory: one copy brings them all, beside other work."""
        self.pinned = PinnedBlock(self.size_bytes)
        blocks.append(self.pinned)
        for (held, key, _), view in zip(self.slots, self.views(self.pinned.tensor), strict=True):
            view.copy_(held[key])
            self._put(held, key, view)

    def views(self, buffer: torch.Tensor) -> list[torch.Tensor]:
        """The layer's tensors as parts of a buffer."""
        found = []
        for held, key, start in self.slots:
            tensor = held[key]
            found.append(buffer[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape))
        return found

    def pairs(self, buffer: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """What to copy where, to have the layer in a buffer."""
        if self.pinned is not None:
            return [(buffer[: self.size_bytes], self.pinned.tensor)]
        return [(view, held[key].detach()) for (held, key, _), view in zip(self.slots, self.views(buffer), strict=True)]

    @contextmanager
    def computing_in(self, buffer: torch.Tensor, kernels: str) -> Iterator[None]:
        """Lets the block use its weights in a buffer, with the kernels of where the buffer is."""
        quantised = [reference() for reference in self._quantised]
        at_home = [held[key] for held, key, _ in self.slots], [module.kernels for module in quantised]
        try:
            for (held, key, _), view in zip(self.slots, self.views(buffer), strict=True):
                self._put(held, key, view)
            for module in quantised:
                module.kernels = kernels
            yield
        finally:
            for (held, key, _), tensor in zip(self.slots, at_home[0], strict=True):
                held[key] = tensor
            for module, before in zip(quantised, at_home[1], strict=True):
                module.kernels = before

    @staticmethod
    def _put(held: dict, key: str, tensor: torch.Tensor) -> None:
        is_parameter = isinstance(held[key], torch.nn.Parameter)
        held[key] = torch.nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor


class TravellingWeights:
    """The layers of a model whose weights come to the GPU for a long prompt.

    Args:
        model: A model whose weights are where its plan says.
        devices: Of its blocks; those without weights (rotary embedding) come along.
        plan: Says which layers, and from how many tokens on (``stream_from``).
        gpu: The ``Gpu`` they come to.
    """

    def __init__(self, model: torch.nn.Module, devices: dict[str, str], plan: Plan, gpu: Gpu):
        self.gpu, self.threshold = gpu, plan.stream_from
        self._layers: dict[str, _Travelling] = {}
        pinned: list[PinnedBlock] = []
        # before the first is locked: neither a model dropped without ``remove`` nor an interrupt leaves one locked
        self.close = weakref.finalize(self, _unlock, gpu, pinned)
        self._buffers: list[torch.Tensor] = []
        self._copied: dict[int, object] = {}
        self._new_tokens = 0
        for index, device in enumerate(plan.layer_devices()):
            if device != "gpu" and self.threshold is not None:
                path = f"{plan.spec.layers_path}.{index}"
                self._layers[path] = layer = _Travelling(model.get_submodule(path), index)
                places = {place for m in plan.spec.modules if m.layer == index for place in plan.modules[m.name].places}
                if places == {"cpu"} and not gpu.simulated:  # from disk it comes as it is; the stand-in has it in RAM
                    layer.gather(pinned)
        self._order = list(self._layers.values())
        tables = {path: model.get_submodule(path) for path, device in devices.items() if device == "cpu"}
        self._tables = {
            path: block._buffers
            for path, block in tables.items()
            if not any(True for _ in block.parameters(recurse=False))
        }

    def __contains__(self, path: str) -> bool:
        """Whether this layer's weights are travelling at present."""
        return bool(self._buffers) and path in self._layers

    def place(self, path: str, usual: str) -> str:
        """Where any other block computes at present."""
        return "gpu" if self._buffers and path in self._tables else usual

    @contextmanager
    def opened_for(self, ids: torch.Tensor | None, can_visit: bool) -> Iterator[bool]:
        """Makes the buffers, if a forward pass is worth it, and frees them in the end; yields whether weights travel.

        Args:
            ids: Of the pass, ``(batch, tokens)`` or embedded; a single token never is.
            can_visit: See ``cache_can_visit``.
        """
        decoding = ids is None or ids.shape[1] < 2  # of a batch too: one token of each computes where the layer is
        tokens = 0 if decoding else ids.shape[0] * ids.shape[1]
        if not self._order or tokens < self.threshold or not self.gpu.moves or not can_visit:
            yield False
            return
        largest = max(layer.size_bytes for layer in self._order)
        tables = [(held, key, table) for held in self._tables.values() for key, table in held.items()]
        try:
            with self.gpu.meter.scope(owner="weights in flight", category="weights"):
                for held, key, table in tables:
                    held[key] = self.gpu.move(table, "gpu")
                for _ in range(min(BUFFERS, len(self._order))):
                    self._buffers.append(self.gpu.buffer(largest))
            for turn in range(len(self._buffers)):
                self._fetch(turn)
            self._new_tokens = ids.shape[1]
            yield True
        finally:
            self.gpu.settle()  # after an error one may still be arriving
            self._copied.clear()
            self._buffers.clear()
            for held, key, table in tables:
                held[key] = table

    @contextmanager
    def visiting(self, path: str, cache: Cache | None) -> Iterator[None]:
        """Lets a layer compute on the GPU: its weights in a buffer, its keys and values with it until it is done."""
        layer = self._layers[path]
        turn = self._order.index(layer)
        if turn not in self._copied:  # layers out of their order
            self._fetch(turn)
        self.gpu.wait_for(self._copied.pop(turn))
        buffer = self._buffers[turn % len(self._buffers)]
        with (
            layer.computing_in(buffer, self.gpu.kernels_of("gpu")),
            self.gpu.meter.scope(category="kv"),
            cache.layers[layer.index].visiting(self.gpu, self._new_tokens) if cache is not None else nullcontext(),
            self.gpu.meter.scope(category="activations"),
        ):
            yield
        if turn + len(self._buffers) < len(self._order):
            self._fetch(turn + len(self._buffers))

    def _fetch(self, turn: int) -> None:
        buffer = self._buffers[turn % len(self._buffers)]
        # the buffer is free when what has been computed so far is done
        self._copied[turn] = self.gpu.copy_ahead(self._order[turn].pairs(buffer), after=self.gpu.mark())


def cache_can_visit(cache: Cache | None, made_inside: bool) -> bool:
    """Whether every layer of a KV cache may go to the GPU and come back; transformers' own cannot.

    Where a model's forward is given none, ``made_inside`` says whether it makes one of these.
    """
    if cache is None:
        return not made_inside
    return bool(cache.layers) and all(getattr(layer, "can_visit", False) for layer in cache.layers)


def _unlock(gpu: Gpu, blocks: list[PinnedBlock]) -> None:
    """Page-locked memory becomes ordinary memory; the weights stay where they are."""
    with contextlib.suppress(RuntimeError):  # CUDA may be gone at the end of the process
        gpu.settle(wait=True)
        for block in blocks:
            block.unlock()
