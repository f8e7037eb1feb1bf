"""What a model remembers of prompts: whole blocks of keys and values, looked for in RAM and then on disk.

Warm and cold answers are equal to the bit by construction: a prompt is read in blocks at fixed places whether or not
anything is remembered, so a block's keys and values depend on the tokens up to its end and on the root alone, and what
is put back is what reading would write. A block is checked whole before any of it reaches the cache; where anything is
not as it should be, its tokens are read, and ``missed`` says why.

Derived in: notebooks/10_remember.ipynb
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lowvram_lab.engine.kv_cache import PreallocatedCache
from lowvram_lab.engine.loaded import loaded
from lowvram_lab.errors import LowvramError, UnitError
from lowvram_lab.model.plan import Plan
from lowvram_lab.model.rules import BLOCK_TOKENS
from lowvram_lab.prefixes import block_file
from lowvram_lab.prefixes.block_file import IDS, IDS_DTYPE, UnusableError, data_of, ids_in
from lowvram_lab.prefixes.folder import Folder, seconds_of
from lowvram_lab.prefixes.keys import Key, Root, answer_key, chain, name_of, root_of, settings
from lowvram_lab.prefixes.layout import Layout
from lowvram_lab.prefixes.ram import OWNER, Slots
from lowvram_lab.units import parse_bytes

logger = logging.getLogger(__name__)

AHEAD = 2
"""Blocks that are read and checked while one before them is copied."""

RAM, DISK = "RAM", "disk"
"""Where a block is found."""

BLOCK, ANSWER = "block", "answer"
"""Kinds of files."""

FIELD = "root."
"""What the names of the root's fields begin with in a file."""


@dataclass(frozen=True)
class Remember:
    """What a chat is to remember of its prompts.

    Attributes:
        disk: Most bytes on disk, as ``"2GiB"``; ``None`` for nothing, or what the plan says.
        ram: The same in RAM, until the chat ends or the model is planned anew.
        salt: A secret; what one salt wrote, another neither finds nor recognises.
        folder: Where on disk; by default ``prefixes`` in the cache folder.
    """

    disk: str | int | None = None
    ram: str | int | None = None
    salt: str = ""
    folder: Path | None = None

    @classmethod
    def of(cls, wanted: Remember | str | int | None) -> Remember:
        """From a size on disk, too."""
        return wanted if isinstance(wanted, cls) else cls(wanted)

    def wanted(self, plan: Plan) -> Plan:
        """A plan that remembers as much as is said here; what is not said, as it was planned.

        Raises:
            UnitError: A size cannot be read.
            PlanError: No block fits in one.
        """
        said = {"remember": self.disk, "remember_ram": self.ram}
        return replace(plan, **{name: _size(name, size) for name, size in said.items() if size is not None})


def _size(name: str, size: str | int) -> int:
    """Bytes of a size that is given as an argument of this name."""
    try:
        return parse_bytes(size)
    except UnitError as error:
        raise UnitError(f"{name}: {error}") from error


@dataclass(frozen=True)
class Missed:
    """Why a prompt's tokens are read from some place on.

    Attributes:
        token: That place.
        reason: In words.
        differs_at: The first token that is another than in what is remembered, where that is the reason.
    """

    token: int
    reason: str
    differs_at: int | None = None


@dataclass(frozen=True)
class Found:
    """How much of a prompt is remembered.

    Attributes:
        tokens: Of the prompt.
        places: Of each block that is there, ``"RAM"`` or ``"disk"``, in order.
        missed: Why no more of it is; ``None`` where all of it is that could be.
    """

    tokens: int
    places: tuple[str, ...]
    missed: Missed | None

    @property
    def hit_tokens(self) -> int:
        """Tokens that need not be read."""
        return len(self.places) * BLOCK_TOKENS


class Remembered:
    """The blocks that a loaded model can use, and adds to.

    Args:
        model: From ``load``.
        cache: A cache of the model's, for one sequence.
        salt: A secret; what one salt wrote, another does not find.
        folder: Where on disk; by default in the cache folder.
        progress: Show that files of weights are hashed.
        plan: What says how many bytes; by default the model's.

    Raises:
        LowvramError: The folder cannot be used.

    Attributes:
        root: See ``root_of``.
        folder: Where blocks are on disk; ``None`` where they are in RAM alone.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        cache: PreallocatedCache,
        salt: str = "",
        folder: Path | None = None,
        progress: bool = False,
        plan: Plan | None = None,
    ):
        if cache.held[0].shape.batch != 1:
            raise LowvramError(f"expected a KV cache of one sequence, found {cache.held[0].shape.batch}")
        state = loaded(model)
        self._model, self._gpu, self._plan = model, state.gpu, plan or state.plan
        self._salt, self._progress = salt, progress
        self.root: Root = root_of(model, salt, progress, self._plan)
        self._layout = Layout.of(cache)
        self._slots = Slots(self._gpu, self._layout, self._plan.remembered_ram_bytes)
        self.folder = Folder(folder, self._plan.remember) if self._plan.remember is not None else None
        self._wanted = {part.name: (part.dtype, part.shape) for part in self._layout.parts}
        self._wanted[IDS] = (IDS_DTYPE, (BLOCK_TOKENS,))
        self._missing: tuple[Key, str] | None = None
        self._saves: dict[str, float] = {}  # seconds, of each block of the latest prompt that was put back
        self._uses: dict[str, float] = {}  # that are not noted yet: it takes longer than putting a block back
        self._doubted = False  # whether a file could not be used: others may be as it is

    @property
    def keeps_in_ram(self) -> bool:
        """Whether there is room for blocks in RAM."""
        return self._plan.remembered_ram_bytes > 0

    @property
    def missed(self) -> Missed | None:
        """Why the latest prompt was not found any further; ``None`` where it was, or none was looked for.

        Blocks with other tokens are not looked into: that would take a turn of a chat longer than is known before.
        """
        return self._missing and self._why(*self._missing, looks_into=False)

    def restore(self, cache: PreallocatedCache, ids: Sequence[int], start: int = 0) -> int:
        """Puts back what is remembered of a prompt, block by block, behind the tokens that the cache holds.

        Args:
            cache: Holds the first ``start`` tokens of the prompt.
            ids: The prompt. At least its last token is left to be read.
            start: A multiple of 128.

        Returns:
            How many tokens of the prompt the cache holds now; where this is interrupted, ``start``. That blocks were
            used is noted with the next that are kept, or by ``note_uses``.
        """
        self._missing, self._saves, held = None, {}, start
        self._refresh()
        try:
            keys = chain(self.root, ids[:-1])[start // BLOCK_TOKENS :]
            with (
                self._gpu.active(),
                self._gpu.meter.scope(owner=OWNER, category="kv"),
                self._looking_ahead(keys) as blocks,
            ):
                for key, block in zip(keys, blocks, strict=True):
                    try:
                        tensors, _, seconds = block()
                        self._layout.put(tensors, cache, held, self._gpu)
                    except (UnusableError, torch.OutOfMemoryError) as error:
                        self._missing = key, str(error)  # looking for the exact reason takes longer than a token may
                        break
                    held += BLOCK_TOKENS
                    cache.holds(held)
                    self._uses[key.name] = self._saves[key.name] = seconds
        except BaseException:  # Ctrl-C: who asked does not know of what was put there
            cache.keep(start)
            raise
        return held

    @contextmanager
    def _looking_ahead(self, keys: list[Key]) -> Iterator[Iterator[Callable[[], tuple]]]:
        """For each key a call of ``_find``; the next two are read and checked by other threads meanwhile."""
        with ThreadPoolExecutor(AHEAD) as pool:
            begun = deque(pool.submit(self._find, key) for key in keys[:AHEAD])

            def calls() -> Iterator[Callable[[], tuple]]:
                for following in [*keys[AHEAD:], *[None] * AHEAD][: len(keys)]:
                    if following:
                        begun.append(pool.submit(self._find, following))
                    yield begun.popleft().result

            try:
                yield calls()
            finally:
                pool.shutdown(cancel_futures=True)

    def find(self, ids: Sequence[int]) -> Found:
        """Says how much of a prompt ``restore`` would put back, and why no more."""
        self._refresh()
        places = []
        for key in chain(self.root, ids[:-1]):
            try:
                places.append(self._find(key)[1])
            except UnusableError as error:
                return Found(len(ids), tuple(places), self._why(key, str(error)))
        return Found(len(ids), tuple(places), None)

    def _refresh(self) -> None:
        """Notices what was set since the root was last made, as a number of threads."""
        if any(self.root.fields[name] != now for name, now in settings(self._model, self._plan).items()):
            self.root = root_of(self._model, self._salt, self._progress, self._plan)

    def keep(self, cache: PreallocatedCache, ids: Sequence[int], seconds: float) -> tuple[int, int]:
        """Remembers the blocks of a prompt that a cache holds, as far as there is room.

        Args:
            cache: Its first tokens are these, read in blocks from the first on.
            ids: The tokens of whole blocks.
            seconds: What reading a block took.

        Returns:
            How many blocks are remembered now of these, and how many of them were not before.
        """
        keys, count, to_ram, on_disk = chain(self.root, ids), 0, {}, {}
        self.note_uses()
        kept, to_disk = {key.name for key in keys}, self.folder is not None
        try:
            with self._gpu.active(), self._gpu.meter.scope(owner=OWNER, category="kv"):
                for key in keys:
                    saves = self._saves.get(key.name, seconds)
                    in_ram = self._keep_in_ram(cache, key, saves, kept, to_ram)
                    # behind one that is not there no block on disk can be found
                    to_disk = to_disk and self._keep_on_disk(cache, key, saves, kept, on_disk)
                    if not in_ram and not to_disk:
                        break
                    count += 1
        except (torch.OutOfMemoryError, MemoryError):
            logger.warning("what was read is not remembered: no memory is left to copy it")
        self._slots.used(to_ram)
        if self.folder is not None:
            self.folder.used(on_disk)
        self._doubted = False
        return count, len((to_ram.keys() | on_disk.keys()) - self._saves.keys())

    def _keep_in_ram(
        self, cache: PreallocatedCache, key: Key, seconds: float, kept: set[str], added: dict[str, float]
    ) -> bool:
        """Whether a block is there now; where it was not before, its name is added, and the seconds that it saves."""
        if key.name in self._slots:
            return True
        parent = key.parent and name_of(key.parent, key.root)
        if there := self._slots.put(key.name, parent, kept, self._filler(cache, key)):
            added[key.name] = seconds
        return there

    def _keep_on_disk(
        self, cache: PreallocatedCache, key: Key, seconds: float, kept: set[str], added: dict[str, float]
    ) -> bool:
        """See ``_keep_in_ram``; a file that cannot be used is replaced."""
        anew = self.folder.has(key.name)
        if anew and not (self._doubted and not self._is_usable(key)):
            return True
        if there := self.folder.write(key.name, self._data(cache, key, seconds), kept, anew):
            added[key.name] = seconds
        return there

    def answer(self, ids: Sequence[int]) -> list[int]:
        """What was once answered greedily to a prompt, perhaps by other weights: to be verified."""
        if self.folder is None:
            return []
        name = answer_key(self.root, ids).name
        try:
            tensors, said = block_file.read_all(self.folder.file(name))
        except UnusableError:
            return []
        if (ids := ids_in(tensors)) is None:
            return []
        self._uses[name] = seconds_of(said)
        return ids

    def keep_answer(self, ids: Sequence[int], tokens: Sequence[int], seconds: float) -> None:
        """Remembers what was answered greedily to a prompt, where there is room on disk; in the place of another.

        Args:
            ids: The prompt.
            tokens: The answer.
            seconds: What it took.
        """
        if self.folder is None or not tokens:
            return
        if self.answer(ids)[: len(tokens)] == list(tokens):  # a longer one that begins so is worth more
            return
        key = answer_key(self.root, ids)
        data = data_of({IDS: torch.tensor(tokens, dtype=IDS_DTYPE)}, self._facts(key, ANSWER, seconds))
        if self.folder.write(key.name, data, (), anew=True):
            self._note({key.name: seconds})

    def _filler(self, cache: PreallocatedCache, key: Key):
        return lambda tensors: self._layout.take(cache, key.start, tensors, self._gpu)

    def _data(self, cache: PreallocatedCache, key: Key, seconds: float) -> bytes:
        """A block as a file."""
        if key.name in self._slots:
            tensors = self._slots.tensors(key.name)
        else:
            tensors = self._layout.views(torch.empty(self._layout.size, dtype=torch.uint8))
            self._layout.take(cache, key.start, tensors, self._gpu)
        ids = torch.tensor(key.ids, dtype=IDS_DTYPE)
        return data_of({**tensors, IDS: ids}, self._facts(key, BLOCK, seconds))

    def _facts(self, key: Key, kind: str, seconds: float) -> dict[str, str]:
        """What a file says of itself."""
        facts = {FIELD + name: value for name, value in self.root.fields.items()}
        return facts | {**self._said(key), "kind": kind, "seconds": f"{seconds:.6g}", "model": self._plan.model}

    def _find(self, key: Key) -> tuple[dict[str, torch.Tensor], str, float]:
        """A block's tensors, where they are, and what they save.

        Raises:
            UnusableError: They are not there, or not as they should be.
        """
        if key.name in self._slots:
            return self._slots.tensors(key.name), RAM, self._slots.seconds(key.name)
        if self.folder is None:
            raise UnusableError("not read before")
        try:
            return self._read(key)
        except UnusableError:
            self._doubted = self._doubted or self.folder.has(key.name)
            raise

    def _read(self, key: Key) -> tuple[dict[str, torch.Tensor], str, float]:
        """``_find`` on disk."""
        tensors, facts = self.folder.read(key.name, self._wanted)
        if difference := self.root.difference(fields_of(facts)):
            raise UnusableError(difference)
        said = self._said(key)
        if wrong := next((name for name, value in said.items() if facts.get(name) != value), None):
            raise UnusableError(f"{wrong}: it is of another block, as where files were renamed or exchanged")
        if tensors[IDS].tolist() != list(key.ids):
            raise UnusableError("it holds another text than it says")
        return tensors, DISK, seconds_of(facts)

    def _is_usable(self, key: Key) -> bool:
        """Whether what lies on disk in a block's place is that block."""
        try:
            self._read(key)
        except UnusableError:
            return False
        return True

    @staticmethod
    def _said(key: Key) -> dict[str, str]:
        """What a file says of the block that it holds."""
        said = {"text": key.text, "parent": key.parent, "root": key.root, "start": str(key.start)}
        return {**said, "block": str(BLOCK_TOKENS)}

    def note_uses(self) -> None:
        """Notes what was put back since it was last noted, by which is decided what is given up first."""
        uses, self._uses = self._uses, {}
        self._note(uses)

    def _note(self, seconds: dict[str, float]) -> None:
        """Notes which blocks were used or added."""
        self._slots.used(seconds)
        if self.folder is not None:
            self.folder.used(seconds)

    def _why(self, key: Key, reason: str, looks_into: bool = True) -> Missed:
        """Why a block is not found, as exactly as what else is on disk tells; to look into it takes long."""
        if self.folder is None or self.folder.has(key.name):
            return Missed(key.start, reason)
        entries = self.folder.entries()
        same_text = [self._checked(entry.name) for entry in entries if entry.facts.get("text") == key.text]
        nearest = min(filter(None, same_text), key=self.root.differences, default=self.root.fields)
        if difference := self.root.difference(nearest):
            return Missed(key.start, difference)
        of_root = [e for e in entries if e.facts.get("root") == key.root and e.facts.get("kind") == BLOCK]
        beside = [entry for entry in of_root if looks_into and entry.facts.get("parent") == key.parent]
        others = [found for entry in beside if (found := self._differs(entry.name, key)) is not None]
        if others:
            place = max(others)
            text = f"not read before: token {place} is another than in what is remembered"
            return Missed(key.start, text, place)
        if not of_root and any(self._differs_in_salt(fields_of(entry.facts)) for entry in entries):
            return Missed(key.start, "salt: what this model remembers is under another salt, or none")
        return Missed(key.start, "not read before")

    def _differs(self, name: str, key: Key) -> int | None:
        """The first place at which a remembered block has another token; ``None`` where it cannot be read."""
        try:
            ids = self.folder.read(name, self._wanted)[0][IDS].tolist()
        except UnusableError:
            return None
        return key.start + next((at for at, (a, b) in enumerate(zip(ids, key.ids, strict=True)) if a != b), len(ids))

    def _checked(self, name: str) -> dict[str, str]:
        """The root's fields as a file of any root says them; none where it is damaged."""
        try:
            return fields_of(block_file.read_all(self.folder.file(name))[1])
        except UnusableError:
            return {}

    def _differs_in_salt(self, fields: dict[str, str]) -> bool:
        return (self.root.difference({**fields, "salt": self.root.fields["salt"]}) is None) and bool(fields)


def fields_of(facts: dict[str, str]) -> dict[str, str]:
    """The root's fields as a file says them."""
    return {name.removeprefix(FIELD): value for name, value in facts.items() if name.startswith(FIELD)}
