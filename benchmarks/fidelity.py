"""Size against fidelity of quantised models: our recipes beside uniform plans, bitsandbytes, HQQ and llama.cpp.

Every candidate becomes float32 weights of one and the same transformers model and is measured by the same function:
only the weights differ. What runs them in earnest is left out, such as a kernel's rounding or llama.cpp's 8-bit
activations. Needs models and texts that are no part of this project; see README.md. Each figure is kept as soon as it
is known (``--work``): a later run makes only what is missing, or what a change of the solvers can have changed.

    python benchmarks/fidelity.py [--model stories15M|smollm2-135m|both] [--split validation|test] [--quick]
"""

import argparse
import functools
import hashlib
import json
import logging
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import fidelity_peers as peers
import fidelity_report as report
import gguf_peer
import torch
from fidelity_ours import Ours, note_code
from fidelity_subject import SMOLLM, STORIES, Subject, channel_power, open_subject, score

from lowvram_lab.errors import BudgetError
from lowvram_lab.files import write_atomically
from lowvram_lab.weights.recipe import Recipe

SHARED = Path(__file__).parents[2] / "shared"
GROUP = {STORIES: 96, SMOLLM: 64}
REDUCTIONS = (0.6, 0.7)
KERNEL_FORMATS = ("int8", "int4", "int4-g32", "int4-g128", "int4-g256")
GRID_FORMATS = (
    *("bf16", "int8", "int4", "int4-g192", "int4-g256"),
    *(f"int{bits}{group}" for bits in (6, 5, 3, 2) for group in ("", "-g32", "-g192", "-g256")),
)
"""smollm2-135m's weights lie on a grid of 16 levels in groups of 32: our 4-bit formats of that group are left out."""

LLAMA_FILES = {
    STORIES: (
        "Q8_0",
        "Q6_K",
        "Q5_K_M",
        "Q5_0",
        "Q4_K_M",
        "Q4_K_S",
        "Q4_1",
        "Q4_0",
        "IQ4_NL",
        "Q3_K_M",
        "Q3_K_S",
        "Q2_K",
    ),
    SMOLLM: ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "IQ4_NL", "Q3_K_M", "Q2_K"),
}
LLAMA_SMALL = {
    STORIES: (
        "Q4_1 embeddings Q4_1",
        "Q3_K_M embeddings IQ4_NL",
        "Q4_0 embeddings Q4_0",
        "IQ4_NL embeddings IQ4_NL",
        "IQ3_XXS embeddings IQ4_NL",
        "IQ3_XXS embeddings MXFP4",
    ),
    SMOLLM: (
        "Q3_K_M embeddings IQ4_NL",
        "Q4_0 embeddings Q4_0",
        "IQ4_NL embeddings IQ4_NL",
        "IQ3_XXS embeddings MXFP4",
    ),
}
"""smollm2-135m goes without Q4_1, the very grid its weights were written on."""

UNIFORM = {STORIES: ("int4-g96", "int3-g96", "int3-g32", "int4-g32", "int5-g96"), SMOLLM: ("int4",)}
"""Uniform plans; three bits are too few for a model that was written in four."""

SIZES = {STORIES: 6, SMOLLM: 2}
"""Of the sizes between 3 and 5 bits a weight that llama.cpp's files have, how many get a recipe of ours."""


@dataclass(frozen=True)
class Built:
    """A candidate's weights by module, its bytes in memory and, where they differ, in files, and remarks."""

    weights: dict[str, torch.Tensor]
    weight_bytes: int
    file_bytes: int | None = None
    notes: dict = field(default_factory=dict)


class Bench:
    """Measures candidates of one subject, each once.

    Attributes:
        subject: The model and its texts.
        rows: What was measured, in order.
    """

    def __init__(self, subject: Subject, work: Path):
        self.subject, self.work, self.rows = subject, work, []
        (work / "rows").mkdir(exist_ok=True)

    def row(self, name: str, family: str, identity: str, build: Callable[[], Built]) -> dict:
        """A candidate's row, kept or made.

        Args:
            name: Shown.
            family: One of ``report.FAMILIES``.
            identity: What the weights depend on beside the model.
            build: Makes them.
        """
        key = hashlib.sha256(f"{family}|{identity}|{self.subject.evaluation}".encode()).hexdigest()[:16]
        path = self.work / "rows" / f"{key}.json"
        if not path.exists():
            began = time.perf_counter()
            try:
                row = self._measured(build())
            except BudgetError as error:
                row = {"failed": str(error)}
            row["seconds"] = round(time.perf_counter() - began, 1)
            write_atomically(path, json.dumps(row))
        row = {"name": name, "family": family, **json.loads(path.read_text(encoding="utf-8"))}
        self.rows.append(row)
        print(f"  {report.line(row)}", file=sys.stderr, flush=True)
        return row

    def _measured(self, built: Built) -> dict:
        found, windows = score(self.subject, built.weights, built.weight_bytes)
        return {
            "weight_bytes": built.weight_bytes,
            "file_bytes": built.file_bytes or built.weight_bytes,
            "bits_per_weight": built.weight_bytes * 8 / self.subject.spec.num_parameters,
            "share_of_fp16": built.weight_bytes / self.subject.fp16_bytes,
            **found.to_dict(),
            "perplexity_percent": 100 * found.perplexity_increase,
            "kl_error": statistics.stdev(windows) / math.sqrt(len(windows)) if len(windows) > 1 else None,
            "kl_by_window": [round(value, 7) for value in windows],
            "notes": built.notes,
        }


def run_plain(bench: Bench, quick: bool) -> None:
    """16 bits, round to nearest, bitsandbytes, HQQ: no data needed."""
    weights, group = bench.subject.weights, GROUP[bench.subject.name]
    suffix = "" if group == 64 else f"-g{group}"

    def each(name: str, family: str, package: str | None, make: Callable, keep=(), identity="") -> None:
        if package and (why := peers.absent(package)):
            bench.rows.append({"name": name, "family": family, "failed": f"absent: {why}"})
        else:
            bench.row(name, family, f"{name} {identity}", lambda: Built(*peers.each(weights, make(), keep)))

    for bits in (8, 4, 3)[: 2 if quick else 3]:
        fmt = "int8" if bits == 8 else f"int{bits}{suffix}"
        each(f"RTN {fmt}", report.RTN, None, functools.partial(peers.rounded, fmt))
    embedding = (bench.subject.spec.embedding,)
    version = _version("bitsandbytes")
    each("nf4, 16-bit embedding", report.NF4, "bitsandbytes", peers.nf4, embedding, version)
    each("nf4 everywhere", report.NF4, "bitsandbytes", peers.nf4, identity=version)
    double = functools.partial(peers.nf4, True)
    each("nf4 everywhere, double", report.NF4, "bitsandbytes", double, identity=version)
    for bits in (4, 3):
        make = functools.partial(peers.hqq, bits, group)
        each(f"HQQ {bits} bits, g{group}, everywhere", report.HQQ, "hqq", make, identity=_version("hqq"))


def run_llama(bench: Bench, quick: bool) -> None:
    """llama.cpp's files: its defaults, those with a small embedding, and the latter with an importance matrix."""
    if why := gguf_peer.absent():
        bench.rows.append({"name": "llama.cpp", "family": report.LLAMA, "failed": f"absent: {why}"})
        return
    spec, weights = bench.subject.spec, bench.subject.weights
    source = bench.work / "float32.gguf"
    if not source.exists():
        gguf_peer.write_float_gguf(source, spec.pretrained_config(), weights)
    importance = functools.cache(lambda: channel_power(bench.subject))
    small = [name for name in LLAMA_SMALL[bench.subject.name] if not quick or "IQ4_NL" in name]
    named = [(name, report.LLAMA) for name in (LLAMA_FILES[bench.subject.name] if not quick else ("Q4_0",))]
    named += [(name, report.SMALL) for name in small]
    named += [(f"{name}+imatrix", report.IMATRIX) for name in small if not quick]
    for name, family in named:

        def build(name=name, matrix=family == report.IMATRIX) -> Built:
            found = gguf_peer.quantise(source, name, list(weights), importance() if matrix else None)
            return Built(found.weights, found.tensor_bytes, notes={"types": found.types, "embedding": found.embedding})

        bench.row(name.replace(" embeddings ", ", emb. "), family, f"{name} {_version('llama_cpp_python')}", build)


def run_ours(bench: Bench, quick: bool) -> None:
    """Recipes at the bytes of uniform plans, at the promised reductions and at the bytes of llama.cpp's files."""
    text = bench.subject.calibration
    ours = Ours(bench.subject, bench.work, text)
    own = {"stock": False, "formats": GRID_FORMATS if bench.subject.name == SMOLLM else None}

    def planned(name: str, family: str, make: Callable[[], Recipe], ours: Ours = ours) -> dict | None:
        try:
            found = make()
        except BudgetError as error:
            reason = str(error).replace(bench.subject.spec.name, bench.subject.name)  # which may be a path
            bench.rows.append({"name": name, "family": family, "failed": reason})
            return None

        def build() -> Built:
            weights, file_bytes, notes = ours.convert(found)
            notes |= {"estimated_kl": found.estimated_kl}
            return Built(weights, found.weight_bytes, file_bytes, notes)

        return bench.row(name, family, f"{found.plan.digest} {ours.made_from}", build)

    def from_recipe(name: str, family: str, weight_bytes: int, ours: Ours = ours, **choices) -> dict | None:
        return planned(name, family, lambda: ours.recipe(weight_bytes, **choices), ours)

    for fmt in UNIFORM[bench.subject.name][: 1 if quick else None]:
        uniform = ours.uniform(fmt)
        planned(f"uniform {fmt}", report.UNIFORM, lambda uniform=uniform: uniform)
        from_recipe(f"allocated, bytes of uniform {fmt}", report.OWN, uniform.weight_bytes, **own)
    for reduction in () if quick else REDUCTIONS:
        size = int(bench.subject.fp16_bytes * (1 - reduction))
        from_recipe(f"-{reduction:.0%}, own formats", report.OWN, size, **own)
        from_recipe(f"-{reduction:.0%}, stock transformers", report.STOCK, size, stock=True, formats=own["formats"])
        kernels = tuple(f for f in KERNEL_FORMATS if f != "int4-g32" or bench.subject.name != SMOLLM)
        from_recipe(f"-{reduction:.0%}, formats with a kernel", report.KERNEL, size, stock=False, formats=kernels)
    if bench.subject.name == SMOLLM and text and not quick:  # the last reduction, the hard one, on other text
        plain = Ours(bench.subject, bench.work, None)
        from_recipe(f"-{reduction:.0%}, the library's text", report.OTHER, size, plain, **own)
    for size in () if quick else llama_sizes(bench.rows, SIZES[bench.subject.name]):
        bits = size * 8 / bench.subject.spec.num_parameters
        from_recipe(f"{bits:.2f} bits, own formats", report.OWN, size, **own)


def llama_sizes(rows: list[dict], count: int) -> list[int]:
    """Some sizes of llama.cpp's files between 3 and 5 bits, the ends included; of those within 0.5 % the least."""
    distinct: list[int] = []
    for row in sorted(report.in_range(rows), key=lambda row: row["weight_bytes"]):
        if not distinct or row["weight_bytes"] > distinct[-1] * 1.005:
            distinct.append(row["weight_bytes"])
    if len(distinct) <= count:
        return distinct
    return [distinct[round(index * (len(distinct) - 1) / (count - 1))] for index in range(count)]


def run_subject(name: str, options) -> dict:
    """All candidates of one model."""
    work = options.work / name
    work.mkdir(parents=True, exist_ok=True)
    print(f"{name}: opening, {options.split}, {options.tokens} tokens", file=sys.stderr, flush=True)
    bench = Bench(open_subject(name, options, work), work)
    bench.row("bf16", report.FLOAT, "bf16", lambda: _in_bf16(bench.subject))
    for step in (run_plain, run_llama, run_ours):
        step(bench, options.quick)
    return report.run(bench.subject, bench.rows, options)


def _in_bf16(subject: Subject) -> Built:
    return Built({name: weight.bfloat16().float() for name, weight in subject.weights.items()}, subject.fp16_bytes)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def main(arguments: list[str] | None = None) -> int:
    """Measures, prints tables and comparisons, adds the runs to the JSON and draws the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=(STORIES, SMOLLM, "both"), default="both")
    parser.add_argument("--split", choices=("validation", "test"), default="validation")
    parser.add_argument("--tokens", type=int, default=16384, help="to evaluate on")
    parser.add_argument("--stories", type=Path, default=SHARED / "models" / STORIES, metavar="DIR")
    parser.add_argument("--wikitext", type=Path, default=SHARED / "data" / "wikitext-2-raw", metavar="DIR")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "lowvram-fidelity", metavar="DIR")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="a few candidates; writes no results")
    parser.add_argument("--output", type=Path, default=report.RESULTS / "fidelity.json")
    options = parser.parse_args(arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.set_num_threads(options.threads)
    note_code()
    runs = {}
    for name in (STORIES, SMOLLM) if options.model == "both" else (options.model,):
        runs[f"{name} {options.split}"] = run_subject(name, options)
        report.print_run(runs[f"{name} {options.split}"])
    if not options.quick:
        everything = report.save(options.output, runs)
        report.draw(everything, options.split, options.output.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
