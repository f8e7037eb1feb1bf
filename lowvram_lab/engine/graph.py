"""One decoded token on a CUDA card as a graph: captured once for a length, then replayed without Python or allocation.

A graph's shapes are fixed: it looks at a power of two of the cache's places, and a mask hides those that hold nothing
yet. The graphs of all lengths share one memory pool, which the longest, captured first, makes as large as it gets.
"""

from collections.abc import Callable

import torch

from lowvram_lab.engine.llama_layer import LayerShape, Masked, llama_layer
from lowvram_lab.memory.cuda import CudaGraphs
from lowvram_lab.memory.dry_run import DryGraphs

SHORTEST = 256
"""Fewest places a graph looks at."""

_WARM_UPS = 3


class GraphedStep:
    """All layers and the head for one token of each sequence.

    Args:
        layers: Shape and tensors of each layer, as ``layer`` wants them.
        head: Hidden states ``(batch, hidden)`` float32 → logits ``(batch, vocab)``.
        cos: ``(room, head_dim)`` float32.
        sin: The same; its first half negative.
        batch_size: Sequences.
        hidden_size: Features.
        graphs: What to capture with (``Gpu.graphs``); without, the same is run operation by operation, which any device
            can. A dry run's counts what capturing allocates.

    Attributes:
        capture: Whether there are graphs: not where they found no room.
    """

    def __init__(
        self,
        layers: list[tuple[LayerShape, list]],
        head: Callable,
        cos: torch.Tensor,
        sin: torch.Tensor,
        batch_size: int,
        hidden_size: int,
        graphs: CudaGraphs | DryGraphs | None,
    ):
        self.layers, self.head, self.cos, self.sin, self._capturer = layers, head, cos, sin, graphs
        self.capture = graphs is not None
        self._places = torch.arange(cos.shape[0], device=cos.device)
        self._hidden = torch.zeros(batch_size, hidden_size, device=cos.device)
        self._at = torch.zeros(1, dtype=torch.long, device=cos.device)
        self._graphs: dict[int, tuple] = {}

    def __call__(self, hidden: torch.Tensor, position: int) -> torch.Tensor:
        """Decodes one token of each sequence.

        Args:
            hidden: Its embedding, ``(batch, hidden)``, on any device.
            position: How many tokens the cache holds.

        Returns:
            Logits ``(batch, vocab)``; the next call writes over them.
        """
        self._hidden.copy_(hidden)
        self._at.fill_(position)
        length = min(max(SHORTEST, 1 << position.bit_length()), len(self._places))
        self._prepare(length)
        if not self.capture:  # the temporaries of one layer at a time need less than a graph's pool
            return self._run(length)
        graph, logits = self._graphs[length]
        if graph is not None:  # a dry run's holds nothing to replay
            graph.replay()
        return logits

    def prepare(self) -> None:
        """Captures the longest graph."""
        self._prepare(len(self._places))

    def _prepare(self, length: int) -> None:
        if self.capture and length not in self._graphs:
            try:
                self._graphs[length] = self._captured(length)
            except torch.OutOfMemoryError:
                self.capture, self._graphs, self._capturer = False, {}, None

    def _run(self, length: int, layers: list[tuple[LayerShape, list]] | None = None) -> torch.Tensor:
        cos, sin = (table.index_select(0, self._at)[0] for table in (self.cos, self.sin))
        mask = torch.zeros(length, device=cos.device).masked_fill_(self._places[:length] > self._at, -torch.inf)
        hidden = self._hidden
        for shape, tensors in layers or self.layers:
            hidden = llama_layer(shape, hidden, cos, sin, tensors, length, Masked(self._at, mask))
        return self.head(hidden)

    def _captured(self, length: int) -> tuple:
        """Runs a few times first; each run writes what replay writes."""
        layers = self.layers
        if self._hidden.is_meta:  # those of one shape take the same, one after the other's result
            kinds = {shape: [layer for layer in layers if layer[0] == shape] for shape, _ in layers}
            layers = [layer for alike in kinds.values() for layer in alike[:2]]
        with self._capturer.warming_up():
            for _ in range(_WARM_UPS):
                self._run(length, layers)
        with self._capturer.capturing() as graph:
            logits = self._run(length, layers)
        return graph, logits
