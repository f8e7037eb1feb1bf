"""The folder: modes, budget, whatever else lies there, and what becomes of it while it is in use."""

import errno
import json
import os
import random
import shutil
import stat
from pathlib import Path

import pytest

from lowvram_lab.errors import LowvramError
from lowvram_lab.prefixes import block_file
from lowvram_lab.prefixes import folder as folder_module
from lowvram_lab.prefixes.folder import INDEX, INDEX_ROOM, LOCK, Folder
from lowvram_lab.prefixes.keys import Root, chain

ROOT = Root({"salt": "none"}, bytes(16))
SIZE = 3000
"""Of a block's file."""


def keys(seed, blocks=1):
    draw = random.Random(seed)
    return chain(ROOT, [draw.randrange(1000) for _ in range(128 * blocks)])


def data_of(key, seconds=1.0, size=SIZE):
    facts = {"text": key.text, "parent": key.parent, "root": key.root, "seconds": str(seconds)}
    return block_file.data_of({}, {**facts, "filling": "x" * (size - len(block_file.data_of({}, facts)) - 32)})


def write(folder, keys, seconds=1.0, noted=True):
    kept = {key.name for key in keys}
    there = [folder.write(key.name, data_of(key, seconds), kept) for key in keys]
    if noted:
        folder.used({key.name: seconds for key, is_there in zip(keys, there, strict=True) if is_there})
    return sum(there)


def holds(folder):
    return {entry.name for entry in folder.entries()}


def room_for(blocks):
    return blocks * (len(data_of(keys(0)[0])) + INDEX_ROOM) + INDEX_ROOM


@pytest.mark.parametrize("umask", [0, 0o022, 0o077])
def test_only_this_user_may_open_what_is_remembered(umask, tmp_path):
    before = os.umask(umask)
    try:
        folder = Folder(tmp_path / "cache" / "prefixes", 1 << 20)
        write(folder, keys(0, 2))
        folder.pin(holds(folder))
    finally:
        os.umask(before)
    assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in folder.path.iterdir()}
    assert len(modes) == 4
    assert set(modes.values()) == {0o600}


@pytest.mark.parametrize("mode", [0o755, 0o750, 0o701, 0o777])
@pytest.mark.parametrize("by_link", [False, True])
def test_a_folder_that_others_can_open_is_refused_with_what_to_do(mode, by_link, tmp_path):
    real = tmp_path / "real"
    real.mkdir()
    real.chmod(mode)
    path = tmp_path / "link" if by_link else real
    if by_link:
        path.symlink_to(real)
    with pytest.raises(LowvramError, match=rf"^{path}: expected [^\n]*found mode {mode:o} [^\n]*chmod 700 it[^\n]*$"):
        Folder(path)
    real.chmod(0o700)
    assert write(Folder(path, 1 << 20), keys(0)) == 1
    assert len(list(real.glob("*.safetensors"))) == 1


@pytest.mark.parametrize("kind", ["file", "dangling link", "below a file"])
def test_what_is_no_folder_is_refused_in_one_line(kind, tmp_path):
    path = tmp_path / "prefixes"
    if kind == "dangling link":
        path.symlink_to(tmp_path / "none")
    else:
        path.touch()
    with pytest.raises(LowvramError, match=r"^[^\n]*prompts cannot be remembered there[^\n]*$"):
        Folder(path / "more" if kind == "below a file" else path)


def test_a_full_disk_says_so_where_the_folder_is_made(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(LowvramError, match=r"^[^\n]*No space left on device[^\n]*$"):
        Folder(tmp_path / "prefixes")


def test_files_of_the_users_own_stay_whatever_needs_room(tmp_path):
    """The folder may be one with models in it: what is no block of ours counts, and is left alone."""
    path = tmp_path / "mine"
    path.mkdir(mode=0o700)
    own = ["model.safetensors", "low_plane.safetensors", ".draft.partial", "notes.txt", f".{LOCK}.1234.partial"]
    for name in own:
        (path / name).write_bytes(b"mine" * 500)
    (path / "more").mkdir()
    folder = Folder(path, 5 * 2000 + room_for(2))
    for seed in range(5):
        assert write(folder, keys(seed)) == 1
        assert folder.bytes <= folder.budget
    assert len(holds(folder)) == 2
    folder.remove()
    assert holds(folder) == set()
    assert {file.name for file in path.iterdir()} - {LOCK} == {*own, "more"}


def test_with_room_for_one_block_the_latest_is_there(tmp_path):
    folder = Folder(tmp_path / "prefixes", room_for(1))
    for seed in range(4):
        assert write(folder, keys(seed)) == 1
        assert holds(folder) == {keys(seed)[0].name}
        assert folder.bytes <= folder.budget


def test_a_budget_that_no_file_fits_in_says_so_once(tmp_path, caplog):
    folder = Folder(tmp_path / "prefixes", room_for(1) - 1)
    assert write(folder, keys(0)) == write(folder, keys(1)) == 0
    assert folder.bytes == 0
    assert len(caplog.messages) == 1
    assert "a block takes" in caplog.text


def test_pinned_blocks_and_those_before_them_stay(tmp_path):
    folder, chained = Folder(tmp_path / "prefixes", room_for(6)), keys("chained", 5)
    assert write(folder, chained, seconds=0.0) == 5
    folder.pin([chained[2].name, "nothing that is there"])
    assert folder.pinned == {chained[2].name}
    for seed in range(20):
        assert write(folder, keys(seed), seconds=5.0) == 1
        assert folder.bytes <= folder.budget
    there = holds(folder)
    assert {key.name for key in chained[:3]} <= there
    assert not {key.name for key in chained[3:]} & there
    assert folder.pinned == {chained[2].name}


def test_where_all_is_pinned_nothing_goes_and_nothing_comes(tmp_path):
    folder, chained = Folder(tmp_path / "prefixes", room_for(3)), keys("chained", 3)
    assert write(folder, chained, seconds=0.0) == 3
    folder.pin([chained[2].name])
    assert write(folder, keys("new"), seconds=5.0) == 0
    assert holds(folder) == {key.name for key in chained}


def test_a_prompt_does_not_push_out_its_own_beginning(tmp_path):
    folder, chained = Folder(tmp_path / "prefixes", room_for(3)), keys("long", 6)
    assert write(folder, chained) == 3
    assert holds(folder) == {key.name for key in chained[:3]}


def test_costly_blocks_stay_longer_and_not_for_ever(tmp_path):
    folder, costly = Folder(tmp_path / "prefixes", room_for(3)), keys("costly")[0].name
    write(folder, keys("costly"), seconds=10.0)
    gone = None
    for seed in range(60):
        write(folder, keys(seed), seconds=1.0)
        if gone is None and costly not in holds(folder):
            gone = seed
    assert gone is not None
    assert gone > 5  # two others have room beside it: a cheap one is gone after two more


def test_what_was_never_noted_is_worth_what_its_file_says(tmp_path):
    """A process that is killed between a block and the index leaves it so."""
    folder = Folder(tmp_path / "prefixes", room_for(2))
    write(folder, keys("costly"), seconds=9.0, noted=False)
    write(folder, keys("cheap"), seconds=1.0, noted=False)
    write(folder, keys("new"), seconds=1.0)
    assert holds(folder) == {keys("costly")[0].name, keys("new")[0].name}


def test_a_smaller_budget_is_kept_by_the_next_prompt(tmp_path):
    path, chained = tmp_path / "prefixes", keys("long", 6)
    assert write(Folder(path, room_for(6)), chained) == 6
    found = Folder(path, room_for(2))
    found.used({chained[0].name: 1.0})
    assert holds(found) == {key.name for key in chained[:2]}
    assert found.bytes <= found.budget
    smaller = Folder(path, room_for(1))
    assert smaller.write(keys("new")[0].name, data_of(keys("new")[0]), ()) is True
    assert smaller.bytes <= smaller.budget


@pytest.mark.parametrize("times", [0, 2**31 - 1, 4_102_444_800])
def test_no_clock_decides_anything(times, tmp_path):
    folder = Folder(tmp_path / "prefixes", room_for(3))
    for seed, seconds in enumerate((3.0, 1.0, 2.0)):
        write(folder, keys(seed), seconds)
    os.utime(folder.file(keys(1)[0].name), (times, times))
    write(folder, keys("new"), 3.0)
    assert holds(folder) == {keys(seed)[0].name for seed in (0, 2, "new")}


DAMAGED_INDEX = ["", "[]", "null", '{"worth": 1}', "[" * 100_000, '{"level": "x", "worth": {}, "pinned": []}', "\ud800"]
DAMAGED_INDEX += ['{"level": NaN, "worth": {}, "pinned": []}', '{"level": Infinity, "worth": {}, "pinned": []}']
DAMAGED_INDEX += [
    '{"level": 0, "worth": {"a": Infinity}, "pinned": []}',
    '{"level": 0, "worth": {"a": []}, "pinned": []}',
]
DAMAGED_INDEX += ['{"level": 0, "worth": [], "pinned": []}', f'{{"level": {"9" * 400}, "worth": {{}}, "pinned": []}}']


@pytest.mark.parametrize("index", DAMAGED_INDEX, ids=range(len(DAMAGED_INDEX)))
def test_a_damaged_index_says_nothing(index, tmp_path):
    folder = Folder(tmp_path / "prefixes", room_for(2))
    write(folder, keys(0), 5.0)
    (folder.path / INDEX).write_bytes(index.encode(errors="surrogatepass"))
    assert folder.pinned == set()
    for seed in range(1, 4):
        assert write(folder, keys(seed), 1.0) == 1
        assert folder.bytes <= folder.budget
    kept = json.loads((folder.path / INDEX).read_text())
    assert set(kept["worth"]) == holds(folder)


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_another_thing_in_place_of_the_index_is_replaced(kind, tmp_path):
    folder, own = Folder(tmp_path / "prefixes", room_for(2)), tmp_path / "own"
    own.write_text("mine")
    index = folder.path / INDEX
    index.symlink_to(own) if kind == "link" else os.mkfifo(index)
    assert write(folder, keys(0)) == 1
    assert index.is_file()
    assert not index.is_symlink()
    assert own.read_text() == "mine"


@pytest.mark.parametrize("kind", ["link", "pipe", "empty", "foreign"])
def test_another_thing_in_place_of_a_block_is_written_anew(kind, tmp_path):
    folder, own, key = Folder(tmp_path / "prefixes", room_for(2)), tmp_path / "own", keys(0)[0]
    own.write_text("mine")
    file = folder.file(key.name)
    if kind == "link":
        file.symlink_to(own)
    elif kind == "pipe":
        os.mkfifo(file)
    else:
        file.write_bytes(b"" if kind == "empty" else b"x" * 100)
    assert folder.has(key.name)
    assert folder.write(key.name, data_of(key), ()) is True  # not looked into: that is for whoever reads it
    assert folder.write(key.name, data_of(key), (), anew=True) is True
    assert block_file.facts_of(file)["text"] == key.text
    assert own.read_text() == "mine"


def test_a_folder_in_place_of_a_block_is_one_warning(tmp_path, caplog):
    folder, key = Folder(tmp_path / "prefixes", room_for(2)), keys(0)[0]
    folder.file(key.name).mkdir()
    for _ in range(2):
        assert folder.write(key.name, data_of(key), (), anew=True) is False
    assert len(caplog.messages) == 1


def test_a_file_that_changed_is_looked_into_again(tmp_path):
    folder, key = Folder(tmp_path / "prefixes", room_for(3)), keys(0)[0]
    write(folder, [key])
    first = folder.entries()[0]
    folder.file(key.name).write_bytes(b"x" * 10)
    assert (folder.entries()[0].size, folder.entries()[0].facts) == (10, {})
    folder.write(key.name, data_of(key), (), anew=True)
    assert (folder.entries()[0].size, folder.entries()[0].facts) == (first.size, first.facts)
    folder.path.joinpath("beside").write_bytes(data_of(key, seconds=2.0))  # or the new file may get the old one's inode
    folder.path.joinpath("beside").rename(folder.file(key.name))
    assert (folder.entries()[0].size, folder.entries()[0].seconds) == (first.size, 2.0)


def test_leftovers_are_removed_by_whoever_writes_next_and_nothing_else_is(tmp_path):
    folder, key = Folder(tmp_path / "prefixes", 1 << 20), keys(0)[0]
    write(folder, keys(1))
    left = [f".{key.name}.safetensors.0a1b2c3d.partial", f".{INDEX}.0a1b2c3d.partial"]
    for call in (lambda: write(folder, [key]), lambda: folder.used({key.name: 1.0}), lambda: folder.pin([key.name])):
        for name in left:
            (folder.path / name).write_bytes(b"x" * 5000)
        call()
        assert not list(folder.path.glob(".*.partial"))
    assert holds(folder) == {key.name, keys(1)[0].name}


@pytest.mark.parametrize("become", ["nothing", "file", "open to others"])
def test_a_folder_that_goes_while_it_is_in_use(become, tmp_path, caplog):
    folder = Folder(tmp_path / "prefixes", 1 << 20)
    write(folder, keys(0))
    shutil.rmtree(folder.path)
    if become == "file":
        folder.path.touch()
    elif become == "open to others":
        folder.path.mkdir(mode=0o755)
    name = keys(0)[0].name
    assert not folder.has(name)
    assert folder.entries() == []
    assert folder.bytes == 0
    assert folder.pinned == set()
    folder.used({name: 1.0})
    assert write(folder, keys(1)) == (become == "nothing")
    if become == "nothing":
        assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700
        assert caplog.messages == []
    else:
        assert all("\n" not in message and str(folder.path) in message for message in caplog.messages)
        assert 1 <= len(caplog.messages) <= 2


def test_another_process_that_writes_for_long_is_one_warning(tmp_path, caplog, monkeypatch):
    from filelock import FileLock

    monkeypatch.setattr(folder_module, "LONGEST_WAIT_TO_WRITE_S", 0.01)
    waited, made = [], FileLock.__init__

    def noting(lock, *args, **named):
        waited.append(named.get("timeout"))
        made(lock, *args, **named)

    monkeypatch.setattr(FileLock, "__init__", noting)
    folder = Folder(tmp_path / "prefixes", 1 << 20)
    with FileLock(folder.path / LOCK, mode=0o600):
        for seed in range(3):
            assert folder.write(keys(seed)[0].name, data_of(keys(seed)[0]), ()) is False
        folder.used({keys(0)[0].name: 1.0})
    assert waited[1:] == [0.01, 0, 0, 0]  # in vain once; after that no answer's end waits
    assert all("another process" in message for message in caplog.messages)
    assert write(folder, keys(0)) == 1
    folder.used({keys(0)[0].name: 1.0})
    assert waited[-1] == folder_module.LONGEST_WAIT_TO_NOTE_S


def test_a_full_disk_leaves_nothing_half_written(tmp_path, caplog, monkeypatch):
    folder = Folder(tmp_path / "prefixes", 1 << 20)
    write(folder, keys(0))
    opened = os.fdopen

    def filling(handle, *arguments):
        file = opened(handle, *arguments)

        class Full:
            def __enter__(self):
                return self

            def __exit__(self, *_):
                file.close()

            def write(self, data):
                file.write(data[: len(data) // 2])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        return Full()

    monkeypatch.setattr(block_file.os, "fdopen", filling)
    for seed in (1, 2):
        assert write(folder, keys(seed)) == 0
    folder.used({keys(0)[0].name: 2.0})
    assert holds(folder) == {keys(0)[0].name}
    assert not list(folder.path.glob(".*.partial"))
    assert caplog.messages == [
        f"{folder.path}: what was read is not remembered: No space left on device",
        f"{folder.path}: what was used is not noted: No space left on device",
    ]
