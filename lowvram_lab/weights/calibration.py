"""Calibration text: tokens that a model is run over to learn which inputs its weights really meet."""

import torch
from transformers import PreTrainedTokenizerBase

from lowvram_lab.errors import LowvramError
from lowvram_lab.repository.text import equal_windows, first_ids, plain_ids

LEAST_TOKENS = 2048
"""Below this GPTQ fits its own sample: with 640 tokens it was worse than a clip search that needs 50 numbers."""

WINDOW = 512


def calibration_windows(tokenizer: PreTrainedTokenizerBase, text: str, tokens: int, longest: int) -> torch.Tensor:
    """Tokens of a text in windows of equal length, each begun as the model was trained (``repository/text.py``).

    Args:
        tokenizer: The model's.
        text: Long enough.
        tokens: At most so many in all; spread evenly over a longer text.
        longest: The model's longest context.

    Returns:
        ``(windows, length)`` int64, ``length`` 512 or the model's longest context.

    Raises:
        LowvramError: The text is too short.
    """
    ids = plain_ids(tokenizer, text)
    if len(ids) < LEAST_TOKENS:
        raise LowvramError(
            f"expected a calibration text of {LEAST_TOKENS} tokens or more, found {len(ids)}: fewer fit the sample, "
            "not the model; give a longer file"
        )
    length = min(WINDOW, longest or WINDOW)
    windows = equal_windows(ids, first_ids(tokenizer), length)
    return windows[evenly(len(windows), max(1, tokens // length))]


def evenly(count: int, wanted: int) -> torch.Tensor:
    """Indices of at most ``wanted`` of ``count`` things, evenly spread."""
    wanted = min(count, wanted)
    return torch.arange(wanted) * count // wanted
