"""What people type for a model: a page of the hub, ``hf.co/owner/name:Q4_K_M``, another tool's name, one without owner.

It touches no network and no disk: it says what a text names, which of a repository's GGUF files is meant, and what is
nearest to a name that is none.
"""

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PureWindowsPath

from lowvram_lab.errors import SourceError
from lowvram_lab.packaged import packaged_facts
from lowvram_lab.repository.gguf_header import part_names, whole_stem

_SITE = re.compile(r"(https?://)?(www\.)?(huggingface\.co|hf\.co)/+|hf://", re.IGNORECASE)
_ID_AND_TAG = r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?::([\w.-]+))?"
_REPOSITORY = re.compile(rf"{_ID_AND_TAG}/?")
_PAGE = re.compile(rf"{_ID_AND_TAG}(?:/(?:tree|blob|resolve|raw)/([^/]+)(?:/(.*))?)?")
_OTHERS = ("datasets/", "spaces/", "collections/", "models/", "docs/")
_QUANTISATION = re.compile(r"(?:^|[-._])((?:UD-)?(?:I?Q\d\w*|TQ\d_\d|MXFP4\w*|BF16|F16|F32|FP16))$", re.IGNORECASE)
_MOST_LISTED = 8


@dataclass(frozen=True)
class HubName:
    """A model on the hub.

    Attributes:
        repo_id: ``owner/name``.
        gguf: Which of its GGUF files, by name or quantisation such as ``"Q4_K_M"``; ``""`` for the only one, and
            ``None`` where the repository's safetensors are meant.
    """

    repo_id: str
    gguf: str | None = None

    def __str__(self) -> str:
        return f"{self.repo_id}:{self.gguf}" if self.gguf else self.repo_id


def hub_name(text: str) -> HubName | None:
    """What a hub id, an address of the hub, or ``hf.co/owner/name:quantisation`` names, or ``None``.

    Raises:
        SourceError: An address on the hub that is no model, or another revision than its main one.
    """
    site = _SITE.match(text)
    if not site:
        match = _REPOSITORY.fullmatch(text)
        tag = match[2] if match else None
        return _named(match[1], tag) if match else None
    page = re.split(r"[?#]", text[site.end() :], maxsplit=1)[0]
    match = None if page.startswith(_OTHERS) else _PAGE.fullmatch(page.strip("/"))
    if match is None:
        raise SourceError(f"{text}: expected a model's page, such as https://huggingface.co/Qwen/Qwen2.5-3B-Instruct")
    repo_id, tag, revision, file = match.groups()
    if revision not in (None, "main"):
        raise SourceError(
            f"{text}: names revision {revision}, and only main is fetched here; download it and name its directory"
        )
    if file and file.lower().endswith(".gguf"):
        if "/" in file:
            raise SourceError(f"{text}: a file in a folder of the repository; download it and name the file")
        tag = file
    return _named(repo_id, tag)


def _named(repo_id: str, tag: str | None) -> HubName:
    if tag and tag.lower() != "latest":
        return HubName(repo_id, tag)
    return HubName(repo_id, "" if tag or repo_id.lower().endswith("-gguf") else None)


def choose_gguf(repo_id: str, files: list[str], wanted: str) -> str:
    """Which file of a repository a quantisation or a file's name means; with ``""``, the only one there is.

    Of one that is split, the first part.

    Raises:
        SourceError: None or several; the message names those there are.
    """
    ggufs = sorted(name for name in files if name.lower().endswith(".gguf") and "mmproj" not in name.lower())
    parts = {name: part_names(name) for name in ggufs}
    models = [name for name in ggufs if name == parts[name][0] or parts[name][0] not in parts]
    if not models:
        drop = f"; leave out ':{wanted}'" if wanted else ""
        raise SourceError(f"{repo_id}: expected a .gguf file in the repository, found none{drop}")
    ending = re.compile(rf"(?:^|[-._]){re.escape(wanted)}$", re.IGNORECASE)
    stems = {name: whole_stem(name) for name in models}
    words = {name: [word.lower() for word in parts[name]] for name in models}
    found = [name for name in models if not wanted or wanted.lower() in words[name] or ending.search(stems[name])]
    if len(found) > 1 and wanted:  # UD-Q4_K_M ends in Q4_K_M too
        found = [n for n in found if (q := _QUANTISATION.search(stems[n])) and q[1].lower() == wanted.lower()] or found
    if len(found) == 1:
        first, whole = found[0], parts[found[0]]
        if missing := [name for name in whole if name not in parts]:
            raise SourceError(f"{repo_id}: {first} is one of {len(whole)} parts, and {missing[0]} is not there")
        return first
    there = list(dict.fromkeys(q[1] if (q := _QUANTISATION.search(stem)) else stem for stem in stems.values()))
    listed = ", ".join(there[:_MOST_LISTED]) + (" …" if len(there) > _MOST_LISTED else "")
    asked = f"found {len(found)} files for {wanted!r}" if wanted else "found several"
    raise SourceError(
        f"{repo_id}: expected the name of one GGUF file, {asked}; write {repo_id}:{there[0]} (it has {listed})"
    )


def known_repository(text: str) -> str | None:
    """The hub id, as the hub spells it, of a model whose config is packaged: by id or by name alone, in any case."""
    wanted = text.lower()
    ids = [hub_id for fact in packaged_facts().values() for hub_id in (fact["hub_id"], *fact["same_sizes"])]
    return next((hub_id for hub_id in ids if wanted in (hub_id.lower(), hub_id.lower().partition("/")[2])), None)


def packaged_name(hub_id: str) -> str | None:
    """The packaged config that is a repository's own."""
    facts = packaged_facts().items()
    return next((name for name, fact in facts if fact["hub_id"].lower() == hub_id.lower()), None)


def same_sizes(hub_id: str) -> str | None:
    """The packaged config of another release of a repository's model: the same sizes and context, other weights."""
    facts = packaged_facts().items()
    return next((name for name, fact in facts if hub_id.lower() in map(str.lower, fact["same_sizes"])), None)


def did_you_mean(text: str, names: Iterable[str]) -> str:
    """The end of a message about a name that is none: the nearest names, or all that are known."""
    names, plain = list(names), text.lower().replace(":", "-")
    near = difflib.get_close_matches(plain, names, n=3, cutoff=0.5)
    near = [name for name in near if _family(name) == _family(plain)]
    if tagged := [name for name in names if ":" in name and name.partition(":")[0] == text.lower().partition(":")[0]]:
        return f"did you mean {' or '.join(tagged)}? It is the one file of that model that is known by name"
    if ":" in text:
        hint = f"did you mean {near[0]}?" if near else "write a hub id (owner/name);"
        return f"{hint} Names and files of ollama are not read"
    hint = f"did you mean {' or '.join(near)}?" if near else f"built-in models are {', '.join(names)};"
    ids = [fact["hub_id"].partition("/") for fact in packaged_facts().values()]
    owner = next((owner for owner, _, name in ids if _family(name) == _family(text)), "OWNER")
    return f"{hint} on the hub a name has its owner in front: {owner}/{text}"


def nearest_known(hub_id: str) -> str | None:
    """The packaged name that a repository's name begins with: ``"qwen3-4b"`` for another release of it."""
    name = hub_id.lower().partition("/")[2]
    return next((known for known in packaged_facts() if name.startswith(known)), None)


def _family(name: str) -> str:
    """The letters that a model's name begins with: qwen, smollm."""
    return re.match(r"[a-z]*", name.lower())[0]


def of_another_system(text: str) -> str:
    """What to write for a path in Windows' spelling on a system that has none, or ``""``."""
    path = PureWindowsPath(text)
    here = path.as_posix()
    if path.drive:
        drive = path.drive.rstrip(":").lower()
        return f"; that is a path of Windows, in WSL /mnt/{drive}{here[len(path.drive) :]}"
    return f"; did you mean {here}?" if "\\" in text else ""
