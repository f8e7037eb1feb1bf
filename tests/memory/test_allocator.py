"""The allocator model keeps its books, and its rules are those of CUDACachingAllocator.cpp."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowvram_lab.memory.allocator import CachingAllocator, OutOfCapacity, round_size, segment_size
from lowvram_lab.memory.expandable import ExpandableAllocator
from lowvram_lab.units import KiB, MiB

SIZES = st.one_of(st.integers(1, 4 * KiB), st.integers(1, 3 * MiB), st.integers(1, 40 * MiB))
# Each step allocates a size, or (a float) frees the live block at that place of the list, or empties the cache (None).
STEPS = st.lists(st.one_of(SIZES, SIZES, st.floats(0, 0.999), st.none()), max_size=60)


def check_books(allocator, live):
    """Counters are sums over live blocks and segments; blocks lie inside their segments and never overlap."""
    assert allocator.allocated == sum(block.size for block in live)
    assert allocator.reserved == sum(allocator.segments.values())
    assert allocator.allocated <= allocator.reserved <= allocator.peak_reserved
    assert allocator.allocated <= allocator.peak_allocated <= allocator.peak_reserved
    if allocator.capacity is not None:
        assert allocator.peak_reserved <= allocator.capacity
    by_segment = {}
    for block in live:
        by_segment.setdefault(block.segment, []).append((block.offset, block.offset + block.size))
    for segment, spans in by_segment.items():
        spans.sort()
        assert spans[0][0] >= 0
        assert spans[-1][1] <= allocator.segments[segment]
        assert all(left[1] <= right[0] for left, right in zip(spans, spans[1:], strict=False))


@settings(max_examples=150, deadline=None)
@given(STEPS, st.none() | st.integers(1, 200).map(lambda n: n * MiB))
def test_the_books_balance_after_any_steps(steps, capacity):
    allocator, live = CachingAllocator(capacity), []
    for step in steps:
        if step is None:
            allocator.empty_cache()
        elif isinstance(step, float):
            if live:
                allocator.free(live.pop(int(step * len(live))))
        else:
            try:
                block = allocator.allocate(step)
            except OutOfCapacity:
                assert allocator.reserved + segment_size(round_size(step)) > capacity
            else:
                assert block.size >= round_size(step)
                assert block.size % 512 == 0
                live.append(block)
        check_books(allocator, live)
    segments = dict(allocator.segments)
    for block in live:
        allocator.free(block)
    assert allocator.allocated == 0
    assert allocator.segments == segments  # freeing gives nothing back ...
    allocator.empty_cache()
    assert (allocator.reserved, allocator.segments) == (0, {})  # ... so every segment had coalesced into one block


@given(STEPS)
@settings(max_examples=50, deadline=None)
def test_the_same_steps_give_the_same_blocks(steps):
    def replay():
        allocator, live, trail = CachingAllocator(), [], []
        for step in steps:
            if isinstance(step, int):
                live.append(allocator.allocate(step))
                trail.append((live[-1].segment, live[-1].offset))
            elif step is not None and live:
                allocator.free(live.pop(int(step * len(live))))
        return trail, allocator.peak_reserved

    assert replay() == replay()


@pytest.mark.parametrize(
    ("asked", "allocated", "reserved"),
    [
        (1, 512, 2 * MiB),
        (512, 512, 2 * MiB),
        (513, 1024, 2 * MiB),
        (MiB, MiB, 2 * MiB),  # the largest that the small pool takes
        (MiB + 1, MiB + 512, 20 * MiB),
        (10 * MiB - 512, 10 * MiB - 512, 20 * MiB),
        (10 * MiB, 10 * MiB, 10 * MiB),  # from here a segment of its own, in steps of 2 MiB; the rest of it is not
        (11 * MiB, 11 * MiB + MiB, 12 * MiB),  # split off unless it is larger than 1 MiB
        (10 * MiB + 1, 10 * MiB + 512, 12 * MiB),
    ],
)
def test_sizes_of_block_and_segment(asked, allocated, reserved):
    allocator = CachingAllocator()
    block = allocator.allocate(asked)
    assert (block.size, allocator.allocated, allocator.reserved) == (allocated, allocated, reserved)


def test_small_and_large_pools_do_not_share():
    allocator = CachingAllocator()
    allocator.free(allocator.allocate(5 * MiB))
    assert allocator.reserved == 20 * MiB
    assert allocator.allocate(KiB).small
    assert allocator.reserved == 22 * MiB


def test_a_freed_block_is_used_again_best_fit_first():
    allocator = CachingAllocator()
    blocks = [allocator.allocate(size) for size in (64 * KiB, 512, 16 * KiB, 512, 32 * KiB, 512)]
    for block in blocks[::2]:
        allocator.free(block)
    found = allocator.allocate(12 * KiB)
    assert found.offset == 64 * KiB + 512  # the hole of 16 KiB, not those of 64 or 32
    assert allocator.reserved == 2 * MiB


def test_fragmentation_can_refuse_what_would_fit_in_sum():
    allocator = CachingAllocator(capacity=40 * MiB)
    blocks = [allocator.allocate(10 * MiB) for _ in range(4)]
    for block in blocks[::2]:
        allocator.free(block)
    allocator.allocate(10 * MiB)
    with pytest.raises(OutOfCapacity):  # 10 MiB are free, 11 are asked
        allocator.allocate(11 * MiB)


def test_the_cache_is_emptied_before_giving_up():
    allocator = CachingAllocator(capacity=24 * MiB)
    allocator.free(allocator.allocate(12 * MiB))
    kept = allocator.allocate(MiB)
    block = allocator.allocate(20 * MiB)  # only after the cached 12 MiB are given back
    assert allocator.reserved == 22 * MiB
    with pytest.raises(OutOfCapacity):
        allocator.allocate(3 * MiB)
    allocator.free(block)
    allocator.free(kept)
    assert allocator.allocated == 0
    assert allocator.peak_allocated == 21 * MiB
    assert allocator.peak_reserved == 22 * MiB


@pytest.mark.parametrize("kind", [CachingAllocator, ExpandableAllocator])
def test_what_a_pool_of_its_own_holds_is_given_to_nobody_else(kind):
    allocator = kind()
    allocator.free(allocator.allocate(3 * MiB))
    with allocator.inside(allocator.new_pool(kept=True)):
        kept, gone = allocator.allocate(5 * MiB), allocator.allocate(3 * MiB)
        allocator.free(gone)
    taken = allocator.reserved
    assert taken >= 11 * MiB  # the 3 MiB outside were free, and not for it
    outside = [allocator.allocate(3 * MiB) for _ in range(8)]
    assert {kept.segment, gone.segment}.isdisjoint(block.segment for block in outside)
    allocator.free(kept)  # back to its own pool, whichever is in use
    assert allocator.allocated == 8 * 3 * MiB
    assert sum(allocator.segments.values()) == allocator.reserved


@pytest.mark.parametrize("kind", [CachingAllocator, ExpandableAllocator])
def test_emptying_the_cache_reaches_every_stream_and_leaves_what_graphs_write_to(kind):
    allocator = kind()
    sizes = {}
    for name, pool in {"stream": allocator.new_pool(), "graphs": allocator.new_pool(kept=True)}.items():
        before = allocator.reserved
        with allocator.inside(pool):
            allocator.free(allocator.allocate(30 * MiB))
        sizes[name] = allocator.reserved - before
    assert min(sizes.values()) >= 30 * MiB
    allocator.empty_cache()  # called outside both
    assert allocator.reserved == sizes["graphs"]


@pytest.mark.parametrize(
    "allocator",
    [CachingAllocator(40 * MiB), ExpandableAllocator(40 * MiB), ExpandableAllocator(40 * MiB, card_bytes=50 * MiB)],
)
def test_without_its_limits_it_says_how_much_would_be_taken(allocator):
    with pytest.raises(OutOfCapacity):
        allocator.allocate(100 * MiB)
    allocator.lift_limits()
    allocator.allocate(100 * MiB)
    assert allocator.peak_reserved == 100 * MiB


@pytest.mark.parametrize("kind", [CachingAllocator, ExpandableAllocator])
def test_nothing_is_given_back_for_a_graph_that_is_captured(kind):
    allocator = kind(capacity=50 * MiB)
    allocator.free(allocator.allocate(20 * MiB))
    graph, stream = allocator.new_pool(kept=True), allocator.new_pool()
    with allocator.inside(graph):
        allocator.free(allocator.allocate(20 * MiB))
        with pytest.raises(OutOfCapacity):
            allocator.allocate(40 * MiB)
    assert allocator.reserved == 40 * MiB
    with allocator.inside(stream):
        allocator.allocate(20 * MiB)  # another stream's may: what is cached elsewhere goes, but not the graph's
    assert allocator.reserved == 40 * MiB
    allocator.empty_cache()
    assert allocator.reserved == 40 * MiB
