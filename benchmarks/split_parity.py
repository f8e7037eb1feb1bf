"""Does it matter where a layer is? Logits of every split beside the unsplit model's: two architectures, all formats.

Random weights in the models' widths, four layers. Every number of layers on the GPU, with the others in RAM, on disk,
and with their weights brought to the GPU for the prompt; a prompt of 48 tokens and eight more one at a time (the same
ids for all), batch 1 and 3. What is written is the largest difference of a logit over all splits, in units of the
largest logit. Without CUDA both sides run the same CPU kernels and the difference should be nothing at all; on a card
it is that of two kernels' rounding.

    python benchmarks/split_parity.py [--formats bf16,int8,int4]
"""

import argparse
import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pandas
import torch
from forecast_accuracy import SMALL_LAYERS, SMALL_VOCABULARY, RandomCheckpoint, small_spec
from tqdm.auto import tqdm

from lowvram_lab.decoding.decode import ModuleDecoder
from lowvram_lab.engine.load import load, replan
from lowvram_lab.machine import facts
from lowvram_lab.memory.cuda import open_gpu
from lowvram_lab.model.formats import FORMATS
from lowvram_lab.model.plan import Plan
from lowvram_lab.model.source import find_source

RESULTS = Path(__file__).parent / "results"
MODELS = ("smollm2-135m", "qwen1.5-0.5b")
PROMPT, STEPS, BATCHES = 48, 8, (1, 3)


def places(plan: Plan) -> dict[str, Plan]:
    """Every way to split a plan, by name."""
    found = {}
    for count in range(plan.spec.num_hidden_layers):
        split = plan.with_gpu_layers(count)
        found[f"{count} on the GPU"] = split
        found[f"{count} on the GPU, rest on disk"] = plan.with_gpu_layers(
            count, disk=plan.spec.num_hidden_layers - count
        )
        found[f"{count} on the GPU, weights travel"] = replace(split, stream_from=2 * STEPS)
    found["everything on the CPU"] = plan.with_modules("*", device="cpu")
    return found


@torch.no_grad()
def run(model, batch: int) -> dict[str, torch.Tensor]:
    """Logits after a prompt, and of the tokens fed one at a time after it; float32, on the CPU."""
    ids = torch.randint(0, SMALL_VOCABULARY, (batch, PROMPT + STEPS), generator=torch.Generator().manual_seed(0))
    decoder = ModuleDecoder(model, batch_size=batch)
    first = decoder.prefill(ids[:, :PROMPT]).float().cpu()
    steps = [decoder.decode(ids[:, at : at + 1]).float().cpu() for at in range(PROMPT, PROMPT + STEPS)]
    return {"prefill": first, "decode": torch.stack(steps)}


def measure(name: str, fmt: str) -> list[dict]:
    """One row for each batch and phase: the largest difference over all splits, and where it was."""
    spec = small_spec(find_source(name).spec())
    plan = Plan.uniform(spec, fmt, context=64)
    model = load(plan, open_gpu(None), checkpoint=RandomCheckpoint(spec), progress=False)
    whole = {batch: run(model, batch) for batch in BATCHES}
    worst = {(batch, phase): (0.0, "") for batch in BATCHES for phase in whole[batch]}
    for words, split in places(plan).items():
        replan(model, split, progress=False)
        for batch in BATCHES:
            for phase, logits in run(model, batch).items():
                expected = whole[batch][phase]
                difference = float((logits - expected).abs().max() / expected.abs().max())
                difference = float("inf") if difference != difference else difference  # NaN is below nothing
                worst[batch, phase] = max(worst[batch, phase], (difference, words))
    return [
        {"model": name, "format": fmt, "batch": batch, "phase": phase, "largest_difference": value, "where": words}
        for (batch, phase), (value, words) in worst.items()
    ]


def main() -> None:
    """Measures, prints a table, writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--output", type=Path, help="where the JSON goes; by default under benchmarks/results/")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    cases = [(name, fmt) for name in MODELS for fmt in args.formats.split(",")]
    rows = [row for name, fmt in tqdm(cases) for row in measure(name, fmt)]
    result = {
        "benchmark": "split_parity",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": facts(),
        "simulated": not torch.cuda.is_available(),
        "layers": SMALL_LAYERS,
        "splits": 3 * SMALL_LAYERS + 1,
        "prompt_tokens": PROMPT,
        "decoded_tokens": STEPS,
        "rows": rows,
    }
    name = "split_parity_cuda.json" if torch.cuda.is_available() else "split_parity_cpu.json"
    (args.output or RESULTS / name).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if args.json:
        print(json.dumps(result, indent=1))
        return
    table = pandas.DataFrame(rows).assign(case=lambda t: t["phase"] + ", batch " + t["batch"].astype(str))
    table = table.pivot_table(index=["model", "format"], columns="case", values="largest_difference", sort=False)
    print(table.to_string())


if __name__ == "__main__":
    main()
