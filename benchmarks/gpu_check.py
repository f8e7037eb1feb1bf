"""Everything that only a CUDA card can answer, in one run of at most nine minutes, into one JSON.

    make gpu-check          or, in any environment that has the packages:  python benchmarks/gpu_check.py

Each part is a process of its own with a time of its own; one that fails or is not reached is named at the end, and
the others go on. Nothing is downloaded: models are random weights in real shapes. The script is rehearsed on the fake
CUDA runtime of tests/fakecuda (``--small``): bytes and counts mean something there; times are left out.
"""

import argparse
import gzip
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from forecast_accuracy import NOTES, machine, runtime

from lowvram_lab.machine import facts
from lowvram_lab.units import GiB

HERE = Path(__file__).parent
RESULTS = HERE / "results"
SECONDS = 530  # for all parts; what ends them and writes the file is within nine minutes too
LEAST_SECONDS = 15  # a part is not begun with less
WHOLE_4B = 24 * GiB  # of a card on which Qwen1.5-4B is measured in 16 bits too, beside its copies
SAID_LINES = 12


@dataclass(frozen=True)
class Part:
    """One question to the card.

    Attributes:
        name: Its key in the JSON.
        seconds: The most it may take.
        arguments: What Python is called with; ``{output}`` and ``{weights}`` stand for a file and a folder.
        words: Reads its result and says it in a line.
    """

    name: str
    seconds: int
    arguments: tuple[str, ...]
    words: Callable[[dict], str]


def parts(small: bool, model: str) -> list[Part]:
    """What is asked, the most important first."""
    random = ("--model", model, "--weights", "{weights}")
    few = ("--context", "256", "--tokens", "16") if small else ()
    shapes = ("--small",) if small else ()
    rated = "smollm2-135m" if small else "qwen1.5-0.5b"
    pytest = ("-m", "pytest", "-q", "-m", "gpu", "--tb=short", "-p", "no:cacheprovider", "--assert=plain")
    half = ("--shares", "0.5", "--repeats", "2")
    return [
        _script("forecast", 130, _forecast_words, "forecast_accuracy", "--deadline", "{seconds}", *shapes),
        _script("trace", 45, _trace_words, "allocation_trace"),
        Part("tests", 150, (*pytest, "--junitxml={output}", *_marked_files()), _tests_words),
        _script("speed", 150, _speed_words, "engine_cuda", *random, *few),
        _script("offload", 90, _offload_words, "offload", *random, *half),
        _script("rates", 100, _rates_words, "speed_forecast", "--model", rated, "--random", "--runs", "1"),
        _script("parity", 60, _parity_words, "split_parity", "--formats", "bf16,int8,int4,nf4"),
    ]


def _script(name: str, seconds: int, words: Callable[[dict], str], script: str, *arguments: str) -> Part:
    return Part(name, seconds, (str(HERE / f"{script}.py"), *arguments, "--output", "{output}"), words)


def _marked_files() -> list[str]:
    """The files with ``gpu`` tests: the others may want packages that this environment does without."""
    files = sorted((HERE.parent / "tests").rglob("test_*.py"))
    return [str(file) for file in files if "pytest.mark.gpu" in file.read_text(encoding="utf-8")]


def run_part(part: Part, seconds: float, weights: Path) -> dict:
    """Runs a part; whatever happens to it, a row."""
    with tempfile.TemporaryDirectory() as folder:
        output, said = Path(folder) / "result", Path(folder) / "said"
        places = {"{output}": output, "{weights}": weights, "{seconds}": int(0.8 * seconds)}
        command = [sys.executable, *(_filled(argument, places) for argument in part.arguments)]
        started = time.perf_counter()
        with said.open("w+", encoding="utf-8") as log:
            # a session of its own: what is stopped is stopped with all that it started
            child = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, cwd=HERE.parent, start_new_session=True
            )
            try:
                status, ended = child.wait(timeout=seconds), None
            except subprocess.TimeoutExpired:
                os.killpg(child.pid, signal.SIGKILL)
                status, ended = child.wait(), f"stopped after {seconds:.0f} s"
        row = {"seconds": round(time.perf_counter() - started, 1), "exit_status": status}
        result = _read(output)
        if status and ended is None:
            ended = f"exit status {status}"
        if ended or result is None:
            row["failed"] = ended or "wrote no result"
            row["said"] = said.read_text(encoding="utf-8", errors="replace").splitlines()[-SAID_LINES:]
        if result is not None:
            row["result"] = result if runtime() == "cuda" else _without_times(result)
            row["words"] = part.words(row["result"])
        return row


TIMES = re.compile(r"(_s|_ms|_share|_error_percent|tokens_per_s_difference_percent|seconds)$|^rates$")


def _without_times(value):
    """The same without what a clock said: without a card it means nothing."""
    if isinstance(value, dict):
        return {key: _without_times(each) for key, each in value.items() if not TIMES.search(key)}
    return [_without_times(each) for each in value] if isinstance(value, list) else value


def _filled(argument: str, places: dict) -> str:
    for name, value in places.items():
        argument = argument.replace(name, str(value))
    return argument


def _read(path: Path) -> dict | None:
    """A part's result: JSON, or what pytest wrote about each test."""
    if not path.exists():
        return None
    text = path.read_text(encoding="utf-8")
    return _tests(text) if text.lstrip().startswith("<") else json.loads(text)


def _tests(text: str) -> dict:
    cases = ElementTree.fromstring(text).iter("testcase")  # pytest's own file, written a moment ago
    found: dict = {"passed": 0, "failed": {}, "skipped": {}}
    for case in cases:
        name = f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}"
        said = {
            kind: node.get("message", "") for kind in ("failure", "error", "skipped") for node in case.findall(kind)
        }
        if "skipped" in said:
            found["skipped"][name] = said["skipped"]
        elif said:
            found["failed"][name] = _first_line(next(iter(said.values())))
        else:
            found["passed"] += 1
    return found


def _first_line(text: str) -> str:
    return re.sub(r"0x[0-9a-f]+", "0x…", next(iter(text.splitlines()), ""))[:300]


def _tests_words(result: dict) -> str:
    return f"{result['passed']} passed, {len(result['failed'])} failed, {len(result['skipped'])} skipped"


def _forecast_words(result: dict) -> str:
    found = result["summary"]
    return (
        f"{found['cases'] - found['failed']} of {found['cases']} cases ran; worst "
        f"{found['worst_allocated_percent']} % allocated, {found['worst_reserved_percent']} % reserved; "
        f"{found['oom_disagrees']} out-of-memory verdicts differ"
    )


def _trace_words(result: dict) -> str:
    return ", ".join(f"{run['format']}: {len(run['events'])} events" for run in result["runs"])


def _speed_words(result: dict) -> str:
    return "; ".join(
        f"{row['way']}: {_speed(row)}" + (f", {row['bandwidth_share']:.0%} of bandwidth" if _timed(row) else "")
        for row in result["rows"]
    )


def _offload_words(result: dict) -> str:
    return "; ".join(f"{row['off the GPU']} off, {row['way']}: {_speed(row)}" for row in result["rows"])


def _speed(row: dict) -> str:
    return f"{row['tokens_per_s']:.1f} tokens/s" if _timed(row) else "failed" if "failed" in row else "ran"


def _timed(row: dict) -> bool:
    return "tokens_per_s" in row


def _rates_words(result: dict) -> str:
    error = result["runs"][-1].get("median_error_percent")
    return "ran" if error is None else f"forecast speed against measured: median error {error:.1f} %"


def _parity_words(result: dict) -> str:
    return f"largest difference of a logit {max(row['largest_difference'] for row in result['rows']):.2g}"


def driver() -> dict:
    """The driver's version, clocks and partitions, as ``nvidia-smi`` says them."""
    asked = "driver_version,pcie.link.gen.max,pcie.link.width.max,clocks.max.sm,clocks.max.mem,mig.mode.current"
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader"], capture_output=True, text=True, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"not known": type(error).__name__}
    values = [value.strip() for value in done.stdout.splitlines()[0].split(",")] if done.stdout.strip() else []
    return dict(zip(asked.split(","), values, strict=False)) or {"not known": done.stderr.strip()[:200]}


def check(options: argparse.Namespace) -> dict:
    """Asks everything there is time for."""
    started = time.perf_counter()
    small_card = machine()["gpu_bytes"] < WHOLE_4B
    model = "smollm2-135m" if options.small else "qwen1.5-0.5b" if small_card else "qwen1.5-4b"
    rows = {}
    with tempfile.TemporaryDirectory() as weights:
        for part in parts(options.small, model):
            if options.parts and part.name not in options.parts:
                continue
            left = options.seconds - (time.perf_counter() - started)
            if left < LEAST_SECONDS:
                rows[part.name] = {"failed": "not run: out of time"}
            else:
                print(f"{part.name} …", flush=True)
                rows[part.name] = run_part(part, min(part.seconds, left), Path(weights))
            row = rows[part.name]
            print(f"  {row.get('seconds', 0):.0f} s  {row.get('words') or row.get('failed')}", flush=True)
    return {
        "benchmark": "gpu_check",
        "mode": runtime(),
        "note": NOTES[runtime()],
        "small": options.small,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(time.perf_counter() - started, 1),
        "machine": machine(),
        "versions": facts(),
        "driver": driver(),
        "parts": rows,
    }


def main() -> int:
    """Runs the parts, writes the file, says what could not be done; exit status 1 if anything could not."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="small shapes: a rehearsal")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"for all parts together; {SECONDS} by default")
    parser.add_argument("--parts", nargs="+", metavar="PART", help="only these")
    parser.add_argument("--output", type=Path, help="where the JSON goes; by default under benchmarks/results/")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu_check.py: expected a CUDA card, found none; `make fake-cuda` needs none", file=sys.stderr)
        return 2
    known = [part.name for part in parts(True, "")]
    if unknown := set(options.parts or ()) - set(known):
        print(
            f"gpu_check.py: expected parts of {', '.join(known)}, found {', '.join(sorted(unknown))}", file=sys.stderr
        )
        return 2
    result = check(options)
    card = re.sub(r"\W+", "_", torch.cuda.get_device_name().lower()).strip("_")
    path = options.output or RESULTS / f"gpu_check_{card}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    trace = result["parts"].get("trace", {}).get("result")
    if trace:  # long, and read by another test: a file of its own
        beside = path.with_name(f"{path.stem}_trace.json.gz")
        beside.write_bytes(gzip.compress(json.dumps(trace, separators=(",", ":")).encode(), mtime=0))
        result["parts"]["trace"]["result"] = {"file": beside.name}
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    missing = {name: row for name, row in result["parts"].items() if "failed" in row}
    print(f"\n{result['mode']}, {result['seconds']:.0f} s, written to {path}")
    for name, row in missing.items():
        print(f"could not: {name}: {row['failed']}", *row.get("said", ()), sep="\n    ")
    return int(bool(missing))


if __name__ == "__main__":
    sys.exit(main())
