"""What it costs to have layers off the GPU: ours (they compute on the CPU) beside accelerate's (their weights travel).

At each share of layers off the GPU: tokens a second while decoding, seconds of a prompt, and the bytes that cross for a
token. Ours counts what ``Gpu.move`` moved; accelerate's is counted where its hooks put a weight on the device.
Without CUDA the "GPU" is this CPU, so accelerate's weights are copied within RAM: the bytes are what a card
would see, its speed is not. Figures are medians over rounds; in each round all ways run once, in alternation.

    python benchmarks/offload.py [--model smollm2-135m] [--format int4] [--prompt 128] [--tokens 24] [--repeats 3]
    python benchmarks/offload.py --model qwen1.5-0.5b --weights DIR       # random weights: nothing is fetched
"""

import argparse
import json
import statistics
import time
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import accelerate.hooks
import pandas
import torch
from accelerate.hooks import attach_align_device_hook
from engine_cuda import write_weights
from forecast_accuracy import RandomCheckpoint
from transformers import AutoModelForCausalLM, DynamicCache

from lowvram_lab.decoding.lean import decoder_for
from lowvram_lab.engine.load import load, replan
from lowvram_lab.machine import facts
from lowvram_lab.memory.cuda import open_gpu
from lowvram_lab.model.plan import Plan
from lowvram_lab.model.source import find_source
from lowvram_lab.model.spec import ModelSpec
from lowvram_lab.planner.measure import run_speed
from lowvram_lab.planner.profile import Workload

RESULTS = Path(__file__).parent / "results"
SHARES = (0.25, 0.5, 0.75, 1.0)


class Ours:
    """A plan's model; ``off`` layers compute on the CPU."""

    def __init__(self, spec: ModelSpec, checkpoint, fmt: str, context: int, threads: int):
        plan = Plan.uniform(spec, fmt, context=context)
        self.name, self.spec, self.plan = f"ours, {fmt}", spec, replace(plan, threads=threads)
        self.model = load(self.plan, open_gpu(None), checkpoint=checkpoint, progress=False)

    def place(self, off: int) -> None:
        """Puts so many layers on the CPU."""
        replan(self.model, self.plan.with_gpu_layers(self.spec.num_hidden_layers - off), progress=False)

    def speed(self, workload: Workload) -> tuple[float, float]:
        """Seconds to the first token, tokens a second after it."""
        found = run_speed(self.model, workload)
        return found.ttft_s, found.decode_tokens_per_s

    def bytes_per_token(self) -> float:
        """Bytes that crossed for one decoded token."""
        gpu, tokens = self.model.lowvram.gpu, 4
        decoder, token = decoder_for(self.model, 32), torch.ones(1, 1, dtype=torch.long)
        decoder.prefill(token.expand(1, 16))
        before = sum(gpu.recording.transfers.values())
        for _ in range(tokens):
            decoder.decode(token)
        return (sum(gpu.recording.transfers.values()) - before) / tokens


class Accelerate:
    """The stock model in bf16; weights of ``off`` layers are kept aside and put in place for every forward."""

    name = "accelerate hooks, bf16"

    def __init__(self, directory: Path):
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).eval().to(self.device)

    def place(self, off: int) -> None:
        """Hooks so many layers; those hooked before are given their weights back."""
        for index, layer in enumerate(self.model.model.layers):
            accelerate.hooks.remove_hook_from_submodules(layer)
            if index < off:
                weights = {name: value.cpu().clone() for name, value in layer.state_dict().items()}
                attach_align_device_hook(layer, self.device, offload=True, weights_map=weights)

    @torch.no_grad()
    def speed(self, workload: Workload) -> tuple[float, float]:
        """See ``Ours``."""
        ids, cache = torch.ones(1, workload.prompt_tokens, dtype=torch.long, device=self.device), DynamicCache()
        started = time.perf_counter()
        token = self.model(ids, past_key_values=cache, logits_to_keep=1).logits[:, -1].argmax(-1, keepdim=True)
        int(token)
        first = time.perf_counter()
        for _ in range(workload.new_tokens):
            token = self.model(token, past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True)
            int(token)
        return first - started, workload.new_tokens / (time.perf_counter() - first)

    @torch.no_grad()
    def bytes_per_token(self) -> float:
        """See ``Ours``; hidden states, which these hooks leave where they are, are not in it."""
        with _counted_weights() as count:
            self.model(torch.ones(1, 1, dtype=torch.long, device=self.device))
        return float(sum(count))


@contextmanager
def _counted_weights():
    """Notes the bytes of every weight that accelerate's hooks put on the execution device."""
    real, count = accelerate.hooks.set_module_tensor_to_device, []

    def counted(module, name, device, value=None, **rest):
        if value is not None and torch.device(device).type != "meta":
            count.append(value.nbytes)
        return real(module, name, device, value=value, **rest)

    accelerate.hooks.set_module_tensor_to_device = counted
    try:
        yield count
    finally:
        accelerate.hooks.set_module_tensor_to_device = real


def main() -> None:
    """Measures, prints a table, writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--format", default="int4")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--shares", type=float, nargs="+", default=(0.0, *SHARES), help="of the layers, off the GPU")
    parser.add_argument("--weights", type=Path, metavar="DIR", help="random weights, kept here for another run")
    parser.add_argument("--output", type=Path, help="where the JSON goes; by default under benchmarks/results/")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    source = find_source(args.model)
    spec = source.spec()
    workload = Workload(args.prompt, args.tokens)
    if args.weights:
        write_weights(args.model, args.weights)
    checkpoint = RandomCheckpoint(spec) if args.weights else source.checkpoint()
    context = args.prompt + args.tokens
    formats = list(dict.fromkeys(("bf16", args.format)))
    ways = [Ours(spec, checkpoint, fmt, context, args.threads) for fmt in formats] + [
        Accelerate(args.weights or source.fetch())
    ]
    rows = []
    for share in args.shares:
        off = round(share * spec.num_hidden_layers)
        for way in ways:
            way.place(off)
            way.speed(Workload(8, 2))
        timings: dict[str, list] = {way.name: [] for way in ways}
        for _ in range(args.repeats):
            for way in ways:
                timings[way.name].append(way.speed(workload))
        for way in ways:
            first, each = (statistics.median(column) for column in zip(*timings[way.name], strict=True))
            crossing = way.bytes_per_token()
            rows.append((f"{share:.0%}", off, way.name, first, each, crossing))
    columns = ["off the GPU", "layers", "way", "prompt_s", "tokens_per_s", "bytes_per_token"]
    table = pandas.DataFrame(rows, columns=columns)
    result = {
        "benchmark": "offload",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": facts(),
        "model": args.model,
        "random_weights": bool(args.weights),
        "threads": args.threads,
        "prompt_tokens": args.prompt,
        "new_tokens": args.tokens,
        "simulated": not torch.cuda.is_available(),
        "rows": table.to_dict("records"),
    }
    name = "offload_cuda.json" if torch.cuda.is_available() else "offload_cpu.json"
    (args.output or RESULTS / name).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if args.json:
        print(json.dumps(result, indent=1))
        return
    shown = table.assign(kib_per_token=(table["bytes_per_token"] / 1024).round(1)).drop(columns="bytes_per_token")
    print(shown.round({"prompt_s": 3, "tokens_per_s": 1}).to_string(index=False))


if __name__ == "__main__":
    main()
