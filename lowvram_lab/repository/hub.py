"""Fetch from the Hugging Face hub: chosen files only, no retries that hang, every failure one clear line."""

import contextlib
import functools
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from lowvram_lab.errors import SourceError, first_line
from lowvram_lab.repository.gguf_config import ROPE_FACTORS
from lowvram_lab.repository.gguf_header import (
    GgufHeader,
    part_names,
    read_gguf_header,
    read_part_elsewhere,
    whole_header,
)
from lowvram_lab.repository.names import choose_gguf
from lowvram_lab.repository.tokenizer_files import TOKENIZER_FILES

logger = logging.getLogger(__name__)

# root of the repository only, and nothing that can carry code
WEIGHTS = ["*.safetensors", "model.safetensors.index.json"]
SETTINGS = ["config.json", "generation_config.json"]
TOKENIZER = [*TOKENIZER_FILES, "special_tokens_map.json", "added_tokens.json", "chat_template*"]
NEVER = ["*/*", "*.py", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.model.v*", "consolidated*"]
_ETAG_TIMEOUT_S = 4
PARTIAL = 206
"""The status of an answer that has the bytes that were asked for, and no others."""


def offline() -> bool:
    """Whether the user asked for no network; the hub's own check reads the variable only when it is imported."""
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE or os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}


def snapshot(repo_id: str, patterns: list[str], progress: bool = True, local_only: bool = False) -> Path:
    """Brings the files of a hub repository that match, into the hub's own cache.

    ``snapshot_download`` even for one file: without a network it gives up at once, where ``hf_hub_download`` was
    measured to retry for 23 s.

    Args:
        repo_id: ``owner/name``.
        patterns: File names wanted, with wildcards.
        progress: Show progress bars, on stderr.
        local_only: Look in the cache only.

    Returns:
        The snapshot directory.

    Raises:
        SourceError: Unreachable, no such repository, or no permission.
    """
    from huggingface_hub import snapshot_download

    with _one_line(repo_id):
        return Path(
            snapshot_download(
                repo_id,
                allow_patterns=patterns,
                ignore_patterns=NEVER,
                etag_timeout=_ETAG_TIMEOUT_S,
                local_files_only=local_only or offline(),
                tqdm_class=None if progress else _silent_bar(),
            )
        )


def gguf_file(repo_id: str, wanted: str, progress: bool = True) -> Path:
    """One of a repository's GGUF files, or all its parts, in the hub's own cache; what is there is not asked for again.

    Args:
        repo_id: ``owner/name``.
        wanted: A quantisation such as ``"Q4_K_M"``, a file's name, or ``""`` for the only file.
        progress: Show progress bars, on stderr.

    Raises:
        SourceError: Unreachable, no such repository, or not one file of that name.
    """
    if here := _gguf_here(repo_id, wanted):
        return here
    name = _gguf_name(repo_id, wanted)
    return snapshot(repo_id, part_names(name), progress) / name


def gguf_header(repo_id: str, wanted: str) -> tuple[Path, GgufHeader]:
    """The header of one of a repository's GGUF files: of one that is not here by range requests, without its weights.

    Args:
        repo_id: ``owner/name``.
        wanted: See ``gguf_file``.

    Returns:
        The file, or what it is called there; and its header.

    Raises:
        CheckpointError: Damaged.
        SourceError: See ``gguf_file``.
    """
    if here := _gguf_here(repo_id, wanted):
        return here, read_gguf_header(here)
    return _header_elsewhere(repo_id, wanted)


@functools.lru_cache(maxsize=4)
def _header_elsewhere(repo_id: str, wanted: str) -> tuple[Path, GgufHeader]:
    name = _gguf_name(repo_id, wanted)
    path = Path(f"{repo_id}/{name}")
    parts = []
    for part in part_names(name):
        read = functools.partial(_read_range, repo_id, part)
        parts.append(read_part_elsewhere(path.with_name(part), read, (ROPE_FACTORS,)))
    return path, whole_header(path, parts)


def _read_range(repo_id: str, name: str, start: int, end: int) -> tuple[bytes, int]:
    """A file's bytes from ``start`` to before ``end``, or to its end; and how many it has.

    Asked once: the hub's own file system tries six times, with a line each, and reads 5 MiB ahead.
    """
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    headers = build_hf_headers() | {"Range": f"bytes={start}-{end - 1}"}
    options = {"headers": headers, "timeout": _ETAG_TIMEOUT_S}
    with _one_line(repo_id), get_session().stream("GET", hf_hub_url(repo_id, name), **options) as response:
        if response.is_error:
            response.read()
        hf_raise_for_status(response)
        size = response.headers.get("Content-Range", "").rpartition("/")[2]
        if response.status_code != PARTIAL or not size.isdigit():  # all of it would come
            raise OSError(f"expected some bytes of {name}, found an answer with status {response.status_code}")
        return response.read(), int(size)


def _gguf_here(repo_id: str, wanted: str) -> Path | None:
    """A repository's GGUF file in the hub's cache, if it is there."""
    if wanted or offline():  # without a name, what lies here may be one of several
        with contextlib.suppress(SourceError):
            here = snapshot(repo_id, ["*.gguf"], progress=False, local_only=True)
            return here / choose_gguf(repo_id, [file.name for file in here.glob("*.gguf")], wanted)
    return None


def _gguf_name(repo_id: str, wanted: str) -> str:
    """What ``wanted`` is called in the repository."""
    from huggingface_hub import HfApi, errors

    with _one_line(repo_id):
        if offline():
            raise errors.OfflineModeIsEnabled("the repository's files are not listed")
        found = HfApi().model_info(repo_id, timeout=_ETAG_TIMEOUT_S).siblings or []
    return choose_gguf(repo_id, [file.rfilename for file in found if "/" not in file.rfilename], wanted)


@contextlib.contextmanager
def _one_line(repo_id: str) -> Iterator[None]:
    """Makes one clear line of whatever the hub's client raises."""
    from huggingface_hub import errors

    def refuse(why: str, then: str):
        return SourceError(f"{repo_id}: {why}; {then}")

    elsewhere = "name a local directory, a .gguf file, or a built-in model (lowvram models)"
    try:
        yield
    except errors.GatedRepoError as error:
        raise refuse(
            "gated on the hub", "accept its licence on its page, then run 'hf auth login', or " + elsewhere
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise refuse("no such repository on the hub, or a private one", "check the spelling or " + elsewhere) from error
    except errors.HFValidationError as error:
        raise refuse("not a valid hub id", elsewhere) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        why = "HF_HUB_OFFLINE forbids the network" if offline() else "the hub cannot be reached"
        raise refuse(f"not in the hub's cache, and {why}", "connect and try again, or " + elsewhere) from error
    except Exception as error:  # the hub's client lets errors of its HTTP library and of the disk through
        raise refuse(f"download failed ({first_line(error)})", "try again, or " + elsewhere) from error


def _silent_bar():
    from tqdm.auto import tqdm

    class SilentBar(tqdm):
        def __init__(self, *args, **kwargs):
            kwargs["disable"] = True
            kwargs.pop("name", None)
            super().__init__(*args, **kwargs)

    return SilentBar
