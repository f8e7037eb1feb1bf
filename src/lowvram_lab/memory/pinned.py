"""Page-locked ("pinned") memory: what a GPU can fetch from by itself, beside whatever else is going on.

Not ``Tensor.pin_memory``: its allocator rounds every size up to a power of two, which for a model's layers can be
nearly twice their bytes of RAM that nothing else may use. Whole pages are taken from the system and locked as they are.
"""

import logging
import mmap

import torch

logger = logging.getLogger(__name__)


class PinnedBlock:
    """A block of RAM, page-locked for CUDA if the system lets it. Ordinary memory, and slower to copy from, if not.

    Args:
        size_bytes: Its size.

    Attributes:
        tensor: The bytes, ``(size_bytes,)`` uint8, uninitialised.
        locked: Whether they are page-locked.
    """

    def __init__(self, size_bytes: int):
        self.tensor = torch.frombuffer(mmap.mmap(-1, size_bytes), dtype=torch.uint8)
        self.locked = False
        if not torch.cuda.is_available():
            return
        status = torch.cuda.cudart().cudaHostRegister(self.tensor.data_ptr(), size_bytes, 0)
        self.locked = int(status) == 0
        if not self.locked:
            logger.warning("could not page-lock %d bytes of RAM (CUDA error %s): copies are slower", size_bytes, status)

    def unlock(self) -> None:
        """Gives the pages back to the system's discretion. The tensor stays valid."""
        if self.locked:
            torch.cuda.cudart().cudaHostUnregister(self.tensor.data_ptr())
            self.locked = False
