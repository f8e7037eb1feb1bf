"""Recorded traces through the simulator. The traces are synthetic, in the format of ``torch.cuda.memory._snapshot()``.

The rules they follow are written here a second time, naively, so that simulator and reference can disagree.
"""

import json
import pickle
import random
from collections import Counter

import pytest

from lowvram_lab.errors import CheckpointError
from lowvram_lab.units import KiB, MiB
from tests.memory.trace_replay import read_snapshot, replay_trace

A, B, C = 0x7F00_0000_0000, 0x7F00_4000_0000, 0x7F00_8000_0000  # where cudaMalloc put three segments


def entry(action, address, size, stream=0):
    return {"action": action, "addr": address, "size": size, "stream": stream, "frames": []}


def freed(address, size):
    return [entry("free_requested", address, size), entry("free_completed", address, size)]


def snapshot(*entries):
    return {"segments": [], "device_traces": [list(entries)]}


HAND_WRITTEN = snapshot(
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
)


def test_a_trace_written_by_hand():
    found = replay_trace(HAND_WRITTEN)
    assert found.agrees
    assert found.simulated_segments == {2 * MiB: 1, 20 * MiB: 1, 34 * MiB: 1, 10 * MiB: 1}
    assert found.recorded_reserved_bytes == found.simulated_reserved_bytes == 32 * MiB
    assert found.peak_reserved_bytes == 56 * MiB
    assert found.out_of_memory == 0


@pytest.mark.parametrize(
    ("position", "changed"),
    [
        (0, entry("segment_alloc", A, 4 * MiB)),  # another size
        (11, entry("alloc", B, 7 * MiB)),  # would have needed a segment more
    ],
)
def test_a_recording_by_other_rules_does_not_agree(position, changed):
    trace = list(HAND_WRITTEN["device_traces"][0])
    trace[position] = changed
    assert not replay_trace(snapshot(*trace)).agrees


def test_expandable_segments_are_compared_by_their_sum():
    small, large = A, B
    found = replay_trace(
        snapshot(
            entry("segment_map", small, 2 * MiB),
            entry("alloc", small, 3000),
            entry("segment_map", large, 20 * MiB),
            entry("alloc", large, 15 * MiB),
            entry("segment_map", large + 20 * MiB, 20 * MiB),
            entry("alloc", large + 15 * MiB, 15 * MiB),
            *freed(large + 15 * MiB, 15 * MiB),
            entry("segment_unmap", large + 20 * MiB, 20 * MiB),
        )
    )
    assert found.agrees
    assert found.simulated_reserved_bytes == 22 * MiB
    assert found.peak_reserved_bytes == 42 * MiB


def test_a_limit_of_ones_own():
    trace = HAND_WRITTEN["device_traces"][0][:14]
    found = replay_trace(snapshot(*trace), capacity=40 * MiB)
    assert (found.out_of_memory, found.peak_reserved_bytes) == (1, 22 * MiB)  # the 33 MiB
    assert not found.agrees
    again = replay_trace(snapshot(*trace, *freed(C, 33 * MiB)), capacity=40 * MiB)  # what was refused may be freed
    assert again.out_of_memory == 1


def test_a_trace_that_began_too_late():
    with pytest.raises(CheckpointError, match="frees address 0x7f0000000000, which it never allocated") as error:
        replay_trace(snapshot(*freed(A, 512)))
    assert "\n" not in str(error.value)


def test_json_goes_round(tmp_path):
    path = tmp_path / "snapshot.json"
    path.write_text(json.dumps(HAND_WRITTEN))
    assert replay_trace(read_snapshot(path)) == replay_trace(HAND_WRITTEN)


def test_a_pickle_is_refused(tmp_path):
    path = tmp_path / "snapshot.pickle"
    path.write_bytes(pickle.dumps(HAND_WRITTEN))
    with pytest.raises(CheckpointError, match="pickles are not opened") as error:
        read_snapshot(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "3",
        "{}",
        '{"device_traces": {}}',
        '{"device_traces": [3]}',
        '{"device_traces": [[3]]}',
        '{"device_traces": [[{"addr": 3}]]}',
        '{"device_traces": [[{"action": "alloc", "addr": 3, "size": "much"}]]}',
        "[" * 100_000,
    ],
)
def test_other_json_is_refused(tmp_path, text):
    path = tmp_path / "snapshot.json"
    path.write_text(text)
    with pytest.raises(CheckpointError, match="expected a memory snapshot") as error:
        read_snapshot(path)
    assert "\n" not in str(error.value)


def test_a_missing_file_and_a_missing_device(tmp_path):
    with pytest.raises(CheckpointError, match="expected a memory snapshot"):
        read_snapshot(tmp_path / "nowhere.json")
    with pytest.raises(CheckpointError, match="device 1"):
        replay_trace(HAND_WRITTEN, device=1)


class Reference:
    """The documented rules once more, over plain lists searched from end to end: slow, obvious, and independent.

    Blocks are ``[address, size, free]`` in lists by segment; ``log`` is the trace in CUDA's format.
    """

    def __init__(self, addresses):
        self.addresses, self.segments, self.log = addresses, {}, []

    def allocate(self, asked):
        size = max(1, (asked + 511) // 512) * 512
        pool = "small" if size <= MiB else "large"
        fitting = [
            (block[1], block[0])
            for (_, kind), blocks in self.segments.items()
            for block in blocks
            if kind == pool and block[2] and block[1] >= size
        ]
        if fitting:
            address = min(fitting)[1]
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
        for key, blocks in list(self.segments.items()):
            if len(blocks) == 1 and blocks[0][2]:
                self.log.append(entry("segment_free", key[0], blocks[0][1]))
                del self.segments[key]


def random_trace(seed, events, addresses):
    source, reference, live = random.Random(seed), Reference(addresses), []
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
    return snapshot(*reference.log)


def ascending():
    address = A
    while True:
        yield address
        address += 64 * MiB


def scattered():
    yield from random.Random(1).sample(range(A, A + (1 << 40), 64 * MiB), 5000)


@pytest.mark.parametrize("addresses", [ascending, scattered])
@pytest.mark.parametrize("seed", [4, 7, 22])  # with ties taken by age instead of address, all three disagree
def test_a_long_random_trace_of_the_reference_agrees(seed, addresses):
    trace = random_trace(seed, 1500, addresses())
    actions = Counter(e["action"] for e in trace["device_traces"][0])
    assert actions["alloc"] > 600
    assert actions["segment_alloc"] > 40
    assert actions["segment_free"] > 5
    found = replay_trace(trace)
    assert found.simulated_segments == found.recorded_segments
    assert found.agrees
