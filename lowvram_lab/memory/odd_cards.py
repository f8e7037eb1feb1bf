"""What is odd about this machine's card, one line each: none for torch, two, a slice, an old one, a shared one.

``lowvram doctor`` prints these lines; ``open_gpu`` logs them, or refuses with them.
"""

import os
import re

import torch

from lowvram_lab.errors import first_line
from lowvram_lab.memory.budget import CUDA_CONTEXT_BYTES
from lowvram_lab.memory.card import this_card
from lowvram_lab.units import MiB, format_bytes

OTHERS_BYTES = 256 * MiB
"""Beside a CUDA context, whose size is not known beforehand: less is no sign of another process."""


def why_no_card() -> str:
    """Why torch finds no card that it can use; to be asked where it finds none."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        reason = first_line(error)
    else:
        return "torch found no card"
    if found := re.search(r"too old \(found version (\d+)\)", reason):
        version = int(found[1])
        driver = f"{version // 1000}.{version % 1000 // 10}"
        return (
            f"the driver knows CUDA {driver}, torch {torch.__version__} wants {torch.version.cuda}: "
            f"update the driver, or install torch for CUDA {driver}"
        )
    if (shown := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return f"CUDA_VISIBLE_DEVICES={shown!r} shows no card of this machine; nvidia-smi -L lists cards and slices"
    return reason[:1].lower() + reason[1:]


def shut_out() -> bool:
    """Whether there is a driver, and with it perhaps a card, that this torch cannot use."""
    return torch.version.cuda is not None and not torch.cuda.is_available() and "the driver knows" in why_no_card()


def no_kernels() -> str | None:
    """Why torch has no kernels at all for this card, or ``None`` where it has."""
    oldest = min((int(arch[3:]) for arch in torch.cuda.get_arch_list() if re.fullmatch(r"sm_\d+", arch)), default=0)
    major, minor = torch.cuda.get_device_capability()
    if major * 10 + minor >= oldest:
        return None
    return (
        f"{torch.cuda.get_device_name()} has capability {major}.{minor}, torch {torch.__version__} has kernels from "
        f"{oldest // 10}.{oldest % 10} on: install an older torch, or set CUDA_VISIBLE_DEVICES= to simulate"
    )


def bytes_of_others() -> int:
    """What of the card this process's tensors and a usual CUDA context do not account for; 0 for a trifle."""
    free, total = torch.cuda.mem_get_info()
    others = total - free - torch.cuda.memory_reserved() - CUDA_CONTEXT_BYTES
    return others if others > OTHERS_BYTES else 0


def remarks() -> dict[str, str]:
    """What is odd about the card that torch uses now, by kind; empty where nothing is."""
    if not torch.cuda.is_available():
        return {"why none": why_no_card()}
    found, name, (free, total) = {}, torch.cuda.get_device_name(), torch.cuda.mem_get_info()
    if text := no_kernels():
        found["kernels"] = text
    if (count := torch.cuda.device_count()) > 1:
        names = ", ".join(f"{number}: {torch.cuda.get_device_name(number)}" for number in range(count))
        found["cards"] = f"{torch.cuda.current_device()} of {names} is used; CUDA_VISIBLE_DEVICES chooses another"
    if " MIG " in name:
        found["slice"] = f"{name} is a slice of a card: its {format_bytes(total)} are all there is"
    if others := bytes_of_others():
        found["others"] = f"other processes hold some {format_bytes(others)} of {name}: {format_bytes(free)} are free"
    if not this_card().multiplies_int4:
        found["formats"] = (
            f"{name} has {this_card()}: no bf16 units and no int4 kernel below 8.0, plan fp16 with int8 or nf4"
        )
    return found
