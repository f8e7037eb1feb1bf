"""Layers left out, measured: cut, repaired and healed, by perplexity, KL and the battery, beside the whole model.

    python benchmarks/slim_layers.py --model smollm2-135m --counts 1 2 3 6 --text wikitext=test.txt

Layers are chosen once, for the largest count; smaller ones take the first of them, as a greedy choice does. Perplexity
and KL to the stock model are of the library's own bilingual text, which nothing is fitted to, and of files that are
named; the battery is paired with the stock model's. Kept by model in results/slim_layers_cpu.json.
"""

import argparse
import tempfile
from pathlib import Path

import pandas
from kept import keep
from texts import add_text_option, named_texts

from lowvram_lab.engine.load import load
from lowvram_lab.evaluation.battery import battery
from lowvram_lab.evaluation.fidelity import fidelity, load_reference
from lowvram_lab.memory.gpu import StandInGpu
from lowvram_lab.model.plan import Plan
from lowvram_lab.model.source import find_source
from lowvram_lab.packaged import calibration_text
from lowvram_lab.slimming.choice import choice_windows, choose_layers
from lowvram_lab.slimming.slim_layers import HEALED, STAGES, TOKENS, slim_layers
from lowvram_lab.weights.calibration import calibration_windows
from lowvram_lab.weights.layerwise import LayerByLayer

RESULTS = Path(__file__).parent / "results"


def chosen(model: str, count: int) -> list[int]:
    """Layers in the order in which they go, by the text and windows that ``slim_layers`` takes."""
    source = find_source(model)
    spec = source.spec()
    ids = calibration_windows(source.tokenizer(), calibration_text(), TOKENS, spec.max_position_embeddings)
    found = choose_layers(LayerByLayer(spec, source.checkpoint()), choice_windows(ids), count)
    print(found.summary(), flush=True)
    return list(found.removed)


def measured(directory: str, reference, whole, texts: dict[str, str], tokens: int) -> dict:
    """A directory's model beside the stock one."""
    source = find_source(directory)
    plan = Plan.uniform(source.spec(), "bf16", context=1024).with_modules("*", device="cpu")
    model, tokenizer = load(plan, StandInGpu(None), progress=False), source.tokenizer()
    found = {}
    for name, text in texts.items():
        each = fidelity(model, reference, tokenizer, text, window=512, tokens=tokens, progress=False)
        found |= {f"{name} perplexity": each.perplexity, f"{name} KL": each.kl_mean}
        found[f"{name} reference perplexity"] = each.reference_perplexity
    asked = battery(model, tokenizer, compare=whole, progress=False)
    return found | {"battery": asked.to_dict()}


def main() -> None:
    """Measures, prints, writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 2, 3, 6], help="layers left out")
    add_text_option(parser)
    parser.add_argument("--tokens", type=int, default=4096, help="read at most so many of each text")
    parser.add_argument("--output", type=Path, default=RESULTS / "slim_layers_cpu.json")
    args = parser.parse_args()
    texts = named_texts(args)
    removed, source = chosen(args.model, max(args.counts)), find_source(args.model)
    plan = Plan.uniform(source.spec(), "bf16", context=1024).with_modules("*", device="cpu")
    reference = load_reference(plan, progress=False)
    whole = battery(reference, source.tokenizer(), progress=False)
    found, rows = {"removed": removed, "battery of the whole": whole.to_dict(), "counts": {}}, []
    for count in args.counts:
        stages = {}
        for stage in STAGES:
            with tempfile.TemporaryDirectory() as folder:
                made = slim_layers(
                    args.model,
                    Path(folder) / stage,
                    removed[:count],
                    stage=stage,
                    referee=stage == HEALED,  # of the best alone: quantising is the same for all three
                    progress=False,
                )
                each = measured(made.output, reference, whole, texts, args.tokens)
                stages[stage] = {"slim": made.to_dict(), **each}
            figures = {name: value for name, value in each.items() if isinstance(value, float)}
            rows.append({"layers": count, "stage": stage, **figures, "seconds": made.seconds})
            print(pandas.DataFrame(rows).to_string(index=False), flush=True)
        found["counts"][str(count)] = stages
    keep(args.output, args.model, found)


if __name__ == "__main__":
    main()
