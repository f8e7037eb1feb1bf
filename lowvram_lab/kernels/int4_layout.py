"""How int4 codes lie in memory: two a byte, or as torch's CPU kernel wants them; and back to codes, on any device.

torch's CPU packing interleaves the rows of a block as its vector unit reads them, so the order differs by machine. Its
inverse is learnt from what the packing does to a weight that numbers its rows, and checked on random codes.
"""

import functools

import torch

PACK_ROWS = 1024
"""Rows packed at a time for torch's CPU int4 kernel, which wants four bytes a code; a multiple of its blocks."""

_BLOCKS = (64, 32, 16)
_PROBE_COLUMNS = 32


def pack_for_cpu(codes: torch.Tensor) -> torch.Tensor:
    """``(out, in)`` uint8 of 0 to 15 → ``(out, in / 2)`` as torch's CPU kernel reads them; rows a multiple of 16."""
    rows, columns = codes.shape
    packed = torch.empty(rows, columns // 2, dtype=torch.uint8)
    for start in range(0, rows, PACK_ROWS):
        block = codes[start : start + PACK_ROWS].to(torch.int32)
        packed[start : start + PACK_ROWS] = torch.ops.aten._convert_weight_to_int4pack_for_cpu(block, 1)
    return packed


def two_per_byte(codes: torch.Tensor, high_first: bool) -> torch.Tensor:
    """Neighbouring columns in a byte, the even one low (or high). ``(out, in)`` → ``(out, in / 2)``."""
    even, odd = codes[:, ::2], codes[:, 1::2]
    return (even << 4) | odd if high_first else (odd << 4) | even


def unpack_from_cpu(packed: torch.Tensor) -> torch.Tensor:
    """Codes ``(rows, in)`` from what ``pack_for_cpu`` made, wherever it is: all rows, or a run of whole blocks.

    Raises:
        RuntimeError: torch packs on this machine in a way that is not known.
    """
    rows, columns = packed.shape[0], 2 * packed.shape[1]
    step = cpu_block_rows()
    if not step:
        raise RuntimeError("torch's CPU int4 packing has a layout that is not known here; plan without stream_from")
    whole = rows - rows % step
    parts = [_unpack_blocks(packed[:whole], step, columns)] if whole else []
    if rows > whole:
        parts.append(_unpack_blocks(packed[whole:], rows - whole, columns))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


@functools.cache
def cpu_block_rows() -> int:
    """Rows that torch's CPU packing interleaves on this machine; 0 where its way is none of those known."""
    probe = torch.randint(0, 16, (3 * max(_BLOCKS), _PROBE_COLUMNS), generator=torch.Generator().manual_seed(0))
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(probe.to(torch.int32), 1)
    for rows in _BLOCKS:
        if torch.equal(_unpack_blocks(packed, rows, _PROBE_COLUMNS), probe.to(torch.uint8)):
            for fewer in range(16, rows, 16):  # of the last block; learnt now, before a meter runs
                _places(fewer)
            return rows
    return 0


def _unpack_blocks(packed: torch.Tensor, block: int, columns: int) -> torch.Tensor:
    """Blocks of rows, a column's codes side by side within each: byte and nibble of a row from ``_places``."""
    # filled where the weight is, so that a meter sees them there; nobody waits for that, as the tables never change
    tables = _places(block)
    byte, shift = (packed.new_empty(block, dtype=table.dtype).copy_(table, non_blocking=True) for table in tables)
    codes = (packed.reshape(-1, columns, block // 2).index_select(-1, byte) >> shift) & 15
    return codes.transpose(1, 2).reshape(-1, columns)


@functools.cache
def _places(block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Byte (int32) and bit (uint8) at which each row of a block lies in a column."""
    byte, shift = [], []
    for row in range(block):
        codes = torch.zeros(block, _PROBE_COLUMNS, dtype=torch.int32)
        codes[row, 0] = 15
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1).flatten()
        place = int(packed.argmax())
        byte.append(place % (block // 2))
        shift.append(4 if packed[place] > 15 else 0)
    return torch.tensor(byte, dtype=torch.int32), torch.tensor(shift, dtype=torch.uint8)
