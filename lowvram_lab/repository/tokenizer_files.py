"""What a model directory's tokenizer needs to be opened: known from its small files, before anything large is read."""

import importlib.util
from pathlib import Path

from lowvram_lab.errors import SourceError

_SENTENCEPIECE = {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf"}
"""What transformers reads a SentencePiece file with: packages, and the modules they bring."""


def require_libraries(directory: Path) -> None:
    """Refuses a tokenizer that is a SentencePiece file alone where the packages that read it are missing.

    Raises:
        SourceError: Names them, and how to install them.
    """
    if (directory / "tokenizer.json").is_file():
        return
    alone = [path.name for path in sorted(directory.glob("*.model")) if _is_sentencepiece(path)]
    missing = [package for package, module in _SENTENCEPIECE.items() if not _installed(module)]
    if alone and missing:
        install = f"pip install {' '.join(missing)} (or pip install 'lowvram-lab[sentencepiece]')"
        raise SourceError(
            f"{directory}: its tokenizer is {alone[0]} alone, a SentencePiece file: reading it needs "
            f"{' and '.join(missing)}; run {install}"
        )


def _is_sentencepiece(path: Path) -> bool:
    """Whether the file is a message of protobuf whose first field is a piece; tiktoken's files are text."""
    with path.open("rb") as file:
        return file.read(1) == b"\n"


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of google.protobuf, where there is no google
        return False
