"""Which tokens of a cache were read in whole blocks, and so may be remembered, and what a prompt can go on from.

A chat's cache goes on behind its own answers. Those were decoded, token by token, which gives other last bits than
reading them would: no block with such a token is remembered, nor any behind it. And where a prompt is not the going on
of all that the cache holds, it goes on from a whole block, as it would without a cache: what a chat answers depends on
what was said in it, never on what happens to be remembered.
"""

from __future__ import annotations

from dataclasses import dataclass

from lowvram_lab.engine.kv_cache import PreallocatedCache
from lowvram_lab.errors import LowvramError
from lowvram_lab.model.rules import BLOCK_TOKENS
from lowvram_lab.prefixes.keys import chain
from lowvram_lab.prefixes.store import Missed, Remembered


@dataclass(frozen=True)
class Reading:
    """What it took to read a prompt that is not answered.

    Attributes:
        tokens: Of the prompt, or of what all prompts have that begin so.
        cached_tokens: How many of them were still in the KV cache, or were put back there.
        remembered_tokens: How many were put back from what is remembered.
        blocks_added: Blocks of 128 tokens that are remembered now and were not before.
        blocks_without_room: Blocks that are not remembered: there is no room for them.
        seconds: All of it, with writing what is remembered.
    """

    tokens: int
    cached_tokens: int = 0
    remembered_tokens: int = 0
    blocks_added: int = 0
    blocks_without_room: int = 0
    seconds: float = 0.0


class Prompts:
    """The prompts of one chat, read and remembered.

    Args:
        store: What is remembered.

    Attributes:
        store: As given.
        restored: Tokens of the latest prompt that were put back.
    """

    def __init__(self, store: Remembered):
        self.store, self.restored = store, 0
        self._whole, self._kept = 0, 0  # tokens of blocks read whole, and how many of them are remembered
        self._looked_for: list[int] = []
        self._seconds = 0.0

    def reuse(self, cache: PreallocatedCache, held: list[int], ids: list[int], common: int) -> int:
        """Makes a cache hold as much of a prompt as it need not read; returns how many tokens that is.

        Args:
            cache: The cache.
            held: Ids of what it holds.
            ids: The prompt.
            common: How many of ``held`` it begins with, its last token left out.
        """
        self.restored = 0
        if common < len(held):
            common = min(common, self._whole) // BLOCK_TOKENS * BLOCK_TOKENS
        cache.keep(common)
        self._whole = min(self._whole, common // BLOCK_TOKENS * BLOCK_TOKENS)
        self._kept = min(self._kept, self._whole)
        if common != self._whole or self._looked_for == ids:
            return common
        self._looked_for = []  # until all of it was: it may be interrupted
        self._whole = self.store.restore(cache, ids, common)
        self._looked_for = list(ids)
        self.restored = self._whole - common
        if self._kept == common and not self.store.keeps_in_ram:  # what was on disk is kept in RAM, too
            self._kept = self._whole
        return self._whole

    def missed(self, ids: list[int]) -> Missed | None:
        """Why no more of a prompt was put back; ``None`` where all was that could be, or the cache held it."""
        return self.store.missed if self._looked_for == ids else None

    def forget_answers(self, cache: PreallocatedCache, held: list[int]) -> list[int]:
        """Lets a cache keep whole blocks alone, so that any prompt is read as it would be by itself; their ids."""
        cache.keep(self._whole)
        return held[: self._whole]

    def was_read(self, tokens: int, start: int, seconds: float) -> None:
        """Notes that a prompt of so many tokens has been read from ``start`` on."""
        whole = tokens // BLOCK_TOKENS * BLOCK_TOKENS
        if start == self._whole < whole:
            self._whole, self._seconds = whole, seconds * BLOCK_TOKENS / (tokens - start)

    def keep(self, cache: PreallocatedCache, held: list[int]) -> tuple[int, int]:
        """Remembers the whole blocks of what a cache holds.

        Args:
            cache: The cache.
            held: Ids of what it holds.

        Returns:
            How many blocks were added, and for how many there was no room.
        """
        whole = min(self._whole, len(held) // BLOCK_TOKENS * BLOCK_TOKENS)
        self._looked_for = []  # from here on there is more to be found
        if whole <= self._kept:
            self.store.note_uses()
            return 0, 0
        remembered, added = self.store.keep(cache, held[:whole], self._seconds)
        self._kept = whole
        return added, whole // BLOCK_TOKENS - remembered

    def pin(self, ids: list[int]) -> None:
        """Lets the blocks of a prompt stay on disk, as far as they are there, whatever else needs room.

        Raises:
            LowvramError: What is remembered is in RAM alone.
            OSError: It cannot be noted.
        """
        folder = self.store.folder
        if folder is None:
            raise LowvramError("prompts that stay are on disk, found some that are remembered in RAM alone; give disk")
        folder.pin([key.name for key in chain(self.store.root, ids) if folder.has(key.name)])
