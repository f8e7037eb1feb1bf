"""GGUF files run as they are: bytes beside the file's, and how far that is from the file read by stock transformers.

    python benchmarks/gguf_files.py SmolLM2-135M-Instruct.Q4_1.gguf qwen2.5-coder-0.5b-instruct-q4_k_m.gguf

KL and the share of equal most likely tokens, both models in float32 and both with activations in bfloat16, on the
library's own bilingual text or a file. And of stock transformers in bfloat16 beside itself in float32: what that
dtype's rounding costs, whatever weights are held in. Kept by the names of file and text in
results/gguf_files_cpu.json.
"""

import argparse
import math
from collections import Counter
from pathlib import Path

import pandas
from kept import keep

from lowvram_lab.engine.load import load
from lowvram_lab.evaluation.fidelity import fidelity, load_reference
from lowvram_lab.memory.gpu import StandInGpu
from lowvram_lab.model.plan import Plan
from lowvram_lab.model.source import find_source
from lowvram_lab.packaged import sample_text
from lowvram_lab.repository.gguf_header import read_gguf_header, row_bytes
from lowvram_lab.units import MiB

RESULTS = Path(__file__).parent / "results"
DTYPES = ("fp32", "bf16")
STOCK = "stock bf16 to fp32"


def bytes_by_type(path: Path) -> dict[str, int]:
    """Bytes of a file's tensors, by GGML's names of their types."""
    header, found = read_gguf_header(path), Counter()
    for name, shape in header.tensors.items():
        found[header.type_name(name)] += math.prod(shape[:-1]) * row_bytes(name, shape, header.places[name].kind)
    return dict(found)


def measured(path: Path, text: str, tokens: int) -> dict:
    """One file's figures."""
    source = find_source(path)
    spec, types = source.spec(), bytes_by_type(path)
    size = Plan.uniform(spec, "stored", context=1024).weight_bytes()
    formats = Counter(spec.held.values())
    found = {"types": types, "file_bytes": sum(types.values()), "formats": dict(formats), "weight_bytes": size}
    references = {}

    def compare(model, reference):
        return fidelity(model, reference, source.tokenizer(), text, tokens=tokens, progress=False).to_dict()

    for dtype in DTYPES:
        plan = Plan.uniform(spec, "stored", context=1024, dtype=dtype).with_modules("*", device="cpu")
        references[dtype] = load_reference(plan, progress=False)
        found[dtype] = compare(load(plan, StandInGpu(None), progress=False), references[dtype])
    found[STOCK] = compare(references["bf16"], references["fp32"])
    return found


def main() -> None:
    """Measures, prints, writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--text", type=Path, help="by default the library's own")
    parser.add_argument("--tokens", type=int, default=4096, help="read at most so many")
    parser.add_argument("--output", type=Path, default=RESULTS / "gguf_files_cpu.json")
    args = parser.parse_args()
    text, rows = args.text.read_text(encoding="utf-8") if args.text else sample_text(), []
    for path in args.files:
        found = measured(path, text, args.tokens)
        keep(args.output, f"{path.name}, {args.text.stem if args.text else 'bilingual'}", found)
        row = {"file": path.name, "file MiB": found["file_bytes"] / MiB, "here MiB": found["weight_bytes"] / MiB}
        for each in (*DTYPES, STOCK):
            row |= {f"KL {each}": found[each]["kl_mean"], f"top-1 {each}": found[each]["top1_agreement"]}
        rows.append(row)
        print(pandas.DataFrame(rows).to_string(index=False), flush=True)


if __name__ == "__main__":
    main()
