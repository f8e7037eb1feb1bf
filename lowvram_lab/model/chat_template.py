"""Whether a model can chat, asked of small files: known before weights are fetched, converted or loaded."""

import json
from pathlib import Path

from lowvram_lab import hub
from lowvram_lab.errors import SourceError

FILES = ["tokenizer_config.json", "chat_template*"]
"""What a hub repository is asked for: a few kilobytes."""


def base_model(name: str) -> SourceError:
    """The refusal of a model without a chat template, and what it is good for."""
    return SourceError(
        f"{name} has no chat template, so it is a base model: it goes on with a text (lowvram complete {name} "
        "--prompt TEXT); to chat, name an instruction-tuned one"
    )


def in_directory(directory: Path) -> bool | None:
    """Whether a model directory has a chat template; ``None`` where it has no tokenizer, or a damaged one."""
    if (directory / "chat_template.jinja").is_file() or any(directory.glob("additional_chat_templates/*.jinja")):
        return True
    settings = directory / "tokenizer_config.json"
    if not settings.is_file():
        return False if any(directory.glob("tokenizer*")) else None
    try:
        return bool(json.loads(settings.read_text(encoding="utf-8")).get("chat_template"))
    except (OSError, ValueError, AttributeError):
        return None


def in_gguf(path: Path) -> bool:
    """Whether a ``.gguf`` file's metadata has a chat template.

    Raises:
        CheckpointError: Damaged file.
    """
    from lowvram_lab.model.gguf import read_gguf_header

    return bool(read_gguf_header(path).metadata.get("tokenizer.chat_template"))


def in_repository(hub_id: str) -> bool | None:
    """Whether a hub repository has a chat template; ``None`` where it cannot be asked, and then nor can its weights."""
    try:
        return in_directory(hub.snapshot(hub_id, FILES, progress=False))
    except SourceError:
        return None
