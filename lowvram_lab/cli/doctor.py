"""What this machine can do: versions, memory, and which kernels give right answers here."""

import argparse

import torch

from lowvram_lab import __version__
from lowvram_lab.cli.common import print_json
from lowvram_lab.engine.layers import quantized_linear
from lowvram_lab.errors import first_line
from lowvram_lab.files import cache_dir
from lowvram_lab.kernels.compiler import compiler, without_compiler
from lowvram_lab.machine import facts
from lowvram_lab.memory.odd_cards import remarks
from lowvram_lab.model.formats import get_format
from lowvram_lab.repository.builtin import builtin_names

KERNELS = ("int8", "int4", "nf4")


def examine() -> dict:
    """Examines the machine.

    Returns:
        Plain data: Python and package versions, cores, RAM, GPU and what is odd about it, C++ compiler, the cache
        folder, and per format whether its kernel agrees with a float one.
    """
    places = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    kernels = {f"{name} kernel, {place}": _try_kernel(name, place) for place in places for name in KERNELS}
    cpp = {"cpp_compiler": compiler() or without_compiler() or "not used: LOWVRAM_COMPILE=0"}
    gpu = {f"gpu, {kind}": text for kind, text in remarks().items()}
    return {"lowvram_lab": __version__, **facts(), **gpu, **cpp, "cache": str(cache_dir()), **kernels}


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
        return f"fails: {first_line(error)[:80]}"
    truth = x @ weight.T
    error = ((product - truth).norm() / truth.norm()).item()
    return (
        f"works (relative error {error:.3f})" if error < (0.03 if name == "int8" else 0.15) else f"wrong ({error:.2f})"
    )


def run_doctor(args: argparse.Namespace) -> int:
    """Says what this machine can do."""
    found = examine()
    if args.json:
        print_json(found)
    else:
        for key, value in found.items():
            print(f"{key:22} {value}")
    return 0


def run_models(args: argparse.Namespace) -> int:
    """Lists the models known by name."""
    names = builtin_names()
    if args.json:
        print_json({"models": names})
    else:
        for name, line in names.items():
            print(f"{name:17} {line}")
        print("\nAlso: a hub id such as Qwen/Qwen1.5-4B-Chat, a directory with safetensors, or a .gguf file.")
    return 0
