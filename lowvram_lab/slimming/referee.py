"""The referee: what quantising alone reaches in the bytes of a smaller model, measured by the same yardstick.

Where 8 bits everywhere are few enough, that is what is taken, rounded to nearest: it needs no calibration, and whoever
loses to it loses to a better recipe too. Else a recipe for those bytes is really made, and measured.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lowvram_lab.conversion.convert import convert
from lowvram_lab.conversion.smaller import Smaller
from lowvram_lab.errors import BudgetError
from lowvram_lab.model.plan import Plan
from lowvram_lab.model.source import Source, find_source
from lowvram_lab.model.spec import ModelSpec
from lowvram_lab.slimming.yardstick import Distance, Yardstick
from lowvram_lab.units import format_bytes
from lowvram_lab.weights.layerwise import LayerByLayer
from lowvram_lab.weights.recipe import WeightBudget
from lowvram_lab.weights.restored import RestoredLayers

EVERYWHERE = "int8"
SLIMMING, QUANTISING, NEITHER = "slimming", "quantising", "neither"


@dataclass(frozen=True)
class Rival:
    """The whole model, quantised into some bytes.

    Attributes:
        way: ``"int8 everywhere"``, or ``"a recipe"``.
        weight_bytes: What its weights take, no more than the bytes that it was to keep to.
        distance: From the whole model.
        nats_a_byte: Of another text, where that was asked for.
    """

    way: str
    weight_bytes: int
    distance: Distance
    nats_a_byte: float | None = None

    def to_dict(self) -> dict:
        """Plain data."""
        own = {"way": self.way, "weight_bytes": self.weight_bytes, "nats_a_byte": self.nats_a_byte}
        return own | self.distance.to_dict()


@dataclass(frozen=True)
class Verdict:
    """A smaller model beside a rival of no more bytes.

    Attributes:
        weight_bytes: Of the smaller model.
        distance: Its own, from the whole model.
        rival: ``None`` where nothing that is quantised is so small.
        nats_a_byte: Of another text, by the whole model and by this one, where the distance is of the text by which
            tokens were chosen.
    """

    weight_bytes: int
    distance: Distance
    rival: Rival | None
    nats_a_byte: tuple[float, float] | None = None

    @property
    def winner(self) -> str:
        """``"slimming"``, ``"quantising"``, or ``"neither"`` where they differ by no more than chance would."""
        if self.rival is None or self.distance.closer_than(self.rival.distance):
            return SLIMMING
        return QUANTISING if self.rival.distance.closer_than(self.distance) else NEITHER

    def to_dict(self) -> dict:
        """Plain data."""
        own = {"weight_bytes": self.weight_bytes, **self.distance.to_dict()}
        if self.nats_a_byte:
            own |= dict(zip(("whole_nats_a_byte", "nats_a_byte"), self.nats_a_byte, strict=True))
        rival = self.rival and self.rival.to_dict()
        return own | {"rival": rival, "winner": self.winner, "summary": self.summary()}

    def summary(self) -> str:
        """One line, or two where another text was read."""
        size, text = format_bytes(self.weight_bytes), " on the text it was chosen by" if self.nats_a_byte else ""
        if self.rival is None:
            return f"referee: nothing that is quantised alone fits into {size}"
        rival = f"{self.rival.way} ({format_bytes(self.rival.weight_bytes)}) {self.rival.distance.summary()}"
        ending = "neither wins" if self.winner == NEITHER else f"{self.winner} wins"
        return f"referee{text}: this ({size}) {self.distance.summary()}, {rival}: {ending}{self._other_text()}"

    def _other_text(self) -> str:
        if self.nats_a_byte is None or self.rival is None:
            return ""
        whole, this = self.nats_a_byte
        found = f"this {this:.3f}, {self.rival.way} {self.rival.nats_a_byte:.3f}, the whole model {whole:.3f}"
        return f"\non another text, nats a byte: {found}"


@dataclass(frozen=True, kw_only=True)
class Refereed(Smaller):
    """A directory with a smaller model, and a verdict on it.

    Attributes:
        referee: ``Verdict.to_dict()``; ``None`` where none was asked for.
    """

    referee: dict | None = None

    @property
    def verdict(self) -> str:
        """The referee's word on a line of its own, if there is one."""
        return f"\n{self.referee['summary']}" if self.referee else ""


def rival_of(
    source: Source,
    whole: LayerByLayer,
    weight_bytes: int,
    yardstick: Yardstick,
    *,
    read: Callable[[LayerByLayer], float] | None = None,
    progress: bool = True,
) -> Rival | None:
    """What quantising alone reaches in some bytes.

    Args:
        source: The whole model's.
        whole: The same as a stream.
        weight_bytes: That weights may take.
        yardstick: The whole model's.
        read: What gives a model's nats a byte on another text.
        progress: Show progress bars.

    Returns:
        ``None`` where no recipe is so small.
    """
    if whole.spec.held:
        held = Plan.uniform(whole.spec, "stored", context=2).weight_bytes()
        if held <= weight_bytes:
            return Rival("the file as it is", held, yardstick.distance(whole), read and read(whole))
    plan = uniform_plan(whole.spec)
    if plan.weight_bytes() <= weight_bytes:
        stream = RestoredLayers(whole.spec, whole.checkpoint, plan)
        return Rival(f"{EVERYWHERE} everywhere", plan.weight_bytes(), yardstick.distance(stream), read and read(stream))
    with tempfile.TemporaryDirectory(prefix="lowvram-referee-") as folder:
        try:
            made = convert(source.name, Path(folder) / "recipe", WeightBudget(weight_bytes), progress=progress)
        except BudgetError:
            return None
        found = find_source(made.output)
        stream = RestoredLayers(found.spec(), found.checkpoint(False))
        return Rival("a recipe", made.weight_bytes, yardstick.distance(stream), read and read(stream))


def uniform_plan(spec: ModelSpec) -> Plan:
    """Eight bits everywhere."""
    return Plan.uniform(spec, EVERYWHERE, context=min(2048, spec.max_position_embeddings or 2048))
