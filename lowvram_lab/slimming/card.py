"""The README.md of a directory with fewer tokens: what was removed, and on which text that was chosen."""

import json

from lowvram_lab import __version__
from lowvram_lab.units import format_bytes


def slim_card(facts: dict) -> str:
    """Markdown with a YAML head, from what ``slim.json`` holds."""
    removed = facts["vocab_before"] - facts["vocab_after"]
    saved = 1 - facts["weight_bytes"] / facts["source_weight_bytes"]
    texts = ", ".join(text["name"] for text in facts["texts"])
    weights = f"{format_bytes(facts['weight_bytes'])} instead of {format_bytes(facts['source_weight_bytes'])}"
    return f"""---
base_model: {json.dumps(facts["source"], ensure_ascii=False)}
library_name: transformers
tags: [vocabulary-reduced, lowvram-lab]
---
# {facts["source"]}, with {facts["vocab_after"]:,} tokens

Made by lowvram_lab {__version__} from `{facts["source"]}`; the licence of that model holds for these weights too.

| | |
|---|---|
| tokens | {facts["vocab_after"]:,} of {facts["vocab_before"]:,} |
| weights | {weights}, -{saved:.1%} |
| chosen on | {texts} |
| different tokens in it | {facts["tokens_of_text"]:,} |
| needed for it, chats and every byte | {facts["needed_tokens"]:,} |
| opens in | stock transformers (`AutoModelForCausalLM.from_pretrained`), and lowvram_lab |

What was removed: the rows of {removed:,} tokens in embedding and head, and the merges that make them. Every other
weight is the original's to the bit.

A text all of whose tokens stayed is read as the same tokens, and each of them gets the same logit as before (a product
of fewer rows may be summed in another order); the probability of the removed tokens is shared out among those that
stayed. Any other text is spelt in more and shorter tokens, at worst byte by byte: it takes longer, and the model has
seldom seen it spelt so. Measure it on your own text.

`slim.json` has the texts' hashes and the old id of every token that stayed, in the new order.
"""


def layers_card(facts: dict) -> str:
    """The same of a directory with fewer layers."""
    left = facts["layers_before"] - len(facts["removed"])
    saved = 1 - facts["weight_bytes"] / facts["source_weight_bytes"]
    weights = f"{format_bytes(facts['weight_bytes'])} instead of {format_bytes(facts['source_weight_bytes'])}"
    costs = "\n".join(f"| KL to the original, {stage} | {kl:.4f} nats a token |" for stage, kl in facts["kl"].items())
    return f"""---
base_model: {json.dumps(facts["source"], ensure_ascii=False)}
library_name: transformers
tags: [layers-removed, lowvram-lab]
---
# {facts["source"]}, with {left} layers

Made by lowvram_lab {__version__} from `{facts["source"]}`; the licence of that model holds for these weights too.

| | |
|---|---|
| layers | {left} of {facts["layers_before"]}, without {", ".join(map(str, facts["removed"]))} |
| weights | {weights}, -{saved:.1%} |
| chosen and fitted on | {facts["text"]}, {facts["text_tokens"]} tokens |
{costs}
| measured on | {facts["kl_tokens"]} tokens that nothing was fitted to |
| opens in | stock transformers (`AutoModelForCausalLM.from_pretrained`), and lowvram_lab |

A model without layers may classify as before and no longer write: ask it something (`lowvram evaluate DIR --battery`)
before you rely on it, and compare it with what quantising reaches in the same bytes.
"""
