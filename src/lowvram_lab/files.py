"""Write a file whole or not at all."""

import os
import tempfile
from pathlib import Path

from lowvram_lab.errors import LowvramError


def write_atomically(path: Path, data: str | bytes) -> None:
    """Writes to a temporary name in the same folder, then renames: a reader sees the old file or the new, never half.

    Raises:
        LowvramError: The folder does not exist or cannot be written to.
    """
    payload = data.encode() if isinstance(data, str) else data
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as stream:
            stream.write(payload)
        umask = os.umask(0)  # there is no way to read it without setting it
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes files only their owner can read
        os.replace(temporary, path)
    except OSError as error:
        if temporary:
            Path(temporary).unlink(missing_ok=True)
        raise LowvramError(
            f"cannot write {path}: {error.strerror}; choose a folder that exists and is writable"
        ) from error
