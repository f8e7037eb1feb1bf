"""Tokens, layers and bits chosen together, beside bits alone and slimming alone, at several sizes.

    python benchmarks/slim_to_size.py --model smollm2-135m --sizes 100MiB 80MiB 60MiB

Distances are those of ``Yardstick``, on a text that nothing is fitted to. Kept by model and size in
results/slim_to_size_cpu.json.
"""

import argparse
import tempfile
from pathlib import Path

from kept import keep

from lowvram_lab.slimming.joint import slim_to_size

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Searches, prints, writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--sizes", nargs="+", default=["100MiB", "80MiB", "60MiB"], help="bytes of all weights")
    parser.add_argument("--text", nargs="+", type=Path, help="texts like what the model will read (the library's)")
    parser.add_argument("--output", type=Path, default=RESULTS / "slim_to_size_cpu.json")
    args = parser.parse_args()
    for size in args.sizes:
        with tempfile.TemporaryDirectory() as folder:
            made = slim_to_size(args.model, Path(folder) / "out", size, texts=args.text, progress=False)
        print(made.summary(), made.table.to_string(index=False), sep="\n", flush=True)
        keep(args.output, f"{args.model}, {size}", made.to_dict() | {"output": ""})


if __name__ == "__main__":
    main()
