"""Every causal language model class of the installed transformers, tiny and random, beside stock transformers.

``examine(kind)`` builds one and says in a row what became of it: whether stock runs it as a text model at all, whether
we do, and then by how much logits, greedy tokens, KV bytes and forecast differ. ``make architectures`` examines all of
them, writes ``results.json`` beside this file, and draws ``docs/architectures.md`` from it.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import lowvram_lab as lab
from lowvram_lab.decoding.decode import generate
from lowvram_lab.decoding.lean import decoder_for
from lowvram_lab.errors import LowvramError
from lowvram_lab.memory.budget import GpuBudget
from lowvram_lab.memory.gpu import StandInGpu
from lowvram_lab.model.plan import Plan
from lowvram_lab.planner.profile import Workload
from lowvram_lab.quiet import quiet_transformers
from lowvram_lab.weights.layerwise import LayerByLayer

KINDS = tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
RESULTS = Path(__file__).with_name("results.json")
PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"
MOST_PARAMETERS = 40_000_000
PROMPT, NEW, CONTEXT = 40, 12, 64
VERDICTS = ("right", "wrong", "crash", "refused", "stock cannot")
TOLERANCE = 2e-5
"""Of the largest logit, float32: another order of summation."""
INT8_TOLERANCE = 0.35
"""With an int8 KV cache, of random weights: a hundred times a trained model's error; it tells apart what is broken."""

SIZES = {
    "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "intermediate_size": 192, "vocab_size": 320, "max_position_embeddings": 256,
    "n_positions": 256, "n_embd": 128, "n_layer": 4, "n_head": 4, "n_inner": 192, "n_ctx": 256,
    "d_model": 128, "n_layers": 4, "n_heads": 4, "ffn_dim": 192, "word_embed_proj_dim": 128, "d_ff": 96,
    "num_layers": 4, "num_heads": 4, "attention_heads": 4, "num_kv_heads": 2, "max_seq_len": 256, "expansion_ratio": 2,
    "decoder_layers": 4, "decoder_attention_heads": 4, "decoder_ffn_dim": 192, "encoder_layers": 4,
    "encoder_attention_heads": 4, "encoder_ffn_dim": 192, "num_decoder_layers": 4, "num_encoder_layers": 4,
    "num_decoder_attention_heads": 4, "num_encoder_attention_heads": 4, "max_target_positions": 256,
    "embedding_size": 128, "emb_dim": 128, "input_embedding_size": 128, "output_embedding_size": 128,
    "attention_types": [[["global", "local"], 2]], "rotary_dim": 16, "is_decoder": True, "axial_pos_shape": [16, 16],
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 64, "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1,
}  # fmt: skip
LATENT = {
    "num_key_value_heads": 4, "kv_lora_rank": 32, "q_lora_rank": 48, "qk_rope_head_dim": 16, "qk_nope_head_dim": 32,
    "v_head_dim": 32, "head_dim": 16,
}  # fmt: skip
CHANGES = {
    "youtu": {**LATENT, "pad_token_id": None},  # stock zeroes the row of the padding token after it has loaded it
    "minicpm3": LATENT,
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},  # as real ones are
    "gemma2": {"sliding_window": 128},
    "gemma3_text": {"sliding_window": 128},
    "gemma3n_text": {
        "num_hidden_layers": 10, "intermediate_size": [192] * 10, "vocab_size_per_layer_input": 320,
        "hidden_size_per_layer_input": 32, "laurel_rank": 8, "num_kv_shared_layers": 5, "sliding_window": 128,
        "activation_sparsity_pattern": [0.0] * 10,
    },
    "gemma4_text": {
        "num_hidden_layers": 6, "global_head_dim": 64, "vocab_size_per_layer_input": 320,
        "hidden_size_per_layer_input": 32, "num_kv_shared_layers": 0, "sliding_window": 128,
    },
}  # fmt: skip


def tiny_config(kind: str) -> transformers.PretrainedConfig:
    """The class's own config with tiny sizes wherever it knows them."""
    cls = CONFIG_MAPPING[kind]
    known, spelt = cls().to_dict(), getattr(cls, "attribute_map", {})
    values = {name: value for name, value in SIZES.items() if name in known or name in spelt}
    for name in [name for name in values if spelt.get(name) in values]:
        values.pop(name)
    values |= CHANGES.get(kind, {})
    if "layer_types" in known:
        layers = known.get("num_hidden_layers") and SIZES["num_hidden_layers"]
        values.setdefault("layer_types", _first_of_each(known["layer_types"] or [], layers) or None)
    try:
        return cls(**values)
    except Exception:
        values["layer_types"] = None
        return cls(**values)


def _first_of_each(layer_types: list[str], count: int) -> list[str]:
    """So many of them, of as many sorts as there are."""
    sorts = list(dict.fromkeys(layer_types))[:count]
    return (layer_types[: count - len(sorts)] + sorts)[:count]


def examine(kind: str) -> dict:
    """One row of the table; never raises."""
    row = {"type": kind, "class": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]}
    with tempfile.TemporaryDirectory() as folder:
        try:
            with quiet_transformers():
                expected = _expected(_stock(kind, Path(folder)))
        except Exception as error:
            return {**row, "verdict": "stock cannot", "why": _line(error)}
        try:
            row |= _ours(Path(folder), *expected)
        except LowvramError as error:
            return {**row, "verdict": "refused", "why": str(error).replace(folder, "…")}
        except Exception as error:
            return {**row, "verdict": "crash", "why": f"{type(error).__name__}: {_line(error)}"}
    return {**row, "verdict": "wrong" if (wrong := _wrong(row)) else "right", **({"why": wrong} if wrong else {})}


def _stock(kind: str, folder: Path) -> transformers.PreTrainedModel:
    config = tiny_config(kind)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if parameters > MOST_PARAMETERS:
        raise ValueError(f"no tiny one: {parameters:,} parameters")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(noise * 0.08) if parameter.dim() > 1 else parameter.add_(noise * 0.1)
    model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def _ids() -> torch.Tensor:
    return torch.randint(3, 300, (1, PROMPT), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def _expected(stock: transformers.PreTrainedModel) -> tuple[torch.Tensor, list[int], list[int], int | None]:
    """Stock's logits, its greedy tokens by ``forward`` and by ``generate``, and its cache's bytes after the prompt."""
    ids = _ids()
    found = stock(input_ids=ids, use_cache=True)
    cache = getattr(found, "past_key_values", None)
    logits, cached, tokens = found.logits, _cache_bytes(cache), []
    for _ in range(NEW):
        tokens.append(int(found.logits[0, -1].argmax()))
        if cache is None:
            found = stock(input_ids=torch.cat((ids, torch.tensor([tokens])), 1))
        else:
            found = stock(input_ids=torch.tensor([tokens[-1:]]), past_key_values=cache, use_cache=True)
    options = {"eos_token_id": None, "pad_token_id": 0, "forced_eos_token_id": None}
    generated = stock.generate(ids, max_new_tokens=NEW, do_sample=False, **options)
    return logits, tokens, generated[0, PROMPT:].tolist(), cached


def _cache_bytes(cache) -> int | None:
    cache = getattr(cache, "self_attention_cache", cache)
    layers = getattr(cache, "layers", None)
    if not layers:
        return None
    held = [getattr(layer, name, None) for layer in layers for name in ("keys", "values")]
    return sum(each.nbytes for each in held if isinstance(each, torch.Tensor))


@torch.no_grad()
def _ours(folder: Path, expected: torch.Tensor, greedy: list[int], generated: list[int], cached: int | None) -> dict:
    source = lab.find_source(str(folder))
    spec = source.spec()
    ids, largest = _ids(), expected.abs().max()
    plan = Plan.uniform(spec, "fp32", context=CONTEXT)

    def error(model: torch.nn.Module) -> float:
        return round(float((model(input_ids=ids).logits.float() - expected).abs().max() / largest), 7)

    def load(plan: Plan, gpu: StandInGpu) -> torch.nn.Module:
        return lab.load(plan, gpu, checkpoint=source.checkpoint(), progress=False)

    model = load(plan, StandInGpu(GpuBudget(2**31)))
    row = {"logits": error(model), "attention": model.config._attn_implementation}
    found = list(generate(decoder_for(model, progress=False), ids, max_new_tokens=NEW))
    row["greedy"] = sum(a == b for a, b in zip(found, greedy, strict=True))
    row["stock_agrees_with_itself"] = greedy == generated  # RoBERTa's positions are others in generate
    row["kv_bytes"] = [plan.kv_bytes(PROMPT), cached]
    row["not_quantised"] = _not_quantised(spec)
    row["forecast"] = {}
    for recipe, kv_format in (("bf16", None), ("int8", None), ("int8", "int8")):
        low = Plan.uniform(spec, recipe, context=CONTEXT)
        low = low if kv_format is None else replace(low, kv_format=kv_format)
        name = recipe + (f", KV {kv_format}" if kv_format else "")
        row["forecast"][name], model = _forecast_error(low, load)
    row["int8"] = error(model)
    try:
        counts = (0, spec.num_hidden_layers // 2)
        row["split"] = max(error(load(plan.with_gpu_layers(n), StandInGpu(GpuBudget(2**31)))) for n in counts)
        half = Plan.uniform(spec, "bf16", context=CONTEXT).with_gpu_layers(spec.num_hidden_layers // 2)
        row["forecast"]["bf16, split"] = _forecast_error(half, load)[0]
    except LowvramError as refused:
        row["split"] = f"refused: {refused}"
    row["layer_by_layer"] = _layer_by_layer(spec, source.checkpoint(), expected)
    return row


def _layer_by_layer(spec, checkpoint, expected: torch.Tensor) -> float | str:
    """Error of the logits as calibration computes them."""
    try:
        stream = LayerByLayer(spec, checkpoint)
    except LowvramError as refused:
        return f"refused: {refused}"
    hidden = stream.embed(_ids().repeat(2, 1))
    for index in range(len(stream)):
        with stream.layer(index) as layer:
            stream.run_in_place(layer, hidden)
    logits = stream.norm(hidden[1:]) @ stream.weight(spec.head).T
    bias = stream.bias(spec.head)
    logits = logits if bias is None else logits + bias
    return round(float((logits - expected).abs().max() / expected.abs().max()), 7)


def _not_quantised(spec) -> int:
    """Weights of two dimensions or more that no quantised format can hold."""
    return sum(len(m.weight_shape) > 1 for m in spec.modules if m.kind == "other")


def _forecast_error(plan: Plan, load) -> tuple[int, torch.nn.Module]:
    """The largest difference between forecast and metered peak of any phase, in bytes; and the loaded model."""
    gpu, workload = StandInGpu(GpuBudget(2**31)), Workload(PROMPT, 8)
    forecast = lab.forecast(plan, gpu, workload=workload)
    model = load(plan, gpu)
    difference = forecast.compare(lab.run_workload(model, workload))["difference"]
    return int(difference.abs().max()), model


def _wrong(row: dict) -> str:
    """What differs from stock, in words, or nothing."""
    faults = []
    if row["logits"] > TOLERANCE:
        faults.append(f"logits off by {row['logits']}")
    if row["greedy"] < NEW:
        faults.append(f"{row['greedy']} of {NEW} greedy tokens")
    ours, theirs = row["kv_bytes"]
    if theirs is not None and ours != theirs:
        faults.append(f"KV cache of {ours} bytes, stock's has {theirs}")
    faults += [f"forecast of {name} off by {off} bytes" for name, off in row["forecast"].items() if off]
    if row["int8"] > INT8_TOLERANCE:
        faults.append(f"int8 off by {row['int8']}")
    for way in ("split", "layer_by_layer"):
        if not isinstance(row[way], str) and row[way] > TOLERANCE:
            faults.append(f"{way} off by {row[way]}")
    return "; ".join(faults)


def _line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:160]


def main() -> None:
    """Examines the types named, or all, and writes or prints their rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kinds", nargs="*", metavar="TYPE", help="by default all, and results.json is written")
    parser.add_argument("--processes", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    with ProcessPoolExecutor(arguments.processes) as pool:
        for row in pool.map(examine, arguments.kinds or KINDS):
            print(json.dumps(row), file=sys.stderr, flush=True)
            rows.append(row)
    if not arguments.kinds:
        facts = {"transformers": transformers.__version__, "torch": torch.__version__, "types": rows}
        RESULTS.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        PAGE.write_text(page(facts), encoding="utf-8")


def page(facts: dict) -> str:
    """What ``docs/architectures.md`` says of the results."""
    rows = facts["types"]
    of = {verdict: [row for row in rows if row["verdict"] == verdict] for verdict in VERDICTS}
    others = [row["type"] for row in of["right"] if not row["stock_agrees_with_itself"]]
    lines = [
        "# Architectures",
        "",
        f"Every causal language model type of transformers {facts['transformers']} ({len(rows)}), tiny and with random "
        "weights, saved by stock transformers and opened by both. Drawn by `make architectures` from "
        "`tests/architectures/results.json`; every difference is to stock transformers on the same files, every "
        "forecast is held against the metered run of the stand-in (simulated, no card).",
        "",
        "| verdict | types |",
        "|---|---|",
        *(f"| {verdict} | {len(of[verdict])} |" for verdict in VERDICTS),
        "",
        "## Right",
        "",
        f"{NEW} greedy tokens are those of stock's forward, the KV cache has its bytes, and the forecast is the "
        "meter's to the byte (bf16, int8, int8 with an int8 KV cache, bf16 split). *logits*: largest difference in "
        "float32, relative to the largest logit; *split*: the same with half of the layers on the CPU; *calibrated*: "
        "the same layer by layer, as `convert` computes it; *int8*: with int8 weights; *not quantised*: matrices that "
        "no quantised format can hold, which stay in 16 bits. Stock's own `generate` gives other positions than its "
        f"forward to {', '.join(others)}.",
        "",
        "| type | attention | logits | split | calibrated | int8 | not quantised |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| {r['type']} | {r['attention']} | {r['logits']:.1g} | {_cell(r['split'])} | "
            f"{_cell(r['layer_by_layer'])} | {r['int8']:.2g} | {r['not_quantised'] or ''} |"
            for r in of["right"]
        ),
    ]
    for verdict, heading in (("wrong", "Wrong"), ("crash", "Crash"), ("refused", "Refused, and why")):
        lines += _reasons(of[verdict], heading)
    return "\n".join(lines + _reasons(of["stock cannot"], "What stock does not run as a text model here")) + "\n"


def _cell(found: float | str) -> str:
    return "refused" if isinstance(found, str) else f"{found:.1g}"


def _reasons(rows: list[dict], heading: str) -> list[str]:
    if not rows:
        return []
    table = [f"| {row['type']} | {row['why'].replace('|', '/')} |" for row in rows]
    return ["", f"## {heading}", "", "| type | reason |", "|---|---|", *table]


if __name__ == "__main__":
    main()
