"""Hidden states in a file go through a layer as those in RAM do."""

import pytest
import torch

from lowvram_lab.errors import LowvramError
from lowvram_lab.weights.layerwise import LayerByLayer
from lowvram_lab.weights.states_on_disk import StatesOnDisk
from tests.helpers.tiny import TINY, DictCheckpoint, random_ids, tiny_spec, tiny_state

IDS = random_ids(300, batch=5)
"""Five windows: three fit into a forward pass, two are left."""


@torch.no_grad()
@pytest.mark.parametrize("kind", TINY)
def test_layers_do_to_states_on_disk_what_they_do_in_ram(kind, tmp_path):
    stream = LayerByLayer(tiny_spec(kind), DictCheckpoint(tiny_state(kind)))
    in_ram = stream.embed(IDS)
    on_disk = StatesOnDisk(in_ram, tmp_path / "states")
    for index in range(len(stream)):
        with stream.layer(index) as layer:
            stream.run_in_place(layer, in_ram)
            on_disk.run(stream, layer)
    assert torch.equal(on_disk.read(), in_ram)
    assert on_disk.tokens == IDS.numel()


@pytest.mark.parametrize(("at_once", "shapes"), [(None, [3, 2]), (1, [1] * 5), (4, [4, 1]), (9, [5])])
def test_windows_are_those_of_a_pass_or_so_many(tmp_path, at_once, shapes):
    states = torch.randn(5, 300, 8)
    found = list(StatesOnDisk(states, tmp_path / "states").windows(at_once))
    assert [len(windows) for windows in found] == shapes
    assert torch.equal(torch.cat(found), states)


def test_what_is_written_to_a_window_is_in_the_file_and_nowhere_else(tmp_path):
    states = torch.zeros(3, 300, 8)
    on_disk = StatesOnDisk(states, tmp_path / "states")
    for windows in on_disk.windows(1):
        windows.add_(1)
    assert bool((on_disk.read() == 1).all())
    assert bool((states == 0).all())
    assert (tmp_path / "states").stat().st_size == states.nbytes


def test_what_cannot_be_written_is_one_line(tmp_path):
    with pytest.raises(LowvramError, match="cannot write .*; make room") as caught:
        StatesOnDisk(torch.zeros(1, 2, 3), tmp_path / "none" / "states")
    assert "\n" not in str(caught.value)
