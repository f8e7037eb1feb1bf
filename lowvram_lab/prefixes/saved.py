"""A whole cache in a file, with what its owner says of it: a conversation that goes on after a restart.

Unlike a block it holds tokens that were decoded, and so belongs to one conversation. It goes on to the bit as if its
process had never ended.

Derived in: notebooks/10_remember.ipynb
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch

from lowvram_lab.engine.kv_cache import PreallocatedCache
from lowvram_lab.engine.loaded import loaded
from lowvram_lab.errors import BudgetError, LowvramError
from lowvram_lab.prefixes import block_file
from lowvram_lab.prefixes.block_file import IDS, UnusableError
from lowvram_lab.prefixes.keys import root_of
from lowvram_lab.prefixes.store import FIELD, fields_of

KIND = "conversation"
SAID = "said"
"""Name of what is said of the cache among the tensors, as JSON: a header has no room for a long conversation."""

ALIKE = ("pieces", "threads", "processor", "card", "salt")
"""Fields of the root that may be others: they move last bits, and a conversation has no other to be equal to."""


def save_cache(path: Path, model: torch.nn.Module, cache: PreallocatedCache, ids: list[int], said: dict) -> int:
    """Writes a cache and what is said of it, whole or not at all; nobody else may read the file.

    Args:
        path: Where.
        model: From ``load``.
        cache: Of the model, for one sequence.
        ids: Of what it holds, ``cache.get_seq_length()`` tokens.
        said: Plain data.

    Returns:
        Bytes of the file.

    Raises:
        LowvramError: It cannot be written, or the cache holds another number of tokens.
    """
    if os.path.isdir(path):
        raise LowvramError(f"cannot write {path}: it is a folder; give the name of a file")
    if len(ids) != (held := cache.get_seq_length()):
        raise LowvramError(f"expected ids of the {held} tokens that the cache holds, found {len(ids)}")
    text = bytearray(json.dumps(said).encode())
    gpu = loaded(model).gpu
    tensors = {IDS: torch.tensor(ids, dtype=torch.int32), SAID: torch.frombuffer(text, dtype=torch.uint8)}
    with gpu.active():
        for name, view in _views(cache, len(ids)).items():
            tensors[name] = gpu.move(view.contiguous(), "cpu")
    root = root_of(model)
    facts = {FIELD + name: value for name, value in root.fields.items()}
    facts |= {"kind": KIND, "tokens": str(len(ids)), "said_bytes": str(len(text)), "model": loaded(model).plan.model}
    data = block_file.data_of(tensors, facts)
    try:
        block_file.write(path, data)
    except OSError as error:
        raise LowvramError(
            f"cannot write {path}: {error.strerror}; choose a folder that exists and is writable"
        ) from error
    return len(data)


def said_of(path: Path) -> dict:
    """What was said of a saved cache, of any model, once all of the file has been checked.

    Raises:
        LowvramError: The file is no such file, or damaged.
    """
    _facts(path)
    try:
        said = json.loads(block_file.read_one(path, SAID, torch.uint8).numpy().tobytes())
    except UnusableError as error:
        raise LowvramError(f"{path}: {error}") from error
    except (ValueError, RecursionError) as error:
        raise LowvramError(f"{path}: expected a saved conversation, found a damaged one") from error
    if not isinstance(said, dict):
        raise LowvramError(f"{path}: expected a saved conversation, found one of another version")
    return said


def put_cache(path: Path, model: torch.nn.Module, cache: PreallocatedCache) -> list[int]:
    """Puts a saved cache back, once all of it has been checked.

    Args:
        path: From ``save_cache``.
        model: From ``load``.
        cache: Of the model, empty.

    Returns:
        Ids of what it holds now.

    Raises:
        LowvramError: It is damaged, or was saved by another model, plan or version, which is named.
        BudgetError: The cache has no room for it.
    """
    facts, gpu = _facts(path), loaded(model).gpu
    then, now = fields_of(facts), root_of(model)
    again = "load it with read_again=True, which reads the conversation anew"
    if difference := now.difference({**then, **{name: now.fields[name] for name in ALIKE}}):
        raise LowvramError(f"{path}: saved from {facts['model']} where other things held ({difference}); {again}")
    tokens = int(facts["tokens"])
    if tokens > cache.max_tokens:
        raise BudgetError(f"{path}: holds {tokens} tokens, the plan a context of {cache.max_tokens}; plan for more")
    views = _views(cache, tokens)
    wanted = {name: (view.dtype, tuple(view.shape)) for name, view in views.items()}
    wanted |= {IDS: (torch.int32, (tokens,)), SAID: (torch.uint8, (int(facts["said_bytes"]),))}
    try:
        tensors, _ = block_file.read(path, wanted)
    except UnusableError as error:
        raise LowvramError(f"{path}: {error}; {again}") from error
    with gpu.active():
        for name, view in views.items():
            view.copy_(gpu.move(tensors[name], gpu.meter.place_of(view)))
    cache.holds(tokens)
    return tensors[IDS].tolist()


def _views(cache: PreallocatedCache, tokens: int) -> dict[str, torch.Tensor]:
    """All that a cache keeps of its first tokens, by layer and name."""
    return {
        f"{index}.{name}": view
        for index, layer in enumerate(cache.held)
        for name, view in layer.beginning(tokens).items()
    }


def _facts(path: Path) -> dict[str, str]:
    try:
        facts = block_file.facts_of(path)
    except UnusableError as error:
        raise LowvramError(f"{path}: expected a saved conversation: {error}") from error
    if facts.get("kind") != KIND:
        raise LowvramError(f"{path}: expected a saved conversation, found another file")
    if "model" not in facts or not all(facts.get(name, "").isdecimal() for name in ("tokens", "said_bytes")):
        raise LowvramError(f"{path}: expected a saved conversation, found one of another version")
    return facts
