"""Formats beside other engines: ``lowvram bench`` over formats, prompt lengths, batch sizes and threads, into one JSON.

    python benchmarks/engine_grid.py --model smollm2-135m --formats int3,int4 --threads 1
    python benchmarks/engine_grid.py --model qwen1.5-4b --layers 4 --formats int4,bf16 --threads 2
    python benchmarks/engine_grid.py --model Qwen2.5-0.5B.gguf --formats 70% --converted small/

A format of ours meets llama.cpp on the GGUF type nearest to it, which llama.cpp's own tool quantises from the same
16-bit weights, and the other engines of ``--against``: by default transformers (bf16), and with nf4 bitsandbytes; of a
converted directory llama.cpp alone.
``70%`` is the directory that ``lowvram convert --reduce 70% --own-formats`` makes (``--converted`` names one that is
there); for llama.cpp the original is quantised. With ``--layers`` the model has random weights and so many of its
layers; its name says so. Prompts are of the library's own text.

Every run is kept in ``--output`` by model, format and threads: one of the same name takes the place of an older one, so
that parts can be measured one by one. A run is one paired ``bench``: figures of different runs are not paired.
"""

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from engine_cuda import write_weights

from lowvram_lab.conversion.convert import convert
from lowvram_lab.model.plan import Plan
from lowvram_lab.model.source import find_source
from lowvram_lab.peers.bench import BenchSettings, bench
from lowvram_lab.peers.gguf_file import nearest_type, quantised
from lowvram_lab.peers.result import BenchResult
from lowvram_lab.weights.recipe import WeightBudget

RESULTS = Path(__file__).parent / "results"
FORMATS = ("int3", "int4", "int5", "int8", "bf16", "nf4", "70%")
PEERS = {
    "int4": ("transformers", "llama.cpp"),
    "nf4": ("transformers", "bitsandbytes", "llama.cpp"),
    "70%": ("llama.cpp",),  # stock transformers does not open its own formats, and has no 16 bits of it
}
"""By default; every format that is not here has int4's."""

DIGITS = 5
"""Significant ones that a figure is kept with."""


def with_layers(name: str, layers: int, work: Path) -> Path:
    """A directory of random weights in a model's shape, with so many of its layers, and some tokenizer."""
    of = find_source(name).spec().num_hidden_layers
    folder = work / f"{name}-{layers}-of-{of}-layers-random"
    folder.mkdir(parents=True, exist_ok=True)
    find_source("smollm2-135m").tokenizer().save_pretrained(folder)  # any that is smaller: a GGUF file wants one
    write_weights(name, folder, layers)
    return folder


def converted(model: str, share: str, args: argparse.Namespace) -> Path:
    """The directory of ``--converted``, or one made in ``--work``; a conversion that was killed goes on."""
    if args.converted:
        return args.converted
    folder = args.work / f"{Path(find_source(model).public_name).name}-{share.removesuffix('%')}-percent-less"
    if not (folder / "config.json").exists():
        budget = WeightBudget(reduction=float(share.removesuffix("%")) / 100, stock=args.stock)
        convert(model, folder, budget, solver=args.solver)
    return folder


def measured(model: str, fmt: str, threads: int, args: argparse.Namespace) -> BenchResult:
    """One paired run."""
    settings = BenchSettings(args.prompt_tokens, args.new_tokens, args.rounds, threads, batch_size=args.batch)
    against = args.against or PEERS.get(fmt, PEERS["70%" if fmt.endswith("%") else "int4"])
    subject = converted(model, fmt, args) if fmt.endswith("%") else model
    spec = find_source(subject).spec()
    plan = Plan.uniform(spec, "stored" if fmt.endswith("%") else fmt, context=settings.context)
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        gguf = None
        if "llama.cpp" in against:
            gguf = nearest_type(plan)
            if fmt.endswith("%"):  # a type would be quantised from what is quantised already
                gguf, _ = quantised(find_source(model), gguf, Path(folder))
        return bench(
            str(subject),
            plan=replace(plan, threads=threads),
            against=tuple(against),
            gguf=gguf,
            settings=settings,
        )


def rounded(value):
    """Plain data with its floats in ``DIGITS`` digits."""
    if isinstance(value, dict):
        return {name: rounded(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(each) for each in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def keep(output: Path, name: str, found: BenchResult, layers: int | None) -> None:
    """Writes a run into the file beside those that are there."""
    held = json.loads(output.read_text("utf-8")) if output.exists() else {"benchmark": "engine_grid", "runs": {}}
    held["runs"][name] = {"random_weights": bool(layers), **rounded(found.to_dict())}
    output.write_text(json.dumps(held, indent=1) + "\n", encoding="utf-8")


def numbers(text: str) -> tuple[int, ...]:
    """Whole numbers with commas between them."""
    return tuple(int(part) for part in text.split(","))


def words(text: str) -> tuple[str, ...]:
    """Names with commas between them."""
    return tuple(part.strip() for part in text.split(","))


def main() -> None:
    """Measures run by run, prints each table, keeps each result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m", help="name, hub id, directory or .gguf file")
    parser.add_argument("--layers", type=int, metavar="N", help="random weights, and only so many layers")
    parser.add_argument("--formats", type=words, default=FORMATS, help=",".join(FORMATS).replace("%", "%%"))
    parser.add_argument("--converted", type=Path, metavar="DIR", help="what 70%% is; by default it is made in --work")
    parser.add_argument("--solver", default="gptq", help="of that conversion: gptq, clip or rtn (at once)")
    parser.add_argument("--stock", action="store_true", help="... to what stock transformers opens too")
    parser.add_argument("--prompt-tokens", type=numbers, default=(64, 256, 1024))
    parser.add_argument("--batch", type=numbers, default=(1, 4))
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=numbers, default=(1, 2))
    parser.add_argument("--against", type=words, help="other engines (see above)")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "engine_grid", metavar="DIR")
    parser.add_argument("--output", type=Path, help="where the JSON goes; by default under benchmarks/results/")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    output = args.output or RESULTS / ("engine_grid_cuda.json" if torch.cuda.is_available() else "engine_grid_cpu.json")
    model = str(with_layers(args.model, args.layers, args.work)) if args.layers else args.model
    for threads in args.threads:
        for fmt in args.formats:
            found = measured(model, fmt, threads, args)
            keep(output, f"{found.model}, {fmt}, {threads} thread{'s' if threads > 1 else ''}", found, args.layers)
            print(f"\n{fmt}", found, sep="\n", flush=True)


if __name__ == "__main__":
    main()
