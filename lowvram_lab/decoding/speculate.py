"""Draft cheaply, verify in one pass: the precise model's own tokens, sooner. Knows no tokenizer and no chat.

A pass over several tokens reads every weight once, as a pass over one does, so it takes little longer. Whoever guesses
the next tokens well gets them all from one pass: those that the precise model would have chosen itself are kept, and
the first that it would not is replaced by what it chooses. Two drafters guess, and whichever promises more tokens a
second is asked, or neither:

- the high plane of weights in two, which is half of what a token reads, with a head of the commonest tokens only;
- what followed the last few tokens when they were there before, which costs nothing.

Sampled, a guess is kept with the probability that leaves the precise model's distribution as it is.

Derived in: notebooks/08_precision_on_demand.ipynb
Source: Leviathan et al. 2023, arXiv:2211.17192 (verification, expected length); Saxena 2023, prompt lookup decoding.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F  # noqa: N812

from lowvram_lab.decoding.decision import BOTH_PLANES, GUESS_BY_N_GRAMS, GUESS_OF_HIGH_PLANE, Decision
from lowvram_lab.decoding.decode import Decoder
from lowvram_lab.sampling import Sampling, choose, distribution, likeliest

UNSURE = "the high plane, unsure"
"""The kind of a guess that is a token the high planes decoded by themselves without being sure of it."""

LONGEST_MATCH, SHORTEST_MATCH = 4, 2
"""Tokens of an n-gram that is looked for, the longest first."""

PRIOR = 6
"""Guesses that what is expected at first counts for."""

MEMORY = 48
"""Guesses of a kind after which older ones count for little: a text changes from copying to thinking."""

SHARE = 0.01
"""Of the time of all tokens that trying a draft again may lose."""

KEPT = 9
"""Latest timings of a pass, whose median counts."""

UNASKED, TRIED = 48, 3
"""Passes that verify all guesses, because that is faster, after which margins are asked again, and how often."""

REFRESH = 64
"""Tokens after which one is decoded by itself again, to know what drafts have to beat."""


@dataclass(frozen=True)
class Guess:
    """What a drafter proposes.

    Attributes:
        kind: Whose acceptance it adds to.
        tokens: The next tokens.
        chances: ``(tokens, vocab)``: what each was drawn from; ``None`` where it was not drawn.
    """

    kind: str
    tokens: list[int]
    chances: list[torch.Tensor] | None = None


@dataclass
class Drafting:
    """What drafting came to.

    Attributes:
        drafted: Tokens proposed, by kind of drafter.
        accepted: Of those, how many the precise model would have chosen.
        passes: Passes by both planes.
        tokens: Tokens they gave.
        decisions: How each token that was yielded was decided.
    """

    drafted: Counter = field(default_factory=Counter)
    accepted: Counter = field(default_factory=Counter)
    passes: int = 0
    tokens: int = 0
    decisions: list[Decision] = field(default_factory=list)

    @property
    def acceptance(self) -> float | None:
        """Share of the proposed tokens that were accepted; ``None`` where none was proposed."""
        drafted = sum(self.drafted.values())
        return sum(self.accepted.values()) / drafted if drafted else None


class NGrams:
    """What followed the last few tokens the last time they were there.

    Attributes:
        kinds: What it expects at first: the name of each length of match, and the share of tokens that come true.
    """

    kinds = {f"the {length} tokens before, seen again": 0.3 + 0.15 * length for length in (2, 3, 4)}

    def __init__(self):
        self._seen: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}

    def reads(self, ids: list[int]) -> None:
        """Looks at the text so far; what it knows of it already is not looked at again."""
        if ids[: len(self._seen)] != self._seen:
            self._seen, self._after = [], {}
        for end in range(max(len(self._seen), 1), len(ids)):  # what ends before ``end`` is followed by ``ids[end]``
            for length in range(SHORTEST_MATCH, min(LONGEST_MATCH, end) + 1):
                self._after[tuple(ids[end - length : end])] = end
        self._seen = list(ids)

    def guess(self, most: int) -> Guess | None:
        """The longest match's continuation, ``most`` tokens of it."""
        for length in range(min(LONGEST_MATCH, len(self._seen)), SHORTEST_MATCH - 1, -1):
            at = self._after.get(tuple(self._seen[-length:]))
            if at is not None:
                return Guess(list(self.kinds)[length - SHORTEST_MATCH], self._seen[at : at + most])
        return None


class HighPlane:
    """The model itself by its high planes, a token at a time.

    Args:
        decoder: Its cache is as before once the guess is made.
    """

    kinds = {"the high plane": 0.75}

    def __init__(self, decoder: Decoder):
        self._decoder = decoder

    def guess(self, text: list[int], most: int, sampling: Sampling, generator: torch.Generator | None) -> Guess:
        """What comes after ``text``, whose last token the cache does not hold yet; ``most`` tokens of it."""
        tokens, chances, cache = [], [], self._decoder.cache
        before = cache.get_seq_length()
        try:
            for _ in range(most):
                logits = self._decoder.draft(torch.tensor([[(tokens or text)[-1]]]))
                seen = seen_tokens(sampling, text + tokens, logits)
                if sampling.temperature > 0:
                    chances.append(distribution(logits, sampling, seen)[0])
                    token = torch.multinomial(chances[-1], 1, generator=generator)
                else:
                    token = choose(logits, sampling, seen=seen)
                tokens.append(int(token))
        finally:  # Ctrl-C too: what the high planes made of these tokens must not be taken for what both make
            cache.keep(before)
        return Guess(*self.kinds, tokens, chances or None)


class Pace:
    """How many tokens to draft by whom: learns what passes take and how often guesses come true.

    Args:
        most: Longest draft.
        clock: Seconds.

    Attributes:
        rate: Tokens a second where margins decide, the slowest pass left out, which may be a stall; 0 before any.
        honesty: Tokens that the high plane's guesses gave over those they promised, in which nothing between passes is.
    """

    def __init__(self, most: int, clock: Callable[[], float] = time.perf_counter):
        self.most, self.clock = most, clock
        self._seconds: dict[object, deque[float]] = defaultdict(lambda: deque(maxlen=KEPT))
        self._usual: dict[object, float] = {}  # the medians of these
        expected = HighPlane.kinds | NGrams.kinds | {UNSURE: 0.5}
        self._true = {kind: [PRIOR * share, PRIOR] for kind, share in expected.items()}
        self._tokens, self._due = 0, Counter()
        self._one_at = 0  # when a token was last decoded by itself
        self._decided: deque[tuple[int, float]] = deque(maxlen=MEMORY)
        self._given: deque[tuple[int, float]] = deque(maxlen=MEMORY)
        self.rate, self.honesty = 0.0, 1.0
        self._to_ask, self._asked, self._unasked = TRIED, 0, 0
        self._tried_at = -REFRESH  # when guesses behind an unsure token were last tried without promising anything

    def took(self, what: object, seconds: float) -> None:
        """Notes a pass: ``"draft"`` for one drafted token, or the number of tokens that were verified."""
        self._seconds[what].append(seconds)
        self._usual[what] = statistics.median(self._seconds[what])
        if what == 1:
            self._one_at = self._tokens

    @property
    def wants_one(self) -> bool:
        """Whether a token is to be decoded by itself, since what that takes is not known, or no more."""
        return 1 not in self._usual or self._tokens - self._one_at >= REFRESH

    def seconds(self, what: object) -> float:
        """What a pass takes; before it was timed, what one over a single token lets expect."""
        if what in self._usual:
            return self._usual[what]
        one = self._usual.get(1, 1.0)
        return 0.6 * one if what == "draft" else one * (1 + 0.06 * (what - 1))

    def learns(self, kind: str, proposed: int, accepted: int) -> None:
        """Notes how many of a guess's tokens came true, the first that did not ending the count."""
        judged = min(accepted + 1, proposed)
        self._true[kind][0] += accepted
        self._true[kind][1] += judged
        if (count := self._true[kind][1]) > MEMORY:
            self._true[kind] = [value * MEMORY / count for value in self._true[kind]]

    def share(self, kind: str) -> float:
        """How often a guess of a kind comes true."""
        true, of = self._true[kind]
        return true / of

    def length(self, kind: str, available: int) -> tuple[int, float]:
        """The draft length that promises most, and how many tokens a second that is; 0 where none is better."""
        share, drafting = self.share(kind), self.seconds("draft") if kind in HighPlane.kinds else 0.0
        best = 0, 1 / self.seconds(1)
        for length in range(1, min(self.most, available) + 1):
            rate = expected_tokens(share, length) / (length * drafting + self.seconds(length + 1))
            best = max(best, (length, rate), key=lambda found: found[1])
        return best

    def decided(self, tokens: int, seconds: float) -> None:
        """Notes what tokens took whose margins decided who computes them."""
        self._decided.append((tokens, seconds))
        slowest = max(self._decided, key=lambda taken: taken[1] / taken[0]) if len(self._decided) > TRIED else (0, 0.0)
        counted, took = map(sum, zip(*self._decided, strict=True))
        self.rate = (counted - slowest[0]) / (took - slowest[1])

    def came_of(self, kind: str, length: int, rate: float, tokens: int, seconds: float) -> None:
        """Notes what a high plane's guess gave that promised tokens a second; a stall counts for twice its time."""
        self._given.append((tokens, min(rate * seconds, 2 * expected_tokens(self.share(kind), length))))
        came, promised = map(sum, zip(*self._given, strict=True))
        self.honesty = came / promised

    def asks_margins(self, kind: str | None, rate: float) -> bool:
        """Whether margins decide the next token, rather than that a guess of a kind is verified, which promises a rate.

        The faster way. Where the high plane would guess, the other is tried now and then: texts change, and what was
        measured may have been a stall. N-grams guess here and there only, so margins are asked in between.
        """
        if kind not in HighPlane.kinds:
            return kind is None or rate <= self.rate
        if self._to_ask:
            self._to_ask -= 1
            return True
        if rate * self.honesty <= self.rate and self._asked < REFRESH:
            self._asked += 1
            return True
        self._asked, self._unasked = 0, self._unasked + 1
        if self._unasked >= UNASKED:
            self._to_ask, self._unasked = TRIED, 0
        return False

    def further(self, available: int) -> int | None:
        """How many tokens to guess behind an unsure one; ``None`` where verifying that one is not worth it either.

        A second is worth the tokens that are had for it elsewhere.

        Args:
            available: Most tokens that may be guessed, the unsure one among them.
        """
        if self.wants_one or not self._decided:
            return None
        worth = self.rate
        share, share_behind = self.share(UNSURE), self.share(*HighPlane.kinds)
        best, gain = None, 1 - worth * self.seconds(1)
        for further in range(min(self.most, available)):
            tokens = 1 + share * expected_tokens(share_behind, further)
            found = tokens - worth * (further * self.seconds("draft") + self.seconds(further + 2))
            best, gain = (further, found) if found > gain else (best, gain)
        if not best and min(self.most, available) > 1 and self._tokens - self._tried_at >= REFRESH:
            self._tried_at = self._tokens  # how often they come true, and what they take, is not known or old
            return 1
        return best

    def is_due(self, kind: str) -> bool:
        """Whether a kind that promises nothing is to be tried again."""
        return self._tokens >= self._due[kind]

    def gave(self, kind: str | None, tokens: int, seconds: float) -> None:
        """Notes what a pass and its draft gave; one that lost time is tried again the later, the more it lost."""
        self._tokens += tokens
        lost = seconds - tokens * self.seconds(1)
        if kind is not None and lost > 0:
            self._due[kind] = self._tokens + math.ceil(lost / (SHARE * self.seconds(1)))


def expected_tokens(share: float, length: int) -> float:
    """Tokens that a verified draft gives on average: ``1 + a + a^2 + ...``, each token coming true with a chance."""
    return sum(share**power for power in range(length + 1))


@torch.no_grad()
def speculate(
    decoder: Decoder,
    ids: torch.Tensor,
    *,
    max_new_tokens: int,
    stop_ids: frozenset[int] = frozenset(),
    sampling: Sampling | None = None,
    seen: torch.Tensor | None = None,
    pace: Pace | None = None,
    drafting: Drafting | None = None,
) -> Iterator[int]:
    """Generates as ``generate`` does, the same tokens if greedy and the same distribution if not, by drafts.

    Args:
        decoder: Whose ``most_tokens`` is more than one.
        ids: See ``generate``, as the arguments down to ``seen``.
        max_new_tokens: See there.
        stop_ids: See there.
        sampling: See there.
        seen: The whole prompt, which is looked up in as well; by default ``ids``.
        pace: What was learnt before.
        drafting: Where to count.

    Yields:
        Token ids. Where the reader stops early, the cache may hold a few tokens more.
    """
    work = Speculation(decoder, sampling, pace, drafting)
    yield from work.answer(ids, ids if seen is None else seen, max_new_tokens, stop_ids)


class Speculation:
    """Drafts and verifies; the arguments are those of ``speculate``."""

    def __init__(self, decoder: Decoder, sampling: Sampling | None, pace: Pace | None, drafting: Drafting | None):
        self.decoder, self.sampling = decoder, sampling or Sampling()
        self.pace = pace or Pace(decoder.most_tokens - 1)
        self.drafting = Drafting() if drafting is None else drafting
        self.generator: torch.Generator | None = None
        self.n_grams, self.high_plane = NGrams(), HighPlane(decoder)

    def answer(
        self, ids: torch.Tensor, seen: torch.Tensor, max_new_tokens: int, stop_ids: frozenset[int]
    ) -> Iterator[int]:
        """The answer's tokens; see ``speculate``."""
        text, left = seen[0].tolist(), max_new_tokens
        logits = self.decoder.prefill(ids)
        if self.sampling.temperature > 0:
            self.generator = torch.Generator(logits.device).manual_seed(self.sampling.seed)
        found = [Decision(self.chosen(logits, text), None, None, BOTH_PLANES)]
        while left > 0:
            for decision in found:
                if decision.token in stop_ids:
                    return
                self.drafting.decisions.append(decision)
                text.append(decision.token)
                left -= 1
                yield decision.token
            if left > 0:
                found = self.cycle(text, left)

    def cycle(self, text: list[int], left: int) -> list[Decision]:
        """The next tokens, one or more.

        Args:
            text: All tokens so far; the cache holds them but for the last.
            left: Most tokens wanted.
        """
        began = self.pace.clock()
        guess = self._guess(text, min(left, self.decoder.cache.forgettable) - 1)
        return self.verified(text, guess, began)

    def verified(self, text: list[int], guess: Guess | None, began: float) -> list[Decision]:
        """What both planes say behind a text, of a guess as much as is right and the token behind that.

        Args:
            text: See ``cycle``.
            guess: What is verified; without one it is one token.
            began: When the guess was begun.
        """
        cache, drafted = self.decoder.cache, guess.tokens if guess else []
        before, verifying = cache.get_seq_length(), self.pace.clock()
        try:
            logits = self.decoder.decode_several(torch.tensor([[text[-1], *drafted]]))
            self.pace.took(len(drafted) + 1, self.pace.clock() - verifying)
            accepted, following = self._accepted(logits, guess, text)
        except BaseException:  # Ctrl-C too
            cache.keep(before)
            raise
        cache.keep(before + accepted + 1)
        self._note(guess, accepted, self.pace.clock() - began)
        guessed_by = GUESS_BY_N_GRAMS if guess and guess.kind in NGrams.kinds else GUESS_OF_HIGH_PLANE
        kept = [Decision(token, None, None, guessed_by) for token in drafted[:accepted]]
        return [*kept, Decision(following, None, None, BOTH_PLANES)]

    def chosen(self, logits: torch.Tensor, text: list[int]) -> int:
        """The next token after logits ``(1, vocab)``."""
        return int(choose(logits, self.sampling, self.generator, seen_tokens(self.sampling, text, logits)))

    def _guess(self, text: list[int], most: int) -> Guess | None:
        """By whoever promises most tokens a second; nothing where that is no draft at all."""
        self.n_grams.reads(text)
        kind, length, _ = (None, 0, 0.0) if self.pace.wants_one else self.promise(most)
        return self.made(kind, length, text) if kind else None

    def promise(self, most: int) -> tuple[str | None, int, float]:
        """Who is best asked behind the text that n-grams have read, for how many tokens, and the tokens a second."""
        most = min(most, self.pace.most)
        seen_before = self.n_grams.guess(most) if most > 0 else None
        options = [(seen_before.kind, len(seen_before.tokens))] if seen_before else []
        options += [(kind, most) for kind in HighPlane.kinds if most > 0]
        best = None, 0, 0.0
        for kind, available in options:
            length, rate = self.pace.length(kind, available)
            if not length and self.pace.is_due(kind):
                length = 1
            best = max(best, (kind, length, rate), key=lambda found: found[2]) if length else best
        return best

    def made(self, kind: str, length: int, text: list[int]) -> Guess:
        """A kind's guess of so many tokens behind a text."""
        if kind in NGrams.kinds:
            return self.n_grams.guess(length)
        began = self.pace.clock()
        guess = self.high_plane.guess(text, length, self.sampling, self.generator)
        self.pace.took("draft", (self.pace.clock() - began) / length)
        return guess

    def _accepted(self, logits: torch.Tensor, guess: Guess | None, text: list[int]) -> tuple[int, int]:
        """How many guessed tokens are kept, and the token behind them."""
        drafted = guess.tokens if guess else []
        if self.sampling.takes_the_likeliest:
            said = likeliest(logits)[:, 0].tolist()
            kept = came_true(drafted, said)
            return kept, said[kept]
        for at, token in enumerate(drafted):
            before = [*text, *drafted[:at]]
            if self.generator is None:
                following = self.chosen(logits[at : at + 1], before)
                if following != token:
                    return at, following
                continue
            seen = seen_tokens(self.sampling, before, logits)
            wanted = distribution(logits[at : at + 1], self.sampling, seen)[0]
            drawn_from = _certain(token, wanted) if guess.chances is None else _as_long(guess.chances[at], wanted)
            draw = torch.rand((), generator=self.generator, device=logits.device)
            if draw * drawn_from[token] >= wanted[token]:
                rest = (wanted - drawn_from).clamp_(min=0)
                rest = rest if rest.sum() > 0 else wanted
                return at, int(torch.multinomial(rest, 1, generator=self.generator))
        return len(drafted), self.chosen(logits[len(drafted) : len(drafted) + 1], [*text, *drafted])

    def _note(self, guess: Guess | None, accepted: int, seconds: float) -> None:
        self.drafting.passes += 1
        self.drafting.tokens += accepted + 1
        if guess:
            self._learn(guess, accepted)
        self.pace.gave(guess.kind if guess else None, accepted + 1, seconds)

    def _learn(self, guess: Guess, accepted: int) -> None:
        """Notes how much of a guess was right."""
        self._count(guess.kind, len(guess.tokens), accepted)

    def _count(self, kind: str, proposed: int, accepted: int) -> None:
        self.drafting.drafted[kind] += proposed
        self.drafting.accepted[kind] += accepted
        self.pace.learns(kind, proposed, accepted)


def came_true(guessed: list[int], said: list[int]) -> int:
    """How many guessed tokens were said, up to the first that was not."""
    same = [a == b for a, b in zip(guessed, said, strict=False)]
    return same.index(False) if False in same else len(same)


def seen_tokens(sampling: Sampling, text: list[int], logits: torch.Tensor) -> torch.Tensor | None:
    """What a repetition penalty is for, of the tokens that there are logits of; nothing where there is none."""
    if sampling.repetition_penalty == 1:
        return None
    found = [token for token in text if token < logits.shape[-1]]
    return torch.tensor([found], dtype=torch.long, device=logits.device)


def _certain(token: int, like: torch.Tensor) -> torch.Tensor:
    """The distribution of a guess that was not drawn."""
    found = torch.zeros_like(like)
    found[token] = 1
    return found


def _as_long(chances: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Chances over the commonest tokens, as chances over all."""
    return F.pad(chances, (0, len(like) - len(chances)))
