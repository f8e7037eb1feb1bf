"""Measure what this machine takes for the parts of a forward pass, and keep it until the machine changes.

A linear layer as a module (prompts, and whatever is not lean); a product inside the lean decoder, by format; what else
a layer takes, by differences between tiny Llamas that go through the real loader and the real decoder; the link between
GPU and CPU; the disk. Figures that were disturbed by other work are used, said to be so, and measured anew next time.

Derived in: notebooks/05_split_the_layers.ipynb
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import itertools
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from functools import partial

import psutil
import torch
import torch.nn.functional as F  # noqa: N812

from lowvram_lab.decoding.bind import product_of, tensors_of
from lowvram_lab.decoding.compiled import open_libraries
from lowvram_lab.decoding.compiling import Library
from lowvram_lab.decoding.decode import Decoder, ModuleDecoder
from lowvram_lab.decoding.kinds import COMPILED, LEAN, MODULES
from lowvram_lab.decoding.lean import LeanDecoder
from lowvram_lab.decoding.llama_layer import LONGEST_LOOP, HeadShape, head
from lowvram_lab.engine.layers import QuantizedLinear, quantized_linear
from lowvram_lab.engine.load import load
from lowvram_lab.engine.random_weights import RandomWeights
from lowvram_lab.errors import LowvramError
from lowvram_lab.files import cache_dir, remember, writable
from lowvram_lab.kernels.product import MOST_ROWS
from lowvram_lab.machine import cpu_threads, processor_name
from lowvram_lab.memory.cuda import CudaGpu
from lowvram_lab.memory.gpu import StandInGpu
from lowvram_lab.model.formats import DTYPES, get_format
from lowvram_lab.model.plan import Plan
from lowvram_lab.model.spec import ModelSpec
from lowvram_lab.rates.any_machine import AnyMachine
from lowvram_lab.rates.figures import (
    AttentionRates,
    DiskRates,
    KernelRates,
    LinkRates,
    ProductRates,
    PromptRates,
    RowsRates,
    TokenRates,
)
from lowvram_lab.sampling import likeliest
from lowvram_lab.timing import Circumstances, Timing, time_calls
from lowvram_lab.units import MiB

VERSION = 11
"""Raised when rates are measured another way: what was kept is then measured anew."""

COPIES_BYTES = 96 * MiB
"""Copies of a weight that are read in turn, so that none comes from a cache; L3 caches of 32 MiB are usual."""

SMALL, LARGE = 256, 2048
"""Sizes of the square weights from which a call's fixed cost and the cost of a weight are told apart; rounded up to
whole groups."""

ROWS = 64
"""Tokens of a short prompt, from which arithmetic is told apart from reading weights."""

PRODUCT_BITS = (17, 24)
"""Matrices whose product inside the lean decoder is timed have 2 to such a power of weights, whichever is nearest. Of a
small one the first bytes, which nobody asked for ahead, are a larger share (int4: a third of 1 M weights' time)."""

ROW_BLOCK = 64
"""int4's kernels for the CPU want rows in multiples of it."""

LINK_BYTES, DISK_BYTES = 32 * MiB, 64 * MiB
TINY = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "head_dim": 64, "vocab_size": 256}
SHORT, LONG = 64, 512
FEW, MANY = 2, 6
"""Layers of the tiny models whose difference is a layer of a prompt."""

DEEP = 96
"""Layers of the tiny model that decodes: so many that their weights come from memory, as a real model's do, and not
from a cache; else subtracting what their products take would leave nothing."""


class Machine(AnyMachine):
    """This machine's rates, each measured when it is first asked for and kept in the cache folder.

    Args:
        remember: Whether to keep rates in the cache folder.
        anew: Whether to measure again what is known.
        on_measure: Is told the name of a rate before it is measured, which takes seconds, or a minute with a compiler.

    Attributes:
        name: What it is, in words: the CPU, and the GPU if there is one.
        cuda: Whether there is a CUDA card; without one "gpu" is the stand-in, and as fast as the CPU it is.
        asked: Circumstances of the rates that were asked for, by name.
    """

    def __init__(self, remember: bool = True, anew: bool = False, on_measure: Callable[[str], None] | None = None):
        self.on_measure = on_measure
        self.cuda = torch.cuda.is_available()
        self.name = processor_name() + (f" + {torch.cuda.get_device_name()}" if self.cuda else "")
        facts = [VERSION, self.name, os.cpu_count(), torch.__version__, psutil.virtual_memory().total >> 30]
        key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
        self._file = cache_dir() / "rates" / f"{key}.json" if remember else None
        self._known: dict[str, dict] = {}
        self.asked: dict[str, Circumstances] = {}
        if not anew:
            kept = self._read()
            self._known = {name: entry for name, entry in kept.items() if Circumstances(**entry["measured"]).steady}

    def kernel(self, fmt: str, place: str = "cpu", threads: int | None = None, shared: bool = False) -> KernelRates:
        """Rates of a linear layer in a format at a place, as a module.

        Args:
            fmt: Name of a format.
            place: ``"gpu"`` or ``"cpu"``.
            threads: CPU threads; by default torch's number.
            shared: Whether an embedding shares the weight: int4 then has another layout.
        """
        place, threads = self._place(place), threads or torch.get_num_threads()
        shared = shared and get_format(fmt).kind == "int4"
        name = f"kernel {fmt}{' shared' if shared else ''} {self._where(place, threads)}"
        return self._rates(KernelRates, name, threads, lambda: _kernel(fmt, place, shared))

    def rows(self, fmt: str, threads: int | None = None) -> RowsRates:
        """What several tokens in one pass cost on the CPU, beside one; ``fmt`` is one that our kernel multiplies."""
        threads = threads or torch.get_num_threads()
        return self._rates(RowsRates, f"rows {fmt} {self._where('cpu', threads)}", threads, lambda: _rows(fmt))

    def product(
        self,
        engine: str,
        fmt: str,
        shape: tuple[int, int],
        place: str = "cpu",
        threads: int | None = None,
        shared: bool = False,
    ) -> ProductRates:
        """Rate of one token's product with a matrix inside a lean decoder.

        In a compiled loop the length of a row takes nothing that could be measured. torch's int4 kernel takes up to
        twice as long for a weight of a short row (27 ps in rows of 2048, 40 in rows of 576, one thread).

        Args:
            engine: ``"compiled"``, ``"lean"`` or ``"graphs"``, see ``kinds.engine_of``.
            fmt: Name of a format.
            shape: Of the weight, ``(rows, columns)``.
            place: See ``kernel``.
            threads: See ``kernel``.
            shared: See ``kernel``.
        """
        place, threads, kind = self._place(place), threads or torch.get_num_threads(), get_format(fmt).kind
        columns, bits = shape[1], min(max(round(math.log2(math.prod(shape))), PRODUCT_BITS[0]), PRODUCT_BITS[1])
        if engine == COMPILED and columns <= LONGEST_LOOP and kind == "float":
            columns, bits = LARGE, PRODUCT_BITS[1]  # one size: each other one would be compiled for itself
        elif engine == COMPILED:
            engine = LEAN  # a compiled layer calls the same kernel
        shared = shared and kind == "int4"
        name = f"product {engine} {fmt}{' shared' if shared else ''} {columns} 2^{bits} {self._where(place, threads)}"
        return self._rates(
            ProductRates, name, threads, lambda: _product(engine, fmt, place, columns, shared, 1 << bits)
        )

    def prompt(
        self, kv_format: str, dtype: str = "bf16", place: str = "cpu", threads: int | None = None
    ) -> PromptRates:
        """Rates of everything in reading a prompt but linear modules. Arguments as ``Plan`` and ``kernel``."""
        place, threads = self._place(place), threads or torch.get_num_threads()
        name = f"prompt {kv_format} {dtype} {self._where(place, threads)}"
        plain = self.kernel(dtype, place, threads)
        return self._rates(PromptRates, name, threads, lambda: _prompt(kv_format, dtype, place, plain))

    def token(
        self, engine: str, fmt: str, kv_format: str, dtype: str = "bf16", place: str = "cpu", threads: int | None = None
    ) -> TokenRates:
        """Rates of everything in decoding a token but products and attention.

        Args:
            engine: Any of ``kinds.engine_of``.
            fmt: Format of a layer's weights: each kernel has its own cost of a call.
            kv_format: See ``Plan``.
            dtype: See ``Plan``.
            place: See ``kernel``.
            threads: See ``kernel``.
        """
        place, threads = self._place(place), threads or torch.get_num_threads()
        fmt = dtype if engine == MODULES else fmt
        name = f"token {engine} {fmt} {kv_format} {dtype} {self._where(place, threads)}"
        case = _Case(engine, fmt, kv_format, dtype, place)

        def linear(rows: int, columns: int) -> float:
            if engine == MODULES:
                return self.kernel(fmt, place, threads).seconds(rows * columns)
            return self.product(engine, fmt, (rows, columns), place, threads).weight_s * rows * columns

        return self._rates(TokenRates, name, threads, lambda: _token(case, linear))

    def attention(
        self,
        engine: str,
        kv_format: str,
        dtype: str = "bf16",
        place: str = "cpu",
        threads: int | None = None,
        fmt: str | None = None,
    ) -> AttentionRates:
        """Rates of a token's attention to those that are cached.

        Args:
            engine: See ``token``.
            kv_format: See ``Plan``.
            dtype: See ``Plan``.
            place: See ``kernel``.
            threads: See ``kernel``.
            fmt: Of the weights beside it, by default ``dtype``. It makes no difference to the rates, but a layer that
                ``token`` has compiled in this format need not be compiled in another.
        """
        place, threads = self._place(place), threads or torch.get_num_threads()
        if engine == MODULES or fmt is None or TINY["hidden_size"] % (get_format(fmt).group_size or 1):
            fmt = dtype
        name = f"attention {engine} {kv_format} {dtype} {self._where(place, threads)}"
        case = _Case(engine, fmt, kv_format, dtype, place)
        return self._rates(AttentionRates, name, threads, lambda: _attention(case))

    def link(self) -> LinkRates | None:
        """Rates between CPU and GPU, or ``None`` without a CUDA card: the stand-in lies in the same RAM."""
        return self._rates(LinkRates, "link", torch.get_num_threads(), _link) if self.cuda else None

    def disk(self) -> DiskRates:
        """Rate of the disk that the cache folder is on."""
        return self._rates(DiskRates, "disk", torch.get_num_threads(), _disk)

    def circumstances(self) -> Circumstances:
        """Of all rates asked for so far: the oldest age, the worst spread, the most that other work held."""
        asked = self.asked.values()
        return Circumstances(
            measured_at=min((each.measured_at for each in asked), default=time.time()),
            spread=max((each.spread for each in asked), default=1.0),
            others=max((each.others for each in asked), default=0.0),
        )

    def _place(self, place: str) -> str:
        return place if self.cuda else "cpu"

    @staticmethod
    def _where(place: str, threads: int) -> str:
        return place if place == "gpu" else f"{place} {threads}"

    def _rates(self, kind: type, name: str, threads: int, measure: Callable[[], tuple[object, Circumstances]]):
        if name not in self._known:
            if self.on_measure:
                self.on_measure(name)
            try:
                with cpu_threads(threads), torch.no_grad():
                    rates, measured = measure()
            except torch.OutOfMemoryError as error:
                raise LowvramError(
                    f"no room on the GPU to measure its rates ({name}); forecast speed before a model is loaded"
                ) from error
            self._known[name] = {"rates": asdict(rates), "measured": asdict(measured)}
            if self._file:
                remember(self._file, json.dumps({**self._read(), **self._known}, indent=1))
        entry = self._known[name]
        self.asked[name] = Circumstances(**entry["measured"])
        return kind(**entry["rates"])

    def _read(self) -> dict[str, dict]:
        if self._file:
            with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError):  # another form
                known = json.loads(self._file.read_text(encoding="utf-8"))
                for entry in known.values():
                    Circumstances(**entry["measured"])
                return known
        return {}


def _kernel(fmt: str, place: str, shared: bool) -> tuple[KernelRates, Circumstances]:
    small, large = _whole_groups(SMALL, fmt), _whole_groups(LARGE, fmt)
    layers = {side: _copies(_weight(fmt, side, side, place, shared), side >= LARGE) for side in (small, large)}
    timing = time_calls(
        {
            "small": _multiplying(layers[small], 1, fmt, place),
            "large": _multiplying(layers[large], 1, fmt, place),
            "rows": _multiplying(layers[large], ROWS, fmt, place),
        },
        place,
    )
    seconds = timing.seconds
    weight = max(0.0, seconds["large"] - seconds["small"]) / (large**2 - small**2)
    call = max(0.0, seconds["small"] - weight * small**2)
    row = max(0.0, seconds["rows"] - seconds["large"]) / large**2 / (ROWS - 1)
    return KernelRates(call, weight, row), timing.circumstances


def _whole_groups(size: int, fmt: str) -> int:
    group = get_format(fmt).group_size or 1
    return -(-size // group) * group


def _weight(fmt: str, rows: int, columns: int, place: str, shared: bool = False) -> torch.nn.Module:
    """A linear layer of random weights."""
    chosen, device = get_format(fmt), "cuda" if place == "gpu" else "cpu"
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    if chosen.kind == "float":
        layer = torch.nn.Linear(columns, rows, bias=False, device="meta")
        layer.weight = torch.nn.Parameter(weight.to(device, DTYPES[fmt]), requires_grad=False)
        return layer
    layer = quantized_linear(columns, rows, chosen, "cuda" if place == "gpu" else "cpu", shared=shared)
    layer.store(weight.bfloat16(), lambda tensor: tensor.to(device))
    return layer


def _copies(layer: torch.nn.Module, several: bool) -> list[torch.nn.Module]:
    """Layers enough not to stay in a cache (of a small one there is one: it is the call that is timed)."""
    held = [*layer.parameters(), *layer.buffers()]
    count = max(2, COPIES_BYTES // sum(tensor.nbytes for tensor in held)) if several else 1
    return [layer, *(copy.deepcopy(layer) for _ in range(count - 1))]


def _multiplying(layers: list[torch.nn.Module], rows: int, fmt: str, place: str) -> Callable[[], None]:
    """A call of the layers in turn, with so many rows."""
    dtype = DTYPES.get(fmt, torch.bfloat16)
    x = torch.randn(rows, layers[0].in_features).to("cuda" if place == "gpu" else "cpu", dtype)
    turns = itertools.cycle(layers)

    def call() -> None:
        layer = next(turns)
        F.linear(x, layer.weight) if not isinstance(layer, QuantizedLinear) else layer(x)

    return call


def _product(
    engine: str, fmt: str, place: str, columns: int, shared: bool, weights: int
) -> tuple[ProductRates, Circumstances]:
    """What a matrix from memory takes more than one of a few rows: less the call, which a large one hides."""
    columns = _whole_groups(columns, fmt)
    rows = max(2, round(weights / columns / ROW_BLOCK)) * ROW_BLOCK
    layers = _copies(_weight(fmt, rows, columns, place, shared), True)
    device = "cuda" if place == "gpu" else "cpu"
    hidden, norm = torch.randn(1, columns, device=device), torch.ones(columns, device=device)
    calls, few = {}, [] if engine == COMPILED else [_weight(fmt, ROW_BLOCK, columns, place, shared)]
    for several in filter(None, (layers, few)):
        shape = HeadShape(product_of(several[0]), eps=1e-6)
        turns = itertools.cycle([[norm, *tensors_of(layer, DTYPES.get(fmt, torch.bfloat16))] for layer in several])
        run = partial(_run_head, shape)
        if engine == COMPILED:
            try:
                (run,) = open_libraries([Library.called_with(shape, [hidden, *next(turns)])])
            except LowvramError:
                if os.access(cache_dir(), os.W_OK):
                    raise
                # a prepared folder that lacks this library: the decoder does without it as well
        calls[len(calls)] = lambda run=run, turns=turns: run([hidden, *next(turns)])
    timing = time_calls(calls, place)
    seconds = max(timing.usual_seconds[0] / 2, timing.usual_seconds[0] - timing.usual_seconds.get(1, 0.0))
    return ProductRates(seconds / ((rows - ROW_BLOCK * len(few)) * columns)), timing.circumstances


def _rows(fmt: str) -> tuple[RowsRates, Circumstances]:
    """One row and as many as a pass takes, of a large matrix from memory."""
    side = _whole_groups(LARGE, fmt)
    layers = _copies(_weight(fmt, side, side, "cpu"), True)
    timing = time_calls({rows: _multiplying(layers, rows, fmt, "cpu") for rows in (1, MOST_ROWS)}, "cpu")
    one, many = timing.seconds[1], timing.seconds[MOST_ROWS]
    return RowsRates(max(0.0, many / one - 1) / (MOST_ROWS - 1)), timing.circumstances


def _run_head(shape: HeadShape, arguments: list[torch.Tensor]) -> torch.Tensor:
    """``head`` as a compiled library is called."""
    hidden, *tensors = arguments
    return head(shape, hidden, tensors)


@dataclass(frozen=True)
class _Case:
    """What tiny models are made for, see ``Machine.token``."""

    engine: str
    fmt: str
    kv_format: str
    dtype: str
    place: str

    def decoder(self, layers: int, kv_heads: int) -> Decoder:
        """A decoder of a Llama of random weights, loaded like any model."""
        from transformers import LlamaConfig

        config = LlamaConfig(
            **{**TINY, **self._whole_sizes()},
            num_hidden_layers=layers,
            num_key_value_heads=kv_heads,
            max_position_embeddings=4 * LONG,
            tie_word_embeddings=True,
        )
        spec = ModelSpec.from_config(config, "tiny")
        plan = Plan.uniform(spec, self.dtype, context=4 * LONG)
        plan = plan.with_modules("*_proj", format=self.fmt).with_modules("*", device=self.place)
        plan = replace(plan, kv_format=self.kv_format, threads=torch.get_num_threads(), solver="rtn")
        gpu = CudaGpu(None, set_cap=False) if torch.cuda.is_available() else StandInGpu(None)
        model = load(plan, gpu, checkpoint=RandomWeights(spec), progress=False)
        if self.engine == MODULES:
            return ModuleDecoder(model)
        return LeanDecoder(model, compiled=self.engine == COMPILED, progress=False)

    def _whole_sizes(self) -> dict[str, int]:
        """Sizes that are whole groups of the format; all heads together have 256 features, or 384."""
        sizes = {name: _whole_groups(TINY[name], self.fmt) for name in ("hidden_size", "intermediate_size")}
        return sizes if sizes["hidden_size"] == TINY["hidden_size"] else {**sizes, "head_dim": 96}


def _token(case: _Case, linear: Callable[[int, int], float]) -> tuple[TokenRates, Circumstances]:
    """The difference between two depths is a layer; what its products take is taken off."""
    decoders = {FEW: case.decoder(FEW, 4), DEEP: case.decoder(DEEP, 4)}
    timing = _timed(
        {depth: _decoding(decoder, 1) for depth, decoder in decoders.items()}, decoders.values(), case.place
    )
    seconds = timing.usual_seconds  # as the rates of products are
    whole = (seconds[DEEP] - seconds[FEW]) / (DEEP - FEW)
    products = sum(linear(*shape) for shape in _matrices_of_a_layer(decoders[DEEP].model.lowvram.plan.spec))
    around = max(0.0, seconds[FEW] - FEW * whole)
    return TokenRates(around, max(0.0, whole - products)), timing.circumstances


def _attention(case: _Case) -> tuple[AttentionRates, Circumstances]:
    """A cached token takes queries * query + keys * key, told apart by two numbers of key heads."""
    decoders = {heads: case.decoder(DEEP, heads) for heads in (4, 1)}
    lengths = itertools.product(decoders, (1, 2 * LONG))
    calls = {(heads, cached): _decoding(decoders[heads], cached) for heads, cached in lengths}
    timing = _timed(calls, decoders.values(), case.place)
    wide, narrow = (
        max(0.0, timing.seconds[heads, 2 * LONG] - timing.seconds[heads, 1]) / DEEP / (2 * LONG) for heads in (4, 1)
    )
    key_s = max(0.0, wide - narrow) / (3 * TINY["head_dim"])
    queries = TINY["num_attention_heads"] * TINY["head_dim"]
    return AttentionRates(max(0.0, narrow - key_s * TINY["head_dim"]) / queries, key_s), timing.circumstances


def _prompt(kv_format: str, dtype: str, place: str, plain: KernelRates) -> tuple[PromptRates, Circumstances]:
    case = _Case(MODULES, dtype, kv_format, dtype, place)
    decoders = {"few": case.decoder(FEW, 4), "many": case.decoder(MANY, 4)}
    lengths = list(itertools.product(decoders, (1, SHORT, LONG)))
    calls = {(name, tokens): _prefilling(decoders[name], tokens) for name, tokens in lengths}
    timing = _timed(calls, decoders.values(), place)
    a_layer = {
        tokens: (timing.seconds["many", tokens] - timing.seconds["few", tokens]) / (MANY - FEW)
        for tokens in (1, SHORT, LONG)
    }
    spec = decoders["many"].model.lowvram.plan.spec
    linear = {
        tokens: sum(plain.seconds(rows * columns, tokens) for rows, columns in _matrices_of_a_layer(spec))
        for tokens in a_layer
    }
    layer_s = max(0.0, a_layer[1] - linear[1])
    queries, hidden = TINY["num_attention_heads"] * TINY["head_dim"], TINY["hidden_size"]
    # a prompt of n tokens: n * hidden * width + n * n / 2 * queries * pair, from two lengths
    short, long = (max(0.0, a_layer[tokens] - layer_s - linear[tokens]) / tokens for tokens in (SHORT, LONG))
    pair = max(0.0, (long - short) / (LONG - SHORT)) * 2 / queries
    width = max(0.0, short - pair * queries * SHORT / 2) / hidden
    around = max(0.0, timing.seconds["few", 1] - FEW * a_layer[1])
    return PromptRates(around, layer_s, width, pair), timing.circumstances


def _timed(calls: dict, decoders: Iterable[Decoder], place: str) -> Timing:
    with contextlib.ExitStack() as unmetered:
        for decoder in decoders:
            unmetered.enter_context(decoder.model.lowvram.gpu.unmetered())
        return time_calls(calls, place)


def _matrices_of_a_layer(spec: ModelSpec) -> list[tuple[int, int]]:
    return [module.weight_shape for module in spec.modules if module.layer == 0 and module.kind == "linear"]


def _prefilling(decoder: Decoder, tokens: int) -> Callable[[], None]:
    ids = torch.ones(1, tokens, dtype=torch.long)

    def call() -> None:
        decoder.cache.keep(0)
        decoder.prefill(ids)

    return call


def _decoding(decoder: Decoder, cached: int) -> Callable[[], None]:
    """Decodes and chooses one token behind so many."""
    token = torch.ones(1, 1, dtype=torch.long)
    decoder.cache.keep(0)
    for layer in decoder.cache.layers:  # by hand: so deep a model takes seconds to read a prompt
        room = layer.shape._replace(tokens=2 * LONG)
        states = (torch.randn(size, dtype=layer.dtype, device=layer.device) for size in (room.keys, room.values))
        layer.update(*states)

    def call() -> None:
        decoder.cache.holds(cached)  # all layers were filled; another length's turn may have been before
        int(likeliest(decoder.decode(token)))

    return call


def _link() -> tuple[LinkRates, Circumstances]:
    def copying(size: int, pinned: bool, to_gpu: bool) -> Callable[[], None]:
        there, here = torch.empty(size, dtype=torch.uint8, device="cuda"), torch.empty(size, dtype=torch.uint8)
        here = here.pin_memory() if pinned else here
        source, target = (here, there) if to_gpu else (there, here)
        return partial(_copy_and_wait, target, source, pinned)

    calls = {
        (to_gpu, pinned): copying(LINK_BYTES, pinned, to_gpu) for to_gpu in (True, False) for pinned in (False, True)
    }
    timing = time_calls({**calls, "crossing": copying(4096, False, True)}, "gpu")
    rates = [LINK_BYTES / timing.seconds[name] for name in calls]
    return LinkRates(*rates, timing.seconds["crossing"]), timing.circumstances


def _copy_and_wait(target: torch.Tensor, source: torch.Tensor, pinned: bool) -> None:
    target.copy_(source, non_blocking=pinned)
    torch.cuda.synchronize()


def _disk() -> tuple[DiskRates, Circumstances]:
    """Reads a file that the system was told to forget. Where it cannot be told (macOS), the rate is its cache's."""
    with tempfile.TemporaryFile(dir=writable(cache_dir()), buffering=0) as file:
        file.write(os.urandom(DISK_BYTES))
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        block, began = bytearray(MiB), time.perf_counter()
        while file.readinto(block):
            pass
        rate = DISK_BYTES / (time.perf_counter() - began)
    return DiskRates(rate), Circumstances(time.time())
