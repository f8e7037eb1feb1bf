"""Over 500 random chats of several processes no byte is above the budget, ever, and nothing wrong comes back."""

import random
import types
from dataclasses import replace

import pytest
import torch

from lowvram_lab.engine.kv_cache import PreallocatedCache
from lowvram_lab.engine.load import load
from lowvram_lab.engine.loaded import loaded
from lowvram_lab.memory.cuda import open_gpu
from lowvram_lab.model.plan import Plan
from lowvram_lab.model.rules import BLOCK_TOKENS
from lowvram_lab.model.spec import ModelSpec
from lowvram_lab.prefixes import block_file
from lowvram_lab.prefixes.folder import INDEX_ROOM
from lowvram_lab.prefixes.keys import chain
from lowvram_lab.prefixes.store import Remembered
from tests.helpers.tiny import DictCheckpoint, random_state, tiny_config

SESSIONS = 500
SALTS = ("", "one", "other")
SMALL = {"num_hidden_layers": 1, "hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}


class KilledError(BaseException):
    """Stands for the end of a process."""


@pytest.fixture(scope="module")
def model():
    spec = ModelSpec.from_config(tiny_config("llama", **SMALL), "small-llama")
    plan = replace(Plan.uniform(spec, context=1024), remember=1 << 20)
    return load(plan, open_gpu(), checkpoint=DictCheckpoint(random_state(spec)), progress=False)


class Watched:
    """Measures the folder before and after each rename, when it holds most; now and then the process ends there."""

    def __init__(self, monkeypatch, folder, draw):
        self.folder, self.draw, self.most, self.killed, self.deadly = folder, draw, 0, 0, 0.0
        self._rename = block_file.os.replace
        monkeypatch.setattr(block_file.os, "replace", self.replace)

    def measure(self):
        found = sum(file.stat().st_size for file in self.folder.iterdir())
        self.most = max(self.most, found)
        return found

    def replace(self, source, target):
        self.measure()
        if self.draw.random() < self.deadly:
            self.killed += 1
            left = source.with_name(source.name.replace(".partial", "0.partial"))
            self._rename(source, left)  # where whoever tidies up does not find it
            raise KilledError
        self._rename(source, target)
        self.measure()


def fill(cache, keys):
    """Writes into a cache what depends on each block's key alone."""
    for key in keys:
        seed = int(key.text[:12], 16)
        for layer in cache.held:
            for view in layer.span(key.start, key.start + BLOCK_TOKENS).values():
                view.copy_(torch.randn(view.shape, generator=torch.Generator().manual_seed(seed)))
    cache.holds(len(keys) * BLOCK_TOKENS)


def bits(cache, tokens):
    return [view.contiguous().view(torch.int16) for layer in cache.held for view in layer.span(0, tokens).values()]


def same(cache, keys):
    """Whether a cache holds what ``fill`` would have written."""
    other = types.SimpleNamespace(held=[_like(layer) for layer in cache.held], holds=lambda tokens: None)
    fill(other, keys)
    tokens = len(keys) * BLOCK_TOKENS
    return all(torch.equal(a, b) for a, b in zip(bits(cache, tokens), bits(other, tokens), strict=True))


def _like(layer):
    """A layer of the same shapes, empty."""
    spare = {name: torch.zeros_like(tensor) for name, tensor in layer.tensors().items()}
    span = lambda start, end: {name: tensor[:, :, start:end] for name, tensor in spare.items()}  # noqa: E731
    return types.SimpleNamespace(span=span)


def prompts(draw):
    """Prompts of 1 to 5 blocks that share beginnings."""
    beginnings = [[draw.randrange(1000) for _ in range(5 * BLOCK_TOKENS)] for _ in range(4)]
    while True:
        ids, shared = list(draw.choice(beginnings)), draw.randrange(6)
        ids[shared * BLOCK_TOKENS :] = [draw.randrange(1000) for _ in range((5 - shared) * BLOCK_TOKENS)]
        yield ids[: draw.randint(1, 5) * BLOCK_TOKENS + draw.randrange(2)] + [1]


def test_500_random_chats_stay_within_their_budgets(model, tmp_path, monkeypatch):
    draw, folder, hits = random.Random(5), tmp_path / "prefixes", 0
    folder.mkdir(mode=0o700)
    watched, cache, block = Watched(monkeypatch, folder, draw), PreallocatedCache(model, 1024), None
    questions = prompts(draw)
    for session in range(SESSIONS):
        plan = loaded(model).plan
        block = block or plan.block_bytes + 2500
        budget = draw.choice([draw.randint(block, 4 * block), draw.randint(4 * block, 30 * block)])
        ram = draw.choice([None, draw.randint(plan.block_bytes, 6 * plan.block_bytes)])
        loaded(model).plan = replace(plan, remember=budget, remember_ram=ram)
        store = Remembered(model, cache, draw.choice(SALTS), folder)
        before, watched.most = watched.measure(), 0
        watched.deadly, ended = draw.choice([0, 0, 0.2]), True
        for ids in (next(questions) for _ in range(draw.randint(1, 3))):
            keys = chain(store.root, ids)
            cache.keep(0)
            try:
                held = store.restore(cache, ids)
                hits += held > 0
                assert same(cache, keys[: held // BLOCK_TOKENS])
                fill(cache, keys)
                store.keep(cache, ids[: len(keys) * BLOCK_TOKENS], draw.random())
            except KilledError:
                ended = False
                break
            watched.measure()
            assert (ram or 0) >= sum(key.name in store._slots for key in keys) * plan.block_bytes
            assert (ram or 0) >= store._slots._room.nbytes
        # a folder that held more, of an earlier chat with a larger budget, only ever gets smaller
        assert watched.most <= max(budget, before), session
        assert watched.measure() <= (budget if ended else max(budget, before)), session
    assert hits > SESSIONS / 4
    assert watched.killed > 10
    assert {file.suffix for file in folder.iterdir()} <= {".safetensors", ".json", ".partial", ""}


def test_ram_slots_give_up_leaves_first_and_keep_what_is_there(model, tmp_path):
    draw, cache = random.Random(6), PreallocatedCache(model, 1024)
    plan = loaded(model).plan
    loaded(model).plan = replace(plan, remember=None, remember_ram=7 * plan.block_bytes)
    store, questions, hits = Remembered(model, cache), prompts(draw), 0
    for _ in range(300):
        ids = next(questions)
        keys = chain(store.root, ids)
        cache.keep(0)
        held = store.restore(cache, ids)
        hits += held > 0
        assert same(cache, keys[: held // BLOCK_TOKENS])
        fill(cache, keys)
        assert store.keep(cache, ids[: len(keys) * BLOCK_TOKENS], draw.random())[0] == min(len(keys), 7)
        assert len(store._slots) <= 7
        names = {name.split("-")[0] for name in store._slots._at}
        parents = {name.split("-")[0] for name in store._slots._parents.values() if name}
        assert parents <= names, "a block stayed without the one that it follows"
    assert hits > 75


def test_the_index_never_takes_more_than_it_is_given(model, tmp_path):
    from lowvram_lab.prefixes.folder import INDEX, Folder

    folder = Folder(tmp_path / "prefixes", 1 << 30)
    names = [f"{at:032x}-{at:016x}" for at in range(300)]
    for name in names:
        folder.file(name).touch()
    folder.used({name: 1 / 3 * 1e-300 for name in names})
    folder.pin(names)
    assert 2 * (folder.path / INDEX).stat().st_size <= INDEX_ROOM * (len(names) + 1)
