"""How one matrix lies in a checkpoint's files, and which format here takes its codes as they lie.

A weight is ``(code - shift) * scale``, with one scale and one shift, a small integer, for every group of codes. Formats
of four bits and less have a zero beside the scale, which holds any shift; in the others the shift is taken off the
codes, which then need one bit more, and nothing is lost. What has no such home is read in floats and rounded to eight
bits in groups of 32, which is near to anything.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch

from lowvram_lab.errors import CheckpointError

Read = Callable[[str], torch.Tensor]
"""The part of a tensor's name behind the module's → the tensor, mapped."""

GROUPS = (256, 128, 64, 32)
"""Sizes of groups that formats of 2 to 6 bits have, largest first."""

SMALL_GROUP = 16
IN_SMALL_GROUPS = ((2, True), (3, False), (5, False), (6, False), (8, False))
"""Bits, and whether there are zeros, of formats that have such groups too."""

INT8_GROUP = 32
"""That of eight bits, where it is no whole row."""

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Stored:
    """What a file is to hold under one name.

    Attributes:
        shape: Expected; ``None`` for any.
        dtypes: Of these.
        optional: Whether it may be missing.
    """

    shape: tuple[int, ...] | None
    dtypes: tuple[torch.dtype, ...]
    optional: bool = False


@dataclass(frozen=True)
class Layout(ABC):
    """Of one module's weight.

    Attributes:
        rows: Output features.
        columns: Input features.
        by_rows: Whether some rows are restored without the others.
    """

    by_rows: ClassVar[bool] = True
    rows: int
    columns: int

    @property
    @abstractmethod
    def held(self) -> str:
        """The name of the format that it is held in."""

    @property
    @abstractmethod
    def exact(self) -> bool:
        """Whether that format takes the codes as they lie; else floats are rounded to it."""

    @abstractmethod
    def tensors(self) -> dict[str, Stored]:
        """What the files hold of it: the part of the name behind the module's → shape and dtype."""

    @abstractmethod
    def floats(self, read: Read, rows: slice) -> torch.Tensor:
        """Some rows in float32, ``(rows, columns)``."""

    @property
    def near(self) -> str:
        """The format that loses next to nothing of any weight of this shape."""
        return "int8" if self.columns % INT8_GROUP else f"int8-g{INT8_GROUP}"


@dataclass(frozen=True)
class Integers(Layout):
    """A matrix of integers in groups.

    Attributes:
        bits: Of a code.
        group_size: Columns that share a scale.
        shifted: Whether groups have shifts.
        reordered: Whether a group's columns do not lie together (act-order).
    """

    bits: int
    group_size: int
    shifted: bool = False
    reordered: bool = False

    @abstractmethod
    def codes(self, read: Read, rows: slice) -> torch.Tensor:
        """Signed codes ``(rows, columns)`` int8."""

    @abstractmethod
    def scales(self, read: Read, rows: slice) -> torch.Tensor:
        """``(rows, groups)`` float32."""

    def shifts(self, read: Read, rows: slice) -> torch.Tensor:
        """What is taken off the codes before they are scaled, ``(rows, groups)`` float32 of integers."""
        raise NotImplementedError(f"{type(self).__name__} says that groups are shifted, and not by how much")

    def order(self, read: Read) -> torch.Tensor | None:
        """The group of every column ``(columns,)``; ``None`` where they lie in order."""
        return None

    @property
    def groups(self) -> int:
        """How many a row has."""
        return -(-self.columns // self.group_size)

    @property
    def _home(self) -> tuple[str, int] | None:
        """A format's name and the size of its groups."""
        bits = self.bits + (self.shifted and not self._with_zeros)
        bits = 8 if bits == 7 else bits
        if self.reordered or bits > 8 or self.columns % self.group_size:
            return None
        if bits == 8 and self.group_size == self.columns:
            return "int8", self.columns
        sizes = (INT8_GROUP,) if bits == 8 else GROUPS
        if (bits, self._with_zeros) in IN_SMALL_GROUPS and self.columns % GROUPS[-1] == 0:
            sizes += (SMALL_GROUP,)
        size = next((size for size in sizes if self.group_size % size == 0), None)
        ending = "-asym" if self._with_zeros and bits != 4 else ""
        return size and (f"int{bits}{'' if size == 64 else f'-g{size}'}{ending}", size)

    @property
    def _with_zeros(self) -> bool:
        """Whether shifts become zeros of a format."""
        return self.shifted and self.bits <= 4

    @property
    def exact(self) -> bool:
        """See ``Layout``."""
        return self._home is not None

    @property
    def held(self) -> str:
        """See ``Layout``."""
        return self._home[0] if self._home else self.near

    def floats(self, read: Read, rows: slice) -> torch.Tensor:
        """See ``Layout``."""
        order = self.order(read)
        if order is None:
            order = torch.arange(self.columns) // self.group_size
        values, scales = self.codes(read, rows).float(), self.scales(read, rows)
        if self.shifted:
            values -= self.shifts(read, rows)[:, order]
        return values.mul_(scales[:, order])

    def integers(self, read: Read, rows: slice) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Some rows for the format that is the matrix's home.

        Returns:
            Codes ``(rows, columns)`` int8; scales and zeros ``(rows, groups)`` float32 of the format's groups, zeros
            being added, and ``None`` where there are none.

        Raises:
            CheckpointError: The files hold what the config denies.
        """
        _, size = self._home
        codes, scales, zeros = self.codes(read, rows), self.scales(read, rows), None
        if self.order(read) is not None:
            raise CheckpointError("its columns are in groups in another order than its config says; fetch it anew")
        if self.shifted:
            shifts = self.shifts(read, rows)
            if self._with_zeros:
                zeros = -shifts * scales
            else:
                off = codes.to(torch.int16) - shifts.to(torch.int16).repeat_interleave(self.group_size, 1)
                codes = off.to(torch.int8)
        times = self.group_size // size
        spread = (None if each is None else each.repeat_interleave(times, 1) for each in (scales, zeros))
        return codes, *spread
