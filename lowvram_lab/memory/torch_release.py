"""Which release of PyTorch is at hand: what it allocates by itself has changed from one to the next."""

import re

import torch


def torch_release() -> tuple[int, int]:
    """Major and minor version."""
    major, minor = re.match(r"(\d+)\.(\d+)", torch.__version__).groups()
    return int(major), int(minor)


def seeds_of_graphs() -> str:
    """Where torch keeps seed and offset of random numbers in CUDA graphs (``register_graph``, CUDAGeneratorImpl.cpp).

    Returns:
        ``"capturing"``: of all graphs one pair, on the stream that captured first (before torch 2.12); ``"usual"``: of
        each its own; ``"none"``, where no random number is drawn (from 2.14 on).
    """
    release = torch_release()
    return "capturing" if release < (2, 12) else "usual" if release < (2, 14) else "none"
