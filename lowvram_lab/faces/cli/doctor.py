"""What this machine can do: versions, memory, and which kernels give right answers here."""

import os
import platform
from importlib import metadata

import psutil
import torch

from lowvram_lab import __version__
from lowvram_lab.cache import cache_dir
from lowvram_lab.engine.layers import quantized_linear
from lowvram_lab.model.formats import get_format
from lowvram_lab.units import format_bytes

PACKAGES = ("torch", "transformers", "accelerate", "bitsandbytes", "safetensors", "gguf")


def examine(paths: bool = True) -> dict:
    """Examines the machine.

    Args:
        paths: Whether to name the cache folder, too, which is nobody's business in a result to be shown.

    Returns:
        Plain data: Python and package versions, cores, RAM, GPU, and per format whether its kernel agrees with
        a float one.
    """
    return {
        "lowvram_lab": __version__,
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "cpu_cores": os.cpu_count(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "ram": format_bytes(psutil.virtual_memory().total),
        "gpu": _gpu(),
        **({"cache": str(cache_dir())} if paths else {}),
        **{f"{name} kernel, cpu": _try_kernel(name, "cpu") for name in ("int8", "int4", "nf4")},
        **(
            {f"{name} kernel, cuda": _try_kernel(name, "cuda") for name in ("int8", "int4", "nf4")}
            if torch.cuda.is_available()
            else {}
        ),
    }


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _gpu() -> str:
    if not torch.cuda.is_available():
        return "none: GPU budgets are simulated in RAM"
    free, total = torch.cuda.mem_get_info()
    return f"{torch.cuda.get_device_name()}, {format_bytes(free)} of {format_bytes(total)} free"


def _try_kernel(name: str, kernels: str) -> str:
    """Runs one small product; says whether it is as near the float product as its bits allow."""
    device = "cuda" if kernels == "cuda" else "cpu"
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(64, 256, generator=generator), torch.randn(4, 256, generator=generator)
    layer = quantized_linear(256, 64, get_format(name), kernels)
    try:
        layer.store(weight, lambda tensor: tensor.to(device))
        product = layer(x.to(device, torch.bfloat16)).float().cpu()
    except Exception as error:  # a missing kernel can fail in any way; the doctor reports it instead of dying of it
        return f"fails: {str(error).splitlines()[0][:80]}"
    truth = x @ weight.T
    error = ((product - truth).norm() / truth.norm()).item()
    return (
        f"works (relative error {error:.3f})" if error < (0.03 if name == "int8" else 0.15) else f"wrong ({error:.2f})"
    )
