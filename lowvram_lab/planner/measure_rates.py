"""Measure what this machine takes for the parts of a forward pass, and keep it until the machine changes.

Derived in: notebooks/05_split_the_layers.ipynb
"""

import contextlib
import copy
import hashlib
import itertools
import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace

import psutil
import torch
import torch.nn.functional as F

from lowvram_lab.engine.caches import new_cache
from lowvram_lab.engine.decode import decode_one_token, prefill
from lowvram_lab.engine.layers import quantized_linear
from lowvram_lab.engine.load import load
from lowvram_lab.errors import LowvramError
from lowvram_lab.files import cache_dir, remember, writable
from lowvram_lab.machine import cpu_threads, processor_name
from lowvram_lab.memory.cuda import CudaGpu
from lowvram_lab.memory.gpu import StandInGpu
from lowvram_lab.model.checkpoint import RandomWeights
from lowvram_lab.model.formats import DTYPES, get_format
from lowvram_lab.model.plan import Plan
from lowvram_lab.model.spec import ModelSpec
from lowvram_lab.planner.rates import DiskRates, KernelRates, LayerRates, LinkRates
from lowvram_lab.units import MiB

VERSION = 3
"""Raised when rates are measured another way: what was kept is then measured anew."""

COPIES_BYTES = 96 * MiB
"""Copies of a weight that are read in turn, so that none comes from a cache; L3 caches of 32 MiB are usual."""

SMALL, LARGE = 256, 2048
"""Sizes of the square weights from which a call's fixed cost and the cost of a weight are told apart; rounded up to
whole groups."""

ROWS = 64
"""Tokens of a short prompt, from which arithmetic is told apart from reading weights."""

ROUND_S = 0.04
"""Seconds a timing takes at most; the least disturbed of three counts: a busy moment says nothing about the machine."""

LINK_BYTES, DISK_BYTES = 32 * MiB, 64 * MiB
TINY = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "head_dim": 64, "vocab_size": 256}
SHORT, LONG = 64, 512


class Machine:
    """This machine's rates, each measured when it is first asked for and kept in the cache folder.

    Args:
        remember: Whether to keep rates in the cache folder.
        anew: Whether to measure again what is known: a busy moment may have been kept.

    Attributes:
        name: What it is, in words: the CPU, and the GPU if there is one.
        cuda: Whether there is a CUDA card; without one "gpu" is the stand-in, and as fast as the CPU it is.
    """

    def __init__(self, remember: bool = True, anew: bool = False):
        self.cuda = torch.cuda.is_available()
        self.name = processor_name() + (f" + {torch.cuda.get_device_name()}" if self.cuda else "")
        facts = [VERSION, self.name, os.cpu_count(), torch.__version__, psutil.virtual_memory().total >> 30]
        key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
        self._file = cache_dir() / "rates" / f"{key}.json" if remember else None
        self._known: dict[str, dict] = {}
        if not anew:
            self._known = self._read()

    def kernel(self, fmt: str, place: str = "cpu", threads: int | None = None, shared: bool = False) -> KernelRates:
        """Rates of a linear layer in a format at a place.

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

    def layer(self, kv_format: str, dtype: str = "bf16", place: str = "cpu", threads: int | None = None) -> LayerRates:
        """Rates of everything in a decoder layer but its linear modules. Arguments as ``Plan`` and ``kernel``."""
        place, threads = self._place(place), threads or torch.get_num_threads()
        name = f"layer {kv_format} {dtype} {self._where(place, threads)}"
        plain = self.kernel(dtype, place, threads)
        return self._rates(LayerRates, name, threads, lambda: _layer(kv_format, dtype, place, plain))

    def link(self) -> LinkRates | None:
        """Rates between CPU and GPU, or ``None`` without a CUDA card: the stand-in lies in the same RAM."""
        return self._rates(LinkRates, "link", torch.get_num_threads(), _link) if self.cuda else None

    def disk(self) -> DiskRates:
        """Rate of the disk that the cache folder is on."""
        return self._rates(DiskRates, "disk", torch.get_num_threads(), _disk)

    def _place(self, place: str) -> str:
        return place if self.cuda else "cpu"

    @staticmethod
    def _where(place: str, threads: int) -> str:
        return place if place == "gpu" else f"{place} {threads}"

    def _rates(self, kind: type, name: str, threads: int, measure: Callable):
        if name not in self._known:
            try:
                with cpu_threads(threads), torch.inference_mode():
                    self._known[name] = asdict(measure())
            except torch.OutOfMemoryError as error:
                raise LowvramError(
                    f"no room on the GPU to measure its rates ({name}); forecast speed before a model is loaded"
                ) from error
            if self._file:
                remember(self._file, json.dumps({**self._read(), **self._known}, indent=1))
        return kind(**self._known[name])

    def _read(self) -> dict[str, dict]:
        if self._file:
            with contextlib.suppress(OSError, ValueError):
                known = json.loads(self._file.read_text(encoding="utf-8"))
                return known if isinstance(known, dict) else {}
        return {}


def _kernel(fmt: str, place: str, shared: bool) -> KernelRates:
    group = get_format(fmt).group_size or 1
    sides = [-(-size // group) * group for size in (SMALL, LARGE)]
    (small, large), (few, many) = (_weights(fmt, side, place, shared) for side in sides), (side**2 for side in sides)
    one = [_per_call(layers, 1, fmt, place) for layers in (small, large)]
    rows = _per_call(large, ROWS, fmt, place)
    weight = max(0.0, one[1] - one[0]) / (many - few)
    return KernelRates(max(0.0, one[0] - weight * few), weight, max(0.0, rows - one[1]) / many / (ROWS - 1))


def _weights(fmt: str, size: int, place: str, shared: bool) -> list:
    """Layers enough not to stay in a cache (of small ones there is one: it is the call that is timed)."""
    chosen, device = get_format(fmt), "cuda" if place == "gpu" else "cpu"
    weight = torch.randn(size, size, generator=torch.Generator().manual_seed(0))
    if chosen.kind == "float":
        layers = [torch.nn.Parameter(weight.to(device, DTYPES[fmt]), requires_grad=False)]
        size_bytes = layers[0].nbytes
    else:
        layer = quantized_linear(size, size, chosen, "cuda" if place == "gpu" else "cpu", shared=shared)
        layer.store(weight.bfloat16(), lambda tensor: tensor.to(device))
        layers, size_bytes = [layer], sum(buffer.nbytes for buffer in layer.buffers())
    count = 1 if size < LARGE else max(2, COPIES_BYTES // size_bytes)
    return layers + [copy.deepcopy(layers[0]) for _ in range(count - 1)]


def _per_call(layers: list, rows: int, fmt: str, place: str) -> float:
    """Seconds of a call, over layers in turn."""
    dtype = DTYPES.get(fmt, torch.bfloat16)
    side = layers[0].shape[1] if isinstance(layers[0], torch.Tensor) else layers[0].in_features
    x = torch.randn(rows, side).to("cuda" if place == "gpu" else "cpu", dtype)
    done = 0

    def call() -> None:
        nonlocal done
        layer = layers[done % len(layers)]
        done += 1
        F.linear(x, layer) if isinstance(layer, torch.Tensor) else layer(x)

    return _least_seconds(call, place)


def _least_seconds(call: Callable, place: str) -> float:
    """Seconds of one call; see ``_least_of_each``."""
    return _least_of_each({"": call}, place, 3, ROUND_S)[""]


def _least_of_each(calls: dict, place: str, rounds: int = 12, round_s: float = ROUND_S / 4) -> dict:
    """Seconds a call, the least disturbed of some rounds, in each of which every call has its turn.

    What is subtracted from each other is then measured side by side: a disturbance outlasts a turn, seldom all rounds.

    Args:
        calls: What to call, by name.
        place: Where it computes, ``"gpu"`` or ``"cpu"``.
        rounds: Turns of each.
        round_s: Seconds of a turn; at least one call.
    """
    wait = torch.cuda.synchronize if place == "gpu" else lambda: None
    for call in calls.values():
        call(), wait()
    least = dict.fromkeys(calls, float("inf"))
    for _ in range(rounds):
        for name, call in calls.items():
            done, began = 0, time.perf_counter()
            while time.perf_counter() - began < round_s:
                call()
                done += 1
            wait()
            least[name] = min(least[name], (time.perf_counter() - began) / done)
    return least


def _layer(kv_format: str, dtype: str, place: str, plain: KernelRates) -> LayerRates:
    """Differences between runs of tiny models that differ in one thing each."""
    models = {
        name: _tiny(layers, heads, dtype, place, kv_format)
        for name, layers, heads in (("few", 2, 4), ("many", 6, 4), ("narrow", 6, 1))
    }
    with contextlib.ExitStack() as unmetered:
        for model in models.values():
            unmetered.enter_context(model.gpu.unmetered())
        calls = {(name, "decode", 1): _decoding(model, 1) for name, model in models.items()}
        for name in ("many", "narrow"):
            calls[name, "decode", 2 * LONG] = _decoding(models[name], 2 * LONG)
        for name, tokens in itertools.product(("few", "many"), (SHORT, LONG)):
            calls[name, "prefill", tokens] = _prefilling(models[name], tokens)
        seconds = _least_of_each(calls, place)
    few, many = seconds["few", "decode", 1], seconds["many", "decode", 1]
    whole = (many - few) / 4  # a layer, its linear modules included
    linear = {tokens: _linear_seconds(models["many"].spec, plain, tokens) for tokens in (1, SHORT, LONG)}
    layer_s = max(0.0, whole - linear[1])
    queries, hidden = TINY["num_attention_heads"] * TINY["head_dim"], TINY["hidden_size"]
    # a prompt of n tokens: n * hidden * width + n * n / 2 * queries * pair, from two lengths
    rest = {}
    for tokens in (SHORT, LONG):
        a_layer = (seconds["many", "prefill", tokens] - seconds["few", "prefill", tokens]) / 4
        rest[tokens] = max(0.0, a_layer - layer_s - linear[tokens])
    a, b = rest[SHORT] / SHORT, rest[LONG] / LONG
    pair = max(0.0, (b - a) / (LONG - SHORT)) * 2 / queries
    width = max(0.0, a - pair * queries * SHORT / 2) / hidden
    # a cached token: queries * cached_query + keys * cached_kv, from two numbers of key heads
    grown = {}
    for heads, name in ((4, "many"), (1, "narrow")):
        longer = seconds[name, "decode", 2 * LONG] - seconds[name, "decode", 1]
        grown[heads] = max(0.0, longer) / 6 / (2 * LONG)
    kv = max(0.0, grown[4] - grown[1]) / (3 * TINY["head_dim"])
    query = max(0.0, grown[1] - kv * TINY["head_dim"]) / queries
    return LayerRates(max(0.0, few - 2 * whole), layer_s, width, pair, query, kv)


def _linear_seconds(spec: ModelSpec, rates: KernelRates, tokens: int) -> float:
    modules = [m for m in spec.modules if m.layer == 0 and m.kind == "linear"]
    return sum(rates.seconds(m.weight_shape[0] * m.weight_shape[1], tokens) for m in modules)


def _tiny(layers: int, kv_heads: int, dtype: str, place: str, kv_format: str):
    """A Llama of random weights, loaded like any model."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        **TINY, num_hidden_layers=layers, num_key_value_heads=kv_heads, max_position_embeddings=4 * LONG,
        tie_word_embeddings=True,
    )  # fmt: skip
    spec = ModelSpec.from_config(config, "tiny")
    plan = replace(Plan.uniform(spec, dtype, context=4 * LONG).with_modules("*", device=place), kv_format=kv_format)
    gpu = CudaGpu(None, set_cap=False) if torch.cuda.is_available() else StandInGpu(None)
    return load(plan, gpu, spec=spec, checkpoint=RandomWeights(spec), progress=False)


def _prefilling(model, tokens: int) -> Callable:
    """A prompt of so many tokens, into a new cache each time."""
    ids = torch.ones(1, tokens, dtype=torch.long)
    return lambda: prefill(model, ids, new_cache(model))


def _decoding(model, cached: int) -> Callable:
    """A token fed to a cache of so many tokens, which is cut back before each."""
    cache, token = new_cache(model), torch.ones(1, 1, dtype=torch.long)
    prefill(model, token.expand(1, cached), cache)

    def step() -> None:
        cache.keep(cached)
        decode_one_token(model, token, cache)

    return step


def _link() -> LinkRates:
    def seconds(size: int, pinned: bool, to_gpu: bool) -> float:
        there, here = torch.empty(size, dtype=torch.uint8, device="cuda"), torch.empty(size, dtype=torch.uint8)
        here = here.pin_memory() if pinned else here
        source, target = (here, there) if to_gpu else (there, here)
        return _least_seconds(lambda: (target.copy_(source, non_blocking=pinned), torch.cuda.synchronize()), "gpu")

    rates = [LINK_BYTES / seconds(LINK_BYTES, pinned, to_gpu) for to_gpu in (True, False) for pinned in (False, True)]
    return LinkRates(*rates, seconds(4096, False, True))


def _disk() -> DiskRates:
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
        return DiskRates(DISK_BYTES / (time.perf_counter() - began))
