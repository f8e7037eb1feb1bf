"""slim_to_size: tokens, layers and bits chosen together, for the least divergence within a number of bytes.

Each of the three has its price list: what the tokens that a text has no use for were likely (measured), what leaving
out one layer after the other costs (measured), what fewer bits cost (estimated, ``weights/sensitivity.py``). Sums of
the three rank all combinations; a sum is no measurement, so the best ones are really made, and beside them what each
tool reaches alone. The one that is measured to be closest stays: alone, no tool is closer on that text.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from lowvram_lab.conversion.smaller import Smaller
from lowvram_lab.errors import LowvramError
from lowvram_lab.files import expanded, locked, refuse_occupied, settled
from lowvram_lab.memory.host import peak_rss_bytes
from lowvram_lab.model.source import find_source
from lowvram_lab.model.spec import ModelSpec
from lowvram_lab.packaged import calibration_text, sample_text
from lowvram_lab.slimming.search import BITS, SLIM_ALONE, Folder, Search, weight_bytes_of
from lowvram_lab.slimming.slim import read_texts
from lowvram_lab.units import format_bytes, parse_bytes

MOST_LAYERS = 6
"""That are left out at the most, and no more than a fifth of the model's."""

HELD_OUT = 8
"""Every eighth part of a user's text is measured on, and nothing is fitted to it."""


@dataclass(frozen=True, kw_only=True)
class SlimmedToSize(Smaller):
    """What was removed of a model, and how many bits the rest has; see ``Smaller``, whose sizes are those in memory.

    Attributes:
        vocab_before: Tokens of the model.
        vocab_after: Tokens that are left.
        layers_before: Of the model.
        removed: Indices of the layers that went.
        kl: Distance from the whole model, nats a token, see ``Yardstick``.
        kl_interval: Where it lies for 95 % of such texts.
        kl_tokens: Measured on.
        parameters: Weights that are left.
        table: ``kind``, ``tokens``, ``layers``, ``weight_bytes``, ``estimated`` and, of those that were really made,
            ``kl``, ``low`` and ``high``, one row a combination, the closest by estimate first. A DataFrame.
    """

    vocab_before: int
    vocab_after: int
    layers_before: int
    removed: tuple[int, ...]
    kl: float
    kl_interval: tuple[float, float]
    kl_tokens: int
    parameters: int
    table: pd.DataFrame

    def to_dict(self) -> dict:
        """Plain data."""
        values = {name: value for name, value in self.__dict__.items() if name != "table"}
        rows = json.loads(self.table.to_json(orient="records"))
        return {**values, "removed": list(self.removed), "reduction": self.reduction, "table": rows}

    def summary(self) -> str:
        """What a person wants to know."""
        left = self.layers_before - len(self.removed)
        low, high = self.kl_interval
        without = f" (without {', '.join(map(str, self.removed))})" if self.removed else ""
        return (
            f"{self.output}: {self.vocab_after:,} of {self.vocab_before:,} tokens, {left} of {self.layers_before} "
            f"layers{without}, {8 * self.weight_bytes / self.parameters:.1f} bits a weight\n"
            f"{self.kl:.4f} nats a token from the whole model ({low:.4f} to {high:.4f}), on {self.kl_tokens} tokens "
            f"that nothing was fitted to; {self._others()}\n{self.sizes}; {self.effort}"
        )

    def _others(self) -> str:
        made = self.table.dropna(subset="kl").drop_duplicates("kind")
        beside = [f"{row.kind} {row.kl:.4f}" for row in made.itertuples() if row.kl != self.kl]
        missing = [f"{kind}: not so small" for kind in (BITS, SLIM_ALONE) if kind not in set(self.table["kind"])]
        return ", ".join([*beside, *missing]) or "nothing else is so small"

    def _repr_html_(self) -> str:
        lines = self.summary().replace("\n", "<br>")
        return f"<b>Slimmed</b> {lines}<br>{self.table.to_html(index=False, float_format='{:.4f}'.format)}"


def slim_to_size(
    model: str,
    output: str | Path,
    weight_bytes: int | str,
    *,
    texts: str | Path | Sequence[str | Path] | None = None,
    most_layers: int | None = None,
    progress: bool = True,
) -> SlimmedToSize:
    """Writes a model within a number of bytes, whatever it takes of tokens, layers and bits, as close as may be.

    Killed, it goes on where it was when called again with the same arguments.

    Args:
        model: Name, hub id, directory or .gguf file of a 16-bit model.
        output: A new or empty directory.
        weight_bytes: What the weights may take in memory, such as ``"80MiB"``.
        texts: Files with text like what the model will read; by default the library's own text. Tokens that are not in
            it may go; an eighth of it (of the library's: another text) is what is measured on.
        most_layers: That may go; by default 6, and no more than a fifth of the model's.
        progress: Show progress bars, on stderr.

    Returns:
        What was removed, and all combinations with what they were estimated and measured to cost.

    Raises:
        LowvramError: Output not empty, text too short, no disk space, a number of layers that there are not.
        BudgetError: Nothing is so small.
        SourceError: No such model.
        CheckpointError: Damaged weights, or layers that cannot be run by themselves.
    """
    began = time.monotonic()
    output, budget = settled(expanded(output)), parse_bytes(weight_bytes)
    refuse_occupied(output)
    fitted, held_out, names = _two_texts(texts)
    source = find_source(model)
    spec = source.spec(source.public_name)
    if spec.stored:
        raise LowvramError(f"{model} is a converted model; begin with the 16-bit original it was made from")
    most = _checked_most(most_layers, spec)
    if (held := weight_bytes_of(spec)) <= budget:
        raise LowvramError(
            f"expected fewer bytes than the model's {format_bytes(held)}, found "
            f"{format_bytes(budget)}: there is nothing to remove"
        )
    with locked(output) as lock:
        refuse_occupied(output)
        search = Search(source, spec, budget, (fitted, held_out), progress)
        facts = search.run(Folder(output, search.identity(most)), most)
        facts |= {"texts": names, "weight_budget": budget}
        search.publish(output, facts)
    with contextlib.suppress(OSError):
        lock.unlink()
    return SlimmedToSize(
        output=str(output),
        **{key: facts[key] for key in ("vocab_before", "vocab_after", "layers_before", "kl", "kl_tokens")},
        **{key: facts[key] for key in ("weight_bytes", "source_weight_bytes", "parameters")},
        removed=tuple(facts["removed"]),
        kl_interval=tuple(facts["kl_interval"]),
        table=pd.DataFrame(facts["candidates"]),
        seconds=time.monotonic() - began,
        peak_rss_bytes=peak_rss_bytes(),
    )


def _two_texts(texts: str | Path | Sequence[str | Path] | None) -> tuple[str, str, list[str]]:
    """What is fitted to, what is measured on, and names: of each of a user's files the end is measured on."""
    if texts is None:
        return calibration_text(), sample_text(), ["the texts that come with lowvram_lab"]
    read = read_texts(texts)
    ends = [len(text) - len(text) // HELD_OUT for text in read.values()]
    fitted = "\n".join(text[:end] for text, end in zip(read.values(), ends, strict=True))
    return fitted, "\n".join(text[end:] for text, end in zip(read.values(), ends, strict=True)), list(read)


def _checked_most(most: int | None, spec: ModelSpec) -> int:
    fifth = spec.num_hidden_layers // 5
    if most is None:
        return min(MOST_LAYERS, fifth)
    if type(most) is not int or not 0 <= most < spec.num_hidden_layers:
        raise LowvramError(f"expected 0 to {spec.num_hidden_layers - 1} layers that may go, found {most!r}")
    return most
