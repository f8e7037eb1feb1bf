"""A directory under construction: what counts as finished, what is discarded, what an interruption leaves."""

import errno
import json
import logging
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lowvram_lab.conversion import resumable as module
from lowvram_lab.conversion.resumable import PartialDirectory, building, join_safetensors
from lowvram_lab.errors import CheckpointError, LowvramError
from lowvram_lab.files import refuse_occupied, require_space, sha256_file
from tests.helpers.tiny import seeded

IDENTITY = {"source": [["model.safetensors", 5, 123456789]], "solver": "gptq", "budget": 10**12, "plan": None}


@pytest.fixture
def target(tmp_path):
    return tmp_path / "out"


def shard(value: float = 1.0) -> dict:
    return {"a": torch.full((3, 4), value), "b.weight": seeded(5)}


def test_nothing_is_called_the_target_until_it_is_published(target):
    with building(target, IDENTITY) as partial:
        partial.save_tensors("one.safetensors", shard())
        partial.save_json("two.json", {"x": [1, 2.5]})
        assert not target.exists()
        assert partial.path == target.with_name(".out.partial")
        partial.publish()
    assert sorted(file.name for file in target.iterdir()) == ["one.safetensors", "two.json"]
    assert torch.equal(load_file(target / "one.safetensors")["b.weight"], seeded(5))
    assert json.loads((target / "two.json").read_text()) == {"x": [1, 2.5]}
    assert not partial.path.exists()
    assert (target / "one.safetensors").stat().st_mode & 0o777 == 0o644  # safetensors' own files are 0600


def test_an_empty_directory_is_taken(target):
    target.mkdir()
    with building(target, IDENTITY) as partial:
        partial.save_json("x.json", {})
        partial.publish()
    assert [file.name for file in target.iterdir()] == ["x.json"]


def test_what_was_finished_is_there_the_next_time(target):
    with building(target, IDENTITY) as partial:
        partial.save_tensors("one.safetensors", shard())
        partial.save_json("state/known.json", {"x": 0.1})
    with building(target, json.loads(json.dumps(IDENTITY))) as partial:
        assert partial.finished("one.safetensors")
        assert torch.equal(partial.load_tensors("one.safetensors")["a"], shard()["a"])
        assert partial.load_json("state/known.json") == {"x": 0.1}
        assert not partial.finished("two.safetensors")
        assert partial.load_tensors("two.safetensors") is None
        assert partial.load_json("two.json") is None


def test_views_and_shared_tensors_are_written_whole(target):
    whole = seeded(6, 4)
    with building(target, IDENTITY) as partial:
        partial.save_tensors("one.safetensors", {"columns": whole[:, 1:3], "transposed": whole.T})
        found = partial.load_tensors("one.safetensors")
    assert torch.equal(found["columns"], whole[:, 1:3])
    assert torch.equal(found["transposed"], whole.T)


@pytest.mark.parametrize("key", IDENTITY)
def test_another_identity_starts_afresh_and_says_so(target, key, caplog):
    with building(target, IDENTITY) as partial:
        partial.save_tensors("one.safetensors", shard())
    with caplog.at_level(logging.WARNING), building(target, {**IDENTITY, key: "other"}) as partial:
        assert not partial.finished("one.safetensors")
        assert [file.name for file in partial.path.iterdir()] == ["state"]
    assert "other settings: starting afresh" in caplog.text


@pytest.mark.parametrize("journal", ["", "{", "null", '{"identity": 5}', *(pytest.param(j) for j in ("[]", "7"))])
def test_a_damaged_journal_starts_afresh(target, journal):
    with building(target, IDENTITY) as partial:
        partial.save_tensors("one.safetensors", shard())
    (partial.state / "journal.json").write_text(journal)
    with building(target, IDENTITY) as partial:
        assert not partial.finished("one.safetensors")


def damage(file, how):
    if how == "gone":
        file.unlink()
    elif how == "cut short":
        file.write_bytes(file.read_bytes()[:-1])
    elif how == "a byte flipped":
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
    elif how == "another tensor":
        save_file(shard(2.0), file)
    else:
        file.unlink()
        file.mkdir()


@pytest.mark.parametrize("how", ["gone", "cut short", "a byte flipped", "another tensor", "a directory"])
def test_a_file_that_is_not_what_was_written_does_not_count(target, how):
    with building(target, IDENTITY) as partial:
        partial.save_tensors("one.safetensors", shard())
        partial.save_tensors("two.safetensors", shard())
    damage(partial.path / "one.safetensors", how)
    with building(target, IDENTITY) as partial:
        assert not partial.finished("one.safetensors")
        assert partial.load_tensors("one.safetensors") is None
        assert partial.finished("two.safetensors")


@pytest.mark.parametrize("step", ["os.fsync", "sha256_file", "os.replace", "write_atomically"])
def test_killed_while_writing_the_file_does_not_count_and_is_written_again(target, step, monkeypatch):
    with building(target, IDENTITY) as partial:
        partial.save_tensors("one.safetensors", shard())
        with monkeypatch.context() as patch:

            def die(*_, **__):
                raise KeyboardInterrupt

            patch.setattr(f"lowvram_lab.conversion.resumable.{step}", die)
            with pytest.raises(KeyboardInterrupt):
                partial.save_tensors("two.safetensors", shard(2.0))
    with building(target, IDENTITY) as partial:
        assert partial.finished("one.safetensors")
        assert not partial.finished("two.safetensors")
        partial.save_tensors("two.safetensors", shard(3.0))
        assert partial.load_tensors("two.safetensors")["a"][0, 0] == 3
        partial.publish()
    assert sorted(file.name for file in target.iterdir()) == ["one.safetensors", "two.safetensors"]  # no .tmp


def test_what_is_forgotten_is_gone_even_if_it_was_never_there(target):
    with building(target, IDENTITY) as partial:
        partial.save_json("state/a.json", {})
        partial.forget("state/a.json")
        partial.forget("state/never.json")
        assert not partial.finished("state/a.json")
        assert [file.name for file in partial.state.iterdir()] == ["journal.json"]


@pytest.mark.parametrize("step", ["shutil.rmtree", "os.replace"])
def test_killed_while_publishing_ends_in_a_whole_directory_the_next_time(target, step, monkeypatch):
    with building(target, IDENTITY) as partial:
        partial.save_json("x.json", {})
        with monkeypatch.context() as patch:

            def die(*_, **__):
                raise KeyboardInterrupt

            patch.setattr(f"lowvram_lab.conversion.resumable.{step}", die)
            with pytest.raises(KeyboardInterrupt):
                partial.publish()
    if target.exists():  # killed after the rename: it is whole, and the next run clears up
        with pytest.raises(LowvramError, match="new or empty"), building(target, IDENTITY):
            raise AssertionError("never reached")
    else:
        with building(target, IDENTITY) as partial:
            assert partial.finished("x.json")
            partial.publish()
    assert [file.name for file in target.iterdir()] == ["x.json"]
    assert {path.name for path in target.parent.iterdir()} <= {"out", ".out.lock"}


def test_a_mistake_leaves_nothing_and_a_stop_leaves_everything(target):
    """What a second run would meet again is discarded; Ctrl-C, a kill or a full disk is something to go on after."""
    with pytest.raises(CheckpointError), building(target, IDENTITY) as partial:
        partial.save_json("x.json", {})
        raise CheckpointError("a weight is not finite")
    assert not partial.path.exists()
    for error in (KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device"), MemoryError()):
        with pytest.raises(type(error)), building(target, IDENTITY) as partial:
            partial.save_json("x.json", {})
            raise error
        with building(target, IDENTITY) as partial:
            assert partial.finished("x.json")
    assert not target.exists()


def test_a_full_disk_leaves_everything_wherever_it_is_met(target, monkeypatch):
    with building(target, IDENTITY) as partial:
        partial.save_tensors("one.safetensors", shard())

    def full(path, *rest):
        if ".journal.json" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        return open(path, *rest)

    with pytest.raises((LowvramError, OSError), match="No space left"), building(target, IDENTITY) as partial:
        monkeypatch.setattr("lowvram_lab.files.open", full, raising=False)
        partial.save_tensors("two.safetensors", shard())
    monkeypatch.undo()
    with building(target, IDENTITY) as partial:
        assert partial.finished("one.safetensors")


def test_too_little_space_for_the_rest_leaves_what_was_made(target, monkeypatch):
    """The disk filled up between two runs: what the first one made is worth hours, and is no mistake."""
    with building(target, IDENTITY) as partial:
        partial.save_tensors("one.safetensors", shard())
    with pytest.raises(LowvramError, match="of disk"), building(target, IDENTITY) as partial:
        require_space(partial.path, 10**18, "the conversion")
    with building(target, IDENTITY) as partial:
        assert partial.finished("one.safetensors")


@pytest.mark.parametrize("make", [lambda t: t.write_text("mine"), lambda t: (t.mkdir(), (t / "mine").write_text("x"))])
def test_what_is_there_is_never_touched(target, make):
    make(target)
    before = sorted(str(path) for path in target.parent.rglob("*"))
    with pytest.raises(LowvramError, match="expected a new or empty directory for the output, found something in it"):
        refuse_occupied(target)
    with pytest.raises(LowvramError, match="new or empty"), building(target, IDENTITY):
        raise AssertionError("never reached")
    assert sorted(str(path) for path in target.parent.rglob("*")) == before


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(LowvramError, match="cannot write .*out: its folder does not exist"):
        refuse_occupied(tmp_path / "missing" / "out")


def test_a_second_process_waits_and_then_finds_it_occupied(target, caplog):
    outcome, begun = [], threading.Event()

    def second():
        begun.set()
        try:
            with building(target, IDENTITY):
                outcome.append("built")
        except LowvramError as error:
            outcome.append(str(error))

    with building(target, IDENTITY) as partial:
        other = threading.Thread(target=second)
        other.start()
        begun.wait()
        time.sleep(0.3)
        assert outcome == []
        partial.save_json("x.json", {})
        partial.publish()
    other.join(timeout=20)
    assert len(outcome) == 1
    assert "found something in it" in outcome[0]
    assert "another process is making" in caplog.text


def test_space_is_asked_for_before_work_begins(tmp_path, monkeypatch):
    require_space(tmp_path, 1, "the conversion")
    monkeypatch.setattr(module.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 5 * 2**20})())
    require_space(tmp_path, 5 * 2**20, "the conversion")
    with pytest.raises(LowvramError, match=r"the conversion needs 6\.0 MiB of disk, found 5\.0 MiB free"):
        require_space(tmp_path, 6 * 2**20, "the conversion")


def test_the_journal_is_whole_after_every_step(target, monkeypatch):
    """Whoever reads it at any moment reads JSON: it is replaced, never written over."""
    seen, replace = [], module.os.replace

    def watch(source, destination):
        journal = target.with_name(".out.partial") / "state" / "journal.json"
        seen.append(json.loads(journal.read_text()) if journal.exists() else None)
        replace(source, destination)

    monkeypatch.setattr(module.os, "replace", watch)
    with building(target, IDENTITY) as partial:
        for name in "abc":
            partial.save_json(f"{name}.json", {})
    assert len(seen) >= 6
    assert [len(known["files"]) for known in seen if known] == sorted(len(known["files"]) for known in seen if known)


def test_partial_directories_of_two_targets_do_not_meet(tmp_path):
    with building(tmp_path / "a", IDENTITY) as one, building(tmp_path / "b", IDENTITY) as two:
        one.save_json("x.json", {"of": "a"})
        assert not two.finished("x.json")
    assert isinstance(one, PartialDirectory)
    assert one.path != two.path


NOT_IN_PLACE = {
    "a link to an empty directory": lambda t: ((t.parent / "big").mkdir(), t.symlink_to(t.parent / "big")),
    "a link to nothing": lambda t: t.symlink_to(t.parent / "nowhere"),
}


@pytest.mark.parametrize("how", NOT_IN_PLACE)
def test_a_link_is_followed_or_refused_before_any_work(target, how):
    NOT_IN_PLACE[how](target)
    try:
        with building(target, IDENTITY) as partial:
            partial.save_json("x.json", {})
            partial.publish()
    except LowvramError as error:
        assert str(target) in str(error)
        assert not target.with_name(".out.partial").exists()
    else:
        assert [file.name for file in target.iterdir()] == ["x.json"]


def test_a_place_that_nothing_can_be_renamed_to_is_refused_before_any_work(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(LowvramError, match="found the current directory"):
        refuse_occupied(Path("."))
    with pytest.raises(LowvramError, match="found a mount point"), building(Path("/"), IDENTITY):
        raise AssertionError("never reached")
    assert [path.name for path in tmp_path.rglob("*")] == ["here"]


def test_if_the_rename_fails_the_work_is_kept(target, monkeypatch):
    """The target may be a mount point, on another disk, or have been made by someone else meanwhile."""

    replace = module.os.replace

    def refuse(source, destination):
        if Path(destination) == target:
            raise OSError(errno.EBUSY, "Device or resource busy")
        replace(source, destination)

    with pytest.raises(LowvramError, match="busy"), building(target, IDENTITY) as partial:
        partial.save_tensors("one.safetensors", shard())
        monkeypatch.setattr(module.os, "replace", refuse)
        partial.publish()
    monkeypatch.undo()
    with building(target, IDENTITY) as partial:
        assert partial.finished("one.safetensors")


PARTS = {
    "one": [{"a": seeded(3, 4), "b": seeded(5)}],
    "several, one of them empty": [{"a": seeded(3, 4)}, {}, {"b": seeded(5), "c.d": seeded(2, 2, seed=1)}, {}],
    "only empty ones": [{}, {}],
    "none": [],
    "many dtypes": [
        {str(dtype): seeded(2, 3).to(dtype)}
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.int32, torch.int64, torch.uint8)
    ],
    "a bool, and no values": [{"bool": torch.tensor([True, False, True])}, {"nothing": torch.zeros(0, 4)}],
    "a number": [{"scalar": torch.tensor(3.5)}, {"int": torch.tensor(7)}],
    "odd sizes": [
        {"a": torch.arange(3, dtype=torch.int8), "b": seeded(1, dtype=torch.bfloat16)},
        {"c": torch.arange(5), "d": torch.arange(1, dtype=torch.uint8)},
        {"e": seeded(3, seed=2), "f": seeded(7, dtype=torch.float16)},
    ],
    "long names": [{f"{'model.' * 40}{n}.weight": seeded(n + 1, seed=n)} for n in range(20)],
}


@pytest.mark.parametrize("case", PARTS)
def test_joined_files_hold_the_tensors_of_all(tmp_path, case):
    parts = [tmp_path / f"{index}.safetensors" for index in range(len(PARTS[case]))]
    for part, tensors in zip(parts, PARTS[case], strict=True):
        save_file(tensors, part, {"format": "pt"} if tensors else None)
    join_safetensors(parts, tmp_path / "joined.safetensors")
    expected = {name: tensor for part in parts for name, tensor in load_file(part).items()}
    found = load_file(tmp_path / "joined.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(found[name], tensor)
    with safe_open(tmp_path / "joined.safetensors", "pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    held = sum(tensor.nbytes for tensor in expected.values())
    assert (tmp_path / "joined.safetensors").stat().st_size - held < 400 * (len(expected) + 1)


def test_a_joined_file_counts_as_finished(target):
    with building(target, IDENTITY) as partial:
        partial.save_tensors("state/one.safetensors", {"a": seeded(3)})
        partial.save_tensors("state/two.safetensors", {"b": seeded(4)})
        partial.save_joined("both.safetensors", ["state/one.safetensors", "state/two.safetensors"])
        assert partial.finished("both.safetensors")
        assert partial.load_tensors("both.safetensors").keys() == {"a", "b"}
        assert partial.sha256("both.safetensors") == sha256_file(partial.path / "both.safetensors")
        partial.publish()
    assert [file.name for file in target.iterdir()] == ["both.safetensors"]
    assert (target / "both.safetensors").stat().st_mode & 0o777 == 0o644


def test_a_part_that_is_gone_is_said_and_what_was_made_is_kept(target):
    with (
        pytest.raises(LowvramError, match="cannot write .*both.safetensors.tmp"),
        building(target, IDENTITY) as partial,
    ):
        partial.save_tensors("state/one.safetensors", {"a": seeded(3)})
        partial.save_joined("both.safetensors", ["state/one.safetensors", "state/two.safetensors"])
    with building(target, IDENTITY) as partial:
        assert partial.finished("state/one.safetensors")
        assert not partial.finished("both.safetensors")
