"""What the engine costs and keeps: KV caches' fidelity, every family's parity, and decoding beside its own products.

    python benchmarks/engine.py kv        # KL of int8 and int4 caches to the exact one, on a text
    python benchmarks/engine.py parity    # largest logit difference to stock transformers, family by family
    python benchmarks/engine.py products [--layers 40]   # a decoded token of Qwen1.5-4B's shape beside its products

Each part is written into results/engine_cpu.json (or engine_cuda.json) by itself. Speeds beside other engines are
measured by ``lowvram bench``.
"""

import argparse
import json
import statistics
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pandas
import torch
from forecast_accuracy import RandomCheckpoint
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from lowvram_lab.decoding.bind import bind_layer
from lowvram_lab.decoding.lean import LeanDecoder
from lowvram_lab.engine.kv_cache import PreallocatedCache
from lowvram_lab.engine.load import load
from lowvram_lab.machine import facts
from lowvram_lab.memory.gpu import StandInGpu
from lowvram_lab.model.plan import Plan
from lowvram_lab.model.source import find_source
from lowvram_lab.model.spec import ModelSpec
from lowvram_lab.packaged import sample_text

RESULTS = Path(__file__).parent / "results"
SIZES = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "vocab_size": 4096,
         "num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 512}  # fmt: skip
FAMILIES = {
    "Llama": LlamaConfig(**SIZES),
    "Llama, tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "Mistral": MistralConfig(**SIZES, sliding_window=None),
    "Qwen2 (biases)": Qwen2Config(**SIZES),
    "Qwen3 (q and k normed)": Qwen3Config(**SIZES, head_dim=64),
}


@torch.no_grad()
def kv(model: str, text: str | None, windows: int, window: int) -> dict:
    """KL (nats), top-1 agreement and bytes a token of each KV format, beside keys and values as they are."""
    source = find_source(model)
    spec = source.spec()
    words = Path(text).read_text(encoding="utf-8") if text else sample_text()
    ids = torch.tensor(source.tokenizer()(words[: windows * window * 8])["input_ids"])
    parts = ids[: ids.numel() // window * window].view(-1, window)[:windows]
    base = Plan.uniform(spec, "fp32", context=window)
    exact, rows = None, []
    for kv_format in ("fp32", "bf16", "int8", "int4"):
        plan = base if kv_format in ("fp32", "bf16") else replace(base, kv_format=kv_format)
        loaded = load(plan, StandInGpu(None), checkpoint=source.checkpoint(), progress=False)
        found = []
        for part in tqdm(parts, kv_format, leave=False):
            cache = PreallocatedCache(loaded, window)
            if kv_format == "bf16":
                _round_states(cache)
            with loaded.lowvram.gpu.unmetered():
                logits = loaded(part[None], past_key_values=cache, use_cache=True).logits[0]
            found.append(torch.log_softmax(logits.float(), -1))
        if kv_format == "fp32":
            exact = found
            continue
        kl = torch.cat([(e.exp() * (e - f)).sum(-1) for e, f in zip(exact, found, strict=True)])
        same = torch.cat([(e.argmax(-1) == f.argmax(-1)).float() for e, f in zip(exact, found, strict=True)])
        in_16_bits = replace(base, dtype="bf16", kv_format="bf16" if kv_format == "bf16" else kv_format)
        rows.append(
            {
                "kv_format": kv_format,
                "kl_mean": float(kl.mean()),
                "kl_median": float(kl.median()),
                "kl_p99": float(kl.quantile(0.99)),
                "top1_agreement": float(same.mean()),
                "bytes_per_token": in_16_bits.kv_bytes(32768) / 32768,
            }
        )
    return {
        "model": model,
        "text": text or "the library's own",
        "tokens": parts.numel(),
        "window": window,
        "rows": rows,
    }


def _round_states(cache) -> None:
    """Keys and values rounded to bf16 on their way into a cache of float32."""
    update = cache.update
    cache.update = lambda k, v, *args, **kwargs: update(k.bfloat16().float(), v.bfloat16().float(), *args, **kwargs)


@torch.no_grad()
def parity() -> dict:
    """Largest difference of a logit in units of the largest, and greedy tokens equal of 64: float32, random weights."""
    rows = []
    for name, config in FAMILIES.items():
        spec = ModelSpec.from_config(config, name)
        torch.manual_seed(0)
        stock = AutoModelForCausalLM.from_config(spec.pretrained_config(), attn_implementation="sdpa").eval()
        weights = stock.state_dict()
        for tensor in weights.values():
            if tensor.dim() == 2:
                tensor.normal_(std=tensor.shape[1] ** -0.5)
        plan = Plan.uniform(spec, "fp32", context=256)
        model = load(plan, StandInGpu(None), checkpoint=_State(weights), progress=False)
        ids = torch.randint(0, 4096, (1, 48), generator=torch.Generator().manual_seed(1))
        for compiled in (False, True):
            decoder = LeanDecoder(model, compiled=compiled, progress=False)
            found = [decoder.prefill(ids[:, :16])]
            found += [decoder.decode(ids[:, at : at + 1]).clone() for at in range(16, 48)]
            expected = stock(ids).logits[0, 15:]
            difference = float((torch.cat(found) - expected).abs().max() / expected.abs().max())
            text = stock.generate(ids[:, :16], max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0)
            decoder.cache.reset()
            token, said = decoder.prefill(ids[:, :16]).argmax(-1, keepdim=True), []
            while len(said) < 64:
                said.append(int(token))
                token = decoder.decode(token).argmax(-1, keepdim=True)
            equal = sum(a == b for a, b in zip(said, text[0, 16:].tolist(), strict=True))
            rows.append({"family": name, "compiled": compiled, "difference": difference, "greedy_equal_of_64": equal})
    return {"rows": rows}


class _State:
    def __init__(self, weights: dict[str, torch.Tensor]):
        self.weights = weights

    def __contains__(self, name: str) -> bool:
        return name in self.weights

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.weights[name].shape)

    def read(self, name: str) -> torch.Tensor:
        return self.weights[name].clone()


@torch.inference_mode()
def products(model: str, layers: int, lengths: tuple[int, ...], rounds: int, kv_format: str) -> dict:
    """Decoding a token beside the weights' products in it, called by themselves on the same weights, in alternation.

    ``of_bytes`` is a token's time over that of reading weights, keys and values at the rate at which the products read.
    """
    config = find_source(model).config()
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    spec = ModelSpec.from_config(config, model)
    plan = Plan.uniform(spec, "int4", context=max(lengths) + 8)
    plan = replace(plan, kv_format=kv_format, threads=torch.get_num_threads())
    read_bytes = plan.weight_bytes() - plan.module_bytes(spec.module(spec.embedding))
    loaded = load(plan, StandInGpu(None), checkpoint=RandomCheckpoint(spec), progress=True)
    decoder = LeanDecoder(loaded)
    token, calls, rows = torch.ones(1, 1, dtype=torch.long), _products_of(decoder, loaded), []
    for cached in lengths:
        found = {"decode": [], "products": []}
        for turn in range(rounds + 2):
            decoder.cache.holds(cached)
            for name, call in (("decode", lambda: decoder.decode(token)), ("products", calls)):
                started = time.perf_counter()
                call()
                if turn > 1:
                    found[name].append((time.perf_counter() - started) * 1e3)
        shares = [a / b for a, b in zip(found["decode"], found["products"], strict=True)]
        rows.append(
            {
                "cached_tokens": cached,
                "decode_ms": statistics.median(found["decode"]),
                "products_ms": statistics.median(found["products"]),
                "ratio": statistics.median(shares),
                "of_bytes": statistics.median(shares) * read_bytes / (read_bytes + plan.kv_bytes(cached)),
                "least": min(shares),
                "most": max(shares),
            }
        )
    described = {"layers": layers, "threads": torch.get_num_threads(), "compiled": decoder.compiled}
    return {
        "model": model,
        "format": "int4",
        "kv_format": kv_format,
        "weight_bytes": plan.weight_bytes(),
        **described,
        "rows": rows,
    }


def _products_of(decoder: LeanDecoder, model):
    """The very products of ``layer``, in order, with made-up inputs, and the head as the decoder runs it."""
    from lowvram_lab.decoding import llama_layer as module

    layers = zip(model.model.layers, decoder.cache.layers, strict=True)
    bound = [bind_layer(model, block, held) for block, held in layers]
    inputs, config = {}, model.config
    for size in (
        config.hidden_size,
        config.num_attention_heads * model.lowvram.plan.spec.head_dim,
        config.intermediate_size,
    ):
        inputs[size] = torch.randn(1, size)
    kinds = [config.hidden_size, config.num_attention_heads * model.lowvram.plan.spec.head_dim, config.hidden_size,
             config.intermediate_size]  # fmt: skip
    weights = [(shape, module._sorted(shape, tensors)[1]) for shape, tensors in bound]

    def call() -> None:
        for shape, held in weights:
            for size, kernels, tensors in zip(kinds, shape.products, held, strict=True):
                module._multiply(inputs[size], kernels, tensors, None)
        decoder._head(inputs[config.hidden_size])

    return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=("kv", "parity", "products"))
    parser.add_argument("--model", help="smollm2-135m for kv, qwen1.5-4b for products")
    parser.add_argument("--text", help="what to read for kv (the library's own)")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--layers", type=int, default=40)
    parser.add_argument("--cached", type=int, nargs="+", default=[16, 128, 512, 4096])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--kv-format", default="bf16", help="of products: bf16, int8 or int4")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.part == "kv":
        found = kv(args.model or "smollm2-135m", args.text, args.windows, args.window)
    elif args.part == "parity":
        found = parity()
    else:
        found = products(args.model or "qwen1.5-4b", args.layers, tuple(args.cached), args.rounds, args.kv_format)
    print(pandas.DataFrame(found["rows"]).to_string(index=False))
    path = RESULTS / f"engine_{'cuda' if torch.cuda.is_available() else 'cpu'}.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    machine = {"machine": facts(), "date": datetime.now(UTC).date().isoformat()}
    name = args.part if args.part != "products" else f"products, {found['threads']} threads, {args.kv_format} cache"
    path.write_text(json.dumps({**kept, name: {**found, **machine}}, indent=1) + "\n")


if __name__ == "__main__":
    main()
