"""The generation battery: how many of its sixty questions a model answers as it is, and quantised.

    python benchmarks/battery.py --model smollm2-135m --recipes int8 int4 --threads 1

The whole model is asked in bf16 by stock transformers' own forward pass. Each recipe is asked by this library twice:
quantised while loading (rounded to the nearest code), and converted into a directory before (``lowvram convert
--format``, on the library's text). Both are paired with the whole model. All answers are kept, by model, in
results/battery_cpu.json.
"""

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import pandas
import torch
from kept import keep

from lowvram_lab.conversion.convert import convert
from lowvram_lab.engine.load import load
from lowvram_lab.evaluation.battery import battery, battery_context
from lowvram_lab.evaluation.battery_report import Battery
from lowvram_lab.evaluation.fidelity import load_reference
from lowvram_lab.memory.gpu import StandInGpu
from lowvram_lab.model.plan import Plan
from lowvram_lab.model.source import find_source

RESULTS = Path(__file__).parent / "results"


def asked(model: str, recipe: str, whole: Battery) -> Battery:
    """The battery of a model or a converted directory by a uniform plan on the CPU, beside the whole model's."""
    source = find_source(model)
    tokenizer = source.tokenizer()
    plan = Plan.uniform(source.spec(), recipe, context=battery_context(tokenizer)).with_modules("*", device="cpu")
    plan = replace(plan, solver="rtn")
    return battery(load(plan, StandInGpu(None), progress=False), tokenizer, compare=whole, progress=False)


def converted(model: str, recipe: str, whole: Battery) -> Battery:
    """The same of what ``convert`` writes."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / recipe
        convert(model, output, Plan.uniform(find_source(model).spec(), recipe), progress=False)
        return asked(str(output), "stored", whole)


def row(name: str, found: Battery) -> dict:
    """What is printed of a battery."""
    low, high = found.score().interval
    figures = {"weights": name, "passed": found.score().passed, "low": low, "high": high}
    if found.comparison is None:
        return figures
    compared = found.comparison
    return figures | {"lost": len(compared.lost), "gained": len(compared.gained), "p": compared.p_value}


def main() -> None:
    """Measures, prints, writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument(
        "--recipes", nargs="*", default=["int8", "int4"], metavar="FORMAT", help="beside the whole model"
    )
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--output", type=Path, default=RESULTS / "battery_cpu.json")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    source = find_source(args.model)
    tokenizer = source.tokenizer()
    plan = Plan.uniform(source.spec(), "bf16", context=battery_context(tokenizer))
    whole = battery(load_reference(plan, progress=False), tokenizer, progress=False)
    print(whole, flush=True)
    found, rows = {"whole": whole.to_dict()}, [row("whole", whole)]
    for recipe in args.recipes:
        for way, ask in {"while loading": asked, "converted": converted}.items():
            each = ask(args.model, recipe, whole)
            found[f"{recipe} {way}"] = each.to_dict() | {"reference": "whole"}  # whose answers are kept once
            rows.append(row(f"{recipe} {way}", each))
            print(pandas.DataFrame(rows).to_string(index=False), flush=True)
    keep(args.output, args.model, found)


if __name__ == "__main__":
    main()
