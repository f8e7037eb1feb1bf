"""A CUDA card as a test wants to find it."""

import gc

import torch


def computes() -> bool:
    """Whether values on this card mean something: without arithmetic the fake CUDA runtime leaves them as they were."""
    return "no arithmetic" not in torch.cuda.get_device_name()


def clean() -> None:
    """Nothing reserved, cuBLAS' workspace included, and no cap."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch._C._cuda_clearCublasWorkspaces()  # kept for good otherwise; the forecast begins before the first product
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.reset_peak_memory_stats()
