"""Traces through the simulator: synthetic ones, in the format of ``torch.cuda.memory._snapshot()``.

The rules they follow are written here a second time, naively, so that simulator and reference can disagree.
"""

import random
from collections import Counter

import pytest

from lowvram_lab.memory import allocator
from lowvram_lab.units import KiB, MiB
from tests.memory.trace_replay import emptied_where_freed, replay_trace

A, B, C = 0x7F00_0000_0000, 0x7F00_4000_0000, 0x7F00_8000_0000  # where cudaMalloc put three segments


def entry(action, address, size, stream=0):
    return {"action": action, "addr": address, "size": size, "stream": stream, "frames": []}


def freed(address, size):
    return [entry("free_requested", address, size), entry("free_completed", address, size)]


HAND_WRITTEN = [
    entry("segment_alloc", A, 2 * MiB),
    entry("alloc", A, 1000),  # recorded as asked: the allocator rounds it to 1024
    entry("alloc", A + 1024, 512 * KiB),
    entry("segment_alloc", B, 20 * MiB),
    entry("alloc", B, 5 * MiB),
    entry("alloc", B + 5 * MiB, 9 * MiB),
    *freed(A, 1000),
    entry("alloc", A, 512),  # fits the hole
    *freed(B, 5 * MiB),
    entry("alloc", B, 4 * MiB),  # the hole of 5 MiB, not the rest of 6; its last MiB is not split off
    entry("segment_alloc", C, 34 * MiB),
    entry("alloc", C, 33 * MiB),
    *freed(B + 5 * MiB, 9 * MiB),  # joins the rest: 15 MiB
    entry("alloc", B + 5 * MiB, 15 * MiB),
    *freed(C, 33 * MiB),
    entry("segment_free", C, 34 * MiB),  # torch.cuda.empty_cache()
    entry("segment_alloc", C, 10 * MiB),
    entry("alloc", C, 10 * MiB - 100),
]


def sizes(events, what):
    return [event.size for event in events if event.what == what]


def test_a_trace_written_by_hand():
    found = replay_trace(emptied_where_freed(HAND_WRITTEN))
    assert not found.difference
    assert sizes(found.simulated, "segment") == [2 * MiB, 20 * MiB, 34 * MiB, -34 * MiB, 10 * MiB]
    assert found.simulated[-1] == ("block", 3, 0, 10 * MiB - 100, 32 * MiB)
    assert found.peak_reserved == 56 * MiB


@pytest.mark.parametrize(
    ("position", "changed"),
    [
        (0, entry("segment_alloc", A, 4 * MiB)),  # another size
        (2, entry("alloc", A + 2048, 512 * KiB)),  # another place
        (11, entry("alloc", B, 7 * MiB)),  # would have needed a segment more
    ],
)
def test_a_recording_by_other_rules_does_not_agree(position, changed):
    trace = list(HAND_WRITTEN)
    trace[position] = changed
    assert replay_trace(emptied_where_freed(trace)).difference


def test_a_trace_of_segments_that_grow():
    small, large = A, B
    trace = [
        entry("segment_map", small, 2 * MiB),
        entry("alloc", small, 3000),
        entry("segment_map", large, 20 * MiB),
        entry("alloc", large, 15 * MiB),
        entry("segment_map", large + 20 * MiB, 20 * MiB),
        entry("alloc", large + 15 * MiB, 15 * MiB),
        *freed(large + 15 * MiB, 15 * MiB),
        entry("segment_unmap", large + 20 * MiB, 20 * MiB),
    ]
    found = replay_trace(emptied_where_freed(trace))
    assert not found.difference
    assert found.simulated[-1] == ("segment", 1, 20 * MiB, -20 * MiB, 22 * MiB)
    assert found.peak_reserved == 42 * MiB


def test_a_limit_refuses_and_empties_the_cache_first():
    trace = [*HAND_WRITTEN[:14], *freed(B + 5 * MiB, 9 * MiB)]
    found = replay_trace(trace, capacity=40 * MiB)
    assert found.simulated[-1] == ("refused", 0, 0, 0, 22 * MiB)  # the 33 MiB
    assert "recorded Event(what='segment', segment=2" in found.difference


class Reference:
    """The documented rules once more, over plain lists searched from end to end: slow, obvious, and independent.

    Blocks are ``[address, size, free]`` in lists by segment, the oldest first; ``log`` is the trace in CUDA's format.
    """

    def __init__(self, addresses, by_age):
        self.addresses, self.by_age, self.segments, self.log = addresses, by_age, {}, []

    def allocate(self, asked):
        size = max(1, (asked + 511) // 512) * 512
        pool = "small" if size <= MiB else "large"
        fitting = [
            (block[1], age if self.by_age else 0, block[0])
            for age, ((_, kind), blocks) in enumerate(self.segments.items())
            for block in blocks
            if kind == pool and block[2] and block[1] >= size
        ]
        if fitting:
            address = min(fitting)[2]
        else:
            room = (
                2 * MiB
                if pool == "small"
                else 20 * MiB
                if size < 10 * MiB
                else (size + 2 * MiB - 1) // MiB // 2 * 2 * MiB
            )
            address = next(self.addresses)
            self.segments[address, pool] = [[address, room, True]]
            self.log.append(entry("segment_alloc", address, room))
        blocks, index = self.find(address)
        rest = blocks[index][1] - size
        if rest >= 512 if pool == "small" else rest > MiB:
            blocks[index : index + 1] = [[address, size, True], [address + size, rest, True]]
        blocks[index][2] = False
        self.log.append(entry("alloc", address, asked))
        return address, asked

    def find(self, address):
        for blocks in self.segments.values():
            for index, block in enumerate(blocks):
                if block[0] == address:
                    return blocks, index
        raise AssertionError("no such block")

    def free(self, address, asked):
        self.log += freed(address, asked)
        blocks, index = self.find(address)
        blocks[index][2] = True
        for left in (index, index - 1):
            if 0 <= left < len(blocks) - 1 and blocks[left][2] and blocks[left + 1][2]:
                blocks[left : left + 2] = [[blocks[left][0], blocks[left][1] + blocks[left + 1][1], True]]

    def empty_cache(self):
        free = [
            (key[1] == "small", blocks[0][1], age if self.by_age else 0, key)
            for age, (key, blocks) in enumerate(self.segments.items())
            if len(blocks) == 1 and blocks[0][2]
        ]
        for _, size, _, key in sorted(free):  # the large ones first, by size
            self.log.append(entry("segment_free", key[0], size))
            del self.segments[key]


def random_trace(seed, events, addresses, by_age):
    source, reference, live = random.Random(seed), Reference(addresses, by_age), []
    repeated = [source.randrange(1, 30 * MiB) for _ in range(12)]  # sizes come again, as a model's do: ties
    for _ in range(events):
        draw = source.random()
        if draw < 0.004:
            reference.empty_cache()
        elif live and draw < 0.47 + 0.002 * len(live):
            reference.free(*live.pop(source.randrange(len(live))))
        else:
            new = source.choice(repeated) if source.random() < 0.5 else int(2 ** source.uniform(0, 25))
            live.append(reference.allocate(new))
    return reference.log


def ascending():
    address = A
    while True:
        yield address
        address += 64 * MiB


def scattered():
    yield from random.Random(1).sample(range(A, A + (1 << 40), 64 * MiB), 5000)


@pytest.mark.parametrize("release", [(2, 11), (2, 13)])
@pytest.mark.parametrize("addresses", [ascending, scattered])
@pytest.mark.parametrize("seed", [4, 7, 22])
def test_a_long_random_trace_of_the_reference_agrees(seed, addresses, release, monkeypatch):
    monkeypatch.setattr(allocator, "torch_release", lambda: release)
    trace = random_trace(seed, 1500, addresses(), by_age=release > (2, 11))
    actions = Counter(e["action"] for e in trace)
    assert actions["alloc"] > 600
    assert actions["segment_alloc"] > 40
    assert actions["segment_free"] > 5
    assert not replay_trace(emptied_where_freed(trace)).difference


@pytest.mark.parametrize("seed", [4, 7, 22])
def test_ties_are_taken_as_the_release_does(seed, monkeypatch):
    monkeypatch.setattr(allocator, "torch_release", lambda: (2, 11))
    assert replay_trace(emptied_where_freed(random_trace(seed, 1500, scattered(), by_age=True))).difference
