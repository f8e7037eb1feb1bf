"""A whole cache in a file, with what its owner says of it: a conversation that goes on after a restart.

Unlike a block it holds tokens that were decoded, and so belongs to one conversation. It goes on to the bit as if its
process had never ended.

Derived in: notebooks/10_remember.ipynb
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from lowvram_lab.engine.kv_cache import PreallocatedCache
from lowvram_lab.engine.loaded import loaded
from lowvram_lab.errors import BudgetError, LowvramError, first_line
from lowvram_lab.model.rules import BLOCK_TOKENS
from lowvram_lab.prefixes import block_file
from lowvram_lab.prefixes.block_file import IDS, IDS_DTYPE, UnusableError, ids_in
from lowvram_lab.prefixes.keys import root_of
from lowvram_lab.prefixes.store import FIELD, fields_of

KIND = "conversation"
SAID = "said"
"""Name of what is said of the cache among the tensors, as JSON: a header has no room for a long conversation."""

ALIKE = ("pieces", "threads", "switches", "processor", "card", "salt")
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
    if "\0" in str(path):
        raise LowvramError(f"cannot write {str(path)!r}: no file is called that")
    if os.path.isdir(path):
        raise LowvramError(f"cannot write {path}: it is a folder; give the name of a file")
    if len(ids) != (held := cache.get_seq_length()):
        raise LowvramError(f"expected ids of the {held} tokens that the cache holds, found {len(ids)}")
    try:
        text = bytearray(json.dumps(said).encode())
    except (TypeError, ValueError) as error:
        raise LowvramError(f"expected a conversation of plain data, found another ({first_line(error)})") from error
    gpu = loaded(model).gpu
    tensors = {IDS: torch.tensor(ids, dtype=IDS_DTYPE), SAID: torch.frombuffer(text, dtype=torch.uint8)}
    with gpu.active():
        for name, view in _views(cache, len(ids)).items():
            tensors[name] = torch.empty(view.shape, dtype=view.dtype)
            for there, here in _in_spans(view, tensors[name]):
                here.copy_(gpu.move(there.contiguous(), "cpu"))
    root = root_of(model)
    facts = {FIELD + name: value for name, value in root.fields.items()}
    facts |= {"kind": KIND, "model": loaded(model).plan.model}
    data = block_file.data_of(tensors, facts)
    try:
        block_file.write(path, data)
    except OSError as error:
        raise LowvramError(
            f"cannot write {path}: {error.strerror}; choose a folder that exists and is writable"
        ) from error
    return len(data)


@dataclass(frozen=True)
class Saved:
    """A saved cache, mapped and checked whole.

    Attributes:
        path: Where it lies.
        said: What its owner said of it.
        facts: What its file says of it.
        tensors: Name → tensor, with the tokens' ids.
    """

    path: Path
    said: dict
    facts: dict[str, str]
    tensors: dict[str, torch.Tensor]


def opened(path: Path) -> Saved:
    """A saved cache of any model.

    Raises:
        LowvramError: The file is no such file, or damaged.
    """
    expected = f"{path}: expected a conversation that was saved (ChatSession.save), found"
    try:
        tensors, facts = block_file.read_all(Path(os.path.realpath(path)))  # a link of the user's own is followed
    except (UnusableError, ValueError) as error:
        raise LowvramError(f"{expected} a file that cannot be read as one ({error})") from error
    if facts.get("kind") != KIND:
        raise LowvramError(f"{expected} another file")
    said = tensors.pop(SAID, torch.empty(0, dtype=torch.uint8))
    try:
        values = json.loads(said.numpy().tobytes())
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict) or "model" not in facts or ids_in(tensors) is None:
        raise LowvramError(f"{expected} one of another version")
    return Saved(path, values, facts, tensors)


def put_cache(saved: Saved, model: torch.nn.Module, cache: PreallocatedCache) -> list[int]:
    """Puts a saved cache back.

    Args:
        saved: From ``opened``.
        model: From ``load``.
        cache: Of the model, empty.

    Returns:
        Ids of what it holds now.

    Raises:
        LowvramError: It was saved by another model, plan or version, which is named.
        BudgetError: The cache has no room for it.
    """
    check_saved(saved, model)
    gpu, ids = loaded(model).gpu, saved.tensors[IDS].tolist()
    if (tokens := len(ids)) > cache.max_tokens:
        raise BudgetError(
            f"{saved.path}: holds {tokens} tokens, the KV cache {cache.max_tokens}; give it room for more"
        )
    views = _views(cache, tokens)
    found = {name: (tensor.dtype, tensor.shape) for name, tensor in saved.tensors.items() if name != IDS}
    if found != {name: (view.dtype, view.shape) for name, view in views.items()}:
        raise LowvramError(f"{saved.path}: expected the KV cache of this plan, found tensors of other shapes")
    with gpu.active():
        for name, view in views.items():
            for here, there in _in_spans(view, saved.tensors[name]):
                here.copy_(gpu.move(there.contiguous(), gpu.meter.place_of(view)))
    cache.holds(tokens)
    return ids


def _in_spans(one: torch.Tensor, other: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Views of two tensors of one shape, of a few tokens at a time: a card may have no room for more beside them."""
    return zip(one.split(BLOCK_TOKENS, dim=2), other.split(BLOCK_TOKENS, dim=2), strict=True)


def check_saved(saved: Saved, model: torch.nn.Module) -> None:
    """Refuses what ``put_cache`` would refuse of another model, plan or version, before there is a cache.

    Raises:
        LowvramError: See ``put_cache``.
        BudgetError: The plan's context has no room for it.
    """
    then, now, plan = fields_of(saved.facts), root_of(model), loaded(model).plan
    if difference := now.difference({**then, **{name: now.fields[name] for name in ALIKE}}):
        again = "load it with read_again=True, which reads the conversation anew"
        found = f"saved from {saved.facts['model']} where other things held ({difference})"
        raise LowvramError(f"{saved.path}: {found}; {again}")
    if (tokens := len(saved.tensors[IDS])) > plan.context:
        raise BudgetError(f"{saved.path}: holds {tokens} tokens, the plan a context of {plan.context}; plan for more")


def _views(cache: PreallocatedCache, tokens: int) -> dict[str, torch.Tensor]:
    """All that a cache keeps of its first tokens, by layer and name."""
    return {
        f"{index}.{name}": view
        for index, layer in enumerate(cache.held)
        for name, view in layer.beginning(tokens).items()
    }
