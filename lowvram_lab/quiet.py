"""transformers without its own progress bars and chatter, for as long as it works for us: one bar at a time, ours.

Whatever loads or saves through transformers does it inside ``quiet_transformers``.
"""

import contextlib
import threading
from collections.abc import Iterator

_lock = threading.Lock()
_settings = contextlib.ExitStack()
_inside = 0


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Lets transformers speak of errors alone, and gives its user's own settings back afterwards.

    They are the process's, not a thread's: of blocks that overlap, the first one changes them and the last one to end
    restores them.
    """
    global _inside
    with _lock:
        if not _inside:
            _settings.enter_context(_without_bars())
            _settings.enter_context(_errors_alone())
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                _settings.close()


@contextlib.contextmanager
def _errors_alone() -> Iterator[None]:
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """A hook, not ``disable_progress_bar``: that one turns the hub's bars off too, and forgets how they were set."""
    from transformers import modeling_gguf_pytorch_utils as gguf_reader  # takes tqdm's bar, whatever the hook says
    from transformers.utils import logging

    hook = logging.set_tqdm_hook(lambda factory, args, kwargs: logging.EmptyTqdm(*args, **kwargs))
    bar = gguf_reader.tqdm
    gguf_reader.tqdm = logging.EmptyTqdm
    try:
        yield
    finally:
        gguf_reader.tqdm = bar
        logging.set_tqdm_hook(hook)
