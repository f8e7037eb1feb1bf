"""Quantised weights read as plain ones: rows of a table against the whole of it, and what stays in RAM meanwhile."""

import os
from pathlib import Path

import pytest
import torch

from lowvram_lab.conversion.convert import convert
from lowvram_lab.model.checkpoint import Checkpoint
from lowvram_lab.model.plan import Plan
from lowvram_lab.model.source import find_source
from lowvram_lab.slimming.rewritten import Changed, Rewritten
from lowvram_lab.weights.layerwise import LayerByLayer
from lowvram_lab.weights.restored import Restored, RestoredLayers
from tests.helpers.checkpoints import write_model

TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"
SELECTED = [slice(5, 40), torch.tensor([7, 0, 7, 91])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("restored") / "tiny", "llama")


def rounding(folder: Path, fmt: str) -> RestoredLayers:
    spec = find_source(str(folder)).spec("tiny")
    return RestoredLayers(spec, Checkpoint(folder), Plan.uniform(spec, fmt, context=64))


def converted(folder: Path, fmt: str) -> RestoredLayers:
    output, spec = folder.with_name(f"converted-{fmt}"), find_source(str(folder)).spec("tiny")
    if not output.exists():
        convert(str(folder), output, Plan.uniform(spec, fmt, context=64), solver="rtn", progress=False)
    made = find_source(str(output))
    return RestoredLayers(made.spec("tiny"), Checkpoint(output))


@pytest.mark.parametrize("select", SELECTED, ids=["slice", "tokens"])
@pytest.mark.parametrize("fmt", ["int8", "int4"])
@pytest.mark.parametrize("made", [rounding, converted])
def test_rows_are_those_of_the_whole_table(folder, made, fmt, select):
    stream = made(folder, fmt)
    for name in (TABLE, HEAD):
        if name in stream.checkpoint:
            assert torch.equal(stream.rows(name)(select), stream.checkpoint.read(name)[select])


def mapped(folder: Path) -> bool:
    return str(folder) in Path("/proc/self/maps").read_text()


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="a system that does not list what is mapped")
def test_a_large_table_stays_mapped_no_longer_than_its_rows_are_used(folder, monkeypatch):
    monkeypatch.setattr("lowvram_lab.model.checkpoint.STAYS_MAPPED", 0)
    streams = [
        LayerByLayer(find_source(str(folder)).spec("tiny"), Checkpoint(folder)),
        rounding(folder, "int8"),
    ]
    for stream in streams:
        del stream.norm  # a parameter of the file's own
        look_up = stream.rows(TABLE)
        for select in SELECTED:
            used = look_up(select)
            del used
            assert not mapped(folder)
    held = Checkpoint(folder).read(TABLE)
    assert mapped(folder)  # the list does tell
    del held


def test_of_what_is_written_anew_a_changed_table_is_made_once(folder):
    calls = []

    def double(value: torch.Tensor) -> torch.Tensor:
        calls.append(value.shape)
        return 2 * value

    checkpoint = Checkpoint(folder)
    look_up = Rewritten(checkpoint, changed={TABLE: Changed(checkpoint.shape(TABLE), double)}).rows(TABLE)
    for select in SELECTED:
        assert torch.equal(look_up(select), 2 * checkpoint.read(TABLE)[select])
    assert len(calls) == 1
    assert torch.equal(Rewritten(checkpoint).rows(TABLE)(SELECTED[0]), checkpoint.read(TABLE)[SELECTED[0]])


def test_a_name_is_quantised_or_not(folder):
    restored = rounding(folder, "int8").checkpoint
    assert isinstance(restored, Restored)
    assert restored.quantized(TABLE) and not restored.quantized("model.norm.weight")
