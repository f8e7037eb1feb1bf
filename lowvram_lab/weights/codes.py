"""Codes of 2 to 8 bits packed tight into 32-bit words, and back.

The layout is compressed-tensors' ``pack-quantized``: a signed code is stored as ``code + 2^(bits-1)``; code ``i`` of a
row begins at bit ``i * bits`` and may straddle two words, so 32 codes fill exactly ``bits`` words. What lies on disk is
what lies in memory. A test holds it to that library's own functions.
"""

import torch

PACK_CODES = 32
"""Codes that fill a whole number of words, whatever their width."""


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Packs signed codes.

    Args:
        codes: ``(rows, columns)`` int8, each in ``-2^(bits-1) … 2^(bits-1) - 1``; columns a multiple of 32.
        bits: 2 to 8.

    Returns:
        ``(rows, columns * bits / 32)`` int32.
    """
    rows, columns = codes.shape
    blocks = codes.view(rows, columns // PACK_CODES, PACK_CODES)
    words = torch.zeros(rows, columns // PACK_CODES, bits, dtype=torch.int32)
    for lane in range(PACK_CODES):
        word, shift = divmod(lane * bits, 32)
        code = blocks[..., lane].to(torch.int32).add_(1 << (bits - 1))
        words[..., word] |= code << shift
        if shift + bits > 32:
            words[..., word + 1] |= code >> (32 - shift)
    return words.view(rows, columns // PACK_CODES * bits)


def unpack(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Signed codes from packed words.

    Args:
        words: ``(rows, words)`` int32, as ``pack`` makes them.
        bits: 2 to 8.

    Returns:
        ``(rows, 32 * words / bits)`` int8.
    """
    rows, mask, offset = words.shape[0], (1 << bits) - 1, 1 << (bits - 1)
    blocks = words.view(rows, words.shape[1] // bits, bits)
    codes = words.new_empty(rows, blocks.shape[1], PACK_CODES, dtype=torch.int8)
    for lane in range(PACK_CODES):
        word, shift = divmod(lane * bits, 32)
        code = blocks[..., word] >> shift  # arithmetic: the mask takes the copied sign bits away
        if shift + bits > 32:
            code &= (1 << (32 - shift)) - 1
            code |= blocks[..., word + 1] << (32 - shift)
        codes[..., lane] = (code & mask) - offset
    return codes.view(rows, words.shape[1] * 32 // bits)
