"""Rates of a machine that nobody measured, from its profile: bytes over bandwidth, and arithmetic over clock and lanes.

The same questions as ``Machine`` answers by timing. Nothing is assumed to overlap: a weight takes the time of reading
its bytes and that of its arithmetic. What runs there is this library as it is: without AVX-512 torch's kernel
multiplies by int4 (but for a tied head), this library's own, compiled there, by all else. On ARM that is portable C++.
"""

import math
from dataclasses import dataclass

from lowvram_lab.decoding.compiling import LEAST_ROOM
from lowvram_lab.decoding.decode import module_decoder_name
from lowvram_lab.decoding.kinds import COMPILED, LEAN, MODULES, NAMES, other_than_llama
from lowvram_lab.errors import PlanError
from lowvram_lab.model.formats import DTYPES, Format, get_format
from lowvram_lab.model.plan import Plan
from lowvram_lab.model.spec import ModuleSpec
from lowvram_lab.rates.any_machine import AnyMachine
from lowvram_lab.rates.figures import (
    AttentionRates,
    DiskRates,
    KernelRates,
    ProductRates,
    PromptRates,
    RowsRates,
    TokenRates,
)
from lowvram_lab.rates.profile import ASSUMED, Profile


@dataclass(frozen=True)
class Work:
    """Arithmetic of one weight for one token: cycles of a core.

    Attributes:
        cycles: Of code without vectors, whatever the lanes.
        operations: Vector operations; a core begins ``lanes`` of them in a cycle.
    """

    cycles: float = 0.0
    operations: float = 0.0


FLOATS = {"fp32": Work(operations=1), "bf16": Work(operations=3), "fp16": Work(operations=3)}
"""Compiled loops: a 16-bit value is widened by two operations before it is multiplied."""

OURS = {
    "avx2": {"int8": Work(operations=3.8), "nf4": Work(operations=13.3), "integers": Work(operations=7.8)},
    "neon": dict.fromkeys(("int8", "nf4", "integers"), Work(cycles=1.9)),
}
"""``kernels/product.cpp`` by g++ 12, its inner loop of one token in the models of llvm-mca 14: 61, 212 and 125 cycles
for 256 weights on Haswell, of 16 lanes; 495 on Cortex-A76, where no vectors come of it."""

TORCHS_INT4 = {"avx2": Work(operations=5), "neon": Work(operations=9)}
"""torch's kernel for int4, counted in ATen's int4mm_kernel.cpp (``tinygemm_kernel``): 9 operations for 4 weights of 4
lanes on ARM, with AVX2 some 5 for 8 of 8."""

SIXTEEN_BITS = 0.3
"""Of the speed of float32, what large products in 16 bits reach on processors without instructions for them. Measured
for torch 2.13 held to AVX2 on a Zen 5 (15.1 and 51.2 G multiply-adds a second, 256 x 2560 x 2560); assumed for ARM."""

CALL_CYCLES, MODULE_LAYER_CYCLES = 1e5, 1.2e6
LEAN_LAYER_CYCLES, TOKEN_CYCLES, WIDTH_CYCLES = 2e4, 1e5, 12.0
"""What Python, torch and threads' beginnings take: a call of a module, a layer of modules, a compiled layer, a token
around its layers, element-wise work for a token and hidden feature. Assumed: twice the cycles that a Zen 5 takes."""

KV_BYTES = {"int8": 1.0, "int4": 0.5, "fp32": 4.0}
"""Bytes of a cached value, without scales; else 2."""

MANY_WEIGHTS = (1, 6144)
"""A weight of whole groups of every size, from which bytes of a weight are read off."""


class AssumedMachine(AnyMachine):
    """A target's rates. The methods are those of ``Machine``; every place computes on the CPU.

    Args:
        target: The profile.
    """

    origin = ASSUMED

    def __init__(self, target: Profile):
        self.target, self.name = target, target.title

    def kernel(self, fmt: str, place: str = "cpu", threads: int | None = None, shared: bool = False) -> KernelRates:
        """See ``Machine.kernel``: few tokens by a kernel for weights as they lie, further ones by large products."""
        chosen, each = get_format(fmt), self._seconds(fmt, threads, shared)
        by_torch = chosen.kind == "int4" and not shared
        row_s = self._arithmetic(self._work(chosen, shared), threads) if by_torch else 1 / self._dense(fmt, threads)
        return KernelRates(CALL_CYCLES / self.target.clock_hz, each, row_s)

    def rows(self, fmt: str, threads: int | None = None) -> RowsRates:
        """See ``Machine.rows``: a further token takes one more multiply-add of each weight."""
        further = self._arithmetic(Work(operations=1), threads)
        return RowsRates(further / self._seconds(fmt, threads, False))

    def product(
        self,
        engine: str,
        fmt: str,
        shape: tuple[int, int],
        place: str = "cpu",
        threads: int | None = None,
        shared: bool = False,
    ) -> ProductRates:
        """See ``Machine.product``."""
        return ProductRates(self._seconds(fmt, threads, shared))

    def prompt(
        self, kv_format: str, dtype: str = "bf16", place: str = "cpu", threads: int | None = None
    ) -> PromptRates:
        """See ``Machine.prompt``: of a pair of tokens two multiply-adds a query feature, as in large products."""
        clock = self.target.clock_hz
        return PromptRates(
            model_s=MODULE_LAYER_CYCLES / clock,
            layer_s=MODULE_LAYER_CYCLES / clock,
            width_s=WIDTH_CYCLES / (clock * self._threads(threads)),
            pair_s=2 / self._dense(dtype, threads),
        )

    def token(
        self, engine: str, fmt: str, kv_format: str, dtype: str = "bf16", place: str = "cpu", threads: int | None = None
    ) -> TokenRates:
        """See ``Machine.token``."""
        layer = MODULE_LAYER_CYCLES if engine == MODULES else LEAN_LAYER_CYCLES
        return TokenRates(TOKEN_CYCLES / self.target.clock_hz, layer / self.target.clock_hz)

    def attention(
        self,
        engine: str,
        kv_format: str,
        dtype: str = "bf16",
        place: str = "cpu",
        threads: int | None = None,
        fmt: str | None = None,
    ) -> AttentionRates:
        """See ``Machine.attention``: a key and a value are read, and each query multiplies with both."""
        value_bytes = KV_BYTES.get(kv_format, 2.0)
        work = self._arithmetic(FLOATS["bf16"], threads)
        return AttentionRates(query_s=2 * work, key_s=2 * value_bytes / self.target.memory_bytes_per_s)

    def link(self) -> None:
        """There is no GPU."""

    def disk(self) -> DiskRates:
        """See ``Machine.disk``."""
        return DiskRates(float(self.target.disk_bytes_per_s))

    def engine_of(self, plan: Plan) -> tuple[str, str]:
        """The decoder that a plan has there, where g++ is installed.

        Raises:
            PlanError: Something of the plan is on a GPU.
        """
        if any("gpu" in assignment.places for assignment in plan.modules.values()):
            raise PlanError(f"{self.name} has no GPU, found {plan.summary()}; give a plan with everything on the CPU")
        reason = other_than_llama(plan) or _without_kernel(plan)
        if reason:
            return MODULES, module_decoder_name(reason)
        kind = self.off_card(plan)
        return kind, NAMES[kind]

    def off_card(self, plan: Plan) -> str:
        """See ``AnyMachine``."""
        return COMPILED if plan.context >= LEAST_ROOM else LEAN

    def leaves_to_module(self, module: ModuleSpec, fmt: Format, place: str) -> bool:
        """See ``AnyMachine``."""
        return not _has_kernel(fmt, module.weight_shape)

    def free_ram(self) -> int:
        """See ``AnyMachine``."""
        return self.target.usable_bytes

    def words(self) -> str:
        """See ``AnyMachine``."""
        return "assumed, from a profile: this machine was never measured"

    def assumptions(self, plan: Plan) -> list[str]:
        """What the forecast of a plan takes for granted, in words, the weightiest first."""
        formats = {get_format(assignment.format) for assignment in plan.modules.values()}
        found = ["no such machine was measured: bandwidth, clock and RAM are its profile's"]
        if any(each.kind == "int4" for each in formats):
            operations = TORCHS_INT4[self.target.instructions].operations
            found.append(f"int4: torch's kernel, {operations:g} vector operations a weight")
        if self.target.instructions == "neon" and any(each.kind != "float" for each in formats):
            found.append("int8, nf4, int2 to int6, a tied head: this library's portable C++, 1.9 cycles a weight")
        if plan.dtype != "fp32":
            found.append(f"prompts in {plan.dtype}, without instructions for it: {SIXTEEN_BITS:.0%} of float32's speed")
        return [*found, f"{self._threads(plan.threads)} threads, a cool processor, g++ installed, nothing in swap"]

    def _threads(self, threads: int | None) -> int:
        return min(threads or self.target.cores, self.target.cores)

    def _seconds(self, fmt: str, threads: int | None, shared: bool) -> float:
        """Seconds of a weight for one token."""
        chosen = get_format(fmt)
        size = chosen.weight_bytes(MANY_WEIGHTS) / math.prod(MANY_WEIGHTS)
        return size / self.target.memory_bytes_per_s + self._arithmetic(self._work(chosen, shared), threads)

    def _arithmetic(self, work: Work, threads: int | None) -> float:
        cycles = work.cycles + work.operations / self.target.lanes
        return cycles / (self.target.clock_hz * self._threads(threads))

    def _work(self, fmt: Format, shared: bool) -> Work:
        if fmt.kind == "float":
            return FLOATS[fmt.name]
        if fmt.kind == "int4" and not shared:
            return TORCHS_INT4[self.target.instructions]
        return OURS[self.target.instructions][fmt.kind if fmt.kind in ("int8", "nf4") else "integers"]

    def _dense(self, fmt: str, threads: int | None) -> float:
        """Multiply-adds a second of large products, to which all but float32 are brought as 16 bits."""
        share = self._threads(threads) / self.target.cores
        return self.target.dense_products_per_s * share * (1.0 if fmt == "fp32" else SIXTEEN_BITS)


def _has_kernel(fmt: Format, shape: tuple[int, int]) -> bool:
    """Whether few tokens are multiplied by a weight as it lies; groups of nf4 may go on in the next row."""
    return fmt.name in DTYPES or fmt.kind != "nf4" or shape[1] % fmt.group_size == 0


def _without_kernel(plan: Plan) -> str:
    for module in plan.spec.modules:
        if module.layer is not None and module.kind == "linear":
            fmt = get_format(plan.modules[module.name].format)
            if not _has_kernel(fmt, module.weight_shape):
                return f"{module.name.rpartition('.')[2]} is in {fmt.name}, which has no kernel"
    return ""
