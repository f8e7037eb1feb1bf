"""What a model directory's tokenizer needs to be opened: known from its small files, before anything large is read."""

import importlib.util
from pathlib import Path

from lowvram_lab.errors import SourceError

_SENTENCEPIECE = {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf"}
"""What transformers reads a SentencePiece file with: packages, and the modules they bring."""

TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "*.model", "*.tiktoken", "*.spm", "tekken.json")
"""What a tokenizer's files are called."""


def require_tokenizer_files(directory: Path) -> None:
    """Refuses weights without any tokenizer's file, and a SentencePiece file alone whose packages are missing.

    A directory without weights passes: fetching it says that there are none.

    Raises:
        SourceError: Says what was found and what to do, or names the packages and how to install them.
    """
    if (directory / "tokenizer.json").is_file():
        return
    if any(directory.glob("*.safetensors")) and not any(
        path for name in TOKENIZER_FILES for path in directory.glob(name)
    ):
        raise cannot_open(directory)
    alone = [path.name for path in sorted(directory.glob("*.model")) if _is_sentencepiece(path)]
    missing = [package for package, module in _SENTENCEPIECE.items() if not _installed(module)]
    if alone and missing:
        install = f"pip install {' '.join(missing)} (or pip install 'lowvram-lab[sentencepiece]')"
        raise SourceError(
            f"{directory}: its tokenizer is {alone[0]} alone, a SentencePiece file: reading it needs "
            f"{' and '.join(missing)}; run {install}"
        )


def cannot_open(directory: Path, reason: str = "") -> SourceError:
    """The error that says, in one whole line, that a directory's tokenizer cannot be opened; ``reason`` may be why."""
    why = f" ({reason[:160]})" if reason and not reason.rstrip().endswith(":") else ""  # a list's heading says nothing
    if (directory / "tokenizer.json").is_file():
        return SourceError(
            f"{directory}: cannot open its tokenizer{why}: expected a whole tokenizer.json of this model, found one "
            "that is damaged or needs more files; copy the tokenizer's files anew from the model's own repository"
        )
    found = sorted(path.name for path in directory.iterdir())
    listed = ", ".join(found[:6]) + (", …" if len(found) > 6 else "")
    return SourceError(
        f"{directory}: cannot open its tokenizer{why}: expected tokenizer.json or the model's vocabulary files beside "
        f"config.json, found {listed}; copy them there from the model's own repository"
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
