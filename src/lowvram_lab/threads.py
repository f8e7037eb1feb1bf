"""One CPU thread for a while: many small operations only wait for a second one, 8 ms each where its core is busy."""

from contextlib import contextmanager

import torch


@contextmanager
def one_thread():
    """Runs the block with a single CPU thread, and gives back the others after it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
