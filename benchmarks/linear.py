"""What one linear layer costs at batch 1, per format, beside bf16, bitsandbytes and the machine's read bandwidth.

Decoding reads every weight once a token, so a layer cannot be faster than its bytes divided by the read bandwidth; the
table says how near each format's kernel comes. Method: in every round each candidate is timed once, in shuffled order,
after an untimed call that leaves the cores as the layer before would; what is printed are medians over rounds, so noise
hits all alike. A candidate cycles over copies of its weight, 64 MiB or more, so that none is read from cache. On CUDA
the cache is flushed before each call, which also hides the launch: the figure is the card's time alone.

    python benchmarks/linear.py [--in 2560 --out 6912] [--rows 1,4,64] [--threads N] [--repeats 30] [--json]
"""

import argparse
import copy
import json
import logging
import math
import os
import platform
import random
import statistics
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pandas
import psutil
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from lowvram_lab.engine.layers import quantized_linear
from lowvram_lab.machine import facts
from lowvram_lab.model.formats import DTYPES, FORMATS
from lowvram_lab.units import MiB

RESULTS = Path(__file__).parent / "results"
COPIES_BYTES = 64 * MiB
BUFFER_BYTES = 512 * MiB
OURS = ("bf16", "fp32", "int8", "int4", "int4-g32", "int4-g128", "int6", "int5", "int3", "int2", "nf4")
BASELINE, BNB_INT8 = "bitsandbytes nf4", "bitsandbytes int8"
FUSED, APART = "int4 gate+up fused", "int4 gate, up apart"
NAMES = (*OURS, BASELINE, BNB_INT8, FUSED, APART)


class FloatLinear(nn.Linear):
    """``F.linear`` in the weight's dtype."""

    def forward(self, x):
        return F.linear(x.to(self.weight.dtype), self.weight)


class Apart(nn.Module):
    """Two layers of the same input, one after the other."""

    def __init__(self, first: nn.Module, second: nn.Module):
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x):
        return self.first(x), self.second(x)


@dataclass
class Candidate:
    """One row of the table: layers that are copies of each other, or why there are none."""

    name: str
    nbytes: int | None = None
    layers: tuple[nn.Module, ...] = ()
    weight: torch.Tensor | None = None
    why: str | None = None


def our_layer(name: str, weight: torch.Tensor, device: str) -> tuple[nn.Module, int]:
    """A layer of one of the library's formats, and its bytes by the format table."""
    fmt, (rows, columns) = FORMATS[name], weight.shape
    if why := fmt.refuse("linear", (rows, columns)):
        raise ValueError(why)
    if fmt.kind == "float":
        layer = FloatLinear(columns, rows, bias=False, device="meta")
        layer.weight = nn.Parameter(weight.to(device, DTYPES[name]), requires_grad=False)
    else:
        layer = quantized_linear(columns, rows, fmt, device)
        layer.store(weight, lambda tensor: tensor.to(device))
    return layer, fmt.weight_bytes((rows, columns))


def bitsandbytes_layer(name: str, weight: torch.Tensor, device: str) -> tuple[nn.Module, int]:
    """bitsandbytes' own layer and the bytes that it holds.

    In eval mode, as a loaded model is: on a CPU with AVX512-BF16 only then does Linear4bit repack its weight, at the
    first call, for its fused kernel (and round absmax to bf16). Otherwise it dequantises the whole weight each time.
    """
    import bitsandbytes as bnb

    rows, columns = weight.shape
    if name == BASELINE:
        layer = bnb.nn.Linear4bit(columns, rows, bias=False, compute_dtype=torch.bfloat16, device="meta")
        layer.weight = bnb.nn.Params4bit(weight.clone(), False, quant_type="nf4", compress_statistics=False)
    else:
        layer = bnb.nn.Linear8bitLt(columns, rows, bias=False, has_fp16_weights=False, device="meta")
        layer.weight = bnb.nn.Int8Params(weight.clone(), requires_grad=False, has_fp16_weights=False)
    layer = layer.to(device).eval()
    layer(torch.zeros(1, columns, dtype=torch.bfloat16, device=device))
    scales = layer.weight.quant_state.absmax if name == BASELINE else layer.state.SCB
    return layer, layer.weight.nbytes + scales.nbytes


def build(name: str, weight: torch.Tensor, device: str) -> Candidate:
    """A candidate with enough copies of its weight; one that cannot be built or run says why."""
    try:
        if name in (BASELINE, BNB_INT8):
            layer, nbytes = bitsandbytes_layer(name, weight, device)
        elif name == APART:
            (layer, nbytes), weight = our_layer("int4", weight, device), weight.repeat(2, 1)
            layer, nbytes = Apart(layer, copy.deepcopy(layer)), 2 * nbytes
        else:
            weight = weight.repeat(2, 1) if name == FUSED else weight
            layer, nbytes = our_layer("int4" if name == FUSED else name, weight, device)
        copies = max(2, math.ceil(COPIES_BYTES / nbytes))
        layers = (layer, *(copy.deepcopy(layer) for _ in range(copies - 1)))
        for layer in layers:  # bitsandbytes repacks at the first call, a copy too
            layer(torch.zeros(1, weight.shape[1], dtype=torch.bfloat16, device=device))
    except ModuleNotFoundError as error:
        return Candidate(name, why=f"absent: {error}")
    except Exception as error:  # whatever it is, the other rows still tell something
        return Candidate(name, why=f"{type(error).__name__}: {error}".splitlines()[0])
    return Candidate(name, nbytes, layers, weight)


def seconds(call, flush: torch.Tensor) -> float:
    """The time one call takes; on CUDA by events, queued behind a write of ``flush``."""
    if not flush.is_cuda:
        started = time.perf_counter()
        call()
        return time.perf_counter() - started
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    flush.zero_()
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


def measure(candidates: list[Candidate], x: torch.Tensor, repeats: int) -> tuple[dict[str, list[float]], float]:
    """Seconds of every candidate, round by round, and the best bytes per second at which a large buffer was read."""
    buffer, shuffle = torch.ones(BUFFER_BYTES // 4, device=x.device), random.Random(0).sample
    matrix, vector = buffer.view(1 << 12, -1), buffer.new_ones(buffer.numel() >> 12)
    reads = (buffer.sum, buffer.view(torch.int64).sum, lambda: torch.mv(matrix, vector))
    times, bandwidth = {candidate.name: [] for candidate in candidates}, 0.0
    for turn in range(max(repeats, 2)):  # fewer have no deciles
        for candidate in shuffle(candidates, len(candidates)):
            layers = candidate.layers
            layers[2 * turn % len(layers)](x)
            layer = layers[(2 * turn + 1) % len(layers)]
            times[candidate.name].append(seconds(lambda layer=layer: layer(x), buffer))
        bandwidth = max(bandwidth, *(BUFFER_BYTES / seconds(read, buffer) for read in reads))
    return times, bandwidth


def relative_error(candidate: Candidate, x: torch.Tensor) -> float:
    """How far the product is from the float weight's: a fast kernel that is wrong should not go unseen."""
    result, truth = candidate.layers[0](x), x.float() @ candidate.weight.to(x.device).T
    result = torch.cat(result, dim=-1) if isinstance(result, tuple) else result
    return ((result.float() - truth).norm() / truth.norm()).item()


def table(candidates: list[Candidate], x: torch.Tensor, repeats: int) -> dict:
    """The rows for one number of tokens."""
    times, bandwidth = measure([candidate for candidate in candidates if not candidate.why], x, repeats)
    medians, rows = {name: statistics.median(values) for name, values in times.items()}, []
    for candidate in candidates:
        name, row = candidate.name, {"format": candidate.name}
        if candidate.why:
            rows.append(row | {"why_not": candidate.why})
            continue
        deciles = statistics.quantiles(times[name], n=10, method="inclusive")
        row |= {"weight_bytes": candidate.nbytes, "ms": round(medians[name] * 1e3, 4)}
        row |= {"p10": round(deciles[0] * 1e3, 4), "p90": round(deciles[-1] * 1e3, 4)}
        row["gb_per_s"] = round(candidate.nbytes / medians[name] / 1e9, 2)
        row["share_of_read"] = round(candidate.nbytes / medians[name] / bandwidth, 3)
        if BASELINE in medians and name not in (FUSED, APART):  # those do twice the work
            row["x_bnb_nf4"] = round(medians[BASELINE] / medians[name], 3)
        rows.append(row | {"error": round(relative_error(candidate, x), 4)})
    fused = round(medians[APART] / medians[FUSED], 3) if {APART, FUSED} <= medians.keys() else None
    return {"read_gb_per_s": round(bandwidth / 1e9, 2), "speedup_fused_over_apart": fused, "formats": rows}


def print_table(tokens: str, found: dict) -> None:
    """Prints what ``table`` found."""
    shown = pandas.DataFrame(found["formats"])
    shown.insert(1, "MiB", (shown.pop("weight_bytes") / MiB).round(2))
    print(f"\n{tokens} token(s); reads {found['read_gb_per_s']} GB/s; {FUSED}: x{found['speedup_fused_over_apart']}")
    print(shown.to_string(index=False, na_rep="–"), flush=True)


def machine() -> dict:
    """What it ran on: the doctor's findings without its paths, and how busy the machine was."""
    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.open() if "model name" in line] if info.exists() else []
    found = facts()
    cpu = names[0] if names else platform.processor()
    return {"system": platform.platform(), "cpu": cpu, "load_average": psutil.getloadavg()[0], **found}


@torch.inference_mode()
def main(arguments: list[str] | None = None) -> int:
    """Measures, prints the table and adds the run to the JSON, beside those with other numbers of threads."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--in", dest="columns", type=int, default=2560, metavar="N", help="in_features")
    parser.add_argument("--out", dest="rows", type=int, default=6912, metavar="N", help="out_features")
    parser.add_argument("--rows", dest="tokens", default="1,4,64", help="tokens at once, comma-separated")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=30, help="rounds; fewer than 30 say little")
    parser.add_argument("--json", action="store_true", help="print the run as JSON instead of the table")
    parser.add_argument("--output", type=Path, help="where the JSON goes; by default under benchmarks/results/")
    options = parser.parse_args(arguments)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # Linear8bitLt warns at every call
    torch.set_num_threads(options.threads)
    device, generator = "cuda" if torch.cuda.is_available() else "cpu", torch.Generator().manual_seed(0)
    run = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "kernels": device,
        "shape": {"in_features": options.columns, "out_features": options.rows},
        "repeats": options.repeats,
        "tokens": {},
    }
    weight = torch.randn(options.rows, options.columns, generator=generator) * 0.02
    candidates = [build(name, weight, device) for name in NAMES]
    for tokens in options.tokens.split(","):
        x = torch.randn(int(tokens), options.columns, generator=generator).to(device, torch.bfloat16)
        run["tokens"][tokens] = table(candidates, x, options.repeats)
        if not options.json:
            print_table(tokens, run["tokens"][tokens])
    path = options.output or RESULTS / f"linear_{device}.json"
    runs = json.loads(path.read_text(encoding="utf-8"))["threads"] if path.exists() else {}
    results = {"benchmark": "linear", "threads": runs | {str(options.threads): run}}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".partial")
    temporary.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)
    print(json.dumps(run, indent=1) if options.json else f"\n{options.threads} thread(s); written to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
