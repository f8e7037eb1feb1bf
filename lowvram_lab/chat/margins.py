"""Where a model's high planes are unsure: read off a text once, kept in the cache folder.

Derived in: notebooks/08_precision_on_demand.ipynb
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowvram_lab import __version__
from lowvram_lab.decoding.escalate import Margins, read_margins
from lowvram_lab.engine.loaded import loaded
from lowvram_lab.errors import LowvramError
from lowvram_lab.files import cache_dir, remember
from lowvram_lab.packaged import calibration_text
from lowvram_lab.repository.text import equal_windows, first_ids, plain_ids

WINDOW = 256
"""Tokens that are read together."""

TOKENS, MOST_TOKENS = 8192, 24576
"""Read at least and at most, as far as the text goes."""

FLIPS = 150
"""Counted below the rate, where the text is long enough: with 40 of them it was off by up to 60 % on other text."""


def tokens_for(flip_rate: float) -> int:
    """How many tokens to read, to know where a rate of flips is kept."""
    return max(TOKENS, min(MOST_TOKENS, int(FLIPS / max(flip_rate, FLIPS / MOST_TOKENS))))


def margins_of(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str | None = None,
    *,
    tokens: int | None = None,
    progress: bool = True,
) -> Margins:
    """The margins of a loaded model's high planes on a text; read once, then known.

    Args:
        model: From ``load``, with its low planes.
        tokenizer: Its tokenizer.
        text: Like what it will be asked; by default the library's calibration text.
        tokens: How many of it to read (8192); see ``tokens_for``.
        progress: Show a progress bar.

    Raises:
        LowvramError: The text is shorter than a window, or the model has no low planes.
    """
    plan = loaded(model).plan
    if not plan.low_planes():
        raise LowvramError(f"expected a model with its low planes, found {plan.model} in {plan.summary()}")
    window = min(WINDOW, plan.context - 1)
    windows = equal_windows(plain_ids(tokenizer, text or calibration_text()), first_ids(tokenizer), window)
    windows = windows[: max(1, (tokens or TOKENS) // window)]
    files = getattr(loaded(model).weights, "files", ())  # nothing else says which weights these are
    kept = cache_dir() / "margins" / f"{_identity(model, files, windows)}.json"
    try:
        values = json.loads(kept.read_text(encoding="utf-8")) if files else {}
        return Margins(torch.tensor(values["margins"]), torch.tensor(values["flips"], dtype=torch.bool))
    except (OSError, ValueError, KeyError, TypeError):
        pass
    shown = tqdm(windows, desc="where both planes are needed", unit="window", disable=not progress, leave=False)
    found = Margins.joined([read_margins(model, window) for window in shown])
    if files:
        remember(kept, json.dumps({"margins": found.margins.tolist(), "flips": found.flips.int().tolist()}))
    return found


def _identity(model: PreTrainedModel, files: Sequence[Path], windows: torch.Tensor) -> str:
    """What the margins depend on: the weights' files and formats, and the text."""
    plan = loaded(model).plan
    formats = sorted((name, assignment.format) for name, assignment in plan.modules.items())
    stamps = [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    facts = [__version__, plan.model, plan.dtype, plan.solver, formats, stamps, windows.tolist()]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]
