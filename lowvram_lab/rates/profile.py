"""The figures of a machine that nobody measured, each with its source: a profile, checked field by field."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from lowvram_lab.errors import LowvramError
from lowvram_lab.model.rules import is_whole_number
from lowvram_lab.units import MiB, format_bytes

ASSUMED = "assumed"
"""Origin of what is forecast for a machine that nobody measured."""

INSTRUCTIONS = ("neon", "avx2")
"""Vector instructions that a profile may have: ARM's of 64 bits, and x86's without AVX-512."""

BOUNDS = {
    "cores": (1, 1024),
    "clock_hz": (10**8, 10**10),
    "lanes": (1, 128),
    "dense_products_per_s": (10**6, 10**15),
    "memory_bytes_per_s": (10**6, 10**13),
    "disk_bytes_per_s": (10**4, 10**12),
    "ram_bytes": (MiB, 1 << 50),
    "reserved_bytes": (0, 1 << 50),
}
"""The least and the most of each figure: beyond them it is a slip, such as GB/s written where bytes are meant."""


@dataclass(frozen=True)
class Profile:
    """Another machine, as far as a forecast needs it.

    Attributes:
        name: What it is called on the command line.
        title: What it is, in words.
        processor: Its processor, in words.
        instructions: ``"neon"`` or ``"avx2"``: which of the kernels' code runs there.
        cores: Cores that compute; small ones beside large ones are left out.
        clock_hz: Their clock where all compute.
        lanes: Values of 32 bits that a core's vector units begin to multiply and add in a cycle.
        dense_products_per_s: Multiply-adds a second of large float32 matrices on all cores. It is HPL's result in
            flop/s: half of that are multiply-adds of 64 bits, and twice as many of 32 bits.
        memory_bytes_per_s: What all cores together read from memory.
        disk_bytes_per_s: What is read from disk, one after the other.
        ram_bytes: RAM, as its system counts it.
        reserved_bytes: What of that the system, Python and torch take.
        sources: Name of a figure → where it comes from.

    Raises:
        LowvramError: A figure is missing or out of bounds; it is named.
    """

    name: str
    title: str
    processor: str
    instructions: str
    cores: int
    clock_hz: int
    lanes: int
    dense_products_per_s: int
    memory_bytes_per_s: int
    disk_bytes_per_s: int
    ram_bytes: int
    reserved_bytes: int
    sources: Mapping[str, str] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        for name in ("name", "title", "processor"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name).strip():
                raise LowvramError(f"{name}: expected words, found {getattr(self, name)!r}")
        if self.instructions not in INSTRUCTIONS:
            raise LowvramError(f"instructions: expected {' or '.join(INSTRUCTIONS)}, found {self.instructions!r}")
        for name, (least, most) in BOUNDS.items():
            if not is_whole_number(getattr(self, name), least, most):
                raise LowvramError(
                    f"{name}: expected a whole number from {least} to {most}, found {getattr(self, name)!r}"
                )
        if self.reserved_bytes >= self.ram_bytes:
            raise LowvramError(f"reserved_bytes: expected less than ram_bytes, found {self.reserved_bytes}")
        self._check_sources()

    def _check_sources(self) -> None:
        if not isinstance(self.sources, Mapping):
            raise LowvramError(f"sources: expected the name and the source of figures, found {self.sources!r}")
        for name, text in self.sources.items():
            if name not in BOUNDS or not isinstance(text, str):
                raise LowvramError(f"sources: expected words for {', '.join(BOUNDS)}, found {name!r}: {text!r}")

    @property
    def usable_bytes(self) -> int:
        """What of the RAM a model may have."""
        return self.ram_bytes - self.reserved_bytes

    def summary(self) -> str:
        """One line."""
        return (
            f"{self.title}: {self.processor}; {format_bytes(self.usable_bytes)} of {format_bytes(self.ram_bytes)} RAM "
            f"for a model, {self.memory_bytes_per_s / 1e9:.1f} GB/s, disk {self.disk_bytes_per_s / 1e6:.0f} MB/s "
            "(assumed)"
        )

    def to_dict(self) -> dict:
        """Plain data, as in its file, and ``origin``."""
        return {**asdict(self), "sources": dict(self.sources), "usable_bytes": self.usable_bytes, "origin": ASSUMED}

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{name}</td><td>{getattr(self, name)}</td><td>{self.sources.get(name, '')}</td></tr>"
            for name in BOUNDS
        )
        return f"<b>Profile</b> {self.summary()}<table>{rows}</table>"
