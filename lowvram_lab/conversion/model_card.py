"""The README.md of a converted directory: method, calibration, sizes and measured loss, in Hugging Face's form."""

import json
from collections import Counter

from lowvram_lab import __version__
from lowvram_lab.model.spec import ModelSpec
from lowvram_lab.repository.text import windows_in_words
from lowvram_lab.units import format_bytes


def model_card(facts: dict, spec: ModelSpec, file_bytes: int) -> str:
    """Markdown with a YAML head, from what ``recipe.json`` holds."""
    measured, plan = facts["measured"], facts["plan"]["modules"]
    counts = Counter(entry["format"] for entry in plan.values())
    saved = 1 - facts["weight_bytes"] / facts["source_weight_bytes"]
    increase = measured["perplexity"] / measured["reference_perplexity"] - 1
    rows = [f"| {fmt} | {count} |" for fmt, count in sorted(counts.items())]
    foretold = f", foretold {facts['estimated_kl']:.4f}" if facts["estimated_kl"] is not None else ""
    weights = (
        f"{format_bytes(facts['weight_bytes'])} instead of {format_bytes(facts['source_weight_bytes'])}, -{saved:.1%}"
    )
    perplexity = (
        f"{measured['perplexity']:.3f}, the original's is {measured['reference_perplexity']:.3f} ({increase:+.1%})"
    )
    return f"""---
base_model: {json.dumps(facts["source"], ensure_ascii=False)}
library_name: transformers
tags: [compressed-tensors, quantized, lowvram-lab]
---
# {facts["source"]}, quantised

Made by lowvram_lab {__version__} from `{facts["source"]}`; the licence of that model holds for these weights too.

| | |
|---|---|
| weights in memory | {weights} |
| tensors on disk | {format_bytes(file_bytes)} |
| method | {facts["solver"]}, symmetric, formats chosen by estimated loss per byte |
| calibration | {facts["calibration"]}, {facts["calibration_tokens"]} tokens |
| perplexity | {perplexity} |
| KL to the original | {measured["kl_mean"]:.4f} nats a token{foretold} |
| same most likely token | {measured["top1_agreement"]:.1%} |
{_both_planes(measured)}| opens in | {_opens_in(plan[spec.embedding]["format"])} |

Loss was measured while converting, in float32, over {measured["tokens"]} tokens of a small English and Chinese text
that is not in the calibration text, {windows_in_words(measured["window"], measured["begins_with"])}:
enough to see that nothing broke, too little to quote. Measure it on your own text:
`lowvram evaluate DIR --reference {facts["source"]} --text FILE`.

| format | modules |
|---|---|
{chr(10).join(rows)}

`recipe.json` has every module's format, solver and output error, and the plan to make it again.
"""


def _both_planes(measured: dict) -> str:
    """A line of the table, where the figures above are the high plane's."""
    both = measured.get("both_planes")
    if both is None:
        return ""
    return (
        f"| with `low_plane.safetensors` | the above is the high plane alone; both planes: KL {both['kl_mean']:.4f}, "
        f"perplexity {both['perplexity']:.3f}, same most likely token {both['top1_agreement']:.1%} |\n"
    )


def _opens_in(table_format: str) -> str:
    if table_format in ("bf16", "fp16", "fp32", "int8"):
        return "stock transformers with compressed-tensors (`AutoModelForCausalLM.from_pretrained`), and lowvram_lab"
    return "lowvram_lab alone: its embedding has fewer than 8 bits, which stock transformers cannot open yet"
