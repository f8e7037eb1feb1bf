"""Small tasks of several kinds, and what precision on demand makes of each: do complex tasks need more precision?

Derived in: notebooks/08_precision_on_demand.ipynb
"""

import json
import statistics
import time
from collections.abc import Iterable, Iterator

import pandas
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowvram_lab.chat.margins import margins_of, tokens_for
from lowvram_lab.chat.prompt import chat_ids, stop_ids
from lowvram_lab.decoding.decode import Decoder, generate
from lowvram_lab.decoding.escalate import escalate, read_margins
from lowvram_lab.decoding.lean import decoder_for
from lowvram_lab.decoding.speculate import Drafting, Pace, speculate
from lowvram_lab.engine.loaded import loaded
from lowvram_lab.errors import LowvramError
from lowvram_lab.packaged import data_path

WAYS = ("plain", "precise", "auto", "fast")
"""Both planes token by token; both planes with drafts; both where the high ones are unsure; the high ones."""


def tasks() -> dict[str, list[str]]:
    """The library's own small tasks: kind → questions."""
    return json.loads(data_path("tasks.json").read_text(encoding="utf-8"))


def task_table(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    kinds: Iterable[str] | None = None,
    max_new_tokens: int = 96,
    flip_rate: float = 0.01,
    rounds: int = 3,
    progress: bool = True,
) -> pandas.DataFrame:
    """Answers every task in every way, in turns, and says by kind of task what each way came to.

    Args:
        model: From ``load``, with its low planes.
        tokenizer: Its tokenizer, with a chat template.
        kinds: Of ``tasks``; by default all.
        max_new_tokens: Longest answer.
        flip_rate: Of ``auto``.
        rounds: How often each answer is timed; the median counts.
        progress: Show a progress bar.

    Returns:
        One row a kind: ``tokens`` of the answers; ``same`` (of the precise answers' tokens, those that plain decoding
        gives as well: all); ``acceptance`` of the drafts; ``unsure`` (of the precise answers' tokens, those before
        which the high planes' margin is below the threshold); ``escalated`` (share of ``auto``'s tokens that both
        planes compute: unsure ones, and those that are verified because that takes no longer); ``fast_agrees`` and
        ``auto_agrees`` (at how many places of the precise answer the high planes, and ``auto`` at least, say the same
        next token); and ``plain``, ``precise``, ``auto``, ``fast`` in tokens a second. A DataFrame.

    Raises:
        LowvramError: The model has no low planes, or there is no such kind.
    """
    margins = margins_of(model, tokenizer, tokens=tokens_for(flip_rate), progress=progress)
    threshold = margins.threshold(flip_rate)
    chosen = {kind: _questions(kind) for kind in (kinds or tasks())}
    runner = _Runner(decoder_for(model, progress=progress), stop_ids(model, tokenizer), threshold, max_new_tokens)
    rows = []
    with tqdm(total=sum(map(len, chosen.values())), desc="tasks", disable=not progress, leave=False) as bar:
        for kind, questions in chosen.items():
            answers = []
            for question in questions:
                ids = torch.tensor([chat_ids(tokenizer, [{"role": "user", "content": question}], {})])
                answers.append(runner.answers(ids, rounds))
                bar.update()
            rows.append({"kind": kind, **_row(answers)})
    return pandas.DataFrame(rows)


def _questions(kind: str) -> list[str]:
    known = tasks()
    if kind not in known:
        raise LowvramError(f"expected kinds of tasks among {', '.join(known)}, found {kind!r}")
    return known[kind]


class _Runner:
    """Answers one question in every way."""

    def __init__(self, decoder: Decoder, ends: frozenset[int], threshold: float, max_new_tokens: int):
        self.decoder, self.threshold = decoder, threshold
        self.pace = Pace(decoder.most_tokens - 1)
        self.common = {"max_new_tokens": max_new_tokens, "stop_ids": ends}

    def answers(self, ids: torch.Tensor, rounds: int) -> dict:
        """Tokens and seconds a token of each way, how drafts did, and the margins along the precise answer."""
        found, seconds = {}, {way: [] for way in WAYS}
        drafting = {}
        for turn in range(rounds):
            for way in WAYS if turn % 2 else reversed(WAYS):
                drafting[way] = Drafting()
                found[way], took = self._timed(self._stream(way, ids, drafting[way]))
                seconds[way].append(took)
        answer = torch.tensor(found["precise"], dtype=torch.long)
        margins = read_margins(self.decoder.model, torch.cat((ids[0], answer)), first=ids.shape[1] - 1)
        return {
            "found": found,
            "seconds": {way: statistics.median(took) for way, took in seconds.items()},
            "drafted": sum(drafting["precise"].drafted.values()),
            "accepted": sum(drafting["precise"].accepted.values()),
            "escalated": sum(decision.both for decision in drafting["auto"].decisions),
            "unsure": int((margins.margins < self.threshold).sum()),
            "unsure_flips": int(margins.flips[margins.margins < self.threshold].sum()),
            "flips": int(margins.flips.sum()),
        }

    def _stream(self, way: str, ids: torch.Tensor, drafting: Drafting) -> Iterator[int]:
        self.decoder.cache.keep(0)
        drafts = {"pace": self.pace, "drafting": drafting, **self.common}
        if way == "precise" and self.decoder.most_tokens > 1:
            return speculate(self.decoder, ids, **drafts)
        if way == "auto":
            return escalate(self.decoder, ids, threshold=self.threshold, **drafts)
        loaded(self.decoder.model).planes.both = way != "fast"
        return generate(self.decoder, ids, **self.common)

    def _timed(self, stream: Iterator[int]) -> tuple[list[int], float]:
        """The tokens, and seconds of each after the first."""
        first = next(stream, None)
        began, found = time.perf_counter(), [] if first is None else [first]
        found += stream
        took = (time.perf_counter() - began) / max(1, len(found) - 1)
        loaded(self.decoder.model).planes.both = True
        return found, took


def _row(answers: list[dict]) -> dict:
    """Of one kind's answers, what the table has."""
    precise = [answer["found"]["precise"] for answer in answers]
    tokens = sum(map(len, precise))
    plain = [answer["found"]["plain"] for answer in answers]
    same = sum(a == b for pair in zip(precise, plain, strict=True) for a, b in zip(*pair, strict=False))
    counted = "drafted", "accepted", "unsure", "escalated", "flips"
    sums = {name: sum(answer[name] for answer in answers) for name in counted}
    kept_flips = sums["flips"] - sum(answer["unsure_flips"] for answer in answers)
    autos = sum(len(answer["found"]["auto"]) for answer in answers)
    return {
        "tokens": tokens,
        "same": same / max(1, tokens),
        "acceptance": sums["accepted"] / max(1, sums["drafted"]),
        "unsure": sums["unsure"] / max(1, tokens),
        "escalated": sums["escalated"] / max(1, autos),
        "fast_agrees": 1 - sums["flips"] / max(1, tokens),
        "auto_agrees": 1 - kept_flips / max(1, tokens),
        **{way: 1 / statistics.fmean(answer["seconds"][way] for answer in answers) for way in WAYS},
    }
