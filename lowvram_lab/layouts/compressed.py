"""compressed-tensors' integers: packed or a byte each, with zero points, one scale a group, a row or a matrix.

Source: compressed-tensors' ``pack_quantized`` and ``naive_quantized`` compressors; which module a scheme is of, its
``quantization/utils`` and ``quantization/lifecycle/apply``.
"""

import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812

from lowvram_lab.layouts.layout import FLOATS, Integers, Read, Stored
from lowvram_lab.layouts.packing import unpack


@dataclass(frozen=True)
class Compressed(Integers):
    """``weight_packed`` or ``weight``, ``weight_scale``, ``weight_zero_point``, ``weight_g_idx``.

    Attributes:
        packed: Whether codes fill words; else each has a byte.
        whole: Whether there is one scale for the matrix.
    """

    packed: bool = True
    whole: bool = False

    def tensors(self) -> dict[str, Stored]:
        """See ``Layout``."""
        words = -(-self.columns * self.bits // 32)
        codes = {"weight_packed": Stored((self.rows, words), (torch.int32,))}
        if not self.packed:
            codes = {"weight": Stored((self.rows, self.columns), (torch.int8,))}
        found = codes | {
            "weight_scale": Stored(None if self.whole else (self.rows, self.groups), FLOATS),
            "weight_shape": Stored((2,), (torch.int64, torch.int32), optional=True),
        }
        if self.shifted:
            packed = (-(-self.rows * self.bits // 32), self.groups), (torch.int32,)
            plain = None if self.whole else (self.rows, self.groups), (torch.int8,)
            found["weight_zero_point"] = Stored(*(packed if self.packed else plain))
        if self.reordered:
            found["weight_g_idx"] = Stored((self.columns,), (torch.int32, torch.int64))
        return found

    def codes(self, read: Read, rows: slice) -> torch.Tensor:
        """See ``Integers``."""
        if not self.packed:
            return read("weight")[rows]
        return self._unpacked(read("weight_packed")[rows], self.columns)

    def scales(self, read: Read, rows: slice) -> torch.Tensor:
        """See ``Integers``."""
        return self._of(read("weight_scale").float(), rows)

    def shifts(self, read: Read, rows: slice) -> torch.Tensor:
        """See ``Integers``."""
        stored = read("weight_zero_point")
        if self.packed:
            stored = self._unpacked(stored.T, self.rows).T
        return self._of(stored.float(), rows)

    def order(self, read: Read) -> torch.Tensor | None:
        """See ``Integers``."""
        return read("weight_g_idx").long() if self.reordered else None

    def _unpacked(self, words: torch.Tensor, count: int) -> torch.Tensor:
        """``count`` codes of every row, whose last words may be filled in part."""
        whole = F.pad(words, (0, -words.shape[1] % self.bits))  # ``unpack`` takes so many that codes end with a word
        return unpack(whole.contiguous(), self.bits)[:, :count]

    def _of(self, stored: torch.Tensor, rows: slice) -> torch.Tensor:
        start, stop, _ = rows.indices(self.rows)
        return stored.reshape(1, 1).expand(stop - start, 1) if self.whole else stored[rows]


def weights_of(group: dict) -> dict:
    """What a group of a config says of its weights."""
    found = group.get("weights")
    return found if isinstance(found, dict) else {}


def targets(group: dict) -> list[str]:
    """What a group of a config names."""
    found = group.get("targets")
    return [target for target in found if isinstance(target, str)] if isinstance(found, list) else []


def matches(module, names: list[str]) -> bool:
    """compressed-tensors' rule: a class name, a module's name, or ``re:`` and a pattern."""
    known = {module.name, {"linear": "Linear", "embedding": "Embedding"}.get(module.kind)}
    return any(re.match(t[3:], module.name) if t.startswith("re:") else t in known for t in names)


def closest(module, groups: list[tuple[list[str], object]]) -> object | None:
    """What stands beside the names that fit a module best: its own before a pattern, a pattern before a class."""
    fitting = [(_closeness(module, names), found) for names, found in groups if matches(module, names)]
    return min(fitting, key=lambda entry: entry[0])[1] if fitting else None


def _closeness(module, names: list[str]) -> int:
    if module.name in names:
        return 0
    return 1 if matches(module, [name for name in names if name.startswith("re:")]) else 2
