"""Qwen1.5-4B's shape on a CUDA card capped at 4 GiB, 2048 tokens: peak, tokens a second, share of the card's bandwidth.

    python benchmarks/engine_cuda.py [--model qwen1.5-4b] [--gpu 4GiB] [--context 2048] [--tokens 64]

Random weights. Ours in the planner's choice and in nf4, each in a process of its own, by CUDA graphs and by modules;
beside them transformers with bitsandbytes' nf4, capped likewise and without a cap. The speed is that of the card at
hand, not of a 4 GiB card. Written to results/engine_cuda.json; without CUDA nothing is run.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pandas
import torch
from forecast_accuracy import RandomCheckpoint, runtime

from lowvram_lab.decoding.decode import ModuleDecoder
from lowvram_lab.decoding.lean import decoder_for
from lowvram_lab.engine.load import load
from lowvram_lab.machine import facts
from lowvram_lab.memory.cuda import open_gpu
from lowvram_lab.model.plan import Plan
from lowvram_lab.model.source import find_source
from lowvram_lab.model.spec import ModelSpec
from lowvram_lab.planner.auto import auto_plan
from lowvram_lab.planner.forecast import forecast
from lowvram_lab.planner.profile import Workload

RESULTS = Path(__file__).parent / "results"
WAYS = ("planned", "planned, modules", "nf4", "bitsandbytes, capped", "bitsandbytes")


def bandwidth() -> float:
    """Bytes a second the card copies, read and write counted."""
    block = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    other, best = torch.empty_like(block), 0.0
    for _ in range(20):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        other.copy_(block)
        end.record()
        torch.cuda.synchronize()
        best = max(best, 2 * block.nbytes / (start.elapsed_time(end) / 1e3))
    return best


def timed(step, tokens: int) -> float:
    """Tokens a second; the first of them are not counted: graphs are captured there."""
    for _ in range(8):
        step()
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(tokens - 8):
        step()
    torch.cuda.synchronize()
    return (tokens - 8) / (time.perf_counter() - started)


@torch.no_grad()
def ours(args, way: str) -> dict:
    """The planner's plan, or nf4 with the embedding on the CPU and an int8 KV cache."""
    spec = find_source(args.model).spec()
    reads = bandwidth()
    torch.cuda.empty_cache()
    gpu = open_gpu(args.gpu)
    if way.startswith("nf4"):
        plan = replace(Plan.uniform(spec, "nf4", context=args.context), kv_format="int8")
        plan = plan.with_modules(*{spec.head, *([spec.embedding] if spec.tied else [])}, format="int8")
        plan = plan if spec.tied else plan.with_modules(spec.embedding, device="cpu")
    else:
        plan = auto_plan(spec, gpu, args.context).plan
    workload = Workload(args.context - args.tokens, args.tokens)
    dry = forecast(plan, gpu, workload=workload)
    model = load(plan, gpu, checkpoint=RandomCheckpoint(spec), progress=False)
    gpu.reset_peak()
    decoder = ModuleDecoder(model) if way.endswith("modules") else decoder_for(model, progress=False)
    ids = torch.ones(1, args.context - args.tokens, dtype=torch.long)
    started = time.perf_counter()
    state = [decoder.prefill(ids).argmax(-1, keepdim=True)]
    torch.cuda.synchronize()
    ttft = time.perf_counter() - started

    def step() -> None:
        state[0] = decoder.decode(state[0]).argmax(-1, keepdim=True)

    speed = timed(step, args.tokens)
    moved = plan.weight_bytes("gpu") + plan.kv_bytes(args.context - args.tokens // 2, "gpu")
    return {
        "plan": plan.summary(),
        "decoder": decoder.name,
        "forecast_peak_bytes": dry.peak_allocated_bytes,
        "peak_bytes": torch.cuda.max_memory_allocated(),
        "reserved_bytes": torch.cuda.max_memory_reserved(),
        "ttft_s": ttft,
        "tokens_per_s": speed,
        "bandwidth_share": moved * speed / reads,
    }


def bitsandbytes(args, way: str) -> dict:
    """Stock transformers with its usual 4-bit recipe; ``way`` says whether within the cap."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    reads = bandwidth()
    torch.cuda.empty_cache()
    if way.endswith("capped"):
        open_gpu(args.gpu)
    recipe = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    torch.cuda.reset_peak_memory_stats()
    model = AutoModelForCausalLM.from_pretrained(
        args.weights, quantization_config=recipe, dtype=torch.bfloat16, device_map={"": 0}
    )
    ids = torch.ones(1, args.context - args.tokens, dtype=torch.long, device="cuda")
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "min_new_tokens": 1}
    started = time.perf_counter()
    model.generate(ids, max_new_tokens=1, **options)
    torch.cuda.synchronize()
    ttft = time.perf_counter() - started
    started = time.perf_counter()
    model.generate(ids, **{**options, "max_new_tokens": args.tokens, "min_new_tokens": args.tokens})
    torch.cuda.synchronize()
    speed = (args.tokens - 1) / (time.perf_counter() - started - ttft)
    held = sum(p.nbytes for name, p in model.named_parameters() if "embed_tokens" not in name)
    return {
        "decoder": "transformers generate",
        "peak_bytes": torch.cuda.max_memory_allocated(),
        "reserved_bytes": torch.cuda.max_memory_reserved(),
        "ttft_s": ttft,
        "tokens_per_s": speed,
        "bandwidth_share": held * speed / reads,
    }


def write_weights(model: str, folder: Path, layers: int | None = None) -> None:
    """A directory of random 16-bit weights that ``from_pretrained`` opens, one file a module; once a folder.

    ``layers``: only so many of the model's.
    """
    from safetensors.torch import save_file

    if (folder / "config.json").exists():  # written last
        return
    config = find_source(model).config()
    if layers:
        config.num_hidden_layers = layers
        config.layer_types = (getattr(config, "layer_types", None) or [])[:layers] or None
    spec = ModelSpec.from_config(config, model)
    checkpoint, index = RandomCheckpoint(spec), {}
    for number, module in enumerate(spec.modules):
        names = [f"{module.name}.{key}" for key in module.parameters if not (key == "weight" and module.tied_to)]
        if names:
            file = f"model-{number:05d}.safetensors"
            tensors = {name: checkpoint.read(name).to(torch.bfloat16).contiguous() for name in names}
            save_file(tensors, folder / file, metadata={"format": "pt"})
            index.update(dict.fromkeys(names, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    config.architectures = [type(config).__name__.replace("Config", "ForCausalLM")]
    config.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="qwen1.5-4b")
    parser.add_argument("--gpu", default="4GiB")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS, metavar="WAY", help=f"of {', '.join(WAYS)}")
    parser.add_argument("--weights", type=Path, metavar="DIR", help="keeps the random weights here, for another run")
    parser.add_argument("--output", type=Path, default=RESULTS / "engine_cuda.json", help="where the JSON goes")
    parser.add_argument("--way", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("engine_cuda.py: no CUDA here, so nothing was measured")
        return
    if args.way:
        run = bitsandbytes if args.way.startswith("bitsandbytes") else ours
        print(json.dumps(run(args, args.way)))
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        folder = args.weights or Path(folder)
        if any("bitsandbytes" in way for way in args.ways):
            write_weights(args.model, folder)
        for way in args.ways:
            command = [sys.executable, __file__, *sys.argv[1:], "--way", way, "--weights", str(folder)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                rows.append({"way": way, "failed": (done.stderr.strip().splitlines() or ["no word"])[-1][:300]})
            else:
                rows.append({"way": way, **json.loads(done.stdout.strip().splitlines()[-1])})
            print(rows[-1], flush=True)
    print(pandas.DataFrame(rows).to_string(index=False))
    asked = {"model": args.model, "gpu_budget": args.gpu, "context": args.context, "rows": rows}
    made = {"mode": runtime(), "machine": facts(), "date": datetime.now(UTC).date().isoformat()}
    args.output.write_text(json.dumps({**asked, **made}, indent=1) + "\n")


if __name__ == "__main__":
    main()
