"""PyTorch's CUDA caching allocator as a small simulator: what ``reserved`` will be, and when it runs out.

Sizes and rules are those of ``c10/cuda/CUDACachingAllocator.cpp`` (PyTorch 2.13 and 2.14; functions named in the
comments). Default settings; ``expandable.py`` has the other mode. Knows nothing about tensors: callers say ``allocate``
and ``free``. Recorded traces of the real one, replayed, are its test (tests/memory/test_recorded_traces.py).

Derived in: notebooks/01_analyze_the_oom.ipynb
"""

import bisect
import itertools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from lowvram_lab.memory.torch_release import torch_release
from lowvram_lab.units import MiB

MIN_BLOCK = 512  # kMinBlockSize: every size is rounded up to a multiple of it
SMALL_SIZE = 1 * MiB  # kSmallSize: the largest request the small pool takes
SMALL_SEGMENT = 2 * MiB  # kSmallBuffer: a small-pool segment
LARGE_SEGMENT = 20 * MiB  # kLargeBuffer: a large-pool segment for requests below kMinLargeAlloc
MIN_LARGE = 10 * MiB  # kMinLargeAlloc: from here a request gets a segment of its own size
ROUND_LARGE = 2 * MiB  # kRoundLarge: ... rounded up to a multiple of this

# Which of several free blocks equal in size is taken has changed twice. Up to torch 2.11 the one at the lowest address.
BLOCKS_BY_AGE = (
    2,
    12,
)  # the one made first, by splitting or as a segment: https://github.com/pytorch/pytorch/pull/178362
SEGMENTS_BY_AGE = (2, 13)  # the one in the oldest segment: https://github.com/pytorch/pytorch/pull/183591


def round_size(size: int) -> int:
    """Bytes a request occupies: at least 512, a multiple of 512 (``round_size``)."""
    return max(MIN_BLOCK, -(-size // MIN_BLOCK) * MIN_BLOCK)


def segment_size(size: int) -> int:
    """Bytes asked of ``cudaMalloc`` for a rounded request (``get_allocation_size``)."""
    if size <= SMALL_SIZE:
        return SMALL_SEGMENT
    if size < MIN_LARGE:
        return LARGE_SEGMENT
    return -(-size // ROUND_LARGE) * ROUND_LARGE


@dataclass(eq=False)
class Block:
    """A piece of a segment, free or in use, linked to its neighbours in address order."""

    segment: int
    offset: int
    size: int
    small: bool
    age: int = 0  # when it was made, where that decides between blocks equal in size: the lower the earlier
    free: bool = False
    mapped: bool = True
    before: "Block | None" = field(default=None, repr=False)
    after: "Block | None" = field(default=None, repr=False)
    pool: "Pool | None" = field(default=None, repr=False)

    @property
    def whole(self) -> bool:
        """Whether the block is all of its segment."""
        return self.before is None and self.after is None


@dataclass(eq=False)
class Pool:
    """Where blocks come from and go back to; each stream has one, and each CUDA graph.

    Attributes:
        free: Free blocks by size, the small ones (``True``) and the large ones.
        first: The lowest block of either kind, in an allocator whose segments grow.
        kept: Whether emptying the cache leaves it alone: a graph writes there whenever it is replayed.
    """

    free: dict[bool, list[tuple[int, int, int, int, Block]]] = field(default_factory=lambda: {True: [], False: []})
    first: dict[bool, Block] = field(default_factory=dict)
    kept: bool = False


class OutOfCapacity(Exception):  # noqa: N818  (a signal between simulator and GPU, not an error users meet)
    """No segment of the needed size fits the capacity, even after emptying the cache."""


class CachingAllocator:
    """Replays allocations and frees; reports what CUDA would report.

    Args:
        capacity: See the attribute.
        addresses: Where the segments to come lie. They decide between free blocks equal in size before torch 2.12. By
            default a later segment lies higher.

    Attributes:
        capacity: Bytes the card may hand out in all, or ``None`` for no limit.
        allocated: Bytes in blocks in use (``torch.cuda.memory_allocated``).
        reserved: Bytes in segments (``torch.cuda.memory_reserved``).
        peak_allocated: Highest ``allocated`` so far.
        peak_reserved: Highest ``reserved`` so far.
    """

    def __init__(self, capacity: int | None = None, addresses: Iterable[int] | None = None):
        self.capacity = capacity
        self.allocated = self.reserved = self.peak_allocated = self.peak_reserved = 0
        self.segments: dict[int, int] = {}
        release = torch_release()
        by_age = addresses is None or release >= BLOCKS_BY_AGE
        self._numbers = itertools.count() if by_age else iter(addresses)
        self._ages = itertools.count() if BLOCKS_BY_AGE <= release < SEGMENTS_BY_AGE else itertools.repeat(0)
        self._pools: list[Pool] = []
        self._pool = self.new_pool()

    @property
    def pool(self) -> Pool:
        """Where blocks come from now."""
        return self._pool

    @property
    def fragmentation(self) -> int:
        """Bytes in segments that no block in use occupies."""
        return self.reserved - self.allocated

    def allocate(self, size: int) -> Block:
        """Takes a block for ``size`` bytes (``malloc``).

        Raises:
            OutOfCapacity: The request does not fit, not even with every unused segment given back.
        """
        size = round_size(size)
        small = size <= SMALL_SIZE
        block = self._best_fit(size, small) or self._take_memory(size, small)
        remaining = block.size - size
        if self._should_split(remaining, small):
            rest = Block(block.segment, block.offset + size, remaining, small, block.age, free=True, pool=block.pool)
            block.age = next(self._ages)  # the rest is what is left of the block, what is handed out is new
            rest.before, rest.after = block, block.after
            if block.after:
                block.after.before = rest
            block.after, block.size = rest, size
            self._put(rest)
        block.free = False
        self.allocated += block.size
        self.peak_allocated = max(self.peak_allocated, self.allocated)
        return block

    def free(self, block: Block) -> None:
        """Returns a block to its pool, joined with free neighbours (``free_block``, ``try_merge_blocks``)."""
        self.allocated -= block.size
        block.free = True
        for neighbour in (block.before, block.after):
            if neighbour is not None and neighbour.free and neighbour.mapped:
                self._take(neighbour)
                absorb(block, neighbour)
        self._put(block)

    def empty_cache(self) -> None:
        """Gives back every segment that is wholly free, the graphs' excepted (``release_cached_blocks``)."""
        for small in (False, True):
            for pool in self._pools:
                if not pool.kept:
                    self._give_back([entry[-1] for entry in pool.free[small]])

    def lift_limits(self) -> None:
        """From here on the card is as large as it takes: who asks for more than it has may want to know how much."""
        self.capacity = None

    def new_pool(self, kept: bool = False) -> Pool:
        """A pool whose segments are nobody else's; for ``kept`` see ``Pool``."""
        self._pools.append(pool := Pool(kept=kept))
        return pool

    @contextmanager
    def inside(self, pool: Pool) -> Iterator[None]:
        """What is allocated here lies in a pool's segments: another stream's, a CUDA graph's."""
        outside, self._pool = self._pool, pool
        try:
            yield
        finally:
            self._pool = outside

    def _best_fit(self, size: int, small: bool) -> Block | None:
        pool = self._pool.free[small]
        index = bisect.bisect_left(pool, (size,))
        return pool.pop(index)[-1] if index < len(pool) else None

    def _should_split(self, remaining: int, small: bool) -> bool:
        return remaining >= MIN_BLOCK if small else remaining > SMALL_SIZE

    def _take_memory(self, size: int, small: bool) -> Block:
        """Memory from the card; where it has no more, once again after what is cached was given back (``malloc``)."""
        try:
            return self._from_card(size, small)
        except OutOfCapacity:
            if self._pool.kept:  # while a graph is captured, nothing is given back
                raise
            self.empty_cache()
            return self._from_card(size, small)

    def _from_card(self, size: int, small: bool) -> Block:
        """A new segment (``alloc_block``)."""
        size = segment_size(size)
        self._check(size)
        block = Block(next(self._numbers), 0, size, small, next(self._ages), pool=self._pool)
        self._count(block, size)
        return block

    def _give_back(self, blocks: list[Block]) -> None:
        """Those of these free blocks that are whole segments (``release_blocks``)."""
        for block in blocks:
            if block.whole:
                self._take(block)
                self._count(block, -block.size)
                del self.segments[block.segment]

    def _check(self, more: int) -> None:
        if self.capacity is not None and self.reserved + more > self.capacity:
            raise OutOfCapacity

    def _count(self, block: Block, size: int) -> None:
        """Notes memory that the card gave for a block, or took back (less than 0)."""
        self.reserved += size
        self.segments[block.segment] = self.segments.get(block.segment, 0) + size
        self.peak_reserved = max(self.peak_reserved, self.reserved)

    def _put(self, block: Block) -> None:
        bisect.insort(block.pool.free[block.small], (*_order(block), block))

    def _take(self, block: Block) -> None:
        pool = block.pool.free[block.small]
        pool.pop(bisect.bisect_left(pool, _order(block)))


def _order(block: Block) -> tuple[int, int, int, int]:
    """What free blocks are sorted by (``BlockComparatorSizeCounterAddress``)."""
    return block.size, block.age, block.segment, block.offset


def absorb(block: Block, neighbour: Block) -> None:
    """Joins an adjacent block to ``block``."""
    block.offset = min(block.offset, neighbour.offset)
    block.size += neighbour.size
    if neighbour is block.before:
        block.before = neighbour.before
        if block.before:
            block.before.after = block
    else:
        block.after = neighbour.after
        if block.after:
            block.after.before = block
