"""The caching allocator with ``expandable_segments:True``: one growing segment a pool instead of many fixed ones.

Virtual address space is reserved once; physical pages (2 MiB in the small pool, 20 MiB in the large one) are mapped at
its end as needed and unmapped when the cache is emptied. Functions named in comments are those of
``c10/cuda/CUDACachingAllocator.cpp`` (PyTorch 2.13 and 2.14).
"""

import bisect

from lowvram_lab.memory.allocator import (
    LARGE_SEGMENT,
    MIN_BLOCK,
    SMALL_SEGMENT,
    Block,
    CachingAllocator,
    OutOfCapacity,
    Pool,
    absorb,
    segment_size,
)

ADDRESS_SPACE = 1 << 50
"""More than any card has; PyTorch reserves 1.125 times the card's memory."""


class ExpandableAllocator(CachingAllocator):
    """See ``CachingAllocator``; ``segments`` holds the mapped bytes of each pool's two.

    Args:
        capacity: See ``CachingAllocator``.
        card_bytes: Of a capacity that is a cap (``set_per_process_memory_fraction``) on a card with more: what the
            card has. PyTorch looks at such a cap beforehand, as if for a segment of fixed size, and then maps whole
            pages: somewhat more than the cap. By default the capacity is the card.
    """

    def __init__(self, capacity: int | None = None, card_bytes: int | None = None):
        super().__init__(capacity)
        self.capped = card_bytes is not None
        self.card_bytes = card_bytes if self.capped else capacity

    def lift_limits(self) -> None:
        """See ``CachingAllocator``."""
        self.capacity = self.card_bytes = None

    def new_pool(self, kept: bool = False) -> Pool:
        """See ``CachingAllocator``: one segment for small blocks, one for large."""
        pool = super().new_pool(kept)
        for small in (False, True):
            number = next(self._numbers)
            pool.first[small] = Block(number, 0, ADDRESS_SPACE, small, free=True, mapped=False, pool=pool)
            self.segments[number] = 0
        return pool

    def _give_back(self, blocks: list[Block]) -> None:
        """Every page that lies wholly in these free blocks (``unmap_block``)."""
        for block in blocks:
            page = _page(block.small)
            start, stop = -(-block.offset // page) * page, (block.offset + block.size) // page * page
            if start < stop:
                self._take(block)
                self._unmap(block, start, stop)

    def _should_split(self, remaining: int, small: bool) -> bool:
        return remaining >= MIN_BLOCK

    def _best_fit(self, size: int, small: bool) -> Block | None:
        """Smallest that fits; a block that can still grow counts as what it can become (``get_free_block``)."""
        pool = self._pool.free[small]
        index = bisect.bisect_left(pool, (size,))
        if index == len(pool):
            return None
        while index + 1 < len(pool) and _could_grow_to(pool[index + 1][-1]) < _could_grow_to(pool[index][-1]):
            index += 1
        return pool.pop(index)[-1]

    def _from_card(self, size: int, small: bool) -> Block:
        """Room at the lowest place, with pages mapped where there are none (``try_allocate_expandable_block``)."""
        if self.capped:  # alloc_block
            self._check(segment_size(size))
        block = self._find_room(size, small)
        if not block.mapped:
            block = self._map(block, min(block.size, size))
        while block.size < size:
            block = self._map(block.after, min(size - block.size, block.after.size))
        self._take(block)
        return block

    def _find_room(self, size: int, small: bool) -> Block:
        """The lowest run of free and unmapped blocks with room for ``size`` (``find_expandable_block``)."""
        block = self._pool.first[small]
        while block:
            run, room = block, 0
            while run and run.free:
                room += run.size
                if room >= size:
                    return block
                run = run.after
            block = run.after if run else None
        raise OutOfCapacity

    def _map(self, block: Block, size: int) -> Block:
        page = _page(block.small)
        size = min(-(-size // page) * page, block.size)
        if self.card_bytes is not None and self.reserved + size > self.card_bytes:
            raise OutOfCapacity
        if size < block.size:
            rest = self._piece(block, block.offset + size, block.size - size, mapped=False)
            rest.before, rest.after = block, block.after
            if block.after:
                block.after.before = rest
            block.after, block.size = rest, size
        self._count(block, size)
        block.mapped = True
        for neighbour in (block.before, block.after):
            if neighbour is not None and neighbour.free and neighbour.mapped:
                self._take(neighbour)
                self._absorb(block, neighbour)
        self._put(block)
        return block

    def _unmap(self, block: Block, start: int, stop: int) -> None:
        end = block.offset + block.size
        if start > block.offset:
            head = self._piece(block, block.offset, start - block.offset)
            head.before, head.after = block.before, block
            self._link_before(block, head)
        if stop < end:
            tail = self._piece(block, stop, end - stop)
            tail.before, tail.after = block, block.after
            if block.after:
                block.after.before = tail
            block.after = tail
            self._put(tail)
        block.offset = start
        block.size = stop - start
        block.mapped = False
        self._count(block, start - stop)
        for neighbour in (block.before, block.after):
            if neighbour is not None and not neighbour.mapped:
                self._absorb(block, neighbour)

    def _link_before(self, block: Block, head: Block) -> None:
        if block.before:
            block.before.after = head
        else:
            block.pool.first[block.small] = head
        block.before = head
        self._put(head)

    def _absorb(self, block: Block, neighbour: Block) -> None:
        if neighbour is block.pool.first[block.small]:
            block.pool.first[block.small] = block
        absorb(block, neighbour)

    def free(self, block: Block) -> None:
        """See ``CachingAllocator``."""
        first = block.pool.first[block.small]
        if block.before is first and first.free and first.mapped:  # it will be joined to this block
            block.pool.first[block.small] = block
        super().free(block)

    def _piece(self, block: Block, offset: int, size: int, mapped: bool = True) -> Block:
        """A free part of a block, not linked to its neighbours yet."""
        return Block(block.segment, offset, size, block.small, next(self._ages), True, mapped, pool=block.pool)


def _page(small: bool) -> int:
    return SMALL_SEGMENT if small else LARGE_SEGMENT


def _could_grow_to(block: Block) -> int:
    return block.size + (block.after.size if block.after and not block.after.mapped else 0)
