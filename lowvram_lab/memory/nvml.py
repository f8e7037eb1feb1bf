"""What the driver says this process holds on a card: the only figure that includes the CUDA context."""

import os


def process_bytes(device_index: int) -> int | None:
    """GPU memory of this process in bytes, by NVML (package ``nvidia-ml-py``), or ``None`` where it cannot be known.

    It cannot where the package is missing, and in containers whose process ids the driver does not know.

    Args:
        device_index: CUDA device; ``CUDA_VISIBLE_DEVICES`` is taken into account.
    """
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # missing package, missing library and missing driver each fail in their own way
        return None
    try:
        handle = pynvml.nvmlDeviceGetHandleByUUID(_uuid(device_index))
        for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle):
            if process.pid == os.getpid():
                return process.usedGpuMemory
        return None
    except Exception:  # asked at the end of a measurement, whose own outcome matters more than this figure
        return None
    finally:
        pynvml.nvmlShutdown()


def _uuid(device_index: int) -> str:
    import torch

    return f"GPU-{torch.cuda.get_device_properties(device_index).uuid}"
