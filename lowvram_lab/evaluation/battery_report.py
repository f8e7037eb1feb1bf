"""Items of a generation battery and what came of them: scores, intervals, pairs. Knows no model.

What judges an answer is in ``answer_rules``, what chance explains of it in ``chance``.
"""

import json
from dataclasses import asdict, dataclass, field, replace

import pandas as pd

from lowvram_lab.errors import LowvramError
from lowvram_lab.evaluation.answer_rules import check_rule, passes, unfenced
from lowvram_lab.evaluation.chance import mcnemar_p_value, wilson_interval
from lowvram_lab.model.rules import whole_number

SIGNIFICANT = 0.05
"""Of two models, a p-value below which what they differ by is more than chance."""


@dataclass(frozen=True)
class Item:
    """One question and what its answer must be like.

    Attributes:
        id: Its name; no other item has it.
        kind: What it asks for, such as ``"copying"``.
        language: ``"en"`` or ``"zh"``; any other word in items of your own.
        prompt: The user's message.
        max_new_tokens: Longest answer.
        rule: ``{"name": one of answer_rules.RULES, …}``, with the parameters of that function.
        shots: Questions and answers that go before it: earlier turns of the chat.
        until: Where the judged part of the answer ends, a line break say; by default it is all of it.
        example: An answer that passes.
        counterexample: One that does not.

    Raises:
        LowvramError: A field is empty or of another kind, or the rule is none.
    """

    id: str
    kind: str
    language: str
    prompt: str
    max_new_tokens: int
    rule: dict = field(hash=False)
    shots: tuple[tuple[str, str], ...] = ()
    until: str | None = None
    example: str = ""
    counterexample: str = ""

    def __post_init__(self):
        for name in ("id", "kind", "language", "prompt"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value.strip():
                raise LowvramError(f"item {self.id!r}: expected {name} as text, found {value!r}")
        whole_number("max_new_tokens", self.max_new_tokens, 1)
        object.__setattr__(self, "shots", tuple(map(tuple, self.shots)))
        if any(len(shot) != 2 or not all(isinstance(text, str) and text for text in shot) for shot in self.shots):
            raise LowvramError(f"item {self.id}: expected shots of a question and an answer each, found {self.shots!r}")
        check_rule(f"item {self.id}", self.rule)

    def passes(self, answer: str) -> bool:
        """Whether what comes before ``until`` passes the rule, a fence and white space at its beginning left out."""
        judged = unfenced(answer).lstrip()
        return passes(self.rule, judged.split(self.until, maxsplit=1)[0] if self.until else judged)

    def messages(self) -> list[dict[str, str]]:
        """The chat that ends with its question."""
        said = [text for shot in self.shots for text in shot] + [self.prompt]
        return [{"role": ("user", "assistant")[turn % 2], "content": text} for turn, text in enumerate(said)]

    def text(self) -> str:
        """The same as a text to go on with, for a model without a chat template: a line each, pairs apart."""
        return "".join(f"{question}\n{answer}\n\n" for question, answer in self.shots) + f"{self.prompt}\n"


@dataclass(frozen=True)
class Result:
    """An item and what a model answered.

    Attributes:
        item: The item.
        answer: All of the answer.
        passed: Whether it passes the item's rule.
    """

    item: Item
    answer: str
    passed: bool


@dataclass(frozen=True)
class Score:
    """How many of some items pass.

    Attributes:
        passed: Items that pass.
        items: Items, one or more.
    """

    passed: int
    items: int

    @property
    def share(self) -> float:
        """Passed of all, from 0 to 1."""
        return self.passed / self.items

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % confidence interval of the share, were these items drawn from many more: ``wilson_interval``."""
        return wilson_interval(self.share, self.items)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.passed} of {self.items} pass, {self.share:.1%} ({low:.1%} to {high:.1%})"


@dataclass(frozen=True)
class Comparison:
    """Two models on the same items, pair by pair.

    Attributes:
        items: How many.
        passed: Of them by the model.
        reference_passed: Of them by its reference.
        lost: Ids of those that the reference alone passes.
        gained: Ids of those that the model alone passes.
    """

    items: int
    passed: int
    reference_passed: int
    lost: tuple[str, ...]
    gained: tuple[str, ...]

    @property
    def difference(self) -> float:
        """The model's share less its reference's."""
        return (self.passed - self.reference_passed) / self.items

    @property
    def p_value(self) -> float:
        """How often chance alone would make so much of a difference: ``mcnemar_p_value``."""
        return mcnemar_p_value(len(self.lost), len(self.gained))

    @property
    def within_chance(self) -> bool:
        """Whether chance alone may explain the difference. That there is none is not thereby shown."""
        return self.p_value >= SIGNIFICANT

    @property
    def verdict(self) -> str:
        """``"within chance"``, ``"worse"`` or ``"better"``."""
        if self.within_chance:
            return "within chance"
        return "worse" if self.difference < 0 else "better"

    def summary(self) -> str:
        """The difference in one line, with what chance has to do with it."""
        said = (
            f"within chance ({self.items} items are few: a small difference would not show)"
            if self.within_chance
            else f"{self.verdict} than the reference, by more than chance"
        )
        return (
            f"{self.passed} of {self.items} pass, of the reference {self.reference_passed} ({self.difference:+.1%}): "
            f"{len(self.lost)} lost, {len(self.gained)} gained, p = {self.p_value:.2g} (McNemar, exact); {said}"
        )

    def to_dict(self) -> dict:
        """Plain data."""
        derived = {"difference": self.difference, "p_value": self.p_value, "verdict": self.verdict}
        return {**asdict(self), "lost": list(self.lost), "gained": list(self.gained), **derived}

    def _repr_html_(self) -> str:
        return f"<b>Comparison</b><br>{self.summary()}"


@dataclass(frozen=True)
class Battery:
    """What a model made of the items.

    Attributes:
        way: ``"chat"``, or ``"completion"`` where the tokenizer has no chat template.
        results: One an item, in their order.
        reference: Another model's battery of the same items, if one was made.
    """

    way: str
    results: tuple[Result, ...]
    reference: "Battery | None" = None

    def score(self, kind: str | None = None, language: str | None = None) -> Score:
        """How many items pass.

        Args:
            kind: Of this kind; by default of all.
            language: In this language; by default in all.

        Raises:
            LowvramError: There is no such item.
        """
        wanted = [
            result.passed
            for result in self.results
            if kind in (None, result.item.kind) and language in (None, result.item.language)
        ]
        if not wanted:
            raise LowvramError(f"expected a kind and a language of the items, found {kind!r} and {language!r}")
        return Score(sum(wanted), len(wanted))

    def rows(self) -> pd.DataFrame:
        """A row an item: ``id``, ``kind``, ``language``, ``passed`` and ``answer``. A DataFrame."""
        columns = ["id", "kind", "language", "passed", "answer"]
        rows = [(r.item.id, r.item.kind, r.item.language, r.passed, r.answer) for r in self.results]
        return pd.DataFrame(rows, columns=columns)

    def table(self, by: str = "kind") -> pd.DataFrame:
        """A row a kind, and one of all.

        Args:
            by: ``"kind"`` or ``"language"``.

        Returns:
            ``passed``, ``items``, ``share``, ``low`` and ``high`` (its 95 % interval); with a reference, how many it
            passed (``reference``) and how many of them are ``lost`` and ``gained``. A DataFrame.

        Raises:
            LowvramError: By something else.
        """
        if by not in ("kind", "language"):
            raise LowvramError(f"expected a table by kind or language, found {by!r}")
        values = dict.fromkeys(getattr(result.item, by) for result in self.results)
        scores = {value: self.score(**{by: value}) for value in values} | {"all": self.score()}
        rows = {name: (s.passed, s.items, s.share, *s.interval) for name, s in scores.items()}
        columns = ["passed", "items", "share", "low", "high"]
        table = pd.DataFrame.from_dict(rows, orient="index", columns=columns).rename_axis(by)
        if self.reference is not None:
            compared = self.compare(self.reference)
            names = {result.item.id: getattr(result.item, by) for result in self.results}
            table["reference"] = [self.reference.score(**{by: value}).passed for value in values] + [
                compared.reference_passed
            ]
            for column in ("lost", "gained"):
                of = [names[id] for id in getattr(compared, column)]
                table[column] = [of.count(value) for value in values] + [len(of)]
        return table

    def compare(self, other: "Battery") -> Comparison:
        """Holds this battery beside another one of the same items, pair by pair.

        Args:
            other: The reference's.

        Raises:
            LowvramError: Its items are others, or it was asked another way.
        """
        if [result.item for result in self.results] != [result.item for result in other.results]:
            raise LowvramError("expected two batteries of the same items, found others; give both the same items")
        check_same_way(self.way, other.way)
        pairs = list(zip(self.results, other.results, strict=True))
        return Comparison(
            items=len(pairs),
            passed=self.score().passed,
            reference_passed=other.score().passed,
            lost=tuple(mine.item.id for mine, its in pairs if its.passed and not mine.passed),
            gained=tuple(mine.item.id for mine, its in pairs if mine.passed and not its.passed),
        )

    def beside(self, reference: "Battery") -> "Battery":
        """The same battery with a reference. Arguments and errors as ``compare``."""
        self.compare(reference)
        return replace(self, reference=replace(reference, reference=None))

    @property
    def comparison(self) -> Comparison | None:
        """With the reference, where there is one."""
        return None if self.reference is None else self.compare(self.reference)

    def summary(self) -> str:
        """One line, and with a reference another one."""
        asked = "asked by chat" if self.way == "chat" else "asked by completion (no chat template)"
        first = f"generation battery: {self.score()}; {asked}, greedy"
        return first if self.comparison is None else f"{first}\n{self.comparison.summary()}"

    def to_dict(self) -> dict:
        """Plain data."""
        score = self.score()
        return {
            "way": self.way,
            "passed": score.passed,
            "items": score.items,
            "share": score.share,
            "interval": list(score.interval),
            "kinds": json.loads(self.table().drop("all").to_json(orient="index")),
            "rows": self.rows().to_dict(orient="records"),
            "comparison": self.comparison and self.comparison.to_dict(),
            "reference": self.reference and self.reference.to_dict(),
        }

    def __repr__(self) -> str:
        return f"{self.summary()}\n{shown_table(self.table())}"

    def _repr_html_(self) -> str:
        lines = self.summary().replace("\n", "<br>")
        return f"<b>Battery</b><br>{lines}" + shown_table(self.table(), html=True)


def check_same_way(way: str, other: str) -> None:
    """Refuses to pair what one model was asked by chat with what another was asked by completion.

    Args:
        way: Of one battery.
        other: Of its reference's.

    Raises:
        LowvramError: They differ.
    """
    if way != other:
        raise LowvramError(
            f"expected two batteries asked in the same way, found {way} and {other} (one tokenizer has no chat "
            "template); take a reference that is asked as the model is"
        )


def shown_table(table: pd.DataFrame, html: bool = False) -> str:
    """A battery's table to be read: shares in percent.

    Args:
        table: From ``Battery.table``.
        html: For a notebook.
    """
    percent = dict.fromkeys(("share", "low", "high"), "{:.0%}".format)
    if html:
        return table.reset_index().to_html(index=False, formatters=percent)
    return table.reset_index().to_string(index=False, formatters=percent)
