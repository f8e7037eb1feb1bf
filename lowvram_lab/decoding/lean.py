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
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn

from lowvram_lab.decoding.bind import bind_head, bind_layer, bind_short_head, why_not_several
from lowvram_lab.decoding.compiled import open_libraries
from lowvram_lab.decoding.compiling import EXAMPLE_ROWS, LEAST_ROOM, Library
from lowvram_lab.decoding.decode import Decoder, ModuleDecoder
from lowvram_lab.decoding.graph import GraphedStep
from lowvram_lab.decoding.kinds import COMPILED, GRAPHS, LEAN, NAMES, why_not
from lowvram_lab.decoding.llama_layer import LayerShape, llama_layer
from lowvram_lab.decoding.workspace import head_bytes, layer_bytes
from lowvram_lab.engine.kv_cache import PreallocatedCache
from lowvram_lab.engine.loaded import loaded
from lowvram_lab.errors import BudgetError, LowvramError
from lowvram_lab.kernels.compiler import compiler, without_compiler
from lowvram_lab.kernels.library import there
from lowvram_lab.kernels.product import MOST_ROWS
from lowvram_lab.machine import cpu_threads
from lowvram_lab.model.formats import DTYPES
from lowvram_lab.model.plan import Plan, compute_place

logger = logging.getLogger(__name__)


def decoder_for(
    model: nn.Module,
    max_tokens: int | None = None,
    batch_size: int = 1,
    *,
    compiled: bool | None = None,
    progress: bool = True,
    cache: PreallocatedCache | None = None,
    plan: Plan | None = None,
) -> Decoder:
    """The fastest decoder there is for a loaded model: lean, or by its modules; ``name`` says which, and why.

    Args:
        model: From ``load``, real or a dry run.
        max_tokens: Tokens of prompt and answer; by default the plan's context.
        batch_size: Sequences, all of one length.
        compiled: See ``LeanDecoder``.
        progress: See ``LeanDecoder``.
        cache: See ``Decoder``.
        plan: See ``Decoder``.

    Raises:
        LowvramError: The model is not from ``load``.
        torch.OutOfMemoryError: No room for the KV cache and a token's workspace.
    """
    state = loaded(model)
    reason = why_not(state.plan, state.gpu.kernels, max_tokens)
    if reason:
        return ModuleDecoder(model, max_tokens, batch_size, reason, cache, plan)
    return LeanDecoder(model, max_tokens, batch_size, compiled=compiled, progress=progress, cache=cache, plan=plan)


@dataclass
class _Way:
    """One way to decode a token.

    Attributes:
        bound: Of each layer, its shape and its tensors.
        layers: Of each that is not on a card, what runs it.
        graphed: What runs those on a card.
    """

    bound: list
    layers: list[Callable | None] = field(default_factory=list)
    graphed: GraphedStep | None = None


@dataclass
class _Several:
    """Several tokens of a sequence in one pass.

    Attributes:
        logits: ``(MOST_ROWS, vocab)``, where the results are put.
        layers: What runs each layer.
        head: What runs the head.
    """

    logits: torch.Tensor
    layers: list[Callable] = field(default_factory=list)
    head: Callable | None = None


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
        cache: See ``Decoder``.

    Of weights in two planes it has two ways to decode a token, by the high ones and by both, on one KV cache; which is
    taken, ``Loaded.planes`` says token by token.

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
        cache: PreallocatedCache | None = None,
        plan: Plan | None = None,
    ):
        state = loaded(model)
        if reason := why_not(state.plan, state.gpu.kernels, max_tokens):
            raise LowvramError(f"{state.plan.model} cannot be decoded by LeanDecoder: {reason}; use the model itself")
        if compiled and not compiler():
            missing = without_compiler() or "LOWVRAM_COMPILE=0 says not to compile; unset it"
            raise LowvramError(f"{missing}, or leave compiled=True out")
        super().__init__(model, max_tokens, batch_size, cache=cache, plan=plan)
        self._spec = state.plan.spec
        self._nested = bool(self.plan.low_planes())
        self._places = self.plan.layer_places()
        self._head_place = compute_place(self.plan.modules[self._spec.head].device)
        self._crossed_bytes, self._crossed_to_low = self._crossings(), self._crossings_to_low_planes()
        self._head = partial(_modules_head, model)
        self._normed_on = model.model.norm.weight.device
        self._positions = torch.arange(self.cache.max_tokens)
        self._on_card = self._places_on_card()
        self._all_on_card = len(self._on_card) == len(self._places)
        with self._gpu.noting_oom(state), self._gpu.active(), torch.no_grad():
            self._tables = self._rotary()
            self._ways = {both: self._bound(both) for both in self._choices()}
            self.compiled = not self._all_on_card and self._may_compile(compiled)
            self._reserve()
        if not self._all_on_card and not self._gpu.meta:
            if self.compiled and not self._compile(progress, must=bool(compiled)):
                self.compiled = False
                with self._gpu.active():
                    self._reserve()
            if not self.compiled:
                for way in self._ways.values():
                    way.layers = [partial(_run_layer, shape) for shape, _ in way.bound]

    def release(self) -> None:
        """See ``Decoder``."""
        super().release()
        self._ways, self._head, self._short_head, self._several = {}, None, None, None

    @property
    def name(self) -> str:
        """See ``Decoder``."""
        if (graphed := self._ways[False].graphed) is not None:
            return NAMES[GRAPHS if graphed.capture else LEAN]
        return NAMES[COMPILED if self.compiled else LEAN]

    @property
    def most_tokens(self) -> int:
        """See ``Decoder``."""
        by_modules = self._nested and True not in self._ways  # a card's, by which one token is decoded too
        return MOST_ROWS if self.batch_size == 1 and (by_modules or self._several is not None) else 1

    def _likeliest(self, logits: torch.Tensor) -> torch.Tensor | None:
        for way in self._ways.values():
            if way.graphed and logits is way.graphed.result:
                return way.graphed.likeliest
        return None

    def _decode(self, token: torch.Tensor) -> torch.Tensor:
        position = self._position(1)
        if self._planes.both and self._nested and True not in self._ways:  # the low planes compute off the card
            return self._by_modules(token)[:, -1]
        way = self._ways[self._planes.both and self._nested]
        if self._gpu.meta:
            self._foresee(way, token, position)
            logits = way.graphed.result if self._logits is None else self._logits
        else:
            with self._gpu.lock, cpu_threads(self.plan.threads), self._gpu.unmetered():
                found = self._run(way, token, position)
                logits = found if self._logits is None else self._logits.copy_(found)
        self._count(1)
        return logits

    def _draft(self, token: torch.Tensor) -> torch.Tensor:
        if self._short_head is None or self._gpu.meta:
            return self._decode(token)
        position = self._position(1)
        with self._gpu.lock, cpu_threads(self.plan.threads), self._gpu.unmetered():
            logits = self._run(self._ways[False], token, position, self._short_head)
        self._count(1)
        return logits

    def _decode_several(self, tokens: torch.Tensor) -> torch.Tensor:
        position, count = self._position(tokens.shape[1]), tokens.shape[1]
        if self._several is None:
            return super()._decode_several(tokens)
        if not self._gpu.meta:
            with self._gpu.lock, cpu_threads(self.plan.threads), self._gpu.unmetered():
                hidden = self._embedded(tokens)
                seen, rows = self._positions[: position + count], slice(position, position + count)
                way = self._ways[self._nested]
                for run, (_, tensors), place in zip(self._several.layers, way.bound, self._places, strict=True):
                    cos, sin = (table[rows, None] for table in self._tables[place])
                    hidden = run([hidden, cos, sin, seen, *tensors])[0]
                self._several.logits[:count].copy_(self._several.head(hidden))
        self._count(count)
        return self._several.logits[:count]

    def _position(self, more: int) -> int:
        """How many tokens the cache holds, where there is room for more."""
        position = self.tokens
        if position == 0:
            raise LowvramError("expected a prompt in the cache, found none: call prefill first")
        if position + more > self.cache.max_tokens:
            raise BudgetError(f"the KV cache of {self.cache.max_tokens} tokens is full; plan a longer context")
        return position

    def _count(self, tokens: int) -> None:
        """Notes what crossed, and how many tokens the cache holds now."""
        if self._gpu.moves:
            crossed = self._crossed_bytes + (self._crossed_to_low if self._planes.both else Counter())
            for crossing, size in crossed.items():
                self._gpu.recording.transfers[crossing] += tokens * size
        self.cache.holds(self.tokens + tokens)

    def _run(self, way: _Way, token: torch.Tensor, position: int, head: Callable | None = None) -> torch.Tensor:
        """Logits of a token, in order: the lookup, layers off the card, those on it, those off it behind them, head."""
        graphed, on_card = way.graphed, self._on_card
        hidden = token if graphed and graphed.lookup else self._embedded(token)
        seen = self._positions[: position + 1]
        for index, place in enumerate(self._places):
            if index in on_card:  # all of them at once
                hidden = graphed(hidden, position) if index == on_card.start else hidden
                continue
            cos, sin = self._tables[place]
            run, tensors = way.layers[index], way.bound[index][1]
            hidden = run([hidden.to(cos.device), cos[position], sin[position], seen, *tensors])[0]
        return hidden if graphed and graphed.head else (head or self._head)(hidden.to(self._normed_on))

    def _foresee(self, way: _Way, token: torch.Tensor, position: int) -> None:
        """Allocates what a token does on a card: lookup and head, if in no graph; a graph of a length that is new."""
        if self._gpu.kernels != "cuda":
            return
        meter = self._gpu.meter
        if way.graphed and way.graphed.lookup:
            hidden = token
        else:
            hidden = self._embedded(token)
            with meter.scope(place="cpu", force=True):
                hidden = hidden.clone()  # what layers off the card make of it
        if way.graphed:
            with meter.scope(owner="CUDA graphs", place="gpu"), self._gpu.unwatched():
                way.graphed(hidden, position)
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
        embedding = compute_place(self.plan.modules[self._spec.embedding].device)
        order = [embedding, *self._places, self._head_place]
        crossed = Counter()
        for place, following in zip(order, order[1:], strict=False):
            if place != following:
                crossed[place, following] += self.batch_size * self._spec.hidden_size * torch.float32.itemsize
        return crossed

    def _crossings_to_low_planes(self) -> Counter:
        """The same of what low planes multiply that lie elsewhere, and of their products, where both planes decode."""
        crossed, size = Counter(), self.batch_size * DTYPES[self.plan.dtype].itemsize
        for name in self.plan.apart():
            home, place = map(compute_place, self.plan.modules[name].places)
            rows, columns = self._spec.module(name).weight_shape
            crossed[home, place] += size * columns
            crossed[place, home] += size * rows
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

    def _choices(self) -> tuple[bool, ...]:
        """By which planes this decoder decodes: the high ones, and both where they compute in one place."""
        if not self._nested or (self._on_card and self.plan.apart()):
            return (False,)
        return (False, True)

    def _bound(self, both: bool) -> _Way:
        layers = zip(self.model.model.layers, self.cache.layers, strict=True)
        way = _Way([bind_layer(self.model, block, held, both) for block, held in layers])
        way.graphed = self._graph(way.bound) if self._on_card else None
        return way

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

    def _workspace(self) -> int:
        """Bytes of one pass's temporaries on the GPU, all of the cache in use; CUDA's graphs take their own."""
        if self._on_card:
            return 0
        rows = MOST_ROWS if self._reads_several() else self.batch_size
        hidden = torch.empty(rows, self._spec.hidden_size, device="meta")
        bound = self._ways[max(self._ways)].bound  # by both planes takes more
        kinds = {shape: tensors for (shape, tensors), place in zip(bound, self._places, strict=True) if place == "gpu"}
        settings = self.cache.max_tokens, self.compiled
        with self._gpu.unmetered():  # it only looks
            found = [layer_bytes(shape, hidden, tensors, *settings) for shape, tensors in kinds.items()]
            if self._head_place == "gpu":
                found.append(head_bytes(self.model, hidden, bind_head(self.model) if self.compiled else None))
        return max(found, default=0)

    def _reads_several(self) -> bool:
        """Whether several tokens are read in one pass, by the compiled layers: to verify what was guessed.

        High planes guess, and so does what is remembered of an earlier answer.
        """
        wanted = self._nested or self.plan.remembers
        return wanted and self.compiled and self.batch_size == 1 and why_not_several(self.model) == ""

    def _reserve(self) -> None:
        """Takes what decoding will need beside the cache: logits, if no graph has them, and a token's workspace."""
        gpu, meter = self._gpu, self._gpu.meter
        self.workspace_bytes = self._workspace()
        self._logits = self._reserved = self._several = self._short_head = None
        graphed = self._ways[False].graphed
        if graphed and graphed.head:
            return
        with meter.scope(owner="logits"):
            self._logits = gpu.zeros((self.batch_size, self._spec.vocab_size), self.model.dtype, self._head_place)
            if self._reads_several():
                shape = MOST_ROWS, self._spec.vocab_size
                self._several = _Several(gpu.zeros(shape, self.model.dtype, self._head_place))
        if self.workspace_bytes:
            with meter.scope(owner="workspace of a token"):
                self._reserved = gpu.buffer(self.workspace_bytes)

    def _compile(self, progress: bool, must: bool) -> bool:
        """Opens the libraries of all layers and of the head; whether that could be done."""
        indices = [index for index in range(len(self._places)) if index not in self._on_card]
        cos, sin = self._tables[self._places[indices[0]]]
        rows = torch.zeros(EXAMPLE_ROWS, self._spec.hidden_size)
        one = [torch.zeros(self.batch_size, self._spec.hidden_size), cos[0], sin[0], self._positions[:2]]
        several = [rows, *(table[:EXAMPLE_ROWS, None] for table in (cos, sin)), self._positions[: EXAMPLE_ROWS + 1]]
        head = bind_head(self.model)
        wanted = {}
        for both, way in self._ways.items():
            wanted[both] = [Library.called_with(way.bound[at][0], one + way.bound[at][1]) for at in indices]
        if self._several:
            bound = self._ways[self._nested].bound
            wanted["several"] = [Library.called_with(bound[at][0], several + bound[at][1], True) for at in indices]
            wanted["heads"] = [Library.called_with(head[0], [rows, *head[1]], True)]
            short = bind_short_head(self.model) if self._nested else None
            if short is not None:
                wanted["short head"] = [Library.called_with(short[0], [one[0], *short[1]])]
        if head is not None:
            wanted["head"] = [Library.called_with(head[0], [one[0], *head[1]])]
        try:
            with self._gpu.unmetered():
                runs = iter(open_libraries([library for each in wanted.values() for library in each], progress))
        except Exception as error:  # the compiler's, a folder that cannot be written, a library that cannot be opened
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            if must:
                raise LowvramError(f"the layer could not be compiled: {reason}; leave compiled=True out") from error
            logger.warning("decoding without compiled layers, which is slower: %s", reason)
            return False
        opened = {name: [next(runs) for _ in libraries] for name, libraries in wanted.items()}
        for both, way in self._ways.items():
            found = dict(zip(indices, opened[both], strict=True))
            way.layers = [found.get(index) for index in range(len(self._places))]
        if head is not None:
            self._head = partial(_run_head, opened["head"][0], head[1])
        if self._several:
            self._several.layers = opened["several"]
            self._several.head = partial(_run_head, opened["heads"][0], head[1])
            if short is not None:
                self._short_head = partial(_run_head, opened["short head"][0], short[1])
        return True


def _lookup(model: nn.Module, token: torch.Tensor) -> torch.Tensor:
    table = model.model.embed_tokens
    return type(table).forward(table, token).flatten(0, 1).float()  # its own: called by itself it hands over its result


def _modules_head(model: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    return model.lm_head(model.model.norm(hidden).to(model.dtype))


@functools.cache
def _warn_once(message: str) -> None:
    """A missing compiler is the machine's state, not one decoder's."""
    logger.warning(message)


def _run_head(run: Callable, tensors: list, hidden: torch.Tensor) -> torch.Tensor:
    return run([hidden, *tensors])[0]


def _run_layer(shape: LayerShape, arguments: list) -> list:
    """``llama_layer`` as a compiled library is called."""
    hidden, cos, sin, positions, *tensors = arguments
    return [llama_layer(shape, hidden, cos, sin, tensors, positions.shape[0])]
