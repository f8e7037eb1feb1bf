"""Tables, comparisons, JSON and picture of ``fidelity.py``. Knows rows, not models."""

import json
import math
import platform
import statistics
from datetime import UTC, datetime
from importlib import metadata
from itertools import pairwise
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
OTHER = "recipe, own formats, other calibration"
OURS, PEERS = (OWN, STOCK, KERNEL, OTHER), (LLAMA, SMALL, IMATRIX)
PROMISES = {0.6: 1.0, 0.7: 5.0}
"""Share of the 16-bit model's bytes to save → per cent of perplexity that this may cost."""

RANGE = (3.0, 5.02)
"""Bits a weight of the whole model between which llama.cpp is to be matched; 5.00 plus its float32 norms is 5.01."""

PACKAGES = ("lowvram-lab", "torch", "transformers", "bitsandbytes", "hqq", "llama_cpp_python", "gguf")
TICKS = (3, 3.5, 4, 4.5, 5, 6, 7, 8, 10, 12)
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
    OTHER: ("navy", "x"),
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
            "begins_with": subject.begins_with,
            "evaluation_digest": subject.evaluation,
            "calibration": subject.calibration.name if subject.calibration else "the library's own text",
            "calibration_tokens": subject.calibration_windows(subject.calibration).numel(),
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
    figure, panels = pyplot.subplots(1, len(shown), figsize=(9.5 * len(shown), 8), squeeze=False)
    figure.tight_layout(rect=(0.03, 0.12, 1, 0.97), w_pad=3)
    for axes, found in zip(panels[0], shown, strict=True):
        _panel(axes, found)
    handles = {}
    for axes in panels[0]:
        handles |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    columns = 3 if len(shown) == 1 else 5
    figure.legend(handles.values(), handles, loc="lower center", ncols=columns, fontsize=9, frameon=False)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def _panel(axes, found: dict) -> None:
    rows = [row for row in found["rows"] if "failed" not in row and row["family"] != FLOAT]
    for family, (color, marker) in STYLE.items():
        own = sorted((r for r in rows if r["family"] == family), key=lambda r: r["bits_per_weight"])
        if own:
            points = [r["bits_per_weight"] for r in own], [r["kl_mean"] for r in own]
            joined = "-" if family == OWN else ""
            axes.plot(*points, linestyle=joined, color=color, marker=marker, markersize=6, label=family, zorder=3)
    axes.set_yscale("log")
    axes.set_xscale("log")
    axes.set_xticks(TICKS, [f"{tick:g}" for tick in TICKS])
    axes.minorticks_off()
    axes.set_xlabel("bits a weight, whole model in memory")
    axes.set_ylabel("KL to the original, nats a token")
    settings = found["settings"]
    axes.set_title(f"{found['model']}, {settings['split']}, {settings['predicted']} tokens", pad=18)
    axes.grid(True, which="major", color="0.93")
    for reduction in PROMISES:
        bits = 16 * (1 - reduction)
        axes.axvline(bits, color="0.75", linewidth=1, zorder=0)
        where = {"xycoords": ("data", "axes fraction"), "ha": "center", "va": "bottom", "fontsize": 8}
        axes.annotate(f"-{reduction:.0%}", (bits, 1.0), **where)
    _write_labels(axes, rows)


def _write_labels(axes, rows: list[dict]) -> None:
    """Names beside their markers, each in the first place near it where nothing is yet."""
    pixels = axes.transData.transform([(row["bits_per_weight"], row["kl_mean"]) for row in rows])
    taken = [(x - 4, y - 4, x + 4, y + 4) for x, y in pixels]
    line = sorted(tuple(place) for row, place in zip(rows, pixels, strict=True) if row["family"] == OWN)
    for (x, y), (far_x, far_y) in pairwise(line):
        steps = [(x + (far_x - x) * part / 40, y + (far_y - y) * part / 40) for part in range(40)]
        taken += [(x - 1, y - 1, x + 1, y + 1) for x, y in steps]
    frame = axes.get_window_extent()
    for row, (x, y) in sorted(zip(rows, pixels, strict=True), key=lambda pair: -pair[1][1]):
        if row["family"] in (OWN, IMATRIX):
            continue
        text = row["name"].replace(" everywhere", "").replace(", emb. ", "/").strip(",")
        text = text.split(",")[0] if row["family"] in OURS else text
        width, height = 5.2 * len(text) + 2, 10
        for dx, dy in _places(width):
            box = (x + dx, y + dy - height / 2, x + dx + width, y + dy + height / 2)
            outside = box[0] < frame.x0 or box[2] > frame.x1 or box[1] < frame.y0 or box[3] > frame.y1
            if not outside and not any(_overlap(box, other) for other in taken):
                break
        taken.append(box)
        far = abs(dy) > 12 or dx not in (7, -width - 7)
        axes.annotate(
            text,
            (row["bits_per_weight"], row["kl_mean"]),
            xytext=(dx * 72 / axes.figure.dpi, dy * 72 / axes.figure.dpi),
            textcoords="offset points",
            va="center",
            fontsize=7,
            arrowprops={"arrowstyle": "-", "color": "0.6", "linewidth": 0.5} if far else None,
        )


def _places(width: float) -> list[tuple[float, float]]:
    """Offsets in pixels of a label's left middle, nearest first: right and left of the marker, ever further away."""
    places = [(dx, dy) for dy in range(-240, 241, 6) for dx in (7, 25, 60, 110, -width - 7, -width - 25, -width - 60)]
    return sorted(places, key=lambda place: abs(place[1]) + (place[0] if place[0] > 0 else 4 - place[0] - width))


def _overlap(a: tuple, b: tuple) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
