"""What converting a model takes, whether it survives ``kill -9``, and what opening the result takes.

Four questions, each asked of fresh processes: (1) peak resident memory of ``lowvram convert``, beside four times the
largest tensor + 600 MiB; (2) is a conversion that was killed at random points and resumed equal to an uninterrupted
one, byte by byte; (3) resident memory while loading the result, peak over final; (4) load times: the result and the
original with this library, and both with stock transformers, in alternation.

    python benchmarks/convert.py [--model smollm2-135m] [--reduce 70%] [--kills 10] [--repeats 3] [--work DIR] [--json]
"""

import argparse
import hashlib
import json
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import pandas

from lowvram_lab.machine import facts
from lowvram_lab.model.source import find_source
from lowvram_lab.units import MiB

RESULTS = Path(__file__).parent / "results" / "convert_cpu.json"

LOADERS = {
    "lowvram_lab": """
from lowvram_lab import ModelSpec, Plan, find_source, load, open_gpu, watch_host
import lowvram_lab.engine.load, lowvram_lab.chat.session, transformers.models.llama.modeling_llama
source = find_source(name)
spec = source.spec(name)
plan = Plan.uniform(spec, "stored" if spec.stored else "bf16").with_modules("*", device="cpu")
start = time.perf_counter()
with watch_host() as host:
    model = load(plan, open_gpu(), progress=False)
seconds = time.perf_counter() - start
""",
    "transformers": """
from transformers import AutoModelForCausalLM
import transformers.models.llama.modeling_llama, compressed_tensors
from lowvram_lab import find_source, watch_host
name = str(find_source(name).fetch())
start = time.perf_counter()
with watch_host() as host:
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16)
seconds = time.perf_counter() - start
""",
}
FIRST = "import sys, time, json, torch; name = sys.argv[1]\n"
LAST = """
print(json.dumps({"seconds": seconds, "before": host.before_rss_bytes, "peak": host.peak_rss_bytes,
                  "after": host.after_rss_bytes}))
"""


def convert(model: str, reduce: str, output: Path, kill_after: float | None = None) -> dict | None:
    """Runs ``lowvram convert``; killed after so many seconds, if it is still running, it returns None."""
    command = [sys.executable, "-m", "lowvram_lab.cli.main", "convert", "--input", model, "--output", str(output)]
    process = subprocess.Popen(
        [*command, "--reduce", reduce, "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        out, err = process.communicate(timeout=kill_after)
    except subprocess.TimeoutExpired:
        process.kill()  # SIGKILL
        process.communicate()
        return None
    if process.returncode:
        raise SystemExit(err)
    return json.loads(out)


def hashes(directory: Path) -> dict[str, str]:
    """SHA-256 of every file."""
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(directory.iterdir())}


def survive_kills(model: str, reduce: str, work: Path, kills: int, seconds: float) -> tuple[int, dict[str, str]]:
    """Converts with ``kills`` kills at random moments; the number that really hit, and the hashes."""
    output, draw, hit = work / "killed", random.Random(0), 0
    shutil.rmtree(output, ignore_errors=True)
    while not output.exists():
        # each try goes on where the last was killed: so the moments are spread over a whole run
        delay = draw.uniform(0.02, 0.2) * seconds if hit < kills else None
        if convert(model, reduce, output, delay) is None:
            hit += 1
            print(f"killed after {delay:.0f} s ({hit} of {kills})", file=sys.stderr)
    return hit, hashes(output)


def time_loads(names: dict[str, str], repeats: int) -> list[dict]:
    """Median load times and resident memory, a fresh process each, in alternation."""
    found: dict[tuple[str, str], list[dict]] = {}
    for _ in range(repeats):
        for loader, code in LOADERS.items():
            for what, name in names.items():
                result = subprocess.run(
                    [sys.executable, "-c", FIRST + code + LAST, name], capture_output=True, text=True, check=True
                )
                found.setdefault((loader, what), []).append(json.loads(result.stdout.splitlines()[-1]))
    return [
        {
            "loader": loader,
            "model": what,
            "seconds": statistics.median(run["seconds"] for run in runs),
            "peak_rss_mib": statistics.median(run["peak"] for run in runs) / MiB,
            "final_rss_mib": statistics.median(run["after"] for run in runs) / MiB,
            "peak_over_final": statistics.median(run["peak"] / run["after"] for run in runs),
        }
        for (loader, what), runs in found.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--reduce", default="60%")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--work", type=Path, help="keep the directories made here (a temporary one)")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    work = args.work or Path(tempfile.mkdtemp())
    work.mkdir(parents=True, exist_ok=True)
    source = find_source(args.model)
    spec = source.spec()
    checkpoint = source.checkpoint()
    largest = max(checkpoint.read(name).nbytes for name in checkpoint)
    whole = work / "whole"
    shutil.rmtree(whole, ignore_errors=True)
    start = time.monotonic()
    made = convert(args.model, args.reduce, whole)
    seconds = time.monotonic() - start
    hit, found = (0, None) if not args.kills else survive_kills(args.model, args.reduce, work, args.kills, seconds)
    result = {
        "benchmark": "convert",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": facts(),
        "model": args.model,
        "parameters": spec.num_parameters,
        "convert": {key: value for key, value in made.items() if key != "output"},
        "seconds": seconds,
        "peak_rss_mib": made["peak_rss_bytes"] / MiB,
        "rss_bound_mib": (4 * largest + 600 * MiB) / MiB,
        "kills": hit,
        "same_bytes_after_kills": found == hashes(whole) if found else None,
        "loads": time_loads({"original": args.model, "converted": str(whole)}, args.repeats),
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if args.json:
        print(json.dumps(result, indent=1))
        return
    print(f"convert: {seconds:.0f} s, peak RSS {result['peak_rss_mib']:.0f} MiB (bound {result['rss_bound_mib']:.0f})")
    print(f"killed {hit} times and resumed: same bytes: {result['same_bytes_after_kills']}")
    print(pandas.DataFrame(result["loads"]).round(2).to_string(index=False))


if __name__ == "__main__":
    main()
