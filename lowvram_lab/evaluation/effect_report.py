"""An article's claims, the table of their figures beside ours, and the paragraph that follows from it."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from html import escape

import pandas as pd

from lowvram_lab.units import GiB


@dataclass(frozen=True)
class Claim:
    """A figure of the article.

    Attributes:
        name: What it is about.
        text: The figure as the article gives it.
        limit: What has to be kept to: bytes, tokens a second, seconds, or a share.
        at_least: Whether the limit has to be reached instead.
        saved: Of a claim about loss, the share of the weights' 16-bit bytes that it speaks of.
    """

    name: str
    text: str
    limit: float
    at_least: bool = False
    saved: float = 0.0


MODEL, CARD = "qwen1.5-4b", 4 * GiB
"""What the article's table, the source of ``CLAIMS``, is about. Its GB are read as GiB, as cards are sold."""

CLAIMS = {
    "before": Claim("memory in 16 bits", "8 GB or more", 8 * GiB, at_least=True),
    "after": Claim("memory compressed", "3.5 to 3.8 GB", 3.8 * GiB),
    "decoding": Claim("decoding speed", "5 to 10 tokens/s", 5, at_least=True),
    "first": Claim("first response", "3 to 6 s", 6),
    "later": Claim("later responses", "1 to 3 s", 3),
    "medium": Claim("medium compression", "-60% memory, 15% loss", 0.15, saved=0.6),
    "deep": Claim("deep compression", "-70% memory, 25% loss", 0.25, saved=0.7),
}
LOSS = (
    "The article does not define its loss; here it is the increase of perplexity, with the mean KL divergence and the "
    "share of most likely tokens that change, against the 16-bit model."
)
VERDICTS = {True: "held", False: "did not hold", None: "not checked"}


@dataclass(frozen=True)
class Effect:
    """One row of the table.

    Attributes:
        claim: Key of ``CLAIMS``.
        quantity: What is compared.
        article: The article's figure.
        ours: Ours.
        how: How ours came about.
        note: What else a reader has to know.
        held: Whether the claim holds; ``None`` where that is not checked.
        unchecked: Why it is not.
        figures: Ours in plain numbers: bytes, seconds, tokens a second, shares.
    """

    claim: str
    quantity: str
    article: str
    ours: str
    how: str = ""
    note: str = ""
    held: bool | None = None
    unchecked: str = ""
    figures: dict = field(default_factory=dict)


def judged(
    claim: str,
    quantity: str,
    ours: str,
    values: Sequence[float],
    *,
    how: str = "",
    note: str = "",
    unchecked: str = "",
    figures: dict | None = None,
) -> Effect:
    """A row with its verdict: the claim holds if all readings keep to its limit, and does not if none does.

    ``values`` are the possible readings of our figure; the other arguments are those of ``Effect``. Where ``unchecked``
    says why, no verdict is possible, whatever the values.
    """
    stated = CLAIMS[claim]
    verdicts = {value >= stated.limit if stated.at_least else value <= stated.limit for value in values}
    held = None if unchecked or len(verdicts) != 1 else verdicts.pop()
    if held is None:
        unchecked = unchecked or f"it depends on what the article means; here: {ours}"
    return Effect(claim, quantity, stated.text, ours, how, note, held, unchecked, figures or {})


@dataclass(frozen=True)
class EffectReport:
    """The table and what it was made on.

    Attributes:
        model: Model name.
        gpu: The card to be, in words.
        context: Tokens planned for it.
        effects: The rows.
        weights_from: Where the weights come from, or ``""`` where they could not be had.
        machine: Versions, cores, RAM, GPU.
        stages: Seconds by name.
        date: When it was begun, ISO 8601.
        seconds: Of all stages.
    """

    model: str
    gpu: str
    context: int
    effects: tuple[Effect, ...]
    weights_from: str
    machine: dict
    stages: dict[str, float]
    date: str
    seconds: float

    def summary(self) -> str:
        """One paragraph made from the rows: claims that held here, that did not, that could not be checked, and why."""
        held = []
        broken = []
        unknown = {}
        for key, claim in CLAIMS.items():
            rows = [effect for effect in self.effects if effect.claim == key]
            judged = [effect for effect in rows if effect.held is not None]
            if judged:  # what was measured comes after what was forecast
                text = f"{claim.name} (article: {claim.text}; here: {judged[-1].ours}, {judged[-1].how})"
                (held if judged[-1].held else broken).append(text)
            elif rows:
                unknown.setdefault(rows[0].unchecked, []).append(claim.name)
        reasons = [f"{', '.join(names)} ({reason})" for reason, names in unknown.items()]
        before = f"The weights were quantised once before ({self.weights_from}): losses are beside those."
        parts = [
            f"{self.model}, {self.gpu}, context {self.context}.",
            f"Held: {'; '.join(held)}." if held else "No claim was found to hold.",
            f"Did not hold: {'; '.join(broken)}." if broken else "None was found not to hold.",
            f"Could not be checked: {'; '.join(reasons)}." if reasons else "",
            LOSS if any("kl_mean" in effect.figures for effect in self.effects) else "",
            before if ".gguf" in self.weights_from.lower() else "",
        ]
        return " ".join(filter(None, parts))

    def table(self) -> pd.DataFrame:
        """One row a figure."""
        rows = [(e.quantity, e.article, e.ours, e.how, VERDICTS[e.held], e.note) for e in self.effects]
        return pd.DataFrame(rows, columns=["quantity", "article", "here", "how", "verdict", "note"])

    def to_dict(self) -> dict:
        """Plain data."""
        return {
            **asdict(self),
            "claims": {key: asdict(claim) for key, claim in CLAIMS.items()},
            "summary": self.summary(),
        }

    def to_markdown(self) -> str:
        """A page: paragraph, table, machine."""
        table = self.table()
        rows = [table.columns, ["---"] * len(table.columns), *table.itertuples(index=False)]
        lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
        return "\n".join(["# Effect table", "", self.summary(), "", *lines, "", self.made_on(), ""])

    def made_on(self) -> str:
        """When, how long, which weights, which machine; one line."""
        stages = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in self.stages.items())
        weights = f" Weights: {self.weights_from}." if self.weights_from else ""
        facts = ", ".join(f"{key} {value}" for key, value in self.machine.items())
        return f"{self.date}, {self.seconds:.0f} s ({stages}).{weights} Machine: {facts}."

    def __repr__(self) -> str:
        table = self.table()
        notes = [f"- {row.quantity}: {row.note}" for row in table.itertuples() if row.note]
        rows = table.drop(columns="note").to_string(index=False, max_colwidth=None, line_width=10**6)
        return "\n".join([rows, *notes, self.made_on(), self.summary()])

    def _repr_html_(self) -> str:
        table = self.table().to_html(index=False)
        return f"<p><b>Effect table.</b> {escape(self.summary())}</p>\n{table}\n<p>{escape(self.made_on())}</p>"
