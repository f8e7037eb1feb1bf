"""Safetensors reading: what is accepted, what is refused and how the refusal reads. No network, no pickles opened."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lowvram_lab.errors import CheckpointError, SourceError
from lowvram_lab.model.checkpoint import Checkpoint

WEIGHTS = {
    "model.embed_tokens.weight": torch.randn(16, 8).to(torch.bfloat16),
    "model.norm.weight": torch.ones(8),
    "scalar": torch.tensor(3, dtype=torch.int64),
    "empty": torch.zeros(0, 4, dtype=torch.float16),
}


@pytest.fixture
def single(tmp_path):
    save_file(WEIGHTS, tmp_path / "model.safetensors")
    return tmp_path


@pytest.fixture
def sharded(tmp_path):
    shards = {"model-00001-of-00002.safetensors": ["model.embed_tokens.weight"]}
    shards["model-00002-of-00002.safetensors"] = [name for name in WEIGHTS if name != "model.embed_tokens.weight"]
    for file, names in shards.items():
        save_file({name: WEIGHTS[name] for name in names}, tmp_path / file)
    write_index(tmp_path, {name: file for file, names in shards.items() for name in names})
    return tmp_path


def write_index(directory, weight_map):
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def one_line(error) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("kind", ["single", "sharded"])
def test_reads_every_tensor(kind, request):
    checkpoint = Checkpoint(request.getfixturevalue(kind))
    assert sorted(checkpoint.keys()) == sorted(WEIGHTS)
    assert "model.norm.weight" in checkpoint
    assert "nope" not in checkpoint
    for name, expected in WEIGHTS.items():
        found = checkpoint.read(name)
        assert checkpoint.shape(name) == tuple(expected.shape) == tuple(found.shape)
        assert checkpoint.dtype(name) == expected.dtype == found.dtype
        assert torch.equal(found, expected)


def test_a_tensor_is_private_to_its_reader(single):
    checkpoint = Checkpoint(single)
    checkpoint.read("model.norm.weight").add_(1)
    assert torch.equal(checkpoint.read("model.norm.weight"), WEIGHTS["model.norm.weight"])


def test_pages_are_given_back(tmp_path):
    status = Path("/proc/self/status")
    if not status.exists() or "RssFile" not in status.read_text():
        pytest.skip("needs RssFile in /proc/self/status")

    def rss_mib():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return sum(int(lines[key].split()[0]) for key in ("RssAnon", "RssFile")) / 1024

    save_file({f"w{i}": torch.randn(16, 1024, 256) for i in range(6)}, tmp_path / "model.safetensors")  # 16 MiB each
    checkpoint = Checkpoint(tmp_path)
    checkpoint.read("w0").sum()
    before = rss_mib()
    for name in checkpoint:
        checkpoint.read(name).sum()
    assert rss_mib() - before < 24  # one open handle would hold all 96 MiB


@pytest.mark.parametrize("cut", [0, 1, 7, 8, 9, 60, "header", "header+1", "last"])
def test_truncated_at(single, cut):
    file = single / "model.safetensors"
    data = file.read_bytes()
    header_end = 8 + int.from_bytes(data[:8], "little")
    end = {"header": header_end, "header+1": header_end + 1, "last": len(data) - 1}.get(cut, cut)
    file.write_bytes(data[:end])
    with pytest.raises(CheckpointError, match="damaged or truncated") as error:
        Checkpoint(single)
    assert str(file) in one_line(error)


def test_trailing_bytes_and_noise(single):
    file = single / "model.safetensors"
    file.write_bytes(file.read_bytes() + b"more")
    with pytest.raises(CheckpointError, match="damaged"):
        Checkpoint(single)
    file.write_bytes(bytes(range(256)) * 4)
    with pytest.raises(CheckpointError, match="damaged"):
        Checkpoint(single)


def test_damaged_after_opening_names_file_and_tensor(single):
    checkpoint = Checkpoint(single)
    file = single / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot read tensor model\.norm\.weight"):
        checkpoint.read("model.norm.weight")
    file.unlink()
    with pytest.raises(CheckpointError, match=r"cannot read tensor model\.norm\.weight"):
        checkpoint.read("model.norm.weight")


def test_unknown_tensor(single):
    checkpoint = Checkpoint(single)
    for call in (checkpoint.read, checkpoint.shape, checkpoint.dtype):
        with pytest.raises(CheckpointError, match="no tensor named lm_head"):
            call("lm_head.weight")


def test_one_file_counts_before_an_index(sharded):
    save_file({"a": torch.ones(2)}, sharded / "model.safetensors")
    assert Checkpoint(sharded).keys() == ["a"]
    (sharded / "model.safetensors.index.json").write_text("{")  # not even read
    assert Checkpoint(sharded).keys() == ["a"]


def test_shards_without_an_index_are_counted_by_their_names(sharded):
    (sharded / "model.safetensors.index.json").unlink()
    assert len(Checkpoint(sharded)) == len(WEIGHTS)
    (sharded / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"2 shards by their names, missing model-00001-of-00002\.safetensors"):
        Checkpoint(sharded)


def test_one_file_a_training_process_is_refused(single):
    save_file({"a": torch.ones(2)}, single / "shard-00001-model-00001-of-00002.safetensors")
    with pytest.raises(CheckpointError, match="one file a training process"):
        Checkpoint(single)


def test_renamed(sharded):
    checkpoint = Checkpoint(sharded)
    names = {"norm": "model.norm.weight", "again": "model.norm.weight", "embed": "model.embed_tokens.weight"}
    renamed = checkpoint.renamed(names, ("scalar",))
    assert renamed.keys() == ["embed", "norm", "again"]  # as they lie on disk
    assert "model.norm.weight" not in renamed and renamed.unknown == ("scalar",)
    for new, old in names.items():
        assert torch.equal(renamed.read(new), WEIGHTS[old])
        assert (renamed.shape(new), renamed.dtype(new)) == (checkpoint.shape(old), checkpoint.dtype(old))
    assert torch.equal(renamed.renamed({"last": "norm"}).read("last"), WEIGHTS["model.norm.weight"])
    assert renamed.same_values("norm", "again") and len(checkpoint) == len(WEIGHTS)


def test_same_values(tmp_path, monkeypatch):
    monkeypatch.setattr("lowvram_lab.model.checkpoint._TILE_ELEMENTS", 4)
    table = torch.randn(3, 3).to(torch.bfloat16)
    last = table.clone()
    last[2, 2] += 1
    tensors = {
        "table": table,
        "copy": table.clone(),
        "wide": table.double(),
        "last": last,
        "flat": table.flatten().clone(),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    assert [name for name in tensors if checkpoint.same_values("table", name)] == ["table", "copy", "wide"]
    assert not checkpoint.same_values("wide", "last")
    save_file({**tensors, "copy": last.clone()}, tmp_path / "model.safetensors")  # a file of the same size
    assert not Checkpoint(tmp_path).same_values("table", "copy")


def test_missing_shard(sharded):
    (sharded / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"missing model-00002-of-00002\.safetensors"):
        Checkpoint(sharded)


def test_index_that_disagrees_with_its_shards(sharded):
    index = json.loads((sharded / "model.safetensors.index.json").read_text())["weight_map"]
    write_index(sharded, {**index, "model.layers.9.weight": "model-00001-of-00002.safetensors"})
    with pytest.raises(CheckpointError, match=r"places model\.layers\.9\.weight"):
        Checkpoint(sharded)


@pytest.mark.parametrize("weight_map", [{"a": "../model.safetensors"}, {"a": "/etc/passwd"}, {"a": 3}, {}])
def test_index_reads_nothing_outside_its_directory(tmp_path, weight_map):
    write_index(tmp_path, weight_map)
    with pytest.raises(CheckpointError, match="plain file names"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": []}}'])
def test_broken_index(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match="weight_map"):
        Checkpoint(tmp_path)


def test_name_in_two_files(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "one.safetensors")
    save_file({"a": torch.ones(2)}, tmp_path / "two.safetensors")
    with pytest.raises(CheckpointError, match=r"a is held by both one\.safetensors and two\.safetensors"):
        Checkpoint(tmp_path)


def test_name_twice_in_one_header(tmp_path):
    entry = b'"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
    header = b"{" + entry + b"," + entry + b"}"
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(CheckpointError, match="a appears twice"):
        Checkpoint(tmp_path)


def test_pickles_are_refused_unopened(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("a pickle was opened",))

    for name in ("pytorch_model.bin", "consolidated.pth"):
        (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(SourceError, match=r"consolidated\.pth, pytorch_model\.bin.*runs whatever code") as error:
        Checkpoint(tmp_path)
    one_line(error)


def test_no_weights_and_no_directory(tmp_path):
    with pytest.raises(CheckpointError, match="found nothing"):
        Checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="found nothing"):
        Checkpoint(tmp_path / "absent")


def test_a_config_without_weights_says_what_works_so(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no weights: expected .*safetensors, found config.json") as error:
        Checkpoint(tmp_path)
    assert f"lowvram forecast {tmp_path} and lowvram plan {tmp_path} --gpu SIZE work without" in str(error.value)
    one_line(error)


def test_git_lfs_pointer(tmp_path):
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(CheckpointError, match="git lfs pull"):
        Checkpoint(tmp_path)
