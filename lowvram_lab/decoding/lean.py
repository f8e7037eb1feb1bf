"""A decoder for the Llama family that does as little as possible for a token: one function for all layers.

transformers' forward of a small model spends most of its time between its matrix products: masks, caches, a Python
call for every operation. Here a layer is one plain function of tensors (``llama_layer.py``) on the very weights of a
loaded model. Compiled, everything between two matrix products becomes one loop over memory.

Derived in: notebooks/06_the_engine.ipynb
"""

from __future__ import annotations

import functools
import logging
from collections import Counter
from functools import partial

import torch
from torch import nn

from lowvram_lab.decoding.bind import bind_head, bind_layer
from lowvram_lab.decoding.compiled import open_libraries
from lowvram_lab.decoding.compiling import LEAST_ROOM, Library
from lowvram_lab.decoding.decode import Decoder, ModuleDecoder
from lowvram_lab.decoding.graph import GraphedStep
from lowvram_lab.decoding.kinds import COMPILED, GRAPHS, LEAN, NAMES, why_not
from lowvram_lab.decoding.llama_layer import LayerShape, llama_layer
from lowvram_lab.decoding.workspace import head_bytes, layer_bytes
from lowvram_lab.engine.loaded import loaded
from lowvram_lab.errors import BudgetError, LowvramError
from lowvram_lab.kernels.compiler import compiler, without_compiler
from lowvram_lab.kernels.library import there
from lowvram_lab.machine import cpu_threads
from lowvram_lab.model.plan import compute_place

logger = logging.getLogger(__name__)


def decoder_for(
    model: nn.Module,
    max_tokens: int | None = None,
    batch_size: int = 1,
    *,
    compiled: bool | None = None,
    progress: bool = True,
) -> Decoder:
    """The fastest decoder there is for a loaded model: lean, or by its modules; ``name`` says which, and why.

    Args:
        model: From ``load``, real or a dry run.
        max_tokens: Tokens of prompt and answer; by default the plan's context.
        batch_size: Sequences, all of one length.
        compiled: See ``LeanDecoder``.
        progress: See ``LeanDecoder``.

    Raises:
        LowvramError: The model is not from ``load``.
        torch.OutOfMemoryError: No room for the KV cache and a token's workspace.
    """
    state = loaded(model)
    reason = why_not(state.plan, state.gpu.kernels, max_tokens)
    if reason:
        return ModuleDecoder(model, max_tokens, batch_size, reason)
    return LeanDecoder(model, max_tokens, batch_size, compiled=compiled, progress=progress)


class LeanDecoder(Decoder):
    """Decodes token by token on the weights of a loaded model.

    Takes from the start, within the GPU's budget: the KV cache, rotary tables, logits, and a workspace of the bytes
    that one token's temporaries take (``workspace.py``; on CUDA the graphs' own pool). A dry run takes the same.

    Args:
        model: From ``load``.
        max_tokens: Tokens of prompt and answer; by default the plan's context.
        batch_size: Sequences, all of one length.
        compiled: Whether to compile the layer's function: 10 to 20 s, once for a machine. By default where there is a
            C++ compiler that can.
        progress: Show that it compiles.

    Attributes:
        compiled: Whether it is compiled.
        workspace_bytes: What a token's temporaries take on the GPU.

    Raises:
        LowvramError: The architecture or a format is none of those it knows (``why_not`` says so beforehand); or it was
            to be compiled and there is no compiler.
        torch.OutOfMemoryError: No room for what it takes.
    """

    def __init__(
        self,
        model: nn.Module,
        max_tokens: int | None = None,
        batch_size: int = 1,
        *,
        compiled: bool | None = None,
        progress: bool = True,
    ):
        state = loaded(model)
        if reason := why_not(state.plan, state.gpu.kernels, max_tokens):
            raise LowvramError(f"{state.plan.model} cannot be decoded by LeanDecoder: {reason}; use the model itself")
        if compiled and not compiler():
            missing = without_compiler() or "LOWVRAM_COMPILE=0 says not to compile; unset it"
            raise LowvramError(f"{missing}, or leave compiled=True out")
        super().__init__(model, max_tokens, batch_size)
        self._plan, self._spec = state.plan, state.plan.spec
        self._places = self._plan.layer_places()
        self._head_place = compute_place(self._plan.modules[self._spec.head].device)
        self._crossed_bytes = self._crossings()
        self._layers, self._head = [], partial(_modules_head, model)
        self._normed_on = model.model.norm.weight.device
        self._positions = torch.arange(self.cache.max_tokens)
        self._on_card = self._places_on_card()
        with self._gpu.noting_oom(state), self._gpu.active(), torch.no_grad():
            self._tables = self._rotary()
            bound = [bind_layer(model, *both) for both in zip(model.model.layers, self.cache.layers, strict=True)]
            self._graphed = self._graph(bound) if self._on_card else None
            self.compiled = len(self._on_card) < len(bound) and self._may_compile(compiled)
            self._reserve(bound)
        if len(self._on_card) < len(bound) and not self._gpu.meta:
            if self.compiled and not self._compile(bound, progress, must=bool(compiled)):
                self.compiled = False
                with self._gpu.active():
                    self._reserve(bound)
            if not self.compiled:
                self._layers = [(partial(_run_layer, shape), tensors) for shape, tensors in bound]

    def release(self) -> None:
        """See ``Decoder``."""
        super().release()
        self._layers, self._head, self._graphed = [], None, None

    @property
    def name(self) -> str:
        """See ``Decoder``."""
        if self._graphed is not None:
            return NAMES[GRAPHS if self._graphed.capture else LEAN]
        return NAMES[COMPILED if self.compiled else LEAN]

    def _likeliest(self, logits: torch.Tensor) -> torch.Tensor | None:
        return self._graphed.likeliest if self._graphed and logits is self._graphed.result else None

    def _decode(self, token: torch.Tensor) -> torch.Tensor:
        position = self.tokens
        if position == 0:
            raise LowvramError("expected a prompt in the cache, found none: call prefill first")
        if position >= self.cache.max_tokens:
            raise BudgetError(f"the KV cache of {position} tokens is full; plan a longer context")
        if self._gpu.meta:
            self._foresee(token, position)
            logits = self._graphed.result if self._logits is None else self._logits
        else:
            with self._gpu.lock, cpu_threads(self._plan.threads), self._gpu.unmetered():
                found = self._run(token, position)
                logits = found if self._logits is None else self._logits.copy_(found)
        if self._gpu.moves:
            self._gpu.recording.transfers.update(self._crossed_bytes)
        for held in self.cache.layers:
            held.tokens = position + 1
        return logits

    def _run(self, token: torch.Tensor, position: int) -> torch.Tensor:
        """Logits of a token, in order: the lookup, layers off the card, those on it, those off it behind them, head."""
        graphed, on_card = self._graphed, self._on_card
        hidden = token if graphed and graphed.lookup else self._embedded(token)
        seen = self._positions[: position + 1]
        for index, place in enumerate(self._places):
            if index in on_card:  # all of them at once
                hidden = graphed(hidden, position) if index == on_card.start else hidden
                continue
            (run, tensors), (cos, sin) = self._layers[index], self._tables[place]
            hidden = run([hidden.to(cos.device), cos[position], sin[position], seen, *tensors])[0]
        return hidden if graphed and graphed.head else self._head(hidden.to(self._normed_on))

    def _foresee(self, token: torch.Tensor, position: int) -> None:
        """Allocates what a token does on a card: lookup and head, if in no graph; a graph of a length that is new."""
        if self._gpu.kernels != "cuda":
            return
        meter = self._gpu.meter
        if self._graphed and self._graphed.lookup:
            hidden = token
        else:
            hidden = self._embedded(token)
            with meter.scope(place="cpu", force=True):
                hidden = hidden.clone()  # what layers off the card make of it
        if self._graphed:
            with meter.scope(owner="CUDA graphs", place="gpu"), self._gpu.unwatched():
                self._graphed(hidden, position)
        elif self._head_place == "gpu":
            # cloned, not moved: what crosses is counted by ``_crossed_bytes``
            with meter.scope(place=meter.place_of(self.model.model.norm.weight), force=True):
                hidden = hidden.clone()
            self._logits.copy_(self._head(hidden))

    def _embedded(self, token: torch.Tensor) -> torch.Tensor:
        """Hidden states of a token, where the embedding is."""
        with self._gpu.meter.scope(place=self.reads_ids_at):
            return _lookup(self.model, self._gpu.move(token, self.reads_ids_at))

    def _places_on_card(self) -> range:
        """Which layers a CUDA card computes; they lie side by side (``why_not``). None on the stand-in."""
        count = len(self._places)
        on_gpu = [index for index in range(count) if self._places[index] == "gpu" and self._gpu.kernels == "cuda"]
        return range(on_gpu[0], on_gpu[-1] + 1) if on_gpu else range(count, count)

    def _crossings(self) -> Counter:
        """Bytes of hidden states that one token takes from place to place; the stand-in only counts them."""
        embedding = compute_place(self._plan.modules[self._spec.embedding].device)
        order = [embedding, *self._places, self._head_place]
        crossed = Counter()
        for place, following in zip(order, order[1:], strict=False):
            if place != following:
                crossed[place, following] += self.batch_size * self._spec.hidden_size * torch.float32.itemsize
        return crossed

    def _rotary(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Cosines and sines of every position, ``(room, head_dim)`` float32, at each place where layers compute."""
        rotary, home, gpu = self.model.model.rotary_emb, self._places[0], self._gpu
        with gpu.meter.scope(owner="rotary tables", place=home):
            device = rotary.inv_freq.device
            positions = torch.arange(self.cache.max_tokens, device=device)
            cos, sin = rotary(torch.zeros(1, device=device), positions[None])
            half = sin.shape[-1] // 2
            # a half turn swaps the halves of a head; the sign of the first goes into the table
            cos, sin = cos[0], torch.cat((-sin[0, :, :half], sin[0, :, half:]), dim=-1)
            tables = {home: (cos, sin)}
            for place in sorted(set(self._places) - {home}):
                # made there, not moved: it is not counted among what crosses
                tables[place] = tuple(gpu.zeros(tuple(t.shape), t.dtype, place).copy_(t) for t in (cos, sin))
            return tables

    def _graph(self, bound: list) -> GraphedStep:
        first, behind = self._on_card.start, self._on_card.stop
        looks_up = first == 0 and self.reads_ids_at == "gpu"
        with self._gpu.meter.scope(owner="CUDA graphs", place="gpu"):
            graphed = GraphedStep(
                bound[first:behind],
                partial(_lookup, self.model) if looks_up else None,
                partial(_modules_head, self.model) if self._head_place == "gpu" else None,
                self._tables["gpu"],
                self.batch_size,
                self._spec.hidden_size,
                self._gpu.graphs(),
            )
            with self._gpu.unwatched():
                graphed.prepare()
            return graphed

    def _may_compile(self, wanted: bool | None) -> bool:
        if wanted is not None:
            return wanted
        if (missing := without_compiler()) and not self._gpu.meta:
            _warn_once(f"decoding without compiled layers, which is slower: {missing}")
        return there() and self.cache.max_tokens >= LEAST_ROOM

    def _workspace(self, bound: list) -> int:
        """Bytes of one token's temporaries on the GPU, all of the cache in use; CUDA's graphs take their own."""
        if self._graphed is not None:
            return 0
        hidden = torch.empty(self.batch_size, self._spec.hidden_size, device="meta")
        kinds = {shape: tensors for (shape, tensors), place in zip(bound, self._places, strict=True) if place == "gpu"}
        settings = self.cache.max_tokens, self.compiled
        with self._gpu.unmetered():  # it only looks
            found = [layer_bytes(shape, hidden, tensors, *settings) for shape, tensors in kinds.items()]
            if self._head_place == "gpu":
                found.append(head_bytes(self.model, hidden, bind_head(self.model) if self.compiled else None))
        return max(found, default=0)

    def _reserve(self, bound: list) -> None:
        """Takes what decoding will need beside the cache: logits, if no graph has them, and a token's workspace."""
        gpu, meter = self._gpu, self._gpu.meter
        self.workspace_bytes = self._workspace(bound)
        self._logits = self._reserved = None
        if self._graphed and self._graphed.head:
            return
        with meter.scope(owner="logits"):
            self._logits = gpu.zeros((self.batch_size, self._spec.vocab_size), self.model.dtype, self._head_place)
        if self.workspace_bytes:
            with meter.scope(owner="workspace of a token"):
                self._reserved = gpu.buffer(self.workspace_bytes)

    def _compile(self, bound: list, progress: bool, must: bool) -> bool:
        """Opens the libraries of all layers and of the head; whether that could be done."""
        hidden = torch.zeros(self.batch_size, self._spec.hidden_size)
        indices = [index for index in range(len(bound)) if index not in self._on_card]
        cos, sin = self._tables[self._places[indices[0]]]
        first = [hidden, cos[0], sin[0], self._positions[:2]]
        wanted = [Library.called_with(bound[index][0], first + bound[index][1]) for index in indices]
        head = bind_head(self.model)
        if head is not None:
            wanted.append(Library.called_with(head[0], [hidden, *head[1]]))
        try:
            with self._gpu.unmetered():
                runs = open_libraries(wanted, progress)
        except Exception as error:  # the compiler's, a folder that cannot be written, a library that cannot be opened
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            if must:
                raise LowvramError(f"the layer could not be compiled: {reason}; leave compiled=True out") from error
            logger.warning("decoding without compiled layers, which is slower: %s", reason)
            return False
        opened = dict(zip(indices, runs, strict=False))
        self._layers = [(opened.get(index), tensors) for index, (_, tensors) in enumerate(bound)]
        if head is not None:
            *_, run = runs
            self._head = lambda hidden: run([hidden, *head[1]])[0]
        return True


def _lookup(model: nn.Module, token: torch.Tensor) -> torch.Tensor:
    table = model.model.embed_tokens
    return type(table).forward(table, token)[:, 0].float()  # its own: called by itself it would hand over its result


def _modules_head(model: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    return model.lm_head(model.model.norm(hidden).to(model.dtype))


@functools.cache
def _warn_once(message: str) -> None:
    """A missing compiler is the machine's state, not one decoder's."""
    logger.warning(message)


def _run_layer(shape: LayerShape, arguments: list) -> list:
    """``llama_layer`` as a compiled library is called."""
    hidden, cos, sin, positions, *tensors = arguments
    return [llama_layer(shape, hidden, cos, sin, tensors, positions.shape[0])]
