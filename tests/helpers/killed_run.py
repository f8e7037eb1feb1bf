"""A run that builds a directory and is killed midway: what raises there, and all that a directory holds."""

from pathlib import Path

from lowvram_lab.conversion.resumable import PartialDirectory


class Killed(BaseException):
    """Not an ``Exception``: nothing may catch it, as nothing catches a kill."""


def killer(monkeypatch, name: str, count: int):
    """Makes the ``count``-th call of a method raise, before it does anything; returns the calls' arguments."""
    calls, method = [], getattr(PartialDirectory, name)

    def wrapped(self, *arguments):
        calls.append(arguments)
        if len(calls) == count:
            raise Killed
        return method(self, *arguments)

    monkeypatch.setattr(PartialDirectory, name, wrapped)
    return calls


def contents(directory: Path) -> dict[str, bytes]:
    """Bytes of each file, by its path."""
    files = (file for file in directory.rglob("*") if file.is_file())
    return {str(file.relative_to(directory)): file.read_bytes() for file in files}
