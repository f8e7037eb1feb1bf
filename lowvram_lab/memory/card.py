"""What of a card, beside its memory, decides what PyTorch allocates on it: capability and multiprocessors.

PyTorch picks kernels by compute capability (attention has no fused kernel for bf16 before 8.0), and some kernels take
buffers by the number of multiprocessors. Figures of the cards named here: NVIDIA's data sheets and the table "Compute
Capability" of https://developer.nvidia.com/cuda-gpus.
"""

import difflib
import functools
import re
from dataclasses import dataclass

from lowvram_lab.errors import BudgetError


@dataclass(frozen=True)
class Card:
    """A CUDA card.

    Attributes:
        capability: Compute capability, major and minor.
        multiprocessors: Streaming multiprocessors.
    """

    capability: tuple[int, int]
    multiprocessors: int

    @property
    def fuses_bf16(self) -> bool:
        """Whether there are fused kernels of attention for bf16, and units that multiply it."""
        return self.capability >= (8, 0)

    @property
    def multiplies_int4(self) -> bool:
        """Whether torch's int4 kernel runs there: it is compiled from 8.0 on, for bf16 alone (ATen's int4mm.cu)."""
        return self.capability >= (8, 0)

    def __str__(self) -> str:
        return f"capability {self.capability[0]}.{self.capability[1]}"


CARDS = {
    "t4": Card((7, 5), 40),
    "gtx1650": Card((7, 5), 14),
    "rtx2060": Card((7, 5), 30),
    "a100": Card((8, 0), 108),
    "rtx3050": Card((8, 6), 20),
    "rtx3060": Card((8, 6), 28),
    "rtx3090": Card((8, 6), 82),
    "rtx4060": Card((8, 9), 24),
    "rtx4090": Card((8, 9), 128),
    "l4": Card((8, 9), 58),
    "h100": Card((9, 0), 132),
    "h200": Card((9, 0), 132),
    "rtx5060": Card((12, 0), 30),
    "rtx5090": Card((12, 0), 170),
}
"""By the names they are sold under."""

USUAL = {75: "t4", 80: "a100", 86: "rtx3050", 89: "rtx4060", 90: "h100", 120: "rtx5060"}
"""The card that a capability alone stands for: ``sm_86``."""

DEFAULT = CARDS["rtx3050"]
"""Where there is no card and none is named: what is sold with 4 to 8 GB."""


def find_card(name: str) -> Card:
    """A card by its name (``"t4"``, ``"RTX 3050"``) or by capability alone (``"sm_86"``, ``"8.6"``).

    Raises:
        BudgetError: It is not known.
    """
    plain = re.sub(r"[^a-z0-9.]|nvidia|geforce|tesla", "", name.lower())
    capability = re.fullmatch(r"(?:sm)?(\d+)\.?(\d)", plain)
    key = USUAL.get(int(capability[1] + capability[2])) if capability else plain
    if key in CARDS:
        return CARDS[key]
    known = [f"sm_{each}" for each in USUAL] if capability else difflib.get_close_matches(plain, CARDS, cutoff=0.5)
    words = " or ".join(known or CARDS)
    raise BudgetError(f"expected a card such as {words}, found {name!r}; its capability alone will do: sm_86")


@functools.cache
def this_card() -> Card:
    """This machine's card, or ``DEFAULT`` where it has none."""
    import torch

    if not torch.cuda.is_available():
        return DEFAULT
    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    return Card((found.major, found.minor), found.multi_processor_count)
