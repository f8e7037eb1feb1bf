"""What every command says that makes a smaller model into a directory: its bytes before and after, and what it took."""

from dataclasses import asdict, dataclass

from lowvram_lab.units import format_bytes


@dataclass(frozen=True, kw_only=True)
class Smaller:
    """A directory with a smaller model.

    Attributes:
        output: The directory.
        weight_bytes: Of the weights that are left.
        source_weight_bytes: Of the model's weights before.
        seconds: Of this run; one that was resumed counts from the resumption.
        peak_rss_bytes: Highest resident memory of this process so far.
    """

    output: str
    weight_bytes: int
    source_weight_bytes: int
    seconds: float
    peak_rss_bytes: int

    @property
    def reduction(self) -> float:
        """Share of the model's bytes that are saved."""
        return 1 - self.weight_bytes / self.source_weight_bytes

    def to_dict(self) -> dict:
        """Plain data."""
        return {**asdict(self), "reduction": self.reduction}

    @property
    def sizes(self) -> str:
        """Bytes before and after, in words."""
        before, after = format_bytes(self.source_weight_bytes), format_bytes(self.weight_bytes)
        return f"{after} of weights instead of {before}, {self.reduction:.1%} less"

    @property
    def effort(self) -> str:
        """Time and memory, in words."""
        return f"{self.seconds:.0f} s, peak resident memory {format_bytes(self.peak_rss_bytes)}"
