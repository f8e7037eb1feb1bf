"""A model's head, a few rows at a time: its logits without the table in float32."""

from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812

HEAD_TOKENS, HEAD_ROWS = 64, 4096
"""Tokens and vocabulary rows of the head worked on at once: 64 x 152k logits are 37 MiB, 4096 x 2560 weights 40."""


def head_logits(
    x: torch.Tensor, rows: Callable[[slice], torch.Tensor], count: int, bias: torch.Tensor | None
) -> torch.Tensor:
    """Logits ``(tokens, vocab)``.

    Args:
        x: What the head is given, ``(tokens, hidden)``.
        rows: Rows of the head's weight, in the dtype of ``x``, from where to where.
        count: How many rows there are.
        bias: Of the head, if it has one.
    """
    pieces = [F.linear(x, rows(slice(start, start + HEAD_ROWS))) for start in range(0, count, HEAD_ROWS)]
    logits = torch.cat(pieces, dim=-1)
    return logits + bias if bias is not None else logits


def head_gradient(gradient: torch.Tensor, rows: Callable[[slice], torch.Tensor]) -> torch.Tensor:
    """The gradient at what the head is given, ``(tokens, hidden)``, from that at its logits.

    Args:
        gradient: ``(tokens, vocab)``.
        rows: See ``head_logits``.
    """
    found = 0
    for at, piece in enumerate(gradient.split(HEAD_ROWS, dim=-1)):
        found = found + piece @ rows(slice(at * HEAD_ROWS, (at + 1) * HEAD_ROWS))
    return found
