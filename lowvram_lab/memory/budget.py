"""The size of a card, and what of it is left for tensors."""

import re
from dataclasses import dataclass, field

from lowvram_lab.errors import BudgetError, UnitError
from lowvram_lab.memory.card import Card, find_card, this_card
from lowvram_lab.units import GiB, MiB, format_bytes, parse_bytes

CUDA_CONTEXT_BYTES = 384 * MiB
"""What a CUDA context and its loaded kernels take beside PyTorch's allocator: 0.25 to 0.5 GiB, by card and driver."""

SMALLEST_CARD = 1 * GiB
"""A budget below this is no real card but a teaching one: no CUDA context is counted unless one is asked for."""


@dataclass(frozen=True)
class GpuBudget:
    """What a card has, and what of it the CUDA context takes before the first tensor.

    Attributes:
        total_bytes: The card's memory.
        context_bytes: CUDA context, not available to tensors.
        kernels: Whose kernels run there, with their temporaries: ``"cuda"``, or ``"cpu"`` on the stand-in.
        card: What decides which of CUDA's kernels; by default this machine's card, or an RTX 3050 where there is none.
    """

    total_bytes: int
    context_bytes: int = 0
    kernels: str = "cuda"
    card: Card = field(default_factory=this_card)

    def __post_init__(self) -> None:
        if self.kernels not in ("cuda", "cpu"):
            raise BudgetError(f"expected kernels cuda or cpu, found {self.kernels!r}")

    @classmethod
    def parse(
        cls, size: "str | int | GpuBudget", cuda_context: str | int | None = None, card: str | None = None
    ) -> "GpuBudget":
        """Reads a budget such as ``"4GiB"``; a card sold as 4GB is the same (see ``parse_bytes``).

        Args:
            size: The card's memory.
            cuda_context: Bytes of the CUDA context; by default 384 MiB, and 0 for a card under 1 GiB.
            card: Name or capability (``"t4"``, ``"sm_86"``, see ``find_card``); by default as ``GpuBudget.card``.

        Raises:
            UnitError: A size cannot be read.
            BudgetError: Nothing is left for tensors, or the card is not known.
        """
        if isinstance(size, GpuBudget):
            return size
        total = _card_bytes(size)
        if cuda_context is None:
            context = CUDA_CONTEXT_BYTES if total >= SMALLEST_CARD else 0
        else:
            zero = re.fullmatch(r"\s*0+(\.0+)?\s*[A-Za-z]*\s*", str(cuda_context))
            context = 0 if zero else parse_bytes(cuda_context)
        if total < MiB:
            raise BudgetError(f"a GPU budget of {size!r} was read as {total} bytes; write it with a unit, e.g. 4GiB")
        if context >= total:
            raise BudgetError(
                f"the CUDA context ({format_bytes(context)}) leaves nothing of a {format_bytes(total)} GPU; "
                "give a larger budget"
            )
        return cls(total, context, card=find_card(card) if card else this_card())

    @property
    def usable_bytes(self) -> int:
        """What tensors may take."""
        return self.total_bytes - self.context_bytes


def _card_bytes(size: str | int) -> int:
    """The memory of a card; who names the card itself is told to say its memory."""
    if isinstance(size, str) and re.match(r"\s*[A-Za-z]", size):
        device = re.fullmatch(r"\s*(cuda|gpu)?(:?[0-9]+)?\s*", size, re.IGNORECASE)
        which = "CUDA_VISIBLE_DEVICES chooses the card" if device else "nvidia-smi says what a card has"
        raise UnitError(f"expected the card's memory, e.g. 4GiB, found {size!r}; {which}")
    return parse_bytes(size)
