"""Files that are damaged at random: every answer is the cold one, in every bit, and the next answer mends them."""

import random
from types import SimpleNamespace

import pytest
import torch

from lowvram_lab.decoding.lean import decoder_for
from lowvram_lab.engine.loaded import loaded
from lowvram_lab.prefixes.block_file import IDS, data_of, read
from lowvram_lab.prefixes.folder import Folder
from lowvram_lab.prefixes.store import Remembered
from tests.helpers.tiny import random_ids
from tests.prefixes.test_bits import loaded_tiny

BLOCKS = 3
PAGE = 4096


def flip(data, draw, begin=0, end=None):
    at = draw.randrange(begin, len(data) if end is None else end)
    return data[:at] + bytes([data[at] ^ 1 << draw.randrange(8)]) + data[at + 1 :]


def header_end(data):
    return 8 + int.from_bytes(data[:8], "little")


def zero_page(data, draw):
    at = draw.randrange(0, len(data), PAGE)
    return data[:at] + bytes(len(data[at : at + PAGE])) + data[at + PAGE :]


def noise(data, draw):
    at = draw.randrange(len(data))
    return (data[:at] + draw.randbytes(draw.randint(1, 300)) + data[at + 300 :])[: len(data)]


WAYS = {
    "a bit of the length": lambda data, draw, _: flip(data, draw, 0, 8),
    "a bit of the header": lambda data, draw, _: flip(data, draw, 8, header_end(data)),
    "a bit of the tensors": lambda data, draw, _: flip(data, draw, header_end(data)),
    "bytes of noise": lambda data, draw, _: noise(data, draw),
    "cut short": lambda data, draw, _: data[: draw.randrange(len(data))],
    "a page of zeros": lambda data, draw, _: zero_page(data, draw),
    "longer": lambda data, draw, _: data + draw.randbytes(draw.randint(1, 5000)),
    "bytes left out": lambda data, draw, _: data[: draw.randrange(len(data) - 100)] + data[-100:],
    "another block": lambda data, draw, made: draw.choice([d for d in made.whole.values() if d != data]),
    "of another root": lambda data, draw, made: draw.choice(made.foreign),
    "an older file": lambda data, draw, _: data.replace(b'"block":"128"', b'"block":"64"  '),
}


def remember(model, folder, ids, salt=""):
    """A prompt, read and remembered."""
    decoder = decoder_for(model, 1024, progress=False)
    logits = decoder.prefill(torch.tensor([ids])).clone()
    store = Remembered(model, decoder.cache, salt, folder)
    assert store.keep(decoder.cache, ids[: BLOCKS * 128], 0.1)[0] == BLOCKS
    files = {file: file.read_bytes() for file in sorted(folder.glob("*.safetensors"))}
    return SimpleNamespace(decoder=decoder, store=store, logits=logits, whole=files)


def damage(made, draw, way):
    """Damages a file; or exchanges two."""
    file = draw.choice(list(made.whole))
    data = WAYS[way](made.whole[file], draw, made)
    file.write_bytes(data)
    return data != made.whole[file]


def check(made, ids):
    """Reads the prompt from what is there, and remembers it; whether all of it was put back."""
    decoder, store = made.decoder, made.store
    decoder.cache.keep(0)
    start = store.restore(decoder.cache, ids)
    missed = store.missed
    logits = decoder.prefill(torch.tensor([ids[start:]]))
    assert torch.equal(logits.view(torch.int16), made.logits.view(torch.int16))
    assert store.keep(decoder.cache, ids[: BLOCKS * 128], 0.1)[0] == BLOCKS
    assert (missed is None) == (start == BLOCKS * 128)
    if missed:
        assert missed.token == start
        assert missed.reason
        assert "\n" not in missed.reason
    return missed is None


@pytest.mark.parametrize(
    ("kind", "kv_format", "times"), [("llama", "bf16", 200), ("qwen2", "int8", 33), ("qwen2", "int4", 33)]
)
def test_no_damage_changes_an_answer(kind, kv_format, times, tmp_path):
    ids, draw, changed = random_ids(BLOCKS * 128 + 3)[0].tolist(), random.Random(times), 0
    model = loaded_tiny(kind, kv_format=kv_format, ram=None)
    foreign = remember(model, tmp_path / "foreign", ids, salt="another")
    made = remember(model, tmp_path / "prefixes", ids)
    made.foreign = list(foreign.whole.values())
    with loaded(model).gpu.unmetered():
        for at in range(times):
            way = list(WAYS)[at % len(WAYS)]
            is_damaged = damage(made, draw, way)
            changed += is_damaged
            assert check(made, ids) != is_damaged, way
            assert check(made, ids), f"{way}: not mended"
    assert changed > 0.9 * times


def test_exchanged_files_are_known_by_name(tmp_path):
    """Each is whole by itself, and of the same root."""
    ids = random_ids(BLOCKS * 128 + 3)[0].tolist()
    made = remember(loaded_tiny("llama", ram=None), tmp_path / "prefixes", ids)
    (one, first), (other, second), *_ = made.whole.items()
    one.write_bytes(second)
    other.write_bytes(first)
    assert made.store.find(ids).missed.reason.startswith("text: it is of another block")
    assert not check(made, ids)
    assert check(made, ids)  # both are mended, though the second was not looked for


def test_what_was_written_for_other_ids_is_not_believed(tmp_path):
    """A file that is whole and says that it is this block's, and holds another's tokens."""
    ids = random_ids(BLOCKS * 128 + 3)[0].tolist()
    made = remember(loaded_tiny("llama", ram=None), tmp_path / "prefixes", ids)
    for file in made.whole:
        tensors, facts = read(file, made.store._wanted)
        file.write_bytes(data_of({**tensors, IDS: tensors[IDS].flip(0).contiguous()}, facts))
    found = made.store.find(ids)
    assert (found.places, found.missed.reason) == ((), "it holds another text than it says")


@pytest.mark.parametrize("fact", ["block", "start", "parent", "root", "text", "root.engine", "root.rope"])
@pytest.mark.parametrize("value", ["64", None])
def test_a_whole_file_of_another_version_is_a_miss_that_names_it(fact, value, tmp_path):
    """It says something else of itself, or nothing, under a name that is this block's."""
    ids = random_ids(BLOCKS * 128 + 3)[0].tolist()
    made = remember(loaded_tiny("llama", ram=None), tmp_path / "prefixes", ids)
    for file in made.whole:
        tensors, facts = read(file, made.store._wanted)
        others = {name: text for name, text in facts.items() if name != fact}
        file.write_bytes(data_of(tensors, others | ({} if value is None else {fact: value})))
    found = made.store.find(ids)
    assert found.places == ()
    assert found.missed.reason.startswith(f"{fact.removeprefix('root.')}: ")
    assert not check(made, ids)
    assert check(made, ids)


@pytest.mark.parametrize("seconds", ["nan", "inf", "-1", "", "a while", "1e999"])
def test_seconds_that_are_none_are_no_reason_to_fail(seconds, tmp_path):
    ids = random_ids(BLOCKS * 128 + 3)[0].tolist()
    made = remember(loaded_tiny("llama", ram=None), tmp_path / "prefixes", ids)
    for file in made.whole:
        tensors, facts = read(file, made.store._wanted)
        file.write_bytes(data_of(tensors, {**facts, "seconds": seconds}))
    assert check(made, ids)
    assert {entry.seconds for entry in Folder(tmp_path / "prefixes").entries()} == {0.0}


def test_no_memory_to_copy_a_block_out_is_one_warning(tmp_path, monkeypatch, caplog):
    ids = random_ids(BLOCKS * 128 + 3)[0].tolist()
    model = loaded_tiny("llama", ram=BLOCKS * loaded_tiny("llama").lowvram.plan.block_bytes)
    decoder = decoder_for(model, 1024, progress=False)
    decoder.prefill(torch.tensor([ids]))
    store = Remembered(model, decoder.cache, folder=tmp_path / "prefixes")
    take, calls = store._layout.take, []

    def full_at_the_third(layout, cache, start, into, gpu):
        calls.append(start)
        if len(calls) == 3:
            next(iter(into.values())).fill_(1)  # half of it is written
            raise torch.OutOfMemoryError("full")
        take(cache, start, into, gpu)

    monkeypatch.setattr(type(store._layout), "take", full_at_the_third)
    assert store.keep(decoder.cache, ids[: BLOCKS * 128], 0.1)[0] == 2
    assert len(caplog.messages) == 1
    assert store.find(ids).places == ("RAM", "RAM")
    assert store.keep(decoder.cache, ids[: BLOCKS * 128], 0.1)[0] == BLOCKS
    assert store.find(ids).places == ("RAM",) * BLOCKS  # no slot was lost
    before = [view.clone() for layer in decoder.cache.held for view in layer.span(0, BLOCKS * 128).values()]
    decoder.cache.keep(0)
    assert store.restore(decoder.cache, ids) == BLOCKS * 128
    after = [view for layer in decoder.cache.held for view in layer.span(0, BLOCKS * 128).values()]
    assert all(torch.equal(a.view(torch.int16), b.view(torch.int16)) for a, b in zip(before, after, strict=True))
