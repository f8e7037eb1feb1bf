"""Processes that remember prompts, and are killed while they write. A test runs this in an interpreter of its own.

One that has loaded a tiny model forks them: each begins in a moment, and none shares a lock or an open file.
"""

import json
import os
import random
import resource
import signal
import sys
import time
from pathlib import Path

import torch

from lowvram_lab.decoding.lean import decoder_for
from lowvram_lab.prefixes.store import Remembered
from tests.helpers.tiny import random_ids
from tests.prefixes.test_bits import loaded_tiny

PROMPTS = 3
BLOCKS = 7
ROOM = 12
"""Blocks that there is room for: whoever writes also removes."""


class Prompts:
    """The prompts, what a model says behind each, and a folder in which they are remembered."""

    def __init__(self, kind, kv_format, folder):
        plan = loaded_tiny(kind, kv_format=kv_format, ram=None).lowvram.plan
        self.budget, self.folder = ROOM * (plan.block_bytes + 3000), folder
        self.model = loaded_tiny(kind, kv_format=kv_format, ram=None, disk=self.budget)
        self.decoder = decoder_for(self.model, 1024, progress=False)
        self.ids = [random_ids(BLOCKS * 128 + 5, seed=at)[0].tolist() for at in range(PROMPTS)]
        self.ids[1][:300] = self.ids[0][:300]
        self.cold = [self.read(ids, 0) for ids in self.ids]

    def store(self):
        return Remembered(self.model, self.decoder.cache, folder=self.folder)

    def read(self, ids, start):
        """Logits behind a prompt whose first tokens the cache holds."""
        self.decoder.cache.keep(start)
        return self.decoder.prefill(torch.tensor([ids[start:]])).clone()

    def keep(self, order, store=None):
        """Reads prompts and remembers them; returns how many blocks."""
        store, kept = store or self.store(), 0
        for at in order:
            self.read(self.ids[at], 0)
            kept += store.keep(self.decoder.cache, self.ids[at][: BLOCKS * 128], 0.01 * (1 + at))[0]
        return kept

    def wrong(self):
        """How many prompts are answered in other bits from what is remembered, and how many tokens were put back."""
        store, wrong, restored = self.store(), 0, 0
        for ids, cold in zip(self.ids, self.cold, strict=True):
            self.decoder.cache.keep(0)
            start = store.restore(self.decoder.cache, ids)
            wrong += not torch.equal(self.read(ids, start).view(torch.int16), cold.view(torch.int16))
            restored += start
        store.note_uses()  # as a chat does behind an answer; whoever holds the lock removes leftovers
        return wrong, restored

    def left(self):
        return len(list(self.folder.glob(".*.partial")))

    def bytes(self):
        return sum(file.stat().st_size for file in self.folder.iterdir())


def forked(call):
    """Runs a call in a process of its own; returns its id, and where its result can be read once it has ended."""
    readable, writable = os.pipe()
    if child := os.fork():
        os.close(writable)
        return child, readable
    status = 1
    try:
        os.close(readable)
        os.write(writable, json.dumps(call()).encode())
        status = 0
    finally:
        os._exit(status)


def result(child, readable):
    """What a process returned; an error where it did not end well."""
    _, status = os.waitpid(child, 0)
    with open(readable, "rb") as file:
        found = file.read()
    if status:
        raise RuntimeError(f"a process ended with {status}")
    return json.loads(found)


def slow_rename(began=lambda: None):
    """Widens the moment between a file that is written under a temporary name and its rename."""
    rename = os.replace

    def slow(*names):
        began()
        time.sleep(0.02)
        rename(*names)

    os.replace = slow


def writes_for_ever(prompts, seed, began):
    """Until it is killed."""
    slow_rename(lambda: os.write(began, b"."))
    draw, store = random.Random(seed), prompts.store()
    while True:
        prompts.keep([draw.randrange(PROMPTS)], store)


def killed(prompts, kills):
    """Kills so many writers; after each, what others find, and what a next writer leaves."""
    draw, found = random.Random(0), {"kills": 0, "left": 0, "wrong": 0, "restored": 0, "over": 0, "not removed": 0}
    for seed in range(kills):
        began, begins = os.pipe()
        child, readable = forked(lambda seed=seed, begins=begins: writes_for_ever(prompts, seed, begins))
        os.read(began, 1)  # however long it takes to begin
        time.sleep(draw.uniform(0, 0.3))
        os.kill(child, signal.SIGKILL)
        found["kills"] += os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
        for end in (readable, began, begins):
            os.close(end)
        found["left"] += prompts.left()
        found["over"] += prompts.bytes() > prompts.budget
        wrong, restored = result(*forked(prompts.wrong))
        found["wrong"] += wrong
        found["restored"] += restored
        result(*forked(lambda: prompts.keep([0])))
        found["not removed"] += prompts.left()
    return found


def at_once(prompts):
    """Two processes that remember the same prompts at the same time."""
    both = [forked(lambda: slow_rename() or prompts.keep([0, 1])) for _ in range(2)]
    kept = [result(*one) for one in both]
    names = {file.name for file in prompts.folder.glob("*.safetensors")}
    return {"kept": kept, "files": len(names), "wrong": prompts.wrong(), "left": prompts.left()}


def on_a_full_disk(prompts):
    """What is remembered where no file may grow over some bytes."""

    def call():
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
        return [prompts.keep([0]), prompts.wrong()]

    kept, wrong = result(*forked(call))
    return {
        "kept": kept,
        "wrong": wrong,
        "files": len(list(prompts.folder.glob("*.safetensors"))),
        "left": prompts.left(),
    }


def main():
    """``folder kind kv_format kills``; says in JSON what was found."""
    folder, kind, kv_format, kills = sys.argv[2:]
    prompts = Prompts(kind, kv_format, Path(folder) / "full")
    with prompts.model.lowvram.gpu.unmetered():  # in a fraction of the time
        found = {"full": on_a_full_disk(prompts)}
        prompts.folder = Path(folder) / "at once"
        found["at once"] = at_once(prompts)
        prompts.folder = Path(folder) / "killed"
        prompts.folder.mkdir(mode=0o700)
        found["killed"] = killed(prompts, int(kills))
    print(json.dumps(found))
