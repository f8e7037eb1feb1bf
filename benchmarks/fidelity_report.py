"""Tables, comparisons, JSON and picture of ``fidelity.py``. Knows rows, not models."""

import json
import math
import platform
import statistics
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import psutil
import torch

from lowvram_lab.files import write_atomically
from lowvram_lab.units import MiB

RESULTS = Path(__file__).parent / "results"
FLOAT, RTN, NF4, HQQ = "16 bits", "round to nearest", "bitsandbytes nf4", "HQQ"
LLAMA, SMALL = "llama.cpp", "llama.cpp, small embedding"
IMATRIX = "llama.cpp, small embedding, imatrix"
UNIFORM, OWN = "uniform GPTQ", "recipe, own formats"
STOCK, KERNEL = "recipe, stock transformers", "recipe, formats with a kernel"
OURS, PEERS = (OWN, STOCK, KERNEL), (LLAMA, SMALL, IMATRIX)
PROMISES = {0.6: 1.0, 0.7: 5.0}
"""Share of the 16-bit model's bytes to save → per cent of perplexity that this may cost."""

RANGE = (3.0, 5.02)
"""Bits a weight of the whole model between which llama.cpp is to be matched; 5.00 plus its float32 norms is 5.01."""

PACKAGES = ("lowvram-lab", "torch", "transformers", "bitsandbytes", "hqq", "llama_cpp_python", "gguf")
STYLE = {
    FLOAT: ("0.4", "*"),
    RTN: ("tab:gray", "v"),
    NF4: ("tab:purple", "D"),
    HQQ: ("tab:brown", "P"),
    LLAMA: ("tab:orange", "s"),
    SMALL: ("tab:red", "s"),
    IMATRIX: ("darkred", "x"),
    UNIFORM: ("tab:cyan", "^"),
    OWN: ("tab:blue", "o"),
    STOCK: ("tab:green", "o"),
    KERNEL: ("limegreen", "o"),
}


def in_range(rows: list[dict]) -> list[dict]:
    """llama.cpp's rows of 3 to 5 bits a weight."""
    return [r for r in rows if r["family"] in PEERS and RANGE[0] <= r.get("bits_per_weight", 0) <= RANGE[1]]


def run(subject, rows: list[dict], options) -> dict:
    """A run with all that is needed to read it later."""
    done = [row for row in rows if "failed" not in row]
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "model": subject.name,
        "parameters": subject.spec.num_parameters,
        "fp16_bytes": subject.fp16_bytes,
        "settings": {
            "split": options.split,
            "tokens": subject.windows.numel(),
            "predicted": done[0]["tokens"],
            "window": subject.windows.shape[1],
            "evaluation_digest": subject.evaluation,
            "calibration": "its own samples, other seeds" if subject.calibration else "the library's own text",
            "calibration_tokens": subject.calibration_ids.numel(),
        },
        "reference_perplexity": done[0]["reference_perplexity"],
        "promises": promises(done),
        "against_llama_cpp": against_llama(done),
        "allocation": allocation(done),
        "rows": rows,
    }


def promises(rows: list[dict]) -> list[dict]:
    """Whether what is saved costs no more perplexity than it may."""
    found = []
    for reduction, most in PROMISES.items():
        for row in rows:
            if row["family"] in OURS and row["name"].startswith(f"-{reduction:.0%}"):
                cost = row["perplexity_percent"]
                found.append({"name": row["name"], "perplexity_percent": cost, "most": most, "met": cost <= most})
    return found


def against_llama(rows: list[dict]) -> list[dict]:
    """Each of llama.cpp's files beside the best of our own formats that takes no more bytes in memory."""
    found = []
    for theirs in sorted((r for r in rows if r["family"] in PEERS), key=lambda r: r["weight_bytes"]):
        fitting = [r for r in rows if r["family"] == OWN and r["weight_bytes"] <= theirs["weight_bytes"]]
        if fitting:
            ours = min(fitting, key=lambda row: row["kl_mean"])
            found.append({"theirs": theirs["name"], "family": theirs["family"], **_pair(ours, theirs)})
            found[-1]["in_range"] = RANGE[0] <= theirs["bits_per_weight"] <= RANGE[1]
    return found


def allocation(rows: list[dict]) -> list[dict]:
    """Uniform plans beside recipes of the same bytes, both by GPTQ."""
    named = {row["name"]: row for row in rows}
    pairs = [(named.get(f"allocated, bytes of {row['name']}"), row) for row in rows if row["family"] == UNIFORM]
    return [{"uniform": theirs["name"], **_pair(ours, theirs)} for ours, theirs in pairs if ours]


def _pair(ours: dict, theirs: dict) -> dict:
    """Two rows side by side; the error is that of the difference, window by window."""
    gaps = [a - b for a, b in zip(ours["kl_by_window"], theirs["kl_by_window"], strict=True)]
    return {
        "ours": ours["name"],
        "ours_bytes": ours["weight_bytes"],
        "theirs_bytes": theirs["weight_bytes"],
        "ours_kl": ours["kl_mean"],
        "theirs_kl": theirs["kl_mean"],
        "ratio": ours["kl_mean"] / theirs["kl_mean"],
        "difference": statistics.mean(gaps),
        "difference_error": statistics.stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else None,
        "met": ours["kl_mean"] <= theirs["kl_mean"],
    }


def line(row: dict) -> str:
    """A row of the table."""
    if "failed" in row:
        return f"{row['name']:42} {row['failed'][:110]}"
    low, high = row["top1_interval"]
    return (
        f"{row['name']:42} {row['weight_bytes'] / MiB:8.2f} {row['file_bytes'] / MiB:8.2f} "
        f"{row['bits_per_weight']:6.3f} {row['share_of_fp16']:6.1%} "
        f"{row['perplexity']:9.4f} {row['perplexity_percent']:+8.2f} "
        f"{row['kl_mean']:9.5f} {row['kl_error'] or 0:8.5f} {row['kl_median']:9.5f} {row['kl_p99']:8.4f} "
        f"{row['top1_agreement']:6.1%} {low:.1%}-{high:.1%}"
    )


def print_run(found: dict) -> None:
    """The table by size, then the comparisons."""
    s = found["settings"]
    print(f"\n{found['model']}, {s['split']}: {s['predicted']} tokens, perplexity {found['reference_perplexity']:.4f}")
    print(
        f"{'candidate':42} {'MiB':>8} {'file MiB':>8} {'bits':>6} {'fp16':>6} {'ppl':>9} {'ppl %':>8} {'KL':>9} "
        f"{'+-':>8} {'median':>9} {'p99':>8} {'top-1':>6}"
    )
    for row in sorted(found["rows"], key=lambda row: row.get("weight_bytes", math.inf)):
        print(line(row))
    print("\nperplexity at the promised reductions")
    for item in found["promises"]:
        print(f"  {item['name']:34} {item['perplexity_percent']:+6.2f} % (at most {item['most']:g}) {_yes(item)}")
    print("\nKL beside llama.cpp's, ours in no more bytes (* between 3 and 5 bits a weight)")
    for item in found["against_llama_cpp"]:
        mark = "*" if item["in_range"] else " "
        print(f" {mark}{item['theirs']:34} {_sides(item)} by {item['ours']}")
    print("\nKL beside uniform plans' of the same bytes")
    for item in found["allocation"]:
        print(f"  {item['uniform']:34} {_sides(item)}")


def _yes(item: dict) -> str:
    return "met" if item["met"] else "NOT MET"


def _sides(item: dict) -> str:
    return (
        f"{item['ours_kl']:.5f} / {item['theirs_kl']:.5f} = {item['ratio']:.3f} "
        f"(difference {item['difference']:+.5f} +- {item['difference_error'] or 0:.5f}) {_yes(item)}"
    )


def machine() -> dict:
    """What it ran on."""
    info = Path("/proc/cpuinfo")
    names = [text.partition(":")[2].strip() for text in info.open() if "model name" in text] if info.exists() else []
    return {
        "system": platform.platform(),
        "cpu": names[0] if names else platform.processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": psutil.cpu_count(),
        "threads": torch.get_num_threads(),
        "ram_bytes": psutil.virtual_memory().total,
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
    }


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def save(path: Path, runs: dict) -> dict:
    """Adds runs to the file; returns all that are in it."""
    known = json.loads(path.read_text(encoding="utf-8"))["runs"] if path.exists() else {}
    everything = dict(sorted((known | runs).items()))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps({"benchmark": "fidelity", "runs": everything}, indent=1) + "\n")
    print(f"\nwritten to {path}")
    return everything


def draw(everything: dict, split: str, path: Path) -> None:
    """KL against bits a weight, a panel a model, a marker a family."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [found for found in everything.values() if found["settings"]["split"] == split]
    figure, panels = pyplot.subplots(1, len(shown), figsize=(8 * len(shown), 6.5), squeeze=False)
    for axes, found in zip(panels[0], shown, strict=True):
        _panel(axes, found)
    handles = {
        label: handle for axes in panels[0] for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    figure.tight_layout(rect=(0, 0.09, 1, 1))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _panel(axes, found: dict) -> None:
    rows = [row for row in found["rows"] if "failed" not in row and row["family"] != FLOAT]
    for family, (color, marker) in STYLE.items():
        own = sorted((r for r in rows if r["family"] == family), key=lambda r: r["bits_per_weight"])
        if own:
            points = [r["bits_per_weight"] for r in own], [r["kl_mean"] for r in own]
            joined = "-" if family == OWN else ""
            axes.plot(*points, linestyle=joined, color=color, marker=marker, markersize=6, label=family, zorder=3)
    for row in rows:
        if row["family"] in (LLAMA, SMALL, RTN, NF4, HQQ, UNIFORM):
            text = row["name"].replace("everywhere", "").strip(" ,")
            axes.annotate(
                text, (row["bits_per_weight"], row["kl_mean"]), xytext=(5, 4), textcoords="offset points", fontsize=7
            )
    for reduction in PROMISES:
        axes.axvline(16 * (1 - reduction), color="0.8", linewidth=1, zorder=0)
        place = (16 * (1 - reduction), 1.0)
        axes.annotate(
            f"-{reduction:.0%}", place, xycoords=("data", "axes fraction"), ha="center", va="bottom", fontsize=8
        )
    axes.set_yscale("log")
    axes.set_xlabel("bits a weight, whole model in memory")
    axes.set_ylabel("KL to the original, nats a token")
    axes.set_title(f"{found['model']} ({found['settings']['split']}, {found['settings']['predicted']} tokens)", pad=16)
    axes.grid(True, which="major", color="0.92")
