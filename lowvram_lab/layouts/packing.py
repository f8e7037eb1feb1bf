"""Codes of 2 to 8 bits packed tight into 32-bit words, and back.

The layout is compressed-tensors' ``pack-quantized``, along a row, and GPTQ's, along a column: a signed code is stored
as ``code + 2^(bits-1)``; code ``i`` begins at bit ``i * bits`` and may straddle two words, so 32 codes fill exactly
``bits`` words. What lies on disk is what lies in memory. A test holds it to compressed-tensors' own functions.
"""

import math

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
    rows, common = words.shape[0], math.gcd(bits, 8)
    mask, offset = (1 << bits) - 1, 1 << (bits - 1)
    # in bytes, the lowest of a word first: fewer codes than of words fill a whole number of them
    span, lanes = bits // common, 8 // common
    blocks = words.view(torch.uint8).view(rows, 4 * words.shape[1] // span, span)
    codes = blocks.new_empty(rows, blocks.shape[1], lanes)
    for lane in range(lanes):
        byte, shift = divmod(lane * bits, 8)
        code = blocks[..., byte] >> shift
        if shift + bits > 8:
            code |= blocks[..., byte + 1] << (8 - shift)
        codes[..., lane] = (code & mask) - offset  # below zero it wraps around, and read as int8 is right
    return codes.view(torch.int8).view(rows, lanes * blocks.shape[1])
