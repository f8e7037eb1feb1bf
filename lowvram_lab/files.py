"""Write a file whole or not at all."""

import os
import secrets
from pathlib import Path

from lowvram_lab.errors import LowvramError


def write_atomically(path: Path, data: str | bytes) -> None:
    """Writes to a temporary name in the same folder, then renames: a reader sees the old file or the new, never half.

    Raises:
        LowvramError: The folder does not exist or cannot be written to.
    """
    payload = data.encode() if isinstance(data, str) else data
    temporary = path.parent / f".{path.name}.{secrets.token_hex(4)}"
    try:
        with open(temporary, "xb") as stream:  # not tempfile: its files are readable by their owner only
            stream.write(payload)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise LowvramError(
            f"cannot write {path}: {error.strerror}; choose a folder that exists and is writable"
        ) from error
