"""Whether and how a model can chat, asked of small files: known before weights are fetched, converted or loaded."""

import inspect
import json
from collections.abc import Collection
from pathlib import Path

from lowvram_lab.errors import LowvramError, SourceError, first_line
from lowvram_lab.repository import hub

FILES = ["tokenizer_config.json", "chat_template*"]
"""What a hub repository is asked for: a few kilobytes."""


def base_model(name: str) -> SourceError:
    """The refusal of a model without a chat template, and what it is good for."""
    return SourceError(
        f"{name} has no chat template, so it is a base model: it goes on with a text (lowvram complete {name} "
        "--prompt TEXT); to chat, name an instruction-tuned one"
    )


def check_arguments(template: str, arguments: Collection[str]) -> None:
    """Refuses arguments that would change nothing, or something else than the template.

    Args:
        template: A chat template.
        arguments: Names of what it is to be given beside messages.

    Raises:
        LowvramError: A name that ``apply_chat_template`` takes for itself, or that the template does not know.
        SourceError: A template that is no Jinja.
    """
    check_names(arguments)
    known = _known_names(template) if arguments else set()
    for name in arguments:
        if name not in known:
            knows = f"it knows {', '.join(sorted(known))}" if known else "it knows none"
            raise LowvramError(f"the model's chat template does not know the argument {name!r}; {knows}")


def check_names(arguments: Collection[str]) -> None:
    """The part of ``check_arguments`` that needs no template."""
    own = _own_names() if arguments else set()
    for name in arguments:
        if name in own:
            raise LowvramError(
                f"{name!r} is transformers' own argument, not one of the chat template's, and cannot be given here; "
                "name one that the template knows (enable_thinking, say)"
            )


def _own_names() -> set[str]:
    """What ``apply_chat_template`` takes by name, and what transformers gives a template by itself."""
    from transformers import PreTrainedTokenizerBase

    taken = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
    return {*taken, "messages", *PreTrainedTokenizerBase.SPECIAL_TOKENS_ATTRIBUTES}


def _known_names(template: str) -> set[str]:
    """The names that a template asks for, and that whoever renders it may give."""
    from jinja2 import TemplateError, meta
    from transformers.utils.chat_template_utils import _compile_jinja_template

    try:
        environment = _compile_jinja_template(template).environment
        asked = meta.find_undeclared_variables(environment.parse(template))
    except TemplateError as error:
        raise SourceError(f"the model's chat template is no Jinja template ({first_line(error)[:160]})") from error
    return asked - environment.globals.keys() - _own_names()


def _for_chats(templates: dict[str, str], name: str) -> str:
    """The one of a model's named templates that a chat goes by.

    Raises:
        SourceError: None of them is for chats.
    """
    if templates and "default" not in templates:
        raise SourceError(
            f"{name} has chat templates for {', '.join(sorted(templates))}, and none called default, so none for a "
            "chat; pick another model, or name one of them default"
        )
    return templates.get("default", "")


def in_directory(directory: Path) -> str | None:
    """The chat template of a model directory, ``""`` for none; ``None`` where it has no tokenizer, or a damaged one.

    Raises:
        SourceError: It has several, and none for chats.
    """
    files = {path.stem: path for path in directory.glob("additional_chat_templates/*.jinja")}
    if (single := directory / "chat_template.jinja").is_file():
        files["default"] = single
    settings = directory / "tokenizer_config.json"
    if not files and not settings.is_file():
        return "" if any(directory.glob("tokenizer*")) else None
    try:
        if files:
            found = {name: path.read_text(encoding="utf-8") for name, path in files.items()}
        else:
            found = json.loads(settings.read_text(encoding="utf-8")).get("chat_template") or ""
        if isinstance(found, list):
            found = {entry["name"]: entry["template"] for entry in found}
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        return None
    if isinstance(found, dict):
        return _for_chats(found, directory.name)
    return found if isinstance(found, str) else None


def in_gguf(path: Path) -> str:
    """The chat template in a ``.gguf`` file's metadata, ``""`` for none.

    Raises:
        CheckpointError: Damaged file.
    """
    from lowvram_lab.repository.gguf_header import read_gguf_header

    return read_gguf_header(path).metadata.get("tokenizer.chat_template") or ""


def in_repository(hub_id: str) -> str | None:
    """The chat template of a hub repository, ``""`` for none; ``None`` where it cannot be asked, nor then its weights.

    Raises: what ``in_directory`` raises.
    """
    try:
        directory = hub.snapshot(hub_id, FILES, progress=False)
    except SourceError:
        return None
    return in_directory(directory)
