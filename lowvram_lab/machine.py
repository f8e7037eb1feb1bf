"""CPU threads for a while: torch's number is the process's, a plan's is the model's."""

from contextlib import contextmanager

import torch


@contextmanager
def cpu_threads(count: int | None):
    """Runs the block with so many CPU threads (``None``: as many as there are), and sets torch's number back."""
    before = torch.get_num_threads()
    if count in (None, before):
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def one_thread():
    """A single one: many small operations only wait for a second thread, 8 ms each where its core is busy."""
    return cpu_threads(1)
