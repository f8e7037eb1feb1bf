"""Which release of PyTorch is at hand: what it allocates by itself has changed from one to the next."""

import re

import torch


def torch_release() -> tuple[int, int]:
    """Major and minor version."""
    major, minor = re.match(r"(\d+)\.(\d+)", torch.__version__).groups()
    return int(major), int(minor)
