"""The README.md of a directory with fewer tokens or layers: what was removed, and on which text that was chosen."""

import json

from lowvram_lab import __version__
from lowvram_lab.units import format_bytes


def slim_card(facts: dict) -> str:
    """Markdown with a YAML head, of fewer tokens, from what ``slim.json`` holds."""
    removed = facts["vocab_before"] - facts["vocab_after"]
    rows = {
        "tokens": f"{facts['vocab_after']:,} of {facts['vocab_before']:,}",
        "weights": _weights(facts),
        "chosen on": ", ".join(text["name"] for text in facts["texts"]),
        "different tokens in it": f"{facts['tokens_of_text']:,}",
        "needed for it, chats and every byte": f"{facts['needed_tokens']:,}",
        **_referee(facts),
    }
    head = _head(facts["source"], "vocabulary-reduced", f"{facts['vocab_after']:,} tokens", rows)
    return f"""{head}
What was removed: the rows of {removed:,} tokens in embedding and head, and the merges that make them. Every other
weight is the original's to the bit.

A text all of whose tokens stayed is read as the same tokens, and each of them gets the same logit as before (a product
of fewer rows may be summed in another order); the probability of the removed tokens is shared out among those that
stayed. Any other text is mostly spelt in more and shorter tokens, at worst byte by byte: it takes longer, and the model
has seldom seen it spelt so. Measure it on your own text.

`slim.json` has the texts' hashes and the old id of every token that stayed, in the new order.
"""


def layers_card(facts: dict) -> str:
    """The same of fewer layers."""
    left = f"{facts['layers_before'] - len(facts['removed'])}"
    rows = {
        "layers": f"{left} of {facts['layers_before']}, without {', '.join(map(str, facts['removed']))}",
        "weights": _weights(facts),
        "chosen and fitted on": f"{facts['text']}, {facts['text_tokens']} tokens",
        **{f"KL to the original, {stage}": f"{kl:.4f} nats a token" for stage, kl in facts["kl"].items()},
        "measured on": f"{facts['kl_tokens']} tokens that nothing was fitted to",
        **_referee(facts),
    }
    return f"""{_head(facts["source"], "layers-removed", f"{left} layers", rows)}
A model without layers may classify as before and no longer write: ask it something (`lowvram evaluate DIR --battery`)
before you rely on it, and compare it with what quantising reaches in the same bytes.
"""


def joint_card(facts: dict) -> str:
    """The same of fewer tokens, layers and bits together."""
    left, low, high = facts["layers_before"] - len(facts["removed"]), *facts["kl_interval"]
    without = f", without {', '.join(map(str, facts['removed']))}" if facts["removed"] else ""
    rows = {
        "tokens": f"{facts['vocab_after']:,} of {facts['vocab_before']:,}",
        "layers": f"{left} of {facts['layers_before']}{without}",
        "weights": f"{_weights(facts)}; {8 * facts['weight_bytes'] / facts['parameters']:.1f} bits each",
        "chosen and fitted on": ", ".join(facts["texts"]),
        "distance from the original": f"{facts['kl']:.4f} nats a token ({low:.4f} to {high:.4f})",
        "measured on": f"{facts['kl_tokens']} tokens that nothing was fitted to",
    }
    made = [row for row in facts["candidates"] if row["kl"] is not None]
    tried = "\n".join(
        f"| {row['kind']} | {row['tokens']:,} | {row['layers']} | {format_bytes(row['weight_bytes'])} "
        f"| {row['estimated']:.4f} | {row['kl']:.4f} |"
        for row in made
    )
    return f"""{_head(facts["source"], "quantized", f"{format_bytes(facts['weight_bytes'])} of weights", rows)}
Tokens, layers and bits were chosen together for {format_bytes(facts["weight_budget"])}. These were made and measured:

| by | tokens | layers | weights | estimated | measured |
|---|---|---|---|---|---|
{tried}

Where tokens went, their probability is shared out among those that stayed, and what that costs is counted. Texts with
other tokens are spelt in more of them: measure it on your own, and ask it something (`lowvram evaluate DIR --battery`).
`slim.json` has all combinations that were weighed.
"""


def _head(source: str, tag: str, left: str, rows: dict[str, str]) -> str:
    rows = rows | {"opens in": "stock transformers (`AutoModelForCausalLM.from_pretrained`), and lowvram_lab"}
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"""---
base_model: {json.dumps(source, ensure_ascii=False)}
library_name: transformers
tags: [{tag}, lowvram-lab]
---
# {source}, with {left}

Made by lowvram_lab {__version__} from `{source}`; the licence of that model holds for these weights too.

| | |
|---|---|
{table}
"""


def _referee(facts: dict) -> dict[str, str]:
    """Its word, as a row."""
    verdict = facts.get("referee")
    return {"quantising instead": verdict["summary"].replace("\n", "; ")} if verdict else {}


def _weights(facts: dict) -> str:
    saved = 1 - facts["weight_bytes"] / facts["source_weight_bytes"]
    before, after = format_bytes(facts["source_weight_bytes"]), format_bytes(facts["weight_bytes"])
    return f"{after} instead of {before}, -{saved:.1%}"
