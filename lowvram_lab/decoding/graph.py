"""One decoded token on a CUDA card as a graph: captured once for a length, then replayed without Python or allocation.

A graph's shapes are fixed: it looks at a power of two of the cache's places, and a mask hides those that hold nothing
yet. The graphs of all lengths share one memory pool, which the longest, captured first, makes as large as it gets.

What a token costs is in the graph as far as it is on the card: the lookup of its embedding, the layers, the head, the
likeliest next token, and the step to the next position. A greedy answer is one launch a token, and one read.
"""

from collections.abc import Callable

import torch

from lowvram_lab.decoding.llama_layer import LayerShape, Masked, llama_layer
from lowvram_lab.memory.cuda import CudaGraphs
from lowvram_lab.memory.dry_run import DryGraphs

SHORTEST = 256
"""Fewest places a graph looks at."""

_WARM_UPS = 3


class GraphedStep:
    """What of one token of each sequence is computed on the card.

    Args:
        layers: Shape and tensors of each layer, as ``layer`` wants them.
        lookup: Token ids ``(batch, 1)`` → hidden states ``(batch, hidden)`` float32; ``None`` where layers off the card
            come before.
        head: Hidden states → logits ``(batch, vocab)``; ``None`` where layers off the card come behind.
        tables: Cosines and sines, ``(room, head_dim)`` float32 each; the first half of the sines negative.
        batch_size: Sequences.
        hidden_size: Features.
        graphs: What to capture with (``Gpu.graphs``); without, the same is run operation by operation, which any device
            can. A dry run's counts what capturing allocates.

    Attributes:
        capture: Whether there are graphs: not where they found no room.
        result: What the latest call returned; before, what the longest graph will.
        likeliest: The likeliest token of each sequence's latest logits, ``(batch, 1)`` int64.
    """

    def __init__(
        self,
        layers: list[tuple[LayerShape, list]],
        lookup: Callable | None,
        head: Callable | None,
        tables: tuple[torch.Tensor, torch.Tensor],
        batch_size: int,
        hidden_size: int,
        graphs: CudaGraphs | DryGraphs | None,
    ):
        self.layers, self.lookup, self.head, self._capturer = layers, lookup, head, graphs
        self.capture = graphs is not None
        self.cos, self.sin = tables
        device = self.cos.device
        self._places = torch.arange(self.cos.shape[0], device=device)
        self.likeliest = torch.zeros(batch_size, 1, dtype=torch.long, device=device)
        # the likeliest token is where the next call looks for its own
        self._given = self.likeliest if lookup else torch.zeros(batch_size, hidden_size, device=device)
        self._at = torch.zeros(1, dtype=torch.long, device=device)
        self._position = None  # what is in ``_at``
        self._graphs: dict[int, tuple] = {}
        self.result = None

    def __call__(self, given: torch.Tensor, position: int) -> torch.Tensor:
        """Decodes one token of each sequence.

        Args:
            given: Token ids or hidden states, as ``lookup`` says, on any device. Where they are ``likeliest`` itself,
                and one position after the other, nothing is copied.
            position: How many tokens the cache holds.

        Returns:
            Logits ``(batch, vocab)``, or hidden states without a head; the next call writes over them.
        """
        length = min(max(SHORTEST, 1 << position.bit_length()), len(self._places))
        if position != self._position:
            self._at.fill_(position)
            self._position = position
        if given is self._given and self.capture and length not in self._graphs:
            given = given.clone()  # the runs before capturing write over it
        self._prepare(length)
        if given is not self._given:
            self._given.copy_(given, non_blocking=True)  # pageable memory: CUDA has read it when the call returns
        if self.capture:
            graph, self.result = self._graphs[length]
            if graph is not None:  # a dry run's holds nothing to replay
                graph.replay()
            self._position += 1
        else:  # the temporaries of one layer at a time need less than a graph's pool
            self.result = self._run(length)
        return self.result

    def prepare(self) -> None:
        """Captures the longest graph."""
        length = len(self._places)
        self._prepare(length)
        if self.capture:
            _, self.result = self._graphs[length]

    def _prepare(self, length: int) -> None:
        if self.capture and length not in self._graphs:
            try:
                self._graphs[length] = self._captured(length)
            except torch.OutOfMemoryError:
                self.capture, self._graphs, self._capturer = False, {}, None

    def _run(self, length: int, layers: list[tuple[LayerShape, list]] | None = None) -> torch.Tensor:
        cos, sin = (table.index_select(0, self._at)[0] for table in (self.cos, self.sin))
        mask = torch.zeros(length, device=cos.device).masked_fill_(self._places[:length] > self._at, -torch.inf)
        hidden = self.lookup(self._given) if self.lookup else self._given
        for shape, tensors in layers or self.layers:
            hidden = llama_layer(shape, hidden, cos, sin, tensors, length, Masked(self._at, mask))
        if not self.head:
            return hidden
        logits = self.head(hidden)
        torch.argmax(logits, dim=-1, keepdim=True, out=self.likeliest)
        return logits

    def _captured(self, length: int) -> tuple:
        """Runs a few times first; each run writes what replay writes."""
        layers = self.layers
        if self._at.is_meta:  # those of one shape take the same, one after the other's result
            kinds = {shape: [layer for layer in layers if layer[0] == shape] for shape, _ in layers}
            layers = [layer for alike in kinds.values() for layer in alike[:2]]
        with self._capturer.warming_up():
            for _ in range(_WARM_UPS):
                self._run(length, layers)
        with self._capturer.capturing() as graph:
            result = self._run(length, layers)
            self._at.add_(1)
        return graph, result
