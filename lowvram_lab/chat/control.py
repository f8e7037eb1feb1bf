"""Typed control tokens stay text: which tokens act as control tokens, and how their letters are read as letters."""

from __future__ import annotations

import functools
import json
import secrets
import string
from typing import TYPE_CHECKING, NamedTuple

from lowvram_lab.errors import SourceError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

END_OF_TURN_TOKENS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end|>", "<end_of_turn>", "</s>")
"""Checkpoints disagree on ``eos_token_id`` (Qwen1.5's chat and base models do): stop at any of these."""

_LETTER_MASKS = range(0x13000, 0x13400)  # hieroglyphs: letters without case or parts, for what may be part of a word
_OTHER_MASKS = range(0x100000, 0x101000)  # of the last plane for private use


class Found(NamedTuple):
    """A control token that a tokenizer read, and the characters that it read it from."""

    id: int
    start: int
    end: int


class ControlTokens:
    """The tokens of a tokenizer that act as control tokens.

    Those are the special ones, the well-known ends of a turn that the vocabulary has, and ``written``: added tokens
    that a chat template writes around roles by itself. Other added tokens (runs of spaces, HTML tags, an accent) are
    text.

    Args:
        tokenizer: Whose.
        written: Texts of the tokens that its template writes.

    Attributes:
        ids: Keyed by text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, written: frozenset[str] = frozenset()):
        self.tokenizer = tokenizer
        vocabulary = tokenizer.get_vocab()
        names = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        names |= {*tokenizer.all_special_tokens, *END_OF_TURN_TOKENS, *written}
        # A single character has no other spelling (where "!" is the token that pads, it is read as what it is), and
        # nobody types spaces to steer a model.
        names = {name for name in names if len(name) > 1 and not name.isspace()}
        self.ids = {name: vocabulary[name] for name in sorted(names) if name in vocabulary}
        self._names = {index: name for name, index in self.ids.items()}
        self._lowered = {name.lower() for name in self.ids}
        self._first = {name[0] for name in self._lowered}
        self._lengths = sorted({len(name) for name in self._lowered}, reverse=True)
        self._beginnings = {name[:end] for name in self._lowered for end in range(1, len(name))}
        self._ends = {name[start:] for name in self._lowered for start in range(1, len(name))}

    def read(self, text: str) -> tuple[list[int], list[Found]]:
        """Ids of a text as the tokenizer reads it, and the control tokens among them.

        An unknown letter is no control token, though its id is the one of ``<unk>``.
        """
        if not self.tokenizer.is_fast:
            ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            return ids, [Found(index, 0, 0) for index in ids if index in self._names]
        encoding = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids, found = encoding["input_ids"], []
        for index, (start, end) in zip(ids, encoding["offset_mapping"], strict=True):
            if index in self._names and not self._is_unknown(index, text[start:end]):
                found.append(Found(index, start, end))
        return ids, found

    def typed(self, text: str) -> set[int]:
        """Places of the letters of control tokens in a typed text, in any case of letters and however they overlap.

        A place too many does no harm: it is only read with more care.
        """
        places: set[int] = set()
        lowered = [letter.lower() for letter in text]
        for start, letter in enumerate(lowered):
            if letter in self._first:
                longest = (size for size in self._lengths if "".join(lowered[start : start + size]) in self._lowered)
                places.update(range(start, min(start + next(longest, 0), len(text))))
        for _, start, end in self.read(text)[1]:  # what a normaliser makes of it
            places.update(range(start, end))
        return {place for place in places if not text[place].isspace()}  # a template may trim it

    def completable(self, text: str) -> set[int]:
        """Places at the ends of a typed text, spaces aside, that letters before or after it may complete to a token."""
        inner = range(len(text) - len(text.lstrip()), len(text.rstrip()))
        if not inner or not self.ids:
            return set()
        longest, places = self._lengths[0] - 1, set()
        before = [letter.lower() for letter in text[inner.start : inner.stop][:longest]]
        after = [letter.lower() for letter in text[inner.start : inner.stop][-longest:]]
        if len(inner) <= longest and any("".join(before) in name for name in self._lowered):
            places.update(inner)
        for size in range(1, len(before) + 1):
            if "".join(after[-size:]) in self._beginnings:
                places.update(inner[-size:])
            if "".join(before[:size]) in self._ends:
                places.update(inner[:size])
        return {place for place in places if not text[place].isspace()}

    def written_ids(self, masked: str, mask: Mask) -> list[int]:
        """Ids of a rendered chat, in which only what is not masked is read as a control token.

        Args:
            masked: The chat, typed control tokens masked.
            mask: Takes the mask off.

        Raises:
            SourceError: The tokenizer makes a control token of them whatever is done.
        """
        text = mask.off(masked)
        _, written = self.read(masked)
        ids, found = self.read(text)
        if found == written:
            return ids
        return self.read_as_text(text, written)

    def read_as_text(self, text: str, written: list[Found]) -> list[int]:
        """Ids of a text in which only ``written`` are control tokens; every other letter is a letter.

        Raises:
            SourceError: The tokenizer makes control tokens of other letters all the same.
        """
        if not self.tokenizer.is_fast:
            raise self._unreadable()
        ids = self._twin.read(text, [(self._names[found.id], found) for found in written])
        unknown = self.tokenizer.unk_token_id
        if [i for i in ids if i in self._names and i != unknown] != [f.id for f in written if f.id != unknown]:
            raise self._unreadable()
        return ids

    @functools.cached_property
    def _twin(self) -> _Twin:
        try:
            return _Twin(self.tokenizer.backend_tokenizer, list(self.ids))
        except Exception as error:  # all that the tokenizers library raises, of parts in Python, say
            raise self._unreadable() from error

    def _is_unknown(self, index: int, text: str) -> bool:
        return index == self.tokenizer.unk_token_id and self._names[index].lower() not in text.lower()

    def _unreadable(self) -> SourceError:
        return SourceError(
            f"the text spells a control token of the model (one of {', '.join(list(self.ids)[:4])}, …), which its "
            "tokenizer cannot read as mere letters; leave it out, or write it with a space in between"
        )


class Mask:
    """Stand-ins for characters, one for one, that none of some texts holds; those of letters are letters.

    Args:
        texts: All that is to be masked.
    """

    def __init__(self, texts: list[str]):
        taken = set().union(*texts)
        self._of: dict[str, str] = {}
        self._letters = (chr(code) for code in _LETTER_MASKS if chr(code) not in taken)
        self._others = (chr(code) for code in _OTHER_MASKS if chr(code) not in taken)

    def on(self, text: str, places: set[int]) -> str:
        """A text with the characters at these places masked."""
        return "".join(self._masked(letter) if place in places else letter for place, letter in enumerate(text))

    def off(self, text: str) -> str:
        """A text as it was before."""
        return text.translate({ord(mask): letter for letter, mask in self._of.items()})

    def _masked(self, letter: str) -> str:
        if letter not in self._of:
            self._of[letter] = next(self._letters if letter.isalnum() or letter == "_" else self._others)
        return self._of[letter]


class _Twin:
    """A tokenizer's twin that knows its control tokens under secret names only.

    So one call over a whole text reads all of it: a control token stands where its secret name was put; the same
    letters anywhere else are text, and nothing is cut that the tokenizer would not cut (a cut shows: SentencePiece puts
    a space before every piece). Flags, normaliser and place in the vocabulary are those of the token.

    Args:
        tokenizer: From transformers' fast tokenizer.
        names: Its control tokens.
    """

    def __init__(self, tokenizer: Tokenizer, names: list[str]):
        from tokenizers import Tokenizer

        self._secret = {name: _secret_name(name) for name in names}
        values = json.loads(tokenizer.to_str())
        self._rename(values["model"])
        known = {token["content"] for token in values["added_tokens"]}
        added = [
            token | {"content": self._secret.get(token["content"], token["content"])}
            for token in values["added_tokens"]
        ]
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
        for name in names:  # the end of a turn that is in the vocabulary, and not added to it
            if name not in known:
                added.append({"id": tokenizer.token_to_id(name), "content": self._secret[name], **flags})
        values |= {"added_tokens": added, "post_processor": None, "truncation": None, "padding": None}
        self._tokenizer = Tokenizer.from_str(json.dumps(values))
        everything = {name: name for name in known} | self._secret
        self._id = {self._tokenizer.token_to_id(new): tokenizer.token_to_id(old) for old, new in everything.items()}

    def _rename(self, model: dict) -> None:
        """In the vocabulary too, from which a model may make them: Unigram reads any piece, BPE what merges give."""
        vocabulary, secret = model["vocab"], self._secret
        if isinstance(vocabulary, dict):
            model["vocab"] = {secret.get(piece, piece): index for piece, index in vocabulary.items()}
        else:
            model["vocab"] = [[secret.get(piece, piece), score] for piece, score in vocabulary]
        if model.get("unk_token") in secret:
            model["unk_token"] = secret[model["unk_token"]]
        if "merges" in model:
            pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
            model["merges"] = [pair for pair in pairs if not secret.keys() & {*pair, "".join(pair)}]

    def read(self, text: str, written: list[tuple[str, Found]]) -> list[int]:
        """Ids of a text; control tokens, by name, only where they were found."""
        pieces, last = [], 0
        for name, (_, start, end) in written:
            pieces += [text[last:start], self._in_secret(text[start:end], name)]
            last = end
        encoding = self._tokenizer.encode("".join([*pieces, text[last:]]), add_special_tokens=False)
        return [self._id.get(index, index) for index in encoding.ids]

    def _in_secret(self, found: str, name: str) -> str:
        """What was read as a token, which may be in other letters, and with the space around it where it takes that."""
        spelt = name if name in found else found.strip()
        return found.replace(spelt, self._secret[name], 1)


def _secret_name(name: str) -> str:
    """Ends as the name does, since neighbours look at that; small letters, which every normaliser leaves alone."""
    return name[0] + "".join(secrets.choice(string.ascii_lowercase) for _ in range(24)) + name[-1]
