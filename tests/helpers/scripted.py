"""A decoder without a model: logits are said beforehand, token by token, and what it is fed is kept."""


class Cache:
    """Which tokens it holds, and by which planes."""

    def __init__(self, room: int):
        self.held, self.room = [], room

    def get_seq_length(self) -> int:
        return len(self.held)

    def keep(self, tokens: int) -> None:
        del self.held[tokens:]

    @property
    def forgettable(self) -> int:
        return self.room - len(self.held)


class ScriptedDecoder:
    """Logits depend on the last token alone.

    Args:
        both: ``(vocab, vocab)``: those of both planes after each token.
        high: Of the high planes, perhaps of the first tokens of the vocabulary only where they draft.
        fast: Of the high planes where they decode; by default ``high``.
        room: Tokens that its cache holds.
        seconds: What a pass takes, of ``"draft"`` and of so many tokens.
    """

    most_tokens = 8

    def __init__(self, both, high, room=10**6, seconds=lambda what: 1.0, fast=None):
        self.fast = high if fast is None else fast
        self.both, self.high, self.cache, self.seconds = both, high, Cache(room), seconds
        self.now, self.passes = 0.0, []

    def clock(self) -> float:
        return self.now

    def prefill(self, ids):
        self.cache.held += [(token, "both") for token in ids[0].tolist()]
        return self.both[ids[0, -1:]]

    def draft(self, token):
        return self._pass("draft", token[0].tolist(), "high", self.high)

    def decode_fast(self, token):
        return self._pass("fast", token[0].tolist(), "high", self.fast)

    def decode_several(self, tokens):
        return self._pass(tokens.shape[1], tokens[0].tolist(), "both", self.both)

    def _pass(self, what, tokens, planes, logits):
        assert len(tokens) <= min(self.cache.forgettable, self.most_tokens)
        self.now += self.seconds(what)
        self.passes.append(what)
        self.cache.held += [(token, planes) for token in tokens]
        return logits[tokens]


class Always:
    """A pace at which one kind drafts, or the other, always as much as it may."""

    def __init__(self, *kinds, most=3):
        self.kinds, self.most, self.wants_one = kinds, most, False
        self.clock = lambda: 0.0
        self.took = self.learns = self.gave = self.decided = self.came_of = lambda *args: None
        self.asks_margins = lambda kind, rate: kind is None

    def length(self, kind, available):
        return (min(self.most, available), 1.0) if kind in self.kinds else (0, 0.0)

    def further(self, available):
        return min(self.most, available) - 1 if available else None

    def is_due(self, kind):
        return False


def interrupting(method, at: int):
    """A method whose call of that number, from 1 on, is interrupted at the worst moment: when it is all written."""
    left = [at]

    def interrupted(tokens):
        found = method(tokens)
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return found

    return interrupted
