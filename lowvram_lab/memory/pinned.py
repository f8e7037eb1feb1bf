"""Page-locked ("pinned") memory: what a GPU can fetch from by itself, beside whatever else is going on.

Not ``Tensor.pin_memory``: its allocator rounds every size up to a power of two, which for a model's layers can be
nearly twice their bytes of RAM that nothing else may use. Whole pages are taken from the system and locked as they are.
"""

import contextlib
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

    refused = False  # once the system has said no, it is not asked again

    def __init__(self, size_bytes: int):
        private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
        self.tensor, self.locked = torch.frombuffer(mmap.mmap(-1, size_bytes, **private), dtype=torch.uint8), False
        if not torch.cuda.is_available() or PinnedBlock.refused:
            return
        status = int(torch.cuda.cudart().cudaHostRegister(self.tensor.data_ptr(), size_bytes, 0))
        self.locked = status == 0
        if not self.locked:
            PinnedBlock.refused = True
            with contextlib.suppress(RuntimeError):  # CUDA would report the refusal at the next launch: let it be this
                torch.zeros(1, device="cuda")
            logger.warning("could not page-lock %d bytes of RAM (CUDA error %d): copies are slower", size_bytes, status)

    def unlock(self) -> None:
        """Gives the pages back to the system's discretion. The tensor stays valid."""
        if self.locked:
            torch.cuda.cudart().cudaHostUnregister(self.tensor.data_ptr())
            self.locked = False
