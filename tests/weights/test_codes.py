"""Codes packed into words: compressed-tensors' layout to the bit, and back."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowvram_lab.layouts.packing import PACK_CODES, pack, unpack
from lowvram_lab.memory.temporaries import _Temporaries as Temporaries

BITS = range(2, 9)


def random_codes(rows: int, columns: int, bits: int, seed: int = 0) -> torch.Tensor:
    half, generator = 1 << (bits - 1), torch.Generator().manual_seed(seed)
    return torch.randint(-half, half, (rows, columns), generator=generator, dtype=torch.int8)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(BITS), st.integers(1, 20), st.integers(1, 12), st.integers(0, 1000))
def test_words_are_those_of_compressed_tensors(bits, rows, blocks, seed):
    theirs = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    codes = random_codes(rows, blocks * PACK_CODES, bits, seed)
    words = pack(codes, bits)
    assert (words.dtype, words.shape) == (torch.int32, (rows, blocks * bits))
    assert torch.equal(words, theirs.pack_to_int32(codes, bits))
    assert torch.equal(unpack(words, bits), codes)
    assert torch.equal(theirs.unpack_from_int32(words, bits, codes.shape), codes)


@pytest.mark.parametrize("bits", BITS)
def test_the_outermost_codes_come_back_from_every_place(bits):
    lowest, highest = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    for one, others in [(highest, 0), (lowest, 0), (highest, lowest), (lowest, highest), (0, -1)]:
        codes = torch.where(torch.eye(PACK_CODES) > 0, one, others).to(torch.int8)
        assert torch.equal(unpack(pack(codes, bits), bits), codes)


@pytest.mark.parametrize("bits", BITS)
def test_rows_are_packed_for_themselves(bits):
    codes = random_codes(9, 64, bits)
    words = pack(codes, bits)
    for select in (slice(2, 5), torch.tensor([8, 0, 0, 3])):
        assert torch.equal(pack(codes[select], bits), words[select])
        assert torch.equal(unpack(words[select], bits), codes[select])


@pytest.mark.parametrize("bits", BITS)
def test_a_dry_run_takes_what_all_codes_take(bits):
    words = pack(random_codes(64, 256, bits), bits)
    peaks = []
    for each in (words, words.to("meta")):
        with Temporaries() as seen:
            unpacked = unpack(each, bits)
        assert (unpacked.shape, unpacked.dtype) == ((64, 256), torch.int8)
        peaks.append(seen.peak_bytes)
    assert peaks[0] == peaks[1] > 64 * 256


@given(st.sampled_from(BITS), st.integers(1, 4), st.integers(1, 3), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_any_words_are_read_bit_by_bit(bits, rows, blocks, seed):
    """Beside the plain reference: each row is one long number."""
    source = torch.Generator().manual_seed(seed)
    words = torch.randint(-(2**31), 2**31, (rows, blocks * bits), generator=source).to(torch.int32)
    expected = []
    for row in words.tolist():
        number = sum((word % 2**32) << (32 * at) for at, word in enumerate(row))
        expected.append([(number >> (at * bits)) % 2**bits - 2 ** (bits - 1) for at in range(blocks * PACK_CODES)])
    assert unpack(words, bits).tolist() == expected


def test_three_bits_by_hand():
    codes = torch.zeros(1, 32, dtype=torch.int8) - 4  # stored as 0
    codes[0, 0], codes[0, 10], codes[0, 31] = -3, 3, 3  # 1; 7 over bits 30 and 31 and the next word's 0; 7 at the end
    expected = torch.tensor([[0b11 << 30 | 1, 1, 0b111 << 29]]).to(torch.int32)
    assert torch.equal(pack(codes, 3), expected)
