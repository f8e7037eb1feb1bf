"""Our kernel beside the product with the dequantised weight, for every way it may be compiled."""

import itertools
import subprocess
import sys

import pytest
import torch

from lowvram_lab.kernels import library as kernels
from lowvram_lab.kernels import product
from lowvram_lab.kernels.int4_layout import cpu_block_rows, pack_for_cpu
from lowvram_lab.kernels.product import dequantized, quantized_product
from lowvram_lab.layouts.packing import pack
from tests.helpers.kernels import WAYS
from tests.helpers.tiny import relative_error

GROUPS = (32, 64, 96, 128)

pytestmark = pytest.mark.usefixtures("compiling")


def in_tiles(way: str) -> bool:
    """Whether many rows meet a weight that is dequantised a tile at a time."""
    return way == "this processor" and kernels.multiplies_pairs()


def integers(bits: int, group: int, features: int = 40, zeros: bool = False):
    """Codes and scales of a random weight, and the weight."""
    random = torch.Generator().manual_seed(100 * bits + group)
    columns, offset = 6 * group, 1 << (bits - 1)
    codes = torch.randint(-offset, offset, (features, columns), dtype=torch.int8, generator=random)
    scale, zero = (torch.randn(features, 6, generator=random).bfloat16() for _ in range(2))
    weight = codes.double().view(features, 6, group) * scale.double()[..., None]
    if not zeros:
        return pack(codes, bits), scale, weight.view(features, columns)
    weight = (weight + zero.double()[..., None]).view(features, columns)
    return pack(codes, bits), torch.stack((scale, zero), -1).transpose(0, 1).contiguous(), weight


def whole_bytes(columns: int, features: int = 40):
    """The same of int8."""
    random = torch.Generator().manual_seed(columns)
    codes = torch.randint(-128, 128, (features, columns), dtype=torch.int8, generator=random)
    scale = torch.randn(features, generator=random).bfloat16()
    return codes, scale, codes.double() * scale.double()[:, None]


def grouped_bytes(group: int, features: int = 33):
    """The same of int8 with a scale for every group."""
    random = torch.Generator().manual_seed(group)
    codes = torch.randint(-128, 128, (features, 6 * group), dtype=torch.int8, generator=random)
    scale = torch.randn(features, 6, generator=random).bfloat16()
    weight = codes.double().view(features, 6, group) * scale.double()[..., None]
    return codes, scale, weight.view(features, -1)


def normal_floats(group: int, features: int = 40):
    """The same of nf4, by bitsandbytes."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    weight = torch.randn(features, 6 * group, generator=torch.Generator().manual_seed(group))
    codes, state = quantize_4bit(weight, blocksize=group, quant_type="nf4")
    return codes, state.absmax, dequantize_4bit(codes, state).double()


def blocks(group: int, features: int = 192):
    """The same of int4 as torch packs it."""
    random = torch.Generator().manual_seed(group)
    codes = torch.randint(0, 16, (features, 6 * group), dtype=torch.uint8, generator=random)
    pairs = torch.randn(6, features, 2, generator=random).bfloat16()
    scale, zero = pairs.double().transpose(0, 1).unbind(-1)
    weight = (codes.double().view(features, 6, group) - 8) * scale[..., None] + zero[..., None]
    return pack_for_cpu(codes), pairs, weight.view(features, -1)


needs_blocks = pytest.mark.skipif(
    not (kernels.multiplies_pairs() and cpu_block_rows() == product.BLOCK_ROWS), reason="another processor"
)
CASES = {
    **{
        (f"int{bits}", group, zeros): (
            bits,
            lambda bits=bits, group=group, zeros=zeros: integers(bits, group, zeros=zeros),
        )
        for bits, group, zeros in itertools.product((2, 3, 4, 5, 6), (16, *GROUPS), (False, True))
        if group > 16 or bits != 4
    },
    **{("int8", columns, False): (8, lambda columns=columns: whole_bytes(columns)) for columns in (1, 31, 32, 50, 577)},
    **{("int8", f"groups of {size}", False): (8, lambda size=size: grouped_bytes(size)) for size in (16, 32, 128)},
    **{("int5", f"{rows} rows", True): (5, lambda rows=rows: integers(5, 32, rows, True)) for rows in (25, 33)},
    **{("nf4", group, False): (0, lambda group=group: normal_floats(group)) for group in (64, 128)},
}
BLOCKS = {("blocks", group, True): (product.INT4_BLOCKS, lambda group=group: blocks(group)) for group in GROUPS}
NAMES = ("int2", "int3", "int4", "int5", "int6", "int8", "nf4")


IN_EVERY_WAY = pytest.mark.parametrize(
    ("name", "way"),
    [*itertools.product(NAMES, WAYS), pytest.param("blocks", "this processor", marks=needs_blocks)],
    indirect=["way"],
)


@IN_EVERY_WAY
def test_it_is_the_product_with_the_dequantised_weight(name, way):
    for (case, *_), (number, make) in (CASES | BLOCKS).items():
        if case != name:
            continue
        codes, scales, weight = make()
        features, columns = weight.shape
        for rows in (1, 3, 8, 19, 200):
            x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)).bfloat16().float()
            found = quantized_product(x, codes, scales, features, number)
            assert found.dtype == torch.float32
            tiled = rows > product.MOST_ROWS and number != product.INT4_BLOCKS and in_tiles(way)
            # a weight that is dequantised is rounded to bfloat16; nf4's sixteen values are also where it is not
            expected = x.double() @ (weight.bfloat16().double() if tiled else weight).T
            # of two bits what is taken off for the codes' offset, 130, is large beside the sums
            assert relative_error(found.double(), expected) < {"nf4": 2e-3, "int2": 1e-5}.get(name, 5e-6)


@IN_EVERY_WAY
def test_in_bfloat16_it_is_the_same_rounded_once(name, way):
    for number, make in (made for (case, *_), made in (CASES | BLOCKS).items() if case == name):
        codes, scales, weight = make()
        for rows in (1, 8, 9, 140):
            x = torch.randn(rows, weight.shape[1], generator=torch.Generator().manual_seed(rows)).bfloat16()
            found = quantized_product(x, codes, scales, len(weight), number)
            assert torch.equal(found, quantized_product(x.float(), codes, scales, len(weight), number).bfloat16())


@IN_EVERY_WAY
def test_a_rows_result_does_not_depend_on_the_others(name, way):
    for number, make in (made for (case, *_), made in (CASES | BLOCKS).items() if case == name):
        codes, scales, weight = make()
        features, columns = weight.shape
        x = torch.randn(17, columns)
        alone = torch.cat([quantized_product(row[None], codes, scales, features, number) for row in x])
        many = quantized_product(x, codes, scales, features, number)
        assert relative_error(many, alone) < 5e-3
        for rows in range(1, 18):
            expected = alone if rows <= product.MOST_ROWS else many
            assert torch.equal(quantized_product(x[:rows], codes, scales, features, number), expected[:rows])


@pytest.mark.parametrize(("bits", "columns"), [(8, 48), (8, 80), (4, 96)])
def test_halves_of_units_that_no_format_has_are_refused(bits, columns):
    codes = torch.zeros(4, columns * bits // 8, dtype=torch.int8)
    with pytest.raises(RuntimeError, match=f"expected groups of 32 or more of {bits} bits in {columns} columns"):
        quantized_product(torch.zeros(1, columns), codes, torch.ones(4, columns // 16).bfloat16(), 4, bits)


@pytest.mark.parametrize("way", WAYS, indirect=True)
@pytest.mark.parametrize("name", [name for name in NAMES if name != "nf4"])
def test_a_dequantised_weight_is_rounded_once(name, way):
    for (case, _, zeros), (number, make) in CASES.items():
        if case != name:
            continue
        codes, scales, weight = make()
        for dtype in (torch.bfloat16, torch.float32):
            found = dequantized(codes, scales, len(weight), number, dtype)
            if zeros:  # the sum is rounded to float32 first
                torch.testing.assert_close(
                    found.double(), weight, rtol=2**-8 if dtype == torch.bfloat16 else 2e-6, atol=1e-6
                )
            else:
                assert torch.equal(found, weight.to(dtype))
        some = scales[:, 8:24] if zeros else scales[8:24]
        whole = dequantized(codes, scales, len(weight), number, torch.bfloat16)
        assert torch.equal(dequantized(codes[8:24], some, 16, number, torch.bfloat16), whole[8:24])
        on_meta = dequantized(codes.to("meta"), scales.to("meta"), len(weight), number, torch.bfloat16)
        assert on_meta.shape == weight.shape


@pytest.mark.parametrize(
    ("number", "make"),
    [(3, lambda: integers(3, 128, features=512)), pytest.param(64, lambda: blocks(128, 512), marks=needs_blocks)],
)
def test_threads_change_nothing(number, make):
    codes, scales, weight = make()
    x, before = torch.randn(4, weight.shape[1]), torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(quantized_product(x, codes, scales, 512, number))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found)


def test_parts_of_a_common_weight_and_unaligned_codes():
    codes, scales, weight = integers(4, 64, features=48, zeros=True)
    x = torch.randn(2, weight.shape[1])
    whole = quantized_product(x, codes, scales, 48, 4)
    assert torch.equal(quantized_product(x, codes[16:32], scales[:, 16:32], 16, 4), whole[:, 16:32])
    if not needs_blocks.args[0]:
        packed, pairs, _ = blocks(64)
        every = quantized_product(x, packed, pairs, 192, 64)
        assert torch.equal(quantized_product(x, packed[64:128], pairs[:, 64:128], 64, 64), every[:, 64:128])
    codes, scales, weight = integers(3, 64, features=48)
    whole = quantized_product(x, codes, scales, 48, 3)
    held = torch.empty(codes.nbytes + 1, dtype=torch.uint8)
    shifted = held[1:].view(48, -1)
    shifted.copy_(codes.view(torch.uint8))
    assert torch.equal(quantized_product(x, shifted, scales, 48, 3), whole)


def test_nothing_beside_the_codes_is_read():
    """The last row ends where a page does, and the next page may not be read."""
    script = """
import ctypes, itertools, mmap, torch
from lowvram_lab.kernels.product import quantized_product
from lowvram_lab.layouts.packing import pack
groups = (16, 32)
libc, page = ctypes.CDLL(None, use_errno=True), mmap.PAGESIZE
sizes = ((8, 288), (10, 32), (9, 64), (1, 32))
for bits, (features, columns), group in itertools.product((2, 3, 4, 5, 6), sizes, groups):
    if bits == 4 and group == 16:
        continue
    codes = pack(torch.zeros(features, columns, dtype=torch.int8), bits)
    pages = -(-codes.nbytes // page)
    held = mmap.mmap(-1, (pages + 1) * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(held))
    assert libc.mprotect(ctypes.c_void_p(start + pages * page), ctypes.c_size_t(page), 0) == 0
    last = torch.frombuffer(held, dtype=torch.uint8, count=codes.nbytes, offset=pages * page - codes.nbytes)
    last.copy_(codes.view(torch.uint8).flatten())
    scales = torch.ones(features, columns // group, dtype=torch.bfloat16)
    for rows in (1, 2, 8, 12):
        found = quantized_product(torch.ones(rows, columns), last.view(features, -1), scales, features, bits)
        assert found.abs().max() == 0
print("done")
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert ended.stdout == "done\n", ended.stderr[-1000:]


def test_on_meta_it_has_the_shape():
    codes, scales, _ = integers(5, 32)
    found = quantized_product(*(t.to("meta") for t in (torch.empty(3, 192), codes, scales)), 40, 5)
    assert found.shape == (3, 40)
    assert found.dtype == torch.float32


def test_a_compiler_that_fails_is_said_and_done_without(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("LOWVRAM_CACHE", str(tmp_path))
    broken = tmp_path / "broken.cpp"
    broken.write_text("int main( {")
    monkeypatch.setattr(kernels, "_SOURCES", (broken,))
    assert kernels.there()  # nothing was compiled yet
    assert kernels.library() is None
    assert not kernels.there()
    assert "weights are dequantised, which is slower" in caplog.text
    assert "error" in caplog.text
    assert not list((tmp_path / "compiled").glob("kernels-*"))


def test_a_changed_library_is_not_opened(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("LOWVRAM_CACHE", str(tmp_path))
    assert kernels.library()
    (file,) = (tmp_path / "compiled").glob("kernels-*/library.so")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.unlink()  # this process still has the other one mapped
    file.write_bytes(data)
    kernels._library.cache_clear()
    assert kernels.library() is None
    assert "was changed since it was made: remove its folder" in caplog.text
    kernels._library.cache_clear()
