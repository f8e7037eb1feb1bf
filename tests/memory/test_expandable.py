"""The allocator's expandable mode keeps its books, maps and unmaps whole pages, and fragments less."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowvram_lab.memory.allocator import CachingAllocator, OutOfCapacity, round_size
from lowvram_lab.memory.expandable import ADDRESS_SPACE, ExpandableAllocator
from lowvram_lab.units import KiB, MiB

PAGES = {True: 2 * MiB, False: 20 * MiB}
SIZES = st.one_of(st.integers(1, 4 * KiB), st.integers(1, 3 * MiB), st.integers(1, 70 * MiB))
# Each step allocates a size, or (a float) frees the live block at that place of the list, or empties the cache (None).
STEPS = st.lists(st.one_of(SIZES, SIZES, st.floats(0, 0.999), st.none()), max_size=60)


def chain(allocator, small):
    """Every block of a pool in address order."""
    block = allocator._pool.first[small]
    assert block.before is None
    while block:
        yield block
        assert block.after is None or block.after.before is block
        block = block.after


def check_books(allocator, live):
    """Counters are sums over live blocks and mapped pages; the chain of blocks covers the address space once."""
    assert allocator.allocated == sum(block.size for block in live)
    assert allocator.reserved == sum(allocator.segments.values())
    assert allocator.allocated <= allocator.reserved <= allocator.peak_reserved
    assert allocator.allocated <= allocator.peak_allocated <= allocator.peak_reserved
    if allocator.capacity is not None:
        assert allocator.peak_reserved <= allocator.capacity
    for small, page in PAGES.items():
        blocks = list(chain(allocator, small))
        edges = [0, *(block.offset + block.size for block in blocks)]
        assert [block.offset for block in blocks] == edges[:-1]  # no overlap, no gap
        assert edges[-1] == ADDRESS_SPACE
        in_use = {id(block) for block in blocks if not block.free}
        assert in_use == {id(block) for block in live if block.small is small}
        for left, right in zip(blocks, blocks[1:], strict=False):  # coalescing is complete
            assert not (left.free and right.free and left.mapped == right.mapped)
        mapped = sum(block.size for block in blocks if block.mapped)
        assert allocator.segments[int(small)] == mapped
        assert mapped % page == 0
        assert all(block.mapped for block in blocks if not block.free)
        for block in blocks:
            if not block.mapped:
                assert block.offset % page == 0


@settings(max_examples=150, deadline=None)
@given(STEPS, st.none() | st.integers(1, 200).map(lambda n: n * MiB))
def test_the_books_balance_after_any_steps(steps, capacity):
    allocator, live = ExpandableAllocator(capacity), []
    for step in steps:
        if step is None:
            allocator.empty_cache()
        elif isinstance(step, float):
            if live:
                allocator.free(live.pop(int(step * len(live))))
        else:
            reserved = allocator.reserved
            try:
                block = allocator.allocate(step)
            except OutOfCapacity:
                size = round_size(step)
                page = PAGES[size <= MiB]
                assert reserved + -(-size // page) * page > capacity
            else:
                assert block.size == round_size(step)  # whatever is left over is split off
                live.append(block)
        check_books(allocator, live)
    mapped = dict(allocator.segments)
    for block in live:
        allocator.free(block)
    assert allocator.allocated == 0
    assert allocator.segments == mapped  # freeing gives nothing back
    check_books(allocator, [])
    allocator.empty_cache()
    assert (allocator.reserved, allocator.segments) == (0, {1: 0, 0: 0})
    check_books(allocator, [])


@given(STEPS)
@settings(max_examples=60, deadline=None)
def test_what_was_mapped_once_is_used_again(steps):
    allocator, live = ExpandableAllocator(), []
    for step in steps:
        if isinstance(step, int):
            live.append(allocator.allocate(step))
    for block in live:
        allocator.free(block)
    for small, number in ((True, 1), (False, 0)):
        if mapped := allocator.segments[number]:
            whole = allocator.allocate(min(mapped, MiB) if small else mapped)
            assert whole.offset == 0
    assert allocator.reserved == allocator.peak_reserved


@pytest.mark.parametrize(
    ("asked", "reserved"),
    [
        ([1], 2),
        ([MiB], 2),
        ([MiB, MiB], 2),
        ([MiB, MiB, 512], 4),
        ([MiB + 1], 20),
        ([19 * MiB, 2 * MiB], 40),  # the second grows over the end of the first page
        ([20 * MiB], 20),
        ([20 * MiB + 1], 40),
        ([11 * MiB, 9 * MiB], 20),  # fixed segments would take 12 + 20
        ([1, 5 * MiB], 22),  # the pools do not share
    ],
)
def test_pages_are_mapped_as_needed(asked, reserved):
    allocator = ExpandableAllocator()
    for size in asked:
        allocator.allocate(size)
    assert allocator.reserved == reserved * MiB


def test_blocks_follow_each_other():
    allocator = ExpandableAllocator()
    blocks = [allocator.allocate(15 * MiB) for _ in range(4)]
    assert [block.offset for block in blocks] == [0, 15 * MiB, 30 * MiB, 45 * MiB]
    assert allocator.reserved == 60 * MiB


def test_emptying_the_cache_unmaps_only_whole_pages():
    allocator = ExpandableAllocator()
    head, middle, tail = (allocator.allocate(size * MiB) for size in (30, 50, 30))  # 0-30, 30-80, 80-110, of 120
    assert allocator.reserved == 120 * MiB
    allocator.free(middle)
    allocator.empty_cache()
    assert allocator.reserved == 80 * MiB  # pages 40-60 and 60-80; 30-40 belongs to a page in use
    check_books(allocator, [head, tail])
    again = allocator.allocate(50 * MiB)  # the hole is mapped anew
    assert (again.offset, allocator.reserved) == (30 * MiB, 120 * MiB)
    allocator.free(head)
    allocator.empty_cache()
    assert allocator.reserved == 100 * MiB
    check_books(allocator, [again, tail])


def test_small_pages_are_unmapped_in_small_pages():
    allocator = ExpandableAllocator()
    blocks = [allocator.allocate(MiB) for _ in range(6)]
    for block in blocks[1:5]:  # 1-5 of 6 MiB: only page 2-4 is wholly free
        allocator.free(block)
    allocator.empty_cache()
    assert allocator.reserved == 4 * MiB
    check_books(allocator, [blocks[0], blocks[5]])


def test_pages_are_given_back_before_giving_up():
    allocator = ExpandableAllocator(capacity=64 * MiB)
    allocator.free(allocator.allocate(30 * MiB))  # 40 MiB mapped
    for _ in range(6):
        allocator.allocate(MiB)  # 6 MiB of small pages
    block = allocator.allocate(40 * MiB)
    assert (block.offset, allocator.reserved) == (0, 46 * MiB)
    with pytest.raises(OutOfCapacity):
        allocator.allocate(18 * MiB + 512)
    check_books(allocator, [b for small in PAGES for b in chain(allocator, small) if not b.free])


def growing_cache(allocator, layers=6, start=24, steps=60, piece=640 * KiB):
    """Keys and values of every layer, longer by a piece a step: allocate the longer one, then free the old one."""
    held = [allocator.allocate(start * piece) for _ in range(2 * layers)]
    for step in range(1, steps + 1):
        for index, old in enumerate(held):
            held[index] = allocator.allocate((start + step) * piece)
            allocator.free(old)
    return held


def test_a_growing_kv_cache_fragments_less():
    fixed, expandable = CachingAllocator(), ExpandableAllocator()
    for allocator in (fixed, expandable):
        growing_cache(allocator)
    assert fixed.peak_allocated >= expandable.peak_allocated  # a fixed segment's rest of up to 1 MiB is not split off
    wasted = [allocator.peak_reserved - allocator.peak_allocated for allocator in (fixed, expandable)]
    assert wasted[1] < wasted[0] / 2


def test_it_fits_where_fixed_segments_do_not():
    sizes = {"layers": 20, "start": 3, "steps": 30, "piece": 400 * KiB}
    growing_cache(ExpandableAllocator(capacity=640 * MiB), **sizes)
    with pytest.raises(OutOfCapacity):
        growing_cache(CachingAllocator(capacity=640 * MiB), **sizes)


def test_a_cap_is_compared_with_a_fixed_segment_while_pages_go_beyond_it():
    """As PyTorch with ``set_per_process_memory_fraction``; a card that has no more maps no page."""
    card, cap = ExpandableAllocator(435 * MiB), ExpandableAllocator(435 * MiB, card_bytes=8 << 30)
    for allocator in (card, cap):
        allocator.allocate(380 * MiB)
    cap.allocate(47 * MiB)  # 380 + 48 are within the cap, three pages of 20 are not
    assert cap.reserved == 440 * MiB
    with pytest.raises(OutOfCapacity):
        card.allocate(47 * MiB)
    with pytest.raises(OutOfCapacity):
        cap.allocate(20 * MiB)
